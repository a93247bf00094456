"""A thin client for the three ways a request names its adapter."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from sglang_elora.control.connections import LIMITS

T = TypeVar("T")
MODEL = "demo"


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back of one request."""

    text: str
    token_ids: tuple[int, ...]  # empty where the API gives none
    cached_tokens: int


class Client:
    """Requests to one server; use it as an async context manager."""

    def __init__(self, url: str) -> None:
        self._http = httpx.AsyncClient(base_url=url, timeout=120, trust_env=False, limits=LIMITS)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def generate(
        self,
        adapter: str | None,
        prompt: Sequence[int],
        *,
        num_tokens: int = 32,
        stream: bool = False,
        **extra: Any,
    ) -> Answer:
        body = _generate_body(adapter, prompt, num_tokens, stream=stream, **extra)
        return _generated((await self._events("/generate", body))[-1])

    async def begin(
        self,
        adapter: str | None,
        prompt: Sequence[int],
        *,
        num_tokens: int = 32,
        **extra: Any,
    ) -> asyncio.Task[Answer]:
        """Returns when the first token is there; the task ends with the whole answer."""
        body = _generate_body(adapter, prompt, num_tokens, stream=True, **extra)
        request = self._http.build_request("POST", "/generate", json=body)
        response = await self._http.send(request, stream=True)
        assert response.status_code == 200, await response.aread()
        lines = (line async for line in response.aiter_lines() if line.startswith("data: {"))
        first = await anext(lines)

        async def finish() -> Answer:
            last = [first, *[line async for line in lines]][-1]
            await response.aclose()
            return _generated(json.loads(last[6:]))

        return asyncio.create_task(finish())

    async def complete(
        self, model: str, prompt: str, *, num_tokens: int = 32, stream: bool = False, **extra: Any
    ) -> Answer:
        body = {"model": model, "prompt": prompt, **_openai_options(num_tokens, stream), **extra}
        events = await self._events("/v1/completions", body)
        return _openai_answer(events, lambda choice: choice["text"])

    async def chat(
        self,
        model: str,
        messages: Sequence[dict[str, str]],
        *,
        num_tokens: int = 32,
        stream: bool = False,
        **extra: Any,
    ) -> Answer:
        body = {
            "model": model,
            "messages": list(messages),
            **_openai_options(num_tokens, stream),
            **extra,
        }
        events = await self._events("/v1/chat/completions", body)
        part = "delta" if stream else "message"
        return _openai_answer(events, lambda choice: choice[part].get("content") or "")

    async def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return await self._http.post(path, json=body)

    async def get(self, path: str) -> httpx.Response:
        return await self._http.get(path)

    async def close(self) -> None:
        await self._http.aclose()

    async def _events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        response = await self._http.post(path, json=body)
        assert response.status_code == 200, response.text
        if not body["stream"]:
            return [response.json()]
        lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        assert len(lines) > 2, "the answer came in one piece"
        return [json.loads(line) for line in lines[:-1]]


def run(url: str, work: Callable[[Client], Awaitable[T]]) -> T:
    """Run ``work`` with a client of its own, where no event loop runs: a thread, a GPU stage."""

    async def main() -> T:
        async with Client(url) as client:
            return await work(client)

    return asyncio.run(main())


def _generate_body(
    adapter: str | None, prompt: Sequence[int], num_tokens: int, **extra: Any
) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
    body = {"input_ids": list(prompt), "sampling_params": sampling, **extra}
    return body if adapter is None else {**body, "lora_path": adapter}


def _generated(event: dict[str, Any]) -> Answer:
    return Answer(event["text"], tuple(event["output_ids"]), event["meta_info"]["cached_tokens"])


def _openai_options(num_tokens: int, stream: bool) -> dict[str, Any]:
    options: dict[str, Any] = {
        "temperature": 0,
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "stream": stream,
    }
    if stream:
        options["stream_options"] = {"include_usage": True}
    return options


def _openai_answer(
    events: list[dict[str, Any]], text_of: Callable[[dict[str, Any]], str]
) -> Answer:
    text = "".join(text_of(choice) for event in events for choice in event["choices"])
    usage = next(event["usage"] for event in reversed(events) if event.get("usage"))
    details = usage.get("prompt_tokens_details") or {}
    return Answer(text, (), details.get("cached_tokens", 0))
