"""Hook bodies for sessions of clients (``POST /open_session``, ``/close_session``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_elora.srt.mem_cache.radix_cache import EloraRadixCache

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.session.session_controller import Session


def close(self: Scheduler, recv_req: Any) -> None:
    """Close the session in the tree. Runs before ``Scheduler.close_session``."""
    if isinstance(self.tree_cache, EloraRadixCache):
        self.tree_cache.sessions.over(recv_req.session_id)


def keep_adapter(self: Session, req: Any, *_: Any, **__: Any) -> None:
    """Refuse a turn of a streaming session with another adapter than the first turn had, whose KV
    the turn would continue. Runs before ``Session.create_req``.

    Raises:
        ValueError: It has another one, or one loaded again under its name (answered with HTTP 400).
    """
    if not self.streaming:
        return
    if any(node.req.lora_id != req.lora_id for node in self.req_nodes.values()):
        raise ValueError(
            f"streaming session {self.session_id} keeps the KV of its first turn's adapter, as it "
            "was loaded then: close the session, and open another one for another adapter"
        )
