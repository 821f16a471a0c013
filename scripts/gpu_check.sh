#!/usr/bin/env bash
# Run this on a machine with an NVIDIA GPU. It shows that oddscan computes the same as on the CPU, how fast it is
# beside PyTorch, and how much memory of the GPU it takes.
#
#   cargo build --release --features cuda          # on any machine; no GPU or CUDA toolkit is needed
#   cargo test --release --features burn-cpu,cuda --test burn --no-run      # prints the path of TESTS
#   scripts/gpu_check.sh ODDSCAN OUT [WEIGHTS [SCANS [TESTS]]]
#
#   ODDSCAN   the binary
#   OUT       a folder for the figures; report.txt there gets everything that is printed
#   WEIGHTS   safetensors; their features are compared with those of the CPU in each number format
#   SCANS     a folder; it is scored on both devices
#   TESTS     the binary of tests/burn, for what only a GPU can show: several parts in a batch, patches left out,
#             tokens that stay on the GPU
#
# The last three may be ''. The machine needs the NVIDIA driver, libnvrtc, libcublasLt, and for f32 the CUDA headers.
# If Python has PyTorch, compare.py runs, too. If there is compute-sanitizer, it checks a small comparison and the
# encoder.
# Exit status: 0 if everything is equal within tolerance, 1 if not, 2 if it could not be checked.
set -uo pipefail

oddscan=$(realpath "${1:?"usage: $0 ODDSCAN OUT [WEIGHTS [SCANS [TESTS]]]"}")
out=${2:?"usage: $0 ODDSCAN OUT [WEIGHTS [SCANS [TESTS]]]"}
weights=${3:-} scans=${4:-} tests=${5:-}
here=$(dirname "$(realpath "$0")")
mkdir -p "$out"
exec > >(tee "$out/report.txt") 2>&1
report=$! sampler=
trap 'kill $sampler 2>/dev/null; exec >&- 2>&-; wait "$report"' EXIT

command -v nvidia-smi >/dev/null || { echo "no nvidia-smi: is the NVIDIA driver installed?" >&2; exit 2; }
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/gpu.txt"
nvidia-smi --id=0 --query-gpu=memory.used --format=csv,noheader,nounits --loop-ms=200 >"$out/memory" &
sampler=$!
status=0

[ -z "$tests" ] || "$tests" gpu:: --nocapture --test-threads=1 || status=1

# The smallest cosine between the features of a patch here and those of the CPU in f32.
check() {
    local precision=$1 floor=$2; shift 2
    local json
    json=$("$oddscan" bench encode --device cuda --precision "$precision" --json "$@") || { status=1; return; }
    echo "$json" | python3 -c '
import json, sys
found = json.load(sys.stdin)
print(found["settings"], "on", found["device"] + ":", round(found["rate"]), "slices/s, cosine", found["cosine"])
sys.exit(found["cosine"] < float(sys.argv[1]))' "$floor" || { echo "below $floor" >&2; status=1; }
}
network=(--network dinov2_vits14)
[ -z "$weights" ] || network=(--weights "$weights")
start=$(date +%s%N)
check f16 0.9999 "${network[@]}" --slices 56 --repeats 1
echo "first start: $((($(date +%s%N) - start) / 1000000)) ms"
check f16 0.9999 "${network[@]}"
check bf16 0.999 "${network[@]}"

# One scan against 200, whose tokens stay on the GPU: four layers over the whole volume, three views one patch around.
"$oddscan" bench score --device cuda --reach 0 --tokens 2300 --window 200 --grids 4 || status=1
"$oddscan" bench score --device cuda --reach 1 --tokens 1800 --window 200 --grids 3 || status=1

if [ -n "$scans" ] && [ -n "$weights" ]; then
    for device in cuda cpu; do
        printf '[encoder]\ndevice = "%s"\n[tokens]\nslice_stride = 7\n' "$device" >"$out/$device.toml"
        start=$(date +%s%N)
        ODDSCAN_WEIGHTS=$weights "$oddscan" score --force --config "$out/$device.toml" --out "$out/$device" --json \
            "$scans" >"$out/$device.json" || status=1
        echo "scored on $device: $((($(date +%s%N) - start) / 1000000)) ms"
    done
    python3 "$here/compare_results.py" "$out/cuda" "$out/cpu" || status=1
fi

"$oddscan" bench pipeline --device cuda "${network[@]}" --scans 24 || status=1
# Files must be read as fast as a large network encodes them. Good: the device is busy nearly all of the time.
"$oddscan" bench pipeline --device cuda --network dinov2_vitl14 --scans 48 || status=1
# Here, before other programs than oddscan take memory.
echo "GPU memory: $(head -n1 "$out/memory") MiB before, at most $(sort -n "$out/memory" | tail -n1) MiB"
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        # Only our own kernels count, which have these names. Faults of libraries are not ours to repair.
        compute-sanitizer --tool "$tool" "$oddscan" bench score --device cuda --tokens 700 --window 3 --repeats 1 \
            >"$out/$tool-score.txt" 2>&1
        compute-sanitizer --tool "$tool" "$oddscan" bench encode --device cuda --slices 14 --repeats 1 \
            >"$out/$tool-encode.txt" 2>&1
        if grep -hE " at (0x[0-9a-f]+ in )?(norms|nearest|distances|patches|tokens|add_norm|features|attention)\\b" \
            "$out/$tool"-*.txt; then
            echo "$tool found something in a kernel of ours" >&2
            status=1
        fi
    done
fi
if python3 -c "import torch" 2>/dev/null; then
    python3 "$here/../benches/compare/compare.py" "$oddscan" --precisions bf16 --batches 168 --window 200 --tokens 2300 \
        --networks dinov2_vits14 dinov2_vitb14 dinov2_vitl14 --repeats 4 --json "$out/compare.json" || status=1
fi
exit "$status"
