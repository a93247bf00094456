"""Registry of policies by name. To add one, put a class with ``@register`` into a module of this
folder that is named like the policy, and add the name to ``config.POLICIES``."""

from __future__ import annotations

from importlib import import_module
from typing import Any, TypeVar

from sglang_elora.config import POLICIES
from sglang_elora.policy.policy import Policy, PolicyContext

P = TypeVar("P", bound=type[Policy])

_REGISTERED: dict[str, type[Policy]] = {}


def register(policy: P) -> P:
    """Class decorator: register a policy under its ``name``."""
    assert _REGISTERED.setdefault(policy.name, policy) is policy, f"two policies {policy.name!r}"
    return policy


def make_policy(name: str, context: PolicyContext, **options: Any) -> Policy:
    """Build the policy of this name.

    Args:
        context: What it may read of the cache that it orders.
        options: Arguments of this policy, for measurements.

    Raises:
        ValueError: No policy has this name.
    """
    if name in POLICIES:
        import_module(f"sglang_elora.policy.{name}")
    if name not in _REGISTERED:
        known = ", ".join(sorted({*POLICIES, *_REGISTERED}))
        raise ValueError(f"policy {name!r} must be one of {known}")
    return _REGISTERED[name].build(context, **options)
