use super::*;

fn array(dims: &[usize]) -> Tensor {
    let n: usize = dims.iter().product();
    let x: Vec<f32> = (0..n).map(|i| i as f32).collect();
    Tensor::from_slice(dims, &x).unwrap()
}

fn message<T>(r: Result<T>) -> String {
    match r {
        Ok(_) => panic!("no error"),
        Err(e) => e.to_string(),
    }
}

fn one(dtype: DType, dims: &[Option<usize>]) -> [InputSpec; 1] {
    [InputSpec::new("pixel_values", dtype, dims)]
}

fn labelled() -> Dataset {
    Dataset::from_arrays(vec![("x".into(), array(&[5, 2, 3]))], Some(Tensor::ints(&[0, 1, 2, 1, 0]))).unwrap()
}

#[test]
fn batches_pick_rows_and_reuse_their_memory() {
    let d = labelled().bind(&one(DType::F32, &[None, Some(2), None])).unwrap();
    let mut b = d.new_batch(2);
    let at = b.inputs[0].1.bytes().as_ptr();
    d.batch(&[4, 1], None, &mut b).unwrap();
    assert_eq!(b.inputs[0].0, "pixel_values");
    let want: Vec<f32> = (24..30).chain(6..12).map(|i| i as f32).collect();
    assert_eq!(b.inputs[0].1.get::<f32>().unwrap(), want);
    assert_eq!(b.target.as_ref().unwrap().get::<i64>().unwrap(), [0, 1]);
    d.batch(&[0, 3], None, &mut b).unwrap();
    assert_eq!(b.inputs[0].1.bytes().as_ptr(), at);
    d.batch(&[2], None, &mut b).unwrap();
    assert_eq!((b.len(), b.inputs[0].1.dims()), (1, [1, 2, 3].as_slice()));
    assert!(message(d.batch(&[5], None, &mut b)).contains("sample 5"));
    assert_eq!(d.target_classes(), Some(3));
    assert!(message(d.check_labels(2)).contains("sample 2: label 2"));
    d.check_labels(3).unwrap();
    let s = d.subset(&[3, 3, 0]).unwrap();
    assert_eq!((s.len(), s.labels().unwrap()), (3, [1, 1, 0].as_slice()));
    s.batch(&[1], None, &mut b).unwrap();
    assert_eq!(b.inputs[0].1.get::<f32>().unwrap()[0], 18.0);
}

#[test]
fn inputs_are_matched_by_name() {
    let two = [InputSpec::new("b", DType::F32, &[]), InputSpec::new("a", DType::I64, &[])];
    let arrays = || {
        vec![
            ("a".to_string(), Tensor::ints(&[1, 2])),
            ("b".into(), array(&[2, 2])),
            ("c".into(), array(&[2])),
        ]
    };
    let d = Dataset::from_arrays(arrays(), None).unwrap().bind(&two).unwrap();
    assert_eq!(d.input_names().collect::<Vec<_>>(), ["b", "a"]);
    assert!(d.notes()[0].contains("not used: c"));
    assert!(message(d.require_target()).contains("no target"));
    let missing = [two[0].clone(), InputSpec::new("mask", DType::Bool, &[])];
    let e = message(Dataset::from_arrays(arrays(), None).unwrap().bind(&missing));
    assert!(e.contains("'mask'") && e.contains("a, b, c") && !e.contains("'x'"), "{e}");
    let e = message(Dataset::from_arrays(arrays(), None).unwrap().bind(&one(DType::F32, &[])));
    assert!(e.contains("'pixel_values' (or 'x')"), "{e}");
    let e = message(labelled().bind(&one(DType::F32, &[Some(1), Some(3), None])));
    assert!(e.contains("[N, 2, 3]") && e.contains("[N, 3, ?]"), "{e}");
    let e = message(Dataset::from_arrays(arrays(), None).unwrap().bind(&[two[1].clone(), two[1].clone()]));
    assert!(e.contains("two inputs"), "{e}");
}

#[test]
fn types_are_converted_to_the_models() {
    let x = || array(&[2, 3]).cast(DType::F64);
    let d = Dataset::from_arrays(vec![("x".into(), x())], None).unwrap();
    for dtype in [DType::F32, DType::F16, DType::BF16, DType::F64] {
        let d = d.clone().bind(&one(dtype, &[None, Some(3)])).unwrap();
        let mut b = d.new_batch(1);
        d.batch(&[1], None, &mut b).unwrap();
        assert_eq!((b.inputs[0].1.dtype(), b.inputs[0].1.to_f64()), (dtype, vec![3.0, 4.0, 5.0]));
    }
    assert!(message(d.clone().bind(&one(DType::I64, &[]))).contains("is float64"));
    // Bytes stay bytes until a batch asks for floats.
    let bytes = Tensor::from_slice(&[2, 2], &[0u8, 255, 7, 8]).unwrap();
    let d =
        Dataset::from_arrays(vec![("x".into(), bytes)], None).unwrap().bind(&one(DType::F32, &[])).unwrap();
    assert_eq!(d.bytes(), 4);
    assert!(d.notes()[0].contains("not scaled"), "{:?}", d.notes());
    let mut b = d.new_batch(2);
    d.batch(&[1, 0], None, &mut b).unwrap();
    assert_eq!(b.inputs[0].1.get::<f32>().unwrap(), [7.0, 8.0, 0.0, 255.0]);
    // Integers keep their type, or fit another one.
    let ids = |v: &[i64]| Dataset::from_arrays(vec![("x".into(), Tensor::ints(v))], None).unwrap();
    let d = ids(&[1, 70000]).bind(&one(DType::I32, &[None])).unwrap();
    let mut b = d.new_batch(2);
    d.batch(&[0, 1], None, &mut b).unwrap();
    assert_eq!(b.inputs[0].1.get::<i32>().unwrap(), [1, 70000]);
    assert!(message(ids(&[1, 70000]).bind(&one(DType::U16, &[]))).contains("sample 1"));
    let neg = Tensor::from_slice(&[2], &[0i8, -1]).unwrap();
    let e = message(Dataset::from_arrays(vec![("x".into(), neg)], None).unwrap().bind(&one(DType::U64, &[])));
    assert!(e.contains("sample 1: element 0 is -1"), "{e}");
}

