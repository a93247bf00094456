"""Diffs of the pinned SGLang, applied in memory by ``sglang_elora.host.patching``.

README.md is their ledger.
"""
