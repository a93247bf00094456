"""The configuration of ELORA: one frozen object, from flags or environment.

Each field is a flag ``--elora-*`` of ``python -m sglang_elora.launch_server``
and an environment variable ``SGLANG_ELORA_*``. The flags are written to the
environment before the server starts, so that SGLang's child processes read the
same configuration with ``from_env``.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field, fields
from typing import Any

SGLANG_PIN = "0.5.23"
"""The only SGLang version this package runs on. pyproject.toml repeats it; a test compares."""

POLICIES = ("elora", "elora_paper", "gdsf", "lru")
REMOVED = {
    "--elora-policy-off": "the benchmarks leave out terms of the policy elora_paper "
    "(elora:elora_paper+without_recency and others, benchmarks/serving/variants.py)",
}
"""Flags of earlier versions, and what to use instead. Given one, a start ends with this text."""
STREAM_ORDERS = ("latest", "earliest")
ROUTING_KEY, USER = "routing-key", "user"
SESSION_FIELDS = (ROUTING_KEY, USER)
"""Fields of requests that can name a session."""

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"", "0", "false", "no", "off"})


def _option(
    default: Any, flag: str, help_text: str, *, choices: tuple[str, ...] | None = None
) -> Any:
    return field(default=default, metadata={"flag": flag, "help": help_text, "choices": choices})


@dataclass(frozen=True, slots=True)
class EloraConfig:
    """All options of ELORA, validated.

    Raises:
        ValueError: A value is out of range, or an environment variable does
            not parse. The text names the flag and the variable.
    """

    enabled: bool = _option(
        False,
        "--elora",
        "Turn ELORA on. Without it SGLang runs as if this package were not installed.",
    )
    bad_adapter: str = _option(
        "skip",
        "--elora-bad-adapter",
        "What to do at start with an adapter of --lora-paths that cannot be served: 'skip' it "
        "(log the reason, serve the others, answer HTTP 400 to requests that name it) or 'exit'.",
        choices=("skip", "exit"),
    )
    tower_weights: str = _option(
        "refuse",
        "--elora-tower-weights",
        "What to do with an adapter that also has weights for a vision or audio encoder, where "
        "LoRA is not served: 'refuse' it, or 'drop' these weights and serve the rest, with a line "
        "in the log and a count in /elora/state. Answers about images then differ from those "
        "that the adapter was trained for; SGLang drops such weights without a word.",
        choices=("refuse", "drop"),
    )
    adapter_dir: str = _option(
        "",
        "--elora-adapter-dir",
        "Serve the adapters of this folder, one per subfolder and by its name, also those that are "
        "added while the server runs (within 2 s). One that cannot be served is named in the log, "
        "once; links that lead out of the folder are refused.",
    )
    adapter_sources: str = _option(
        "",
        "--elora-adapter-sources",
        "Places to load adapters from, folders and URLs (s3://bucket/adapters, hf://org), "
        "separated by commas. A request that names an adapter which is not loaded loads "
        "the folder of that name from the first place that has it; /load_lora_adapter refuses all "
        "other places.",
    )
    check: bool = _option(
        False,
        "--elora-check",
        "For debugging: after every scheduler step recompute all counts of the cache, the owner of "
        "each page and the dependency rule, and end the server on a difference. Slow.",
    )
    check_streams: str = _option(
        "",
        "--elora-check-streams",
        "For debugging, CPU platform only: run copies and forward passes in another order that "
        "CUDA's streams would allow, poison memory that has not been written yet, and end the "
        "server where no event orders two uses of the same memory. 'latest' delays copies until an "
        "operation waits for them, 'earliest' delays batches, a number is the seed of a random "
        "order.",
    )
    max_adapters_per_batch: int = _option(
        256,
        "--elora-max-adapters-per-batch",
        "Most LoRA adapters in one batch: the size of the tables that kernels read. No memory for "
        "weights is reserved.",
    )
    policy: str = _option(
        "elora",
        "--elora-policy",
        "Which entry, adapter or KV, is evicted first when the pool is full: 'elora' (the one that "
        "saves the fewest seconds per slot, by learned reuse and measured rates), 'elora_paper' "
        "(the paper's cost model), 'gdsf' (Greedy-Dual-Size-Frequency) or 'lru'.",
        choices=POLICIES,
    )
    host_gb: float = _option(
        16.0,
        "--elora-host-gb",
        "Host memory for adapters, in 10^9 bytes per scheduler process; on CUDA it is reserved and "
        "page-locked at the start. Adapters beyond it are read from their files when they are "
        "needed. One that does not fit into it, or any with 0, is read for each use and copied "
        "from ordinary memory, which is slower.",
    )
    session_from: str = _option(
        "",
        "--elora-session-from",
        "Fields that name the session of a request without a session_id, separated by commas, the "
        "first that is set: 'routing-key' (header X-SMG-Routing-Key of SGLang's gateway, or "
        "routing_key in /generate) and 'user' (of OpenAI requests). Only where each value stands "
        "for one conversation at a time: the next request of a session ends its other KV.",
    )
    adapter_events: bool = _option(
        False,
        "--elora-adapter-events",
        "Publish on the stream of --kv-events-config where adapters are, too. Consumers must know "
        "the event AdapterMoved: decoders of SGLang's events refuse unknown ones.",
    )
    link_gbytes_per_s: float = _option(
        0.0,
        "--elora-link-gbytes-per-s",
        "CPU platform only: emulate a host-to-device link of this bandwidth (10^9 bytes per "
        "second) for every copy of adapters and KV, with or without --elora. 0 turns it off.",
    )
    link_latency_us: float = _option(
        0.0,
        "--elora-link-latency-us",
        "CPU platform only: latency of the emulated link per copy, in microseconds.",
    )
    link_to_host_gbytes_per_s: float = _option(
        0.0,
        "--elora-link-to-host-gbytes-per-s",
        "CPU platform only: bandwidth of the emulated link's other direction, for copies of KV to "
        "the host, with or without --elora. 0: such a copy takes what it takes on the CPU.",
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            value, choices = getattr(self, item.name), item.metadata["choices"]
            if choices is not None and value not in choices:
                raise ValueError(f"{_names(item)} must be one of {choices}, got {value!r}")
            if isinstance(value, float) and not 0 <= value < float("inf"):
                raise ValueError(f"{_names(item)} must be finite and not negative, got {value}")
        if not 1 <= self.max_adapters_per_batch <= 32767:
            raise ValueError(
                "--elora-max-adapters-per-batch (SGLANG_ELORA_MAX_ADAPTERS_PER_BATCH) must be 1 to "
                f"32767, got {self.max_adapters_per_batch}"
            )
        if self.adapter_dir and not self.enabled:
            raise ValueError("--elora-adapter-dir (SGLANG_ELORA_ADAPTER_DIR) needs --elora")
        if self.adapter_sources and not self.enabled:
            raise ValueError("--elora-adapter-sources (SGLANG_ELORA_ADAPTER_SOURCES) needs --elora")
        if self.check and not self.enabled:
            raise ValueError("--elora-check (SGLANG_ELORA_CHECK) needs --elora")
        if self.check_streams and not self.enabled:
            raise ValueError("--elora-check-streams (SGLANG_ELORA_CHECK_STREAMS) needs --elora")
        if self.check_streams and self.link_gbytes_per_s:
            raise ValueError(
                "--elora-check-streams (SGLANG_ELORA_CHECK_STREAMS) and --elora-link-gbytes-per-s "
                "(SGLANG_ELORA_LINK_GBYTES_PER_S) both replace the CPU's streams: give one of them"
            )
        is_order = self.check_streams in STREAM_ORDERS or self.check_streams.isdecimal()
        if self.check_streams and not is_order:
            raise ValueError(
                f"--elora-check-streams (SGLANG_ELORA_CHECK_STREAMS) must be one of "
                f"{STREAM_ORDERS} or a seed, got {self.check_streams!r}"
            )
        if self.session_from and not self.enabled:
            raise ValueError("--elora-session-from (SGLANG_ELORA_SESSION_FROM) needs --elora")
        for name in self.session_fields:
            if name not in SESSION_FIELDS:
                raise ValueError(
                    f"--elora-session-from (SGLANG_ELORA_SESSION_FROM) takes {SESSION_FIELDS}, "
                    f"got {name!r}"
                )
        if self.adapter_events and not self.enabled:
            raise ValueError("--elora-adapter-events (SGLANG_ELORA_ADAPTER_EVENTS) needs --elora")
        if self.link_latency_us and not self.link_gbytes_per_s:
            raise ValueError(
                "--elora-link-latency-us (SGLANG_ELORA_LINK_LATENCY_US) needs a bandwidth: "
                "set --elora-link-gbytes-per-s as well"
            )
        if self.link_to_host_gbytes_per_s and not self.link_gbytes_per_s:
            raise ValueError(
                "--elora-link-to-host-gbytes-per-s (SGLANG_ELORA_LINK_TO_HOST_GBYTES_PER_S) is the "
                "other direction of an emulated link: set --elora-link-gbytes-per-s as well"
            )

    @property
    def selects_anything(self) -> bool:
        """Whether any option requires patching SGLang."""
        return self.enabled or self.emulates_link

    @property
    def adapter_places(self) -> tuple[str, ...]:
        return _listed(self.adapter_sources)

    @property
    def session_fields(self) -> tuple[str, ...]:
        return _listed(self.session_from)

    @property
    def emulates_link(self) -> bool:
        return self.link_gbytes_per_s > 0

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> EloraConfig:
        """The configuration in the ``SGLANG_ELORA*`` variables; an unknown name is an error."""
        known = {variable_of(item): item for item in fields(cls)}
        removed = {_variable(flag): flag for flag in REMOVED}
        for name, flag in removed.items():
            if environ.get(name):
                raise ValueError(f"{flag} ({name}) was removed: {REMOVED[flag]}")
        unknown = sorted(
            name
            for name in environ
            if name.startswith("SGLANG_ELORA") and name not in known and name not in removed
        )
        if unknown:
            raise ValueError(
                f"unknown environment variable {unknown[0]}; known are {', '.join(sorted(known))}"
            )
        values = {
            item.name: _parse(item, environ[name])
            for name, item in known.items()
            if name in environ
        }
        return cls(**values)

    def to_env(self, environ: MutableMapping[str, str]) -> None:
        """Write every field to ``environ``, so that child processes read an equal object."""
        for item in fields(self):
            value = getattr(self, item.name)
            environ[variable_of(item)] = str(int(value)) if isinstance(value, bool) else str(value)

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser, defaults: EloraConfig) -> None:
        """Add one flag per field; an omitted flag keeps the value of ``defaults``."""
        group = parser.add_argument_group("ELORA")
        for item in fields(EloraConfig):
            kind = type(item.default)
            default = getattr(defaults, item.name)
            text = f"{item.metadata['help']} (environment: {variable_of(item)}; default: {default})"
            kwargs: dict[str, Any] = {"dest": item.name, "default": default, "help": text}
            if kind is bool:
                kwargs["action"] = argparse.BooleanOptionalAction
            else:
                kwargs |= {"type": kind, "choices": item.metadata["choices"]}
            group.add_argument(item.metadata["flag"], **kwargs)

    @classmethod
    def from_args(cls, namespace: argparse.Namespace) -> EloraConfig:
        return cls(**{item.name: getattr(namespace, item.name) for item in fields(cls)})


_active: EloraConfig | None = None


def activate(config: EloraConfig) -> None:
    """Set the configuration of this process until it ends."""
    global _active
    _active = config


def active_config() -> EloraConfig:
    """The configuration that ``activate`` has set; otherwise that of the environment."""
    return EloraConfig.from_env(os.environ) if _active is None else _active


def _listed(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(",") if item.strip())


def variable_of(item: Any) -> str:
    """The environment variable of a field."""
    return _variable(item.metadata["flag"])


def _variable(flag: str) -> str:
    return "SGLANG_" + flag.removeprefix("--").replace("-", "_").upper()


def _names(item: Any) -> str:
    return f"{item.metadata['flag']} ({variable_of(item)})"


def _parse(item: Any, text: str) -> Any:
    kind = type(item.default)
    if kind is bool:
        if text.strip().lower() in _TRUE:
            return True
        if text.strip().lower() in _FALSE:
            return False
        raise ValueError(f"{_names(item)} must be 1 or 0, got {text!r}")
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{_names(item)} must be a {kind.__name__}, got {text!r}") from None
