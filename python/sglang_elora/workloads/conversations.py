"""Traces from chat datasets in the formats of LMSYS-Chat-1M and ShareGPT."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sglang_elora.workloads.assignment import DEFAULT, Assignment, bad_row
from sglang_elora.workloads.generate import draw_tokens
from sglang_elora.workloads.trace import Session, Trace, Turn

_CHARACTERS_PER_TOKEN = 4
_ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
}

Tokenize = Callable[[str], Sequence[int]]


def conversations(
    path: Path,
    assignment: Assignment = DEFAULT,
    *,
    turns_per_s: float = 4.0,
    think_s: float = 20.0,
    think_shape: float = 2.0,
    tokenize: Tokenize | None = None,
) -> Trace:
    """The trace of a JSON array or JSON lines of ``{conversation_id, conversation: [{role,
    content}]}`` (LMSYS) or ``{id, conversations: [{from, value}]}`` (ShareGPT).

    The files have no times: session starts are a Poisson process with ``turns_per_s`` on average,
    and thinking times are Gamma-distributed. Of answers only the length is used.

    Args:
        tokenize: Text to ids; by default, one random token for every four characters.

    Raises:
        ValueError: A conversation has another format; names file and line.
    """
    rng = random.Random(f"conversations/{assignment.seed}")
    to_ids = tokenize or (lambda text: _drawn(text, assignment))
    found: list[tuple[Sequence[int], list[Turn]]] = []
    for line, row in _rows(path):
        system, texts = _pairs(path, line, row)
        turns = [
            Turn(
                to_ids(said),
                max(1, len(to_ids(answer))),
                rng.gammavariate(think_shape, think_s / think_shape) if i else 0.0,
            )
            for i, (said, answer) in enumerate(texts)
        ]
        if turns:
            found.append((to_ids(system) if system else (), turns))
    num_turns = sum(len(turns) for _, turns in found)
    rate = turns_per_s * len(found) / max(num_turns, 1)
    sessions: list[Session] = []
    start_s = 0.0
    for number, (ids, turns) in enumerate(found):
        sessions.append(
            Session(number, assignment.adapter(number), start_s, tuple(ids), tuple(turns))
        )
        start_s += rng.expovariate(rate)
    return assignment.trace("conversations", path, sessions)


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    text = path.read_text()
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise bad_row(path, getattr(error, "lineno", 1), f"not JSON: {error}") from None
        yield from enumerate(rows, 1)
        return
    for line, part in enumerate(text.splitlines(), 1):
        if part.strip():
            try:
                row = json.loads(part)
            except ValueError as error:
                raise bad_row(path, line, f"not JSON: {error}") from None
            yield line, row


def _pairs(path: Path, line: int, row: Any) -> tuple[str, list[tuple[str, str]]]:
    """(system prompt, [(user text, answer)]); consecutive user messages are joined, and a last one
    without an answer is dropped."""
    said = row.get("conversation", row.get("conversations")) if isinstance(row, dict) else None
    if not isinstance(said, list):
        raise bad_row(path, line, "an object with 'conversation' or 'conversations' is expected")
    system, pairs, asked = "", [], ""
    for message in said:
        is_object = isinstance(message, dict)
        role = _ROLES.get(message.get("role", message.get("from"))) if is_object else None
        content = message.get("content", message.get("value")) if is_object else None
        if role is None or not isinstance(content, str):
            raise bad_row(path, line, f"a message of no known role or without text: {message!r}")
        if role == "system":
            system += content
        elif role == "user":
            asked += content
        elif asked:
            pairs.append((asked, content))
            asked = ""
    return system, pairs


def _drawn(text: str, assignment: Assignment) -> tuple[int, ...]:
    count = max(1, round(len(text) / _CHARACTERS_PER_TOKEN))
    return draw_tokens(random.Random(text), count, assignment.vocab_size)
