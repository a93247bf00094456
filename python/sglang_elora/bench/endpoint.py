"""A running server that the benchmark did not start: its model, adapters and API."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import httpx

from sglang_elora.bench.apis import ChatCompletions, Completions, Conversation, Native
from sglang_elora.bench.driver import Manner, play_closed
from sglang_elora.workloads import FIRST_TOKEN, Session, Trace, Turn

Api = Literal["native", "openai", "openai-completions"]
"""Names of the APIs; ``openai`` is ``/v1/chat/completions``."""

APIS: tuple[Api, ...] = get_args(Api)
_TIMEOUT_S = 30.0


class EndpointError(ValueError):
    """The server cannot be measured with these options; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """URL, API, model and adapters for the requests."""

    url: str
    api: Api
    model: str
    adapters: tuple[str, ...]  # empty: all requests use the base model
    is_sglang: bool

    def open(self, session: Session) -> Conversation:
        if self.api == "native":
            return Native(session)
        model = self.model_name(session.adapter)
        return (Completions if self.api == "openai-completions" else ChatCompletions)(
            session, model
        )

    def model_name(self, adapter: str) -> str:
        """The ``model`` field of a request: ``model:adapter`` for SGLang, otherwise the adapter."""
        if not adapter:
            return self.model
        return f"{self.model}:{adapter}" if self.is_sglang else adapter

    def assigned(self, trace: Trace) -> Trace:
        """The trace with this server's adapters, assigned cyclically if there are fewer."""
        names = {name: i for i, name in enumerate(sorted({s.adapter for s in trace.sessions}))}

        def adapter(name: str) -> str:
            return self.adapters[names[name] % len(self.adapters)] if self.adapters else ""

        sessions = (replace(s, adapter=adapter(s.adapter)) for s in trace.sessions)
        return replace(trace, sessions=tuple(sessions))

    def try_out(self) -> None:
        """Send a short request for each adapter, which also loads it.

        Raises:
            EndpointError: A request was not answered.
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
    """The endpoint of a running server, from its ``GET /v1/models``.

    Args:
        model: By default the server's only base model.
        adapters: By default all models with a parent.

    Raises:
        EndpointError: There is no server, or it lacks the API, the model or an adapter.
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
