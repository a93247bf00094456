"""Kernels for LoRA weights that live in KV pages. Installed as ``sglang_elora.kernels``."""
