//! Times forward passes of an ONNX file in tract: `peer-tract MODEL BATCH THREADS RUNS` prints a JSON list of
//! milliseconds, after one pass that is not timed.

use std::time::Instant;

use tract_linalg::multithread::{Executor, set_default_executor};
use tract_onnx::prelude::*;
use tract_onnx::tract_hir::infer::Factoid;

fn main() -> TractResult<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [path, numbers @ ..] = &args[..] else { panic!("usage: peer-tract MODEL BATCH THREADS RUNS") };
    let numbers: Vec<usize> = numbers.iter().map(|n| n.parse()).collect::<Result<_, _>>()?;
    let [batch, threads, runs] = numbers[..] else { panic!("usage: peer-tract MODEL BATCH THREADS RUNS") };
    if threads > 1 {
        set_default_executor(Executor::multithread(threads));
    }
    let mut model = tract_onnx::onnx()
        .with_ignore_output_shapes(true)
        .with_ignore_value_info(true)
        .model_for_path(path)?;
    let mut inputs = TVec::new();
    for i in 0..model.input_outlets()?.len() {
        let fact = model.input_fact(i)?.clone();
        let rank = fact.shape.rank().concretize().expect("an input of known rank") as usize;
        let shape: Vec<usize> = (0..rank)
            .map(|d| match d {
                0 => batch,
                _ => fact.shape.dim(d).and_then(|d| d.concretize()?.to_i64().ok()).expect("a fixed size")
                    as usize,
            })
            .collect();
        let count = shape.iter().product::<usize>();
        let tensor = match fact.datum_type.concretize().expect("an input of known type") {
            DatumType::F32 => {
                let wave: Vec<f32> = (0..count).map(|i| (i as f32 * 0.37).sin()).collect();
                Tensor::from_shape(&shape, &wave)?
            }
            DatumType::I64 => {
                let ids: Vec<i64> = (0..count).map(|i| (i * 7919 % 30000) as i64).collect();
                Tensor::from_shape(&shape, &ids)?
            }
            other => panic!("an input of {other:?}"),
        };
        model.set_input_fact(i, InferenceFact::dt_shape(tensor.datum_type(), &shape))?;
        inputs.push(tensor.into_tvalue());
    }
    let model = model.into_optimized()?.into_runnable()?;
    model.run(inputs.clone())?;
    let mut times = Vec::new();
    for _ in 0..runs {
        let start = Instant::now();
        model.run(inputs.clone())?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    println!("{times:?}");
    Ok(())
}
