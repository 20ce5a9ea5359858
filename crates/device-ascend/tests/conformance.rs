//! Every case of the shared list on simulated chips, judged by `Reference`. What a chip does not offer is skipped by name.

mod common;

use std::collections::BTreeSet;
use std::sync::LazyLock;

use baton_device::conformance::{self, Judge};
use baton_device::{Backend, BlockFormat, Code, DType};
use common::{A2, P310, Simulator};

/// Of all chips.
static JUDGE: LazyLock<Judge> = LazyLock::new(Judge::default);

/// Runs what the chip offers, and gives what was missing for the others.
fn judged(chip: &str, activations: DType, fused: bool) -> BTreeSet<String> {
    let simulator = Simulator::new();
    let backend = if fused { simulator.open_fused(chip, activations) } else { simulator.open(chip, activations) };
    let (cases, mut missing, mut run) = (conformance::cases(), BTreeSet::new(), 0);
    let mut wrong = Vec::new();
    for case in &cases {
        let refusals = backend.caps().refusals(&case.needs());
        if refusals.is_empty() {
            run += 1;
            match JUDGE.run(case, &backend) {
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
    assert!(wrong.is_empty(), "{chip} in {activations}: {} of {run}\n{}", wrong.len(), wrong.join("\n"));
    simulator.expect_no_violation();
    let in_blocks = backend.forms().iter().filter(|line| line.ends_with(": FRACTAL_NZ")).count();
    assert_eq!(in_blocks > 5, fused && activations != DType::F32, "{:?}", backend.forms());
    missing
}

/// What an A2 keeps as the integers that they are, beside activations that are not f32.
const KEPT: [BlockFormat; 2] = [BlockFormat::Q8_0, BlockFormat::Q4_0];

/// The refusals of caches in these dtypes, of weights in codes and in blocks but for those kept, of what an indexer chooses, and further
/// ones.
fn expected(kept: &[BlockFormat], caches: &[&str], others: &[&str]) -> BTreeSet<String> {
    let blocks = BlockFormat::ALL.into_iter().filter(|block| !kept.contains(block));
    let blocks = blocks.map(|block| format!("cannot keep {block} weights"));
    let caches = caches.iter().map(|dtype| format!("cannot keep a cache in {dtype}"));
    let none = ["has no IndexedAttention", "has no CompressedAttention"].map(str::to_owned);
    let codes = Code::ALL.map(|code| format!("cannot keep {code} weights"));
    blocks.chain(codes).chain(caches).chain(none).chain(others.iter().map(|other| (*other).to_owned())).collect()
}

#[test]
fn cases_agree_on_a2_in_f32_as_closely_as_on_the_cpu() {
    for fused in [false, true] {
        assert_eq!(judged(A2, DType::F32, fused), expected(&[], &["f16", "bf16", "int8"], &[]));
    }
}

#[test]
fn cases_agree_whatever_the_order_of_sums() {
    let order = |state: &str| Simulator::new().control(&format!("perturb={state}"));
    order("on");
    let missing = judged(A2, DType::F32, false);
    order("off");
    assert_eq!(missing, expected(&[], &["f16", "bf16", "int8"], &[]));
}

#[test]
fn cases_agree_on_a2_in_bf16_within_its_roundings() {
    for fused in [false, true] {
        assert_eq!(judged(A2, DType::BF16, fused), expected(&KEPT, &["f32", "f16", "int8"], &[]));
    }
}

#[test]
fn cases_agree_on_a2_in_f16_within_its_roundings() {
    for fused in [false, true] {
        assert_eq!(judged(A2, DType::F16, fused), expected(&KEPT, &["f32", "bf16", "int8"], &[]));
    }
}

#[test]
fn cases_agree_on_310p_in_f16_within_its_roundings() {
    for fused in [false, true] {
        assert_eq!(
            judged(P310, DType::F16, fused),
            expected(&[], &["f32", "bf16", "int8"], &["cannot keep bf16 weights"])
        );
    }
}

#[test]
fn cases_agree_also_when_what_they_do_is_run_as_graphs() {
    let simulator = Simulator::new();
    let backend = simulator.open_fused(A2, DType::BF16);
    let cases = conformance::cases().into_iter().filter(|case| backend.caps().refusals(&case.needs()).is_empty());
    let mut with_graphs = 0;
    for case in cases {
        simulator.reset();
        // Met, captured, run.
        for time in 1..=3 {
            let outcome = JUDGE.run(&case, &backend).unwrap_or_else(|error| panic!("{case:?}, {time}: {error}"));
            assert!(outcome.passed(), "{case:?}, {time}: {} over {}", outcome.max_error(), outcome.tolerance);
        }
        simulator.expect_no_violation();
        let calls = &simulator.report()["calls"];
        let of = |symbol: &str| calls[symbol].as_u64().unwrap_or(0);
        with_graphs += usize::from(of("aclmdlRIExecuteAsync") > of("aclmdlRICaptureEnd"));
    }
    assert!(with_graphs > 60, "{with_graphs} cases");
    assert!(backend.forms().pop().unwrap().ends_with("graphs"));
    drop(backend);
    simulator.expect_clean();
}
