"""Slow and broken adapter sources delay only the requests that need them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from sglang_elora.adapters import AdapterError
from sglang_elora.srt.tokenizer.source_calls import (
    FAILURES_TO_OPEN,
    MOST_WAITING,
    THREADS,
    Call,
    SourceCalls,
    SourceUnavailable,
)

SLOW, FAST = "http://slow:80/adapters/a", "http://fast/a"
TIMEOUTS_S = {Call.LOOK: 0.2, Call.FETCH: 30.0}


@pytest.fixture
def held() -> Iterator[threading.Event]:
    """Calls wait for it."""
    event = threading.Event()
    yield event
    event.set()


def test_calls_to_a_silent_host_time_out_then_fail_fast(held: threading.Event) -> None:
    async def work() -> None:
        calls = SourceCalls(TIMEOUTS_S)
        for _ in range(FAILURES_TO_OPEN):
            with pytest.raises(SourceUnavailable, match=r"http://slow:80 did not answer"):
                await calls.call(Call.LOOK, SLOW, held.wait)
        with pytest.raises(SourceUnavailable, match="is asked again in 30 s"):
            await calls.call(Call.LOOK, SLOW, held.wait)
        assert await calls.call(Call.LOOK, FAST, str, 5) == "5"
        assert await calls.call(Call.FETCH, SLOW, str, 6) == "6", "looks are not fetches"

    asyncio.run(work())


def test_failing_host_is_retried_after_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("connection refused")

    async def work() -> None:
        calls = SourceCalls()
        for _ in range(FAILURES_TO_OPEN):
            with pytest.raises(OSError, match="refused"):
                await calls.call(Call.LOOK, SLOW, fail)
        with pytest.raises(SourceUnavailable):
            await calls.call(Call.LOOK, SLOW, str)
        now_s = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now_s + 31)
        assert await calls.call(Call.LOOK, SLOW, str, 1) == "1"

    asyncio.run(work())


def test_bad_adapter_does_not_count_as_host_failure() -> None:
    def refuse() -> None:
        raise AdapterError("a", SLOW, "there is no adapter_config.json", "Give one")

    async def work() -> None:
        calls = SourceCalls()
        for _ in range(2 * FAILURES_TO_OPEN):
            with pytest.raises(AdapterError):
                await calls.call(Call.FETCH, SLOW, refuse)
        assert await calls.call(Call.FETCH, SLOW, str, 1) == "1"

    asyncio.run(work())


def test_concurrent_calls_to_one_host_are_bounded(held: threading.Event) -> None:
    def threads() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if "slow" in thread.name}

    earlier = threads()

    async def work() -> None:
        calls = SourceCalls()
        waiting = [
            asyncio.create_task(calls.call(Call.FETCH, SLOW, held.wait))
            for _ in range(MOST_WAITING)
        ]
        await asyncio.sleep(0)
        assert len(threads() - earlier) == THREADS
        with pytest.raises(SourceUnavailable, match=f"has {MOST_WAITING} calls"):
            await calls.call(Call.FETCH, SLOW, str)
        held.set()
        assert all(await asyncio.gather(*waiting))
        assert await calls.call(Call.FETCH, SLOW, str, 1) == "1"

    asyncio.run(work())
