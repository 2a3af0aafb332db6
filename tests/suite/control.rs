//! Functions and control flow: small models made by `tests/fixtures/control/make.py`, with what onnxruntime computes and
//! the gradients that PyTorch gives the same networks.

use retune::train::data::write_npz;

use crate::common::{Arrays, json, relative, run, shipped, text};

#[test]
fn functions_and_control_flow_give_onnxruntimes_outputs() {
    let report = json(&["test", text(&shipped("tests/fixtures/control")), "--json"], 0);
    let summary = &report["summary"];
    assert_eq!((&summary["passed"], &summary["unsupported"]), (&9.into(), &0.into()), "{report}");
}

#[test]
fn gradients_pass_through_functions_branches_and_loops() {
    for (case, inputs) in
        [("functions", &["x"][..]), ("if_constant", &["x"]), ("loop_fixed", &["x"]), ("scan", &["x"])]
    {
        let folder = shipped(&format!("tests/fixtures/control/{case}"));
        let expected = Arrays::read(&folder.join("grads.npz"));
        let dir = tempfile::tempdir().unwrap();
        let (feeds, out) = (dir.path().join("in.npz"), dir.path().join("out.npz"));
        let mut named: Vec<_> = inputs.iter().map(|i| (*i, expected.get(i))).collect();
        named.push(("target", expected.get("target")));
        write_npz(&feeds, &named).unwrap();
        let model = folder.join("model.onnx");
        let loss = ["--loss", "mse", "--output", text(&out)];
        run(&[&["grad", text(&model), "--inputs", text(&feeds)], &loss[..]].concat(), 0);
        let ours = Arrays::read(&out);
        let mut seen = 0;
        for (name, truth) in expected.with_prefix("grad.") {
            let e = relative(&truth.to_f64(), &ours.get(&format!("grad.{name}")).to_f64());
            assert!(e < 1e-5, "{case}: {name}: {e:.1e}");
            seen += 1;
        }
        assert!(
            seen > 0 && relative(&expected.get("loss").to_f64(), &ours.get("loss").to_f64()) < 1e-5,
            "{case}"
        );
    }
}

/// A course that only the run knows: forward it runs, a gradient through it is refused by name.
#[test]
fn gradients_through_an_unknown_course_are_refused() {
    for (case, op) in [("if_data", "If"), ("loop_while", "Loop"), ("loop_long", "Loop")] {
        let model = shipped(&format!("tests/fixtures/control/{case}/model.onnx"));
        let dir = tempfile::tempdir().unwrap();
        let (feeds, out) = (dir.path().join("in.npz"), dir.path().join("out.npz"));
        let x = retune::tensor::Tensor::from_slice(&[2, 3], &[0.5f32, 1.0, 2.0, 0.25, 0.75, 1.5]).unwrap();
        write_npz(&feeds, &[("x", &x), ("target", &x)]).unwrap();
        let args = ["grad", text(&model), "--inputs", text(&feeds), "--loss", "mse", "--output", text(&out)];
        let said = String::from_utf8(run(&args, 1).stderr).unwrap();
        assert!(
            said.contains(op) && said.contains("not known") || said.contains("known only in the run"),
            "{said}"
        );
    }
}

/// Weights inside a function and a branch train, and only their bytes in the file change.
#[test]
fn weights_in_functions_and_branches_are_written_back() {
    for (case, inner) in [("functions", "h/dense/b"), ("if_constant", "y/w")] {
        let model = shipped(&format!("tests/fixtures/control/{case}/model.onnx"));
        let dir = tempfile::tempdir().unwrap();
        let (data, new) = (dir.path().join("data.npz"), dir.path().join("new.onnx"));
        let x: Vec<f32> = (0..48).map(|i| (i as f32 * 0.7).sin()).collect();
        let x = retune::tensor::Tensor::from_slice(&[16, 3], &x).unwrap();
        let y = retune::tensor::Tensor::ints(&(0..16).map(|i| i % 3).collect::<Vec<_>>());
        write_npz(&data, &[("x", &x), ("y", &y)]).unwrap();
        let base =
            ["finetune", text(&model), "--data", text(&data), "--output", text(&new), "--train", inner];
        let more = ["--method", "supervised", "--epochs", "1", "--lr", "0.01", "--holdout", "0", "--json"];
        let summary = json(&[&base[..], &more].concat(), 0);
        let trained = summary["trained_parameters"].as_u64().unwrap() as usize;
        let (before, after) = (std::fs::read(&model).unwrap(), std::fs::read(&new).unwrap());
        assert_eq!(before.len(), after.len());
        let different: Vec<usize> = (0..before.len()).filter(|&i| before[i] != after[i]).collect();
        let span = different.last().unwrap() - different.first().unwrap();
        assert!(span < 4 * trained, "{case}: {span} bytes apart for {trained} parameters");
    }
}
