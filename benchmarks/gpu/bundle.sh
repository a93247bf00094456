#!/usr/bin/env bash
# Build what an offline Hopper machine needs beyond PyTorch to run SGLang with this package.
#   usage: benchmarks/gpu/bundle.sh OUT_DIR     -> OUT_DIR/site.tar.xz
# The machine has Python 3.12, torch 2.11+cu130, triton 3.6, transformers 5 and nvcc, and with them
# matplotlib, peft, accelerate, rich, pytest and their dependencies, which are not packed again. Run
# this where PyPI can be reached; TODO.md says how the bundle travels and what runs there.
# sglang-kernel is 0.4.5: SGLang asks for 0.4.10, which goes with torch 2.14, and 0.4.7 is built for
# torch 2.13. The tree core in Rust likewise.
set -euo pipefail
out=${1:?usage: bundle.sh OUT_DIR}
root=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

platforms=()
for tag in manylinux_2_{34,31,28,27,24,17,12,5}_x86_64 manylinux2014_x86_64 manylinux1_x86_64; do
  platforms+=(--platform "$tag")
done
python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
  --implementation cp "${platforms[@]}" --dest "$work/wheels" \
  sglang==0.5.23 sglang-kernel==0.4.5 flashinfer-python==0.7.2 apache-tvm-ffi==0.1.11 \
  xgrammar==0.2.7 compressed-tensors==0.18.0 fastapi==0.165.0 starlette==1.10.0 uvicorn==0.54.0 \
  opentelemetry-api==1.45.2 pydantic==2.14.3 pydantic-core==2.50.4 annotated-types==0.8.0 \
  typing-inspection==0.4.5 pyzmq==27.3.0 orjson==3.13.0 msgspec==0.22.0 setproctitle==1.3.8 \
  partial-json-parser==0.2.1.1.post7 pybase64==1.5.1 python-multipart==0.0.34 openai==2.8.0 \
  jiter==0.19.0 distro==1.9.0 sniffio==1.3.1 loguru==0.7.3 dill==0.4.1 gguf==0.19.0 \
  jsonschema==4.26.0 jsonschema-specifications==2025.9.1 referencing==0.37.0 rpds-py==2026.9.1
python3 -m pip wheel --quiet --no-deps --wheel-dir "$work/wheels" "$root"

mkdir "$work/site"
for wheel in "$work"/wheels/*.whl; do (cd "$work/site" && python3 -m zipfile -e "$wheel" .); done
cd "$work/site"
rm -rf sglang/multimodal_gen sglang/test sglang/srt/rust_extensions/*.so \
  sglang/srt/mem_cache/rust_tree_core/*.so
find sgl_kernel -name '*.so' ! -path '*/sm90/*' ! -name 'spatial_ops*' -delete
# SGLang imports these two for features that a server does not use.
mkdir -p IPython
printf 'from . import display\n' >IPython/__init__.py
printf 'HTML = None\n\n\ndef display(*args, **kwargs):\n    pass\n' >IPython/display.py
: >soundfile.py
XZ_OPT="-1 -T0" tar -cJf "$out/site.tar.xz" .  # level 1: others take minutes
python3 "$root/benchmarks/gpu/travel.py" "$out"
