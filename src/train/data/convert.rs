//! Element types: which conversions data may undergo on its way into a model, and the conversions.

use half::{bf16, f16};

use crate::error::{Error, Result};
use crate::tensor::{DType, Elem, Tensor, to_bf16, to_f16};

/// Why data of type `from` cannot feed a value of type `to`; `None` when it can.
pub(super) fn refusal(from: DType, to: DType) -> Option<&'static str> {
    match (from, to) {
        (a, b) if a == b => None,
        (a, b) if a.is_float() && !b.is_float() => Some("rounding to integers would lose what they say"),
        (_, DType::Bool) => Some("only booleans are fed as booleans"),
        _ => None,
    }
}

/// The whole array in another type. Fails at the first element the new type cannot hold.
pub(super) fn array(name: &str, t: &Tensor, to: DType) -> Result<Tensor> {
    if let Some(why) = refusal(t.dtype(), to) {
        return Err(Error::Data(format!("array '{name}' is {}, {to} is wanted: {why}", t.dtype())));
    }
    let mut out = Tensor::zeros(to, t.dims());
    if let Some(i) = bytes(t.dtype(), t.bytes(), to, out.bytes_mut()) {
        return Err(unfit(name, t, i, &format!("does not fit {to}")));
    }
    Ok(out)
}

/// Fails at the first element that `to` cannot hold, converting nothing that is kept.
pub(super) fn check(name: &str, t: &Tensor, to: DType) -> Result<()> {
    let (from, n) = (t.dtype(), CHUNK);
    let mut scratch = [0u64; CHUNK];
    let scratch: &mut [u8] = bytemuck::cast_slice_mut(&mut scratch);
    for (k, src) in t.bytes().chunks(n * from.size()).enumerate() {
        let dst = &mut scratch[..src.len() / from.size() * to.size()];
        if let Some(i) = bytes(from, src, to, dst) {
            return Err(unfit(name, t, k * n + i, &format!("does not fit {to}")));
        }
    }
    Ok(())
}

/// Fails at the first element that is infinite or not a number.
pub(super) fn check_finite(name: &str, t: &Tensor) -> Result<()> {
    fn first<T: Elem>(t: &Tensor, bad: impl Fn(T) -> bool) -> Option<usize> {
        t.get::<T>().ok()?.iter().position(|&x| bad(x))
    }
    let at = match t.dtype() {
        DType::F32 => first::<f32>(t, |x| !x.is_finite()),
        DType::F64 => first::<f64>(t, |x| !x.is_finite()),
        DType::F16 => first::<f16>(t, |x| !x.is_finite()),
        DType::BF16 => first::<bf16>(t, |x| !x.is_finite()),
        _ => None,
    };
    at.map_or(Ok(()), |i| Err(unfit(name, t, i, "is not finite")))
}

fn unfit(name: &str, t: &Tensor, element: usize, what: &str) -> Error {
    let row = t.len() / t.dims().first().copied().unwrap_or(1).max(1);
    let size = t.dtype().size();
    let value = Tensor::from_bytes(t.dtype(), &[], &t.bytes()[element * size..(element + 1) * size])
        .map(|v| match t.dtype() {
            d if d.is_float() => v.to_f64().first().map(f64::to_string),
            DType::U64 => v.get::<u64>().ok().and_then(|x| x.first()).map(u64::to_string),
            _ => v.to_ints().ok().and_then(|x| x.first().map(i64::to_string)),
        })
        .ok()
        .flatten()
        .unwrap_or_default();
    Error::Data(format!(
        "array '{name}', sample {}: element {} is {value}, which {what}",
        element / row.max(1),
        element % row.max(1)
    ))
}

const CHUNK: usize = 256;

/// Converts `src` to as many elements of `dst`; returns the first element whose value `to` cannot hold (a finite
/// number that becomes infinite, an integer out of range). Types must pass [`refusal`].
pub(super) fn bytes(from: DType, src: &[u8], to: DType, dst: &mut [u8]) -> Option<usize> {
    let blocks = src.chunks(CHUNK * from.size()).zip(dst.chunks_mut(CHUNK * to.size()));
    let mut bad = None;
    for (k, (s, d)) in blocks.enumerate() {
        let n = s.len() / from.size();
        let at = if to.is_float() {
            let mut wide = [0f64; CHUNK];
            widen_float(from, s, &mut wide[..n]);
            narrow_float(to, &wide[..n], d)
        } else {
            let mut wide = [0i128; CHUNK];
            widen_int(from, s, &mut wide[..n]);
            narrow_int(to, &wide[..n], d)
        };
        bad = bad.or(at.map(|i| k * CHUNK + i));
    }
    bad
}

// Rows of a dense array may start anywhere: elements are read and written as bytes.
fn read<T: Elem, W>(src: &[u8], out: &mut [W], f: impl Fn(T) -> W) {
    for (s, o) in src.chunks_exact(size_of::<T>()).zip(out) {
        *o = f(bytemuck::pod_read_unaligned(s));
    }
}

