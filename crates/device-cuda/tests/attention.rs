//! Attention on a simulated GPU, judged by `Reference`.

use std::sync::OnceLock;

use baton_device::conformance::{self, Case};
use baton_device::{Backend, DType};
use baton_device_cuda::{CudaBackend, CudaOptions};
use cuda_sim::Simulator;

fn simulator() -> Simulator {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        cuda_sim::library_folder(folder.path()).unwrap();
        // SAFETY: one thread.
        unsafe { std::env::set_var("BATON_CUDA_LIBS", folder.path()) };
        folder
    });
    Simulator::new()
}

fn judged(activations: DType, order: &str) {
    let simulator = simulator();
    simulator.control(&format!("order={order}"));
    let backend = CudaBackend::new(&CudaOptions { activations, ..CudaOptions::default() }).unwrap();
    let part = std::env::var("BATON_CASES").unwrap_or_default();
    let mut wrong = Vec::new();
    let cases = conformance::cases();
    for case in cases.iter().filter(|case| matches!(case, Case::Attention { .. } | Case::Latent { .. })) {
        if !format!("{case:?}").contains(&part) || !backend.caps().refusals(&case.needs()).is_empty() {
            continue;
        }
        match conformance::run(case, &backend) {
            Ok(outcome) if outcome.passed() => {}
            Ok(outcome) => wrong.push(format!("{case:?}: {} over {}", outcome.max_error(), outcome.tolerance)),
            Err(error) => wrong.push(format!("{case:?}: {error}")),
        }
    }
    assert!(wrong.is_empty(), "{activations}: {}\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn f32() {
    judged(DType::F32, "forward");
}

#[test]
fn bf16() {
    judged(DType::BF16, "forward");
}

#[test]
fn f16() {
    judged(DType::F16, "forward");
}
