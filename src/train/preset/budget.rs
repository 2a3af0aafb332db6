//! What `sparse:` is given.

use std::fmt;
use std::str::FromStr;

use crate::size;

/// A size, or a share of something.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Amount {
    Bytes(usize),
    Share(f64),
}

/// The memory that training may take beyond a forward pass (a share: of what full training takes beyond it), and the
/// multiply-adds of a step (a share of full training's): `512KiB`, `25%`, `25%/60%`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Budget {
    pub memory: Amount,
    pub time: Option<f64>,
}

fn share(s: &str) -> Option<f64> {
    let percent = s.strip_suffix('%')?.trim().parse::<f64>().ok();
    percent.filter(|x| x.is_finite() && *x > 0.0).map(|x| x / 100.0)
}

fn amount(s: &str) -> Option<Amount> {
    if s.ends_with('%') {
        return share(s).map(Amount::Share);
    }
    size::parse(s).ok().map(Amount::Bytes)
}

impl FromStr for Budget {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let (memory, time) = match s.split_once('/') {
            Some((m, t)) => (m, Some(t)),
            None => (s, None),
        };
        let time = time.map(|t| share(t).ok_or(t)).transpose();
        match (amount(memory.trim()), time) {
            (Some(memory), Ok(time)) => Ok(Budget { memory, time }),
            _ => Err(format!(
                "'sparse:{s}': takes a size such as 512KiB or a share such as 25% of full training's extra memory, then \
                 perhaps / and a share of its multiply-adds"
            )),
        }
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.memory {
            Amount::Bytes(n) => write!(f, "{n}B")?,
            Amount::Share(x) => write!(f, "{}%", x * 100.0)?,
        }
        match self.time {
            Some(x) => write!(f, "/{}%", x * 100.0),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_shares() {
        let of = |s: &str| s.parse::<Budget>().map(|b| (b.memory, b.time));
        assert_eq!(of("512KiB").unwrap(), (Amount::Bytes(512 << 10), None));
        assert_eq!(of("1.5MB").unwrap(), (Amount::Bytes(1_500_000), None));
        assert_eq!(of("100").unwrap(), (Amount::Bytes(100), None));
        assert_eq!(of("25%").unwrap(), (Amount::Share(0.25), None));
        assert_eq!(of("8MiB/60%").unwrap(), (Amount::Bytes(8 << 20), Some(0.6)));
        for bad in ["", "x", "-1KiB", "0%", "25%/2", "25%/", "nan%", "1TB?"] {
            assert!(of(bad).is_err(), "{bad}");
        }
        assert_eq!("25%/60%".parse::<Budget>().unwrap().to_string(), "25%/60%");
    }
}
