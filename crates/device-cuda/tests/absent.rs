//! A machine without CUDA: what is missing is said, by probe and by opening.

use baton_device::DeviceError;
use baton_device_cuda::{CudaBackend, CudaOptions, probe};

#[test]
fn a_machine_without_cuda_says_what_was_looked_for_and_where_it_comes_from() {
    let facts = probe(3);
    assert_eq!(facts.device, "cuda:3");
    if facts.libraries.iter().any(|library| library.role == "driver" && !library.opened.is_empty()) {
        eprintln!("skipped, this machine has a driver");
        return;
    }
    assert_eq!((facts.count, facts.libraries.len()), (0, 4));
    assert!(facts.missing.iter().any(|reason| reason.contains("libcuda.so")), "{:?}", facts.missing);
    assert!(facts.libraries.iter().all(|library| library.opened.is_empty() != library.tried.is_empty()));
    match CudaBackend::new(&CudaOptions { device: 3, ..CudaOptions::default() }).map(|_| ()) {
        Err(DeviceError::Unavailable { device, reason }) => {
            assert!(device == "cuda:3" && reason.contains("libcuda.so"), "{device}: {reason}");
        }
        other => panic!("{other:?}"),
    }
}
