"""Prefill of the CPU platform gives what SGLang's torch_native gives."""

from __future__ import annotations

import json

import pytest

from tests.harness.run_python import RunPython

CODE = """
import json, sys
from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable
ensure_torchvision_importable()
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang_elora.platforms.attention import CpuAttention
requests, heads, kv_heads, window = json.loads(sys.argv[1])
torch.manual_seed(0)
cached, new = (torch.tensor(column) for column in zip(*requests))
total, context = cached + new, 64
slots = torch.randperm(len(requests) * context).to(torch.int32).view(len(requests), context)
k, v = (torch.randn(slots.numel(), kv_heads, 8) for _ in range(2))
query = torch.randn(int(new.sum()), heads, 8)
found = []
for kind in (TorchNativeAttnBackend, CpuAttention):
    output = torch.zeros_like(query)
    kind._run_sdpa_forward_extend(
        object.__new__(kind), query, output, k, v, slots, torch.arange(len(requests)), total,
        cached, new, None, scaling=0.3, enable_gqa=heads != kv_heads, causal=True,
        is_cross_attn=False, sliding_window_size=window)
    found.append(output)
print(json.dumps([(found[0] - found[1]).abs().max().item(), found[0].abs().max().item()]))
"""


@pytest.mark.parametrize(
    ("requests", "heads", "kv_heads", "window"),
    [
        ([(0, 7)], 4, 4, None),
        ([(40, 1), (0, 9), (17, 5)], 4, 2, None),
        ([(3, 30), (50, 14)], 8, 1, None),
        ([(3, 30), (50, 14)], 4, 2, 6),
    ],
)
def test_prefill_behind_a_cached_prefix(
    run_python: RunPython,
    requests: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    window: int | None,
) -> None:
    arguments = json.dumps([requests, heads, kv_heads, window])
    result = run_python("-c", CODE, arguments)
    assert result.returncode == 0, result.stderr
    difference, largest = json.loads(result.stdout)
    assert largest > 0.5
    assert difference < 1e-5
