"""Plays a trace against a server and notes what happened to each request.

Any SGLang server: native ``/generate``, streamed, prompts as token ids. A session's next prompt
holds the server's own answers, so sides with other outputs have other prompts of equal lengths.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from workload import Session, Trace, Turn

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


def play(url: str, trace: Trace) -> Played:
    """Records are in order of completion. A session ends with its first error.

    Turns that are due after the trace's end are not sent.
    """
    return asyncio.run(_play(url, trace))


async def _play(url: str, trace: Trace) -> Played:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(
        base_url=url, timeout=_TIMEOUT_S, trust_env=False, limits=limits
    ) as http:
        before = await _statistics(http)
        player = _Player(http, trace)
        records, wall_s = await player.run()
        return Played(records, wall_s, before, await _statistics(http))


class _Player:
    def __init__(self, http: httpx.AsyncClient, trace: Trace) -> None:
        self._http = http
        self._trace = trace
        self._records: list[Record] = []
        self._started_s = 0.0

    async def run(self) -> tuple[tuple[Record, ...], float]:
        self._started_s = time.perf_counter()
        await asyncio.gather(*map(self._hold, self._trace.sessions))
        return tuple(self._records), self._now_s()

    def _now_s(self) -> float:
        return time.perf_counter() - self._started_s

    async def _hold(self, session: Session) -> None:
        history, due_s = list(session.system), session.start_s
        for number, turn in enumerate(session.turns):
            due_s += turn.think_s
            if due_s >= self._trace.duration_s:
                return
            await asyncio.sleep(due_s - self._now_s())
            history += turn.new_tokens
            record = await self._request(session, number, turn, history, due_s)
            self._records.append(record)
            if record.error is not None or record.last_s is None:
                return
            history += record.output
            due_s = record.last_s

    async def _request(
        self, session: Session, number: int, turn: Turn, prompt: Sequence[int], due_s: float
    ) -> Record:
        body = {
            "input_ids": list(prompt),
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": turn.num_output,
                "ignore_eos": True,
            },
            "lora_path": session.adapter,
            "stream": True,
        }
        first_s = last_s = None
        last_event: dict[str, Any] = {}
        error = None
        sent_s = self._now_s()
        try:
            async with self._http.stream("POST", "/generate", json=body) as stream:
                if stream.status_code != httpx.codes.OK:
                    error = f"{stream.status_code}: {(await stream.aread())[:300]!r}"
                async for line in stream.aiter_lines():
                    if line.startswith("data: {"):
                        last_s = self._now_s()
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


async def _statistics(http: httpx.AsyncClient) -> dict[str, Any] | None:
    answer = await http.get("/server_info")
    answer.raise_for_status()
    states: list[dict[str, Any]] = answer.json().get("internal_states") or [{}]
    return states[0].get("elora")
