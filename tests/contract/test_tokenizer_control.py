"""The tokenizer process's end of the control channel, without a scheduler."""

from __future__ import annotations

import asyncio
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

with warnings.catch_warnings():  # SGLang's
    warnings.simplefilter("ignore")
    from sglang.srt.lora.lora_registry import LoRARef

    from sglang_elora.srt.tokenizer import tokenizer_control
    from sglang_elora.srt.tokenizer.tokenizer_control import COLLECT_S, TokenizerControl

NAMES = [f"adapter-{i}" for i in range(20)]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    memory = SimpleNamespace(enable_hierarchical_cache=True)
    monkeypatch.setattr(tokenizer_control, "get_memory", lambda: memory)
    return []


def control_over(sent: list[Any]) -> TokenizerControl:
    refs = {name: LoRARef(lora_id=name, lora_name=name) for name in NAMES}
    registry = SimpleNamespace(_registry=refs)
    others = SimpleNamespace(handle=lambda *_: None)
    manager: Any = SimpleNamespace(
        lora_registry=registry, elora_workers=others, _dispatch_to_scheduler=sent.append
    )
    return TokenizerControl(manager)


def test_first_hint_of_a_burst_is_sent_at_once_and_the_rest_batched(sent: list[Any]) -> None:
    async def work() -> None:
        control = control_over(sent)
        for name in NAMES:
            control.announce(name, f"session-{name}")
        control.announce("nobody")
        assert [hint.adapters for hint in sent] == [NAMES[:1]]
        await asyncio.sleep(10 * COLLECT_S)
        assert [hint.adapters for hint in sent] == [NAMES[:1], NAMES[1:]]
        assert sum(len(hint.sessions) for hint in sent) == len(NAMES)
        assert control.num_hints == len(NAMES)

    asyncio.run(work())


def test_hint_after_a_pause_is_sent_at_once(sent: list[Any]) -> None:
    async def work() -> None:
        control = control_over(sent)
        for i, name in enumerate(NAMES[:3], start=1):
            control.announce([name])
            assert len(sent) == i
            await asyncio.sleep(10 * COLLECT_S)
        assert len(sent) == 3

    asyncio.run(work())
