"""LiteLLM: the same question to several adapters, streamed.

It needs ``pip install 'sglang-elora[clients]'``; run it by ``python examples/litellm_calls.py``.
"""

from __future__ import annotations

import litellm
from demo_server import demo_server, parser

QUESTION = "Where does the train to the harbour leave?"


def main() -> None:
    with demo_server(parser(__doc__).parse_args()) as (url, names):
        print(f"\n{QUESTION}")
        for adapter in names[:3]:
            chunks = litellm.completion(
                model=f"openai/demo:{adapter}",  # "openai": any server of that API
                api_base=f"{url}/v1",
                api_key="none",
                messages=[{"role": "user", "content": QUESTION}],
                temperature=0,
                max_tokens=32,
                stream=True,
            )
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            print(f"  {adapter}: {text!r}")


if __name__ == "__main__":
    main()
