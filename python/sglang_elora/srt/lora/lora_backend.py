"""Base class of ELORA's two LoRA backends: batches are segments, weights lie in KV pages.

SGLang's LoRA layers pass their weight buffers to the backend; with ELORA these are ``WeightRef``s.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from types import MappingProxyType
from typing import Any

import torch
from sglang.srt.environ import envs
from sglang.srt.lora.backend.base_backend import BaseLoRABackend
from typing_extensions import override

from sglang_elora.pages import (
    EMBEDDING,
    OUTPUT_LAYER,
    OUTSIDE_LAYERS,
    KVPlanes,
    ModuleShape,
    PagedAdapter,
    VocabularyModule,
    WeightRef,
)
from sglang_elora.swapper.adapter_copy import AdapterCopy
from sglang_elora.tree import num_inactive

Segment = tuple[PagedAdapter | None, int]
"""(adapter or None, number of token rows)"""

TORCH, TRITON = "elora_torch", "elora_triton"
EXPERT_MODULES = ("gate_up_proj_moe", "down_proj_moe")
"""SGLang's names of what the experts of a layer have."""
EXPERT_TARGETS = frozenset({"gate_up_proj", "down_proj"})
"""Target modules with which SGLang adapts experts: both must be among them."""
MAX_RANK = 256
"""Largest rank, unless ``--max-lora-rank`` or an adapter of ``--lora-paths`` has a higher one.
Raising it takes more memory in CUDA graphs."""


class Graph(Enum):
    """The kind of CUDA graphs that may replay a batch; it selects the static memory for it."""

    DECODE = "decode"
    PREFILL = "prefill"


