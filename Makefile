# Every target works on a fresh machine: it makes .venv first if that is missing or out of date.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
# Tests with servers that may share the machine with others: nothing in them depends on its speed.
LOADED := $(addprefix tests/e2e/test_,pressure.py missing_waits.py hybrid_models.py \
  activated.py gpu_server_stages.py \
  host_tier.py lang.py examples.py one_pool.py bad_adapters.py sent_adapters.py namespace.py \
  triton_backend.py outputs.py dtypes.py events.py entry_points.py two_replicas.py \
  hostile_requests.py openapi.py adapter_sources.py chats.py cleanup.py model_families.py \
  engine.py peft_options.py tokenizer_workers.py embedding_models.py streaming_sessions.py \
  vllm_side.py ray_serve.py)
DEMO ?=
BENCH ?=

.PHONY: help install demo bench test test-fast serve check doctor clean

help:  ## this text
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: $(READY)  ## make .venv with everything in it

demo: $(READY)  ## 16 adapters, 32 chats, one server: watch it work
	$(BIN)/python -m sglang_elora.demo $(DEMO)

bench: $(READY)  ## stock and ELORA on the same traces: tables, plots, a page
	$(BIN)/sglang-elora bench --quick $(BENCH)

test: $(READY)  ## all tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore tests/e2e
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(LOADED)
	$(BIN)/python -m pytest tests/e2e $(LOADED:%=--ignore %)

test-fast: $(READY)  ## the tests that need no SGLang: about two minutes
	$(BIN)/python -m pytest -n 2 tests/unit

serve: $(READY)  ## the demo's server, left up for you to try
	$(BIN)/python -m sglang_elora.demo --serve $(DEMO)

check: $(READY)  ## format, lint, types, import rules
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_imports.py

doctor: $(READY)  ## is this machine ready, and what would a start select
	$(BIN)/sglang-elora doctor

clean:  ## remove what the targets above made
	rm -rf $(VENV) .demo .bench build

# On a CUDA machine SGLang and its CUDA packages come whole. Elsewhere they do not build, so the
# locks list what SGLang needs to run on a CPU, with the sha256 of every file; pip is told not to
# look at dependencies and takes no other file. A torch built for the CPU that lies in one of pip's
# own folders (find-links) goes first. Where the locks bring a torch built for CUDA, which does not
# import without CUDA's libraries, the CPU build from PyTorch's own index takes its place: that is
# the one file whose sha256 is not checked.
$(READY): pyproject.toml requirements/cpu.lock requirements/dev.lock requirements/clients.lock
	$(PYTHON) -m venv $(VENV)
	if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then \
	  $(BIN)/pip install --quiet --editable '.[cuda,clients,dev]'; \
	else \
	  { sed -n '/^torch==/,/[^\]$$/p' requirements/cpu.lock | $(BIN)/pip install --quiet --no-index \
	      --no-deps --require-hashes --requirement /dev/stdin 2>/dev/null || true; } && \
	  $(BIN)/pip install --quiet --no-deps --require-hashes \
	    --requirement requirements/cpu.lock --requirement requirements/dev.lock \
	    --requirement requirements/clients.lock && \
	  { $(BIN)/python -c 'import torch' || $(BIN)/pip install --quiet --no-deps --force-reinstall \
	      --index-url $(TORCH_CPU_INDEX) $$(grep -o '^torch==[^ ]*' requirements/cpu.lock); } && \
	  $(BIN)/pip install --quiet --no-deps --editable .; \
	fi
	touch $(READY)
