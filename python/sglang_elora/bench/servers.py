"""Checkpoint and adapters of the benchmark, and a server with them for each side."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_elora.bench.sides import Side, Sizes, adapter_specs, common_flags, make_side
from sglang_elora.bench.variant import write_plugin, write_stock_plugin
from sglang_elora.bench.vllm.side import facts as vllm_facts
from sglang_elora.bench.vllm.side import is_vllm, make_vllm_side, vllm_server
from sglang_elora.testbed.adapters import make_adapters
from sglang_elora.testbed.checkpoint import make_checkpoint, silence_progress_bars
from sglang_elora.testbed.server import ServerProcess
from sglang_elora.workloads import Trace

_PATIENT = {"SGLANG_TIMEOUT_KEEP_ALIVE": "600"}
"""Idle connections outlive the other servers' turns: a request may be sent at the end of one."""


@dataclass(frozen=True, slots=True)
class EmulatedLink:
    """Bandwidths and latency of the emulated link of all sides, by ``calibrate``."""

    gbytes_per_s: float
    latency_us: float
    to_host_gbytes_per_s: float = 0.0  # 0, and in files of before: such copies take no time
    gpu: str = ""  # whose ratio of load to prefill it has; empty in files of before
    host: str = ""  # machine of the calibration; empty in files of before

    @classmethod
    def load(cls, path: Path) -> EmulatedLink:
        found = json.loads(path.read_text())
        return cls(**found["link"], gpu=found.get("gpu", ""), host=found.get("host", ""))

    @property
    def env(self) -> dict[str, str]:
        to_host = f"{self.to_host_gbytes_per_s:.6f}"
        return {
            "SGLANG_ELORA_LINK_GBYTES_PER_S": f"{self.gbytes_per_s:.6f}",
            "SGLANG_ELORA_LINK_LATENCY_US": f"{self.latency_us:.3f}",
            **({"SGLANG_ELORA_LINK_TO_HOST_GBYTES_PER_S": to_host} if float(to_host) else {}),
        }

    def facts(self) -> dict[str, Any]:
        return {"emulated": True, **self.env, "gpu": self.gpu, "calibrated_on": self.host}


class Bench:
    """Creates servers with one checkpoint and ``num_adapters`` adapters, written to ``folder``.

    ``variants`` is the Python file with the functions of the sides' variants, ``vllm_python`` the
    interpreter of the environment that sides ``vllm:N`` run in.
    """

    def __init__(
        self,
        folder: Path,
        num_adapters: int,
        sizes: Sizes,
        link: EmulatedLink | None,
        variants: Path | None = None,
        vllm_python: Path | None = None,
    ) -> None:
        silence_progress_bars()
        self.checkpoint = make_checkpoint(folder / "base", shape=sizes.shape)
        self._adapters = make_adapters(
            self.checkpoint, folder / "adapters", adapter_specs(num_adapters)
        )
        self._folder = folder
        self._variants = variants
        self._vllm_python = vllm_python
        self.sizes = sizes
        self.link = link

    def side(self, name: str, trace: Trace) -> Side:
        """The side of that name for a trace; raises ValueError as ``make_side`` does."""
        longest = max(session.num_tokens for session in trace.sessions)
        if is_vllm(name):
            if self._vllm_python is None:
                raise ValueError(
                    f"side {name!r} needs --vllm-python: see benchmarks/vllm/README.md"
                )
            if self.link is not None:
                raise ValueError(f"side {name!r} has no emulated link: compare with --link none")
            return make_vllm_side(name, self.sizes, len(self._adapters), longest, self._vllm_python)
        return make_side(name, self.sizes, len(self._adapters), longest)

    def server(self, side: Side, log_path: Path) -> ServerProcess:
        """The server of a side, not started yet.

        Raises:
            ValueError: The side's variant does not exist.
        """
        if is_vllm(side.name):
            plugins = self._folder / "plugins"
            return vllm_server(side, self.checkpoint, self._adapters, plugins, log_path)
        return ServerProcess(
            [*common_flags(self.checkpoint, self._adapters), *side.flags],
            log_path=log_path,
            program=side.program,
            env={**self.settings(side), **self._python_path(side), **_PATIENT},
        )

    def settings(self, side: Side) -> dict[str, str]:
        """Environment variables that change what the side's server does; rows record them."""
        threads = {} if side.threads is None else {"OMP_NUM_THREADS": str(side.threads)}
        return {**threads, **(self.link.env if self.link is not None else {})}

    def _python_path(self, side: Side) -> dict[str, str]:
        """PYTHONPATH with the plugins of the side's variants; nothing without variants."""
        if side.variants and self._variants is None:
            raise ValueError(f"side {side.name!r} needs the file that {side.variants} are in")
        folder, added = self._folder / "plugins", list[Path]()
        for variant in side.stock_variants:
            added.append(write_stock_plugin(folder, variant))
        for variant in side.variants:
            assert self._variants is not None
            added += write_plugin(folder, self._variants, variant)
        paths = (*map(str, added), os.environ.get("PYTHONPATH"))
        return {"PYTHONPATH": os.pathsep.join(filter(None, paths))} if added else {}

    def facts(self) -> dict[str, Any]:
        link = None if self.link is None else self.link.facts()
        vllm = self._vllm_python and {"vllm": vllm_facts(self._vllm_python)}
        return {
            "sizes": self.sizes.facts(),
            "link": link,
            "num_adapters": len(self._adapters),
            **(vllm or {}),
        }
