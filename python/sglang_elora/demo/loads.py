"""How often each adapter was copied onto the device: from the server, or from its log."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from uuid import NAMESPACE_URL, uuid5

import httpx

_LOAD_LINE = re.compile(r"\] load (\w+) into \d+ slots")
"""Logged at level info by srt/mem_cache/residency.py for each load into pages."""


def adapter_loads(url: str) -> dict[str, int] | None:
    """Loads per adapter name as ``GET /elora/adapters`` reports them, None without that route.

    Expects ``{"adapters": [{"name": str, "loads": int, ...}, ...]}``.

    Raises:
        httpx.HTTPError: The server is unreachable or answers with an error other than 404.
    """
    answer = httpx.get(f"{url}/elora/adapters", timeout=10.0, trust_env=False)
    if answer.status_code == httpx.codes.NOT_FOUND:
        return None
    answer.raise_for_status()
    return {entry["name"]: entry["loads"] for entry in answer.json()["adapters"]}


def adapter_loads_in_log(log_path: Path, adapters: Mapping[str, Path]) -> dict[str, int] | None:
    """Loads per adapter name, counted in a log of level info; None if it mentions none at all.

    The log speaks of ids; ``adapters`` (name to the path given in ``--lora-paths``) brings the
    names back. Ranks of a tensor-parallel server each log their own load.
    """
    ids = _LOAD_LINE.findall(log_path.read_text(errors="replace"))
    if not ids:
        return None
    count = Counter(ids)
    return {name: count[_adapter_id(name, path)] for name, path in adapters.items()}


def _adapter_id(name: str, path: Path) -> str:
    """SGLang's id for an adapter given at launch: ``LoRARef.deterministic_id``."""
    return uuid5(NAMESPACE_URL, f"{name}\0{path}").hex
