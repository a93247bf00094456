"""LoRA adapters as files: finding, downloading, reading and checking them.

Nothing here imports sglang, and torch and transformers are imported only inside functions.
"""

from __future__ import annotations

__all__ = [
    "INVOCATION",
    "NUM_DROPPED",
    "STACKED",
    "AdapterError",
    "AdapterFacts",
    "AllowedSources",
    "BaseShapes",
    "FolderScan",
    "FoundAdapter",
    "Refusals",
    "cache_folder",
    "check_adapter",
    "check_tensors",
    "content_digest",
    "download",
    "has_adapter",
    "is_factor",
    "is_tower",
    "is_url",
    "keep_only",
    "leads_out",
    "needs_one_rank",
    "one_rank_config",
    "one_rank_tensors",
    "read_adapter",
    "served_modules",
    "served_name",
    "served_names",
    "stored_shapes",
    "why_not_stacked",
]

from sglang_elora.adapters.allowed_sources import AllowedSources
from sglang_elora.adapters.base_shapes import BaseShapes, is_tower
from sglang_elora.adapters.check import (
    AdapterFacts,
    check_adapter,
    check_tensors,
    content_digest,
    read_adapter,
    served_modules,
    stored_shapes,
)
from sglang_elora.adapters.config_file import INVOCATION
from sglang_elora.adapters.errors import AdapterError
from sglang_elora.adapters.folder_scan import FolderScan, FoundAdapter, leads_out
from sglang_elora.adapters.module_names import served_name, served_names
from sglang_elora.adapters.one_rank import (
    NUM_DROPPED,
    needs_one_rank,
    one_rank_config,
    one_rank_tensors,
)
from sglang_elora.adapters.refusals import Refusals
from sglang_elora.adapters.remote import cache_folder, download, has_adapter, is_url, keep_only
from sglang_elora.adapters.stacked_shapes import STACKED, why_not_stacked
from sglang_elora.adapters.tensor_rules import is_factor
