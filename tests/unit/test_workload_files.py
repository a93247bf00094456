"""Traces of public formats and of published generators."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sglang_elora.workloads import (
    CHAT,
    Assignment,
    Law,
    Trace,
    azure_functions,
    azure_llm,
    conversations,
    due_s,
    make_trace,
    mooncake,
    shared_prefix,
    slora,
)
from sglang_elora.workloads.popularity import draw, shares


@pytest.mark.parametrize(
    ("law", "skew", "expected"),
    [
        (Law.ZIPF, 1.0, [1, 1 / 2, 1 / 3, 1 / 4]),
        (Law.POWER, 0.5, [0.5, 0.2071, 0.1589, 0.1340]),
        (Law.GEOMETRIC, 0.5, [1, 1 / 2, 1 / 4, 1 / 8]),
        (Law.GAUSSIAN, 0.25, [1, 0.6065, 0.1353, 0.0111]),
        (Law.DISTINCT, 0.0, [1, 1, 1, 1]),
    ],
)
def test_popularity_laws_equal_hand_computed_shares(
    law: Law, skew: float, expected: list[float]
) -> None:
    assert shares(law, skew, 4) == pytest.approx(expected, abs=1e-4)
    rng = random.Random(0)
    drawn = Counter(draw(law, skew, 4, i, rng) for i in range(4000))
    assert drawn[3] / 4000 == pytest.approx(expected[3] / sum(expected), abs=0.03)


def test_distinct_law_draws_adapters_round_robin() -> None:
    rng = random.Random(0)
    assert [draw(Law.DISTINCT, 0, 3, i, rng) for i in range(5)] == [0, 1, 2, 0, 1]


def test_popularity_law_refuses_a_skew_out_of_range() -> None:
    with pytest.raises(ValueError, match="geometric between 0 and 1"):
        shares(Law.GEOMETRIC, 1.5, 4)


def test_trace_without_tokens_holds_lengths_only() -> None:
    trace = make_trace(CHAT, turns_per_s=4, duration_s=60, with_tokens=False)
    turns = [turn for session in trace.sessions for turn in session.turns]
    assert all(isinstance(turn.new_tokens, range) for turn in turns)
    assert trace.num_turns / 60 == pytest.approx(4, rel=0.5)


def test_slora_trace_is_a_gamma_process_of_single_requests() -> None:
    trace = slora(20, alpha=0.5, requests_per_s=10, cv=2.0, duration_s=200, seed=1)
    assert len(trace.sessions) == pytest.approx(2000, rel=0.15)
    assert all(8 <= len(s.turns[0].new_tokens) <= 512 for s in trace.sessions)
    starts = [session.start_s for session in trace.sessions]
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert spread / mean == pytest.approx(2.0, rel=0.15)
    popular = Counter(session.adapter for session in trace.sessions).most_common(1)
    assert popular[0][0] == "a000"


def test_shared_prefix_groups_share_a_system_prompt_and_an_adapter() -> None:
    trace = shared_prefix(3, num_groups=6, prompts_per_group=4, system_tokens=40, turns=2)
    by_system: dict[Any, set[str]] = {}
    for session in trace.sessions:
        by_system.setdefault(session.system, set()).add(session.adapter)
    assert len(trace.sessions) == 24
    assert len(by_system) == 6
    assert all(len(adapters) == 1 for adapters in by_system.values())
    assert len(set.union(*by_system.values())) == 3


def test_recorded_trace_is_saved_and_loaded(tmp_path: Path) -> None:
    trace = slora(4, duration_s=5)
    trace.save(tmp_path / "trace.jsonl")
    assert Trace.load(tmp_path / "trace.jsonl") == trace


def test_azure_llm_rows_become_sessions(tmp_path: Path) -> None:
    path = tmp_path / "llm.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.9951690,396,109\n"
    )
    trace = azure_llm(path, Assignment(num_adapters=1))
    assert [len(s.turns[0].new_tokens) for s in trace.sessions] == [374, 396]
    assert [s.turns[0].num_output for s in trace.sessions] == [44, 109]
    assert trace.sessions[1].start_s == pytest.approx(4.314579)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ("2023-11-16 18:15:46.68,374", "line 3: 2 columns, not 3"),
        ("2023-11-16 18:15:46.68,0,4", "line 3: 0 is less than 1"),
        ("2023-11-16 18:15:46.68,a,4", "line 3: 'a' is not a number"),
        ("yesterday,3,4", "line 3: 'yesterday' is not a time"),
    ],
)
def test_azure_llm_names_the_bad_line(tmp_path: Path, row: str, what: str) -> None:
    path = tmp_path / "llm.csv"
    path.write_text(
        f"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374,44\n{row}\n"
    )
    with pytest.raises(ValueError, match=f"llm.csv, {what}"):
        azure_llm(path)


def functions_file(path: Path, *rows: list[int]) -> Path:
    names = ["HashOwner", "HashApp", "HashFunction", "Trigger", *map(str, range(1, 1441))]
    lines = [",".join(names)]
    lines += [
        ",".join(["o", "a", f"f{i}", "http", *map(str, [*row, *[0] * (1440 - len(row))])])
        for i, row in enumerate(rows)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_azure_functions_map_to_adapters_by_popularity(tmp_path: Path) -> None:
    path = functions_file(tmp_path / "functions.csv", [1, 0, 9], [3, 2, 9], [0, 1, 9])
    trace = azure_functions(path, CHAT, Assignment(num_adapters=2), minutes=(0, 2))
    calls = Counter(session.adapter for session in trace.sessions)
    assert calls == {"a000": 5, "a001": 1}
    assert sum(session.start_s < 60 for session in trace.sessions) == 4
    assert all(session.start_s < 120 for session in trace.sessions)


def test_azure_functions_refuse_a_wrong_header(tmp_path: Path) -> None:
    path = tmp_path / "functions.csv"
    path.write_text("a,b,c\n")
    with pytest.raises(ValueError, match="line 1: the header must be HashOwner"):
        azure_functions(path, CHAT)


def mooncake_file(path: Path, *rows: tuple[int, int, int, list[int]]) -> Path:
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    path.write_text("".join(json.dumps(dict(zip(names, r, strict=True))) + "\n" for r in rows))
    return path


def test_mooncake_prefixes_become_turns_and_system_prompts(tmp_path: Path) -> None:
    path = mooncake_file(
        tmp_path / "mooncake.jsonl",
        (0, 1100, 50, [1, 2, 3]),
        (1000, 600, 20, [1, 9]),
        (9000, 1300, 30, [1, 2, 4]),
    )
    first, second = mooncake(path).sessions
    assert len(first.system) == len(second.system) == 512
    assert first.adapter == second.adapter
    assert [len(turn.new_tokens) for turn in first.turns] == [1100 - 512, 1300 - 1100 - 50]
    assert [len(turn.new_tokens) for turn in second.turns] == [88]
    assert due_s(first) == pytest.approx([0, 9])


def test_mooncake_names_the_bad_line(tmp_path: Path) -> None:
    path = mooncake_file(tmp_path / "m.jsonl", (0, 600, 5, [1, 2]), (1, 600, 5, [1]))
    with pytest.raises(ValueError, match=r"m.jsonl, line 2: 1 hashes for 2 blocks"):
        mooncake(path)


LMSYS = {
    "conversation_id": "c1",
    "conversation": [
        {"role": "user", "content": "x" * 40},
        {"role": "assistant", "content": "y" * 20},
        {"role": "user", "content": "z" * 8},
        {"role": "assistant", "content": "!"},
        {"role": "user", "content": "left alone"},
    ],
}
SHAREGPT = {
    "id": "s1",
    "conversations": [
        {"from": "system", "value": "be kind"},
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "hello"},
    ],
}


@pytest.mark.parametrize("as_lines", [True, False])
def test_lmsys_and_sharegpt_conversations_are_read(tmp_path: Path, as_lines: bool) -> None:
    path = tmp_path / "talks.json"
    rows = [LMSYS, SHAREGPT]
    path.write_text("\n".join(map(json.dumps, rows)) if as_lines else json.dumps(rows))
    first, second = conversations(path).sessions
    assert [(len(t.new_tokens), t.num_output) for t in first.turns] == [(10, 5), (2, 1)]
    assert first.turns[1].think_s > 0
    assert len(second.system) == 2
    by_word = conversations(path, tokenize=lambda text: list(map(len, text.split())))
    assert by_word.sessions[1].system == (2, 4)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ("{", "line 2: not JSON"),
        ("{}", "line 2: an object with"),
        (
            '{"conversation": [{"role": "cook", "content": "x"}]}',
            "line 2: a message of no known role",
        ),
    ],
)
def test_conversations_name_the_bad_line(tmp_path: Path, row: str, what: str) -> None:
    path = tmp_path / "talks.jsonl"
    path.write_text(f"{json.dumps(LMSYS)}\n{row}\n")
    with pytest.raises(ValueError, match=what):
        conversations(path)
