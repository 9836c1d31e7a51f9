use std::io::Write;

use tempfile::TempDir;

use super::*;

/// A version 1.0 file, laid out by hand.
fn npy(descr: &str, shape: &str, data: &[u8]) -> Vec<u8> {
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}");
    let padding = 63 - (10 + header.len()) % 64;
    header += &" ".repeat(padding);
    header.push('\n');
    let mut file = b"\x93NUMPY\x01\x00".to_vec();
    file.extend((header.len() as u16).to_le_bytes());
    file.extend(header.as_bytes());
    file.extend(data);
    file
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn write(path: &Path, bytes: &[u8]) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::File::create(path).unwrap().write_all(bytes).unwrap();
}

/// Three images of (2, 1, 2), their labels in i64.
fn folder() -> TempDir {
    let dir = TempDir::new().unwrap();
    for i in 0..3u8 {
        let x: Vec<f32> = (0..4).map(|k| f32::from(10 * i + k)).collect();
        let at = |sub: &str| dir.path().join(sub).join(format!("{i}.npy"));
        write(
            &at("set_features"),
            &npy("<f4", "(1, 2, 1, 2)", &floats(&x)),
        );
        write(
            &at("set_labels"),
            &npy("<i8", "(1,)", &i64::from(i).to_le_bytes()),
        );
    }
    dir
}

#[test]
fn files_are_read_in_pairs() {
    let dir = folder();
    assert!(NpyLatents::is_one(dir.path()));
    assert!(!NpyLatents::is_one(dir.path().join("set_labels")));
    let latents = NpyLatents::open(dir.path(), 3).unwrap();
    assert_eq!(
        (latents.len(), latents.classes(), latents.shape()),
        (Some(3), 3, [2, 1, 2])
    );
    let got = latents.batch(&[2, 0]).unwrap();
    assert_eq!(got.x.dims(), [2, 2, 1, 2]);
    let x: Vec<f32> = got.x.flatten_all().unwrap().to_vec1().unwrap();
    assert_eq!(x, [20., 21., 22., 23., 0., 1., 2., 3.]);
    assert_eq!(got.y.to_vec1::<u32>().unwrap(), [2, 0]);
    assert!(latents.batch(&[3]).is_err());
}

#[test]
fn other_types_and_shapes_that_say_the_same_are_read() {
    let dir = folder();
    let doubles: Vec<u8> = [1f64, 2., 3., 4.]
        .iter()
        .flat_map(|v| v.to_le_bytes())
        .collect();
    write(
        &dir.path().join("set_features/1.npy"),
        &npy("<f8", "(2, 1, 2)", &doubles),
    );
    write(
        &dir.path().join("set_labels/1.npy"),
        &npy("<i4", "()", &2i32.to_le_bytes()),
    );
    let got = NpyLatents::open(dir.path(), 3)
        .unwrap()
        .batch(&[1])
        .unwrap();
    let x: Vec<f32> = got.x.flatten_all().unwrap().to_vec1().unwrap();
    assert_eq!(x, [1., 2., 3., 4.]);
    assert_eq!(got.y.to_vec1::<u32>().unwrap(), [2]);
}

#[test]
fn what_cannot_be_read_is_named() {
    let good = npy("<f4", "(1, 2, 1, 2)", &floats(&[0.0; 4]));
    let label = |value: i64| npy("<i8", "(1,)", &value.to_le_bytes());
    for (file, bytes, says) in [
        (
            "set_features/1.npy",
            good[..good.len() - 2].to_vec(),
            "cannot be read",
        ),
        ("set_features/1.npy", b"PK\x03\x04".to_vec(), "no .npy file"),
        (
            "set_features/1.npy",
            npy("<f4", "(1, 2, 2, 2)", &floats(&[0.0; 8])),
            "[2, 2, 2]",
        ),
        (
            "set_features/1.npy",
            npy("<f4", "(2, 2, 1, 2)", &floats(&[0.0; 8])),
            "expected a latent",
        ),
        (
            "set_features/1.npy",
            npy("|u1", "(1, 2, 1, 2)", &[0; 4]),
            "cannot be read",
        ),
        (
            "set_features/1.npy",
            npy("<f4", "(1, 2, 1, 2)", &floats(&[0.0, f32::NAN, 0.0, 0.0])),
            "NaN at position 1",
        ),
        (
            "set_features/1.npy",
            npy(
                "<f4",
                "(4294967296, 4294967296, 4294967296)",
                &floats(&[0.0]),
            ),
            "4294967296",
        ),
        ("set_labels/1.npy", label(3), "the label 3, expected 0..3"),
        ("set_labels/1.npy", label(-1), "the label -1"),
        (
            "set_labels/1.npy",
            npy("<i8", "(2,)", &[0; 16]),
            "one number is expected",
        ),
        ("set_labels/1.npy", npy("<f4", "(1,)", &[0; 4]), "no label"),
        ("set_labels/1.npy", npy("<i8", "(1,)", &[]), "no label"),
    ] {
        let dir = folder();
        write(&dir.path().join(file), &bytes);
        let message = NpyLatents::open(dir.path(), 3)
            .unwrap()
            .batch(&[0, 1])
            .unwrap_err()
            .to_string();
        assert!(
            message.contains(file) && message.contains(says),
            "{file}, {says}: {message}"
        );
    }
}

#[test]
fn folders_that_do_not_fit_together_are_refused() {
    let refused = |change: &dyn Fn(&Path)| {
        let dir = folder();
        change(dir.path());
        NpyLatents::open(dir.path(), 3).unwrap_err().to_string()
    };
    let message = refused(&|p| fs::remove_file(p.join("set_labels/2.npy")).unwrap());
    assert!(
        message.contains("set_labels/2.npy") && message.contains("missing"),
        "{message}"
    );
    let message = refused(&|p| fs::remove_file(p.join("set_features/0.npy")).unwrap());
    assert!(message.contains("set_features/0.npy"), "{message}");
    let message = refused(&|p| fs::remove_dir_all(p.join("set_labels")).unwrap());
    assert!(message.contains("`_labels`"), "{message}");
    let message = refused(&|p| fs::create_dir(p.join("more_labels")).unwrap());
    assert!(message.contains("several"), "{message}");
    let message = refused(&|p| {
        for sub in ["set_features", "set_labels"] {
            fs::remove_dir_all(p.join(sub)).unwrap();
            fs::create_dir(p.join(sub)).unwrap();
        }
    });
    assert!(message.contains("holds no .npy file"), "{message}");
}
