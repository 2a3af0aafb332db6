//! Eight bits for a moment: codes of a dynamic map, blocks that each keep their largest magnitude.
//!
//! Dettmers, Lewis, Shleifer and Zettlemoyer, *8-bit Optimizers via Block-wise Quantization* (2022): of a code's bits
//! the leading zeros give a power of ten, the rest behind a one a linear fraction in 0.1 … 1, so that both large and very
//! small elements keep some digits. Unlike there the largest code is 1 on both sides, and what is not zero and has no sign
//! (a second moment, which divides) never becomes zero.

use std::sync::LazyLock;

/// Elements that share a largest magnitude.
pub const BLOCK: usize = 256;
/// Bytes in front of a block's codes: the magnitude.
const HEAD: usize = size_of::<f32>();

/// Bytes that hold so many elements.
pub fn packed(elements: usize) -> usize {
    elements + elements.div_ceil(BLOCK) * HEAD
}

/// The bytes in front of those of element `first`, which begins a block.
pub(super) fn offset(first: usize) -> usize {
    first / BLOCK * (BLOCK + HEAD)
}

/// Buckets of magnitudes by exponent and seven bits of mantissa, from 2⁻²⁶ to 1.
const LEAST: u32 = (127 - 26) << 7;
const BUCKETS: usize = 26 * 128 + 1;

/// The codes of magnitudes in 0 … 1, in rising order.
pub struct Map {
    values: [f32; 256],
    /// Between a value and the next; infinite after the last.
    middle: [f32; 256],
    /// The code of the smallest magnitude of each bucket; within one, at most one more code begins.
    bucket: [u32; BUCKETS],
    signed: bool,
}

/// Of moments with a sign, which is the code's highest bit.
static SIGNED: LazyLock<Map> = LazyLock::new(|| Map::new(true));
/// Of second moments.
static UNSIGNED: LazyLock<Map> = LazyLock::new(|| Map::new(false));

