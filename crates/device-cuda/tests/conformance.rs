//! Every case of the shared list on a simulated GPU, judged by `Reference`. What is not offered is skipped by name.

mod common;

use std::collections::BTreeSet;

use baton_device::{Backend, DType, conformance};
use baton_device_cuda::{CudaBackend, CudaOptions};
use common::cases::Part;
use common::{Simulator, options};

/// Judges what is offered; what is missing for the others must be caches in these dtypes, and what an indexer chooses. `BATON_CASES` names cases by a piece of their
/// description; then these are judged, and nothing is said of what is missing.
fn judge(part: Part, activations: DType, setting: &str, isolated: bool, no_cache: &[&str]) {
    let Some(simulator) = Simulator::new() else { return };
    simulator.control(setting);
    let backend = CudaBackend::new(&CudaOptions { isolated, ..options(activations) }).unwrap();
    let (mut missing, mut wrong, mut run) = (BTreeSet::new(), Vec::new(), 0);
    let named = std::env::var("BATON_CASES").unwrap_or_default();
    for case in part.cases().into_iter().filter(|case| format!("{case:?}").contains(&named)) {
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
    assert!(wrong.is_empty(), "{activations}: {} of {run}\n{}", wrong.len(), wrong.join("\n"));
    let caches = no_cache.iter().map(|dtype| format!("cannot keep a cache in {dtype}"));
    let expected: BTreeSet<String> =
        caches.chain(["has no IndexedAttention", "has no CompressedAttention"].map(str::to_owned)).collect();
    assert!(!named.is_empty() || missing == expected, "{activations}, {run} cases: {missing:?}, not {expected:?}");
    drop(backend);
    simulator.expect_clean();
}

// Beside narrow activations caches are kept in the same type, or in bytes.

#[test]
fn cases_agree_in_bf16_within_its_roundings() {
    judge(Part::OfEachKind, DType::BF16, "order=forward", false, &["f32", "f16"]);
}

#[test]
fn cases_agree_in_f32_as_closely_as_on_the_cpu() {
    judge(Part::OfEachKind, DType::F32, "order=forward", false, &[]);
}

#[test]
fn cases_agree_whatever_the_order_of_threads_and_touch_no_memory_beyond_their_own() {
    judge(Part::OfEachKind, DType::BF16, "order=reverse", true, &["f32", "f16"]);
}

#[test]
#[ignore = "minutes in the emulator: cargo xtask long gpu"]
fn all_cases_agree_in_every_type_of_activations_and_whatever_the_order_of_threads() {
    judge(Part::All, DType::BF16, "order=forward", false, &["f32", "f16"]);
    judge(Part::All, DType::F16, "order=forward", false, &["f32", "bf16"]);
    judge(Part::All, DType::F32, "order=forward", false, &[]);
    judge(Part::All, DType::BF16, "order=reverse", true, &["f32", "f16"]);
    judge(Part::All, DType::F32, "order=77", true, &[]);
}
