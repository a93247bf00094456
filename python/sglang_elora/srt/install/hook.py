"""The definition of a hook: its target, its body, when it is selected, and why it is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sglang_elora.config import EloraConfig


class When(Enum):
    """The part of the configuration that selects a hook or a patch."""

    ELORA = "--elora"
    CHECK = "--elora-check"
    LINK = "--elora-link-gbytes-per-s"
    STREAMS = "--elora-check-streams"
    COPY_STREAMS = "--elora-link-gbytes-per-s or --elora-check-streams"
    STOCK_LINK = "--elora-link-gbytes-per-s without --elora"
    LANG = "sglang_elora.lang"

    def selected_by(self, config: EloraConfig) -> bool:
        return {
            When.ELORA: config.enabled,
            When.CHECK: config.check,
            When.LINK: config.emulates_link,
            When.STREAMS: bool(config.check_streams),
            When.COPY_STREAMS: config.emulates_link or bool(config.check_streams),
            When.STOCK_LINK: config.emulates_link and not config.enabled,
            When.LANG: False,  # selected by the import, not by the configuration
        }[self]


@dataclass(frozen=True, slots=True)
class Hook:
    """One hook on a function of SGLang."""

    target: str  # dotted path in sglang
    parameters: tuple[str, ...]  # the target's leading parameters in the pinned version
    kind: HookType
    body: Callable[..., Any]
    when: When
    why_not_registry: str
