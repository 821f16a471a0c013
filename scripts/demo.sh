#!/usr/bin/env bash
# Sets up, builds, fetches the encoder's weights and runs the demo. Arguments go to `oddscan demo`.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
cargo build
cargo run --quiet -- model fetch
exec cargo run --quiet -- demo "$@"
