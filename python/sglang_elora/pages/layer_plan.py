"""Which layers of the KV pool hold the adapter weights of which layers of the model.

In most models every layer has KV, and a layer of the pool holds the weights of its own layer. In
others only some layers have KV in the pool, because the rest has linear attention or a state space.
Then a layer of the pool holds the weights of several layers of the model: of each module, in the
order of the model, as many as of any other layer of the pool or one more. So a list of slots, which
is the same in every layer, has little room to spare in any of them; and as copies arrive in the
order of the pool's layers, weights arrive in about the order in which the model needs them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import NamedTuple

from sglang_elora.pages.layout import ModuleShape


class Place(NamedTuple):
    """Where the weights of one module of one layer of the model lie."""

    layer: int  # of the pool
    name: str  # of the ``ModuleShape`` there


@dataclass(frozen=True)
class LayerPlan:
    """The places of all modules of a model; computed once, from shapes only.

    Args:
        shapes: What a layer of the pool holds, those first that every layer has.
        num_layers: Layers of the pool.
        places: By (layer of the model, SGLang's name of the module).
    """

    shapes: tuple[ModuleShape, ...]
    num_layers: int
    places: Mapping[tuple[int, str], Place]

    @classmethod
    def build(
        cls,
        found: Mapping[ModuleShape, Sequence[int]],
        outside: Iterable[ModuleShape],
        *,
        model_layers: int,
        pool_layers: int,
    ) -> LayerPlan:
        """The plan of a model.

        Args:
            found: Shapes, under SGLang's name of the module, and the layers of the model that have
                it; several shapes may have one name.
            outside: Modules outside of the layers, of which every layer of the pool has a part.
            model_layers: Layers of the model.
            pool_layers: Layers of the pool.
        """
        if pool_layers == model_layers:
            spread = {shape: {layer: layer for layer in layers} for shape, layers in found.items()}
        else:
            spread = _spread(found, pool_layers)
        layers_at: dict[str, dict[tuple[ModuleShape, int], dict[int, int]]] = {}
        kinds: dict[tuple[int, ...], list[ModuleShape]] = defaultdict(list)  # by layers
        for shape, layers in found.items():
            taken: dict[int, int] = defaultdict(int)  # positions taken, by layer of the pool
            by_position = layers_at.setdefault(shape.name, {})
            for layer in layers:
                at = spread[shape][layer]
                by_position.setdefault((shape, taken[at]), {})[at] = layer
                taken[at] += 1
        around, places = list(outside), {}
        for module, by_position in layers_at.items():
            for number, ((shape, _), layers_by_place) in enumerate(by_position.items()):
                name = module if len(by_position) == 1 else f"{module}@{number}"
                own = frozenset(layers_by_place) if len(layers_by_place) < pool_layers else None
                kinds[tuple(found[shape])].append(replace(shape, name=name, layers=own))
                for at, layer in layers_by_place.items():
                    places[layer, module] = Place(at, name)
        inside = list(kinds.values())
        if pool_layers != model_layers:
            inside = _in_both_planes(inside, sum(s.b_elems - s.a_elems for s in around))
        shapes = sorted(chain(around, *inside), key=lambda s: (s.layers is not None, s.name))
        return cls(tuple(shapes), pool_layers, places)

    @cached_property
    def _layers_of_model(self) -> Mapping[Place, int]:
        return {place: layer for (layer, _), place in self.places.items()}

    def layer_of_model(self, layer: int, name: str) -> int:
        """The layer of the model whose weights a layer of the pool holds under this name."""
        return self._layers_of_model[Place(layer, name)]

    def has_no_gate(self, layer: int | None) -> bool:
        """Whether a layer's MLP has an ``up_proj`` of its own, without a gate."""
        return (layer, "up_proj") in self.places

    def shapes_of(self, present: AbstractSet[tuple[int | None, str]]) -> list[ModuleShape]:
        """The shapes that an adapter needs.

        Args:
            present: (layer of the model, SGLang's name) of the modules that it has weights for; the
                layer is None outside of the layers.

        Raises:
            ValueError: A layer does not have a module that the adapter has weights for.
        """
        names = {shape.name: shape for shape in self.shapes}
        found = {
            (layer, module): module if layer is None else self.places.get((layer, module))
            for layer, module in present
        }
        needed = {at if isinstance(at, str) else at.name for at in found.values() if at is not None}
        lacking = [key for key, at in found.items() if at is None] + [
            (None, name) for name in needed - names.keys()
        ]
        if lacking:
            told = sorted(f"{module} (layer {layer})" for layer, module in lacking)
            raise ValueError(
                f"it has weights for {', '.join(told[:4])}, which this server does not adapt "
                "there: name them in --lora-target-modules, if the model has them"
            )
        return [shape for shape in self.shapes if shape.name in needed]


def _spread(
    found: Mapping[ModuleShape, Sequence[int]], pool_layers: int
) -> dict[ModuleShape, dict[int, int]]:
    """By shape, and by layer of the model: the layer of the pool. Every layer of the pool gets as
    many of a shape as any other or one more; those get one more that hold least so far, of modules
    of the same layers and then of all."""
    held, spread = [0] * pool_layers, {}
    held_of: dict[tuple[int, ...], list[int]] = defaultdict(lambda: [0] * pool_layers)
    elems = {shape: shape.a_elems + shape.b_elems for shape in found}
    for shape in sorted(found, key=lambda shape: (-elems[shape], shape.name)):
        least, num_more = divmod(len(found[shape]), pool_layers)
        own = held_of[tuple(found[shape])]
        order = sorted(range(pool_layers), key=lambda at: (own[at], held[at], at))
        counts = [least + (at in order[:num_more]) for at in range(pool_layers)]
        for at, count in enumerate(counts):
            held[at] += count * elems[shape]
            own[at] += count * elems[shape]
        taken = chain.from_iterable([at] * count for at, count in enumerate(counts))
        spread[shape] = dict(zip(found[shape], taken, strict=True))
    return spread


def _in_both_planes(
    kinds: Iterable[Sequence[ModuleShape]], difference: int
) -> list[list[ModuleShape]]:
    """The shapes, some with A and B swapped, so that both planes hold about as much: of each kind
    of layers, because an adapter may have weights for some of them only, and in total.

    Args:
        kinds: Shapes of modules that the same layers have.
        difference: By how many elements per rank the second plane holds more of other shapes.
    """
    done = []
    for shapes in kinds:
        own, swaps = 0, {}
        for shape in sorted(shapes, key=lambda s: (-abs(s.b_elems - s.a_elems), s.name)):
            more = shape.b_elems - shape.a_elems
            swaps[shape.name] = more * own > 0
            own += -more if swaps[shape.name] else more
        turned = own * difference > 0
        difference += -own if turned else own
        done.append([replace(s, swaps_planes=swaps[s.name] != turned) for s in shapes])
    return done
