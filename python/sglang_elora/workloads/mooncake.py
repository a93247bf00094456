"""Mooncake's traces: lengths, times, and a hash per 512 tokens of the prompt.

Source: Qin et al., "Mooncake" (FAST 2025), github.com/kvcache-ai/Mooncake.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from sglang_elora.workloads.assignment import DEFAULT, Assignment, bad_row
from sglang_elora.workloads.generate import draw_tokens
from sglang_elora.workloads.trace import Session, Trace, Turn
from sglang_elora.workloads.workload import NOMINAL_ANSWER_S

BLOCK = 512


@dataclass(slots=True)
class _Row:
    moment_s: float
    num_input: int
    num_output: int
    hashes: tuple[int, ...]
    following: _Row | None = field(default=None, repr=False)


def mooncake(path: Path, assignment: Assignment = DEFAULT) -> Trace:
    """The trace of a Mooncake file, with sessions reconstructed from the hashes.

    A request is the next turn of an earlier one's session if its prompt starts with all whole
    blocks of the earlier prompt and is longer than that prompt and its answer. The common prefix
    of several sessions' first prompts, in whole blocks, is their system prompt.

    Raises:
        ValueError: A line has another format; names it.
    """
    rows = _read(path)
    firsts = _chained(rows)
    systems = _systems(firsts)
    sessions: list[Session] = []
    adapters: dict[tuple[int, ...], str] = {}
    for number, first in enumerate(firsts):
        system = systems[first.hashes[0]]
        # Sessions with one system prompt get one adapter, as KV is not shared between adapters.
        adapter = adapters.setdefault(system or (-1, number), assignment.adapter(len(adapters)))
        tokens = _tokens(system, BLOCK * len(system), assignment)
        turns = _turns(first, BLOCK * len(system), assignment)
        sessions.append(Session(number, adapter, first.moment_s, tokens, turns))
    return assignment.trace("mooncake", path, sessions)


def _read(path: Path) -> list[_Row]:
    rows = []
    for line, text in enumerate(path.read_text().splitlines(), 1):
        if not text.strip():
            continue
        try:
            row: dict[str, Any] = json.loads(text)
            moment_ms, num_input = float(row["timestamp"]), int(row["input_length"])
            found = _Row(
                moment_ms / 1e3, num_input, int(row["output_length"]), tuple(row["hash_ids"])
            )
        except (ValueError, KeyError, TypeError) as error:
            names = "timestamp, input_length, output_length, hash_ids"
            raise bad_row(path, line, f"not an object of {names}: {error}") from None
        if num_input < 1 or found.num_output < 1:
            raise bad_row(path, line, "a request has a token and an answer at least")
        if len(found.hashes) != -(-num_input // BLOCK):
            blocks = -(-num_input // BLOCK)
            raise bad_row(path, line, f"{len(found.hashes)} hashes for {blocks} blocks of {BLOCK}")
        rows.append(found)
    return sorted(rows, key=lambda row: row.moment_s)


def _chained(rows: Sequence[_Row]) -> list[_Row]:
    """The first request of each session; later ones are linked by ``following``."""
    open_: dict[tuple[int, ...], _Row] = {}  # whole blocks of the last request of each session
    firsts = []
    for row in rows:
        whole = row.hashes[: row.num_input // BLOCK]
        for end in range(len(whole), 0, -1):
            before = open_.get(whole[:end])
            if before is not None and before.num_input + before.num_output < row.num_input:
                before.following = row
                del open_[whole[:end]]
                break
        else:
            firsts.append(row)
        if whole:
            open_[whole] = row
    return firsts


def _systems(firsts: Sequence[_Row]) -> dict[int, tuple[int, ...]]:
    """First hash -> the system prompt: the longest common prefix of whole blocks that leaves each
    prompt at least one more token; empty for a single session."""
    found: dict[int, tuple[int, ...]] = {}
    counts = Counter(row.hashes[0] for row in firsts)
    for row in firsts:
        whole = row.hashes[: (row.num_input - 1) // BLOCK]
        first = row.hashes[0]
        if first not in found:
            found[first] = whole
            continue
        same = takewhile(lambda pair: pair[0] == pair[1], zip(found[first], whole, strict=False))
        found[first] = tuple(block for block, _ in same)
    return {first: found[first] if count > 1 else () for first, count in counts.items()}


def _turns(first: _Row, num_system: int, assignment: Assignment) -> tuple[Turn, ...]:
    turns = []
    row: _Row | None = first
    begin, last_s = num_system, first.moment_s - NOMINAL_ANSWER_S
    while row is not None:
        new = _tokens(row.hashes, row.num_input, assignment)[begin:]
        think_s = max(0.0, row.moment_s - last_s - NOMINAL_ANSWER_S)
        turns.append(Turn(new, row.num_output, think_s))
        begin, last_s = row.num_input + row.num_output, row.moment_s
        row = row.following
    return tuple(turns)


def _tokens(hashes: Sequence[int], count: int, assignment: Assignment) -> tuple[int, ...]:
    tokens: list[int] = []
    for block in hashes:
        tokens += draw_tokens(random.Random(f"block/{block}"), BLOCK, assignment.vocab_size)
    return tuple(tokens[:count])
