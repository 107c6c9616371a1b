//! `nbdcrypt`: dm-crypt without dm-crypt.

use std::process::ExitCode;

fn main() -> ExitCode {
    bootstrap::cli::main()
}
