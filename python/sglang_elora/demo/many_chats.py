"""Chats with many adapters at once, streamed; each turn is timed and its answer kept."""

from __future__ import annotations

import asyncio
import json
import random
import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from sglang_elora.control.connections import LIMITS
from sglang_elora.demo.__main__ import MODEL
from sglang_elora.demo.chat import system_prompt, user_message

NUM_TOKENS = 16  # of an answer
RETRY_PAUSE_S = 1.0
TIMEOUT_S = 300.0

Turn = tuple[int, int]  # session, turn
Headers = Callable[[str, str, bool], Mapping[str, str]]
"""Headers of a turn, by its session, its adapter, and whether it is the session's last one."""


@dataclass(frozen=True, slots=True)
class Plan:
    """``num_sessions`` chats, each with one of the adapters; users think between turns.

    Args:
        headers: Of each turn; none if not given.
    """

    adapters: Sequence[str]
    num_sessions: int = 80
    num_turns: int = 4
    mean_think_s: float = 5.0
    headers: Headers = lambda session, adapter, is_last: {}

    @property
    def num_requests(self) -> int:
        return self.num_sessions * self.num_turns


def add_plan_flags(parser: ArgumentParser) -> None:
    for name, default in (("adapters", 40), ("sessions", 80), ("turns", 4)):
        parser.add_argument(f"--{name}", type=int, default=default, help="[%(default)s]")


@dataclass(slots=True)
class Record:
    """What the chats have seen. A failed turn is asked again, and counted each time."""

    texts: dict[Turn, str] = field(default_factory=dict)
    ttft_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def cached_share(self) -> float:
        return self.cached_tokens / max(1, self.prompt_tokens)

    def num_different(self, other: Record) -> int:
        """Turns whose answers differ, or that only one of them has."""
        turns = self.texts.keys() | other.texts.keys()
        return sum(self.texts.get(turn) != other.texts.get(turn) for turn in turns)


class BrokenAnswerError(RuntimeError):
    """An answer that ended with an error, or without its end."""


def hold_chats(url: str, plan: Plan, on_answer: Callable[[int], None] = lambda num: None) -> Record:
    """All chats of the plan, concurrently; ``on_answer`` hears how many turns are answered."""
    return asyncio.run(_hold_chats(url, plan, on_answer))


async def _hold_chats(url: str, plan: Plan, on_answer: Callable[[int], None]) -> Record:
    record = Record()
    async with httpx.AsyncClient(
        base_url=url, timeout=TIMEOUT_S, trust_env=False, limits=LIMITS
    ) as http:

        async def hold(session: int) -> None:
            adapter = plan.adapters[session % len(plan.adapters)]
            messages = [{"role": "system", "content": system_prompt(adapter)}]
            thinking = random.Random(session)
            for turn in range(plan.num_turns):
                await asyncio.sleep(plan.mean_think_s * min(3.0, thinking.expovariate(1.0)))
                messages.append({"role": "user", "content": user_message(session, turn)})
                name, is_last = f"chat-{session}", turn + 1 == plan.num_turns
                headers = plan.headers(name, adapter, is_last)
                text = await _ask_until_answered(
                    http, record, headers, _body(adapter, name, messages)
                )
                record.texts[session, turn] = text
                messages.append({"role": "assistant", "content": text})
                on_answer(len(record.texts))

        await asyncio.gather(*map(hold, range(plan.num_sessions)))
    return record


async def _ask_until_answered(
    http: httpx.AsyncClient, record: Record, headers: Mapping[str, str], body: Mapping[str, Any]
) -> str:
    while True:
        try:
            return await _ask(http, record, headers, body)
        except (httpx.HTTPError, BrokenAnswerError) as error:
            record.failures.append(f"{type(error).__name__}: {error}")
            await asyncio.sleep(RETRY_PAUSE_S)


def _body(adapter: str, session: str, messages: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    return {
        "model": f"{MODEL}:{adapter}",
        "messages": messages,
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "session_id": session,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def _ask(
    http: httpx.AsyncClient, record: Record, headers: Mapping[str, str], body: Mapping[str, Any]
) -> str:
    sent_s, ttft_s, text, usage = time.perf_counter(), 0.0, "", None
    async with http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
        if answer.is_error:
            raise BrokenAnswerError(f"{answer.status_code} {(await answer.aread()).decode()}")
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                break
            if not line.startswith("data: "):
                continue
            event: dict[str, Any] = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise BrokenAnswerError(str(event["error"]))
            usage = event.get("usage") or usage
            pieces = [choice["delta"].get("content") or "" for choice in event["choices"]]
            if not text and any(pieces):
                ttft_s = time.perf_counter() - sent_s
            text += "".join(pieces)
        else:
            raise BrokenAnswerError("the answer has no end")
    if usage is None:
        raise BrokenAnswerError("the answer has no usage")
    record.ttft_s.append(ttft_s)
    record.prompt_tokens += usage["prompt_tokens"]
    record.cached_tokens += (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return text
