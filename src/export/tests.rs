use std::fs;
use std::path::Path;

use prost::Message;
use tempfile::tempdir;

use super::*;
use crate::import::make::*;
use crate::import::proto::*;
use crate::import::{self, Encoding};
use crate::tensor::DType;

fn entries(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fn id(m: &Model, name: &str) -> WeightId {
    m.find_weight(name).unwrap()
}

fn nudged(m: &Model, name: &str) -> Tensor {
    let mut t = m.load_weight(id(m, name)).unwrap();
    match t.dtype() {
        DType::F64 => t.get_mut::<f64>().unwrap().iter_mut().for_each(|x| *x += 1.0),
        _ => t.get_mut::<f32>().unwrap().iter_mut().for_each(|x| *x += 1.0),
    }
    t
}

fn values(m: &Model, name: &str) -> Vec<f64> {
    m.load_weight(id(m, name)).unwrap().to_f64()
}

/// One weight of each encoding, with an unknown field, trailing `Identity` as the output.
fn every_encoding() -> Vec<u8> {
    let le = |v: &[f32]| bytes::Bytes::from(v.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>());
    let empty = |name: &str, n: i64, data_type: i32| TensorProto {
        name: name.into(),
        dims: vec![n],
        data_type,
        ..Default::default()
    };
    let varints = |v: &[u64]| {
        let mut out = Vec::new();
        v.iter().for_each(|&b| import::wire::put_varint(&mut out, b));
        bytes::Bytes::from(out)
    };
    let tensors = vec![
        ramp("raw", &[2]),
        TensorProto { float_data: Chunks(vec![le(&[1.0, 2.0])]), ..empty("packed", 2, 1) },
        TensorProto { float_data: Chunks(vec![le(&[1.0]), le(&[2.0, 3.0])]), ..empty("chunked", 3, 1) },
        TensorProto { double_data: Chunks::from(4f64.to_le_bytes().to_vec()), ..empty("double", 1, 11) },
        TensorProto {
            int32_data: Chunks(vec![varints(&[0x3c00]), varints(&[0, 1])]),
            ..empty("half", 3, 10)
        },
        TensorProto { raw_data: Some(vec![0x80, 0x3f].into()), ..empty("bf16", 1, 16) },
        ints("shape", &[3, 2]),
    ];
    let constant = |a: AttributeProto, out: &str| with(node("Constant", &[], &[out]), a);
    let half = TensorProto { int32_data: Chunks(vec![varints(&[0x3c00, 0x4000])]), ..empty("", 2, 10) };
    let nodes = vec![
        constant(AttributeProto { t: Some(Box::new(ramp("", &[2]))), ..attr("value", 4) }, "tensor"),
        constant(AttributeProto { t: Some(Box::new(half)), ..attr("value", 4) }, "half_node"),
        constant(
            AttributeProto { floats: Chunks(vec![le(&[1.0, 2.0])]), ..attr("value_floats", 6) },
            "floats",
        ),
        constant(AttributeProto { f: Some(le(&[2.5])), ..attr("value_float", 1) }, "float"),
        constant(attr("value_float", 1), "zero"),
        node("ConstantOfShape", &["shape"], &["filled"]),
        node("MatMul", &["x", "filled"], &["h"]),
        node("Identity", &["h"], &["y"]),
    ];
    let mut bytes = vec![0x98, 0x3e, 0x2a]; // field 995, which nobody knows
    bytes.extend(model(nodes, tensors, "y").encode_to_vec());
    bytes
}

#[test]
fn without_changes_the_same_bytes_and_with_one_only_its_own() {
    let dir = tempdir().unwrap();
    let (input, output) = (dir.path().join("m.onnx"), dir.path().join("n.onnx"));
    let original = every_encoding();
    fs::write(&input, &original).unwrap();
    let m = import::load(&input).unwrap();
    assert_eq!(m.weights.len(), 12);
    let same: Vec<Tensor> = m.weights.iter().map(|w| w.load(&m.files).unwrap()).collect();
    let all: Vec<(WeightId, &Tensor)> =
        same.iter().enumerate().map(|(i, t)| (WeightId(i as u32), t)).collect();
    let written = write(&m, &all, &output, Options::default()).unwrap();
    assert!(written.changed.is_empty());
    assert_eq!(fs::read(&output).unwrap(), original);

    for (i, w) in m.weights.iter().enumerate() {
        let new = nudged(&m, &w.name);
        let written = write(&m, &[(WeightId(i as u32), &new)], &output, Options::default()).unwrap();
        assert_eq!(written.changed, [WeightId(i as u32)]);
        assert_eq!(entries(dir.path()), ["m.onnx", "n.onnx"]);
        let again = import::load(&output).unwrap();
        assert_eq!(again.weights.len(), m.weights.len(), "{}", w.name);
        for v in &m.weights {
            let want = if v.name == w.name { new.to_f64() } else { values(&m, &v.name) };
            assert_eq!(values(&again, &v.name), want, "{} after a change of {}", v.name, w.name);
            let v2 = &again.weights[id(&again, &v.name).index()];
            assert_eq!((v2.dtype, &v2.dims, v2.role), (v.dtype, &v.dims, v.role));
        }
        let bytes = fs::read(&output).unwrap();
        assert_eq!(bytes[..3], original[..3]);
        match &w.location.encoding {
            Encoding::Varints { .. } => {}
            Encoding::Filled { .. } => {
                assert!(again.weights[id(&again, &w.name).index()].location.encoding == Encoding::Raw);
            }
            _ => {
                let l = &w.location;
                assert_eq!(bytes.len(), original.len());
                assert_eq!(bytes[..l.offset], original[..l.offset]);
                assert_eq!(bytes[l.offset + l.len..], original[l.offset + l.len..]);
                assert_ne!(bytes[l.offset..l.offset + l.len], original[l.offset..l.offset + l.len]);
            }
        }
    }
    // All at once, and over itself.
    let new: Vec<Tensor> = m.weights.iter().map(|w| nudged(&m, &w.name)).collect();
    let all: Vec<(WeightId, &Tensor)> =
        new.iter().enumerate().map(|(i, t)| (WeightId(i as u32), t)).collect();
    write(&m, &all, &input, Options::default()).unwrap();
    let again = import::load(&input).unwrap();
    for (w, t) in m.weights.iter().zip(&new) {
        assert_eq!(values(&again, &w.name), t.to_f64(), "{}", w.name);
    }
    // The map of the replaced file still holds.
    assert_eq!(&m.files[0].bytes[..], &original[..]);
}

#[test]
fn a_split_weight_gets_bytes_of_its_own_only_when_it_differs() {
    let nodes = vec![
        node("Identity", &["zero"], &["b3"]),
        node("Gemm", &["x", "w1", "zero"], &["a"]),
        node("Gemm", &["a", "w2", "zero"], &["b"]),
        node("Gemm", &["b", "w3", "b3"], &["y"]),
    ];
    let init = vec![ramp("w1", &[3, 3]), ramp("w2", &[3, 3]), ramp("w3", &[3, 3]), zeros("zero", &[3])];
    for ir_version in [8, 3] {
        let mut proto = model(nodes.clone(), init.clone(), "y");
        proto.ir_version = ir_version;
        let dir = tempdir().unwrap();
        let output = dir.path().join("n.onnx");
        let m = import(&proto).unwrap();
        let original = proto.encode_to_vec();
        let own = |name: &str, v: f32| (id(&m, name), Tensor::from_slice(&[3], &[v; 3]).unwrap());
        let attempt = |changes: &[(WeightId, Tensor)]| {
            let refs: Vec<(WeightId, &Tensor)> = changes.iter().map(|(i, t)| (*i, t)).collect();
            write(&m, &refs, &output, Options::default()).unwrap();
            let again = import::load(&output).unwrap();
            let v = ["zero", "zero.2", "b3"].map(|n| values(&again, n)[0]);
            (v, fs::read(&output).unwrap().len() as i64 - original.len() as i64)
        };
        // All alike: they go on sharing.
        assert_eq!(attempt(&[own("zero", 2.0), own("zero.2", 2.0), own("b3", 2.0)]), ([2.0; 3], 0));
        // The source alone changes: the others keep what they had.
        assert_eq!(attempt(&[own("zero", 2.0)]).0, [2.0, 0.0, 0.0]);
        assert_eq!(attempt(&[own("b3", 2.0)]).0, [0.0, 0.0, 2.0]);
        assert_eq!(attempt(&[own("zero.2", 2.0)]).0, [0.0, 2.0, 0.0]);
        assert_eq!(attempt(&[own("zero", 1.0), own("zero.2", 2.0), own("b3", 3.0)]).0, [1.0, 2.0, 3.0]);
        let again = import::load(&output).unwrap();
        assert!(again.weights.iter().all(|w| w.split.is_none()));
        assert_eq!(again.ops.get("Constant").copied().unwrap_or(0), if ir_version == 3 { 2 } else { 0 });
    }
}

#[test]
fn a_filled_weight_of_an_old_file_becomes_a_constant_node() {
    let mut proto = model(
        vec![node("ConstantOfShape", &["shape"], &["w"]), node("MatMul", &["x", "w"], &["y"])],
        vec![ints("shape", &[3, 2])],
        "y",
    );
    proto.ir_version = 3;
    let dir = tempdir().unwrap();
    let m = import(&proto).unwrap();
    let new = nudged(&m, "w");
    write(&m, &[(id(&m, "w"), &new)], &dir.path().join("n.onnx"), Options::default()).unwrap();
    let bytes = fs::read(dir.path().join("n.onnx")).unwrap();
    let graph = ModelProto::decode(&bytes[..]).unwrap().graph.unwrap();
    assert_eq!((graph.node.len(), graph.initializer.len()), (2, 1));
    assert_eq!(graph.node[0].op_type, "Constant");
    assert_eq!(values(&import::load(dir.path().join("n.onnx")).unwrap(), "w"), [1.0; 6]);
}

#[test]
fn changes_that_do_not_fit_leave_nothing_behind() {
    let dir = tempdir().unwrap();
    let output = dir.path().join("n.onnx");
    let m = import(&model(vec![node("Add", &["x", "b"], &["y"])], vec![ramp("b", &[3])], "y")).unwrap();
    let b = id(&m, "b");
    let wrong = Tensor::zeros(DType::F32, &[2]);
    let good = Tensor::zeros(DType::F32, &[3]);
    assert!(write(&m, &[(b, &wrong)], &output, Options::default()).unwrap_err().to_string().contains("'b'"));
    assert!(write(&m, &[(b, &good), (b, &good)], &output, Options::default()).is_err());
    assert!(write(&m, &[(WeightId(9), &good)], &output, Options::default()).is_err());
    assert!(write(&m, &[(b, &good)], &dir.path().join("none/n.onnx"), Options::default()).is_err());
    assert!(write(&m, &[(b, &good)], Path::new("/"), Options::default()).is_err());
    fs::create_dir(dir.path().join("folder")).unwrap();
    assert!(write(&m, &[(b, &good)], &dir.path().join("folder"), Options::default()).is_err());
    drop(stage(&m, &[(b, &good)], &output, Options::default()).unwrap());
    assert_eq!(entries(dir.path()), ["folder"]);
    let staged = stage(&m, &[(b, &good)], &output, Options::default()).unwrap();
    assert_eq!(values(&import::load(staged.path()).unwrap(), "b"), [0.0; 3]);
    assert_eq!(staged.commit().unwrap().files, std::slice::from_ref(&output));
    assert_eq!(entries(dir.path()), ["folder", "n.onnx"]);
}

fn external(folder: &Path) -> PathBuf {
    let tensor = |name: &str, location: &str, offset: usize, n: i64| {
        let entry = |key: &str, value: String| StringStringEntryProto { key: key.into(), value };
        TensorProto {
            name: name.into(),
            dims: vec![n],
            data_type: 1,
            data_location: EXTERNAL,
            external_data: vec![
                entry("location", location.into()),
                entry("offset", offset.to_string()),
                entry("length", (4 * n).to_string()),
            ],
            ..Default::default()
        }
    };
    fs::create_dir_all(folder.join("sub")).unwrap();
    let data: Vec<u8> = (0..8).flat_map(|i| (i as f32).to_le_bytes()).collect();
    fs::write(folder.join("m.data"), &data).unwrap();
    fs::write(folder.join("sub/other"), &data).unwrap();
    let init =
        vec![tensor("a", "m.data", 4, 2), tensor("b", "m.data", 16, 3), tensor("c", "sub/other", 0, 3)];
    let nodes = vec![
        node("Add", &["x", "a"], &["h"]),
        node("Add", &["h", "b"], &["i"]),
        node("Add", &["i", "c"], &["y"]),
    ];
    let path = folder.join("m.onnx");
    fs::write(&path, model(nodes, init, "y").encode_to_vec()).unwrap();
    path
}

#[test]
fn external_data_goes_beside_the_output() {
    let dir = tempdir().unwrap();
    let m = import::load(external(dir.path())).unwrap();
    let new = nudged(&m, "b");
    let change = [(id(&m, "b"), &new)];
    let other = dir.path().join("out");
    fs::create_dir(&other).unwrap();
    let written = write(&m, &change, &other.join("n.onnx"), Options::default()).unwrap();
    assert_eq!(written.files, [other.join("n.onnx"), other.join("sub/other"), other.join("m.data")]);
    let again = import::load(other.join("n.onnx")).unwrap();
    assert_eq!(values(&again, "a"), [1.0, 2.0]);
    assert_eq!(values(&again, "b"), [5.0, 6.0, 7.0]);
    assert_eq!(fs::read(other.join("n.onnx")).unwrap(), fs::read(dir.path().join("m.onnx")).unwrap());
    // A second export over the first.
    write(&m, &change, &other.join("n.onnx"), Options::default()).unwrap();
    assert_eq!(entries(&other), ["m.data", "n.onnx", "sub"]);

    // In the source's own folder: refused, unless the data may get a new name.
    let before = fs::read(dir.path().join("m.data")).unwrap();
    let beside = dir.path().join("n.onnx");
    let e = write(&m, &change, &beside, Options::default()).unwrap_err().to_string();
    assert!(e.contains("--rename-data"), "{e}");
    assert_eq!(entries(dir.path()), ["m.data", "m.onnx", "out", "sub"]);
    let staged = stage(&m, &change, &beside, Options { rename_data: true }).unwrap();
    // While staged, the files that stay where they are can be seen too.
    assert_eq!(values(&import::load(staged.path()).unwrap(), "c"), [0.0, 1.0, 2.0]);
    let written = staged.commit().unwrap();
    assert_eq!(written.files, [beside.clone(), dir.path().join("n.onnx.data")]);
    assert_eq!(entries(dir.path()), ["m.data", "m.onnx", "n.onnx", "n.onnx.data", "out", "sub"]);
    assert_eq!(fs::read(dir.path().join("m.data")).unwrap(), before);
    let again = import::load(&beside).unwrap();
    assert_eq!(again.files[1].location, "n.onnx.data");
    assert_eq!((values(&again, "a"), values(&again, "b")), (vec![1.0, 2.0], vec![5.0, 6.0, 7.0]));
    assert_eq!(values(&again, "c"), [0.0, 1.0, 2.0]);
    // Nothing external changed: nothing is in the way.
    write(&m, &[], &dir.path().join("p.onnx"), Options::default()).unwrap();
    assert!(write(&m, &[], &dir.path().join("m.data"), Options::default()).is_err());
    assert_eq!(fs::read(dir.path().join("m.data")).unwrap(), before);
}

#[test]
fn tensors_that_lie_over_each_other_change_together_and_checksums_do_not_go_stale() {
    let dir = tempdir().unwrap();
    let out = dir.path().join("out");
    fs::create_dir(&out).unwrap();
    fs::write(dir.path().join("w"), [0u8; 16]).unwrap();
    let tensor = |name: &str, location: &str, offset: &str| {
        let entry = |key: &str, value: &str| StringStringEntryProto { key: key.into(), value: value.into() };
        TensorProto {
            name: name.into(),
            dims: vec![2],
            data_type: 1,
            data_location: EXTERNAL,
            external_data: vec![
                entry("location", location),
                entry("offset", offset),
                entry("checksum", "abc"),
            ],
            ..Default::default()
        }
    };
    let nodes = vec![
        node("Add", &["x", "a"], &["h"]),
        node("Add", &["h", "b"], &["i"]),
        node("Add", &["i", "c"], &["y"]),
    ];
    let init = vec![tensor("a", "w", "0"), tensor("b", "./w", "0"), tensor("c", "w", "8")];
    let path = dir.path().join("m.onnx");
    fs::write(&path, model(nodes, init, "y").encode_to_vec()).unwrap();
    let m = import::load(&path).unwrap();
    assert_eq!(m.files.len(), 2);
    let (one, two) = (nudged(&m, "a"), Tensor::from_slice(&[2], &[2f32, 2.0]).unwrap());
    let (a, b) = (id(&m, "a"), id(&m, "b"));
    let to = out.join("n.onnx");
    assert!(write(&m, &[(a, &one)], &to, Options::default()).unwrap_err().to_string().contains("lies over"));
    assert!(write(&m, &[(a, &one), (b, &two)], &to, Options::default()).is_err());
    write(&m, &[(a, &one), (b, &one)], &to, Options::default()).unwrap();
    let again = import::load(&to).unwrap();
    assert_eq!((values(&again, "a"), values(&again, "c")), (vec![1.0; 2], vec![0.0; 2]));
    let proto = ModelProto::decode(&fs::read(&to).unwrap()[..]).unwrap();
    let entries: Vec<usize> =
        proto.graph.unwrap().initializer.iter().map(|t| t.external_data.len()).collect();
    assert_eq!(entries, [2, 2, 3]);
}

/// Whatever damaged bytes are imported as, an export of them is a model again, or an error.
#[test]
fn exports_of_damaged_models_are_models_or_errors() {
    let original = every_encoding();
    let mut state = 7u64;
    let mut random = |n: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % n
    };
    let mut exported = 0;
    for _ in 0..2000 {
        let mut bytes = original.clone();
        for _ in 0..1 + random(2) {
            let at = random(bytes.len());
            bytes[at] ^= 1 << random(8);
        }
        let Ok(m) = import::from_bytes("m", bytes) else { continue };
        let small = m.weights.iter().enumerate().filter(|(_, w)| w.len() < 1000);
        let new: Vec<(WeightId, Tensor)> = small
            .filter_map(|(i, w)| {
                Some((WeightId(i as u32), w.load(&m.files).ok().map(|_| nudged(&m, &w.name))?))
            })
            .collect();
        let refs: Vec<(WeightId, &Tensor)> = new.iter().map(|(i, t)| (*i, t)).collect();
        if let Ok(bytes) = to_bytes(&m, &refs) {
            import::from_bytes("m", bytes).unwrap();
            exported += 1;
        }
    }
    assert!(exported > 300, "{exported}");
}

