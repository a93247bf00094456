"""A plugin that fails copies after their first piece, while the file FAIL_COPIES exists."""

from __future__ import annotations

import os


def load():
    from sglang_elora.pages import KVPlanes

    original = KVPlanes._to_slots

    def to_slots(self, memory, table, plane_bytes, first_layer):
        if first_layer and os.path.exists(os.environ["FAIL_COPIES"]):
            raise RuntimeError("the link broke")
        original(self, memory, table, plane_bytes, first_layer)

    KVPlanes._to_slots = to_slots
