//! The command line: see `retune --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    retune::cli::main()
}
