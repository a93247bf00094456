"""Everything a test or a demonstration needs in place of downloads.

Small random checkpoints and LoRA adapters with fixed seeds, a tokenizer, a text corpus, and a real
server in a process of its own that never outlives its test. The demo, the benchmarks and the tests
all use it.

Nothing is imported here, so that ``sglang_elora.testbed.server`` does not load torch.
"""
