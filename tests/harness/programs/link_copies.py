"""Copies adapters and KV as SGLang does, and fails where one does not take the link's time."""

import os

from sglang_elora.platforms.torchvision_shim import ensure_torchvision_importable

ensure_torchvision_importable()
import torch
from sglang.srt.plugins import load_plugins

load_plugins()
from types import SimpleNamespace

from sglang.srt.lora import mem_pool
from sglang.srt.lora.lora_overlap_loader import LoRAOverlapLoader
from sglang.srt.mem_cache.l2_transfer import L2Transfer, L2TransferEngine
from sglang.srt.mem_cache.pool_host.base import HostKVCache

link = torch.cpu.current_stream().link
waits = []
link._sleep = waits.append

weight = torch.randn(64, 256)
buffer = torch.empty_like(weight)
if os.environ["SGLANG_ELORA"] == "1":  # adapters go into pages; SGLang's copy fills a host buffer
    from sglang_elora.srt.mem_cache.link import delay_page_copy

    mem_pool.copy_weight_into_buffer(buffer, weight)
    assert link.num_copies == 0

    def copy_adapter(buffer, weight):
        delay_page_copy(weight.nbytes)
        buffer.copy_(weight)
else:
    copy_adapter = mem_pool.copy_weight_into_buffer

copy_adapter(buffer, weight)
assert torch.equal(buffer, weight)
assert (link.num_copies, link.num_bytes) == (1, weight.nbytes)
assert len(waits) == 1 and 0 < waits[0] <= 1e-3 + weight.nbytes / 1e6, waits

loader = LoRAOverlapLoader(SimpleNamespace(device=torch.device("cpu"), pending_lora_load_events={}))
with loader.load_stream_context:
    copy_adapter(buffer, weight)
    event = torch.cpu.Event()
    event.record(loader.load_stream)
assert len(waits) == 1, "a copy on the loader's stream blocked"
assert not event.query()


class Host(HostKVCache):
    layer_num, size_per_token = 2, 2 * 128

    def __init__(self):
        pass

    def load_to_device_per_layer(self, pool, host, device, layer, backend, *, is_draft=False):
        pool.append(layer)

    def backup_from_device_all_layer(self, pool, host, device, backend):
        pool.append("host")

    def unused(self, *args, **kwargs):
        raise AssertionError


Host.__abstractmethods__ = frozenset()

layers, done = [], []
tokens = torch.arange(10)
engine = L2TransferEngine("direct")
before = link.num_bytes
completion = engine.submit_host_to_device(
    [L2Transfer(Host(), layers, tokens, tokens)],
    transfer_layer_id_max=2,
    on_layer_done=done.append,
)
assert layers == done == [0, 1]
assert link.num_bytes - before == 10 * 2 * 128
assert len(waits) == 1, "a copy of KV on the transfer stream blocked"
assert not completion.finish_event.query()
completion.finish_event.synchronize()
assert len(waits) == 2

before = link.num_bytes
assert link.to_host_bytes_per_s == 1e6
completion = engine.submit_device_to_host([L2Transfer(Host(), layers, tokens, tokens)])
assert layers[-1] == "host"
assert link.num_bytes - before == 10 * 2 * 128
assert len(waits) == 2, "a copy of KV to the host blocked"
assert not completion.finish_event.query()
print("emulated")
