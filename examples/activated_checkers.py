"""A draft and five checkers: activated LoRAs, which share all KV before their invocation.

Run it by ``python examples/activated_checkers.py``. Its adapters are copies of the demo's that act
from ``INVOCATION`` on. With ``--url``, ``--adapters`` names such adapters of that server.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests
import sglang as sgl
from demo_server import FOLDER, demo_server, parser

import sglang_elora.lang as elora
from sglang_elora.testbed.adapters import copy_activated

QUESTION = "Where does the train to the harbour leave, and who wrote the last letter? " * 8
INVOCATION = "<|system|>Check:"  # begins with a special token, which merges with no text before it


@elora.traced
@sgl.function
def checked(s: Any, question: str, checkers: Sequence[str]) -> None:
    s += question
    s += sgl.gen("draft", max_tokens=32)  # by the base model
    branches = s.fork(len(checkers), lora_path=list(checkers))
    branches += INVOCATION + sgl.gen("verdict", max_tokens=8)
    branches.join()
    s.set_var("meta", [branch.get_meta_info("verdict") for branch in branches])


def load_checkers(url: str, names: Sequence[str]) -> list[str]:
    """Load copies of the demo's adapters that act from ``INVOCATION`` on."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "checkpoint")
    tokens = tokenizer.encode(INVOCATION, add_special_tokens=False)
    loaded = []
    for name in names:
        copy = copy_activated(FOLDER / "adapters" / name, FOLDER / "activated" / name, tokens)
        body = {"lora_name": f"check-{name}", "lora_path": str(Path(copy).resolve())}
        requests.post(f"{url}/load_lora_adapter", json=body, timeout=60).raise_for_status()
        loaded.append(f"check-{name}")
    return loaded


def main() -> None:
    options = parser(__doc__).parse_args()
    with demo_server(options) as (url, names):
        checkers = names[:5] if options.url else load_checkers(url, names[:5])
        backend = sgl.RuntimeEndpoint(url)
        state = checked.run(QUESTION, checkers, backend=backend, temperature=0, ignore_eos=True)
        print(f"\ndraft: {state['draft']!r}")
        for checker, verdict, meta in zip(checkers, state["verdict"], state["meta"], strict=True):
            found = f"{meta['cached_tokens']} of {meta['prompt_tokens']} prompt tokens found"
            print(f"  {checker}: {verdict!r} ({found})")


if __name__ == "__main__":
    main()
