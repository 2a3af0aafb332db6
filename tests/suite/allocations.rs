//! A step takes all its memory before it runs.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use retune::exec::{OptimizerState, Options, Precision};
use retune::tensor::{Tensor, View};
use retune::train::optimizer::Optimizer;

use crate::common::shipped;
use crate::layout::step_by;

thread_local! {
    static TAKEN: Cell<usize> = const { Cell::new(0) };
}

/// Counts what each thread allocates.
struct Counting;

// SAFETY: everything is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        TAKEN.set(TAKEN.get() + 1);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(p, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn a_step_allocates_nothing() {
    for (model, image) in [
        ("models/resnet20.onnx", [4, 1, 28, 28]),
        ("models/dsnet.onnx", [4, 1, 28, 28]),
        ("tests/fixtures/mobilenetv2.onnx", [2, 3, 32, 32]),
    ] {
        allocates_nothing(model, &image, Optimizer::sgd(), Options { threads: 1, ..Options::default() });
        let narrow = Options {
            threads: 1,
            precision: Precision::F16,
            master_free: true,
            optimizer_state: OptimizerState::EightBit,
            ..Options::default()
        };
        allocates_nothing(model, &image, Optimizer::adam(0.0, true), narrow);
    }
}

fn allocates_nothing(model: &str, image: &[usize], optimizer: Optimizer, options: Options) {
    let (mut session, step) = step_by(&shipped(model), image, optimizer, options.clone());
    let x = Tensor::from_slice(image, &vec![0.5f32; image.iter().product()]).unwrap();
    let y = Tensor::from_slice(&image[..1], &vec![1i64; image[0]]).unwrap();
    let fed: [(_, View); 2] = [(step.inputs[0], x.view()), (step.attached.target, y.view())];
    let counted = |session: &mut retune::exec::Session| {
        // The session's one thread does all the work.
        session.install(|| TAKEN.set(0));
        session.run(&step.program, &fed, 0).unwrap();
        session.install(|| TAKEN.get())
    };
    counted(&mut session);
    assert_eq!(counted(&mut session), 0, "{model} {options:?}");
}
