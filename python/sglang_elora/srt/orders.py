"""Error handling for control requests: one that raises in the scheduler fails with an error answer.

SGLang's scheduler handles control requests of endpoints (profiling, weights, sessions, memory,
caches) between two batches. Without this, an exception in a handler ends the scheduler and with it
the server.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from sglang.srt.managers import io_struct
from sglang.srt.managers.tokenizer_control_mixin import _COMMUNICATOR_SPECS
from sglang.utils import TypeBasedDispatcher

from sglang_elora.srt.messages import OrderFailed

if TYPE_CHECKING:
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

logger = logging.getLogger(__name__)

_REQUESTS = (
    io_struct.TokenizedGenerateReqInput,
    io_struct.TokenizedEmbeddingReqInput,
    io_struct.BatchTokenizedGenerateReqInput,
    io_struct.BatchTokenizedEmbeddingReqInput,
)


class OrderRefused(ValueError):
    """An exception that the scheduler raised for a control request; answered by HTTP 400."""


class GuardedDispatcher:
    """Wraps the scheduler's dispatcher and returns an error answer if a handler raises.

    Exceptions of generation and embedding requests are passed on: ``request_checks.refuse_alone``
    handles them, because it can clean up their state in the scheduler.
    """

    def __init__(self, dispatcher: TypeBasedDispatcher) -> None:
        self._dispatcher = dispatcher

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dispatcher, name)

    def __iadd__(self, other: TypeBasedDispatcher) -> GuardedDispatcher:
        self._dispatcher += other
        return self

    def __call__(self, message: Any) -> Any:
        try:
            return self._dispatcher(message)
        except Exception as error:
            if isinstance(message, _REQUESTS):
                raise
            logger.exception("%s failed", type(message).__name__)
            return _failure(message, f"{type(error).__name__}: {error}")


def _failure(message: Any, text: str) -> Any:
    """The error answer to a control request; None if its sender expects no answer."""
    if isinstance(message, io_struct.OpenSessionReqInput):
        return io_struct.OpenSessionReqOutput(session_id=message.session_id, success=False)
    if isinstance(message, io_struct.RpcReqInput):
        return io_struct.RpcReqOutput(success=False, message=text)
    if isinstance(message, io_struct.UpdateWeightFromDiskReqInput):
        return io_struct.UpdateWeightFromDiskReqOutput(success=False, message=text)
    if "LoRA" in type(message).__name__:
        return io_struct.LoRAUpdateOutput(success=False, error_message=text)
    answer = type(message).__name__.removesuffix("Input") + "Output"
    return OrderFailed(answer=answer, error=text) if hasattr(io_struct, answer) else None


def hear_failures(manager: TokenizerManager) -> None:
    """Register a handler in the tokenizer process that passes ``OrderFailed`` to the waiting
    caller."""
    waits = {
        answer.__name__: getattr(manager, f"{name}_communicator")
        for name, answer, *_ in _COMMUNICATOR_SPECS
    }

    def pass_on(failed: OrderFailed) -> None:
        if failed.answer in waits:
            waits[failed.answer].handle_recv(failed)

    manager._result_dispatcher += TypeBasedDispatcher([(OrderFailed, pass_on)])


async def raise_failure(
    original: Callable[..., Awaitable[list[Any]]], self: Any, obj: Any
) -> list[Any]:
    """Raise failures among the schedulers' answers. Runs around ``FanOutCommunicator.__call__``.

    Raises:
        OrderRefused: A scheduler failed to handle the control request.
    """
    answers = await original(self, obj)
    for answer in answers:
        if isinstance(answer, OrderFailed):
            raise OrderRefused(answer.error)
        if isinstance(answer, io_struct.ProfileReqOutput) and not answer.success:
            raise OrderRefused(answer.message)  # SGLang's RuntimeError is HTTP 500
    return answers
