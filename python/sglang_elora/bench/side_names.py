"""Names of the compared servers: a system, options, and a number of threads.

    name    = system ("+" option)* ["@" threads]
    system  = "stock-default" | "stock-tuned:" SLOTS | "elora:" POLICY

``stock-default``: SGLang's defaults, with 8 adapter slots and no host tier. ``stock-tuned:N``: N
adapter slots, a host tier for KV (HiCache, write_back), and adapters loaded concurrently with
batches where SGLang allows it (N of at least half the adapters). ``elora:POLICY``: one pool and the
same host tier.

Options of stock:

* ``hicache``: ``stock-default`` with the host tier, of the same bytes as everybody's, and SGLang's
  default write policy (write_through).
* ``grouped``: LoRA computed per adapter as ELORA's CPU backend does (``stock.variants``).
* ``overlap``: loads concurrent with batches with any number of slots (``stock.variants``).
* ``write_back``, ``write_through``, ``write_through_selective``: when KV is copied to the host.
* ``lfu``, ``slru``: ``--radix-eviction-policy``.
* ``drain=SECONDS``: ``--lora-drain-wait-threshold``.

Options of both: ``lpm`` (``--schedule-policy``), ``chunk=TOKENS`` (``--chunked-prefill-size``),
``mixed`` (``--enable-mixed-chunk``), ``page=TOKENS`` (``--page-size``).

Options of ELORA: ``most=N``: ``--elora-max-adapters-per-batch``, which the slots of a split bound,
too; ``sessions``: requests name their session, and the last one closes it. Any other
is a function of the file ``--variants``, which changes one thing in ELORA by a plugin
(``benchmarks/serving/variants.py``), for example disables a term of the paper's policy.

``@2`` gives the server's OpenMP pool two threads (``OMP_NUM_THREADS``); without it the server has
the CPU platform's default (``platforms.threads``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

DEFAULT, TUNED, ELORA = "stock-default", "stock-tuned", "elora"
WRITE_POLICIES = ("write_back", "write_through", "write_through_selective")
STOCK_VARIANTS = ("grouped", "overlap")

_FORM = "stock-default, stock-tuned:SLOTS or elora:POLICY, each with +OPTION and @THREADS"


@dataclass(frozen=True, slots=True)
class SideName:
    """A parsed name. ``argument`` is the number of slots or the policy, empty for the default."""

    text: str
    system: str
    argument: str
    options: tuple[str, ...]
    threads: int | None

    @property
    def is_elora(self) -> bool:
        return self.system == ELORA

    def has(self, option: str) -> bool:
        return option in self.options

    @property
    def setting_flags(self) -> tuple[str, ...]:
        """Flags of the options that are plain settings of SGLang."""
        return tuple(flag for option in self.options for flag in _flags(option) or ())

    @property
    def others(self) -> tuple[str, ...]:
        """Options that are neither settings nor known by name: variants of ELORA."""
        known = {*STOCK_VARIANTS, *WRITE_POLICIES, "hicache", "sessions"}
        return tuple(o for o in self.options if o not in known and _flags(o) is None)


def parse_side(text: str) -> SideName:
    """The parsed name.

    Raises:
        ValueError: It does not follow the grammar, or an option does not belong to its system.
    """
    head, at, threads = text.partition("@")
    if at and not (threads.isdigit() and int(threads) > 0):
        raise ValueError(f"side {text!r}: @ must be followed by a number of threads")
    first, *options = head.split("+")
    system, _, argument = first.partition(":")
    if not (first == DEFAULT or (system == TUNED and argument.isdigit()) or _is_elora(first)):
        raise ValueError(f"side {text!r} must be {_FORM}")
    name = SideName(text, system, argument, tuple(options), int(threads) if at else None)
    wrong = [option for option in options if not _belongs(option, name)]
    if wrong or len(set(options)) < len(options):
        raise ValueError(
            f"side {text!r}: option {', '.join(wrong) or 'given twice'} does not fit; options of "
            f"{system} are listed in sglang_elora.bench.side_names"
        )
    return name


def suffix(text: str) -> str:
    """What follows the system in a side's name: options and threads, with their separators."""
    cut = min((i for i, letter in enumerate(text) if letter in "+@"), default=len(text))
    return text[cut:]


def _is_elora(first: str) -> bool:
    system, colon, policy = first.partition(":")
    return system == ELORA and bool(colon) and bool(policy)


def _belongs(option: str, name: SideName) -> bool:
    if _flags(option) is not None:
        key = option.partition("=")[0]
        return key not in (*_RADIX, "drain") if name.is_elora else key != "most"
    if name.is_elora:
        return option not in (*STOCK_VARIANTS, *WRITE_POLICIES, "hicache", "")
    if option in WRITE_POLICIES:
        return name.system == TUNED or name.has("hicache")
    return option in STOCK_VARIANTS or (option == "hicache" and name.system == DEFAULT)


_RADIX = ("lfu", "slru")
_PLAIN: Mapping[str, tuple[str, ...]] = {
    "lpm": ("--schedule-policy", "lpm"),
    "mixed": ("--enable-mixed-chunk",),
    **{policy: ("--radix-eviction-policy", policy) for policy in _RADIX},
}
_VALUED: Mapping[str, tuple[str, Callable[[str], float]]] = {
    "drain": ("--lora-drain-wait-threshold", float),
    "chunk": ("--chunked-prefill-size", int),
    "page": ("--page-size", int),
    "most": ("--elora-max-adapters-per-batch", int),
}


def _flags(option: str) -> tuple[str, ...] | None:
    """Flags of a setting; None if the option is not one.

    Raises:
        ValueError: Its value is not a positive number.
    """
    if option in _PLAIN:
        return _PLAIN[option]
    key, equals, value = option.partition("=")
    if not equals or key not in _VALUED:
        return None
    flag, kind = _VALUED[key]
    try:
        positive = kind(value) > 0
    except ValueError:
        positive = False
    if not positive:
        raise ValueError(f"option {option!r}: {key} needs a positive number")
    return (flag, value)