/// The real files: unchanged they come back byte for byte, and one changed weight changes only its range.
#[test]
fn real_models_come_back_byte_for_byte() {
    let dir = tempdir().unwrap();
    let output = dir.path().join("n.onnx");
    for name in ["models/resnet20.onnx", "ppocr/cls.onnx", "magika/model.onnx", "light/light_squeezenet.onnx"]
    {
        let Some(path) = model_file(name) else { continue };
        let original = fs::read(&path).unwrap();
        let m = import::load(&path).unwrap();
        let same: Vec<Tensor> = m.weights.iter().map(|w| w.load(&m.files).unwrap()).collect();
        let all: Vec<(WeightId, &Tensor)> =
            same.iter().enumerate().map(|(i, t)| (WeightId(i as u32), t)).collect();
        write(&m, &all, &output, Options::default()).unwrap();
        assert!(fs::read(&output).unwrap() == original, "{name}");
        let w = m.weights.iter().find(|w| w.trainable).unwrap();
        let new = nudged(&m, &w.name);
        write(&m, &[(id(&m, &w.name), &new)], &output, Options::default()).unwrap();
        let bytes = fs::read(&output).unwrap();
        if !matches!(w.location.encoding, Encoding::Filled { .. }) {
            let range = w.location.offset..w.location.offset + w.location.len;
            assert!(bytes.len() == original.len());
            let outside =
                bytes.iter().zip(&original).enumerate().filter(|(i, (a, b))| a != b && !range.contains(i));
            assert_eq!(outside.count(), 0, "{name}");
        }
        assert_eq!(values(&import::load(&output).unwrap(), &w.name), new.to_f64(), "{name}");
    }
}

