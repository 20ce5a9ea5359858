//! Several simulated devices that compute one layer.

mod common;

use baton_device::{Backend, DType, DeviceError, WeightFormat, conformance};
use baton_device_ascend::{AscendBackend, AscendOptions};
use common::{Simulator, options};

fn ranks(simulator: &Simulator, size: u32, options: &AscendOptions) -> Vec<AscendBackend> {
    simulator.control(&format!("devices={size}"));
    AscendBackend::ranks(options, &(0..size).collect::<Vec<_>>()).unwrap()
}

#[test]
fn ranks_make_what_one_device_makes_each_the_same_bits() {
    let simulator = Simulator::new();
    for activations in [DType::F32, DType::F16, DType::BF16] {
        for size in [1, 2, 4] {
            for fused in [false, true] {
                let backends = ranks(&simulator, size, &AscendOptions { fused, ..options(activations) });
                let format = if activations == DType::F16 { WeightFormat::F16 } else { WeightFormat::BF16 };
                let outcome = conformance::ranks(&backends, format).unwrap();
                assert!(outcome.passed(), "{size} in {activations}: {} of {}", outcome.max_error(), outcome.tolerance);
                let bits: Vec<_> = outcome.actual.iter().map(|x| x.to_bits()).collect();
                let each: Vec<_> = bits.chunks_exact(bits.len() / size as usize).collect();
                assert!(each.iter().all(|rank| *rank == each[0]), "{size} in {activations}");
            }
        }
    }
    simulator.expect_clean();
}

#[test]
fn a_rank_that_leaves_ends_the_others_sums_until_all_are_made_anew() {
    let simulator = Simulator::new();
    let backends = ranks(&simulator, 2, &options(DType::BF16));
    let mut x = backends[0].tensor(1, 8).unwrap();
    backends[0].write(&[1.0; 8], &mut x).unwrap();
    backends[1].leave();
    assert!(matches!(backends[0].all_reduce(&mut x), Err(DeviceError::Poisoned { .. })));
    assert!(backends.iter().all(|backend| matches!(backend.rejoin(), Err(DeviceError::Poisoned { .. }))));
    drop((x, backends));
    simulator.expect_clean();
    let outcome = conformance::ranks(&ranks(&simulator, 2, &options(DType::BF16)), WeightFormat::BF16).unwrap();
    assert!(outcome.passed());
}
