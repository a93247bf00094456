"""Parallel judges: three adapters look at one draft at the same time, a fourth decides.

Run it by ``python examples/parallel_judges.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sglang as sgl
from demo_server import demo_server, parser

import sglang_elora.lang as elora

DRAFT = "The train to the harbour leaves at noon, and the last letter was written in the evening."


@elora.traced  # the chair's adapter is on its way while the judges think
@sgl.function
def panel(s: Any, draft: str, judges: Sequence[str], chair: str) -> None:
    s += f"Draft: {draft}\n"
    branches = s.fork(len(judges), lora_path=list(judges))
    branches += "Verdict: " + sgl.gen("verdict", max_tokens=32)
    branches.join()
    for judge, verdict in zip(judges, s["verdict"], strict=True):
        s += f"{judge} says: "
        s += verdict
        s += "\n"
    s += "Accepted?"
    s += sgl.select("decision", [" yes", " no"], lora_path=chair)


def main() -> None:
    with demo_server(parser(__doc__).parse_args()) as (url, names):
        *judges, chair = names[:4]
        backend = sgl.RuntimeEndpoint(url)
        state = panel.run(DRAFT, judges, chair, backend=backend, temperature=0, ignore_eos=True)
        print(f"\n{DRAFT}")
        for judge, verdict in zip(judges, state["verdict"], strict=True):
            print(f"  {judge}: {verdict!r}")
        print(f"  {chair} decides:{state['decision']}")


if __name__ == "__main__":
    main()
