//! Element types of eight bits and fewer: float8 and float4 formats, and integers of four and two bits.
//!
//! In memory each element takes a byte: a float its bits, an integer its value. They are stored and converted; nothing
//! is computed in them.

use crate::tensor::DType;

/// How a conversion to a narrow type rounds where that can be chosen (float8e8m0).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Round {
    #[default]
    Up,
    Down,
    Nearest,
}

/// What is done where a float has no representation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conversion {
    /// The largest number rather than infinity or NaN.
    pub saturate: bool,
    pub round: Round,
}

impl Default for Conversion {
    fn default() -> Self {
        Conversion { saturate: true, round: Round::Up }
    }
}

/// A small floating-point format.
#[derive(Debug, Clone, Copy)]
struct Format {
    /// Bits of the mantissa, and what the exponent is moved by.
    mantissa: i32,
    bias: i32,
    sign: u8,
    largest: f64,
    /// The bits of a quiet NaN and of infinity, where there are.
    nan: Option<u8>,
    infinity: Option<u8>,
    /// One zero only, and NaN where the negative one would be.
    unsigned_zero: bool,
}

const fn format(mantissa: i32, bias: i32, largest: f64, nan: u8) -> Format {
    Format { mantissa, bias, sign: 0x80, largest, nan: Some(nan), infinity: None, unsigned_zero: false }
}

fn format_of(dtype: DType) -> Option<Format> {
    Some(match dtype {
        DType::F8E4M3Fn => format(3, 7, 448.0, 0x7F),
        DType::F8E4M3Fnuz => Format { unsigned_zero: true, ..format(3, 8, 240.0, 0x80) },
        DType::F8E5M2 => Format { infinity: Some(0x7C), ..format(2, 15, 57344.0, 0x7E) },
        DType::F8E5M2Fnuz => Format { unsigned_zero: true, ..format(2, 16, 57344.0, 0x80) },
        DType::F4E2M1 => Format { sign: 0x8, nan: None, ..format(1, 1, 6.0, 0) },
        _ => return None,
    })
}

fn power(e: i32) -> f64 {
    2f64.powi(e)
}

impl Format {
    fn decode(&self, bits: u8) -> f64 {
        let magnitude = bits & (self.sign - 1);
        let negative = bits & self.sign != 0;
        if self.nan.is_some_and(|n| if self.unsigned_zero { bits == n } else { magnitude == n }) {
            return f64::NAN;
        }
        if let Some(infinity) = self.infinity
            && magnitude >= infinity
        {
            let sign = if negative { -1.0 } else { 1.0 };
            return if magnitude == infinity { sign * f64::INFINITY } else { f64::NAN };
        }
        let (exponent, fraction) =
            (magnitude as i32 >> self.mantissa, magnitude as i32 & ((1 << self.mantissa) - 1));
        let value = match exponent {
            0 => fraction as f64 * power(1 - self.bias - self.mantissa),
            e => (fraction + (1 << self.mantissa)) as f64 * power(e - self.bias - self.mantissa),
        };
        if negative { -value } else { value }
    }

    /// Rounded to nearest, halves to even.
    fn encode(&self, x: f64, saturate: bool) -> u8 {
        let sign = if x.is_sign_negative() { self.sign } else { 0 };
        let signed = |bits: u8| if bits == 0 && self.unsigned_zero { 0 } else { bits | sign };
        if x.is_nan() {
            // Without NaN it is the negative zero, as in ONNX's reference.
            return match self.nan {
                Some(n) if self.unsigned_zero => n,
                Some(n) => n | sign,
                None => self.sign,
            };
        }
        let a = x.abs();
        let least = 1 - self.bias;
        let exponent = if a.is_finite() && a > 0.0 { (a.log2().floor() as i32).max(least) } else { least };
        // log2 may be off by one at powers of two; halving the step there does no harm, doubling it would.
        let exponent =
            if a.is_finite() && power(exponent) > a { (exponent - 1).max(least) } else { exponent };
        let step = power(exponent - self.mantissa);
        let rounded = if a.is_finite() { (a / step).round_ties_even() * step } else { a };
        if rounded > self.largest {
            let top = self.bits(self.largest);
            return match (saturate, self.infinity, self.nan) {
                (true, _, _) | (_, None, None) => signed(top),
                (false, Some(infinity), _) => signed(infinity),
                (false, None, Some(nan)) if self.unsigned_zero => nan,
                (false, None, Some(nan)) => signed(nan),
            };
        }
        signed(self.bits(rounded))
    }

    /// The bits of a number that the format has, at least 0.
    fn bits(&self, a: f64) -> u8 {
        let least = 1 - self.bias;
        if a < power(least) {
            return (a / power(least - self.mantissa)) as u8;
        }
        let mut exponent = a.log2().floor() as i32;
        if power(exponent) > a {
            exponent -= 1;
        }
        let fraction = a / power(exponent - self.mantissa) - power(self.mantissa);
        (((exponent + self.bias) << self.mantissa) + fraction as i32) as u8
    }
}

impl DType {
    /// Is it a type of this module?
    pub fn is_narrow(self) -> bool {
        self.bits() < 8 || self == DType::F8E8M0 || format_of(self).is_some()
    }

    /// Bits of an element in a file.
    pub fn bits(self) -> usize {
        match self {
            DType::U4 | DType::I4 | DType::F4E2M1 => 4,
            DType::U2 | DType::I2 => 2,
            other => 8 * other.size(),
        }
    }

