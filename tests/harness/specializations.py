"""What Triton compiles for: the key under which it looks a launch up among compiled kernels."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature

KERNELS = ("lora_shrink", "lora_expand", "lora_lookup", "page_copy", "routed_tiles")
TARGET = GPUTarget("cuda", 90, 32)


class Launches:
    """Kernels whose launches are recorded and not run.

    Attributes:
        keys: ``(kernel, key)``; Triton compiles a kernel again for each key that it has not seen.
        arguments: The tensors and numbers of each launch, in order, by the parameter's name.
    """

    def __init__(self) -> None:
        self.keys: set[tuple[str, str]] = set()
        self.arguments: list[tuple[str, dict[str, Any]]] = []

    def record(self, monkeypatch: pytest.MonkeyPatch) -> Launches:
        for name in KERNELS:
            module = import_module(f"sglang_elora.kernels.{name}")
            kernel = getattr(module, f"_{name}")
            monkeypatch.setattr(module, f"_{name}", _Recorded(name, kernel, self))
        return self


class _Recorded:
    """A kernel, interpreted or not, whose arguments are bound as Triton binds them for an H100."""

    def __init__(self, name: str, kernel: Any, launches: Launches) -> None:
        is_compiled = isinstance(kernel, JITFunction)
        compiled = kernel if is_compiled else JITFunction(kernel.fn, **kernel.kwargs)
        self._name, self._launches = name, launches
        self._bind = create_function_from_signature(
            compiled.signature, compiled.params, make_backend(TARGET)
        )

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            arguments, specialization, options = self._bind(*args, **kwargs)
            key = compute_cache_key({}, specialization, options)
            self._launches.keys.add((self._name, key))
            self._launches.arguments.append((self._name, arguments))

        return launch


def unaligned(num_bytes: int, offset: int, device: str = "cpu") -> torch.Tensor:
    """uint8 ``[num_bytes]`` that begins ``offset`` bytes after a multiple of 16."""
    memory = torch.zeros(num_bytes + 16 + offset, dtype=torch.uint8, device=device)
    begin = -memory.data_ptr() % 16 + offset
    return memory[begin : begin + num_bytes]
