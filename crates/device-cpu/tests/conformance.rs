//! Every case of the shared list, on every instruction set of this machine, judged by `Reference`.

use baton_device::conformance;
use baton_device_cpu::{CpuBackend, CpuOptions, Isa};

#[test]
fn every_case_agrees_with_the_reference_on_every_instruction_set() {
    for isa in Isa::available() {
        for threads in [1, 2] {
            let backend = CpuBackend::new(&CpuOptions { threads, isa: Some(isa) }).unwrap();
            for case in conformance::cases() {
                let outcome = conformance::run(&case, &backend).unwrap();
                assert!(outcome.passed(), "{isa}, {threads} threads, {case:?}: error {}", outcome.max_error());
            }
        }
    }
}