impl Map {
    pub fn of(signed: bool) -> &'static Map {
        if signed { &SIGNED } else { &UNSIGNED }
    }

    fn new(signed: bool) -> Map {
        let bits = if signed { 7 } else { 8 };
        let mut values = vec![0.0f64];
        for zeros in (0..bits).rev() {
            let fractions = 1usize << (bits - 1 - zeros);
            for k in 0..fractions {
                let fraction = 0.1 + 0.9 * (k as f64 + 0.5) / fractions as f64;
                values.push(fraction * 10f64.powi(-zeros));
            }
        }
        if let Some(last) = values.last_mut() {
            *last = 1.0;
        }
        let mut map = Map { values: [1.0; 256], middle: [f32::INFINITY; 256], bucket: [0; BUCKETS], signed };
        for (i, v) in values.iter().enumerate() {
            map.values[i] = *v as f32;
            if let Some(next) = values.get(i + 1) {
                map.middle[i] = ((v + next) / 2.0) as f32;
            }
        }
        let mut code = 0;
        for (i, bucket) in map.bucket.iter_mut().enumerate() {
            let least = f32::from_bits((LEAST + i as u32) << 16);
            while least > map.middle[code] {
                code += 1;
            }
            *bucket = code as u32;
        }
        map
    }

    /// The nearest code of a magnitude in 0 … 1.
    #[inline(always)]
    fn nearest(&self, size: f32) -> u32 {
        let at = (size.to_bits() >> 16).saturating_sub(LEAST);
        let code = self.bucket[(at as usize).min(BUCKETS - 1)] & 0xFF;
        code + u32::from(size > self.middle[code as usize])
    }

    /// Codes of at most [`BLOCK`] elements, to `packed` bytes.
    #[inline(always)]
    pub(super) fn encode(&self, x: &[f32], packed: &mut [u8]) {
        let largest = x.iter().fold(0.0, |m: f32, x| m.max(x.abs()));
        let (head, codes) = packed.split_at_mut(HEAD);
        head.copy_from_slice(&largest.to_le_bytes());
        let unit = if largest > 0.0 { largest } else { 1.0 };
        // In loops of one thing each, which are vectorised.
        let mut sizes = [0.0f32; BLOCK];
        let mut nearest = [0u32; BLOCK];
        sizes.iter_mut().zip(x).for_each(|(s, x)| *s = (x.abs() / unit).min(1.0));
        nearest.iter_mut().zip(&sizes).for_each(|(n, s)| *n = self.nearest(*s));
        match self.signed {
            true => nearest
                .iter_mut()
                .zip(x)
                .for_each(|(n, x)| *n |= (u32::from(*n > 0) & x.to_bits() >> 31) << 7),
            false => nearest.iter_mut().zip(x).for_each(|(n, x)| *n = (*n).max(u32::from(*x != 0.0))),
        }
        codes.iter_mut().zip(&nearest).for_each(|(c, n)| *c = *n as u8);
    }

    /// What [`encode`](Self::encode) kept.
    #[inline(always)]
    pub(super) fn decode(&self, packed: &[u8], x: &mut [f32]) {
        let (head, codes) = packed.split_at(HEAD);
        let largest = f32::from_le_bytes([head[0], head[1], head[2], head[3]]);
        for (x, code) in x.iter_mut().zip(codes) {
            let (code, sign) = match self.signed {
                true => (code & 0x7F, u32::from(code & 0x80) << 24),
                false => (*code, 0),
            };
            *x = f32::from_bits(self.values[usize::from(code)].to_bits() | sign) * largest;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_is_its_own_code_and_the_nearest_is_taken() {
        for signed in [true, false] {
            let map = Map::of(signed);
            let codes = if signed { 128 } else { 256 };
            assert!(map.values[..codes].is_sorted_by(|a, b| a < b) && map.values[codes - 1] == 1.0);
            for code in 0..codes {
                assert_eq!(map.nearest(map.values[code]) as usize, code);
            }
            for code in 0..codes - 1 {
                let middle = map.middle[code];
                let around = [middle, middle.next_up()].map(|m| map.nearest(m) as usize);
                assert_eq!(around, [code, code + 1]);
            }
            for i in 0..100_000 {
                let x = (i as f32 / 100_000.0).powi(6);
                let best = (0..codes).min_by(|a, b| {
                    let off = |c: usize| (f64::from(map.values[c]) - f64::from(x)).abs();
                    off(*a).total_cmp(&off(*b))
                });
                let (found, best) = (map.nearest(x) as usize, best.unwrap());
                let off = |c: usize| (f64::from(map.values[c]) - f64::from(x)).abs();
                assert!(off(found) <= off(best) * (1.0 + 1e-5), "{x}: {found}, not {best}");
            }
        }
    }

    #[test]
    fn blocks_keep_their_largest_and_second_moments_stay_above_zero() {
        let x: Vec<f32> = (0..BLOCK).map(|i| (i as f32 * 0.7).sin() * 10f32.powi(-(i as i32 % 7))).collect();
        let mut bytes = vec![0; packed(BLOCK)];
        let mut back = vec![0.0; BLOCK];
        Map::of(true).encode(&x, &mut bytes);
        Map::of(true).decode(&bytes, &mut back);
        let largest = x.iter().fold(0.0, |m: f32, x| m.max(x.abs()));
        for (a, b) in x.iter().zip(&back) {
            // A decade has at least one code of the fewest, and 64 of the largest.
            let slack = if a.abs() > 0.1 * largest { 0.01 * largest } else { 0.5 * a.abs() + 1e-6 * largest };
            assert!((a - b).abs() <= slack, "{a} becomes {b}");
        }
        assert!(back.iter().any(|b| b.abs() == largest));
        let squares: Vec<f32> = x.iter().map(|x| x * x).collect();
        Map::of(false).encode(&squares, &mut bytes);
        Map::of(false).decode(&bytes, &mut back);
        assert!(squares.iter().zip(&back).all(|(a, b)| (*a > 0.0) == (*b > 0.0)));
        // Nothing stays nothing.
        Map::of(true).encode(&[0.0; 3], &mut bytes[..7]);
        Map::of(true).decode(&bytes[..7], &mut back[..3]);
        assert_eq!(back[..3], [0.0; 3]);
        assert_eq!((packed(0), packed(1), packed(256), packed(257)), (0, 5, 260, 265));
    }
}
