//! The binary `oddscan`: arguments in, exit code out.

use std::process::ExitCode;

fn main() -> ExitCode {
    oddscan::cli::main()
}
