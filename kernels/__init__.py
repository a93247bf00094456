"""Triton kernels for LoRA weights stored in KV pages. Installed as ``sglang_elora.kernels``.

They import Triton and torch, but neither SGLang nor other parts of this package. Each kernel has a
reference, a test and a benchmark of the same name.
"""

from __future__ import annotations

__all__ = [
    "MISSING",
    "MOST_SINGLE_ROUTES",
    "Batch",
    "BatchTables",
    "Contiguous",
    "ExpandConfig",
    "PoolPlanes",
    "RoutedTiles",
    "ShrinkConfig",
    "StackedModule",
    "Tiles",
    "adapter_record",
    "expand_config",
    "job_ints",
    "lora_expand",
    "lora_logits",
    "lora_lookup",
    "lora_shrink",
    "page_copy",
    "record_ints",
    "routed_tiles",
    "shrink_config",
    "tuned_tile_counts",
]

from sglang_elora.kernels.batch_tables import (
    MISSING,
    Batch,
    BatchTables,
    adapter_record,
    record_ints,
)
from sglang_elora.kernels.launch_configs import (
    ExpandConfig,
    ShrinkConfig,
    expand_config,
    shrink_config,
    tuned_tile_counts,
)
from sglang_elora.kernels.lora_expand import lora_expand
from sglang_elora.kernels.lora_logits import lora_logits
from sglang_elora.kernels.lora_lookup import lora_lookup
from sglang_elora.kernels.lora_shrink import lora_shrink
from sglang_elora.kernels.page_copy import Contiguous, PoolPlanes, job_ints, page_copy
from sglang_elora.kernels.routed_tiles import MOST_SINGLE_ROUTES, RoutedTiles, Tiles, routed_tiles
from sglang_elora.kernels.stacked_module import StackedModule
