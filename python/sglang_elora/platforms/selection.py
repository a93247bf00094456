"""Decides whether the CPU platform is selected. Imports torch, not sglang."""

from __future__ import annotations

import os


def require_cpu_platform(flag: str) -> None:
    """Raise ValueError if ``flag``, which needs the CPU platform, cannot be used here."""
    declined = cpu_platform_declined()
    if declined is not None:
        raise ValueError(f"{flag} is for the CPU platform only: {declined}")


def cpu_platform_declined() -> str | None:
    """Why the CPU platform must not be used here, or None if it may."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return "SGLANG_USE_CPU_ENGINE=1 asks for SGLang's own CPU engine"

    import torch

    for name, available in (
        ("CUDA or ROCm", torch.cuda.is_available()),
        ("XPU", torch.xpu.is_available()),
        ("NPU", hasattr(torch, "npu") and torch.npu.is_available()),
        ("MUSA", hasattr(torch, "musa") and torch.musa.is_available()),
        ("MPS", torch.backends.mps.is_available()),
    ):
        if available:
            return f"an accelerator is present ({name})"
    return None
