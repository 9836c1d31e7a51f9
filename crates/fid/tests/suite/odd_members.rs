//! An `.npz` may hold what we do not understand: it is an error where it is asked for, and nowhere else.

use std::io::{Cursor, Write};

use tinyfusion_fid::{Error, Npz, StoredStatistics};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

/// One array of a file.
struct Member(&'static str, &'static str, &'static str, Vec<u8>);

fn file(members: &[Member]) -> Npz {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    for Member(name, descr, shape, data) in members {
        zip.start_file(format!("{name}.npy"), options).unwrap();
        let header =
            format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n");
        zip.write_all(b"\x93NUMPY\x01\x00").unwrap();
        zip.write_all(&(header.len() as u16).to_le_bytes()).unwrap();
        zip.write_all(header.as_bytes()).unwrap();
        zip.write_all(data).unwrap();
    }
    Npz::parse(zip.finish().unwrap().into_inner(), "odd.npz").unwrap()
}

fn f64s(values: &[f64]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// `mu` and `sigma` of two features, and one member more.
fn statistics(more: Member) -> Result<StoredStatistics, Error> {
    let mut npz = file(&[
        Member("mu", "<f8", "(2,)", f64s(&[1.0, 2.0])),
        Member("sigma", "<f8", "(2, 2)", f64s(&[1.0, 0.0, 0.0, 1.0])),
        more,
    ]);
    Ok(StoredStatistics::read(&mut npz)?.unwrap())
}

#[test]
fn a_member_that_is_not_asked_for_does_no_harm() {
    for odd in [
        Member("odd", "<c16", "(1,)", vec![0; 16]),
        Member("odd", "|O", "(1,)", vec![0; 8]),
        Member("odd", "<U3", "(1,)", vec![0; 12]),
        Member("odd", "<f8", "(1000000,)", vec![0; 8]),
        Member("odd", "nonsense", "(1", Vec::new()),
    ] {
        let descr = odd.1;
        let mut npz = file(&[Member("arr_0", "|u1", "(2, 1, 1, 3)", vec![7; 6]), odd]);
        assert_eq!(npz.image_shape("arr_0").unwrap(), (2, [1, 1]), "{descr}");
        assert!(npz.has("odd"), "{descr}");
        let error = npz.floats("odd").unwrap_err().to_string();
        assert!(error.contains("odd.npz: array `odd`"), "{descr}: {error}");
        npz.integers("odd").unwrap_err();
        npz.number("odd").unwrap_err();
    }
    let mut npz = file(&[
        Member("arr_0", "|u1", "(1, 1, 1, 3)", vec![7; 3]),
        Member("arr_1", "<i2", "(2,)", vec![1, 0, 0xff, 0xff]),
        Member("mask", "|b1", "(3,)", vec![0, 1, 1]),
    ]);
    assert_eq!(npz.integers("arr_1").unwrap(), (vec![2], vec![1, -1]));
    assert_eq!(npz.shape("mask").unwrap(), (&[3][..], "bool"));
    assert!(
        npz.integers("mask")
            .unwrap_err()
            .to_string()
            .contains("bool")
    );
    npz.image_shape("arr_0").unwrap();
}

#[test]
fn a_count_is_a_count_in_any_type() {
    for (descr, data) in [
        ("<i8", 50_000i64.to_le_bytes().to_vec()),
        ("<i4", 50_000i32.to_le_bytes().to_vec()),
        ("<u2", 50_000u16.to_le_bytes().to_vec()),
        ("<f8", 50_000f64.to_le_bytes().to_vec()),
        ("<f4", 50_000f32.to_le_bytes().to_vec()),
    ] {
        let found = statistics(Member("n", descr, "()", data)).unwrap();
        assert_eq!(found.pool.n(), Some(50_000), "{descr}");
        assert_eq!(found.warnings, Vec::<String>::new());
    }
}

#[test]
fn what_is_no_count_is_an_error_and_what_is_not_ours_is_left_aside() {
    for wrong in [-3.0, 0.0, 1.0, 2.5, 1e300] {
        let data = f64::to_le_bytes(wrong).to_vec();
        let error = statistics(Member("n", "<f8", "()", data)).unwrap_err();
        let said = error.to_string();
        assert!(
            said.contains("odd.npz: `n`, the number of images"),
            "{said}"
        );
    }
    let data = (-5i64).to_le_bytes().to_vec();
    assert!(statistics(Member("n", "<i8", "(1,)", data)).is_err());
    for foreign in [
        Member("n", "<i8", "(3,)", vec![0; 24]),
        Member("n", "|O", "()", vec![0; 8]),
        Member("n", "|b1", "()", vec![1]),
        Member("provenance", "<U3", "()", vec![0; 12]),
        Member("provenance", "<f8", "()", vec![0; 8]),
    ] {
        let name = foreign.0;
        let found = statistics(foreign).unwrap();
        assert_eq!((found.pool.n(), found.provenance), (None, None));
        assert_eq!(found.warnings.len(), 1, "{:?}", found.warnings);
        let words = format!("`{name}` is left aside");
        assert!(found.warnings[0].contains(&words), "{:?}", found.warnings);
    }
}

#[test]
fn matrices_and_batches() {
    let mut npz = file(&[
        Member("arr_0", "<f8", "(2, 2)", f64s(&[1.0, 2.0, 3.0, 4.0])),
        Member("flat", "<f8", "(4,)", f64s(&[1.0, 2.0, 3.0, 4.0])),
        Member("none", "<f8", "(0, 4)", Vec::new()),
        Member("images", "|u1", "(1, 1, 1, 3)", vec![7; 3]),
    ]);
    let found = npz.matrix("arr_0").unwrap();
    assert_eq!(found, (vec![1.0, 2.0, 3.0, 4.0], [2, 2]));
    for wrong in ["flat", "none", "images"] {
        assert!(npz.matrix(wrong).is_err(), "{wrong}");
    }
    let error = npz
        .for_each_batch("images", 0, &mut |_| Ok(()))
        .unwrap_err();
    assert!(matches!(error, Error::Config(_)), "{error}");
}
