"""Disturbances between the turns of a trace: flushes, and adapters loaded and unloaded."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx

from tests.harness.pressure import OnRecord, Record, announce_turn

Disturb = Callable[[Mapping[str, Path]], OnRecord]
"""Adapters' folders by name -> what to do between a turn's answer and the next turn."""

_FLUSH_EVERY = 6
_RELOAD_EVERY = 5
_ANNOUNCED = 4  # adapters that begin to move just before a flush


def flush_often(adapters: Mapping[str, Path]) -> OnRecord:
    """Announce adapters and a session, and flush the cache while their copies are under way."""
    names, numbers = itertools.cycle(adapters), itertools.count(1)

    async def flush(http: httpx.AsyncClient, record: Record) -> None:
        if next(numbers) % _FLUSH_EVERY:
            return
        announced = [next(names) for _ in range(_ANNOUNCED)]
        await _post(http, "/elora/prefetch", lora_name=announced)
        await announce_turn(http, record.session)
        await _post(http, "/flush_cache?timeout=30")

    return flush


def reload_copies(adapters: Mapping[str, Path]) -> OnRecord:
    """Repeatedly load an adapter's folder under a new name, use it twice and unload it."""
    numbers = itertools.count(1)

    async def reload(http: httpx.AsyncClient, record: Record) -> None:
        number = next(numbers)
        if number % _RELOAD_EVERY or record.adapter is None:
            return
        name = f"copy-{number}"
        await _post(
            http, "/load_lora_adapter", lora_name=name, lora_path=str(adapters[record.adapter])
        )
        prompt = [number % 100 + 3, *range(3, 60)]
        answers = [await _answer(http, name, prompt) for _ in range(2)]
        answers.append(await _answer(http, record.adapter, prompt))
        assert answers[0] == answers[1] == answers[2], (name, record.adapter, answers)
        await _post(http, "/unload_lora_adapter", lora_name=name)

    return reload


async def _answer(http: httpx.AsyncClient, adapter: str, prompt: list[int]) -> list[int]:
    sampling = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
    body = {"input_ids": prompt, "lora_path": adapter, "sampling_params": sampling}
    answer = await http.post("/generate", json=body)
    assert answer.is_success, answer.text
    tokens: list[int] = answer.json()["output_ids"]
    return tokens


async def _post(http: httpx.AsyncClient, path: str, **body: object) -> None:
    answer = await http.post(path, json=body)
    assert answer.is_success, (path, body, answer.text)
