"""Watches a folder (``--elora-adapter-dir``) and loads new adapters while the server runs."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from sglang.srt.managers.io_struct import LoadLoRAAdapterReqInput

from sglang_elora.adapters import FolderScan, FoundAdapter
from sglang_elora.config import active_config
from sglang_elora.srt.tokenizer.workers import HostLock

if TYPE_CHECKING:
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

logger = logging.getLogger(__name__)

SCAN_S = 0.5


def begin(result: None, self: TokenizerManager) -> None:
    """Start to watch the folder. Runs after ``TokenizerManager.auto_create_handle_loop``, because
    it needs the event loop; the server's warm-up request calls that first."""
    if hasattr(self, "elora_watches"):
        return
    folder = active_config().adapter_dir
    self.elora_watches = bool(folder) and self.enable_lora
    if self.elora_watches:
        self.asyncio_tasks.add(self.event_loop.create_task(_watch(self, Path(folder))))


async def _watch(manager: TokenizerManager, folder: Path) -> None:
    loaded_before: set[str] = set()
    watching = HostLock(manager, "adapter-dir")  # held until this process ends
    if manager.elora_workers.num_others:  # one of them watches; when it ends, another one
        await watching.acquire()
        loaded_before = {ref.lora_path for ref in manager.lora_registry.get_all_adapters().values()}
    scan = FolderScan(folder)
    while True:
        for found in await asyncio.to_thread(scan.scan):
            if str(found.path) not in loaded_before:
                await _load(manager, found)
        loaded_before = set()
        await asyncio.sleep(SCAN_S)


async def _load(manager: TokenizerManager, found: FoundAdapter) -> None:
    """Load an adapter like ``POST /load_lora_adapter``, with the same checks."""
    problem = found.problem
    if found.name in manager.lora_registry.get_all_adapters():
        problem = "an adapter of this name is loaded already; unload it first"
    if not problem:
        request = LoadLoRAAdapterReqInput(lora_name=found.name, lora_path=str(found.path))
        try:
            output = await manager.load_lora_adapter(request)
            problem = "" if output.success else output.error_message
        except Exception as error:  # noqa: BLE001  # later adapters may still load
            problem = repr(error)
    if problem:
        logger.error("Not served: adapter %r of %s: %s", found.name, found.path.parent, problem)
    else:
        logger.info("adapter %r of %s is served", found.name, found.path.parent)
