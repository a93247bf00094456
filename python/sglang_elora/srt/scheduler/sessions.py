"""The end of a session (``POST /close_session``), as the scheduler hears of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler


def close(self: Scheduler, recv_req: Any) -> None:
    """Before ``Scheduler.close_session``."""
    sessions = getattr(self.tree_cache, "sessions", None)
    if sessions is not None:
        sessions.over(recv_req.session_id)
