"""Prints how far the CPU platform's prefill lies from torch_native's, and the largest output."""

import json
import sys

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable

ensure_torchvision_importable()
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from sglang_elora.platforms.attention import CpuAttention

requests, heads, kv_heads, window = json.loads(sys.argv[1])
torch.manual_seed(0)
cached, new = (torch.tensor(column) for column in zip(*requests, strict=True))
total, context = cached + new, 64
slots = torch.randperm(len(requests) * context).to(torch.int32).view(len(requests), context)
k, v = (torch.randn(slots.numel(), kv_heads, 8) for _ in range(2))
query = torch.randn(int(new.sum()), heads, 8)
found = []
for kind in (TorchNativeAttnBackend, CpuAttention):
    output = torch.zeros_like(query)
    kind._run_sdpa_forward_extend(
        object.__new__(kind),
        query,
        output,
        k,
        v,
        slots,
        torch.arange(len(requests)),
        total,
        cached,
        new,
        None,
        scaling=0.3,
        enable_gqa=heads != kv_heads,
        causal=True,
        is_cross_attn=False,
        sliding_window_size=window,
    )
    found.append(output)
print(json.dumps([(found[0] - found[1]).abs().max().item(), found[0].abs().max().item()]))
