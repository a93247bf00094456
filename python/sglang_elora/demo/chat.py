"""Concurrent multi-turn chats against an OpenAI-compatible server, each with its own adapter."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx
from openai import AsyncOpenAI, OpenAIError
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletionMessageParam

from sglang_elora.control.connections import LIMITS
from sglang_elora.demo.turns import TurnFailure, TurnRecord, TurnResult
from sglang_elora.testbed.corpus import paragraph

_SYSTEM_SENTENCES = 6
_USER_SENTENCES = 2


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """Number, shape and adapters of the conversations.

    Users think before each turn, for an exponentially distributed time: otherwise sessions that
    were batched together once would stay synchronised.
    """

    model: str
    adapters: Sequence[str]
    num_sessions: int = 32
    num_turns: int = 4
    max_completion_tokens: int = 32
    mean_think_s: float = 1.0
    request_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        if not self.adapters:
            raise ValueError("adapters is empty: every session needs one")
        if self.num_sessions < len(self.adapters):
            raise ValueError(
                f"num_sessions={self.num_sessions} is less than the {len(self.adapters)} adapters, "
                "so some would never be used: ask for more sessions or fewer adapters"
            )
        if self.num_turns < 1:
            raise ValueError(f"num_turns={self.num_turns} must be at least 1")

    @property
    def num_requests(self) -> int:
        return self.num_sessions * self.num_turns

    def adapter_of(self, session: int) -> str:
        """The adapter of all turns of ``session``."""
        return self.adapters[session % len(self.adapters)]


@dataclass(frozen=True, slots=True)
class _Answer:
    text: str
    sent_s: float  # time.perf_counter() when the request was sent
    ttft_s: float
    total_s: float
    usage: CompletionUsage


class IncompleteAnswerError(RuntimeError):
    """The stream ended without text or without usage."""


async def hold_chats(
    url: str, plan: ChatPlan, on_result: Callable[[TurnResult], None] | None = None
) -> list[TurnResult]:
    """Run all sessions of ``plan`` concurrently against the server at ``url``; return the results.

    Sessions of one adapter share only its system prompt. A failed turn is recorded and ends its
    session; the others continue. Results are in order of completion; ``on_result`` receives each
    one immediately.
    """
    results: list[TurnResult] = []
    started_s = time.perf_counter()

    def record(result: TurnResult) -> None:
        results.append(result)
        if on_result is not None:
            on_result(result)

    async with (
        httpx.AsyncClient(trust_env=False, limits=LIMITS) as http,
        AsyncOpenAI(
            base_url=f"{url}/v1",
            api_key="none",
            timeout=plan.request_timeout_s,
            max_retries=0,  # a repeated request would hide a failure and distort its latency
            http_client=http,
        ) as client,
    ):
        await asyncio.gather(
            *(
                _hold_chat(client, plan, session, started_s, record)
                for session in range(plan.num_sessions)
            )
        )
    return results


async def _hold_chat(
    client: AsyncOpenAI,
    plan: ChatPlan,
    session: int,
    started_s: float,
    record: Callable[[TurnResult], None],
) -> None:
    adapter = plan.adapter_of(session)
    history: list[ChatCompletionMessageParam] = [
        {"role": "system", "content": system_prompt(adapter)}
    ]
    thinking = random.Random(session)
    for turn in range(plan.num_turns):
        await asyncio.sleep(plan.mean_think_s * min(3.0, thinking.expovariate(1.0)))
        history.append({"role": "user", "content": user_message(session, turn)})
        try:
            answer = await _ask(client, plan, adapter, history)
        except (OpenAIError, httpx.HTTPError, IncompleteAnswerError) as error:
            record(TurnFailure(session, adapter, turn, f"{type(error).__name__}: {error}"))
            return
        history.append({"role": "assistant", "content": answer.text})
        details = answer.usage.prompt_tokens_details
        record(
            TurnRecord(
                session=session,
                adapter=adapter,
                turn=turn,
                sent_s=answer.sent_s - started_s,
                ttft_s=answer.ttft_s,
                total_s=answer.total_s,
                prompt_tokens=answer.usage.prompt_tokens,
                cached_tokens=(details.cached_tokens or 0) if details else 0,
                completion_tokens=answer.usage.completion_tokens,
            )
        )


async def _ask(
    client: AsyncOpenAI,
    plan: ChatPlan,
    adapter: str,
    history: Sequence[ChatCompletionMessageParam],
) -> _Answer:
    """Stream one answer; the model name selects the adapter, as in SGLang's API."""
    started = time.perf_counter()
    stream = await client.chat.completions.create(
        model=f"{plan.model}:{adapter}",
        messages=list(history),
        max_tokens=plan.max_completion_tokens,
        temperature=0.0,
        stream=True,
        stream_options={"include_usage": True},
    )
    pieces: list[str] = []
    ttft_s = 0.0
    usage: CompletionUsage | None = None
    async for chunk in stream:
        usage = chunk.usage or usage
        piece = chunk.choices[0].delta.content if chunk.choices else None
        if piece:
            if not pieces:
                ttft_s = time.perf_counter() - started
            pieces.append(piece)
    if not pieces or usage is None:
        raise IncompleteAnswerError(f"got {len(pieces)} pieces of text, usage: {usage}")
    return _Answer("".join(pieces), started, ttft_s, time.perf_counter() - started, usage)


def system_prompt(adapter: str) -> str:
    """The system prompt of all conversations with ``adapter``."""
    return f"You are the {adapter} assistant. " + paragraph(f"system/{adapter}", _SYSTEM_SENTENCES)


def user_message(session: int, turn: int) -> str:
    """The user's message in ``turn`` of ``session``."""
    return paragraph(f"user/{session}/{turn}", _USER_SENTENCES)
