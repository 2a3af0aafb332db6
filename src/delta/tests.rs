use super::*;
use crate::tensor::DType;

fn model(name: &str) -> Model {
    crate::import::load(format!("{}/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

/// Every weight a little off, of every third tensor only one element.
fn moved(model: &Model) -> Vec<(WeightId, Tensor)> {
    let ids = (0..model.weights.len() as u32).map(WeightId);
    ids.filter(|w| model.weight(*w).trainable)
        .map(|w| {
            let t = model.load_weight(w).unwrap();
            let sparse = w.0 % 3 == 0;
            let new: Vec<f64> = t
                .to_f64()
                .iter()
                .enumerate()
                .map(|(i, x)| if sparse && i != 1 { *x } else { x + 0.01 * ((i + 1) as f64).sin() })
                .collect();
            (w, Tensor::from_slice(t.dims(), &new).unwrap().cast(t.dtype()))
        })
        .collect()
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// Half floats, float64, external files, weights in Constant nodes and tied ones.
const FILES: [&str; 6] = [
    "models/dsnet.onnx",
    "tests/fixtures/files/types.onnx",
    "tests/fixtures/files/double.onnx",
    "tests/fixtures/files/shared.onnx",
    "tests/fixtures/files/external/model.onnx",
    "tests/fixtures/presets/lora.onnx",
];

#[test]
fn applied_deltas_are_the_export_byte_for_byte() {
    for name in FILES {
        let (base, dir) = (model(name), folder());
        let new = moved(&base);
        let changes: Vec<(WeightId, &Tensor)> = new.iter().map(|(w, t)| (*w, t)).collect();
        let at = |folder: &str, name: &str| {
            std::fs::create_dir_all(dir.path().join(folder)).unwrap();
            dir.path().join(folder).join(name)
        };
        let exported = export::write(&base, &changes, &at("export", "new.onnx"), Default::default()).unwrap();
        for kind in [DeltaType::Full, DeltaType::Sparse] {
            let delta = Delta::of(&base, &changes, kind).unwrap();
            assert_eq!(delta.max_error, 0.0);
            let path = at("deltas", &format!("{kind:?}.safetensors"));
            let written = delta.write(&path).unwrap();
            assert_eq!(written.bytes, std::fs::metadata(&path).unwrap().len());
            let read = Delta::read(&path).unwrap();
            assert_eq!(read, delta, "{name}");
            let folder = format!("{kind:?}");
            let applied = apply(&base, &read, &at(&folder, "new.onnx"), Default::default()).unwrap();
            assert_eq!(applied.files.len(), exported.files.len());
            for (a, b) in applied.files.iter().zip(&exported.files) {
                assert_eq!(a.file_name(), b.file_name());
                assert!(
                    std::fs::read(a).unwrap() == std::fs::read(b).unwrap(),
                    "{name} {kind:?}: {}",
                    a.display()
                );
            }
        }
        // The same from the two files.
        let between =
            Delta::between(&base, &crate::import::load(&exported.files[0]).unwrap(), DeltaType::Full);
        match between {
            // There a tensor comes apart in two.
            Err(_) if name.contains("shared") => {}
            between => {
                assert_eq!(between.unwrap(), Delta::of(&base, &changes, DeltaType::Full).unwrap(), "{name}")
            }
        }
    }
}

#[test]
fn halves_of_differences_keep_their_bounds() {
    for name in FILES {
        let base = model(name);
        let new = moved(&base);
        let changes: Vec<(WeightId, &Tensor)> = new.iter().map(|(w, t)| (*w, t)).collect();
        for (kind, relative) in [(DeltaType::F16, 2f64.powi(-11)), (DeltaType::Bf16, 2f64.powi(-8))] {
            let delta = Delta::of(&base, &changes, kind).unwrap();
            let mut worst = 0.0f64;
            let stored = delta.stored(&base).unwrap();
            for (w, t) in &new {
                let weight = base.weight(*w);
                let Some(bytes) = stored.get(w) else { continue };
                let exact = weight.restore(&weight.stored(&base.files).unwrap(), t).unwrap().unwrap();
                let of =
                    |bytes: &[u8]| Tensor::from_bytes(weight.dtype, &weight.dims, bytes).unwrap().to_f64();
                let before = base.load_weight(*w).unwrap().to_f64();
                for ((a, b), old) in of(bytes).iter().zip(of(&exact)).zip(before) {
                    let rounding = if weight.dtype == DType::F32 { b.abs() * 2f64.powi(-24) } else { 0.0 };
                    let bound = (b - old).abs() * relative + 2f64.powi(-25) + rounding;
                    assert!((a - b).abs() <= bound, "{name} {}: {a} for {b}, of {old}", weight.name);
                    worst = worst.max((a - b).abs());
                }
            }
            assert_eq!(delta.max_error, worst);
        }
    }
}

#[test]
fn wrong_bases_and_damaged_files_are_refused() {
    let (base, dir) = (model("models/dsnet.onnx"), folder());
    let new = moved(&base);
    let changes: Vec<(WeightId, &Tensor)> = new.iter().map(|(w, t)| (*w, t)).collect();
    let (path, output) = (dir.path().join("d.safetensors"), dir.path().join("new.onnx"));
    Delta::of(&base, &changes, DeltaType::Sparse).unwrap().write(&path).unwrap();
    let delta = Delta::read(&path).unwrap();
    let refused = apply(&model("models/resnet20.onnx"), &delta, &output, Default::default()).unwrap_err();
    assert!(refused.to_string().contains("SHA-256"), "{refused}");
    let bytes = std::fs::read(&path).unwrap();
    let bad = dir.path().join("bad.safetensors");
    for cut in [0, 4, 100, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&bad, &bytes[..cut]).unwrap();
        assert!(Delta::read(&bad).is_err(), "{cut} bytes");
    }
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    for at in [8, 60, header / 2, header, header + 1000, bytes.len() - 1] {
        let mut other = bytes.clone();
        other[at] ^= 1;
        std::fs::write(&bad, &other).unwrap();
        assert!(Delta::read(&bad).is_err(), "byte {at}");
    }
    assert!(Delta::read(&dir.path().join("none")).is_err());
    std::fs::write(&bad, std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/models/dsnet.onnx")).unwrap())
        .unwrap();
    assert!(Delta::read(&bad).unwrap_err().to_string().contains("no delta"));
    assert!(!output.exists());
    assert!(Delta::between(&base, &model("models/resnet20.onnx"), DeltaType::Full).is_err());
}

#[test]
fn differences_that_do_not_fit_are_refused() {
    let base = model("models/dsnet.onnx");
    let (w, mut t) = moved(&base).swap_remove(0);
    t.get_mut::<f32>().unwrap()[0] = 1e6;
    assert!(
        Delta::of(&base, &[(w, &t)], DeltaType::F16).unwrap_err().to_string().contains("--delta-type full")
    );
    Delta::of(&base, &[(w, &t)], DeltaType::Bf16).unwrap();
}
