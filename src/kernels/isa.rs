//! The instruction set level, chosen once at run time, and loops compiled for each level.
#![allow(unsafe_code)]

use std::sync::OnceLock;

/// What the processor can do, lowest first. Code written with plain arithmetic gives the same bits on each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain arithmetic, in the target's baseline (SSE2, NEON).
    Portable,
    /// NEON, by its own instructions.
    Neon,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
}

/// The level in use: the processor's, or a lower one that the environment variable `RETUNE_ISA`
/// (`portable`, `avx2`, `avx512`) forces.
pub fn isa() -> Isa {
    static LEVEL: OnceLock<Isa> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        let forced = match std::env::var("RETUNE_ISA").as_deref() {
            Ok("portable") => Isa::Portable,
            Ok("avx2") => Isa::Avx2,
            _ => Isa::Avx512,
        };
        forced.min(detect())
    })
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Isa {
    if !(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")) {
        Isa::Portable
    } else if is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
    {
        Isa::Avx512
    } else {
        Isa::Avx2
    }
}

#[cfg(target_arch = "aarch64")]
fn detect() -> Isa {
    Isa::Neon
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn detect() -> Isa {
    Isa::Portable
}

/// Has the processor, at the level in use, an instruction that multiplies pairs of bfloat16 and adds them up in `f32`?
pub fn has_pair_products() -> bool {
    static HAS: OnceLock<bool> = OnceLock::new();
    *HAS.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        return isa() == Isa::Avx512 && is_x86_feature_detected!("avx512bf16");
        #[cfg(target_arch = "aarch64")]
        return isa() == Isa::Neon && std::arch::is_aarch64_feature_detected!("bf16");
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        false
    })
}

/// Has the processor matrix registers for pairs of bfloat16 ([`matrix`](crate::kernels::matrix)), and is no level of vectors forced?
pub fn has_matrix_products() -> bool {
    static HAS: OnceLock<bool> = OnceLock::new();
    *HAS.get_or_init(|| {
        std::env::var_os("RETUNE_ISA").is_none() && has_pair_products() && crate::kernels::matrix::permitted()
    })
}

/// How pairs of bfloat16 are multiplied, where precision allows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Products {
    /// Not at all: elements are.
    Elements,
    /// By vectors.
    Pairs,
    /// In blocks, by matrix registers.
    Blocks,
}

/// The fastest way that the processor has, unless the environment variable `RETUNE_PRODUCTS` names one, `pairs` or `blocks`, and the
/// processor has vectors of pairs (in tests: whatever it has).
fn products() -> Products {
    static PRODUCTS: OnceLock<Products> = OnceLock::new();
    *PRODUCTS.get_or_init(|| match std::env::var("RETUNE_PRODUCTS").as_deref() {
        Ok("pairs") if has_pair_products() || cfg!(test) => Products::Pairs,
        Ok("blocks") if has_pair_products() || cfg!(test) => Products::Blocks,
        _ if has_matrix_products() => Products::Blocks,
        _ if has_pair_products() && !halves_pairs() => Products::Pairs,
        _ => Products::Elements,
    })
}

/// Does the processor multiply vectors of pairs at half the rate of other vectors or less, so that elements are multiplied faster? Intel's do.
fn halves_pairs() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        let vendor = std::arch::x86_64::__cpuid(0);
        [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat() == b"GenuineIntel"
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Are pairs of bfloat16 multiplied at all?
pub fn multiplies_pairs() -> bool {
    products() != Products::Elements
}

/// Are they multiplied in blocks by matrix registers, rather than by vectors?
pub fn multiplies_blocks() -> bool {
    products() == Products::Blocks
}

/// As [`vectorize`] with AVX2 at most: for sweeps that read and write memory more than they compute. With
/// AVX-512 a normalisation took more than twice as long.
#[inline(always)]
pub fn vectorize_sweep<R>(f: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,fma")]
        fn avx2<R>(f: impl FnOnce() -> R) -> R {
            f()
        }
        if isa() >= Isa::Avx2 {
            // SAFETY: `isa` reports a level only where the processor has its features.
            return unsafe { avx2(f) };
        }
    }
    f()
}

/// Runs `f` compiled for the processor at hand, so that its plain loops are vectorised with wide registers. Write the closure as
/// `#[inline(always)] || …`, and call only inlinable functions in its loops: what is not inlined is compiled
/// for the baseline.
#[inline(always)]
pub fn vectorize<R>(f: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,fma")]
        fn avx2<R>(f: impl FnOnce() -> R) -> R {
            f()
        }
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
        fn avx512<R>(f: impl FnOnce() -> R) -> R {
            f()
        }
        match isa() {
            // SAFETY: `isa` reports a level only where the processor has its features.
            Isa::Avx512 => return unsafe { avx512(f) },
            // SAFETY: as above.
            Isa::Avx2 => return unsafe { avx2(f) },
            Isa::Portable | Isa::Neon => {}
        }
    }
    f()
}

/// Which element types' loops are worth [`vectorize`]: `f32`, the type that networks compute in.
pub trait Wide {
    #[inline(always)]
    fn wide<R>(f: impl FnOnce() -> R) -> R {
        f()
    }
}

impl Wide for f32 {
    #[inline(always)]
    fn wide<R>(f: impl FnOnce() -> R) -> R {
        vectorize(f)
    }
}

macro_rules! plain {
    ($($t:ty),*) => { $(impl Wide for $t {})* };
}
plain!(f64, half::f16, half::bf16, i8, i16, i32, i64, u8, u16, u32, u64);
