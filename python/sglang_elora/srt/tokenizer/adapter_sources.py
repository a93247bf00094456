"""Loads adapters that a request names from ``--elora-adapter-sources``, if they are not loaded."""

from __future__ import annotations

import asyncio
import functools
import os
import re
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput
from sglang.srt.runtime_context import get_lora

from sglang_elora.adapters import (
    AllowedSources,
    cache_folder,
    has_adapter,
    is_url,
    keep_only,
    leads_out,
)
from sglang_elora.config import active_config
from sglang_elora.srt.tokenizer.source_calls import Call, SourceCalls, SourceUnavailable

if TYPE_CHECKING:
    from sglang.srt.managers.tokenizer_manager import TokenizerManager


_LISTS = re.compile(r"\n(All loaded|Loaded) adapters: .*", re.DOTALL)
"""The list of adapters that SGLang adds to errors about unknown adapters."""


@functools.cache
def source_calls() -> SourceCalls:
    """The ``SourceCalls`` of this process."""
    return SourceCalls()


@functools.cache
def allowed_sources() -> AllowedSources:
    """The ``AllowedSources`` of this process.

    Raises:
        ValueError: The flag contains an invalid source.
    """
    try:
        return AllowedSources(active_config().adapter_places)
    except ValueError as error:
        raise ValueError(
            f"--elora-adapter-sources (SGLANG_ELORA_ADAPTER_SOURCES): {error}"
        ) from None


def refusal(path: str) -> str:
    """Why ``/load_lora_adapter`` may not load this path; empty if it may. Accesses the disk."""
    sources = allowed_sources()
    if not sources or sources.allows(path):
        return ""
    folder = active_config().adapter_dir
    if folder and not leads_out(Path(folder), Path(path)):
        return ""
    if any(path == given.lora_path for given in get_lora().lora_paths or ()):
        return ""
    return f"it is not in --elora-adapter-sources: {sources}"


def keep_loaded(manager: TokenizerManager) -> None:
    """Keep the folders of loaded adapters in the download cache and allow others to be removed from
    it. Call after a load or an unload."""
    keep_only(ref.lora_path for ref in manager.lora_registry.get_all_adapters().values())


async def find_named(
    original: Callable[..., Awaitable[None]],
    self: TokenizerManager,
    obj: GenerateReqInput | EmbeddingReqInput,
) -> None:
    """Register adapters found in the sources as loaded before. Runs around
    ``TokenizerManager._resolve_lora_path``, which loads such adapters again.

    Raises:
        ValueError: An adapter cannot be loaded (SGLang answers HTTP 400). The text contains neither
            the server's paths nor the names of other adapters.
    """
    names = [obj.lora_path] if isinstance(obj.lora_path, str) else obj.lora_path or ()
    if allowed_sources():
        for name in set(names) - {None} - self.lora_ref_cache.keys():
            if (path := await _find(name)) is not None:
                self.lora_ref_cache[name] = LoRARef(lora_name=name, lora_path=path, pinned=False)
    paths = [ref.lora_path for name in names if (ref := self.lora_ref_cache.get(name))]
    try:
        await original(self, obj)
    except ValueError as error:
        raise ValueError(_for_users(str(error), paths)) from error


async def _find(name: str) -> str | None:
    sources = allowed_sources()
    path, urls = await asyncio.to_thread(sources.look, name)
    for url in urls:
        try:
            if await source_calls().call(Call.LOOK, url, has_adapter, url):
                return url
        except Exception as error:  # error types differ between file systems
            text = str(error) if isinstance(error, SourceUnavailable) else repr(error)
            raise ValueError(f"LoRA adapter {name!r} cannot be looked for: {text}") from error
    if urls:
        sources.missed(name)
    return path


def _for_users(text: str, paths: Iterable[str]) -> str:
    """An error text without the server's folders and without lists of adapters."""
    for path in paths:
        if os.path.isabs(path) or is_url(path):
            text = text.replace(f"{path}/", "").replace(path, os.path.basename(path))
    cached = rf"{re.escape(str(cache_folder()))}/\w+/?"
    return _LISTS.sub("", re.sub(cached, "", text))
