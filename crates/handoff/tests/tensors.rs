//! Faults planted in the tensors of a bundle whose file digests were made anew: each still says what it is.

mod common;

use std::fs;
use std::path::Path;

use baton_handoff::{Bundle, Digest, MANIFEST, TensorProblem};
use baton_model::Files;
use proptest::prelude::*;
use serde_json::{Value, json};

/// Name, element type, shape and bytes.
type Tensor = (&'static str, &'static str, Vec<u64>, Vec<u8>);

fn tensors() -> Vec<Tensor> {
    let bytes = |seed: u8, n: u8| (0..n).map(|i| i.wrapping_mul(7) ^ seed).collect();
    vec![
        ("embed", "BF16", vec![6, 4], bytes(1, 48)),
        ("k", "BF16", vec![3, 4], bytes(2, 24)),
        ("norm", "F32", vec![4], bytes(3, 16)),
        ("norm2", "F32", vec![4], bytes(3, 16)),
        ("q", "BF16", vec![4, 4], bytes(4, 32)),
        ("v", "BF16", vec![3, 4], bytes(5, 24)),
    ]
}

fn file(tensors: &[Tensor]) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let end = data.len() + bytes.len();
        header.insert((*name).into(), json!({"dtype": dtype, "shape": shape, "data_offsets": [data.len(), end]}));
        data.extend_from_slice(bytes);
    }
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    framed(&Value::Object(header).to_string(), &data)
}

fn framed(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// A bundle whose files have right digests, and whose tensors are listed as [`tensors`].
fn write(folder: &Path, files: &[(&str, &[u8])]) -> Bundle {
    let mut manifest = common::write(folder, files);
    for (name, dtype, shape, bytes) in tensors() {
        let sha256 = Digest::of(&bytes).to_string();
        manifest["tensors"][name] = json!({"dtype": dtype, "shape": shape, "sha256": sha256});
    }
    fs::write(folder.join(MANIFEST), manifest.to_string()).unwrap();
    let bundle = Bundle::open(&Files::Folder(folder.into())).unwrap().unwrap();
    assert!(bundle.verify_files(&|_| {}).problems.is_empty());
    bundle
}

fn problems(stored: &[Tensor]) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    let bundle = write(folder.path(), &[("model.safetensors", &file(stored))]);
    bundle.verify_tensors(&|_| {}).iter().map(ToString::to_string).collect()
}

fn transposed(bytes: &[u8], rows: usize, columns: usize) -> Vec<u8> {
    let element = |row: usize, column: usize| &bytes[(row * columns + column) * 2..][..2];
    (0..columns).flat_map(|c| (0..rows).flat_map(move |r| element(r, c).to_vec())).collect()
}

#[test]
fn tensors_as_they_were_handed_over_have_no_problem_in_one_file_or_in_shards() {
    assert_eq!(problems(&tensors()), Vec::<String>::new());
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (file(&tensors()[..3]), file(&tensors()[3..]));
    let bundle = write(folder.path(), &[("1.safetensors", &first), ("2.safetensors", &second)]);
    assert!(bundle.verify_tensors(&|_| {}).is_empty());
}

#[test]
fn a_manifest_without_tensors_compares_none() {
    let folder = tempfile::tempdir().unwrap();
    common::write(folder.path(), &[("model.safetensors", b"no safetensors at all")]);
    let bundle = Bundle::open(&Files::Folder(folder.path().into())).unwrap().unwrap();
    assert!(bundle.verify_tensors(&|_| {}).is_empty());
}

#[test]
fn swapped_tensors_are_called_swapped() {
    let mut stored = tensors();
    let k = stored[1].3.clone();
    stored[1].3 = std::mem::replace(&mut stored[5].3, k);
    assert_eq!(problems(&stored), ["tensors k and v are swapped"]);
}

#[test]
fn a_copied_tensor_is_named_with_the_one_it_came_from() {
    let mut stored = tensors();
    stored[5].3 = stored[1].3.clone();
    assert_eq!(problems(&stored), ["tensor v has the content of k"]);
}

#[test]
fn a_transposed_matrix_is_called_transposed_square_or_not_and_whatever_its_header_says() {
    let mut square = tensors();
    square[4].3 = transposed(&square[4].3, 4, 4);
    assert_eq!(problems(&square), ["tensor q is transposed"]);

    let mut silently = tensors();
    silently[0].3 = transposed(&silently[0].3, 6, 4);
    assert_eq!(problems(&silently), ["tensor embed is transposed"]);

    let mut openly = silently.clone();
    openly[0].2 = vec![4, 6];
    assert_eq!(problems(&openly), ["tensor embed is transposed"]);

    let mut only_the_header = tensors();
    only_the_header[0].2 = vec![4, 6];
    assert_eq!(problems(&only_the_header), ["tensor embed is BF16 [4, 6]; expected BF16 [6, 4]"]);
}

