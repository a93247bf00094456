"""Hook bodies that refuse releases of memory which would crash SGLang's scheduler."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from sglang.srt.constants import GPU_MEMORY_ALL_TYPES
from sglang.srt.managers.io_struct import (
    ReleaseMemoryOccupationReqOutput,
    ResumeMemoryOccupationReqOutput,
)

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler_components.weight_updater import (
        SchedulerWeightUpdaterManager,
    )
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

logger = logging.getLogger(__name__)

_LAST_BATCH_S = 0.2
"""Seconds to wait for the scheduler's last batch, which may still run after its answers were sent.
Raising it delays a release."""


async def check_release(
    original: Callable[..., Awaitable[None]], self: TokenizerManager, obj: Any, *rest: Any
) -> None:
    """Refuse a release while requests run. Runs around
    ``TokenizerManager.release_memory_occupation``.

    Raises:
        ValueError: Requests are running, or the memory is already released (SGLang answers HTTP
            400).
    """
    if not await _num_requests(self):
        await asyncio.sleep(_LAST_BATCH_S)
    if num_requests := await _num_requests(self):
        raise ValueError(
            f"memory is released while no request is under way only; {num_requests} are"
        )
    released, tags = _released(self), _tags(obj)
    if tags & released:
        raise ValueError(f"already released: {', '.join(sorted(tags & released))}")
    await _set_released(self, released | tags)
    await original(self, obj, *rest)


async def check_resume(
    original: Callable[..., Awaitable[None]], self: TokenizerManager, obj: Any, *rest: Any
) -> None:
    """Refuse to resume memory that is not released. Runs around
    ``TokenizerManager.resume_memory_occupation``.

    Raises:
        ValueError: It is not released (SGLang answers HTTP 400).
    """
    released, tags = _released(self), _tags(obj)
    if not tags <= released:
        raise ValueError(f"not released: {', '.join(sorted(tags - released))}")
    await original(self, obj, *rest)
    await _set_released(self, released - tags)


def release_if_idle(
    original: Callable[..., ReleaseMemoryOccupationReqOutput],
    self: SchedulerWeightUpdaterManager,
    recv_req: Any,
) -> ReleaseMemoryOccupationReqOutput:
    """Release memory only if the scheduler is idle: a request may have arrived since
    ``check_release``. Runs around the scheduler's ``release_memory_occupation``, whose answer has
    no field for an error."""
    paused = self.scheduler is not None and self.scheduler._engine_paused
    if self.is_fully_idle(ignore_waiting=paused):
        return original(self, recv_req)
    logger.error("memory is not released: the scheduler is busy")
    return ReleaseMemoryOccupationReqOutput()


def resume_if_released(
    original: Callable[..., ResumeMemoryOccupationReqOutput],
    self: SchedulerWeightUpdaterManager,
    recv_req: Any,
) -> ResumeMemoryOccupationReqOutput:
    """Resume memory only if it is released, because ``release_if_idle`` may have released none.
    Runs around the scheduler's ``resume_memory_occupation``."""
    if _tags(recv_req) <= self.offload_tags:
        return original(self, recv_req)
    logger.error("memory is not resumed: it is not released")
    return ResumeMemoryOccupationReqOutput()


def _tags(obj: Any) -> set[str]:
    return set(obj.tags or GPU_MEMORY_ALL_TYPES)


def share(manager: TokenizerManager) -> None:
    """Answer the calls of other tokenizer workers that release or resume memory."""

    async def count(_: None) -> int:
        return len(manager.rid_to_state)

    async def set_released(tags: set[str]) -> None:
        manager.elora_released = tags

    manager.elora_released = set()
    manager.elora_workers.handle("num_requests", type(None), count)
    manager.elora_workers.handle("released", set[str], set_released)


async def _num_requests(manager: TokenizerManager) -> int:
    others: list[int] = await manager.elora_workers.ask("num_requests", None, int)
    return len(manager.rid_to_state) + sum(others)


def _released(manager: TokenizerManager) -> set[str]:
    released: set[str] = manager.elora_released
    return released


async def _set_released(manager: TokenizerManager, tags: set[str]) -> None:
    manager.elora_released = tags
    await manager.elora_workers.ask("released", tags, type(None))
