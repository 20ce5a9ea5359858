//! NCCL's functions. The binding looks for its library under the version numbers of CUDA, of which NCCL's own file name,
//! `libnccl.so.2`, has none: so it is opened here.

use std::ffi::{c_char, c_int, c_void};
use std::path::PathBuf;
use std::sync::OnceLock;

use cudarc::nccl::sys::{cudaStream_t, ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclResult_t};
use libloading::Library;

use crate::libraries;

/// How its file is called, but for the version.
pub(crate) const FILE: &str = "libnccl.so";

/// The functions that are called, with the types of `nccl.h`.
pub(crate) struct Nccl {
    pub(crate) library: Library,
    pub(crate) version: unsafe extern "C" fn(*mut c_int) -> ncclResult_t,
    pub(crate) init_all: unsafe extern "C" fn(*mut ncclComm_t, c_int, *const c_int) -> ncclResult_t,
    pub(crate) all_reduce: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        ncclDataType_t,
        ncclRedOp_t,
        ncclComm_t,
        cudaStream_t,
    ) -> ncclResult_t,
    pub(crate) broadcast: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        ncclDataType_t,
        c_int,
        ncclComm_t,
        cudaStream_t,
    ) -> ncclResult_t,
    pub(crate) async_error: unsafe extern "C" fn(ncclComm_t, *mut ncclResult_t) -> ncclResult_t,
    pub(crate) abort: unsafe extern "C" fn(ncclComm_t) -> ncclResult_t,
    pub(crate) destroy: unsafe extern "C" fn(ncclComm_t) -> ncclResult_t,
    pub(crate) error_string: unsafe extern "C" fn(ncclResult_t) -> *const c_char,
    pub(crate) last_error: unsafe extern "C" fn(ncclComm_t) -> *const c_char,
}

impl Nccl {
    /// The functions of a library, if it has them all: the last of them came with version 2.13.
    fn of(library: Library) -> Option<Self> {
        // SAFETY: the fields' types are those of the functions.
        unsafe {
            Some(Self {
                version: *library.get("ncclGetVersion").ok()?,
                init_all: *library.get("ncclCommInitAll").ok()?,
                all_reduce: *library.get("ncclAllReduce").ok()?,
                broadcast: *library.get("ncclBroadcast").ok()?,
                async_error: *library.get("ncclCommGetAsyncError").ok()?,
                abort: *library.get("ncclCommAbort").ok()?,
                destroy: *library.get("ncclCommDestroy").ok()?,
                error_string: *library.get("ncclGetErrorString").ok()?,
                last_error: *library.get("ncclGetLastError").ok()?,
                library,
            })
        }
    }
}

/// NCCL, if there is one: from the given folders, else the system's.
pub(crate) fn find() -> Option<&'static Nccl> {
    static NCCL: OnceLock<Option<Nccl>> = OnceLock::new();
    let find = || {
        let names = [format!("{FILE}.2"), FILE.to_owned()].map(PathBuf::from);
        // SAFETY: initialisers of libraries that the operator named, or the system finds.
        let open = |path: PathBuf| unsafe { Library::new(&path) }.ok().and_then(Nccl::of);
        libraries::given(FILE).into_iter().chain(names).find_map(open)
    };
    NCCL.get_or_init(find).as_ref()
}
