"""Many chats over more adapters and KV than fit on the device: the trace, and how it is run.

Outputs are comparable between servers because a turn's prompt is the whole history, output tokens
of earlier turns included: one wrong token changes everything after it.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import httpx

from sglang_elora.testbed.adapters import COVERAGE_NAMES, AdapterSpec, Module, make_adapters
from sglang_elora.testbed.checkpoint import ModelShape, make_checkpoint

_RANKS = (1, 2, 3, 4, 8, 12, 16, 24, 32, 48, 64)
_COVERAGES = tuple(COVERAGE_NAMES)
_BASE_MODEL_SHARE = 0.1
_WINDOW = 12  # adapters that are in use around one moment of the trace
_SESSIONS_A_PASS = 88  # the window passes all adapters; two passes, so evicted ones return
_ABORT_TAKES_S = 0.5
_ABORTED_TOKENS = 200  # length of the answers that are aborted
_TIMEOUT_S = 600.0


def _spec(i: int) -> AdapterSpec:
    """11 ranks and 4 coverages have no common factor, so they meet in all combinations."""
    rank, coverage = _RANKS[i % len(_RANKS)], _COVERAGES[(i + 1) % len(_COVERAGES)]
    return AdapterSpec(f"a{i:02}-r{rank}", rank, (8, rank, 2 * rank)[i % 3], coverage, seed=100 + i)


PRESSURE_SPECS = tuple(_spec(i) for i in range(32))


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint, and an adapter of it for each of PRESSURE_SPECS."""

    checkpoint: Path
    adapters: Mapping[str, Path]


def make_model(folder: Path, *, small: bool = False) -> Model:
    """The demo's model of four layers, or with ``small`` one of two: half of a forward's time."""
    shape = ModelShape(num_layers=2) if small else ModelShape()
    checkpoint = make_checkpoint(folder / "pressure-base", shape=shape)
    return Model(
        checkpoint, make_adapters(checkpoint, folder / "pressure-adapters", PRESSURE_SPECS)
    )


@dataclass(frozen=True, slots=True)
class Turn:
    """What one turn adds to its session's history."""

    new_tokens: tuple[int, ...]
    num_output: int


@dataclass(frozen=True, slots=True)
class Session:
    """A chat, with the same adapter from the first turn to the last."""

    number: int
    adapter: str | None  # None is the base model
    system: tuple[int, ...]  # the prefix that all sessions of the adapter share
    turns: tuple[Turn, ...]

    @property
    def num_own_tokens(self) -> int:
        return sum(len(turn.new_tokens) + turn.num_output for turn in self.turns)


@dataclass(frozen=True, slots=True)
class Trace:
    """Sessions in the order in which they start."""

    sessions: tuple[Session, ...]

    @property
    def num_requests(self) -> int:
        return sum(len(session.turns) for session in self.sessions)

    @property
    def num_kv_tokens(self) -> int:
        """KV of the whole trace, what sessions share counted once."""
        shared = {session.adapter: len(session.system) for session in self.sessions}
        return sum(shared.values()) + sum(session.num_own_tokens for session in self.sessions)

    def prompt(
        self, key: tuple[int, int], outputs: Mapping[tuple[int, int], Sequence[int]]
    ) -> list[int]:
        """Of a turn, (session, turn), after those outputs of the turns before it."""
        number, last = key
        session = self.sessions[number]
        prompt = list(session.system)
        for i, turn in enumerate(session.turns[: last + 1]):
            prompt += turn.new_tokens
            if i < last:
                prompt += outputs[number, i]
        return prompt

    @property
    def adapters(self) -> set[str]:
        return {session.adapter for session in self.sessions if session.adapter is not None}


def make_trace(
    *,
    small: bool = False,
    num_requests: int | None = None,
    output_tokens: tuple[int, int] = (4, 16),
) -> Trace:
    """At least 600 requests, or with ``small`` the first 150 of the same ones."""
    wanted = num_requests or (150 if small else 600)
    sessions: list[Session] = []
    while sum(len(session.turns) for session in sessions) < wanted:
        sessions.append(_session(len(sessions), output_tokens))
    return Trace(tuple(sessions))


def _session(number: int, output_tokens: tuple[int, int]) -> Session:
    rng = random.Random(f"session/{number}")
    adapter = None if rng.random() < _BASE_MODEL_SHARE else _popular_adapter(number, rng)
    system = random.Random(f"system/{adapter}")
    turns = tuple(
        Turn(_tokens(rng, rng.randint(20, 120)), rng.randint(*output_tokens))
        for _ in range(rng.randint(2, 5))
    )
    return Session(number, adapter, _tokens(system, system.randint(24, 64)), turns)


