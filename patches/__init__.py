"""Diffs of the pinned SGLang, applied in memory by ``sglang_elora.srt.install.patching``.

README.md is their ledger.
"""
