"""Sizes of everything that objects hold, to show that nothing of it grows."""

from __future__ import annotations

import types
from collections import Counter, deque
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

_LEAVES = (str, bytes, int, float, complex, type(None), type, types.ModuleType, torch.Tensor)


def sizes_of(*roots: Any) -> Counter[str]:
    """Sums over all that can be reached: ``Type.attribute`` -> the entries of the containers there,
    ``Type`` -> the number of its objects.

    Containers in containers are reported as ``Type.attribute[]``; a bounded deque counts as its
    bound. Closures, bound methods and partial functions are followed too; tensors, modules and
    classes are not.
    """
    sizes: Counter[str] = Counter()
    seen: set[int] = set()
    left: list[tuple[str, Any]] = [("root", root) for root in roots]
    while left:
        name, value = left.pop()
        if isinstance(value, _LEAVES) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, np.ndarray):
            sizes[name] += len(value)
        elif isinstance(value, dict | list | tuple | set | frozenset | deque):
            if not isinstance(value, tuple):
                sizes[name] += getattr(value, "maxlen", None) or len(value)
            if isinstance(value, dict):
                left += [(f"{name}[]", item) for pair in value.items() for item in pair]
            else:
                left += [(f"{name}[]", item) for item in value]
        if type(value).__module__ != "builtins":
            sizes[type(value).__name__] += 1
        left += [(f"{type(value).__name__}.{key}", item) for key, item in _parts(value)]
    return sizes


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, types.MethodType):
        yield "self", value.__self__
    elif isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            yield f"{value.__qualname__}.{name}", cell.cell_contents
    elif isinstance(value, partial):
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    else:
        yield from getattr(value, "__dict__", {}).items()
        for base in type(value).__mro__:
            names = base.__dict__.get("__slots__", ())
            for name in (names,) if isinstance(names, str) else names:
                if hasattr(value, name):
                    yield name, getattr(value, name)
