"""Flags common to the servers of these tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.harness.client import MODEL

HOST_TIER = (
    *("--enable-hierarchical-cache", "--hicache-size", "1", "--hicache-io-backend", "direct"),
    *("--hicache-mem-layout", "layer_first", "--hicache-write-policy"),
)
"""A host tier of 1 GB for KV; the policy follows."""


def server_flags(checkpoint: Path, adapters: Mapping[str, Path] | None = None) -> list[str]:
    """The demo model in float32, LoRA on, and the given adapters, all in one batch."""
    flags = [
        *("--model-path", str(checkpoint), "--served-model-name", MODEL, "--dtype", "float32"),
        *("--max-total-tokens", "12000", "--max-running-requests", "32"),
        *("--enable-lora", "--enable-cache-report", "--decode-log-interval", "1"),
    ]
    if adapters is not None:
        flags += ["--max-loras-per-batch", "16", "--lora-paths"]
        flags += [f"{name}={path}" for name, path in adapters.items()]
    return flags
