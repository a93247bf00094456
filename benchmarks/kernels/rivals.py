"""SGLang's own LoRA kernels, csgmv and triton, on buffers padded to the largest rank."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.kernels.world import CaseWorld
from sglang_elora.pages import ModuleShape

CHUNK_ROWS = 16  # --max-lora-chunk-size, SGLang's default


class Slabs:
    """A ``[adapters, parts * largest rank, in]`` and B ``[adapters, out, largest rank]`` by layer.

    The same weights as the world's scattered adapters, each packed at its own rank as SGLang packs
    them.
    """

    def __init__(self, world: CaseWorld, shape: ModuleShape) -> None:
        case, device = world.case, world.planes.device
        rank, parts = max(case.ranks), len(shape.out_features)
        self.parts, self.shape, self.rank = parts, shape, rank
        self.a, self.b = [], []
        for layer in range(world.num_layers):
            a = torch.zeros(
                case.num_adapters, parts * rank, shape.in_features, dtype=torch.bfloat16
            ).to(device)
            b = torch.zeros(
                case.num_adapters, sum(shape.out_features), rank, dtype=torch.bfloat16
            ).to(device)
            for i, adapter in enumerate(world.scattered):
                own = adapter.a(layer, shape.name)
                a[i, : len(own)] = own
                halves = [adapter.b(layer, shape.name, part).T for part in range(parts)]
                b[i, :, : adapter.rank] = torch.cat(halves)
            self.a.append(a)
            self.b.append(b)
        ends = [0]
        for out in shape.out_features:
            ends.append(ends[-1] + out)
        self.ends = torch.tensor(ends, dtype=torch.int32, device=device)
        rows, counts = _by_adapter(world)
        as_int = {"dtype": torch.int32, "device": device}
        self.common = {
            "use_cuda_graph": False,
            "lora_ranks": torch.tensor(case.ranks, **as_int),
            "scalings": torch.full((case.num_adapters,), 0.5, device=device),
            "permutation": torch.tensor(rows, **as_int),
        }
        self.counts, self.as_int = counts, as_int


class Csgmv(Slabs):
    """As ``ChunkedSgmvLoRABackend`` launches them."""

    def __init__(self, world: CaseWorld, shape: ModuleShape) -> None:
        from sglang.kernels.ops.lora.dense.chunked_sgmv_expand import (
            chunked_sgmv_lora_expand_forward,
        )
        from sglang.kernels.ops.lora.dense.chunked_sgmv_shrink import (
            chunked_sgmv_lora_shrink_forward,
        )
        from sglang.srt.lora.utils import LoRABatchInfo

        super().__init__(world, shape)
        self._shrink, self._expand = (
            chunked_sgmv_lora_shrink_forward,
            chunked_sgmv_lora_expand_forward,
        )
        owners, begins, begin = [], [0], 0
        for adapter, count in enumerate(self.counts):
            for first in range(0, count, CHUNK_ROWS):
                owners.append(adapter)
                begins.append(begin + min(first + CHUNK_ROWS, count))
            begin += count
        self.info = LoRABatchInfo(
            bs=len(owners),
            num_segments=len(owners),
            max_len=CHUNK_ROWS,
            seg_indptr=torch.tensor(begins, **self.as_int),
            weight_indices=torch.tensor(owners, **self.as_int),
            seg_lens=None,
            **self.common,
        )

    def both(self, layer: int, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        inner = self._shrink(
            x=x, weights=self.a[layer], batch_info=self.info, num_slices=self.parts
        )
        result: torch.Tensor = self._expand(
            x=inner,
            weights=self.b[layer],
            batch_info=self.info,
            slice_offsets=self.ends,
            max_slice_size=max(self.shape.out_features),
            base_output=output,
        )
        return result


class Triton(Slabs):
    """As ``TritonLoRABackend`` launches them in decode: rows sorted by adapter."""

    def __init__(self, world: CaseWorld, shape: ModuleShape) -> None:
        from sglang.kernels.ops.lora.dense.gate_up_lora_b import gate_up_lora_b_fwd
        from sglang.kernels.ops.lora.dense.qkv_lora_b import qkv_lora_b_fwd
        from sglang.kernels.ops.lora.dense.sgemm_lora_a import sgemm_lora_a_fwd
        from sglang.kernels.ops.lora.dense.sgemm_lora_b import sgemm_lora_b_fwd
        from sglang.srt.lora.utils import LoRABatchInfo

        super().__init__(world, shape)
        self._a, self._one = sgemm_lora_a_fwd, sgemm_lora_b_fwd
        self._two, self._three = gate_up_lora_b_fwd, qkv_lora_b_fwd
        begins = [0]
        for count in self.counts:
            begins.append(begins[-1] + count)
        self.info = LoRABatchInfo(
            bs=len(self.counts),
            num_segments=len(self.counts),
            max_len=max(self.counts),
            seg_indptr=torch.tensor(begins, **self.as_int),
            weight_indices=torch.arange(len(self.counts), **self.as_int),
            seg_lens=torch.tensor(self.counts, **self.as_int),
            **self.common,
        )

    def both(self, layer: int, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        inner = self._a(x, self.a[layer], self.info, stack_num=self.parts)
        b, outs = self.b[layer], self.shape.out_features
        result: torch.Tensor
        if self.parts == 1:
            result = self._one(inner, b, self.info, output)
        elif self.parts == 2:
            result = self._two(inner, b, self.info, outs[0], output)
        else:
            result = self._three(inner, b, self.info, self.ends, max(outs), output)
        return result


RIVALS: dict[str, Any] = {"csgmv": Csgmv, "sglang_triton": Triton}


def _by_adapter(world: CaseWorld) -> tuple[list[int], list[int]]:
    """Row numbers grouped by adapter, and how many each has."""
    groups: list[list[int]] = [[] for _ in range(world.case.num_adapters)]
    row = 0
    for adapter, count in world.case.segments:
        groups[adapter] += range(row, row + count)
        row += count
    return [row for group in groups for row in group], [len(group) for group in groups]
