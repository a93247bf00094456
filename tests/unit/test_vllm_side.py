"""vLLM as a side of the benchmark: names, bytes, events, grouped LoRA, and base-only traffic."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sglang_elora.bench.__main__ import parse, plan_of
from sglang_elora.bench.apis import Answer
from sglang_elora.bench.over_base import over_base
from sglang_elora.bench.record import Record
from sglang_elora.bench.report import report
from sglang_elora.bench.result import Result
from sglang_elora.bench.sides import Sizes
from sglang_elora.bench.vllm.client import TokenCompletions
from sglang_elora.bench.vllm.grouped_lora import add_adapter, groups_of
from sglang_elora.bench.vllm.side import (
    BLOCK,
    installed_version,
    is_vllm,
    kv_blocks,
    make_vllm_side,
    vllm_server,
)
from sglang_elora.workloads import CHAT, Session, Turn, make_trace

PYTHON = Path("/vllm-env/bin/python")
SIZES = Sizes()


def flag(flags: tuple[str, ...], name: str) -> str:
    return flags[flags.index(name) + 1]


@pytest.mark.parametrize("num_slots", [1, 2, 4, 8])
def test_bytes_of_slots_and_kv_blocks_are_those_of_all_sides(num_slots: int) -> None:
    flags = make_vllm_side(f"vllm:{num_slots}", SIZES, 64, 1000, PYTHON).flags
    assert flag(flags, "--max-loras") == str(num_slots)
    null_block = BLOCK * SIZES.slot_bytes
    kv_bytes = int(flag(flags, "--kv-cache-memory-bytes")) - null_block
    assert kv_bytes == kv_blocks(SIZES, num_slots) * BLOCK * SIZES.slot_bytes
    spare = SIZES.total_bytes - num_slots * SIZES.adapter_slot_bytes - kv_bytes
    assert 0 <= spare < BLOCK * SIZES.slot_bytes


def test_vllm_side_has_stocks_kv_tokens_with_the_same_slots() -> None:
    assert kv_blocks(SIZES, 8) * BLOCK == SIZES.kv_tokens(8) == SIZES.stock_kv_tokens


def test_flags_hold_the_longest_session_and_all_adapters() -> None:
    flags = make_vllm_side("vllm:4", SIZES, 64, 1001, PYTHON).flags
    assert flag(flags, "--max-model-len") == "1024"
    assert flag(flags, "--max-cpu-loras") == "64"


@pytest.mark.parametrize("name", ["vllm", "vllm:", "vllm:0", "vllm:x", "vllm:4+other", "vllm:4+"])
def test_unknown_vllm_sides_are_refused(name: str) -> None:
    assert is_vllm(name)
    with pytest.raises(ValueError, match=r"must be vllm:SLOTS or vllm:SLOTS\+grouped"):
        make_vllm_side(name, SIZES, 64, 1000, PYTHON)


def test_slots_that_leave_too_few_kv_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="KV blocks of 32 tokens, and the longest session"):
        make_vllm_side("vllm:14", SIZES, 64, 2000, PYTHON)


def test_plugin_is_the_only_module_that_vllm_gets(tmp_path: Path) -> None:
    shipped, grouped = (
        make_vllm_side(name, SIZES, 2, 100, PYTHON) for name in ("vllm:2", "vllm:2+grouped")
    )
    assert (shipped.variants, grouped.variants) == ((), ("grouped",))
    adapters = {"a000": Path("/a0")}
    server = vllm_server(shipped, Path("/base"), adapters, tmp_path, tmp_path / "log")
    assert server._env["PYTHONPATH"] == ""
    server = vllm_server(grouped, Path("/base"), adapters, tmp_path, tmp_path / "log")
    folders = [Path(name) for name in server._env["PYTHONPATH"].split(os.pathsep)]
    assert sorted(path.name for folder in folders for path in folder.glob("*.py")) == [
        "grouped_lora.py"
    ]
    (entry,) = tmp_path.rglob("entry_points.txt")
    assert entry.read_text() == ("[vllm.general_plugins]\nvariant_grouped = grouped_lora:grouped\n")
    assert entry.parents[1] in folders
    assert "a000=/a0" in server.command and server.command[0] == str(PYTHON)


def test_missing_interpreter_is_named() -> None:
    with pytest.raises(ValueError, match=r"benchmarks/vllm/README\.md"):
        installed_version(PYTHON)


def test_token_completions_read_vllms_events() -> None:
    session = Session(7, "a001", 0.0, (9, 9), (Turn((3, 4), 2, 0.0), Turn((5,), 2, 1.0)))
    conversation, answer = TokenCompletions(session), Answer()
    body = conversation.ask(session.turns[0])
    assert (body["model"], body["prompt"], body["max_tokens"]) == ("a001", [9, 9, 3, 4], 2)
    assert conversation.read({"choices": [{"token_ids": [6], "finish_reason": None}]}, answer)
    assert conversation.read({"choices": [{"token_ids": [7], "finish_reason": "length"}]}, answer)
    usage = {"prompt_tokens": 4, "prompt_tokens_details": {"cached_tokens": 3}}
    assert not conversation.read({"choices": [], "usage": usage}, answer)
    assert (answer.output, answer.num_output, answer.num_prompt) == ((6, 7), 2, 4)
    assert (answer.num_cached, answer.reason) == (3, "length")
    conversation.said(answer)
    assert conversation.ask(session.turns[1])["prompt"] == [9, 9, 3, 4, 6, 7, 5]
    assert TokenCompletions(replace(session, adapter="")).ask(session.turns[0])["model"] == "demo"
    assert not conversation.read({"error": {"message": "no"}}, answer)
    assert answer.error is not None


def test_rows_are_grouped_by_adapter_and_base_rows_are_in_no_group() -> None:
    (first, one), (second, several) = groups_of([(-1, 2), (3, 4), (0, 1), (-1, 1), (0, 2)])
    assert (first, one) == (3, slice(2, 6))
    assert second == 0
    assert isinstance(several, torch.Tensor) and several.tolist() == [6, 8, 9]
    assert groups_of([(-1, 5)]) == []


@pytest.mark.parametrize("rows", [slice(1, 4), torch.tensor([0, 2, 5])])
def test_grouped_lora_equals_the_definition(rows: slice | torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    inputs, outputs = random(6, 5), random(6, 7)
    a, b = [random(2, 5), random(2, 5)], [random(4, 2), random(3, 2)]
    expected = outputs.clone()
    expected[rows] += 0.5 * torch.cat(
        [inputs[rows] @ x.T @ y.T for x, y in zip(a, b, strict=True)], 1
    )
    add_adapter(outputs, inputs, rows, a, b, 0.5)
    torch.testing.assert_close(outputs, expected)


def test_base_only_traces_have_the_same_sessions_without_adapters() -> None:
    plan = plan_of(parse(["--workloads", "chat", "--duration", "20", "--base-only"]))
    (load, mixed), (base_load, base) = plan.traces(plan.workloads, 0)
    assert load == base_load
    assert (mixed.workload.name, base.workload.name) == ("chat", "chat-base")
    assert [s.turns for s in mixed.sessions] == [s.turns for s in base.sessions]
    assert {s.adapter for s in base.sessions} == {""}
    assert base.mean_live_kv_tokens == mixed.mean_live_kv_tokens


def result(workload: str, side: str, ttft_s: float, num_cached: int, run: int = 0) -> Result:
    records = tuple(
        Record(i, 0, "", float(i), float(i), i + ttft_s, i + ttft_s, 10, num_cached, 0, (1,))
        for i in range(10)
    )
    return Result(workload, side, run, 10.0, records, None, None, 2.0)


def test_figures_are_set_over_the_same_sides_base_only_traffic() -> None:
    results = [
        *(result("chat", "vllm:4", 0.3, 5, run) for run in (0, 1)),
        *(result("chat-base", "vllm:4", 0.1, 7, run) for run in (0, 1)),
        result("chat", "elora:elora", 0.2, 6),
        result("chat-base", "elora:elora", 0.1, 8),
        result("chat", "stock-default", 0.2, 6),  # was not replayed without adapters
    ]
    (table,) = over_base(results)
    title, head, *rows = table.splitlines()
    assert title == "chat at 2 turns/s, over base-only traffic"
    assert "ttft_mean_ms" in head
    cells = [row.split() for row in rows]
    assert [row[0] for row in cells] == ["vllm:4", "elora:elora"]
    assert cells[0][2:5] == ["300", "100", "3.00"]
    assert cells[0][-2:] == ["0.500", "0.700"]
    assert "across" not in report(results) and "mean of the ratios" not in report(results)


def test_reports_without_base_only_traffic_have_no_such_table() -> None:
    assert over_base([result("chat", "vllm:4", 0.3, 5)]) == []


def test_base_traffic_keeps_the_rate_of_a_trace() -> None:
    trace = make_trace(CHAT, turns_per_s=3.0, duration_s=5.0)
    assert trace.without_adapters().turns_per_s == 3.0
