"""Azure's public traces: LLM inference (lengths and times), Functions (calls per minute).

Source: github.com/Azure/AzurePublicDataset.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from sglang_elora.workloads.assignment import DEFAULT, Assignment, bad_row
from sglang_elora.workloads.generate import adapter_name, draw_tokens, lognormal
from sglang_elora.workloads.trace import Session, Trace, Turn
from sglang_elora.workloads.workload import Workload

_LLM = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_FUNCTIONS = ("HashOwner", "HashApp", "HashFunction", "Trigger")
_MINUTES = 1440


def azure_llm(path: Path, assignment: Assignment = DEFAULT) -> Trace:
    """The trace of an ``AzureLLMInferenceTrace`` file; each request is a session of one turn.

    Raises:
        ValueError: The file has another format; names the line.
    """
    sessions: list[Session] = []
    first_s: float | None = None
    for line, row in _rows(path, _LLM):
        moment_s = _seconds(path, line, row[0])
        first_s = moment_s if first_s is None else first_s
        context, output = (_count(path, line, text, 1) for text in row[1:3])
        number = len(sessions)
        rng = random.Random(f"azure/{assignment.seed}/{number}")
        turn = Turn(draw_tokens(rng, context, assignment.vocab_size), output, 0.0)
        adapter = assignment.adapter(number)
        sessions.append(Session(number, adapter, moment_s - first_s, (), (turn,)))
    begin_s = min((session.start_s for session in sessions), default=0.0)
    shifted = [replace(session, start_s=session.start_s - begin_s) for session in sessions]
    return assignment.trace("azure_llm", path, shifted)


def azure_functions(
    path: Path,
    workload: Workload,
    assignment: Assignment = DEFAULT,
    *,
    minutes: tuple[int, int] = (0, _MINUTES),
) -> Trace:
    """The trace of an ``invocations_per_function_md`` file (2019): each function is an adapter,
    each call a session of one turn.

    The ``num_adapters`` functions called most often within ``minutes`` are used. Calls are placed
    uniformly at random within their minute; lengths are drawn from ``workload``.

    Raises:
        ValueError: The file has another format; names the line.
    """
    begin, end = minutes
    if not 0 <= begin < end <= _MINUTES:
        raise ValueError(f"minutes must be within 0 to {_MINUTES}, got {begin} to {end}")
    header = (*_FUNCTIONS, *map(str, range(1, _MINUTES + 1)))
    calls: list[tuple[int, int, list[int]]] = []  # (-total, line, per minute)
    for line, row in _rows(path, header):
        texts = row[len(_FUNCTIONS) + begin : len(_FUNCTIONS) + end]
        counts = [_count(path, line, text, 0) for text in texts]
        calls.append((-sum(counts), line, counts))
    calls.sort()
    rng = random.Random(f"functions/{assignment.seed}")
    sessions: list[Session] = []
    for adapter, (_, _, counts) in enumerate(calls[: assignment.num_adapters]):
        own = random.Random(f"system/{workload.name}/{adapter}")
        length = own.randint(*workload.system_tokens)
        system = draw_tokens(own, length, assignment.vocab_size)
        for minute, count in enumerate(counts):
            for _ in range(count):
                new = lognormal(rng, workload.user_tokens, workload.user_spread)
                low, high = workload.output_limits
                output = lognormal(rng, workload.output_tokens, workload.output_spread)
                tokens = draw_tokens(rng, new, assignment.vocab_size)
                turn = Turn(tokens, max(low, min(output, high)), 0.0)
                start_s = 60 * (minute + rng.random())
                sessions.append(Session(0, adapter_name(adapter), start_s, system, (turn,)))
    return assignment.trace("azure_functions", path, sessions)


def _rows(path: Path, header: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    with path.open(newline="") as file:
        reader = csv.reader(file)
        found = tuple(name.strip().lstrip("\ufeff") for name in next(reader, []))
        if found != header:
            start = ", ".join(found[:4])
            raise bad_row(path, 1, f"the header must be {', '.join(header[:5])}..., not {start}...")
        for row in reader:
            if len(row) != len(header):
                raise bad_row(path, reader.line_num, f"{len(row)} columns, not {len(header)}")
            yield reader.line_num, row


def _count(path: Path, line: int, text: str, least: int) -> int:
    try:
        count = int(text)
    except ValueError:
        raise bad_row(path, line, f"{text!r} is not a number") from None
    if count < least:
        raise bad_row(path, line, f"{count} is less than {least}")
    return count


def _seconds(path: Path, line: int, text: str) -> float:
    """The time in seconds (UTC). Fractions have seven digits, of which ``datetime`` keeps six."""
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise bad_row(path, line, f"{text!r} is not a time like 2023-11-16 18:15:46.68") from None
    return moment.replace(tzinfo=UTC).timestamp()
