//! Sizes in bytes as people write and read them.

use crate::error::{Error, Result};

/// `64MiB`, `1.5GB`, `800kB`, `123456`: bytes as people write them. Fails on anything else, and on nothing.
pub fn parse(text: &str) -> Result<usize> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let factor = match unit.trim() {
        "" | "B" => 1.0,
        "kB" | "KB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "KiB" => 1024.0,
        "MiB" => 1048576.0,
        "GiB" => 1073741824.0,
        _ => f64::NAN,
    };
    let bytes = number.parse::<f64>().unwrap_or(f64::NAN) * factor;
    match (1.0..1e18).contains(&bytes) {
        true => Ok(bytes as usize),
        false => Err(Error::Config(format!(
            "'{text}' is not a size: write bytes, or a number with kB, MB, GB, KiB, MiB or GiB, as in 64MiB"
        ))),
    }
}

/// Bytes for people, in the units that budgets are mostly given in, rounded up: so much is enough.
pub fn human(bytes: usize) -> String {
    let tenths = |unit: f64| (bytes as f64 / unit * 10.0).ceil() / 10.0;
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..1048576 => format!("{:.1} KiB", tenths(1024.0)),
        1048576..1073741824 => format!("{:.1} MiB", tenths(1048576.0)),
        _ => format!("{:.1} GiB", tenths(1073741824.0)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_as_people_write_them() {
        let sizes = [
            ("64MiB", 64 << 20),
            ("1.5 GB", 1_500_000_000),
            ("800kB", 800_000),
            ("2KiB", 2048),
            ("123456", 123_456),
            ("3GiB", 3 << 30),
            ("7B", 7),
        ];
        for (text, bytes) in sizes {
            assert_eq!(parse(text).unwrap(), bytes, "{text}");
        }
        for bad in ["", "MiB", "64 MiBs", "64mib", "-1MB", "0", "1e9", "1..5MB", "nan", "inf"] {
            assert!(parse(bad).unwrap_err().to_string().contains("not a size"), "{bad}");
        }
        assert_eq!(human(3 << 20), "3.0 MiB");
        assert_eq!(human((3 << 20) + 1), "3.1 MiB");
    }
}
