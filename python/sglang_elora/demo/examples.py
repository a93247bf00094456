"""Example requests to paste into another terminal while the demo's server runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


def example_lines(url: str, model: str, adapters: Mapping[str, Path]) -> list[str]:
    """Shell and Python lines for a running server; ``adapters`` must not be empty."""
    name, path = next(iter(adapters.items()))
    chat = {
        "model": f"{model}:{name}",
        "messages": [{"role": "user", "content": "How are you?"}],
        "max_tokens": 16,
        "temperature": 0,
    }
    generate = {
        "text": "How are you?",
        "lora_path": name,
        "sampling_params": {"max_new_tokens": 16, "temperature": 0},
    }
    load = {"lora_name": f"{name}-again", "lora_path": str(path)}
    return [
        "# which models and adapters there are",
        f"curl {url}/v1/models",
        "",
        "# a chat with an adapter, named in the model",
        _post(f"{url}/v1/chat/completions", chat),
        "",
        "# SGLang's own API",
        _post(f"{url}/generate", generate),
        "",
        "# one more adapter, while the server runs; then take it away",
        _post(f"{url}/load_lora_adapter", load),
        _post(f"{url}/unload_lora_adapter", {"lora_name": f"{name}-again"}),
        "",
        "# the same chat from Python",
        "from openai import OpenAI",
        f'client = OpenAI(base_url="{url}/v1", api_key="none")',
        f'client.chat.completions.create(model="{model}:{name}", max_tokens=16, temperature=0,',
        '    messages=[{"role": "user", "content": "How are you?"}]).choices[0].message.content',
    ]


def _post(url: str, body: Mapping[str, object]) -> str:
    return f"curl {url} -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
