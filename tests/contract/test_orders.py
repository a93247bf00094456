"""An order that raises in the scheduler is answered, for each of SGLang's orders."""

from __future__ import annotations

import asyncio
import warnings
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import msgspec
import pytest

with warnings.catch_warnings():  # SGLang's
    warnings.simplefilter("ignore")
    from sglang.srt.managers import io_struct
    from sglang.srt.managers.communicator import FanOutCommunicator
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.managers.tokenizer_control_mixin import _COMMUNICATOR_SPECS
    from sglang.utils import TypeBasedDispatcher

    from sglang_elora.srt.messages import OrderFailed
    from sglang_elora.srt.orders import (
        GuardedDispatcher,
        OrderRefused,
        hear_failures,
        raise_failure,
    )

UNANSWERED = {
    "AbortReq",
    "CloseSessionReqInput",
    "ConfigureLoggingReq",
    "ContinueGenerationReqInput",
    "FreezeGCReq",
    "PauseGenerationReqInput",
    "ShutdownReq",
}
"""Orders whose sender waits for nothing."""


def orders() -> dict[str, type]:
    """All messages that SGLang's scheduler handles, but for requests."""
    scheduler = MagicMock()
    Scheduler.init_request_dispatcher(scheduler)
    kinds = {kind.__name__: kind for kind in scheduler._request_dispatcher._mapping}
    return {name: kind for name, kind in kinds.items() if "Tokenized" not in name}


def guarded(kind: type) -> GuardedDispatcher:
    def raises(message: Any) -> None:
        raise KeyError("a group")

    return GuardedDispatcher(TypeBasedDispatcher([(kind, raises)]))


def empty(kind: Any) -> Any:
    """A message with default fields."""
    return kind(**{field.name: None for field in msgspec.structs.fields(kind) if field.required})


ORDERS = orders()


@pytest.mark.parametrize("name", ORDERS)
def test_failed_order_is_answered_if_its_sender_waits(name: str) -> None:
    kind = ORDERS[name]
    answer = guarded(kind)(empty(kind))
    if name in UNANSWERED:
        assert answer is None
    elif isinstance(answer, OrderFailed):
        assert answer.error == "KeyError: 'a group'"
        assert answer.answer in {given.__name__ for _, given, *_ in _COMMUNICATOR_SPECS}
    else:
        assert answer.success is False


def test_guard_lets_errors_of_generate_requests_pass() -> None:
    kind = io_struct.TokenizedGenerateReqInput
    with pytest.raises(KeyError):
        guarded(kind)(empty(kind))


@pytest.mark.parametrize(("name", "kind"), [spec[:2] for spec in _COMMUNICATOR_SPECS])
def test_waiting_communicator_raises_the_order_failure(name: str, kind: type) -> None:
    async def work() -> None:
        waits = {
            f"{name}_communicator": FanOutCommunicator(lambda message: None, 1)
            for name, *_ in _COMMUNICATOR_SPECS
        }
        manager: Any = SimpleNamespace(_result_dispatcher=TypeBasedDispatcher([]), **waits)
        hear_failures(manager)
        call = FanOutCommunicator.__call__
        waiting = asyncio.ensure_future(
            raise_failure(call, waits[f"{name}_communicator"], object())
        )
        await asyncio.sleep(0)
        manager._result_dispatcher(OrderFailed(answer=kind.__name__, error="no such group"))
        with pytest.raises(OrderRefused, match="no such group"):
            await asyncio.wait_for(waiting, timeout=10)

    asyncio.run(work())


def test_unsuccessful_profile_stop_raises_order_refused() -> None:
    async def answered(*_: Any) -> list[Any]:
        return [io_struct.ProfileReqOutput(success=False, message="not in progress")]

    with pytest.raises(OrderRefused, match="not in progress"):
        asyncio.run(raise_failure(answered, None, None))
