"""Replay of a trace against a server, with a record of each request.

Works with SGLang over its native API, and with any server over the OpenAI API (``apis``). A
session's next prompt contains the server's own answers, so servers with different outputs get
different prompts of equal lengths.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx

from sglang_elora.bench.apis import Answer, Conversation, Native, Open
from sglang_elora.bench.clock import Clock
from sglang_elora.bench.pool import pool_sample
from sglang_elora.bench.record import Played, PoolSample, Record
from sglang_elora.control.connections import LIMITS
from sglang_elora.workloads import Session, Trace, Turn

_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Manner:
    """Options of a replay."""

    open: Open = Native
    names_sessions: bool = False  # requests name their session, which is closed at its end
    sample_s: float | None = None  # seconds between samples of the pool; None for no samples
    on_record: Callable[[Record], None] | None = None  # called with each record when it is complete


PLAIN = Manner()


def play(url: str, trace: Trace, manner: Manner = PLAIN) -> Played:
    """Replay a trace; the records are in order of completion. A session ends at its first error.

    Turns that are due after the trace's end are not sent.
    """
    return asyncio.run(_play(url, trace, manner))


async def play_by(clock: Clock, url: str, trace: Trace, manner: Manner = PLAIN) -> Played:
    """As ``play``, with all times by a clock that others start and stop: no turn is sent while it
    is stopped."""
    async with _client(url) as http:
        player = _Player(http, manner, clock, trace.duration_s)
        return await player.play(map(player.hold, trace.sessions))


def play_closed(
    url: str, sessions: Sequence[Session], num_clients: int, manner: Manner = PLAIN
) -> Played:
    """Replay sessions in a closed loop: each client starts the next one when its last one has
    ended; the sessions' start times are ignored."""
    return asyncio.run(_play_closed(url, sessions, num_clients, manner))


async def _play(url: str, trace: Trace, manner: Manner) -> Played:
    clock = Clock()
    clock.start()
    return await play_by(clock, url, trace, manner)


async def _play_closed(
    url: str, sessions: Sequence[Session], num_clients: int, manner: Manner
) -> Played:
    waiting = deque(sessions)
    async with _client(url) as http:
        clock = Clock()
        clock.start()
        player = _Player(http, manner, clock)

        async def hold_next() -> None:
            while waiting:
                session = waiting.popleft()
                await player.hold(replace(session, start_s=player.now_s()))

        return await player.play(hold_next() for _ in range(num_clients))


def _client(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S, trust_env=False, limits=LIMITS)


class _Player:
    def __init__(
        self,
        http: httpx.AsyncClient,
        manner: Manner,
        clock: Clock,
        duration_s: float = math.inf,
    ) -> None:
        self._http = http
        self._manner = manner
        self._clock = clock
        self._duration_s = duration_s
        self._records: list[Record] = []
        self._pool: list[PoolSample] = []
        self._started_s = 0.0

    async def play(self, parts: Iterable[Coroutine[Any, Any, None]]) -> Played:
        before = await _statistics(self._http)
        self._started_s = self._clock.now_s()
        watching = asyncio.create_task(self._watch())
        await asyncio.gather(*parts)
        wall_s = self.now_s()
        watching.cancel()
        await asyncio.wait([watching])
        if not watching.cancelled():
            watching.result()  # raises the task's error
        after = await _statistics(self._http)
        return Played(tuple(self._records), wall_s, before, after, tuple(self._pool))

    def now_s(self) -> float:
        return self._clock.now_s() - self._started_s

    async def hold(self, session: Session) -> None:
        conversation, due_s = self._manner.open(session), session.start_s
        for number, turn in enumerate(session.turns):
            due_s += turn.think_s
            if due_s >= self._duration_s:
                return
            await self._clock.sleep_until(self._started_s + due_s)
            answer, record = await self._request(session, conversation, number, turn, due_s)
            self._records.append(record)
            if self._manner.on_record is not None:
                self._manner.on_record(record)
            if record.error is not None or record.last_s is None:
                return
            conversation.said(answer)
            due_s = record.last_s
        if self._manner.names_sessions:
            await self._http.post("/close_session", json={"session_id": _name(session)})

    async def _request(
        self, session: Session, conversation: Conversation, number: int, turn: Turn, due_s: float
    ) -> tuple[Answer, Record]:
        body = conversation.ask(turn)
        if self._manner.names_sessions:
            body["session_id"] = _name(session)
        answer = Answer()
        first_s = last_s = None
        sent_s = self.now_s()
        try:
            async with self._http.stream("POST", conversation.path, json=body) as stream:
                if stream.status_code != httpx.codes.OK:
                    answer.error = f"{stream.status_code}: {(await stream.aread())[:300]!r}"
                async for line in stream.aiter_lines():
                    if line.startswith("data: {"):
                        now_s = self.now_s()
                        if conversation.read(json.loads(line[6:]), answer):
                            last_s = now_s
                            first_s = last_s if first_s is None else first_s
        except httpx.HTTPError as failure:
            answer.error = repr(failure)
        if answer.error is None and answer.num_output != turn.num_output:
            answer.error = (
                f"{answer.num_output} of {turn.num_output} tokens, finished by {answer.reason}"
            )
        return answer, Record(
            session=session.number,
            turn=number,
            adapter=session.adapter,
            due_s=due_s,
            sent_s=sent_s,
            first_s=first_s,
            last_s=last_s,
            num_prompt=answer.num_prompt,
            num_cached=answer.num_cached,
            num_from_host=answer.num_from_host,
            output=answer.output,
            error=answer.error,
            num_answered=answer.num_answered,
        )

    async def _watch(self) -> None:
        interval_s = self._manner.sample_s
        while interval_s is not None:
            sample = await pool_sample(self._http, self.now_s())
            if sample is None:
                return
            self._pool.append(sample)
            await self._clock.sleep_until(self._clock.now_s() + interval_s)


def _name(session: Session) -> str:
    return f"session-{session.number}"


async def _statistics(http: httpx.AsyncClient) -> dict[str, Any] | None:
    """ELORA's counters from ``/server_info``; None if the server has none."""
    answer = await http.get("/server_info")
    if answer.status_code != httpx.codes.OK:
        return None
    states: list[dict[str, Any]] = answer.json().get("internal_states") or [{}]
    return states[0].get("elora")
