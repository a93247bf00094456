"""A router agent: one adapter chooses who answers, another answers, a third sums it up.

Run it by ``python examples/router_agent.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sglang as sgl
from demo_server import demo_server, parser

import sglang_elora.lang as elora


@sgl.function
def agent(s: Any, question: str, router: str, experts: Sequence[str], writer: str) -> None:
    # Whoever is chosen, the writer comes after: only the program can know that.
    elora.hint(s, writer)
    s += f"Question: {question}\nBest answered by:"
    s += sgl.select("expert", [f" {name}" for name in experts], lora_path=router)
    expert = s["expert"].strip()  # the program waits for the router here
    s += f"\nAnswer of {expert}:"
    s += sgl.gen("answer", max_tokens=48, lora_path=expert)
    s += "\nIn short:"
    s += sgl.gen("summary", max_tokens=24, lora_path=writer)


def main() -> None:
    with demo_server(parser(__doc__).parse_args()) as (url, names):
        router, writer, *experts = names[:5]
        backend = sgl.RuntimeEndpoint(url)
        for question in ("Where does the train to the harbour leave?", "How do I cook soup?"):
            state = agent.run(
                question, router, experts, writer, backend=backend, temperature=0, ignore_eos=True
            )
            print(f"\n{question}")
            print(f"  {router} chose {state['expert'].strip()} of {', '.join(experts)}")
            print(f"  answer:  {state['answer']!r}")
            print(f"  {writer}: {state['summary']!r}")


if __name__ == "__main__":
    main()
