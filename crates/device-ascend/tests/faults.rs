//! Whatever call fails while operations run, and however little memory there is: a typed error, and nothing left.

mod common;

use std::collections::BTreeMap;

use baton_device::conformance::{self, Case};
use baton_device::{AttentionParams, BlockFormat, DType, DeviceError, GroupScore, KvDtype, WeightFormat};
use baton_device_ascend::{AscendBackend, AscendOptions, Class, describe};
use common::{Simulator, options};

/// One of each family of operations, small.
fn cases() -> Vec<Case> {
    let params = AttentionParams { heads: 4, kv_heads: 2, head_dim: 32, scale: 0.2, window: None, softcap: None };
    let format = WeightFormat::BF16;
    let (kv, groups) = (KvDtype::BF16, Some(GroupScore::TwoBest));
    vec![
        Case::Norm { rows: 3, cols: 64, run: 64 },
        Case::Linear { rows: 3, in_features: 64, out_features: 16, format, bias: true },
        Case::Linear {
            rows: 3,
            in_features: 64,
            out_features: 16,
            format: WeightFormat::Ggml(BlockFormat::Q8_0),
            bias: false,
        },
        Case::Elementwise { rows: 3, cols: 7 },
        Case::Attention { params, kv, history: 0 },
        Case::Latent { heads: 2, nope: 8, rope: 4, v: 8, rank: 16, format, kv, history: 0 },
        Case::Moe { rows: 3, hidden: 64, intermediate: 32, experts: 8, format, groups },
    ]
}

/// Opens a device, runs a case, and closes it.
fn run(case: &Case, fused: bool) -> Result<(), DeviceError> {
    let backend = AscendBackend::new(&AscendOptions { fused, ..options(DType::BF16) })?;
    let outcome = conformance::run(case, &backend)?;
    assert!(outcome.passed(), "{case:?}: {} of {}", outcome.max_error(), outcome.tolerance);
    Ok(())
}

/// Calls of the simulator's functions that a case makes.
fn calls(simulator: &Simulator, case: &Case, fused: bool) -> BTreeMap<String, u64> {
    simulator.reset();
    run(case, fused).unwrap_or_else(|error| panic!("{case:?}: {error}"));
    simulator.expect_clean();
    serde_json::from_value(simulator.report()["calls"].clone()).expect("counts")
}

/// Whether what a call gives back, or is only asked, is at stake: the simulator's refusal of such a call leaves what it
/// should have taken away.
fn takes_away(symbol: &str) -> bool {
    ["aclDestroy", "aclrtDestroy", "aclrtFree", "aclrtReset", "ascend_sim"]
        .iter()
        .any(|prefix| symbol.starts_with(prefix))
}

#[test]
fn any_call_that_fails_ends_in_a_typed_error_with_nothing_left() {
    let simulator = Simulator::new();
    let mut failed = 0;
    let cases = cases();
    for (turn, (case, fused)) in cases.iter().flat_map(|case| [(case, false), (case, true)]).enumerate() {
        for (i, (symbol, count)) in calls(&simulator, case, fused).into_iter().enumerate() {
            if takes_away(&symbol) {
                continue;
            }
            let faults = [(1, 561002), (count.div_ceil(2), 507015), (count, 507899)];
            // In turn, and over all families each of them for every function.
            let (n, code) = faults[(i + turn) % 3];
            simulator.control(&format!("fault={symbol}:{n}:{code}"));
            let result = run(case, fused);
            simulator.calm();
            let fits = match (&result, describe(code).1) {
                // What is only asked, or has another way.
                (Ok(()), _) => true,
                (Err(DeviceError::Lost { .. }), Class::Lost) => true,
                (Err(DeviceError::Poisoned { .. }), Class::Poisoned) => true,
                // While it is opened.
                (Err(DeviceError::Unavailable { .. }), _) => true,
                // What makes an object gives null, and no code.
                (Err(DeviceError::Execution { .. }), class) => !class.is_final() || symbol.starts_with("aclCreate"),
                _ => false,
            };
            assert!(fits, "{case:?}: {symbol} {n} gives {code}: {result:?}");
            failed += usize::from(result.is_err());
            assert_eq!(simulator.live(), BTreeMap::new(), "{case:?}: {symbol} {n} gives {code}: {result:?}");
            assert_eq!(simulator.violations(), [""; 0], "{case:?}: {symbol} {n} gives {code}: {result:?}");
        }
    }
    assert!(failed > 100, "{failed}");
}

#[test]
fn a_device_with_too_little_memory_says_so_and_leaves_nothing() {
    let simulator = Simulator::new();
    let mut refused = 0;
    for case in cases() {
        for kilobytes in [1, 16, 64, 256, 1 << 10, 4 << 10, 16 << 10, 40 << 10] {
            simulator.control(&format!("memory={}", kilobytes << 10));
            match run(&case, true) {
                Ok(()) => {}
                Err(DeviceError::OutOfMemory { bytes, .. }) => {
                    assert!(bytes > 0);
                    refused += 1;
                }
                Err(error) => panic!("{case:?} in {kilobytes} KiB: {error}"),
            }
            simulator.expect_clean();
        }
    }
    assert!(refused > 20, "{refused}");
}

#[test]
fn a_stream_that_hangs_ends_every_operation_within_the_timeout() {
    let simulator = Simulator::new();
    let timeout = std::time::Duration::from_millis(200);
    for case in cases() {
        simulator.control("hang=on");
        let hung = AscendBackend::new(&AscendOptions { timeout, ..options(DType::BF16) })
            .and_then(|backend| conformance::run(&case, &backend).map(|_| ()));
        assert!(matches!(hung, Err(DeviceError::Lost { .. })), "{case:?}: {hung:?}");
        simulator.calm();
        simulator.expect_clean();
    }
}
