"""Loads our plugins where the CPU platform declines, and fails where torch is changed."""

import torch

before = {name: getattr(torch, name) for name in dir(torch)}
pin_memory, stream, event = torch.Tensor.pin_memory, torch.cpu.Stream, torch.cpu.Event
import sglang_elora.plugin

sglang_elora.plugin.load()
assert sglang_elora.plugin.activate_cpu_platform() is None
assert all(getattr(torch, name) is value for name, value in before.items())
assert (torch.Tensor.pin_memory, torch.cpu.Stream, torch.cpu.Event) == (pin_memory, stream, event)
print("untouched")
