//! What a GPU does at most, measured on a simulated one: rates that can be divided by, and nothing left of the measuring.

mod common;

use baton_device::{Backend, DType};
use common::Simulator;

#[test]
fn limits_are_rates_in_the_type_of_activations_and_leave_no_buffer_in_use() {
    let Some(simulator) = Simulator::new() else { return };
    simulator.control("memory=134217728");
    for activations in [DType::BF16, DType::F16, DType::F32] {
        let backend = simulator.open(activations);
        let before = backend.memory().unwrap().unwrap();
        let limits = backend.limits().unwrap();
        assert_eq!((limits.access, limits.mul_adds.len()), ("copy", 1));
        for rate in [limits.bytes, limits.mul_adds[&activations.to_string()]] {
            assert!(rate.is_finite() && rate > 1e6, "{activations}: {limits:?}");
        }
        let after = backend.memory().unwrap().unwrap();
        // Graphs of lists that came again stay: they take kilobytes, what is measured on takes megabytes.
        assert!(after.free + (1 << 20) > before.free, "{before:?}, {after:?}");
        drop(backend);
        simulator.expect_clean();
    }
}
