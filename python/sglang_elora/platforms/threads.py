"""The number of OpenMP threads of a scheduler process on the CPU platform.

Torch's default, a thread per core, leaves no core to the tokenizer, the detokenizer and clients.
The threads of a team wait for each other after every operation, so a scheduler stalls whenever one
of them is preempted: on two cores, mean TTFT of stock SGLang was above a second in 3 of 5 runs,
and 0.15 s in each with one thread. For a small model a second thread costs more than it saves.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

VARIABLE = "OMP_NUM_THREADS"

_BOUND = "SGLANG_CPU_OMP_THREADS_BIND"  # SGLang's own setting of cores per rank
_SMALL_ELEMENTS = 1 << 21
"""Elements of an MLP matrix up to which one thread is used: a batch of 8 rows takes about 1 ms per
layer there, and no less with two threads. Raising it slows the prefill of mid-sized models."""


def default_threads(model_path: str | None, num_ranks: int, num_cores: int) -> int:
    """Threads per scheduler: the cores but one, shared by the ranks; 1 for a small model.

    Args:
        model_path: Folder with ``config.json``. A model that is not a local folder, or not known
            yet (None), counts as large.
        num_ranks: Scheduler processes on this machine.
        num_cores: Physical cores that this process may use.
    """
    if model_path and 0 < _mlp_elements(Path(model_path)) <= _SMALL_ELEMENTS:
        return 1
    return max(1, (num_cores - 1) // max(1, num_ranks))


def set_default_threads(model_path: str, num_ranks: int) -> int | None:
    """Set ``OMP_NUM_THREADS`` for the processes that this one starts, unless the user has chosen
    threads. Returns the number that it set, or None.
    """
    if os.environ.get(VARIABLE) or os.environ.get(_BOUND):
        return None
    threads = default_threads(model_path, num_ranks, usable_cores())
    os.environ[VARIABLE] = str(threads)
    return threads


def usable_cores() -> int:
    """Physical cores that this process may use, as torch counts them."""
    import torch

    num_cores: int = torch.get_num_threads()
    return num_cores


def _mlp_elements(folder: Path) -> int:
    """Elements of one MLP matrix of the model; 0 if unknown."""
    try:
        config = json.loads((folder / "config.json").read_text())
        return int(config["hidden_size"]) * int(config["intermediate_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
