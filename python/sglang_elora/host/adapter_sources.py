"""Adapters that a request names and nobody has loaded, from ``--elora-adapter-sources``."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput
from sglang.srt.runtime_context import get_lora

from sglang_elora.adapters import AllowedSources, leads_out
from sglang_elora.config import EloraConfig

if TYPE_CHECKING:
    from sglang.srt.managers.tokenizer_manager import TokenizerManager


@functools.cache
def allowed_sources() -> AllowedSources:
    """Of this process.

    Raises:
        ValueError: The flag names what cannot be a place.
    """
    try:
        return AllowedSources(EloraConfig.from_env(os.environ).adapter_places)
    except ValueError as error:
        raise ValueError(
            f"--elora-adapter-sources (SGLANG_ELORA_ADAPTER_SOURCES): {error}"
        ) from None


def refusal(path: str) -> str:
    """Why ``/load_lora_adapter`` may not load this path; empty if it may. Reads folders."""
    sources = allowed_sources()
    if not sources or sources.allows(path):
        return ""
    folder = EloraConfig.from_env(os.environ).adapter_dir
    if folder and not leads_out(Path(folder), Path(path)):
        return ""
    if any(path == given.lora_path for given in get_lora().lora_paths or ()):
        return ""
    return f"it is not in --elora-adapter-sources: {sources}"


async def find_named(
    original: Callable[..., Awaitable[None]],
    self: TokenizerManager,
    obj: GenerateReqInput | EmbeddingReqInput,
) -> None:
    """Around ``TokenizerManager._resolve_lora_path``, which loads again what was loaded before: a
    name that lies in one of the places counts as such."""
    sources = allowed_sources()
    if sources:
        names = [obj.lora_path] if isinstance(obj.lora_path, str) else obj.lora_path or ()
        for name in set(names) - {None} - self.lora_ref_cache.keys():
            try:
                path = await asyncio.to_thread(sources.find, name)
            except Exception as error:  # each file system has errors of its own
                raise ValueError(
                    f"LoRA adapter {name!r} cannot be looked for: {error!r}"
                ) from error
            if path is not None:
                self.lora_ref_cache[name] = LoRARef(lora_name=name, lora_path=path, pinned=False)
    await original(self, obj)
