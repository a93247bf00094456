"""Adapters of allowed sources: found by name, refused, and downloaded from URLs."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from sglang_elora.adapters import (
    AdapterError,
    AllowedSources,
    download,
    has_adapter,
    is_url,
    keep_only,
    remote,
)

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A source with a URL: fsspec's in-memory file system."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PROTOCOLS", remote.PROTOCOLS | {"memory"})
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


def find(sources: AllowedSources, name: str) -> str | None:
    """Search the sources in order, as a server does."""
    path, urls = sources.look(name)
    for url in urls:
        if has_adapter(url):
            return url
    if urls:
        sources.missed(name)
    return path


def test_sources_are_searched_in_order_with_folders_before_urls(
    tmp_path: Path, bucket: str
) -> None:
    add(tmp_path / "a" / "sql"), add(tmp_path / "b" / "sql"), add(tmp_path / "b" / "team" / "poem")
    put(f"{bucket}/far", adapter_config__json="{}")
    sources = AllowedSources([bucket, f"{tmp_path}/a/", str(tmp_path / "b")])
    put(f"{bucket}/sql", adapter_config__json="{}")
    assert find(sources, "sql") == f"{tmp_path}/a/sql"
    assert find(sources, "team/poem") == f"{tmp_path}/b/team/poem"
    assert find(sources, "far") == f"{bucket}/far"
    assert find(sources, "nowhere") is None


@pytest.mark.parametrize(
    "name", ["..", "../out", "a/../../out", ".hidden", "/etc", "a//b", "a/", "", "a\\b", "~", "a b"]
)
def test_adapter_names_that_escape_the_source_are_not_found(
    name: str, tmp_path: Path, bucket: str
) -> None:
    for folder in ("out", "in/a", "in/.hidden", "in/a b"):
        add(tmp_path / folder)
    put("memory://bucket/out", adapter_config__json="{}")
    assert find(AllowedSources([str(tmp_path / "in"), bucket]), name) is None


def test_symlinks_out_of_the_source_are_not_followed(tmp_path: Path) -> None:
    outside, inside = add(tmp_path / "outside"), add(tmp_path / "in" / "a")
    (tmp_path / "in" / "linked").symlink_to(outside)
    (inside / "extra.safetensors").symlink_to(outside / WEIGHTS)
    sources = AllowedSources([str(tmp_path / "in")])
    assert find(sources, "linked") is None
    assert find(sources, "a") is None


def test_missing_adapter_is_not_looked_up_again_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times_s = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: times_s[-1])
    sources = AllowedSources([str(tmp_path)])
    assert find(sources, "late") is None
    add(tmp_path / "late")
    for time_s in (101.0, 103.0, 104.9):  # however often it is asked for
        times_s.append(time_s)
        assert find(sources, "late") is None
    times_s.append(105.1)
    assert find(sources, "late") == f"{tmp_path}/late"


def test_paths_are_allowed_inside_the_sources_only(tmp_path: Path) -> None:
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
def test_relative_source_is_refused(place: str) -> None:
    with pytest.raises(ValueError, match="absolute folder or a URL"):
        AllowedSources([place])


def test_is_url_recognises_supported_urls() -> None:
    assert is_url("s3://bucket/a") and is_url("http://127.0.0.1:8000/a") and is_url("hf://acme/a")
    assert not any(
        map(is_url, ("/srv/a", "acme/sql", "C:\\a", "zip::s3://bucket", "s3://", "a b://c"))
    )


def test_remote_version_is_downloaded_once_and_completely(bucket: str, tmp_path: Path) -> None:
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


def test_interrupted_download_leaves_no_files(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_off(self: object, size: int = -1) -> bytes:
        raise ConnectionError("cut")

    put(f"{bucket}/sql", adapter_config__json="{}", adapter_model__safetensors="one")
    monkeypatch.setattr(MemoryFile, "read", break_off)
    with pytest.raises(AdapterError, match=r"'sql'.*fetching it failed: ConnectionError: cut"):
        download("sql", f"{bucket}/sql")
    assert list((tmp_path / "cache").rglob("*.*")) == []


def test_download_errors_name_the_url(bucket: str) -> None:
    put(f"{bucket}/empty", README__md="text")
    for url, reason in (
        (f"{bucket}/empty", "there is no adapter_config.json"),
        (f"{bucket}/none", "fetching it failed: FileNotFoundError"),
        ("nosuch://bucket/a", "nosuch:// is none of"),
        ("file:///etc", "file:// is none of"),
        ("github://acme:adapters@main/sql", "github:// is none of"),
    ):
        with pytest.raises(AdapterError, match=reason) as raised:
            download("sql", url)
        assert url in str(raised.value)


@pytest.mark.parametrize("told", [True, False], ids=["told before", "found while it comes"])
def test_oversized_remote_adapter_is_not_downloaded(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    monkeypatch.setattr(remote, "MAX_ADAPTER_BYTES", 100)
    put(f"{bucket}/sql", adapter_config__json="{}", adapter_model__safetensors="x" * 99)
    if not told:
        info = MemoryFileSystem.info
        monkeypatch.setattr(MemoryFileSystem, "info", lambda *a, **o: info(*a, **o) | {"size": 1})
    with pytest.raises(AdapterError, match=r"of at most 100|more than 100 bytes"):
        download("sql", f"{bucket}/sql")
    assert list((tmp_path / "cache").rglob("*.*")) == []


def test_download_cache_keeps_adapters_in_use_and_recently_used(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "MAX_CACHE_BYTES", 250)
    folders = {}
    for i, name in enumerate(("held", "oldest", "older", "last")):
        url = f"{bucket}/{name}"
        put(url, adapter_config__json="{}", adapter_model__safetensors="x" * 98)
        folders[name] = download(name, url)
        os.utime(folders[name], (i, i))
        keep_only([str(folders["held"]), "/srv/adapters/another"])
    assert [name for name, folder in folders.items() if folder.exists()] == ["held", "last"]
    keep_only([str(folders["last"])])
    again = download("older", f"{bucket}/older")
    assert again == folders["older"] and again.exists()
    assert not folders["held"].exists() and folders["last"].exists()
    keep_only([])


def test_download_does_not_follow_redirects_to_another_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A redirect to the same host is followed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    add(tmp_path / "served" / "sql")

    class Redirecting(SimpleHTTPRequestHandler):
        def send_head(self) -> Any:
            for where in ("elsewhere", "here"):
                if self.path.startswith(f"/{where}/"):
                    host = "" if where == "here" else f"http://127.0.0.1:{other.server_port}"
                    self.send_response(302)
                    self.send_header("Location", host + self.path.removeprefix(f"/{where}"))
                    self.end_headers()
                    return None
            return super().send_head()

        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Redirecting, directory=str(tmp_path / "served"))
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
    for server in servers:
        threading.Thread(target=server.serve_forever).start()
    try:
        url, other = f"http://127.0.0.1:{servers[0].server_port}", servers[1]
        assert (download("sql", f"{url}/sql") / WEIGHTS).read_text() == "weights"
        with pytest.raises(AdapterError, match="leads to another host"):
            download("sql", f"{url}/elsewhere/sql")
        assert has_adapter(f"{url}/here/sql")
        with pytest.raises(OSError, match="leads to another host"):
            has_adapter(f"{url}/elsewhere/sql")
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
