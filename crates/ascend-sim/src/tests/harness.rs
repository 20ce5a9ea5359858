//! One test at a time on the state of the process: a device, a stream, and short forms of the calls.

use std::{
    ffi::{CStr, CString, c_void},
    ptr::null_mut,
    sync::{Mutex, MutexGuard, PoisonError},
};

pub use crate::{
    array::row_major,
    constants::*,
    control::{Settings, ascend_sim_control},
    machine::lock,
    meta::*,
    op::executor::*,
    ops::{arithmetic::*, copy::*, matmul::*},
    report::{ascend_sim_report, ascend_sim_reset},
    rt::{copy::*, device::*, event::*, graph::*, hccl::*, memory::*, stream::*},
};

pub type Ptr = *mut c_void;
/// Phase 2 of any operator.
pub type Execute = extern "C" fn(Ptr, u64, Ptr, Ptr) -> i32;

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A thread with device 0 and a stream, on a machine without violations.
pub struct Session {
    pub stream: Ptr,
    _turn: MutexGuard<'static, ()>,
}

impl Session {
    pub fn new() -> Self {
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        aclInit(std::ptr::null());
        let devices = {
            let mut m = lock();
            m.settings = Settings::from_environment();
            m.settings.devices = 16;
            m.devices.len() as i32
        };
        (0..devices).for_each(|device| assert_eq!(aclrtResetDeviceForce(device), 0));
        lock().settings.devices = 2;
        ascend_sim_reset();
        message();
        assert_eq!(aclrtSetDevice(0), 0);
        let stream = made(|out| unsafe { aclrtCreateStream(out) });
        Self { stream, _turn: turn }
    }

    /// Device memory with these bytes in it.
    pub fn upload(&self, bytes: &[u8]) -> Ptr {
        let address = made(|out| unsafe { aclrtMalloc(out, bytes.len(), 0) });
        let kind = ACL_MEMCPY_HOST_TO_DEVICE as i32;
        assert_eq!(aclrtMemcpy(address, bytes.len(), bytes.as_ptr().cast(), bytes.len(), kind), 0);
        address
    }

    pub fn download(&self, address: Ptr, len: usize) -> Vec<u8> {
        let mut bytes = vec![0_u8; len];
        assert_eq!(aclrtMemcpy(bytes.as_mut_ptr().cast(), len, address, len, ACL_MEMCPY_DEVICE_TO_HOST as i32), 0);
        bytes
    }

    pub fn floats(&self, address: Ptr, len: usize) -> Vec<f32> {
        let bytes = self.download(address, len * 4);
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    pub fn upload_floats(&self, values: &[f32]) -> Ptr {
        self.upload(&values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>())
    }

    /// Both phases, with a workspace as asked for.
    pub fn run(&self, prepare: impl FnOnce(*mut u64, *mut Ptr) -> i32, execute: Execute) -> i32 {
        let (mut size, mut executor) = (0, null_mut());
        match prepare(&mut size, &mut executor) {
            0 => execute(made(|out| unsafe { aclrtMalloc(out, size as usize, 0) }), size, executor, self.stream),
            code => code,
        }
    }

    pub fn synchronize(&self) -> i32 {
        aclrtSynchronizeStream(self.stream)
    }

    pub fn violations(&self) -> Vec<String> {
        lock().counters.violations.clone()
    }

    /// The one violation there is, which has the words.
    #[track_caller]
    pub fn assert_violation(&self, words: &str) {
        let violations = self.violations();
        assert!(matches!(&violations[..], [one] if one.contains(words)), "{words:?} in {violations:?}");
    }

    /// `self + alpha * other`, all of one dense shape, with both phases.
    pub fn add(&self, a: Ptr, b: Ptr, alpha: f32, out: Ptr) -> i32 {
        let alpha = scalar(alpha);
        self.run(|size, executor| unsafe { aclnnAddGetWorkspaceSize(a, b, alpha, out, size, executor) }, aclnnAdd)
    }
}

/// `ascend_sim_control`.
#[track_caller]
pub fn control(text: &str) {
    let text = CString::new(text).unwrap();
    // SAFETY: the text ends in zero.
    assert_eq!(unsafe { ascend_sim_control(text.as_ptr()) }, 0, "{:?}", message());
}

/// `ascend_sim_report`.
pub fn report() -> String {
    // SAFETY: the buffer has the room that is said.
    unsafe {
        let mut text = vec![0_u8; ascend_sim_report(null_mut(), 0) + 1];
        ascend_sim_report(text.as_mut_ptr().cast(), text.len());
        text.pop();
        String::from_utf8(text).unwrap()
    }
}

/// What a call makes, which must succeed.
pub fn made(call: impl FnOnce(*mut Ptr) -> i32) -> Ptr {
    let mut out = null_mut();
    assert_eq!(call(&mut out), 0, "{:?}", message());
    out
}

/// A row-major tensor.
pub fn tensor(address: Ptr, dims: &[i64], dtype: i64) -> Ptr {
    view(address, dims, &row_major(dims), 0, dims, dtype)
}

pub fn view(address: Ptr, dims: &[i64], strides: &[i64], offset: i64, storage: &[i64], dtype: i64) -> Ptr {
    let (rank, stored) = (dims.len() as u64, storage.len() as u64);
    let (dtype, format) = (dtype as i32, ACL_FORMAT_ND as i32);
    // SAFETY: the slices are as long as is said.
    unsafe {
        let strides = strides.as_ptr();
        aclCreateTensor(dims.as_ptr(), rank, dtype, strides, offset, format, storage.as_ptr(), stored, address)
    }
}

pub fn scalar(value: f32) -> Ptr {
    // SAFETY: a float lies at the pointer.
    unsafe { aclCreateScalar((&raw const value).cast(), ACL_FLOAT as i32) }
}

pub fn message() -> Option<String> {
    let text = aclGetRecentErrMsg();
    // SAFETY: the text ends in zero and is valid until the thread's next call.
    (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_str().unwrap().to_owned())
}
