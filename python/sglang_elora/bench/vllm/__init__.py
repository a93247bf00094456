"""vLLM on a CPU as a side of the benchmark, from an environment of its own."""

from __future__ import annotations
