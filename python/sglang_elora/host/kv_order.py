"""The order of KV copies and forward passes, where SGLang's own leaves a gap."""

from __future__ import annotations

from typing import Any


def order_backup_after_forward(self: Any) -> None:
    """Before ``HiCacheController.start_writing``: KV is copied to the host once it is computed.

    A request's end is known one batch late, so its last token's KV is in the tree while the batch
    that computes it may still run. SGLang starts the copy behind its schedule stream, which after a
    decode graph waits only until that graph has read its inputs (``_publish_read_done``).
    """
    if self.load_fence_stream is not None and self.write_queue:
        self.l2_transfer_engine.device_to_host_stream.wait_stream(self.load_fence_stream)
