"""A chat of several turns with the OpenAI client: one adapter, one session, its KV kept.

Run it by ``python examples/chat.py``; with ``--talk`` the words are yours.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import httpx
from demo_server import demo_server, parser
from openai import OpenAI

LINES = (
    "Where does the train to the harbour leave?",
    "And how long does it take?",
    "Write a letter to the captain about it.",
    "Now make it shorter.",
)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument(
        "--talk", action="store_true", help="ask for lines; an empty one ends it"
    )
    options = arguments.parse_args()
    with demo_server(options) as (url, names):
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        model = f"{client.models.list().data[0].id}:{names[0]}"
        session = {"session_id": uuid.uuid4().hex}  # the cache knows that there is more to come
        messages: list[Any] = []
        for line in spoken() if options.talk else LINES:
            messages.append({"role": "user", "content": line})
            answer = client.chat.completions.create(
                model=model, messages=messages, temperature=0, max_tokens=48, extra_body=session
            )
            said, usage = answer.choices[0].message.content, answer.usage
            messages.append({"role": "assistant", "content": said})
            details = usage.prompt_tokens_details
            cached = details.cached_tokens if details else 0
            print(f"\n> {line}\n{names[0]}: {said!r}")
            print(f"  {cached} of {usage.prompt_tokens} prompt tokens came from the cache")
        httpx.post(f"{url}/close_session", json=session, trust_env=False).raise_for_status()


def spoken() -> Iterator[str]:
    while line := input("> "):
        yield line


if __name__ == "__main__":
    main()
