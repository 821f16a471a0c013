#!/usr/bin/env bash
# Shows on a machine with a CUDA GPU that the burn engine computes what the CPU engine does, how
# fast, and in how much memory of the GPU. Nobody has run this on a GPU yet.
#
#   cargo test --features burn-cpu,cuda --test burn --no-run    # prints the path of TESTS
#   scripts/gpu_check.sh TESTS [SHARED]
#
# TESTS can be built on another machine (a GPU or a CUDA toolkit is not needed for that) and copied
# here. SHARED (default ../shared) holds weights/dinov2_vits14.fp16.safetensors and
# weights/golden_astronaut_224.safetensors. Needed here: the NVIDIA driver, libnvrtc, and the CUDA
# headers under CUDA_PATH, /usr/local/cuda, /opt/cuda, or /usr with nvcc.
# Exit status: 0 when all is equal within tolerance, 1 when not, 2 when it could not be checked.
set -euo pipefail

tests=${1:?"usage: $0 TESTS [SHARED]"}
export ODDSCAN_SHARED=${2:-$(dirname "$0")/../../shared}
out=$(mktemp -d)
sampler=
trap '[ -z "$sampler" ] || kill "$sampler" 2>/dev/null || true; rm -rf "$out"' EXIT

command -v nvidia-smi >/dev/null || { echo "no nvidia-smi: is the NVIDIA driver installed?" >&2; exit 2; }
nvidia-smi --query-gpu=index,name,driver_version,memory.total --format=csv
nvidia-smi --id=0 --query-gpu=memory.used --format=csv,noheader,nounits --loop-ms=100 \
    >"$out/memory" &
sampler=$!

status=0
"$tests" --nocapture --test-threads=1 gpu:: 2>&1 | tee "$out/log" || status=1
if grep -q 'skipped[,:]' "$out/log"; then
    echo "not checked: see the lines with 'skipped'" >&2
    exit 2
fi
echo "GPU memory in use: $(head -n1 "$out/memory") MiB before," \
    "at most $(sort -n "$out/memory" | tail -n1) MiB"
exit "$status"
