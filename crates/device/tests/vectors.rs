//! The vectors that are kept are those of today's list, and what the judge computes today.

use std::{collections::BTreeSet, fs, path::Path};

use baton_device::{DType, Reference};
use baton_device::conformance::{Vectors, cases, evaluate};

/// Mathematical functions of another machine's library may differ in the last digits.
const TOLERANCE: f32 = 1e-5;

#[test]
fn the_kept_vectors_are_what_the_judge_computes() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/golden/vectors/conformance.vectors");
    let vectors = Vectors::parse(&fs::read(file).unwrap()).unwrap();
    let (vectors, cases) = (vectors.by_name(), cases());
    let names: BTreeSet<String> = cases.iter().map(ToString::to_string).collect();
    assert!(vectors.keys().copied().eq(names.iter().map(String::as_str)), "run `cargo xtask vectors`");
    for case in cases {
        let outputs = evaluate(&case, &Reference::new(), DType::F32).unwrap();
        let outcome = vectors[case.to_string().as_str()].outcome(&outputs, TOLERANCE);
        let outcome =
            outcome.unwrap_or_else(|| panic!("{case} has {} outputs: run `cargo xtask vectors`", outputs.len()));
        assert!(
            outcome.passed(),
            "{case}: error {}; if that was meant, run `cargo xtask vectors`",
            outcome.max_error()
        );
    }
}
