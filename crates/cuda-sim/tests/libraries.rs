//! The simulator as a program finds it: by the names of NVIDIA's libraries, through bindings that were generated from their headers; NCCL by
//! its path, since the binding does not know its name.

use std::ptr::null_mut;

use cuda_sim::{Simulator, can_compile, library_folder};
use cudarc::{
    cublaslt::sys as lt,
    driver::sys::{self as driver, CUresult},
    nvrtc::sys as nvrtc,
};

#[test]
fn libraries_that_are_opened_by_path_are_found_by_name() {
    if !can_compile() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    library_folder(folder.path()).expect("libraries");
    let mut names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|file| file.unwrap().path()).collect();
    names.sort();
    assert_eq!(names.len(), 4);
    for library in names {
        // SAFETY: opening the simulator runs nothing. It stays open.
        std::mem::forget(unsafe { libloading::Library::new(library) }.expect("it opens"));
    }
    let simulator = Simulator::new();
    simulator.reset();
    // SAFETY: pointers to results are valid, handles are those that were given.
    unsafe {
        assert!(driver::is_culib_present() && nvrtc::is_culib_present());
        assert!(lt::is_culib_present());
        assert_eq!(driver::cuInit(0), CUresult::CUDA_SUCCESS);
        let mut context = null_mut();
        assert_eq!(driver::cuDevicePrimaryCtxRetain(&mut context, 0), CUresult::CUDA_SUCCESS);
        assert_eq!(driver::cuCtxSetCurrent(context), CUresult::CUDA_SUCCESS);
        let (mut major, mut minor) = (0, 0);
        assert_eq!(nvrtc::nvrtcVersion(&mut major, &mut minor), nvrtc::nvrtcResult::NVRTC_SUCCESS);
        let mut handle = null_mut();
        assert_eq!(lt::cublasLtCreate(&mut handle), lt::cublasStatus_t::CUBLAS_STATUS_SUCCESS);
        let mut version = 0;
        let nccl = libloading::Library::new(folder.path().join("libnccl.so.2")).expect("it opens");
        let tell = nccl.get::<unsafe extern "C" fn(*mut i32) -> i32>("ncclGetVersion").expect("a function");
        assert_eq!(tell(&mut version), 0);
        assert_eq!(simulator.count("live.blas_handles"), 1, "one state behind all names");
        assert_eq!(lt::cublasLtDestroy(handle), lt::cublasStatus_t::CUBLAS_STATUS_SUCCESS);
        assert!(version > 0 && major == 13);
        assert_eq!(driver::cuDevicePrimaryCtxRelease_v2(0), CUresult::CUDA_SUCCESS);
        assert_eq!(driver::cuCtxSynchronize(), CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED);
    }
    assert!(simulator.report().starts_with("{\"live.contexts\":0,"), "{}", simulator.report());
}
