"""Models, adapters and servers for tests, benchmarks and the demo, without downloads.

Small random checkpoints and LoRA adapters with fixed seeds, a tokenizer, a text corpus, and a real
server in its own process that never outlives its test.

Nothing is imported here, so that ``sglang_elora.testbed.server`` does not load torch.
"""
