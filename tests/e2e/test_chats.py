"""Chats of many turns: outputs are correct, and each turn hits the KV of earlier turns."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from tests.harness.client import MODEL, Client
from tests.harness.reference import Reference

LINES = (
    "Where does the train to the harbour leave?",
    "And how long does it take?",
    "Write a letter to the captain about it.",
    "Now make it shorter.",
    "Thank you, and goodbye.",
)


async def test_chat_turn_hits_the_kv_of_earlier_turns(client: Client, reference: Reference) -> None:
    """Hits extend as far as the tokenizer encodes an answer to the tokens the model generated."""
    adapter = "rslora-r8"
    messages: list[dict[str, str]] = []
    before: list[int] = []
    for line in LINES:
        messages.append({"role": "user", "content": line})
        ids = reference.chat_prompt(messages)
        answer = await client.chat(f"{MODEL}:{adapter}", messages, session_id="five-turns")
        assert answer.text == reference.text(adapter, ids)
        same = takewhile(lambda pair: pair[0] == pair[1], zip(before, ids, strict=False))
        assert answer.cached_tokens >= sum(1 for _ in same) - 1
        messages.append({"role": "assistant", "content": answer.text})
        before = [*ids, *reference.generate(adapter, ids)[:-1]]  # the last was not computed
    await client.post("/close_session", {"session_id": "five-turns"})


async def test_chat_that_switches_adapter_computes_its_kv_once(
    client: Client, reference: Reference, prompts: Sequence[list[int]]
) -> None:
    first, second = "attention-r8", "mlp-r24"
    history = [*reversed(prompts[1]), *prompts[0]]  # no other test uses it
    known = {first: 0, second: 0}  # tokens of the history for which it has KV
    for adapter in (first, first, second, first, second, second):
        answer = await client.generate(adapter, history, session_id="changing")
        assert list(answer.token_ids) == reference.generate(adapter, history)
        # KV of an answer's last token may be cached or not.
        assert answer.cached_tokens in {known[adapter], known[adapter] + bool(known[adapter])}
        history = [*history, *answer.token_ids]
        known[adapter] = len(history) - 1
        history += prompts[2]
    await client.post("/close_session", {"session_id": "changing"})
