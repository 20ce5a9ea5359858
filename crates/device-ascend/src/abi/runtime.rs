//! Functions of the runtime, of the objects that operators take, and of collectives.

use std::ffi::{c_char, c_void};

use super::{Comm, Context, Graph, IntArrayPtr, ScalarPtr, Stream, TensorListPtr, TensorPtr, functions};

functions! {
    /// `libascendcl.so` or `libacl_rt.so`.
    #[cfg_attr(not(test), allow(dead_code))] // `memcpy` waits for no stream: tests read too early with it
    pub(crate) struct Runtime {
        required {
            init: "aclInit" fn(*const c_char) -> i32;
            recent_error: "aclGetRecentErrMsg" fn() -> *const c_char;
            device_count: "aclrtGetDeviceCount" fn(*mut u32) -> i32;
            set_device: "aclrtSetDevice" fn(i32) -> i32;
            reset_device: "aclrtResetDevice" fn(i32) -> i32;
            soc_name: "aclrtGetSocName" fn() -> *const c_char;
            create_context: "aclrtCreateContext" fn(*mut Context, i32) -> i32;
            destroy_context: "aclrtDestroyContext" fn(Context) -> i32;
            set_context: "aclrtSetCurrentContext" fn(Context) -> i32;
            cann_attribute: "aclGetCannAttribute" fn(i32, *mut i32) -> i32;
            create_stream: "aclrtCreateStreamWithConfig" fn(*mut Stream, u32, u32) -> i32;
            destroy_stream: "aclrtDestroyStream" fn(Stream) -> i32;
            destroy_stream_by_force: "aclrtDestroyStreamForce" fn(Stream) -> i32;
            synchronize: "aclrtSynchronizeStreamWithTimeout" fn(Stream, i32) -> i32;
            malloc: "aclrtMalloc" fn(*mut *mut c_void, usize, i32) -> i32;
            free: "aclrtFree" fn(*mut c_void) -> i32;
            malloc_host: "aclrtMallocHost" fn(*mut *mut c_void, usize) -> i32;
            free_host: "aclrtFreeHost" fn(*mut c_void) -> i32;
            mem_info: "aclrtGetMemInfo" fn(i32, *mut usize, *mut usize) -> i32;
            memcpy_async: "aclrtMemcpyAsync" fn(*mut c_void, usize, *const c_void, usize, i32, Stream) -> i32;
            memset_async: "aclrtMemsetAsync" fn(*mut c_void, usize, i32, usize, Stream) -> i32;
        }
        optional {
            memcpy: "aclrtMemcpy" fn(*mut c_void, usize, *const c_void, usize, i32) -> i32;
            capture_begin: "aclmdlRICaptureBegin" fn(Stream, i32) -> i32;
            capture_end: "aclmdlRICaptureEnd" fn(Stream, *mut Graph) -> i32;
            execute_graph: "aclmdlRIExecuteAsync" fn(Graph, Stream) -> i32;
            destroy_graph: "aclmdlRIDestroy" fn(Graph) -> i32;
            version: "aclrtGetVersion" fn(*mut i32, *mut i32, *mut i32) -> i32;
            package_version: "aclsysGetVersionStr" fn(*mut c_char, *mut c_char) -> i32;
        }
    }
}

/// What graphs need; all or nothing.
#[derive(Clone, Copy)]
pub(crate) struct GraphFunctions {
    pub(crate) capture_begin: unsafe extern "C" fn(Stream, i32) -> i32,
    pub(crate) capture_end: unsafe extern "C" fn(Stream, *mut Graph) -> i32,
    pub(crate) execute: unsafe extern "C" fn(Graph, Stream) -> i32,
    pub(crate) destroy: unsafe extern "C" fn(Graph) -> i32,
}

impl Runtime {
    pub(crate) fn graph_functions(&self) -> Option<GraphFunctions> {
        Some(GraphFunctions {
            capture_begin: self.capture_begin?,
            capture_end: self.capture_end?,
            execute: self.execute_graph?,
            destroy: self.destroy_graph?,
        })
    }
}

functions! {
    /// `libnnopbase.so`.
    pub(crate) struct Meta {
        required {
            create_tensor: "aclCreateTensor"
                fn(*const i64, u64, i32, *const i64, i64, i32, *const i64, u64, *mut c_void) -> TensorPtr;
            destroy_tensor: "aclDestroyTensor" fn(TensorPtr) -> i32;
            create_scalar: "aclCreateScalar" fn(*mut c_void, i32) -> ScalarPtr;
            destroy_scalar: "aclDestroyScalar" fn(ScalarPtr) -> i32;
            create_int_array: "aclCreateIntArray" fn(*const i64, u64) -> IntArrayPtr;
            destroy_int_array: "aclDestroyIntArray" fn(IntArrayPtr) -> i32;
            create_tensor_list: "aclCreateTensorList" fn(*const TensorPtr, u64) -> TensorListPtr;
            destroy_tensor_list: "aclDestroyTensorList" fn(TensorListPtr) -> i32;
        }
        optional {}
    }
}

/// Bytes of `HcclRootInfo`.
pub(crate) const ROOT_INFO_BYTES: usize = 4108;

functions! {
    /// `libhccl.so`.
    pub(crate) struct Collectives {
        required {
            root_info: "HcclGetRootInfo" fn(*mut u8) -> i32;
            init_rank: "HcclCommInitRootInfo" fn(u32, *const u8, u32, *mut Comm) -> i32;
            all_reduce: "HcclAllReduce" fn(*mut c_void, *mut c_void, u64, i32, i32, Comm, Stream) -> i32;
            destroy: "HcclCommDestroy" fn(Comm) -> i32;
            error_string: "HcclGetErrorString" fn(i32) -> *const c_char;
        }
        optional {}
    }
}
