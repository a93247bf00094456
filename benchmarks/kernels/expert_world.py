"""Adapters on the experts of one layer, and rows that are routed to experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from benchmarks.kernels.floor import expert_work
from benchmarks.kernels.shapes import EXPERT_SLOT_ELEMS, EXPERTS, EXPERTS_PER_ROW, Case
from benchmarks.kernels.world import ROTATE_BYTES, SEED, CaseWorld, input_std
from sglang_elora.pages import ModuleShape


@dataclass(frozen=True, slots=True)
class Round:
    """One layer's routes: its number, and the experts of each row, int32 ``[T, k]``."""

    layer: int
    topk_ids: torch.Tensor


@dataclass(frozen=True, slots=True)
class Group:
    """Routes that share an adapter and an expert; their numbers are int64, on the device."""

    adapter: int
    expert: int
    routes: torch.Tensor


@dataclass
class ExpertWorld:
    """Adapters with weights for both modules of a layer of experts, and rounds of routes.

    A round uses few of the experts, so many rounds are timed together: their weights miss the
    second-level cache. A row has other experts in each round of a layer.
    """

    world: CaseWorld
    shapes: tuple[ModuleShape, ...]
    rounds: list[Round]

    @classmethod
    def build(
        cls,
        case: Case,
        device: torch.device,
        shapes: tuple[ModuleShape, ...] = EXPERTS,
        experts_per_row: int = EXPERTS_PER_ROW,
        max_rounds: int = 1000,
    ) -> ExpertWorld:
        world = CaseWorld.build(case, device, shapes, EXPERT_SLOT_ELEMS)
        num_experts = shapes[0].num_experts
        layer_bytes = sum(sum(layout.plane_elems) * 2 for layout in world.layouts)
        num_groups = case.num_adapters * num_experts
        used = min(case.num_rows * experts_per_row, num_groups)
        num_rounds = 1 + ROTATE_BYTES * num_groups // (used * layer_bytes)
        most = world.num_layers * (num_experts // experts_per_row)
        generator = torch.Generator(device)
        rounds = []
        for i in range(min(num_rounds, most, max_rounds)):
            visit, layer = divmod(i, world.num_layers)
            generator.manual_seed(SEED + layer)  # a row's order of a layer's experts
            order = torch.rand(case.num_rows, num_experts, generator=generator, device=device)
            begin = visit * experts_per_row
            ids = order.argsort(dim=1)[:, begin : begin + experts_per_row]
            rounds.append(Round(layer, ids.to(torch.int32).contiguous()))
        return cls(world, shapes, rounds)

    @property
    def device(self) -> torch.device:
        return self.world.planes.device

    @property
    def num_routes(self) -> int:
        return self.rounds[0].topk_ids.numel()

    def rows_per_input(self, shape: ModuleShape) -> int:
        """Routes that share an input row: all of a row in the first module."""
        return self.rounds[0].topk_ids.shape[1] if shape is self.shapes[0] else 1

    def inputs(self, shape: ModuleShape) -> tuple[torch.Tensor, torch.Tensor]:
        """x and base output, bfloat16, as of ``CaseWorld``; the output has a row per route."""
        generator = torch.Generator(self.device).manual_seed(SEED)
        num_inputs = self.num_routes // self.rows_per_input(shape)
        make = {"dtype": torch.bfloat16, "device": self.device, "generator": generator}
        x = torch.randn(num_inputs, shape.in_features, **make) * input_std(shape, self.world.case)
        return x, torch.randn(self.num_routes, sum(shape.out_features), **make)

    @cached_property
    def groups(self) -> list[list[Group]]:
        """Per round, its groups."""
        owners = [adapter for adapter, n in self.world.case.segments for _ in range(n)]
        num_experts = self.shapes[0].num_experts
        return [groups_of(owners, one.topk_ids, num_experts) for one in self.rounds]

    def num_bytes(self, shape: ModuleShape) -> float:
        """Bytes that both kernels of a module have to move, on average of the rounds."""
        num_inputs = self.num_routes // self.rows_per_input(shape)
        ranks = self.world.case.ranks
        total = 0
        for groups in self.groups:
            sizes = [(ranks[group.adapter], len(group.routes)) for group in groups]
            total += expert_work(shape, num_inputs, sizes).num_bytes
        return total / len(self.rounds)


def groups_of(owners: Sequence[int], topk_ids: torch.Tensor, num_experts: int) -> list[Group]:
    """The groups of a batch's routes.

    Args:
        owners: Adapter of each row, or -1.
        topk_ids: Integers ``[T, k]``, T the number of rows; negative: no route.
    """
    adapters = torch.tensor(owners, dtype=torch.int64, device=topk_ids.device)[:, None]
    keys = (adapters * num_experts + topk_ids).masked_fill((adapters < 0) | (topk_ids < 0), -1)
    keys, routes = keys.flatten().sort()
    values, counts = keys.unique_consecutive(return_counts=True)
    parts = zip(values.tolist(), routes.split(counts.tolist()), strict=True)
    return [Group(*divmod(key, num_experts), part) for key, part in parts if key >= 0]


class InTorch:
    """LoRA of groups of routes in torch: two products for each group, one after the other.

    Its weights are contiguous copies, and the host knows the groups in advance.
    """

    def __init__(
        self,
        world: CaseWorld,
        layer: int,
        shape: ModuleShape,
        groups: Sequence[Group],
        rows_per_input: int,
    ) -> None:
        self.scaling = world.scattered[0].scaling
        self.groups = []
        for group in groups:
            adapter, expert = world.scattered[group.adapter], group.expert
            a = adapter.a(layer, shape.name, expert).clone()  # valid until the next layer's
            b = [
                adapter.b(layer, shape.name, part, expert).clone()
                for part in range(len(shape.out_features))
            ]
            self.groups.append((group.routes, group.routes // rows_per_input, a, b))

    def add(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Add the products to ``output``, computed in its dtype."""
        dtype = output.dtype
        for routes, inputs, a, b in self.groups:
            inner = x[inputs].to(dtype) @ a.to(dtype).T * self.scaling
            inner = inner.bfloat16().to(dtype)  # as it is rounded between the kernels
            parts = zip(inner.chunk(len(b), dim=1), b, strict=True)
            product = [columns @ matrix.to(dtype) for columns, matrix in parts]
            output.index_add_(0, routes, torch.cat(product, dim=1))
        return output
