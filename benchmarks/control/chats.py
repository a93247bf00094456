"""Timed chat requests over the OpenAI API, for the benchmarks of hints."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import httpx

_WORDS = ("harbour", "letter", "noon", "recipe", "compare", "train", "soup", "written")


@dataclass(frozen=True, slots=True)
class Chat:
    """Seconds from sending a chat to its first token, and to the end of its answer."""

    ttft_s: float
    latency_s: float


def text(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choices(_WORDS, k=num_words))


async def chat(http: httpx.AsyncClient, adapter: str, content: str, num_tokens: int) -> Chat:
    """Send one turn, whose answer has ``num_tokens``; returns its times.

    Raises:
        RuntimeError: The server does not answer with a stream of tokens.
    """
    body = {
        "model": f"demo:{adapter}",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    sent_s, first_s = time.monotonic(), None
    async with http.stream("POST", "/v1/chat/completions", json=body) as stream:
        if stream.status_code != httpx.codes.OK:
            raise RuntimeError(f"{stream.status_code}: {(await stream.aread())[:300]!r}")
        async for line in stream.aiter_lines():
            if first_s is None and line.startswith("data: {"):
                first_s = time.monotonic()
    if first_s is None:
        raise RuntimeError("an answer without a token")
    return Chat(first_s - sent_s, time.monotonic() - sent_s)
