"""A chat of several turns with the OpenAI client: one adapter, one session, its KV kept.

Run it by ``python examples/chat.py``; with ``--talk`` the words are yours.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator

from demo_server import demo_server, parser
from openai import OpenAI

LINES = (
    "Where does the train to the harbour leave?",
    "And how long does it take?",
    "Write a letter to the captain about it.",
    "Now make it shorter.",
)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--talk", action="store_true", help="ask for lines; an empty one ends it")
    with demo_server(options) as (url, names):
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        model = f"{client.models.list().data[0].id}:{names[0]}"
        session = {"session_id": uuid.uuid4().hex}  # the cache knows that it will be continued
        messages = []
        for line in spoken() if options.parse_args().talk else LINES:
            messages.append({"role": "user", "content": line})
            answer = client.chat.completions.create(
                model=model, messages=messages, temperature=0, max_tokens=48, extra_body=session
            )
            said = answer.choices[0].message.content
            messages.append({"role": "assistant", "content": said})
            usage = answer.usage
            print(f"\n> {line}\n{said}")
            print(
                f"  ({usage.prompt_tokens_details.cached_tokens} of {usage.prompt_tokens} cached)"
            )
        client.post("/../close_session", body=session, cast_to=object)  # it will not


def spoken() -> Iterator[str]:
    while line := input("> "):
        yield line


if __name__ == "__main__":
    main()
