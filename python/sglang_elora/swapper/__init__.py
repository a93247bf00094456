"""Movement of adapters and KV between file, host memory and device. Imports no sglang.

``planner.py`` takes the decisions and needs no torch. The other modules hold images in host memory,
read files and track copies. This file imports nothing, so that the simulator needs no torch.
"""