fn write<T: Elem, W: Copy>(wide: &[W], out: &mut [u8], f: impl Fn(W) -> Option<T>) -> Option<usize> {
    let mut bad = None;
    for (i, (&w, o)) in wide.iter().zip(out.chunks_exact_mut(size_of::<T>())).enumerate() {
        match f(w) {
            Some(x) => o.copy_from_slice(bytemuck::bytes_of(&x)),
            None => bad = bad.or(Some(i)),
        }
    }
    bad
}

fn widen_float(from: DType, src: &[u8], out: &mut [f64]) {
    match from {
        DType::F32 => read(src, out, |x: f32| x as f64),
        DType::F64 => read(src, out, |x: f64| x),
        DType::F16 => read(src, out, |x: f16| x.to_f64()),
        DType::BF16 => read(src, out, |x: bf16| x.to_f64()),
        DType::I8 => read(src, out, |x: i8| x as f64),
        DType::I16 => read(src, out, |x: i16| x as f64),
        DType::I32 => read(src, out, |x: i32| x as f64),
        DType::I64 => read(src, out, |x: i64| x as f64),
        DType::U8 | DType::Bool => read(src, out, |x: u8| x as f64),
        DType::U16 => read(src, out, |x: u16| x as f64),
        DType::U32 => read(src, out, |x: u32| x as f64),
        DType::U64 => read(src, out, |x: u64| x as f64),
        narrow => read(src, out, |x: u8| narrow.decode(x)),
    }
}

fn narrow_float(to: DType, wide: &[f64], dst: &mut [u8]) -> Option<usize> {
    match to {
        DType::F32 => write(wide, dst, |x| Some(x as f32).filter(|y| y.is_finite() || !x.is_finite())),
        DType::F16 => write(wide, dst, |x| Some(to_f16(x)).filter(|y| y.is_finite() || !x.is_finite())),
        DType::BF16 => write(wide, dst, |x| Some(to_bf16(x)).filter(|y| y.is_finite() || !x.is_finite())),
        _ => write(wide, dst, Some),
    }
}

fn widen_int(from: DType, src: &[u8], out: &mut [i128]) {
    match from {
        DType::I8 => read(src, out, |x: i8| x as i128),
        DType::I16 => read(src, out, |x: i16| x as i128),
        DType::I32 => read(src, out, |x: i32| x as i128),
        DType::I64 => read(src, out, |x: i64| x as i128),
        DType::U16 => read(src, out, |x: u16| x as i128),
        DType::U32 => read(src, out, |x: u32| x as i128),
        DType::U64 => read(src, out, |x: u64| x as i128),
        _ => read(src, out, |x: u8| x as i128),
    }
}

fn narrow_int(to: DType, wide: &[i128], dst: &mut [u8]) -> Option<usize> {
    match to {
        DType::I8 => write(wide, dst, |x| i8::try_from(x).ok()),
        DType::I16 => write(wide, dst, |x| i16::try_from(x).ok()),
        DType::I32 => write(wide, dst, |x| i32::try_from(x).ok()),
        DType::I64 => write(wide, dst, |x| i64::try_from(x).ok()),
        DType::U16 => write(wide, dst, |x| u16::try_from(x).ok()),
        DType::U32 => write(wide, dst, |x| u32::try_from(x).ok()),
        DType::U64 => write(wide, dst, |x| u64::try_from(x).ok()),
        _ => write(wide, dst, |x| u8::try_from(x).ok()),
    }
}

/// `a, b, c and 4 more`
pub(super) fn listed<'a>(names: impl Iterator<Item = &'a str>, most: usize) -> String {
    let names: Vec<_> = names.collect();
    let shown = names[..names.len().min(most)].join(", ");
    match names.len().saturating_sub(most) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_allowed_pair_converts_small_integers() {
        for from in DType::WIDE {
            for to in DType::WIDE {
                let src = Tensor::ints(&[0, 1, 1]).cast(from);
                match array("x", &src, to) {
                    Ok(t) => assert_eq!((t.to_f64(), t.dtype()), (vec![0.0, 1.0, 1.0], to), "{from} to {to}"),
                    Err(e) => assert!(refusal(from, to).is_some(), "{from} to {to}: {e}"),
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let t = Tensor::from_slice(&[2, 300], &[1.0f64; 600]).unwrap();
        let mut t = t;
        t.get_mut::<f64>().unwrap()[301] = 1e300;
        let e = array("x", &t, DType::F32).unwrap_err().to_string();
        assert!(e.contains("sample 1: element 1 is 1") && e.contains("float32"), "{e}");
        let e = check("x", &t, DType::F32).unwrap_err().to_string();
        assert!(e.contains("sample 1: element 1"), "{e}");
        let t = Tensor::from_slice(&[2], &[1u64, u64::MAX]).unwrap();
        let e = array("y", &t, DType::I64).unwrap_err().to_string();
        assert!(e.contains("sample 1") && e.contains("18446744073709551615"), "{e}");
        let t = Tensor::from_slice(&[2], &[f32::NAN, 0.0]).unwrap();
        assert!(check_finite("x", &t).unwrap_err().to_string().contains("sample 0"));
    }
}
