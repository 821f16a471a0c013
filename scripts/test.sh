#!/usr/bin/env bash
# Sets up and runs every check: format, lints, tests, docs, and that the CUDA build type-checks.
set -euo pipefail
cd "$(dirname "$0")/.."
# promtool (of prometheus) checks metrics, rules and queries. systemd-analyze (of systemd) checks units. dcm2niix
# converts the same DICOM series as oddscan, and dcmtk compresses some of them. bindfs mounts a folder that sends no
# events. valgrind counts instructions.
scripts/setup.sh prometheus systemd dcm2niix dcmtk bindfs valgrind
command -v cargo-nextest >/dev/null || cargo install --locked cargo-nextest

# nibabel reads the files that oddscan writes. highdicom and pydicom write DICOM series, and pylibjpeg compresses
# them. scikit-learn and MedPy compute the figures a second time. SimpleITK applies the transforms.
venv=target/test-venv
if ! "$venv/bin/python" -c 'import nibabel, medpy, sklearn, highdicom, openjpeg, SimpleITK' 2>/dev/null; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet nibabel medpy scikit-learn highdicom \
        pylibjpeg pylibjpeg-openjpeg SimpleITK -r tests/reference/requirements.txt
fi
export ODDSCAN_PYTHON="$PWD/$venv/bin/python"

export RUSTFLAGS="${RUSTFLAGS:-}" RUSTDOCFLAGS="-D warnings"
set -x
cargo fmt --check
"$ODDSCAN_PYTHON" tests/reference/make_goldens.py --check
cargo clippy --all-targets --features burn-cpu -- -D warnings
cargo nextest run --features burn-cpu
cargo test --doc --features burn-cpu
benches/instructions.py
cargo doc --no-deps --features burn-cpu
cargo check --no-default-features
cargo check --features cuda