def _popular_adapter(number: int, rng: random.Random) -> str:
    """Zipf over a window that moves with every session; the newest adapter is most popular."""
    newest = number * len(PRESSURE_SPECS) // _SESSIONS_A_PASS
    age = rng.choices(range(_WINDOW), [1 / (1 + age) for age in range(_WINDOW)])[0]
    return PRESSURE_SPECS[(newest - age) % len(PRESSURE_SPECS)].name


def _tokens(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(3, ModelShape().vocab_size) for _ in range(count))


_MODULES: tuple[tuple[tuple[Module, ...], str, tuple[str, ...]], ...] = (
    (("q_proj", "k_proj", "v_proj"), "hidden", ("heads", "kv", "kv")),
    (("o_proj",), "heads", ("hidden",)),
    (("gate_proj", "up_proj"), "hidden", ("mlp", "mlp")),
    (("down_proj",), "mlp", ("hidden",)),
)
"""(parts, input dimension, output dimensions) of each linear layer as SGLang fuses them."""


def plane_elements(spec: AdapterSpec, tp_size: int = 1) -> tuple[int, int]:
    """Elements of one layer's A and B matrices, rows padded to 64.

    An adapter that targets one part of a fused layer has all its parts, as SGLang loads it.
    """
    shape = ModelShape()
    dims = {
        "hidden": shape.hidden_size,
        "heads": shape.num_heads * shape.head_dim // tp_size,
        "kv": shape.num_kv_heads * shape.head_dim // tp_size,
        "mlp": shape.intermediate_size // tp_size,
    }
    padded = {name: 64 * ceil(dim / 64) for name, dim in dims.items()}
    targeted = [m for m in _MODULES if set(m[0]) & set(spec.target_modules)]
    a_rows = sum(len(parts) * padded[source] for parts, source, _ in targeted)
    b_rows = sum(padded[out] for _, _, outs in targeted for out in outs)
    return spec.rank * a_rows, spec.rank * b_rows


def adapter_slots(spec: AdapterSpec, page_size: int = 1, tp_size: int = 1) -> int:
    """Slots of each rank's KV pool that the adapter's weights take, in whole pages.

    A matrices lie in the K plane and B matrices in the V plane, in the same slots.
    """
    shape = ModelShape()
    slots = ceil(
        max(plane_elements(spec, tp_size)) * tp_size / (shape.num_kv_heads * shape.head_dim)
    )
    return page_size * ceil(slots / page_size)


def pool_tokens(
    specs: Sequence[AdapterSpec], trace: Trace, share: float, page_size: int = 1, tp_size: int = 1
) -> int:
    """Size of a pool that holds ``share`` of the adapters and of the trace's KV together."""
    adapters = sum(adapter_slots(spec, page_size, tp_size) for spec in specs)
    needed = adapters + trace.num_kv_tokens
    return int(share * needed) // page_size * page_size


@dataclass(frozen=True, slots=True)
class Record:
    """One request that was answered in full, or refused."""

    session: int
    turn: int
    adapter: str | None
    num_prompt: int
    num_cached: int
    num_from_host: int  # of those, how many came back from the host tier
    output: tuple[int, ...]
    num_aborted: int  # requests of this turn that were aborted before this one
    error: str | None = None
    num_retractions: int = 0

    @property
    def key(self) -> tuple[int, int]:
        return self.session, self.turn


OnRecord = Callable[[httpx.AsyncClient, Record], Awaitable[None]]


def run_trace(
    url: str,
    trace: Trace,
    *,
    concurrency: int = 16,
    abort_every: int = 0,
    names_sessions: bool = False,
    num_priorities: int = 1,
    on_record: OnRecord | None = None,
) -> list[Record]:
    """Hold ``concurrency`` sessions at a time, the next one starting when one ends.

    Args:
        abort_every: Before each n-th turn its prompt is sent once for a long answer, which is
            aborted after its first token, in turn by closing the stream and by /abort_request.
        names_sessions: Requests name their session, which is announced before each later turn.
        num_priorities: Requests have priorities below this number, by their session.
        on_record: Called between a turn's answer and the session's next turn.

    Returns:
        Records in the order in which they came; a session ends with its first error.
    """
    return asyncio.run(
        _Run(url, trace, abort_every, names_sessions, num_priorities, on_record).run(concurrency)
    )


