#!/usr/bin/env bash
# On a CUDA machine: report what a start selects, then serve the demo in short form.
#   usage: benchmarks/gpu/start.sh OUT_DIR
set -euo pipefail
out=${1:?usage: start.sh OUT_DIR}
cd "$(dirname "$0")/../.."
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv >"$out/gpu.csv"
make doctor | tee "$out/doctor.txt"
make demo DEMO="--short --dir $out/demo" | tee "$out/demo.txt"
