"""A server that somebody else runs: is it there, does it know these adapters, how is it asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import httpx

from sglang_elora.bench.apis import ChatCompletions, Completions, Conversation, Native
from sglang_elora.bench.driver import Manner, play_closed
from sglang_elora.workloads import FIRST_TOKEN, Session, Trace, Turn

Api = Literal["native", "openai", "openai-completions"]
"""``openai`` is ``/v1/chat/completions``."""

APIS: tuple[Api, ...] = get_args(Api)
_TIMEOUT_S = 30.0


class EndpointError(ValueError):
    """The server cannot be measured like this; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """How requests reach a model and its adapters."""

    url: str
    api: Api
    model: str
    adapters: tuple[str, ...]  # empty: only the base model is asked
    is_sglang: bool

    def open(self, session: Session) -> Conversation:
        if self.api == "native":
            return Native(session)
        model = self.model_name(session.adapter)
        return (Completions if self.api == "openai-completions" else ChatCompletions)(
            session, model
        )

    def model_name(self, adapter: str) -> str:
        """SGLang reads ``model:adapter``; elsewhere an adapter is a model of its own name."""
        if not adapter:
            return self.model
        return f"{self.model}:{adapter}" if self.is_sglang else adapter

    def assigned(self, trace: Trace) -> Trace:
        """The trace with this server's adapters, in turns where it has fewer."""
        names = {name: i for i, name in enumerate(sorted({s.adapter for s in trace.sessions}))}

        def adapter(name: str) -> str:
            return self.adapters[names[name] % len(self.adapters)] if self.adapters else ""

        sessions = (replace(s, adapter=adapter(s.adapter)) for s in trace.sessions)
        return replace(trace, sessions=tuple(sessions))

    def try_out(self) -> None:
        """A short request to each adapter, which also warms it up.

        Raises:
            EndpointError: One was not answered.
        """
        turn = Turn((FIRST_TOKEN,) * 8, 4, 0.0)
        names = self.adapters or ("",)
        sessions = [Session(i, name, 0.0, (), (turn,)) for i, name in enumerate(names)]
        for record in play_closed(self.url, sessions, 1, Manner(self.open)).records:
            if record.error is not None:
                name = record.adapter or "the base model"
                raise EndpointError(
                    f"{self.url} did not answer a request for {name} over the {self.api} API: "
                    f"{record.error}"
                )


def find(url: str, api: Api, model: str | None, adapters: Sequence[str] | None) -> Endpoint:
    """What ``GET /v1/models`` of a running server says.

    Args:
        model: Its only base model by default.
        adapters: All that it names as children of the model by default.

    Raises:
        EndpointError: No server, no such API, model or adapter.
    """
    cards = _models(url)
    served = {card["id"]: card for card in cards}
    bases = [name for name, card in served.items() if not card.get("parent")]
    if model is None:
        if len(bases) != 1:
            raise EndpointError(f"{url} serves {', '.join(bases)}: name one with --model")
        model = bases[0]
    if model not in served:
        raise EndpointError(f"{url} does not serve model {model!r}, but {', '.join(bases)}")
    known = [name for name, card in served.items() if card.get("parent")]
    unknown = sorted({*(adapters or ())} - {*known})
    if unknown:
        raise EndpointError(
            f"{url} does not serve adapter {', '.join(unknown)}, but {', '.join(known) or 'none'}"
        )
    is_sglang = served[model].get("owned_by") == "sglang"
    if api == "native" and not is_sglang:
        raise EndpointError(f"{url} is not SGLang: ask it with --api openai")
    return Endpoint(url, api, model, tuple(known if adapters is None else adapters), is_sglang)


def _models(url: str) -> list[dict[str, Any]]:
    try:
        answer = httpx.get(f"{url}/v1/models", timeout=_TIMEOUT_S, trust_env=False)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise EndpointError(f"no server at {url}: {error}") from None
    if answer.status_code != httpx.codes.OK:
        raise EndpointError(
            f"{url}/v1/models answers {answer.status_code}: --url is the root of a server with the "
            "OpenAI API, without /v1"
        )
    try:
        cards: list[dict[str, Any]] = answer.json()["data"]
    except (ValueError, KeyError, TypeError):
        raise EndpointError(f"{url}/v1/models is not the OpenAI API's list of models") from None
    return cards
