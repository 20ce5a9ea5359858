//! Every case of the shared list on a simulated GPU, judged by `Reference`. What is not offered is skipped by name.

mod common;

use std::collections::BTreeSet;

use baton_device::{Backend, DType, conformance};
use baton_device_cuda::{CudaBackend, CudaOptions};
use common::{Simulator, options};

/// Runs what is offered, and gives what was missing for the others. `BATON_CASES` names a part of the cases, by a piece of their
/// description.
fn judged(activations: DType, setting: &str, isolated: bool) -> BTreeSet<String> {
    let simulator = Simulator::new();
    simulator.control(setting);
    let backend = CudaBackend::new(&CudaOptions { isolated, ..options(activations) }).unwrap();
    let part = std::env::var("BATON_CASES").unwrap_or_default();
    let (mut missing, mut wrong, mut run) = (BTreeSet::new(), Vec::new(), 0);
    for case in conformance::cases().iter().filter(|case| format!("{case:?}").contains(&part)) {
        let refusals = backend.caps().refusals(&case.needs());
        if refusals.is_empty() {
            run += 1;
            match conformance::run(case, &backend) {
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
    drop(backend);
    simulator.expect_clean();
    missing
}

/// The refusals of caches in these dtypes: beside narrow activations they are kept in the same type, or in bytes.
fn caches(dtypes: [&str; 2]) -> BTreeSet<String> {
    dtypes.map(|dtype| format!("cannot keep a cache in {dtype}")).into()
}

#[test]
fn cases_agree_in_f32_as_closely_as_on_the_cpu() {
    assert_eq!(judged(DType::F32, "order=forward", false), BTreeSet::new());
}

#[test]
fn cases_agree_in_bf16_within_its_roundings() {
    assert_eq!(judged(DType::BF16, "order=forward", false), caches(["f32", "f16"]));
}

#[test]
fn cases_agree_in_f16_within_its_roundings() {
    assert_eq!(judged(DType::F16, "order=forward", false), caches(["f32", "bf16"]));
}

#[test]
fn cases_agree_whatever_the_order_of_threads_and_touch_no_memory_beyond_their_own() {
    assert_eq!(judged(DType::BF16, "order=reverse", true), caches(["f32", "f16"]));
    assert_eq!(judged(DType::F32, "order=77", true), BTreeSet::new());
}
