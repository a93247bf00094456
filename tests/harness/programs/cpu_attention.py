"""Prints, for each case, how far the CPU platform's attention lies from a softmax over the tokens
that are seen, and the largest output."""

import json
import sys

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable

ensure_torchvision_importable()
import torch

from sglang_elora.platforms.attention import CpuAttention


def deviation(requests, heads, kv_heads, window, has_own_pool, is_decode, has_sinks, dtype):
    if is_decode:
        requests = [(cached + new - 1, 1) for cached, new in requests]
    torch.manual_seed(0)
    cached, new = (torch.tensor(column) for column in zip(*requests, strict=True))
    total, num_slots = cached + new, len(requests) * 64
    slots = (1 + torch.randperm(num_slots)).to(torch.int32).view(len(requests), -1)
    k, v = (torch.randn(1 + num_slots, kv_heads, 8) for _ in range(2))
    k[0] = v[0] = torch.nan  # the padding slot, for tokens without one
    query = torch.randn(int(new.sum()), heads, 8)
    attention = object.__new__(CpuAttention)
    if has_sinks:
        attention._sinks = torch.randn(heads)
    slots_of_layer = torch.cat((torch.zeros(1), 1 + torch.randperm(num_slots))).long()
    if has_own_pool:
        attention._slots_of_layer = slots_of_layer
        for row, num_cached in enumerate(cached.tolist()):
            out_of_window = slots[row, : max(0, num_cached - window)].long()
            slots_of_layer[out_of_window] = 0
    expected, place = torch.zeros_like(query), 0
    for row, (num_cached, num_new) in enumerate(requests):
        for position in range(num_cached, num_cached + num_new):
            first = 0 if window is None else max(0, position - window)
            seen = slots[row, first : position + 1].long()
            seen = slots_of_layer[seen] if has_own_pool else seen
            for head in range(heads):
                own = head // (heads // kv_heads)
                logits = 0.3 * k[seen, own] @ query[place, head]
                if has_sinks:
                    logits = torch.cat((logits, attention._sinks[head, None]))
                expected[place, head] = logits.softmax(0)[: len(seen)] @ v[seen, own]
            place += 1
    query = query.to(getattr(torch, dtype))
    output = torch.zeros_like(query)
    options = {"scaling": 0.3, "enable_gqa": heads != kv_heads, "sliding_window_size": window}
    batch = (query, output, k, v, slots, torch.arange(len(requests)), total)
    if is_decode:
        attention._run_sdpa_forward_decode(*batch, None, causal=False, **options)
    else:
        attention._run_sdpa_forward_extend(*batch, cached, new, None, causal=True, **options)
    return (output - expected).abs().max().item(), expected.abs().max().item()


print(json.dumps([deviation(*case) for case in json.loads(sys.argv[1])]))
