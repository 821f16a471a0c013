#!/usr/bin/env bash
# Sets up, builds, fetches the weights of the encoder and runs the demo. `oddscan demo` gets the arguments.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
cargo build
cargo run --quiet -- model fetch
exec cargo run --quiet -- demo "$@"
