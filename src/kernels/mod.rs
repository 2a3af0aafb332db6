//! Kernels: they know slices and dimensions, nothing else. All SIMD and nearly all `unsafe` is here.

pub mod conv;
pub mod elementwise;
pub mod gemm;
pub mod index;
pub mod integer;
pub mod isa;
pub mod layout;
pub mod loss;
pub mod lrn;
pub mod math;
pub mod norm;
pub mod pad;
pub mod par;
pub mod peak;
pub mod pool;
pub mod quant;
pub mod random;
pub mod reduce;
pub mod simd;
pub mod softmax;
pub mod strided;
pub mod tile;
pub mod topk;
pub mod update;
