"""Plays a trace against a server and notes what happened to each request.

Any SGLang server: native ``/generate``, streamed, prompts as token ids. A session's next prompt
holds the server's own answers, so sides with other outputs have other prompts of equal lengths.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import deque
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx

from sglang_elora.workloads import Session, Trace, Turn

_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Record:
    """One request. Times are seconds since the start of the trace."""

    session: int
    turn: int
    adapter: str
    due_s: float
    sent_s: float
    first_s: float | None  # first token
    last_s: float | None  # last token
    num_prompt: int
    num_cached: int  # of the prompt, from any tier
    num_from_host: int  # of those
    output: tuple[int, ...]
    error: str | None = None

    @property
    def key(self) -> tuple[int, int]:
        return self.session, self.turn

    @property
    def ttft_s(self) -> float | None:
        """From the moment at which it was due, so that a late client does not flatter."""
        return None if self.first_s is None else self.first_s - self.due_s

    @property
    def tpot_s(self) -> float | None:
        if self.first_s is None or self.last_s is None or len(self.output) < 2:
            return None
        return (self.last_s - self.first_s) / (len(self.output) - 1)


@dataclass(frozen=True, slots=True)
class Played:
    """``before`` and ``after`` are ELORA's own counts, None on a stock server."""

    records: tuple[Record, ...]
    wall_s: float
    before: dict[str, Any] | None
    after: dict[str, Any] | None


def play(url: str, trace: Trace, *, names_sessions: bool = False) -> Played:
    """Records are in order of completion. A session ends with its first error.

    Turns that are due after the trace's end are not sent.

    Args:
        names_sessions: Requests name their session, and its last answer closes it.
    """
    return asyncio.run(_play(url, trace, names_sessions))


def play_closed(url: str, sessions: Sequence[Session], num_clients: int) -> Played:
    """Each client takes the next session when its last one has ended, whatever their starts say."""
    return asyncio.run(_play_closed(url, sessions, num_clients))


async def _play(url: str, trace: Trace, names_sessions: bool) -> Played:
    async with _client(url) as http:
        player = _Player(http, trace.duration_s, names_sessions)
        return await player.play(map(player.hold, trace.sessions))


async def _play_closed(url: str, sessions: Sequence[Session], num_clients: int) -> Played:
    waiting = deque(sessions)
    async with _client(url) as http:
        player = _Player(http)

        async def hold_next() -> None:
            while waiting:
                session = waiting.popleft()
                await player.hold(replace(session, start_s=player.now_s()))

        return await player.play(hold_next() for _ in range(num_clients))


def _client(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    return httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S, trust_env=False, limits=limits)


class _Player:
    def __init__(
        self, http: httpx.AsyncClient, duration_s: float = math.inf, names_sessions: bool = False
    ) -> None:
        self._http = http
        self._duration_s = duration_s
        self._names_sessions = names_sessions
        self._records: list[Record] = []
        self._started_s = 0.0

    async def play(self, parts: Iterable[Coroutine[Any, Any, None]]) -> Played:
        before = await _statistics(self._http)
        self._started_s = time.perf_counter()
        await asyncio.gather(*parts)
        wall_s = self.now_s()
        return Played(tuple(self._records), wall_s, before, await _statistics(self._http))

    def now_s(self) -> float:
        return time.perf_counter() - self._started_s

    async def hold(self, session: Session) -> None:
        history, due_s = list(session.system), session.start_s
        for number, turn in enumerate(session.turns):
            due_s += turn.think_s
            if due_s >= self._duration_s:
                return
            await asyncio.sleep(due_s - self.now_s())
            history += turn.new_tokens
            record = await self._request(session, number, turn, history, due_s)
            self._records.append(record)
            if record.error is not None or record.last_s is None:
                return
            history += record.output
            due_s = record.last_s
        if self._names_sessions:
            await self._http.post("/close_session", json={"session_id": _name(session)})

    async def _request(
        self, session: Session, number: int, turn: Turn, prompt: Sequence[int], due_s: float
    ) -> Record:
        body: dict[str, Any] = {
            "input_ids": list(prompt),
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": turn.num_output,
                "ignore_eos": True,
            },
            "lora_path": session.adapter,
            "stream": True,
        }
        if self._names_sessions:
            body["session_id"] = _name(session)
        first_s = last_s = None
        last_event: dict[str, Any] = {}
        error = None
        sent_s = self.now_s()
        try:
            async with self._http.stream("POST", "/generate", json=body) as stream:
                if stream.status_code != httpx.codes.OK:
                    error = f"{stream.status_code}: {(await stream.aread())[:300]!r}"
                async for line in stream.aiter_lines():
                    if line.startswith("data: {"):
                        last_s = self.now_s()
                        first_s = last_s if first_s is None else first_s
                        last_event = json.loads(line[6:])
        except httpx.HTTPError as failure:
            error = repr(failure)
        meta = last_event.get("meta_info", {})
        output = tuple(last_event.get("output_ids", ()))
        reason = (meta.get("finish_reason") or {}).get("type")
        if error is None and "error" in last_event:
            error = str(last_event["error"])
        if error is None and (reason != "length" or len(output) != turn.num_output):
            error = f"{len(output)} of {turn.num_output} tokens, finished by {reason}"
        return Record(
            session=session.number,
            turn=number,
            adapter=session.adapter,
            due_s=due_s,
            sent_s=sent_s,
            first_s=first_s,
            last_s=last_s,
            num_prompt=len(prompt),
            num_cached=meta.get("cached_tokens", 0),
            num_from_host=(meta.get("cached_tokens_details") or {}).get("host", 0),
            output=output,
            error=error,
        )


def _name(session: Session) -> str:
    return f"session-{session.number}"


async def _statistics(http: httpx.AsyncClient) -> dict[str, Any] | None:
    answer = await http.get("/server_info")
    answer.raise_for_status()
    states: list[dict[str, Any]] = answer.json().get("internal_states") or [{}]
    return states[0].get("elora")
