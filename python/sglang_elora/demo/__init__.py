"""Demo without downloads: a small random model, LoRA adapters, a real server.

``python -m sglang_elora.demo`` builds a checkpoint and adapters, starts the server, drives
concurrent multi-turn chats over them and reports what the caches did.
"""