#[test]
fn targets() {
    let with = |t: Tensor| Dataset::from_arrays(vec![("x".into(), array(&[2, 1]))], Some(t));
    let i32s = Tensor::from_slice(&[2, 1], &[3i32, 4]).unwrap();
    assert_eq!(with(i32s.clone()).unwrap().labels().unwrap(), [3, 4]);
    let d = with(i32s).unwrap().float_target(&[1]).unwrap();
    assert_eq!((d.target().unwrap().dims(), d.target().unwrap().dtype()), ([2, 1].as_slice(), DType::F32));
    assert!(message(with(array(&[2, 2])).unwrap().float_target(&[3])).contains("[2]"));
    let soft = with(array(&[2, 4]).cast(DType::F64)).unwrap();
    assert_eq!(
        (soft.target().unwrap().dtype(), soft.labels(), soft.target_classes()),
        (DType::F32, None, None)
    );
    assert!(message(with(Tensor::ints(&[1]))).contains("'x' has 2, 'target' has 1"));
    assert!(message(with(Tensor::scalar(1i64))).contains("scalar"));
    assert!(message(with(Tensor::ints(&[0, -1])).unwrap().check_labels(4)).contains("sample 1: label -1"));
    let nan = Tensor::from_slice(&[2], &[0.0, f32::INFINITY]).unwrap();
    assert!(message(with(nan)).contains("'target', sample 1"));
    let mut x = array(&[3, 4]);
    x.get_mut::<f32>().unwrap()[9] = f32::NAN;
    let e = message(Dataset::from_arrays(vec![("x".into(), x)], None));
    assert!(e.contains("'x', sample 2: element 1 is NaN"), "{e}");
    assert!(message(Dataset::from_arrays(vec![], None)).contains("no input"));
    assert!(message(Dataset::from_arrays(vec![("x".into(), array(&[0, 3]))], None)).contains("no samples"));
}

#[test]
fn shifts_follow_the_sample_not_the_batch() {
    let d = Dataset::from_arrays(vec![("x".into(), array(&[6, 1, 4, 4]))], None).unwrap();
    let d = d.bind(&one(DType::F32, &[])).unwrap().with_shift(2, Layout::Auto).unwrap();
    let a = Augment { seed: 1, epoch: 0 };
    let read = |indices: &[usize], a: Option<Augment>| {
        let mut b = d.new_batch(indices.len());
        d.batch(indices, a, &mut b).unwrap();
        b.inputs[0].1.get::<f32>().unwrap().to_vec()
    };
    let all = read(&[0, 1, 2, 3, 4, 5], Some(a));
    assert_eq!(read(&[3], Some(a)), all[48..64]);
    assert_ne!(all, read(&[0, 1, 2, 3, 4, 5], None));
    assert_ne!(all, read(&[0, 1, 2, 3, 4, 5], Some(Augment { epoch: 1, ..a })));
    let flat = Dataset::from_arrays(vec![("x".into(), array(&[6, 4]))], None).unwrap();
    assert!(message(flat.with_shift(1, Layout::Auto)).contains("shift"));
}

#[test]
fn what_is_no_row_a_sample_is_fed_whole() {
    let specs = [
        InputSpec::new("x", DType::F32, &[None, Some(2)]),
        InputSpec::new("h", DType::F32, &[Some(1), Some(1), Some(3)]),
        InputSpec::new("rate", DType::I64, &[]),
    ];
    let arrays = |h: &[usize]| {
        vec![
            ("h".to_string(), array(h)),
            ("rate".to_string(), Tensor::scalar(16000i64)),
            ("x".to_string(), array(&[4, 2])),
        ]
    };
    let data = Dataset::for_inputs(arrays(&[1, 1, 3]), Some(Tensor::ints(&[0, 1, 0, 1])), &specs).unwrap();
    let data = data.bind(&specs).unwrap().subset(&[3, 1, 2]).unwrap();
    let mut batch = data.new_batch(2);
    data.batch(&[2, 0], None, &mut batch).unwrap();
    let names: Vec<&str> = batch.inputs.iter().map(|i| i.0.as_str()).collect();
    assert_eq!(names, ["x", "h", "rate"]);
    assert_eq!(batch.inputs[0].1.dims(), [2, 2]);
    assert_eq!(batch.inputs[1].1.to_f64(), array(&[1, 1, 3]).to_f64());
    assert_eq!((batch.inputs[2].1.dims(), batch.inputs[2].1.to_ints().unwrap()), (&[][..], vec![16000]));
    // Without a target, by the array whose first dimension is open.
    assert_eq!(Dataset::for_inputs(arrays(&[1, 1, 3]), None, &specs).unwrap().len(), 4);
    // Another shape is neither a sample a row nor what the input declares.
    assert!(message(Dataset::for_inputs(arrays(&[2, 1, 3]), None, &specs)).contains("number of samples"));
}
