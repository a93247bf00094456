#!/usr/bin/env bash
# On a CUDA machine: report what a start selects, run the demo against the real server, then every
# attention backend that loads, with LoRA kernels and CUDA graphs. The unpacked bundle is left in
# BUNDLE_DIR/site, for kernels.py --site.
#   usage: benchmarks/gpu/start.sh BUNDLE_DIR OUT_DIR     (BUNDLE_DIR from bundle.sh)
# Not yet run on a GPU.
set -euo pipefail
bundle=${1:?usage: start.sh BUNDLE_DIR OUT_DIR}
out=${2:?usage: start.sh BUNDLE_DIR OUT_DIR}
site=$bundle/site
mkdir -p "$site"
tar -xzf "$bundle/site.tgz" -C "$site"
export PYTHONPATH="$site" PYTHONUNBUFFERED=1 SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK=1
export SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND=python
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/gpu.csv"
python3 -m sglang_elora.cli doctor | tee "$out/doctor.txt"
python3 -m sglang_elora.demo --dir "$out/demo" -- \
  --attention-backend triton --sampling-backend pytorch --grammar-backend none | tee "$out/demo.txt"
rm -rf "$out/demo/checkpoint" "$out/demo/adapters"
python3 "$(dirname "$0")/attention.py" --out "$out" | tee "$out/attention.txt"
