"""Prints each row of the tables of hooks."""

from sglang_elora.frontend.hooks import HOOKS as LANG_HOOKS
from sglang_elora.srt.install.endpoint_hooks import ENDPOINT_HOOKS
from sglang_elora.srt.install.hooks import HOOKS
from sglang_elora.srt.install.stream_hooks import STREAM_HOOKS

for row in (*HOOKS, *ENDPOINT_HOOKS, *STREAM_HOOKS, *LANG_HOOKS):
    print("row", row.target, *row.parameters)
