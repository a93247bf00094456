"""Adapters and KV on their way between file, host memory and device. Nothing here imports sglang.

``planner.py`` decides, without torch; the rest holds images in host memory, reads files and names
what a copy waits for. Nothing is imported here, so that the simulator needs no torch.
"""
