"""Adapters of allowed places: found by name, refused, and fetched from URLs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from sglang_elora.adapters import AdapterError, AllowedSources, is_url
from sglang_elora.adapters.remote import download

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A place behind a URL: fsspec's own file system in memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield "memory://bucket/adapters"
    fsspec.filesystem("memory").store.clear()


def put(url: str, **files: str) -> None:
    fs = fsspec.filesystem("memory")
    for name, text in files.items():
        fs.pipe_file(f"{url}/{name.replace('__', '.')}", text.encode())


def add(folder: Path, text: str = "{}") -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "adapter_config.json").write_text(text)
    (folder / WEIGHTS).write_text("weights")
    return folder


def test_the_first_place_that_has_the_name_counts(tmp_path: Path, bucket: str) -> None:
    add(tmp_path / "a" / "sql"), add(tmp_path / "b" / "sql"), add(tmp_path / "b" / "team" / "poem")
    put(f"{bucket}/far", adapter_config__json="{}")
    sources = AllowedSources([f"{tmp_path}/a/", str(tmp_path / "b"), bucket])
    assert sources.find("sql") == f"{tmp_path}/a/sql"
    assert sources.find("team/poem") == f"{tmp_path}/b/team/poem"
    assert sources.find("far") == f"{bucket}/far"
    assert sources.find("nowhere") is None


@pytest.mark.parametrize(
    "name", ["..", "../out", "a/../../out", ".hidden", "/etc", "a//b", "a/", "", "a\\b", "~", "a b"]
)
def test_names_that_lead_elsewhere_are_no_names(name: str, tmp_path: Path, bucket: str) -> None:
    for folder in ("out", "in/a", "in/.hidden", "in/a b"):
        add(tmp_path / folder)
    put("memory://bucket/out", adapter_config__json="{}")
    assert AllowedSources([str(tmp_path / "in"), bucket]).find(name) is None


def test_links_that_lead_out_are_not_followed(tmp_path: Path) -> None:
    outside, inside = add(tmp_path / "outside"), add(tmp_path / "in" / "a")
    (tmp_path / "in" / "linked").symlink_to(outside)
    (inside / "extra.safetensors").symlink_to(outside / WEIGHTS)
    sources = AllowedSources([str(tmp_path / "in")])
    assert sources.find("linked") is None
    assert sources.find("a") is None


def test_what_is_missing_is_not_looked_for_again_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    sources = AllowedSources([str(tmp_path)])
    assert sources.find("late") is None
    add(tmp_path / "late")
    assert sources.find("late") is None
    now_s += 5.1
    assert sources.find("late") == f"{tmp_path}/late"


def test_paths_are_allowed_inside_of_a_place_only(tmp_path: Path) -> None:
    inside, outside = add(tmp_path / "in" / "a"), add(tmp_path / "out")
    (tmp_path / "in" / "linked").symlink_to(outside)
    sources = AllowedSources([str(tmp_path / "in"), "s3://bucket/adapters", "hf://acme"])
    assert sources.allows(str(inside))
    assert sources.allows("s3://bucket/adapters/team/sql")
    assert sources.allows("acme/sql") and sources.allows("hf://acme/sql")
    for path in (
        str(outside),
        str(tmp_path / "in" / "linked"),
        str(tmp_path / "in" / ".." / "out"),
        "s3://bucket/adapters/../secret",
        "s3://bucket/adapters-of-others/sql",
        "s3://bucket/adapters",
        "https://example.org/sql",
        "other/sql",
        "file:///etc",
    ):
        assert not sources.allows(path), path


@pytest.mark.parametrize("place", ["relative/folder", "", "simplecache::s3://bucket"])
def test_a_place_has_to_be_absolute(place: str) -> None:
    with pytest.raises(ValueError, match="absolute folder or a URL"):
        AllowedSources([place])


def test_urls() -> None:
    assert is_url("s3://bucket/a") and is_url("http://127.0.0.1:8000/a") and is_url("hf://acme/a")
    assert not any(
        map(is_url, ("/srv/a", "acme/sql", "C:\\a", "zip::s3://bucket", "s3://", "a b://c"))
    )


def test_a_version_is_fetched_once_and_whole(bucket: str, tmp_path: Path) -> None:
    url = f"{bucket}/sql"
    put(url, adapter_config__json="{}", README__md="text")
    put(url, adapter_model__safetensors="one", adapter_model__bin="not read")
    first = download("sql", url)
    assert sorted(p.name for p in first.iterdir()) == ["adapter_config.json", WEIGHTS]
    assert download("other-name", url) == first
    put(url, adapter_model__safetensors="two!")
    second = download("sql", url)
    assert (first / WEIGHTS).read_text() == "one"
    assert (second / WEIGHTS).read_text() == "two!"
    assert sorted(first.parent.iterdir()) == sorted([first, second])


def test_a_download_that_breaks_leaves_nothing(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_off(self: object, path: str, local: str) -> None:
        Path(local).write_text("half of it")
        raise ConnectionError("cut")

    put(f"{bucket}/sql", adapter_config__json="{}", adapter_model__safetensors="one")
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "get_file", break_off)
    with pytest.raises(AdapterError, match=r"'sql'.*fetching it failed: ConnectionError: cut"):
        download("sql", f"{bucket}/sql")
    assert list((tmp_path / "cache").rglob("*.*")) == []


def test_errors_name_the_url(bucket: str) -> None:
    put(f"{bucket}/empty", README__md="text")
    for url, reason in (
        (f"{bucket}/empty", "there is no adapter_config.json"),
        (f"{bucket}/none", "fetching it failed: FileNotFoundError"),
        ("nosuch://bucket/a", "Protocol not known: nosuch"),
    ):
        with pytest.raises(AdapterError, match=reason) as raised:
            download("sql", url)
        assert url in str(raised.value)
