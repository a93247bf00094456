"""Session names from a routing key or ``user``, for requests without a ``session_id``."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_elora import config
from sglang_elora.config import EloraConfig

with warnings.catch_warnings():  # SGLang's
    warnings.simplefilter("ignore")
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
    from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput

    from sglang_elora.srt.tokenizer.request_checks import MAX_CHARS
    from sglang_elora.srt.tokenizer.session_names import name_native_session, name_openai_session

BOTH = "routing-key,user"


def use(monkeypatch: pytest.MonkeyPatch, session_from: str) -> None:
    active = EloraConfig(enabled=True, session_from=session_from)
    monkeypatch.setattr(config, "_active", active)


def chat(**options: Any) -> Any:
    messages = [{"role": "user", "content": "hello"}]
    return ChatCompletionRequest(model="m", messages=messages, **options)


def named(request: Any, routing_key: str | None = None) -> str | None:
    headers = {} if routing_key is None else {"x-smg-routing-key": routing_key}
    name_openai_session(request, SimpleNamespace(headers=headers))
    session: str | None = request.session_id
    return session


def test_sessions_are_not_named_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "")
    assert named(chat(user="u"), "key") is None


@pytest.mark.parametrize(
    ("session_from", "expected"),
    [("routing-key", "key"), ("user", "u"), (BOTH, "key"), ("user, routing-key", "u")],
)
def test_first_given_field_names_the_session(
    monkeypatch: pytest.MonkeyPatch, session_from: str, expected: str
) -> None:
    use(monkeypatch, session_from)
    assert named(chat(user="u"), "key") == expected


def test_session_name_falls_back_to_the_next_field(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, BOTH)
    assert named(chat(user="u")) == "u"
    assert named(chat(user="u"), "k" * (MAX_CHARS + 1)) == "u", "too long for a name"
    assert named(chat(user="")) is None
    request = chat(user="u")
    name_openai_session(request, None)
    assert request.session_id == "u"


def test_session_id_has_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, BOTH)
    assert named(chat(user="u", session_id="s"), "key") == "s"


def test_request_with_several_prompts_or_answers_names_no_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(monkeypatch, BOTH)
    assert named(chat(user="u", n=2)) is None
    assert named(CompletionRequest(model="m", prompt=["a", "b"], user="u")) is None
    assert named(CompletionRequest(model="m", prompt="a", user="u")) == "u"
    assert named(CompletionRequest(model="m", prompt=[1, 2], user="u")) == "u"


def test_routing_key_of_a_native_request_names_its_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def native(**options: Any) -> str | None:
        request = GenerateReqInput(routing_key="key", **options)
        request.normalize_batch_and_arguments()
        name_native_session(request)
        session: str | None = request.session_id
        return session

    use(monkeypatch, BOTH)
    assert native(text="hello") == "key"
    assert native(text="hello", session_id="s") == "s"
    assert native(text=["a", "b"]) is None
    assert native(text="hello", session_params={"id": "open"}) is None
    name_native_session(EmbeddingReqInput(text="hello"))
    use(monkeypatch, "")
    assert native(text="hello") is None