class PagedLoRABackend(BaseLoRABackend):
    """A LoRA backend that gets its batches by ``set_batch``."""

    name: str
    skip_inactive_lora_batches = True  # a batch without adapters uses the layers without LoRA
    max_rank: int | None = None  # largest supported rank; None: no limit
    vocabulary: Mapping[str, VocabularyModule] = MappingProxyType({})
    """The embedding and the output layer, those of them that adapters may have weights for."""
    experts_per_row: int = 1
    """Of the model's layers of experts; set by them."""
    _awaited: Sequence[AdapterCopy] = ()  # copies that each layer of the batch waits for

    def __init__(
        self, max_loras_per_batch: int, device: torch.device, *, max_adapters: int, **_: Any
    ) -> None:
        """``max_adapters`` limits a batch; ``max_loras_per_batch`` sizes SGLang's LoRA buffers,
        which are not used."""
        super().__init__(max_loras_per_batch, device)
        self.max_adapters = max_adapters

    @abstractmethod
    def set_model(
        self, shapes: Sequence[ModuleShape], dtype: torch.dtype, *, max_rank: int, tp_size: int
    ) -> None:
        """Set the model's dimensions. Called once, before the first batch.

        Args:
            shapes: The target modules.
            dtype: Dtype of the weights.
            max_rank: Largest rank of any adapter, including those loaded later.
            tp_size: Tensor-parallel ranks.
        """

    def warm_up(self, planes: KVPlanes) -> None:
        """Do work that would delay the first requests. Called once, after the KV pool is built."""

    @abstractmethod
    def set_batch(self, segments: Sequence[Segment], graph: Graph | None) -> None:
        """Set the batch of the next forward pass. ``reset_batch_state`` undoes it.

        Args:
            segments: The segments in row order.
            graph: The kind of CUDA graphs that may replay it; None: it runs eagerly.
        """

    @abstractmethod
    def adapts(self, module: str, batch: Any = None) -> bool:
        """Whether an adapter may have weights for the embedding, the output layer or experts.

        Args:
            batch: The rows that reach it, if not those of ``set_batch``.
        """

    @abstractmethod
    def routes(self, topk_ids: torch.Tensor) -> Any:
        """The description of a batch whose rows are routes: pairs of a row and one of its experts.
        Route ``row * experts per row + i`` has the weights of its row's adapter for its expert.

        Args:
            topk_ids: Integers ``[rows, experts per row]``; negative: none.
        """

    @abstractmethod
    def batch_of(self, segments: Sequence[Segment]) -> Any:
        """The description of a batch that runs eagerly, as ``batch_info`` is. SGLang's output layer
        reads its ``use_cuda_graph`` and ``expected_tokens``."""

    def set_output_rows(self, segments: Sequence[Segment] | None) -> None:
        """Set the rows of the next forward pass that reach the output layer.

        SGLang computes logits in several passes if there are many rows
        (``SGLANG_ENABLE_LOGPROB_CHUNK``); each pass has its own description.

        Args:
            segments: As of ``set_batch``. None: all rows of the batch reach it.
        """
        self.lm_head_batch_info = self.lm_head_pass_batch_infos = None
        if segments is None:
            return
        self.lm_head_batch_info = self.batch_of(segments)
        size, num_rows = envs.SGLANG_LOGPROB_CHUNK_SIZE.get(), sum(n for _, n in segments)
        if envs.SGLANG_ENABLE_LOGPROB_CHUNK.get() and num_rows > size:
            self.lm_head_pass_batch_infos = [self.batch_of(part) for part in _cut(segments, size)]

    def await_copies(self, copies: Sequence[AdapterCopy], graph: Graph | None) -> None:
        """Make the next batch wait for weights that may not be in their slots yet.

        Each layer waits for its own weights; the embedding and the output layer wait for all. A
        CUDA graph cannot do that, so a replayed batch waits for the whole copies before it begins.
        ``Swapper.is_hidden`` relies on both.
        """
        self._awaited = copies if graph is None else ()
        for copy in copies if graph is not None else ():
            copy.wait()

    @override
    def prepare_lora_batch(self, *_: Any, **__: Any) -> None:
        """Not supported: SGLang's version does nothing, so the last batch would be used again."""
        raise NotImplementedError(f"{self.name} takes its batches from set_batch")

    @override
    def init_cuda_graph_moe_buffers(self, *_: Any, **__: Any) -> None:
        """Do nothing: SGLang would allocate scratch memory of its own kernels."""

    def add_to_routes(
        self,
        x: torch.Tensor,
        weights: WeightRef,
        output: torch.Tensor,
        routes: Any,
        factors: torch.Tensor | None = None,
    ) -> None:
        """Add ``x @ A^T @ B^T * scaling`` of each route's adapter and expert to ``output``.

        Args:
            x: ``[rows, in_features]``, or a row per route.
            output: ``[routes, out_features]``.
            routes: Of ``routes``.
            factors: ``[routes]`` to multiply the products by; None: 1.
        """
        inner = self._shrink_when_there(x, weights, routes)
        if factors is not None:
            inner *= factors[:, None].to(inner.dtype)
        self.expand(inner, weights, output, routes)

    @override
    def run_lora_a_embedding(
        self, input_ids: torch.Tensor, weights: WeightRef, *_: Any, **__: Any
    ) -> torch.Tensor:
        """``A[:, token] * scaling`` of each row's adapter, as input for ``run_lora_b_sgemm``.

        Args:
            input_ids: Integers ``[rows]``; those outside the vocabulary give zeros.
        """
        if not self.adapts(EMBEDDING):
            return input_ids.new_empty(0)
        for copy in self._awaited:  # the first layer to compute needs parts of all
            copy.wait()
        return self.lookup(input_ids)

    @override
    def run_lora_a_sgemm(
        self, x: torch.Tensor, weights: WeightRef, *_: Any, **options: Any
    ) -> torch.Tensor:
        """``x @ A^T * scaling`` of each row's adapter, as input for ``run_lora_b_sgemm``.

        Its shape is equal on all tensor-parallel ranks, so it can be summed over them.

        Args:
            x: ``[rows, in_features]``.
        """
        if weights.module != OUTPUT_LAYER:
            return self._shrink_when_there(x, weights)
        batch = options.get("pruned_batch_info")
        if not self.adapts(OUTPUT_LAYER, batch):
            return x.new_empty(0)
        for copy in self._awaited:
            copy.wait()
        return self.shrink(x, weights, batch)

    @override
    def run_lora_b_sgemm(
        self,
        x: torch.Tensor,
        weights: WeightRef,
        output_offset: torch.Tensor | None = None,
        output_offset_cpu: torch.Tensor | None = None,
        *,
        base_output: torch.Tensor,
        pruned_batch_info: Any = None,
        **_: Any,
    ) -> torch.Tensor:
        """Add ``x @ B^T`` of each row's adapter to ``base_output``, part by part, in place.

        Args:
            x: Result of ``run_lora_a_sgemm`` or ``run_lora_a_embedding`` for the same module.
            base_output: ``[rows, sum of out_features]``, or wider for the output layer.
        """
        module = weights.module
        if module in OUTSIDE_LAYERS and not self.adapts(module, pruned_batch_info):
            return base_output
        if module == OUTPUT_LAYER:
            return self.expand_logits(x, base_output, pruned_batch_info)
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

    def _shrink_when_there(
        self, x: torch.Tensor, weights: WeightRef, batch: Any = None
    ) -> torch.Tensor:
        for copy in self._awaited:
            copy.wait_layer(weights.layer)
        return self.shrink(x, weights, batch)

    @abstractmethod
    def lookup(self, tokens: torch.Tensor) -> torch.Tensor:
        """As ``run_lora_a_embedding``, without waiting for copies."""

    @abstractmethod
    def shrink(self, x: torch.Tensor, weights: WeightRef, batch: Any = None) -> torch.Tensor:
        """As ``run_lora_a_sgemm``, without waiting for copies.

        Args:
            batch: What the rows are, if not those of ``set_batch``. With ``routes``, several may
                share a row of ``x``; the result has a row for each.
        """

    @abstractmethod
    def expand(
        self, inner: torch.Tensor, weights: WeightRef, output: torch.Tensor, batch: Any = None
    ) -> torch.Tensor:
        """As ``run_lora_b_sgemm``, for modules other than the output layer.

        Args:
            batch: What the rows are, if not those of ``set_batch``.
        """

    @abstractmethod
    def expand_logits(
        self, inner: torch.Tensor, output: torch.Tensor, batch: Any = None
    ) -> torch.Tensor:
        """As ``run_lora_b_sgemm`` for the output layer, all parts of the vocabulary.

        Args:
            batch: What the rows are, if not those of ``set_batch``.
        """


def segments_of(
    runs: Iterable[tuple[str | None, int, int]], adapters: Mapping[str, PagedAdapter]
) -> list[Segment]:
    """The segments of a batch. Rows before an adapter begins to act have no adapter.

    Args:
        runs: (adapter id or None, number of rows, position of the first) of each request.
    """
    segments: list[Segment] = []
    for adapter_id, num_rows, first in runs:
        if num_before := num_inactive(adapter_id, first, num_rows):
            segments.append((None, num_before))
        if num_rows > num_before:
            adapter = None if adapter_id is None else adapters[adapter_id]
            segments.append((adapter, num_rows - num_before))
    return segments


def _cut(segments: Sequence[Segment], size: int) -> list[list[Segment]]:
    """The segments cut into runs of ``size`` rows; the last has fewer."""
    runs: list[list[Segment]] = [[]]
    room = size
    for adapter, num_rows in segments:
        while num_rows > room:
            runs[-1].append((adapter, room))
            num_rows, room = num_rows - room, size
            runs.append([])
        runs[-1].append((adapter, num_rows))
        room -= num_rows
    return runs