#[test]
fn other_types_names_and_content_are_named() {
    let mut stored = tensors();
    stored[0].3[5] ^= 1;
    stored[1].1 = "F16";
    stored[5].0 = "w";
    let found = problems(&stored);
    assert!(found[0].starts_with("tensor embed has SHA-256 "), "{found:?}");
    assert_eq!(
        found[1..],
        ["tensor k is F16 [3, 4]; expected BF16 [3, 4]", "tensor v is missing", "tensor w is not listed"]
    );
}

#[test]
fn a_shape_without_bytes_costs_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let shape = vec![1u64 << 31, 1 << 31];
    let mut manifest = common::write(folder.path(), &[("0.safetensors", &file(&[("w", "U8", shape.clone(), vec![])]))]);
    manifest["tensors"]["w"] = json!({"dtype": "U8", "shape": shape, "sha256": Digest::of(b"other").to_string()});
    fs::write(folder.path().join(MANIFEST), manifest.to_string()).unwrap();
    let found = Bundle::open(&Files::Folder(folder.path().into())).unwrap().unwrap().verify_tensors(&|_| {});
    assert!(matches!(found.as_slice(), [TensorProblem::Digest { .. }]), "{found:?}");
}

#[test]
fn a_tensor_in_two_files_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (file(&tensors()), file(&tensors()[..1]));
    let bundle = write(folder.path(), &[("1.safetensors", &first), ("2.safetensors", &second)]);
    let found = bundle.verify_tensors(&|_| {});
    assert!(matches!(found.as_slice(), [TensorProblem::Twice { name }] if name == "embed"), "{found:?}");
}

#[test]
fn headers_that_lie_are_damage() {
    let lies: &[&[u8]] = &[
        b"",
        b"short",
        &u64::MAX.to_le_bytes(),
        &framed("{", b""),
        &framed("{}{}", b""),
        &framed("[]", b""),
        &framed(r#"{"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 5]}}"#, b"1234"),
        &framed(r#"{"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 0]}}"#, b"1234"),
        &framed(r#"{"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 18446744073709551615]}}"#, b"1234"),
        // Overlapping ranges would be hashed again and again.
        &framed(
            r#"{"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}, "b": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}"#,
            b"1234",
        ),
        // The last of two equal names would hide the first.
        &framed(
            r#"{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}, "a": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}}"#,
            b"1234",
        ),
    ];
    for lie in lies {
        let folder = tempfile::tempdir().unwrap();
        let bundle = write(folder.path(), &[("0.safetensors", *lie), ("1.safetensors", &file(&tensors()))]);
        let found = bundle.verify_tensors(&|_| {});
        assert!(
            matches!(found.as_slice(), [TensorProblem::Damaged { name, .. }] if name == "0.safetensors"),
            "{:?}: {found:?}",
            String::from_utf8_lossy(lie)
        );
    }
}

proptest! {
    #[test]
    fn any_matrix_that_is_transposed_is_called_so(rows in 2u64..150, columns in 2u64..150, seed in any::<u64>()) {
        // Distinct elements, so that the transposed differs.
        let bytes: Vec<u8> = (0..rows * columns).flat_map(|i| (i ^ (seed & 0xffff)).to_le_bytes()[..2].to_vec()).collect();
        let entry = json!({"dtype": "BF16", "shape": [rows, columns], "sha256": Digest::of(&bytes).to_string()});
        let stored = file(&[("w", "BF16", vec![columns, rows], transposed(&bytes, rows as usize, columns as usize))]);
        let files = [("model.safetensors", stored.leak() as &[u8])];
        let mut manifest = common::manifest(files);
        manifest["tensors"]["w"] = entry;
        let manifest: &[u8] = manifest.to_string().into_bytes().leak();
        let bundle = Bundle::open(&Files::Embedded(vec![files[0], (MANIFEST, manifest)].leak())).unwrap().unwrap();
        let found = bundle.verify_tensors(&|_| {});
        prop_assert!(matches!(found.as_slice(), [TensorProblem::Transposed { .. }]), "{found:?}");
    }
}
