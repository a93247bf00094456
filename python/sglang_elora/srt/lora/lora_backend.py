"""What ELORA's two LoRA backends share: the batch comes as segments, weights lie in KV pages.

SGLang's LoRA layers call a backend with the slabs they were given; ours were given ``WeightRef``s.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from sglang.srt.lora.backend.base_backend import BaseLoRABackend
from typing_extensions import override

from sglang_elora.pages import KVPlanes, ModuleShape, PagedAdapter, WeightRef
from sglang_elora.swapper.adapter_copy import AdapterCopy

Segment = tuple[PagedAdapter | None, int]
"""(adapter or None, number of token rows)"""

TORCH, TRITON = "elora_torch", "elora_triton"
MAX_RANK = 256
"""Largest rank where neither ``--max-lora-rank`` nor an adapter given at start says more."""

_NO_EMBEDDINGS = "adapters on embed_tokens or lm_head are refused with --elora"


class Graph(Enum):
    """Which CUDA graphs may replay a batch, and so which static memory describes it."""

    DECODE = "decode"
    PREFILL = "prefill"


class PagedLoRABackend(BaseLoRABackend):
    """A backend that takes its batches from ``set_batch``."""

    name: str
    skip_inactive_lora_batches = True  # a batch without adapters takes the plain layers' path
    max_rank: int | None = None  # largest it computes; None: any
    _awaited: Sequence[AdapterCopy] = ()  # copies that the batch runs ahead of

    def __init__(
        self, max_loras_per_batch: int, device: torch.device, *, max_adapters: int, **_: Any
    ) -> None:
        """``max_adapters`` bounds a batch, ``max_loras_per_batch`` a slab that does not exist."""
        super().__init__(max_loras_per_batch, device)
        self.max_adapters = max_adapters

    @abstractmethod
    def set_model(
        self, shapes: Sequence[ModuleShape], dtype: torch.dtype, *, max_rank: int, tp_size: int
    ) -> None:
        """Called once, before the first batch.

        Args:
            shapes: The target modules.
            dtype: Of the weights.
            max_rank: Largest rank of any adapter to come.
            tp_size: Tensor-parallel ranks.
        """

    def warm_up(self, planes: KVPlanes) -> None:
        """Called once, when the KV pool is there: what would delay the first requests otherwise."""

    @abstractmethod
    def set_batch(self, segments: Sequence[Segment], graph: Graph | None) -> None:
        """What the next forward pass computes. ``reset_batch_state`` undoes it.

        Args:
            segments: In row order.
            graph: The CUDA graphs that may replay it.
        """

    def await_copies(self, copies: Sequence[AdapterCopy], graph: Graph | None) -> None:
        """Have the next batch wait for weights that may not be in their slots yet.

        Each layer waits for its own weights. A graph cannot wait within itself, so a batch that is
        replayed waits for the whole copies before it begins; ``Swapper.is_hidden`` counts on both.
        """
        self._awaited = copies if graph is None else ()
        for copy in copies if graph is not None else ():
            copy.wait()

    @override
    def prepare_lora_batch(self, *_: Any, **__: Any) -> None:
        """Refused: SGLang's does nothing, so the last batch's adapters would be computed again."""
        raise NotImplementedError(f"{self.name} takes its batches from set_batch")

    @override
    def run_lora_a_embedding(self, *_: Any, **__: Any) -> torch.Tensor:
        """Refused: SGLang's returns nothing."""
        raise NotImplementedError(_NO_EMBEDDINGS)

    @override
    def run_lora_a_sgemm(
        self, x: torch.Tensor, weights: WeightRef, *_: Any, **options: Any
    ) -> torch.Tensor:
        """``x @ A^T * scaling`` of each row's adapter, in a form that ``run_lora_b_sgemm`` takes.

        Its shape is equal on all tensor-parallel ranks, and it may be summed over them.

        Args:
            x: ``[rows, in_features]``.

        Raises:
            NotImplementedError: The layer is ``lm_head``, whose rows are not the batch's.
        """
        if "pruned_batch_info" in options:
            raise NotImplementedError(_NO_EMBEDDINGS)
        return self._shrink_when_there(x, weights)

    @override
    def run_lora_b_sgemm(
        self,
        x: torch.Tensor,
        weights: WeightRef,
        output_offset: torch.Tensor | None = None,
        output_offset_cpu: torch.Tensor | None = None,
        *,
        base_output: torch.Tensor,
        **_: Any,
    ) -> torch.Tensor:
        """Add ``x @ B^T`` of each row's adapter into ``base_output``, part by part, in place.

        Args:
            x: What ``run_lora_a_sgemm`` returned for the same module.
            base_output: ``[rows, sum of out_features]``.
        """
        return self.expand(x, weights, base_output)

    @override
    def run_qkv_lora(
        self, x: torch.Tensor, qkv_lora_a: WeightRef, qkv_lora_b: WeightRef, **options: Any
    ) -> torch.Tensor:
        return self.expand(
            self._shrink_when_there(x, qkv_lora_a), qkv_lora_b, options["base_output"]
        )

    @override
    def run_gate_up_lora(
        self, x: torch.Tensor, gate_up_lora_a: WeightRef, gate_up_lora_b: WeightRef, **options: Any
    ) -> torch.Tensor:
        return self.expand(
            self._shrink_when_there(x, gate_up_lora_a), gate_up_lora_b, options["base_output"]
        )

    def _shrink_when_there(self, x: torch.Tensor, weights: WeightRef) -> torch.Tensor:
        for copy in self._awaited:
            copy.wait_layer(weights.layer)
        return self.shrink(x, weights)

    @abstractmethod
    def shrink(self, x: torch.Tensor, weights: WeightRef) -> torch.Tensor:
        """As ``run_lora_a_sgemm``."""

    @abstractmethod
    def expand(self, inner: torch.Tensor, weights: WeightRef, output: torch.Tensor) -> torch.Tensor:
        """As ``run_lora_b_sgemm``."""
