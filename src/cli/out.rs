//! Standard output. A reader that goes away before the end (`retune … | head`) ends the process quietly.

use std::fmt::Arguments;
use std::io::{ErrorKind, Write, stdout};

/// Writes text to standard output; whoever cannot be told anything more needs no message either.
pub fn write(text: Arguments) {
    let mut out = stdout().lock();
    if let Err(e) = out.write_fmt(text).and_then(|()| out.flush()) {
        if e.kind() != ErrorKind::BrokenPipe {
            eprintln!("error: standard output: {e}");
        }
        std::process::exit(i32::from(e.kind() != ErrorKind::BrokenPipe));
    }
}

/// As `print!`.
macro_rules! out {
    ($($text:tt)*) => { $crate::cli::out::write(format_args!($($text)*)) };
}

/// As `println!`.
macro_rules! outln {
    () => { $crate::cli::out::write(format_args!("\n")) };
    ($($text:tt)*) => { $crate::cli::out::write(format_args!("{}\n", format_args!($($text)*))) };
}
