"""A plugin for stock's server that notes in LOAD_TIMES how long each load of an adapter takes."""

from __future__ import annotations

import json
import os
import time


def load():
    import torch
    from sglang.srt.lora.mem_pool import LoRAMemoryPool

    original = LoRAMemoryPool.load_lora_weight_to_buffer

    def wait():
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def timed(self, adapter_id, buffer_id, lora_adapter, *rest, **named):
        wait()
        begun = time.perf_counter()
        original(self, adapter_id, buffer_id, lora_adapter, *rest, **named)
        wait()
        if lora_adapter is not None:
            row = {"rank": lora_adapter.config.r, "seconds": time.perf_counter() - begun}
            with open(os.environ["LOAD_TIMES"], "a") as file:
                file.write(json.dumps(row) + "\n")

    LoRAMemoryPool.load_lora_weight_to_buffer = timed
