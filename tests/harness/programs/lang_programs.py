"""Programs of the frontend language, and the HTTP server that writes down what they send.

Called with "stock", "plain" or "adapters"; prints what was sent and found as JSON.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LONG = "A sentence that is long enough for a prefix to be worth caching, by a margin. "


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self._answer(200, {"model_path": "any"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.sent.append((self.path, body))
            self.server.keys.append(self.headers["Authorization"])
        if self.path != "/generate":
            return self._answer(404, {})
        if body.get("lora_path") == "nobody":
            return self._answer(400, {"error": {"message": "no such adapter"}})
        texts = body.get("text", body.get("input_ids"))
        answers = [self._one(text, body) for text in texts] if isinstance(texts, list) else None
        answer = self._one(texts, body) if answers is None else answers
        if body.get("stream"):
            return self._stream(answer)
        self._answer(200, answer)

    def _one(self, text: Any, body: dict[str, Any]) -> Any:
        tokens = [[-1.0 - i, 7, "?"] for i in range(4)]
        info = {"prompt_tokens": len(text), "input_token_logprobs": tokens}
        info["output_token_logprobs"] = []
        return {"text": f"<{len(text)}{body.get('lora_path', '')}>", "meta_info": info}

    def _stream(self, answer: Any) -> None:
        text = answer["text"]
        parts = [{**answer, "text": text[:2]}, answer]
        events = [f"data: {json.dumps(part)}\n\n" for part in parts] + ["data: [DONE]\n\n"]
        self._send(200, "text/event-stream", *events)

    def _answer(self, status: int, answer: Any) -> None:
        self._send(status, "application/json", json.dumps(answer))

    def _send(self, status: int, kind: str, *parts: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(sum(map(len, parts))))
        self.end_headers()
        for part in parts:
            self.wfile.write(part.encode())
            if len(parts) > 1:
                time.sleep(0.05)  # Runtime.async_generate takes what arrives together for one event

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def _recorder() -> Iterator[_Server]:
    with _Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def _programs(sgl: Any) -> dict[str, Any]:
    """What a program can do, by name; each takes a backend and more for its runs."""

    @sgl.function
    def calls(s: Any, word: str = "start") -> None:
        s += word + sgl.gen("one", max_tokens=5)
        s += sgl.gen_int("two") + sgl.gen_string("three")
        s["four"] = s["one"]
        s += sgl.user("hm") + sgl.assistant(sgl.gen("five", stop="\n", n=1))

    @sgl.function
    def choices(s: Any) -> None:
        s += LONG + sgl.select("way", ["left", "right"])
        s += sgl.gen(
            "other",
            choices=["up", "down"],
            choices_method=sgl.unconditional_likelihood_normalized,
        )

    @sgl.function
    def forks(s: Any) -> None:
        s += LONG
        s.sync()
        branches = s.fork(3)
        branches += "so " + sgl.gen("part")
        branches.join()
        with s.copy() as branch:
            branch += sgl.gen("alone")

    @sgl.function
    def rows(s: Any, word: str) -> None:
        s += LONG
        s += word + sgl.gen("answer")

    def run(program: Any) -> Any:
        return lambda backend, **more: program.run(backend=backend, **more).sync()

    def batch(**options: Any) -> Any:
        def run_batch(backend: Any, **more: Any) -> None:
            words = [{"word": "x"}, {"word": "y"}, {"word": "z"}]
            list(rows.run_batch(words, backend=backend, **options, **more))

        return run_batch

    def streams(backend: Any, **more: Any) -> None:
        "".join(calls.run(stream=True, backend=backend, **more).text_iter())

    return {
        "calls": run(calls),
        "without a thread": lambda backend, **more: calls.run(
            backend=backend, use_thread=False, **more
        ),
        "choices": run(choices),
        "forks": run(forks),
        "batch": batch(),
        "batch one by one": batch(num_threads=1, generator_style=True),
        "stream": streams,
    }


def _by_text(sent: list[Any]) -> list[Any]:
    return sorted(sent, key=json.dumps)  # branches and rows come in any order


def _stock_or_plain(which: str) -> Any:
    import sglang as sgl

    if which == "plain":
        import sglang_elora.lang

        assert sglang_elora.lang.__all__
    with _recorder() as server:
        backend = sgl.RuntimeEndpoint(server.url)
        for run in _programs(sgl).values():
            run(backend)
        return {"sent": _by_text(server.sent)}


def _with_adapters() -> Any:
    import sglang as sgl
    from sglang.lang.backend.base_backend import BaseBackend
    from sglang.lang.backend.runtime_endpoint import Runtime

    import sglang_elora.lang as elora
    from sglang_elora.frontend import tracing
    from sglang_elora.frontend.announcing import announcer_of

    found: dict[str, Any] = {"sent": {}}
    with _recorder() as server:
        backend = sgl.RuntimeEndpoint(server.url)

        def sent(run: Any) -> list[Any]:
            del server.sent[:]
            run()
            announcer_of(backend).drain()  # type: ignore[union-attr]
            return [(path, body) for path, body in server.sent if path == "/generate"]

        for name, run in _programs(sgl).items():
            found["sent"][name] = sent(lambda run=run: run(backend, lora_path="a"))  # type: ignore[misc]

        @sgl.function
        def unalike(s: Any) -> None:
            s += LONG
            s.sync()
            branches = s.fork(4, lora_path=["a", "b", "a", "c"])
            branches += sgl.gen("part")
            branches.join()

        found["fork"] = [body for _, body in sent(lambda: unalike.run(backend=backend).sync())]

        @sgl.function
        def own(s: Any, lora_path: str) -> None:
            s += lora_path + sgl.gen("x")

        runs = sent(lambda: own.run(lora_path="mine", backend=backend).sync())
        runs += sent(lambda: own.run_batch([{"lora_path": "mine"}], backend=backend))
        found["own"] = [[body["text"], body.get("lora_path")] for _, body in runs]

        @sgl.function
        def one(s: Any) -> None:
            s += "start"
            s += sgl.gen("x", lora_path="nobody")
            s += "more"

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = one.run(backend=BaseBackend())
            state.sync()
            found["other backend"] = str(state.error())
            state = one.run(backend=backend)
            waiting = threading.Thread(target=state.sync, daemon=True)
            waiting.start()
            waiting.join(20)
            try:
                state["x"]
            except RuntimeError as error:
                at_the_call = error.args[0]["error"]["message"]
            text = state.stream_executor.text_
            found["error"] = {"at the call": at_the_call, "text": text}
            found["error"]["synced"] = not waiting.is_alive()

        runtime = Runtime.__new__(Runtime)
        runtime.pid, runtime.endpoint = None, backend
        runtime.generate_url = server.url + "/generate"
        runtime.server_args = type("Args", (), {"skip_tokenizer_init": False})
        del server.sent[:]
        runtime.cache_prefix("prefix", "a")

        async def read() -> None:
            async for _ in runtime.async_generate("prompt", {}, lora_path="a"):
                pass

        import asyncio

        asyncio.run(read())
        found["runtime"] = [
            [body["lora_path"], (body["sampling_params"] or {}).get("max_new_tokens")]
            for _, body in server.sent
        ]

        ran: list[int] = []
        found["traces"] = {
            name: tracing.adapters(program, backend, (), keywords)
            for name, (program, keywords) in _traceable(sgl, ran).items()
        }
        found["ran for nothing"] = len(ran)

        fresh = sgl.RuntimeEndpoint(server.url)
        del server.sent[:], server.keys[:]
        for name in ("a", "b"):
            announcer_of(fresh).announce([name])  # type: ignore[union-attr]
            announcer_of(fresh).drain()  # type: ignore[union-attr]
        found["announced to stock"] = len(server.sent)
        del server.sent[:], server.keys[:]
        elora.prefetch(fresh, admin_key="admin")
        announcer_of(fresh).announce(["c"])  # type: ignore[union-attr]
        announcer_of(fresh).drain()  # type: ignore[union-attr]
        found["announced with key"] = server.keys
    return found


def _traceable(sgl: Any, ran: list[int]) -> dict[str, Any]:
    @sgl.function
    def steps(s: Any, question: str) -> None:
        s += question + sgl.gen("x", lora_path="a")
        s += f"{s['x']} and " + s["x"] + sgl.select("y", ["l", "r"], lora_path="b")
        s += sgl.gen("z", lora_path="")
        s += sgl.gen("end")

    @sgl.function
    def forks(s: Any) -> None:
        s += sgl.gen("x", lora_path="a")
        branches = s.fork(3, lora_path=["b", "c", "c"])
        branches[0] += sgl.gen("part")
        branches[1] += sgl.gen("part")
        branches[2] += sgl.gen("part", lora_path="d") + sgl.gen("more")
        branches.join()
        for part in s["part"]:
            s += part
        s += sgl.gen("y", lora_path="end")

    def looking(look: Any) -> Any:
        @sgl.function
        def program(s: Any) -> None:
            s += sgl.gen("x", lora_path="a")
            look(s)
            s += sgl.gen("y", lora_path="never")

        return program

    @sgl.function
    def another(s: Any) -> None:
        ran.append(1)

    @sgl.function
    def roles(s: Any) -> None:
        s.user("hm")
        s.assistant(sgl.gen("x", lora_path="a"))
        with s.user():
            s += s["x"]
        with s.assistant(), s.var_scope("both"):
            s += sgl.gen("y", lora_path="b")

    @sgl.function
    def rows(s: Any, lora_path: str) -> None:
        s += sgl.gen("x", lora_path=lora_path)

    return {
        "steps": (steps, {"question": "why", "lora_path": "default"}),
        "forks": (forks, {}),
        "looks": (looking(lambda s: s["x"] == "left"), {}),
        "measures": (looking(lambda s: len(s.text())), {}),
        "calls a method": (looking(lambda s: s["x"].strip()), {}),
        "raises": (looking(lambda s: 1 / 0), {}),
        "runs another": (looking(lambda s: another.run(backend=s.backend)), {}),
        "roles": (roles, {}),
        "rows": (rows, {"lora_path": "a"}),
    }


if __name__ == "__main__":
    which = sys.argv[1]
    print(json.dumps(_with_adapters() if which == "adapters" else _stock_or_plain(which)))
