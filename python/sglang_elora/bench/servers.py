"""Checkpoint and adapters of the benchmark, and a server with them for each side."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_elora.bench.sides import Side, Sizes, adapter_specs, common_flags, make_side
from sglang_elora.bench.variant import write_plugin
from sglang_elora.testbed.adapters import make_adapters
from sglang_elora.testbed.checkpoint import make_checkpoint, silence_progress_bars
from sglang_elora.testbed.server import SMALL_MODEL_ENV, ServerProcess
from sglang_elora.workloads import Trace


@dataclass(frozen=True, slots=True)
class EmulatedLink:
    """Bandwidth and latency of the emulated host-to-device link of all sides, by ``calibrate``."""

    gbytes_per_s: float
    latency_us: float

    @classmethod
    def load(cls, path: Path) -> EmulatedLink:
        link = json.loads(path.read_text())["link"]
        return cls(**link)

    @property
    def env(self) -> dict[str, str]:
        return {
            "SGLANG_ELORA_LINK_GBYTES_PER_S": f"{self.gbytes_per_s:.6f}",
            "SGLANG_ELORA_LINK_LATENCY_US": f"{self.latency_us:.3f}",
        }


class Bench:
    """Creates servers with one checkpoint and ``num_adapters`` adapters, written to ``folder``.

    ``variants`` is the Python file with the functions of the sides' variants.
    """

    def __init__(
        self,
        folder: Path,
        num_adapters: int,
        sizes: Sizes,
        link: EmulatedLink | None,
        variants: Path | None = None,
    ) -> None:
        silence_progress_bars()
        self.checkpoint = make_checkpoint(folder / "base", shape=sizes.shape)
        self._adapters = make_adapters(
            self.checkpoint, folder / "adapters", adapter_specs(num_adapters)
        )
        self._folder = folder
        self._variants = variants
        self.sizes = sizes
        self.link = link

    def side(self, name: str, trace: Trace) -> Side:
        """The side of that name for a trace; raises ValueError as ``make_side`` does."""
        longest = max(session.num_tokens for session in trace.sessions)
        return make_side(name, self.sizes, len(self._adapters), longest)

    def server(self, side: Side, log_path: Path) -> ServerProcess:
        """The server of a side, not started yet.

        Raises:
            ValueError: The side's variant does not exist.
        """
        env: dict[str, str] = dict(self.link.env) if self.link is not None else {}
        if side.variant is not None:
            if self._variants is None:
                raise ValueError(f"side {side.name!r} needs the file that {side.variant!r} is in")
            added = write_plugin(self._folder / "plugins", self._variants, side.variant)
            paths = (*map(str, added), os.environ.get("PYTHONPATH"))
            env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        return ServerProcess(
            [*common_flags(self.checkpoint, self._adapters), *side.flags],
            log_path=log_path,
            program=side.program,
            env={**SMALL_MODEL_ENV, **env},
        )

    def facts(self) -> dict[str, Any]:
        link = None if self.link is None else {"emulated": True, **self.link.env}
        return {"sizes": self.sizes.facts(), "link": link, "num_adapters": len(self._adapters)}
