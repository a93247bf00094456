"""The tokenizer process's picture of the scheduler, brought up to date by what changed."""

from __future__ import annotations

from collections.abc import Container

from sglang_elora.control.state import AdapterState, Changes, PoolState


class StateMirror:
    """``adapters`` by id, as of ``version``: ask for changes since that, and ``apply`` them."""

    def __init__(self) -> None:
        self.version = 0
        self.adapters: dict[str, AdapterState] = {}
        self.pool: PoolState | None = None  # None: nothing has come yet

    def apply(self, changes: Changes, loaded: Container[str]) -> None:
        """Take over what changed, of adapters that are loaded still."""
        self.adapters.update((adapter.id, adapter) for adapter in changes.adapters)
        for adapter_id in [adapter_id for adapter_id in self.adapters if adapter_id not in loaded]:
            del self.adapters[adapter_id]
        self.version, self.pool = changes.version, changes.pool
