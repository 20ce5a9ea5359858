//! Every case of the shared list, on every instruction set of this machine, judged by `Reference`.

use std::time::Duration;

use baton_device::{Backend, Code, Requirements, WeightFormat, conformance};
use baton_device_cpu::{CpuBackend, CpuOptions, Isa};

#[test]
fn every_case_agrees_with_the_reference_on_every_instruction_set() {
    let judge = conformance::Judge::default();
    for isa in Isa::available() {
        for threads in [1, 2] {
            let backend = CpuBackend::new(&CpuOptions { threads, isa: Some(isa) }).unwrap();
            // Codes of a checkpoint are widened here; all else is offered.
            let codes = |format: &WeightFormat| matches!(format, WeightFormat::Coded(_));
            let refused = backend.caps().refusals(&Requirements {
                weight_formats: Code::ALL.map(WeightFormat::Coded).into(),
                ..Requirements::default()
            });
            assert_eq!(refused.len(), Code::ALL.len(), "{isa}");
            for case in conformance::cases().into_iter().filter(|case| !case.needs().weight_formats.iter().any(codes)) {
                let outcome = judge.run(&case, &backend).unwrap();
                assert!(outcome.passed(), "{isa}, {threads} threads, {case:?}: error {}", outcome.max_error());
            }
        }
    }
}

#[test]
fn ranks_make_what_the_reference_makes_alone() {
    for size in [1, 2, 3, 4] {
        for isa in Isa::available() {
            let ranks = CpuBackend::ranks(&CpuOptions { threads: 4, isa: Some(isa) }, size, Duration::from_secs(60));
            let outcome = conformance::ranks(&ranks.unwrap(), WeightFormat::F32).unwrap();
            assert!(outcome.passed(), "{isa}, {size} ranks: error {}", outcome.max_error());
            let (bits, each) =
                (outcome.actual.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), outcome.actual.len() / size);
            assert!(bits.chunks(each).all(|rank| rank == &bits[..each]), "{isa}, {size} ranks");
        }
    }
}
