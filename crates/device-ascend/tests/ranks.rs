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

#[test]
fn ranks_make_and_run_graphs_between_their_sums() {
    const STEPS: u64 = 5;
    let simulator = Simulator::new();
    let backends = ranks(&simulator, 2, &AscendOptions { fused: true, ..options(DType::F32) });
    simulator.reset();
    let run = |backend: &AscendBackend| {
        let mut x = backend.tensor(1, 8).unwrap();
        for step in 1..=STEPS {
            backend.write(&[step as f32; 8], &mut x).unwrap();
            // Two pieces of four calls, and a sum between them.
            (0..4).for_each(|_| backend.scale(&mut x, 2.0).unwrap());
            backend.all_reduce(&mut x).unwrap();
            (0..4).for_each(|_| backend.scale(&mut x, 4.0).unwrap());
            // Only the first reads what it has; the others go on as far as they come.
            backend.submit().unwrap();
            if backend.world().rank == 0 || step == STEPS {
                let mut values = Vec::new();
                backend.read(&x, &mut values).unwrap();
                assert_eq!(values, [16.0 * 2.0 * 256.0 * step as f32; 8]);
            }
        }
    };
    std::thread::scope(|scope| backends.iter().for_each(|backend| _ = scope.spawn(|| run(backend))));
    let runs = simulator.report()["calls"]["aclmdlRIExecuteAsync"].as_u64();
    assert_eq!(runs, Some(2 * 2 * (STEPS - 1)), "on both ranks, each piece but for its first time");
    assert!(backends.iter().all(|backend| backend.forms().pop().unwrap().ends_with("graphs")));
    drop(backends);
    simulator.expect_clean();
}
