"""A plugin: asking for the state writes 1,000 broken messages first, while a file is there.

NOISE in the environment names the file. With "die" in it, the socket is closed with what it has not
sent, and another takes its place.
"""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path


def load():
    import zmq
    from sglang.srt.utils.network import get_zmq_socket

    from sglang_elora.srt.messages import AdapterHint, AdapterOrder, StateRequest
    from sglang_elora.srt.tokenizer import tokenizer_control

    original = tokenizer_control.TokenizerControl.refresh
    seeds = iter(range(100))
    switch = Path(os.environ["NOISE"])

    async def refresh(self):
        if not switch.exists():
            return await original(self)
        if switch.read_text() == "die":
            dead = self._manager.send_to_scheduler
            for _ in range(100):
                dead.send_pyobj(AdapterHint(adapters=["nobody"]))
            endpoint = dead.getsockopt_string(zmq.LAST_ENDPOINT)
            dead.close(linger=0)
            back = get_zmq_socket(dead.context, zmq.PUSH, endpoint, True)
            self._manager.send_to_scheduler = back
            return await original(self)
        rng = random.Random(next(seeds))
        whole = [
            pickle.dumps(AdapterHint(adapters=["nobody", "x" * 999])),
            pickle.dumps(AdapterOrder(do="prefetch", adapter="nobody")),
            pickle.dumps(StateRequest(version=-5)),
        ]
        for _ in range(1000):
            data = rng.randbytes(rng.randrange(64))
            if rng.random() < 0.6:
                data = rng.choice(whole)
                data = data[: rng.randrange(len(data) + 1)]
                if data and rng.random() < 0.5:
                    i = rng.randrange(len(data))
                    data = data[:i] + rng.randbytes(1) + data[i + 1 :]
            await self._manager.send_to_scheduler.send(data)
        return await original(self)

    tokenizer_control.TokenizerControl.refresh = refresh
