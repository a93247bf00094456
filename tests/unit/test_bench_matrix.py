"""The benchmark's matrix: what a row says of its origin, what is refused, how one continues."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_elora.bench import matrix
from sglang_elora.bench.calibrate import GPUS, link
from sglang_elora.bench.machine import host_id, is_dirty
from sglang_elora.bench.matrix import Matrix, Plan, Watcher
from sglang_elora.bench.record import Played
from sglang_elora.bench.result import Result, read
from sglang_elora.bench.servers import EmulatedLink
from sglang_elora.bench.sides import Side, Sizes, make_side
from sglang_elora.workloads import Trace

COMMIT = "abc1234"
HERE = EmulatedLink(0.2, 30.0, 0.2, gpu="l4", host=host_id())
PLAN = Plan(("translation",), ("stock-default", "elora:elora@2"), runs=2, duration_s=4.0)


class FakeBench:
    """A bench whose servers are names."""

    def __init__(self, link: EmulatedLink | None = HERE) -> None:
        self.link = link
        self.started: list[str] = []

    def side(self, name: str, trace: Trace) -> Side:
        return make_side(name, Sizes(), 64, 2048)

    def settings(self, side: Side) -> dict[str, str]:
        return {"OMP_NUM_THREADS": str(side.threads)}

    def facts(self) -> dict[str, Any]:
        return {"link": self.link.facts() if self.link else None, "sizes": Sizes().facts()}

    @contextmanager
    def server(self, side: Side, log_path: Path) -> Iterator[Any]:
        self.started.append(side.name)
        yield SimpleNamespace(url=f"http://{side.name}", suspend=lambda: None, resume=lambda: None)


@pytest.fixture(autouse=True)
def quick_play(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tree is clean, and a replay takes no time and has no records."""
    told = {"when": "then", "host": host_id(), "commit": COMMIT}
    monkeypatch.setattr(matrix, "machine", lambda: dict(told))
    monkeypatch.setattr(matrix, "commit", lambda: COMMIT)
    monkeypatch.setattr(matrix, "_empty", lambda server, path: None)
    monkeypatch.setattr(
        matrix,
        "play_in_turns",
        lambda replays, slice_s: [Played((), 1.0, None, None) for _ in replays],
    )


def run(out: Path, bench: FakeBench, plan: Plan = PLAN) -> list[dict[str, Any]]:
    silent = Watcher(lambda _: None, lambda _: None, lambda: None, lambda _: None)
    return Matrix(bench, plan, out, silent).play()  # type: ignore[arg-type]


def test_row_says_when_where_and_with_which_settings_it_was_measured(tmp_path: Path) -> None:
    rows = run(tmp_path, FakeBench())
    assert [row["side"] for row in rows] == [
        *("stock-default", "elora:elora@2"),
        *("elora:elora@2", "stock-default"),
    ]
    for row in rows:
        assert row["begun_at"] and row["host"] == host_id() and row["commit"] == COMMIT
        assert row["link"]["calibrated_on"] == row["host"] and row["link"]["gpu"] == "l4"
        assert row["warm_up_s"] == 2.0, "a session lives longer than half of the trace"
    assert rows[1]["settings"] == {"OMP_NUM_THREADS": "2"}
    assert {Result.from_row(row).warm_up_s for row in read(tmp_path)} == {2.0}


def test_matrix_continues_with_the_rows_that_are_missing(tmp_path: Path) -> None:
    first = run(tmp_path, FakeBench())
    again = FakeBench()
    assert run(tmp_path, again) == json.loads(json.dumps(first))
    assert again.started == []
    (tmp_path / "translation-elora_elora@2-1.json").unlink()
    assert len(run(tmp_path, again)) == 4
    assert again.started == ["elora:elora@2"]


@pytest.mark.parametrize("what", ["commit", "host", "link"])
def test_rows_of_another_commit_machine_or_link_are_measured_again(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, FakeBench())
    if what == "link":
        again = FakeBench(EmulatedLink(0.3, 30.0, 0.3, gpu="l4", host=host_id()))
    else:
        again = FakeBench(None)
        for path in tmp_path.glob("*.json"):
            row = json.loads(path.read_text())
            path.write_text(json.dumps({**row, "link": None, what: "other"}))
    run(tmp_path, again)
    assert len(again.started) == 4


def test_dirty_tree_and_other_machines_link_are_refused_unless_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = FakeBench(EmulatedLink(0.2, 30.0, host="another"))
    with pytest.raises(ValueError, match=r"calibrated on machine another.*--allow-other-link"):
        run(tmp_path, foreign)
    allowed = Plan(
        ("translation",), ("stock-default",), runs=1, duration_s=4.0, allow_other_link=True
    )
    assert len(run(tmp_path, foreign, allowed)) == 1

    told = {"when": "then", "host": host_id(), "commit": f"{COMMIT}-dirty"}
    monkeypatch.setattr(matrix, "machine", lambda: dict(told))
    with pytest.raises(ValueError, match=r"uncommitted changes.*--allow-dirty"):
        run(tmp_path, FakeBench())
    dirty = Plan(("translation",), ("stock-default",), runs=1, duration_s=4.0, allow_dirty=True)
    bench = FakeBench()
    rows = [*run(tmp_path, bench, dirty), *run(tmp_path, bench, dirty)]
    assert all(is_dirty(row["commit"]) for row in rows)
    assert len(bench.started) == 2, "rows of a dirty tree are never taken for equal"


def test_tree_that_changes_during_the_runs_ends_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix, "commit", lambda: "def5678")
    with pytest.raises(ValueError, match="the tree changed from abc1234 to def5678"):
        run(tmp_path, FakeBench())


def test_link_has_the_load_share_of_the_gpu_in_both_directions() -> None:
    shares = {name: round(gpu.load_share, 3) for name, gpu in GPUS.items()}
    assert shares == {"l4": 0.026, "a10": 0.027, "h100": 0.076, "h200": 0.076}
    for gpu in GPUS.values():
        found = link(token_s=1e-4, adapter_bytes=1_000_000, gpu=gpu)
        assert 1e6 / (found["gbytes_per_s"] * 1e9) == pytest.approx(gpu.load_share * 0.1)
        assert found["to_host_gbytes_per_s"] == found["gbytes_per_s"]


def test_link_file_of_before_has_no_machine_and_no_copies_to_the_host(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({"link": {"gbytes_per_s": 0.2, "latency_us": 38.0}}))
    found = EmulatedLink.load(path)
    assert found.host == "" and len(found.env) == 2
    assert len(HERE.env) == 3
