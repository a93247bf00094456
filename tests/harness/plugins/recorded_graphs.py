"""CUDA graphs on a CPU: what a forward pass launches is recorded and replayed, in the same memory.

SGLang's own graph runners run over ``torch.cpu`` as they do over ``torch.cuda``. A launch is an
operator of torch, a Triton kernel under the interpreter, or attention as a whole. A replay runs the
launches again with the tensors that they were recorded with, and no Python of the model: what a
graph has not read from static memory stays as it was at capture. As on CUDA, an operation that
needs a value on the host ends the capture.

A plugin calls ``load()`` in each of the server's processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

_NEEDS_THE_HOST = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
_LAUNCHES_NOTHING = ("aten::empty", "aten::new_empty", "aten::detach", "aten::lift_fresh")


class RecordedGraph:
    """In the place of ``torch.cuda.CUDAGraph``."""

    def __init__(self) -> None:
        self.launches: list[Callable[[], Any]] = []
        self.num_replays = 0

    def replay(self) -> None:
        self.num_replays += 1
        for launch in self.launches:
            launch()

    def reset(self) -> None:
        self.launches.clear()


class _Recorder(TorchDispatchMode):
    """Runs operators and notes them."""

    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()
        self.graph = graph
        self.is_paused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if not self.is_paused and name.startswith(_NEEDS_THE_HOST):
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        output = func(*args, **kwargs)
        if self.is_paused or name.startswith(_LAUNCHES_NOTHING):
            return output
        made = _tensors(output)
        if func._schema.is_mutable:
            self.graph.launches.append(lambda: func(*args, **kwargs))
        elif not _is_view(made, (args, kwargs)):

            def again() -> None:
                for old, new in zip(made, _tensors(func(*args, **kwargs)), strict=True):
                    old.copy_(new)

            self.graph.launches.append(again)
        return output


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_flatten(values)[0] if isinstance(value, torch.Tensor)]


def _is_view(made: list[torch.Tensor], given: Any) -> bool:
    """Whether what an operator returned is memory that it was given."""
    inputs = {tensor.untyped_storage()._cdata for tensor in _tensors(given)}
    return bool(made) and all(t.untyped_storage()._cdata in inputs for t in made)


_recorder: _Recorder | None = None


@contextlib.contextmanager
def _capture(cuda_graph: RecordedGraph, **_: Any) -> Iterator[None]:
    """In the place of ``torch.cuda.graph``."""
    global _recorder
    assert _recorder is None, "a capture in a capture"
    with _Recorder(cuda_graph) as _recorder:
        try:
            yield
        finally:
            _recorder = None


def _as_one_launch(function: Callable[..., Any]) -> Callable[..., Any]:
    """What ``function`` does is one launch of a graph: its Python runs at each replay."""

    def launch(*args: Any, **options: Any) -> Any:
        recorder = _recorder
        if recorder is None or recorder.is_paused:
            return function(*args, **options)
        recorder.is_paused = True
        try:
            output = function(*args, **options)
        finally:
            recorder.is_paused = False
        recorder.graph.launches.append(lambda: function(*args, **options))
        return output

    return launch


def load() -> None:
    """Let the CPU platform capture decode graphs and full prefill graphs."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from triton.runtime.interpreter import GridExecutor

    cpu: Any = torch.cpu
    cpu.graph, cpu.graph_pool_handle = _capture, lambda: (0, 1)
    cpu.is_current_stream_capturing = lambda: _recorder is not None
    torch.cuda.CUDAGraph = RecordedGraph  # type: ignore[assignment,misc]
    GridExecutor.__call__ = _as_one_launch(GridExecutor.__call__)
    setup = "sglang.srt.model_executor.model_runner_components.cuda_graph_setup"
    HookRegistry.register(f"{setup}.capture_decode_graph", _capture_decode, HookType.AROUND)
    HookRegistry.register(f"{setup}.capture_cuda_graphs", _prepare_attention, HookType.BEFORE)


def _prepare_attention(*_: Any, **__: Any) -> None:
    from msgspec.structs import replace
    from sglang.srt.platforms import current_platform

    from sglang_elora.platforms.attention import CpuAttention

    current_platform.capabilities = replace(current_platform.capabilities, graph_capture=True)
    for name in ("_run_sdpa_forward_decode", "_run_sdpa_forward_extend"):
        setattr(CpuAttention, name, _as_one_launch(getattr(CpuAttention, name)))
    CpuAttention.init_cuda_graph_state = lambda self, *sizes: None
    CpuAttention.get_cuda_graph_seq_len_fill_value = lambda self: 1


def _capture_decode(original: Callable[..., Any], *, model_runner: Any) -> Any:
    """SGLang captures for a CPU only what torch compiles: here as if it were to."""
    from sglang.srt.model_executor.model_runner_components import cuda_graph_setup
    from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
    from sglang.srt.platforms import current_platform

    compiles = SimpleNamespace(capture=SimpleNamespace(enable_torch_compile=True))
    current_platform.get_graph_runner_cls = lambda: DecodeCudaGraphRunner
    with patch.object(cuda_graph_setup, "get_flags", lambda: compiles):
        return original(model_runner=model_runner)
