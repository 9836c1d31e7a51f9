use std::collections::HashMap;
use std::fs;

use safetensors::tensor::TensorView;
use tempfile::TempDir;

use super::*;

/// Samples `from..from + b` of shape (2, 1, 3): sample i holds 6·i, 6·i + 1, … and has label i mod 4.
fn batch(from: usize, b: usize) -> LatentBatch {
    let x: Vec<f32> = (from * 6..(from + b) * 6).map(|v| v as f32).collect();
    let y: Vec<u32> = (from..from + b).map(|i| i as u32 % 4).collect();
    LatentBatch {
        x: Tensor::from_vec(x, (b, 2, 1, 3), &Device::Cpu).unwrap(),
        y: Tensor::from_vec(y, b, &Device::Cpu).unwrap(),
    }
}

fn written(dir: &TempDir, kind: LatentType) -> PathBuf {
    let path = dir.path().join("latents.safetensors");
    let mut writer = LatentWriter::create(&path, 7, [2, 1, 3], 4, kind).unwrap();
    writer.push(&batch(0, 5)).unwrap();
    writer.push(&batch(5, 2)).unwrap();
    assert!(
        !path.exists(),
        "the file must not carry its name before it is whole"
    );
    writer.finish().unwrap();
    path
}

/// Name, type, shape and bytes of a tensor.
type Named = (&'static str, Dtype, Vec<usize>, Vec<u8>);

/// A file with any tensors, by the format's own library.
fn raw(dir: &TempDir, tensors: &[Named]) -> PathBuf {
    let path = dir.path().join("raw.safetensors");
    let views = tensors.iter().map(|(name, dtype, shape, data)| {
        (*name, TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
    path
}

fn complaint(path: &Path, classes: Option<usize>) -> String {
    let message = PackedLatents::open(path, classes).unwrap_err().to_string();
    assert!(
        message.contains(&path.display().to_string()),
        "does not name the file: {message}"
    );
    message
}

#[test]
fn what_is_written_is_read() {
    for kind in [LatentType::F32, LatentType::F16] {
        let dir = TempDir::new().unwrap();
        let latents = PackedLatents::open(written(&dir, kind), None).unwrap();
        assert_eq!(
            (latents.len(), latents.classes(), latents.shape()),
            (Some(7), 4, [2, 1, 3])
        );
        let got = latents.batch(&[6, 0, 6, 3]).unwrap();
        let expected: Vec<f32> = [6, 0, 6, 3]
            .iter()
            .flat_map(|i| (i * 6..i * 6 + 6).map(|v| v as f32))
            .collect();
        assert_eq!(got.x.dims(), [4, 2, 1, 3]);
        assert_eq!(
            got.x.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
            expected
        );
        assert_eq!(got.y.to_vec1::<u32>().unwrap(), [2, 0, 2, 3]);
    }
}

#[test]
fn the_written_file_is_plain_safetensors() {
    let dir = TempDir::new().unwrap();
    let bytes = fs::read(written(&dir, LatentType::F16)).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (x, y) = (file.tensor("x").unwrap(), file.tensor("y").unwrap());
    assert_eq!(
        (x.dtype(), x.shape()),
        (Dtype::F16, [7, 2, 1, 3].as_slice())
    );
    assert_eq!((y.dtype(), y.shape()), (Dtype::I64, [7].as_slice()));
    // Readers that map the file need aligned data.
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    assert_eq!(header % 8, 0);
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(
        metadata.metadata(),
        &Some(HashMap::from([("classes".to_owned(), "4".to_owned())]))
    );
}

#[test]
fn labels_may_be_u32_and_classes_may_be_given() {
    let dir = TempDir::new().unwrap();
    let y: Vec<u8> = [1u32, 2].iter().flat_map(|v| v.to_le_bytes()).collect();
    let x: Vec<u8> = [0.5f32, -1.5]
        .iter()
        .flat_map(|v| v.to_le_bytes())
        .collect();
    let path = raw(
        &dir,
        &[
            ("x", Dtype::F32, vec![2, 1, 1, 1], x),
            ("y", Dtype::U32, vec![2], y),
        ],
    );
    let latents = PackedLatents::open(&path, Some(3)).unwrap();
    let got = latents.batch(&[1, 0]).unwrap();
    assert_eq!(
        got.x.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
        [-1.5, 0.5]
    );
    assert_eq!(got.y.to_vec1::<u32>().unwrap(), [2, 1]);
    assert!(complaint(&path, None).contains("give the number of classes"));
    assert!(complaint(&path, Some(2)).contains("sample 1 has label 2, expected 0..2"));
}

#[test]
fn malformed_files_are_named_with_what_is_wrong() {
    let dir = TempDir::new().unwrap();
    let (x, y) = (vec![0u8; 8], vec![0u8; 16]); // two f32, two i64
    let good_x = ("x", Dtype::F32, vec![2, 1, 1, 1], x.clone());
    let good_y = ("y", Dtype::I64, vec![2], y.clone());
    let cases: [(Vec<Named>, &str); 7] = [
        (vec![good_x.clone()], "no tensor `y`"),
        (vec![good_y.clone()], "no tensor `x`"),
        (
            vec![
                ("x", Dtype::I32, vec![2, 1, 1, 1], x.clone()),
                good_y.clone(),
            ],
            "`x` is I32, expected F32 or F16",
        ),
        (
            vec![("x", Dtype::F32, vec![2, 1], x.clone()), good_y.clone()],
            "expected (N, C, H, W)",
        ),
        (
            vec![good_x.clone(), ("y", Dtype::I64, vec![1], vec![0; 8])],
            "expected [2]",
        ),
        (
            vec![good_x, ("y", Dtype::F64, vec![2], y)],
            "`y` is F64, expected I64 or U32",
        ),
        (
            vec![
                ("x", Dtype::F32, vec![0, 1, 1, 1], vec![]),
                ("y", Dtype::I64, vec![0], vec![]),
            ],
            "nothing in it",
        ),
    ];
    for (tensors, expected) in cases {
        let message = complaint(&raw(&dir, &tensors), Some(1));
        assert!(
            message.contains(expected),
            "expected `{expected}` in: {message}"
        );
    }
    assert!(complaint(&dir.path().join("absent"), None).contains("cannot be opened"));
}

#[test]
fn negative_labels_and_values_that_are_not_finite_are_refused() {
    let dir = TempDir::new().unwrap();
    let y: Vec<u8> = (-1i64).to_le_bytes().to_vec();
    let path = raw(
        &dir,
        &[
            ("x", Dtype::F32, vec![1, 1, 1, 1], vec![0; 4]),
            ("y", Dtype::I64, vec![1], y),
        ],
    );
    assert!(complaint(&path, Some(9)).contains("label -1"));

    let nan = f32::NAN.to_le_bytes().to_vec();
    let path = raw(
        &dir,
        &[
            ("x", Dtype::F32, vec![1, 1, 1, 1], nan),
            ("y", Dtype::I64, vec![1], vec![0; 8]),
        ],
    );
    let message = PackedLatents::open(&path, Some(1))
        .unwrap()
        .batch(&[0])
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("sample 0") && message.contains("not finite"),
        "{message}"
    );
}

#[test]
fn a_truncated_file_is_refused_wherever_it_is_cut() {
    let dir = TempDir::new().unwrap();
    let bytes = fs::read(written(&dir, LatentType::F32)).unwrap();
    let path = dir.path().join("cut.safetensors");
    for length in [0, 4, 8, 30, bytes.len() / 2, bytes.len() - 1] {
        fs::write(&path, &bytes[..length]).unwrap();
        complaint(&path, None);
    }
    fs::write(&path, &bytes).unwrap();
    PackedLatents::open(&path, None).unwrap();
}

#[test]
fn an_index_beyond_the_end_is_an_error() {
    let dir = TempDir::new().unwrap();
    let latents = PackedLatents::open(written(&dir, LatentType::F32), None).unwrap();
    assert!(
        latents
            .batch(&[7])
            .unwrap_err()
            .to_string()
            .contains("sample 7")
    );
}

#[test]
fn an_unfinished_or_wrong_file_leaves_the_old_one_alone() {
    let dir = TempDir::new().unwrap();
    let path = written(&dir, LatentType::F32);
    let before = fs::read(&path).unwrap();

    let mut writer = LatentWriter::create(&path, 3, [2, 1, 3], 4, LatentType::F32).unwrap();
    writer.push(&batch(0, 2)).unwrap();
    assert!(
        writer
            .push(&batch(0, 2))
            .unwrap_err()
            .to_string()
            .contains("would make it 4")
    );
    assert!(
        writer
            .finish()
            .unwrap_err()
            .to_string()
            .contains("3 samples, but got 2")
    );

    let mut writer = LatentWriter::create(&path, 3, [2, 3, 1], 4, LatentType::F32).unwrap();
    assert!(
        writer
            .push(&batch(0, 1))
            .unwrap_err()
            .to_string()
            .contains("does not fit")
    );
    drop(writer);
    let mut writer = LatentWriter::create(&path, 4, [2, 1, 3], 3, LatentType::F32).unwrap();
    assert!(
        writer
            .push(&batch(0, 4))
            .unwrap_err()
            .to_string()
            .contains("label 3, expected 0..3")
    );
    drop(writer);
    // 6·11,000 = 66,000 is beyond the largest f16, 65,504.
    let mut writer = LatentWriter::create(&path, 1, [2, 1, 3], 4, LatentType::F16).unwrap();
    assert!(
        writer
            .push(&batch(11_000, 1))
            .unwrap_err()
            .to_string()
            .contains("not finite as F16")
    );
    drop(writer);

    assert_eq!(fs::read(&path).unwrap(), before);
    assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        1,
        "partial files were left behind"
    );
}

#[test]
fn a_writer_without_samples_classes_or_name_is_refused() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("x");
    let create = |path: &Path, n, shape, classes| {
        LatentWriter::create(path, n, shape, classes, LatentType::F32)
    };
    assert!(create(&path, 0, [1, 1, 1], 1).is_err());
    assert!(create(&path, 1, [1, 0, 1], 1).is_err());
    assert!(create(&path, 1, [1, 1, 1], 0).is_err());
    assert!(create(&path, usize::MAX, [4, 1, 1], 1).is_err());
    assert!(create(Path::new("/"), 1, [1, 1, 1], 1).is_err());
    let nowhere = dir.path().join("absent").join("x");
    assert!(
        create(&nowhere, 1, [1, 1, 1], 1)
            .unwrap_err()
            .to_string()
            .contains("cannot be created")
    );
}