    /// The number that a byte in memory stands for.
    pub fn decode(self, bits: u8) -> f64 {
        match self {
            DType::U4 | DType::U2 => bits as f64,
            DType::I4 | DType::I2 => bits as i8 as f64,
            DType::F8E8M0 if bits == 0xFF => f64::NAN,
            DType::F8E8M0 => power(bits as i32 - 127),
            other => format_of(other).map_or(f64::NAN, |f| f.decode(bits)),
        }
    }

    /// The byte in memory that stands for a number. Integers truncate and wrap around.
    pub fn encode(self, x: f64, how: Conversion) -> u8 {
        let whole = x as i64;
        match self {
            DType::U4 => whole as u8 & 0xF,
            DType::U2 => whole as u8 & 0x3,
            DType::I4 => (((whole as u8) << 4) as i8 >> 4) as u8,
            DType::I2 => (((whole as u8) << 6) as i8 >> 6) as u8,
            DType::F8E8M0 => encode_exponent(x, how),
            other => format_of(other).map_or(0, |f| f.encode(x, how.saturate)),
        }
    }

    /// Elements from the packed form of a file: the first in the low bits.
    pub fn unpack(self, bytes: &[u8], count: usize) -> Vec<u8> {
        let bits = self.bits();
        let signed = matches!(self, DType::I4 | DType::I2);
        let one = |i: usize| {
            let raw = (bytes[i * bits / 8] >> (i * bits % 8)) << (8 - bits);
            if signed { (raw as i8 >> (8 - bits)) as u8 } else { raw >> (8 - bits) }
        };
        (0..count).map(one).collect()
    }
}

/// float8e8m0: a power of two, from 2⁻¹²⁷ to 2¹²⁷.
fn encode_exponent(x: f64, how: Conversion) -> u8 {
    if x.is_nan() || x < 0.0 {
        return 0xFF;
    }
    let over = if how.saturate { 0xFE } else { 0xFF };
    if x.is_infinite() {
        return over;
    }
    if x < power(-127) {
        return 0;
    }
    let mut below = x.log2().floor() as i32;
    if power(below) > x {
        below -= 1;
    }
    let exact = power(below) == x;
    let up = match how.round {
        Round::Up => !exact,
        Round::Down => false,
        Round::Nearest => x >= 1.5 * power(below),
    };
    match below + up as i32 {
        e if e > 127 => over,
        e => (e + 127) as u8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORMATS: [DType; 5] =
        [DType::F8E4M3Fn, DType::F8E4M3Fnuz, DType::F8E5M2, DType::F8E5M2Fnuz, DType::F4E2M1];

    #[test]
    fn every_number_survives_the_way_there_and_back() {
        for t in FORMATS {
            for bits in 0..1u16 << t.bits() {
                let bits = bits as u8;
                let x = t.decode(bits);
                let back = t.encode(x, Conversion { saturate: false, ..Conversion::default() });
                assert!(back == bits || x.is_nan() && t.decode(back).is_nan(), "{t} {bits:#x} {x} {back:#x}");
            }
        }
        for bits in 0..=255 {
            assert_eq!(DType::F8E8M0.encode(DType::F8E8M0.decode(bits), Conversion::default()), bits);
        }
    }

    #[test]
    fn numbers_round_to_the_nearest_even() {
        for t in FORMATS {
            let all: Vec<f64> =
                (0..1u16 << t.bits()).map(|b| t.decode(b as u8)).filter(|x| x.is_finite()).collect();
            let most = all.iter().fold(0.0f64, |m, x| m.max(*x));
            for i in -4000..4000 {
                let x = i as f64 / 4000.0 * most + 1e-5;
                let y = t.decode(t.encode(x, Conversion::default()));
                let best = all.iter().map(|a| (a - x).abs()).fold(f64::INFINITY, f64::min);
                assert_eq!((y - x).abs(), best, "{t}: {x} became {y}");
            }
        }
        let e4m3 = |x: f64| DType::F8E4M3Fn.decode(DType::F8E4M3Fn.encode(x, Conversion::default()));
        assert_eq!((e4m3(1.0625), e4m3(1.1875), e4m3(1e9), e4m3(-1e9)), (1.0, 1.25, 448.0, -448.0));
    }

    #[test]
    fn what_does_not_fit() {
        let strict = Conversion { saturate: false, ..Conversion::default() };
        assert!(DType::F8E4M3Fn.decode(DType::F8E4M3Fn.encode(1e9, strict)).is_nan());
        assert_eq!(DType::F8E5M2.decode(DType::F8E5M2.encode(-1e9, strict)), f64::NEG_INFINITY);
        assert_eq!(DType::F8E5M2Fnuz.encode(f64::NAN, strict), 0x80);
        assert_eq!(DType::F8E8M0.encode(5.0, Conversion::default()), 127 + 3);
        assert_eq!(DType::F8E8M0.encode(5.0, Conversion { round: Round::Nearest, ..strict }), 127 + 2);
    }

    #[test]
    fn packed_integers() {
        assert_eq!(DType::U4.unpack(&[0x21, 0x0F], 3), [1, 2, 15]);
        assert_eq!(DType::I4.unpack(&[0xF8], 2).iter().map(|b| *b as i8).collect::<Vec<_>>(), [-8, -1]);
        assert_eq!(
            DType::I2.unpack(&[0b1101_1000], 4).iter().map(|b| *b as i8).collect::<Vec<_>>(),
            [0, -2, 1, -1]
        );
        assert_eq!(DType::I4.encode(9.0, Conversion::default()) as i8, -7);
    }
}
