"""A plugin with which a server forks the processes that SGLang would spawn."""

from __future__ import annotations

import multiprocessing


def load():
    set_start_method = multiprocessing.set_start_method
    multiprocessing.set_start_method = lambda method, force=False: set_start_method("fork", force)
