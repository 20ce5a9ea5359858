//! Every case of the shared list on simulated chips, judged by `Reference`. What a chip does not offer is skipped by name.

mod common;

use std::collections::BTreeSet;

use baton_device::{Backend, DType, conformance};
use common::{A2, P310, Simulator};

/// Runs what the chip offers, and gives what was missing for the others.
fn judged(chip: &str, activations: DType) -> BTreeSet<String> {
    let simulator = Simulator::new();
    let backend = simulator.open(chip, activations);
    let (mut missing, mut run, mut wrong) = (BTreeSet::new(), 0, Vec::new());
    for case in conformance::cases() {
        let refusals = backend.caps().refusals(&case.needs());
        if refusals.is_empty() {
            run += 1;
            match conformance::run(&case, &backend) {
                Ok(outcome) if outcome.passed() => {}
                Ok(outcome) => {
                    wrong.push(format!("{case:?}: error {} over {}", outcome.max_error(), outcome.tolerance));
                }
                Err(error) => wrong.push(format!("{case:?}: {error}")),
            }
        }
        missing.extend(refusals.into_iter().map(|refusal| {
            let end = refusal.find("; it keeps").unwrap_or(refusal.len());
            refusal[..end].trim_start_matches(&format!("device {} ", backend.caps().device)).to_owned()
        }));
    }
    println!("{chip} in {activations}: {run} of {} cases; {missing:?}", conformance::cases().len());
    assert!(wrong.is_empty(), "{chip} in {activations}: {} of {run}\n{}", wrong.len(), wrong.join("\n"));
    simulator.expect_no_violation();
    missing
}

/// The refusals of caches in these dtypes and of weights in blocks, and further ones.
fn expected(caches: &[&str], others: &[&str]) -> BTreeSet<String> {
    let blocks = baton_device::BlockFormat::ALL.map(|block| format!("cannot keep {block} weights"));
    let caches = caches.iter().map(|dtype| format!("cannot keep a cache in {dtype}"));
    blocks.into_iter().chain(caches).chain(others.iter().map(|other| (*other).to_owned())).collect()
}

#[test]
fn cases_agree_on_a2_in_f32_as_closely_as_on_the_cpu() {
    assert_eq!(judged(A2, DType::F32), expected(&["f16", "bf16", "int8"], &[]));
}

#[test]
fn cases_agree_on_a2_in_bf16_within_its_roundings() {
    assert_eq!(judged(A2, DType::BF16), expected(&["f32", "f16", "int8"], &[]));
}

#[test]
fn cases_agree_on_a2_in_f16_within_its_roundings() {
    assert_eq!(judged(A2, DType::F16), expected(&["f32", "bf16", "int8"], &[]));
}

#[test]
fn cases_agree_on_310p_in_f16_within_its_roundings() {
    assert_eq!(judged(P310, DType::F16), expected(&["f32", "bf16", "int8"], &["cannot keep bf16 weights"]));
}
