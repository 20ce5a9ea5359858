//! Whatever call fails while operations run, and however little memory there is: a typed error, nothing left, and a backend that is
//! made anew computes.

mod common;

use std::collections::BTreeMap;

use baton_device::conformance::{self, Case};
use baton_device::{AttentionParams, BlockFormat, DType, DeviceError, GroupScore, KvDtype, WeightFormat};
use baton_device_cuda::{CudaBackend, CudaOptions};
use common::{Simulator, options};

/// What a failure must come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Memory,
    Poisoned,
    Lost,
    Call,
}

/// The driver's codes that calls are made to give: no room, an illegal address, a device that needs to be taken out, a refusal.
const DRIVER: [(i32, Class); 4] = [(2, Class::Memory), (700, Class::Poisoned), (214, Class::Lost), (1, Class::Call)];
/// Of other libraries any code is a failed call.
const LIBRARY: [(i32, Class); 1] = [(7, Class::Call)];

/// One of each family of operations, small.
fn cases() -> Vec<Case> {
    let params = AttentionParams { heads: 4, kv_heads: 2, head_dim: 32, scale: 0.2, window: None, softcap: None };
    let (format, kv) = (WeightFormat::BF16, KvDtype::BF16);
    let linear = |rows, format| Case::Linear { rows, in_features: 64, out_features: 16, format, bias: true };
    vec![
        Case::Norm { rows: 3, cols: 64, run: 64 },
        Case::Choose { cols: 200, ties: false },
        linear(40, format),
        linear(3, WeightFormat::Ggml(BlockFormat::Q8_0)),
        Case::Attention { params, kv, history: 0 },
        Case::Latent { heads: 2, nope: 8, rope: 4, v: 8, rank: 16, format, kv, history: 0 },
        Case::Moe { rows: 3, hidden: 64, intermediate: 32, experts: 8, format, groups: Some(GroupScore::TwoBest) },
    ]
}

/// Opens a device, runs a case, and closes it.
fn run(case: &Case) -> Result<(), DeviceError> {
    let backend = CudaBackend::new(&CudaOptions { isolated: true, ..options(DType::BF16) })?;
    let outcome = conformance::run(case, &backend)?;
    assert!(outcome.passed(), "{case:?}: {} of {}", outcome.max_error(), outcome.tolerance);
    Ok(())
}

/// Calls of the simulator's functions that a case makes.
fn calls(simulator: &Simulator, case: &Case) -> BTreeMap<String, u64> {
    simulator.begin_anew();
    run(case).unwrap_or_else(|error| panic!("{case:?}: {error}"));
    assert_eq!(simulator.count("messages"), 0, "{case:?}");
    simulator.calls()
}

/// Whether what a call gives back is at stake: a refusal of it leaves what it should have taken away.
fn takes_away(symbol: &str) -> bool {
    ["Free", "Destroy", "Release", "Reset", "Unload"].iter().any(|word| symbol.contains(word))
}

/// What is left, but for what libraries and host hold for a context that broke: the driver takes it at the reset.
fn left(simulator: &Simulator) -> Vec<(&'static str, u64)> {
    let mut left = simulator.left();
    left.retain(|(kind, _)| !["blas_handles", "host_blocks"].contains(kind));
    left
}

fn fits(result: &Result<(), DeviceError>, class: Class) -> bool {
    match result {
        // What is only asked, or has another way.
        Ok(()) => true,
        Err(DeviceError::OutOfMemory { .. }) => class == Class::Memory,
        Err(DeviceError::Poisoned { .. }) => class == Class::Poisoned,
        Err(DeviceError::Lost { .. }) => class == Class::Lost,
        Err(DeviceError::Execution { .. }) => matches!(class, Class::Call | Class::Memory),
        // While it is opened.
        Err(DeviceError::Unavailable { .. }) => true,
        Err(_) => false,
    }
}

#[test]
fn any_call_that_fails_ends_in_a_typed_error_with_nothing_left_and_can_begin_anew() {
    let Some(simulator) = Simulator::new() else { return };
    let mut failed = BTreeMap::new();
    for (turn, case) in cases().iter().enumerate() {
        for (i, (symbol, count)) in calls(&simulator, case).into_iter().enumerate() {
            if takes_away(&symbol) {
                continue;
            }
            let codes: &[_] =
                if symbol.starts_with("cu") && !symbol.starts_with("cublas") { &DRIVER } else { &LIBRARY };
            // In turn, and over all families each of them for every function.
            let (code, class) = codes[(i + turn) % codes.len()];
            let n = [1, count.div_ceil(2), count][turn % 3];
            simulator.control(&format!("fault={symbol}:{n}:{code}"));
            let result = run(case);
            simulator.control("fault=");
            assert!(fits(&result, class), "{case:?}: {symbol} {n} gives {code}: {result:?}");
            *failed.entry(format!("{class:?}")).or_insert(0) += usize::from(result.is_err());
            run(case).unwrap_or_else(|error| panic!("{case:?} after {symbol} gave {code}: {error}"));
            assert_eq!(left(&simulator), [], "{case:?}: {symbol} {n} gives {code}: {result:?}");
        }
    }
    assert!(failed.len() == 4 && failed.values().all(|count| *count > 10), "{failed:?}");
}

#[test]
fn a_kernel_that_fails_when_it_runs_poisons_and_a_new_backend_computes() {
    let Some(simulator) = Simulator::new() else { return };
    for case in cases() {
        let launches = calls(&simulator, &case)["cuLaunchKernel"];
        for (n, code) in [(1, 700), (launches.div_ceil(2), 719), (launches, 716)] {
            simulator.control(&format!("fault=cuLaunchKernel:{n}:run:{code}"));
            let result = run(&case);
            assert!(
                matches!(result, Err(DeviceError::Poisoned { .. })),
                "{case:?}: launch {n} gives {code}: {result:?}"
            );
            run(&case).unwrap_or_else(|error| panic!("{case:?} after {code}: {error}"));
            assert_eq!(left(&simulator), [], "{case:?} after {code}");
        }
    }
}

#[test]
fn a_device_with_too_little_memory_says_so_and_leaves_nothing() {
    let Some(simulator) = Simulator::new() else { return };
    let mut refused = 0;
    for case in cases() {
        for kilobytes in [1, 16, 64, 256, 1 << 10, 4 << 10, 16 << 10, 40 << 10] {
            simulator.control(&format!("memory={}", kilobytes << 10));
            match run(&case) {
                Ok(()) => {}
                Err(DeviceError::OutOfMemory { bytes, .. }) => {
                    assert!(bytes > 0);
                    refused += 1;
                }
                Err(error) => panic!("{case:?} in {kilobytes} KiB: {error}"),
            }
            assert_eq!(simulator.left(), [], "{case:?} in {kilobytes} KiB");
        }
    }
    assert!(refused > 10, "{refused}");
}
