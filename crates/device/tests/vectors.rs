//! The vectors that are kept are those of today's list, and what the judge computes today.

use std::{fs, path::Path};

use baton_device::conformance::{Vectors, cases};

/// Mathematical functions of another machine's library may differ in the last digits.
const TOLERANCE: f32 = 1e-5;

#[test]
fn the_kept_vectors_are_what_the_judge_computes() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/golden/vectors/conformance.vectors");
    let kept = Vectors::parse(&fs::read(file).unwrap()).unwrap();
    let today = Vectors::compute(&cases()).unwrap();
    assert!(today.iter().map(|(name, _)| name).eq(kept.iter().map(|(name, _)| name)), "run `cargo xtask vectors`");
    for ((name, today), (_, kept)) in today.iter().zip(kept.iter()) {
        let outcome = kept.against(today, TOLERANCE).unwrap_or_else(|| panic!("{name}: run `cargo xtask vectors`"));
        let error = outcome.max_error();
        assert!(outcome.passed(), "{name}: error {error}; if that was meant, run `cargo xtask vectors`");
    }
}