#[test]
fn without_tract_there_is_no_opinion() {
    if cfg!(not(feature = "tract")) {
        let v = verify(Path::new("m.onnx"), &[], &[]);
        assert!(matches!(v, Verification::Unavailable(why) if why.contains("without tract")));
    }
    let t = |v: &[f32]| vec![("y".to_string(), Tensor::from_slice(&[v.len()], v).unwrap())];
    let agrees = |a: &[f32], b: &[f32]| matches!(verify::compare(&t(a), &t(b)), Verification::Agrees { .. });
    assert!(agrees(&[100.0, 0.05], &[100.0, 0.0]));
    assert!(!agrees(&[100.0, 0.2], &[100.0, 0.0]));
    assert!(!agrees(&[f32::NAN], &[1.0]));
    assert!(!agrees(&[1.0], &[1.0, 1.0]));
    assert!(matches!(verify::compare(&[], &t(&[1.0])), Verification::Unavailable(_)));
}

#[cfg(feature = "tract")]
#[test]
fn tract_agrees_with_itself_and_not_with_another() {
    let nodes = vec![node("Gemm", &["x", "w", "b"], &["y"])];
    let mut proto = model(nodes, vec![ramp("w", &[3, 3]), ramp("b", &[3])], "y");
    proto.graph.as_mut().unwrap().output[0] = value("y", &[-1, 3]);
    let dir = tempdir().unwrap();
    let path = dir.path().join("m.onnx");
    fs::write(&path, proto.encode_to_vec()).unwrap();
    let feeds = [("x".to_string(), Tensor::from_slice(&[2, 3], &[1f32, 0.0, 0.0, 0.0, 1.0, 0.0]).unwrap())];
    // x·W + b with W = 0.5, 1.5, … by rows and b = 0.5, 1.5, 2.5
    let want = |bump: f32| {
        let y = [1.0, 3.0, 5.0 + bump, 4.0, 6.0, 8.0];
        [("y".to_string(), Tensor::from_slice(&[2, 3], &y).unwrap())]
    };
    assert!(
        matches!(verify(&path, &feeds, &want(0.0)), Verification::Agrees { .. }),
        "{:?}",
        verify::run(&path, &feeds)
    );
    assert!(
        matches!(verify(&path, &feeds, &want(1.0)), Verification::Disagrees { output, .. } if output == "y")
    );
    fs::write(&path, b"nonsense").unwrap();
    assert!(matches!(verify(&path, &feeds, &want(0.0)), Verification::Unavailable(_)));
}

