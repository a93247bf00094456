"""What the demo makes of its records: summaries, tables, plot, JSON, and its command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from sglang_elora.demo.__main__ import launch_flags, parse_arguments
from sglang_elora.demo.loads import adapter_loads_in_log
from sglang_elora.demo.plot import save_plot
from sglang_elora.demo.report import adapter_table, turn_table
from sglang_elora.demo.summary import DemoRun, percentile
from sglang_elora.demo.terminal import Terminal
from sglang_elora.demo.turns import TurnFailure, TurnRecord, TurnResult
from sglang_elora.testbed.adapters import demo_adapters

SPECS = demo_adapters(3)


def record(session: int, turn: int, ttft_s: float, cached: int) -> TurnRecord:
    return TurnRecord(
        session=session,
        adapter=SPECS[session].name,
        turn=turn,
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


def run(loads: dict[str, int] | None = None) -> DemoRun:
    return DemoRun(
        specs=SPECS, results=RESULTS, loads=loads, duration_s=2.0, server_command=["python"]
    )


def rendered(renderable: object) -> str:
    console = Console(file=StringIO(), width=120)
    console.print(renderable)
    text = console.file
    assert isinstance(text, StringIO)
    return text.getvalue()


def test_percentile_interpolates() -> None:
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([0.0, 10.0], 95) == 9.5
    assert percentile([7.0], 95) == 7.0
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_summary_by_turn() -> None:
    first, second = run().by_turn()
    assert (first.turn, first.num_requests, first.cached_share) == (0, 2, 0.0)
    assert first.mean_ttft_s == pytest.approx(0.2)
    assert first.p95_ttft_s == pytest.approx(0.29)
    assert (second.prompt_tokens, second.cached_tokens, second.cached_share) == (200, 140, 0.7)


def test_summary_by_adapter_keeps_those_without_answer() -> None:
    summaries = run({SPECS[0].name: 4}).by_adapter()
    assert [summary.num_requests for summary in summaries] == [2, 2, 0]
    assert [summary.num_loads for summary in summaries] == [4, 0, 0]
    assert summaries[2].mean_ttft_s is None
    assert [summary.num_loads for summary in run().by_adapter()] == [None] * 3


def test_tables_show_the_numbers() -> None:
    assert "70%" in rendered(turn_table(run()))
    table = rendered(adapter_table(run({SPECS[0].name: 4})))
    assert SPECS[0].name in table and "300 ms" not in table and "350 ms" in table
    assert "—" in rendered(adapter_table(run()))


def test_plot_is_a_picture(tmp_path: Path) -> None:
    save_plot(run(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_json_holds_raw_records(tmp_path: Path) -> None:
    run({"law": 1}).save(tmp_path / "run.json")
    saved = json.loads((tmp_path / "run.json").read_text())
    assert len(saved["turns"]) == 4 and len(saved["failures"]) == 1
    assert saved["adapter_loads"] == {"law": 1}
    assert saved["machine"]["num_cpus"] > 0


def test_loads_are_counted_by_name(tmp_path: Path) -> None:
    """The id is what SGLang computes for ``--lora-paths b=/x/b``."""
    log = tmp_path / "log"
    log.write_text(
        "[1] load 43448c2555cf5392a4aa816caa7a240d into 48 slots\n"
        "[2] load ffffffffffffffffffffffffffffffff into 48 slots\n" * 2
    )
    adapters = {"a": Path("/x/a"), "b": Path("/x/b")}
    assert adapter_loads_in_log(log, adapters) == {"a": 0, "b": 2}
    log.write_text("nothing of the kind")
    assert adapter_loads_in_log(log, adapters) is None


def test_progress_without_a_terminal_is_plain_lines() -> None:
    out = StringIO()
    terminal = Terminal(Console(file=out))
    with terminal.chats(len(RESULTS)) as show:
        for result in RESULTS:
            show(result)
    with pytest.raises(KeyError), terminal.step("fails"):
        raise KeyError
    text = out.getvalue()
    assert "\x1b" not in text
    assert "5/5 turns" in text and "mean TTFT 250 ms" in text and "1 failed" in text
    assert "✓ chats       4 of 5 turns · " in text and "✗ fails" in text


def test_short_uses_every_adapter_once() -> None:
    options, flags = parse_arguments(["--short", "--", "--tp-size", "2"])
    assert (options.sessions, options.turns, options.adapters) == (16, 2, 16)
    assert flags == ["--tp-size", "2"]


@pytest.mark.parametrize("argv", [["--sessions", "4"], ["--turns", "0"], ["--adapters", "0"]])
def test_impossible_options(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(argv)
    assert "a session for each adapter" in capsys.readouterr().err


def test_server_flags_of_the_user_come_last() -> None:
    flags = launch_flags(Path("m"), {"a": Path("p")}, ["--max-total-tokens", "9"])
    assert flags[-2:] == ["--max-total-tokens", "9"]
    assert "a=p" in flags
