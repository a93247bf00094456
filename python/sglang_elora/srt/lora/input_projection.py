"""LoRA on the input projection of state-space layers, whose parts share one A."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.linear import MergedColumnParallelLinear
from sglang.srt.lora.layers import (
    ColumnParallelLinearWithLoRA,
    MergedColumnParallelLinearWithLoRA,
)
from typing_extensions import override

NAME = "in_proj"
"""SGLang's name of the module."""


class InputProjectionWithLoRA(ColumnParallelLinearWithLoRA):
    """A merged projection with one A for all of its output, as PEFT has it.

    SGLang's own layer has an A for each of the first two parts and none for the others.
    """

    def __init__(self, base_layer: MergedColumnParallelLinear, lora_backend: Any) -> None:
        super().__init__(base_layer, lora_backend)
        ends = torch.tensor([0, sum(base_layer.output_partition_sizes)], dtype=torch.int32)
        self.output_offset_cpu = ends
        self.output_offset = ends.to(next(base_layer.parameters()).device)

    @override
    def slice_lora_b_weights(self, B: torch.Tensor) -> torch.Tensor:
        part: torch.Tensor = MergedColumnParallelLinearWithLoRA.slice_lora_b_weights(self, B)
        return part