#[cfg(feature = "tract")]
#[test]
fn tract_runs_the_real_models() {
    for (name, dims) in [("models/resnet20.onnx", [2, 1, 28, 28]), ("ppocr/cls.onnx", [2, 3, 48, 192])] {
        let Some(path) = model_file(name) else { continue };
        let m = import::load(&path).unwrap();
        let x = m.graph.value(m.graph.inputs[0]).name.clone();
        let n = dims.iter().product::<usize>();
        let pixels: Vec<f32> = (0..n).map(|i| (i % 97) as f32 / 97.0).collect();
        let feeds = [(x, Tensor::from_slice(&dims, &pixels).unwrap())];
        let out = verify::run(&path, &feeds).unwrap();
        println!("{name}: {:?} {:?}", out, out[0].1.to_f64());
        assert_eq!(out[0].0, m.output_names().next().unwrap());
        assert_eq!(out[0].1.dims()[0], 2);
        assert!(
            matches!(verify(&path, &feeds, &out), Verification::Agrees { max_relative } if max_relative == 0.0)
        );
        // A changed weight is seen.
        let dir = tempdir().unwrap();
        let w = m.weights.iter().rfind(|w| w.trainable).unwrap();
        let mut new = w.load(&m.files).unwrap();
        new.get_mut::<f32>().unwrap()[0] += 1.0;
        let staged =
            stage(&m, &[(id(&m, &w.name), &new)], &dir.path().join("n.onnx"), Options::default()).unwrap();
        assert!(matches!(verify(&staged.path(), &feeds, &out), Verification::Disagrees { .. }));
    }
}
