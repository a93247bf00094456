"""What the demo makes of its records: summaries, tables, plot, JSON, and its command line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from sglang_elora.demo.__main__ import launch_flags, parse_arguments
from sglang_elora.demo.loads import AdapterMoves, adapter_moves
from sglang_elora.demo.plot import save_plot
from sglang_elora.demo.report import adapter_table, cache_table, slot_table, turn_table
from sglang_elora.demo.slots import slot_demand
from sglang_elora.demo.summary import DemoRun
from sglang_elora.demo.terminal import Terminal
from sglang_elora.demo.turns import TurnFailure, TurnRecord, TurnResult
from sglang_elora.demo.watch import CacheWatch
from sglang_elora.testbed.adapters import demo_adapters

SPECS = demo_adapters(3)


def record(session: int, turn: int, ttft_s: float, cached: int) -> TurnRecord:
    return TurnRecord(
        session=session,
        adapter=SPECS[session].name,
        turn=turn,
        sent_s=0.0,
        ttft_s=ttft_s,
        total_s=1.0,
        prompt_tokens=100,
        cached_tokens=cached,
        completion_tokens=8,
    )


RESULTS: Sequence[TurnResult] = [
    record(0, 0, 0.3, 0),
    record(1, 0, 0.1, 0),
    record(1, 1, 0.2, 60),
    record(0, 1, 0.4, 80),
    TurnFailure(session=2, adapter=SPECS[2].name, turn=0, error="gone"),
]


COUNTS = {
    "adapter_loads": 4,
    "adapter_evictions": 3,
    "adapter_lookups.device": 3,
    "adapter_lookups.host": 1,
    "prompt_tokens.device": 50,
    "prompt_tokens.host": 10,
    "prompt_tokens.computed": 40,
    "kv_slots_evicted": 90,
    "kv_slots_to_host": 80,
    "kv_slots_from_host": 70,
    "hints_used": 2,
    "prefetched_slots": 20,
    "prefetched_slots_used": 10,
}


def run(moves: Mapping[str, AdapterMoves] | None = None) -> DemoRun:
    if moves is not None:
        moves = {spec.name: AdapterMoves(0, 0, 0) for spec in SPECS} | dict(moves)
    return DemoRun(
        specs=SPECS,
        results=RESULTS,
        moves=moves,
        counts=COUNTS,
        pool_slots=100,
        duration_s=2.0,
        server_command=["python"],
    )


def rendered(renderable: object) -> str:
    console = Console(file=StringIO(), width=120)
    console.print(renderable)
    text = console.file
    assert isinstance(text, StringIO)
    return text.getvalue()


def test_report_summarises_ttft_by_turn() -> None:
    first, second = run().by_turn()
    assert (first.turn, first.num_requests, first.cached_share) == (0, 2, 0.0)
    assert first.mean_ttft_s == pytest.approx(0.2)
    assert first.p95_ttft_s == pytest.approx(0.29)
    assert (second.prompt_tokens, second.cached_tokens, second.cached_share) == (200, 140, 0.7)


def test_report_by_adapter_includes_adapters_without_answers() -> None:
    summaries = run({SPECS[0].name: AdapterMoves(48, 4, 3)}).by_adapter()
    assert [summary.num_requests for summary in summaries] == [2, 2, 0]
    assert [summary.moves and summary.moves.num_loads for summary in summaries] == [4, 0, 0]
    assert summaries[2].mean_ttft_s is None
    assert [summary.moves for summary in run().by_adapter()] == [None] * 3


def test_report_tables_show_the_numbers() -> None:
    assert "70%" in rendered(turn_table(run()))
    table = rendered(adapter_table(run({SPECS[0].name: AdapterMoves(48, 4, 3)})))
    assert SPECS[0].name in table and "300 ms" not in table and "350 ms" in table
    assert "—" in rendered(adapter_table(run()))


def test_report_plot_is_a_png(tmp_path: Path) -> None:
    save_plot(run(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_report_json_holds_raw_records(tmp_path: Path) -> None:
    run({"law": AdapterMoves(9, 1, 0)}).save(tmp_path / "run.json")
    saved = json.loads((tmp_path / "run.json").read_text())
    assert len(saved["turns"]) == 4 and len(saved["failures"]) == 1
    assert saved["adapter_moves"]["law"] == {"num_slots": 9, "num_loads": 1, "num_evictions": 0}
    assert saved["counts"] == COUNTS
    assert saved["computed_for_fixed_slots"]["num_slots"] == 8
    assert saved["machine"]["num_cpus"] > 0


def test_report_counts_adapter_loads_by_name(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "[1] load law into 48 slots\n[2] load gone into 9 slots\n[3] evict law\n" * 2
        + "[4] load law into 48 slots again\n"
    )
    moves = adapter_moves(log, ["art", "law"])
    assert moves == {"art": AdapterMoves(0, 0, 0), "law": AdapterMoves(48, 2, 2)}
    log.write_text("nothing of the kind")
    assert adapter_moves(log, ["art"]) is None


def test_report_cache_table_shows_the_server_counts() -> None:
    text = rendered(cache_table(run({SPECS[0].name: AdapterMoves(48, 4, 3)})))
    assert "3 of 4 (75%)" in text and "60 of 100 (60%)" in text and "48" in text
    assert "told no counts" in rendered(cache_table(replace(run(), counts={})))


def sent(adapter: str, sent_s: float, total_s: float) -> TurnRecord:
    return replace(record(0, 0, 0.1, 0), adapter=adapter, sent_s=sent_s, total_s=total_s)


def test_report_counts_turns_that_wait_for_an_adapter_slot() -> None:
    turns = [
        sent("a", 0.0, 10.0),
        sent("b", 1.0, 4.0),
        sent("c", 2.0, 1.0),  # a third adapter, two slots
        sent("a", 2.5, 1.0),  # its adapter has a slot
        sent("c", 6.0, 1.0),  # the turn of b is over
    ]
    demand = slot_demand(turns, num_slots=2)
    assert (demand.most_adapters, demand.num_over, demand.num_turns) == (3, 1, 5)
    assert slot_demand(turns, num_slots=3).num_over == 0
    assert slot_demand([]).share_over == 0.0
    assert "computed from the recorded turns, not measured" in rendered(slot_table(run()))


def test_demo_progress_without_a_terminal_is_plain_lines() -> None:
    out = StringIO()
    terminal = Terminal(Console(file=out))
    with terminal.chats(len(RESULTS), CacheWatch("http://127.0.0.1:9")) as show:
        for result in RESULTS:
            show(result)
    with pytest.raises(KeyError), terminal.step("fails"):
        raise KeyError
    text = out.getvalue()
    assert "\x1b" not in text
    assert "5/5 turns" in text and "mean TTFT 250 ms" in text and "1 failed" in text
    assert "✓ chats       4 of 5 turns · " in text and "✗ fails" in text


def test_demo_short_run_uses_every_adapter_once() -> None:
    options, flags = parse_arguments(["--short", "--", "--tp-size", "2"])
    assert (options.sessions, options.turns, options.adapters) == (16, 2, 16)
    assert flags == ["--tp-size", "2"]


@pytest.mark.parametrize("argv", [["--sessions", "4"], ["--turns", "0"], ["--adapters", "0"]])
def test_demo_refuses_fewer_sessions_than_adapters(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(argv)
    assert "a session for each adapter" in capsys.readouterr().err


def test_demo_passes_the_users_server_flags_last() -> None:
    flags = launch_flags(Path("m"), {"a": Path("p")}, ["--max-total-tokens", "9"])
    assert flags[-2:] == ["--max-total-tokens", "9"]
    assert "a=p" in flags
