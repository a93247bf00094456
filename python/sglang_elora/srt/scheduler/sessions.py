"""Hook body for the end of a session (``POST /close_session``) in the scheduler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_elora.srt.mem_cache.radix_cache import EloraRadixCache

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler


def close(self: Scheduler, recv_req: Any) -> None:
    """Close the session in the tree. Runs before ``Scheduler.close_session``."""
    if isinstance(self.tree_cache, EloraRadixCache):
        self.tree_cache.sessions.over(recv_req.session_id)
