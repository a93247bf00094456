"""Encodes and decodes each message of ours as SGLang's channel does."""

from sglang.srt.managers import io_struct

from sglang_elora.srt import messages

messages.register_types()
sent = [
    messages.AdapterHint(adapters=["a", "b"]),
    messages.AdapterHint(adapters=[], sessions=["s"]),
    messages.StateRequest(rid="r", version=7),
    messages.AdapterOrder(rid="r", do="pin", adapter="a"),
    messages.AdapterOrderAnswer(rid="r", error="", tier="host"),
    messages.Undecodable(reason="x"),
]
for message in sent:
    assert io_struct.msgpack_decode(io_struct.msgpack_encode(message)) == message, message
    assert messages.valid(message) == message
print("equal")
