"""Hook bodies that refuse a release of memory which SGLang's scheduler would end at."""

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
"""A scheduler may still be busy with a batch whose answers are out."""


async def check_release(
    original: Callable[..., Awaitable[None]], self: TokenizerManager, obj: Any, *rest: Any
) -> None:
    """Around ``TokenizerManager.release_memory_occupation``.

    Raises:
        ValueError: Requests are under way, or it is released already (SGLang answers HTTP 400).
    """
    if not self.rid_to_state:
        await asyncio.sleep(_LAST_BATCH_S)
    if self.rid_to_state:
        raise ValueError(
            f"memory is released while no request is under way only; {len(self.rid_to_state)} are"
        )
    released, tags = _released(self), _tags(obj)
    if tags & released:
        raise ValueError(f"already released: {', '.join(sorted(tags & released))}")
    released |= tags
    await original(self, obj, *rest)


async def check_resume(
    original: Callable[..., Awaitable[None]], self: TokenizerManager, obj: Any, *rest: Any
) -> None:
    """Around ``TokenizerManager.resume_memory_occupation``.

    Raises:
        ValueError: It is not released (SGLang answers HTTP 400).
    """
    released, tags = _released(self), _tags(obj)
    if not tags <= released:
        raise ValueError(f"not released: {', '.join(sorted(tags - released))}")
    await original(self, obj, *rest)
    released -= tags


def release_if_idle(
    original: Callable[..., ReleaseMemoryOccupationReqOutput],
    self: SchedulerWeightUpdaterManager,
    recv_req: Any,
) -> ReleaseMemoryOccupationReqOutput:
    """Around the scheduler's ``release_memory_occupation``, whose answer has no room for an error:
    a request may have arrived since ``check_release``."""
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
    """Around the scheduler's ``resume_memory_occupation``: ``release_if_idle`` may have released
    nothing."""
    if _tags(recv_req) <= self.offload_tags:
        return original(self, recv_req)
    logger.error("memory is not resumed: it is not released")
    return ResumeMemoryOccupationReqOutput()


def _tags(obj: Any) -> set[str]:
    return set(obj.tags or GPU_MEMORY_ALL_TYPES)


def _released(manager: TokenizerManager) -> set[str]:
    released: set[str] = manager.__dict__.setdefault("elora_released", set())
    return released