class _Run:
    def __init__(
        self,
        url: str,
        trace: Trace,
        abort_every: int,
        names_sessions: bool,
        num_priorities: int,
        on_record: OnRecord | None,
    ) -> None:
        self._url = url
        self._waiting = iter(trace.sessions)
        self._abort_every = abort_every
        self._names_sessions = names_sessions
        self._num_priorities = num_priorities
        self._on_record = on_record
        self._records: list[Record] = []

    async def run(self, concurrency: int) -> list[Record]:
        # Each request has a connection of its own: the pool, or the server, may close one that was
        # idle at the moment it is taken again.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(
            base_url=self._url, timeout=_TIMEOUT_S, trust_env=False, limits=limits
        ) as http:
            await asyncio.gather(*(self._hold_sessions(http) for _ in range(concurrency)))
        return self._records

    async def _hold_sessions(self, http: httpx.AsyncClient) -> None:
        for session in self._waiting:
            await self._hold(http, session)

    async def _hold(self, http: httpx.AsyncClient, session: Session) -> None:
        history = list(session.system)
        for i, turn in enumerate(session.turns):
            history += turn.new_tokens
            not_aborted = None
            aborts = self._abort_every and (session.number + i) % self._abort_every == 0
            if aborts:
                by_request = (session.number + i) // self._abort_every % 2 == 0
                stream = _body(session, history, _ABORTED_TOKENS)
                not_aborted = await _abort(http, stream, by_request)
            body = _body(session, history, turn.num_output)
            if self._names_sessions:
                body["session_id"] = str(session.number)
                if i:
                    await announce_turn(http, session.number)
            if self._num_priorities > 1:
                body["priority"] = session.number % self._num_priorities
            answer = await http.post("/generate", json=body)
            record = _record(session, i, len(history), int(aborts), answer, not_aborted)
            self._records.append(record)
            if self._on_record is not None:
                await self._on_record(http, record)
            if record.error is not None and record.error != not_aborted:
                return
            history += record.output


async def announce_turn(http: httpx.AsyncClient, session: int) -> None:
    """Unless a flush or evictions have taken all that the session used: it is not alive then."""
    answer = await http.post("/elora/prefetch", json={"session_id": str(session)})
    assert answer.is_success or "session" in answer.text, answer.text


def _body(session: Session, prompt: Sequence[int], num_output: int) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": num_output, "ignore_eos": True}
    body: dict[str, Any] = {"input_ids": list(prompt), "sampling_params": sampling}
    return body if session.adapter is None else {**body, "lora_path": session.adapter}


def _record(
    session: Session,
    turn: int,
    num_prompt: int,
    num_aborted: int,
    answer: httpx.Response,
    not_aborted: str | None,
) -> Record:
    facts = (session.number, turn, session.adapter, num_prompt)
    if answer.status_code != httpx.codes.OK:
        return Record(*facts, 0, 0, (), num_aborted, f"{answer.status_code}: {answer.text[:300]}")
    body = answer.json()
    meta = body["meta_info"]
    from_host = (meta.get("cached_tokens_details") or {}).get("host", 0)
    finished = meta["finish_reason"]["type"]
    error = not_aborted if finished == "length" else f"finished by {finished}"
    output = tuple(body["output_ids"])
    counts = meta["cached_tokens"], from_host, output, num_aborted
    return Record(*facts, *counts, error, meta["num_retractions"])


async def _abort(http: httpx.AsyncClient, body: dict[str, Any], by_request: bool) -> str | None:
    """Take one token of a stream, then end it from this side; what went wrong, if anything."""
    body, begun = {**body, "stream": True}, time.monotonic()
    async with http.stream("POST", "/generate", json=body) as stream:
        assert stream.status_code == httpx.codes.OK, await stream.aread()
        lines = (line async for line in stream.aiter_lines() if line.startswith("data: "))
        first = json.loads((await anext(lines))[6:])
        if not by_request:
            return None
        told_s = time.monotonic() - begun
        await http.post("/abort_request", json={"rid": first["meta_info"]["id"]})
        meta = [json.loads(line[6:]) async for line in lines if line != "data: [DONE]"][-1][
            "meta_info"
        ]
        is_late = told_s > meta["e2e_latency"] - _ABORT_TAKES_S  # this side was slow to read
        if meta["finish_reason"]["type"] == "abort" or is_late:
            return None
        return f"not aborted, though told {told_s:.2f} s after its start: {meta}"
