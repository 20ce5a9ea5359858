//! One device as its owner thread sees it: context, stream, memory, and the protocol of operators in two phases.
//!
//! Invariants: everything here happens on the owner thread. All work is on one stream, in order; the host sees a result only
//! after [`Device::synchronize`].

mod copies;
mod memory;
mod pieces;

use std::cell::Cell;
use std::ffi::CStr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use half::{bf16, f16};

use crate::abi::consts::stream_flag;
use crate::abi::operators::{Execute, Operators};
use crate::abi::{Comm, Context, ExecutorPtr, Stream};
use crate::chip::Chip;
use crate::error::AscendError;
use crate::libraries::Acl;
use crate::memory::{Pinned, Pool};
use crate::object::{Address, DataType, IntArray, Scalar, Tensor, TensorList, View};
use pieces::Pieces;

/// What a device is told when it is opened.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DeviceOptions {
    /// Number among those that the runtime sees.
    pub(crate) id: i32,
    /// The longest that the host waits for the stream.
    pub(crate) timeout: Duration,
    /// Wait behind every operator, so that an error names its cause.
    pub(crate) blocking: bool,
}

/// An opened device.
pub(crate) struct Device {
    acl: &'static Acl,
    options: DeviceOptions,
    chip: Chip,
    context: Context,
    stream: Stream,
    pool: Pool,
    pinned: Pinned,
    /// Scratch of the operator that is queued last, and so of every one before it.
    workspace: Option<(Address, usize)>,
    /// Zero bytes.
    zeros: Option<(Address, usize)>,
    /// The device's place among ranks.
    pub(crate) comm: Option<Comm>,
    /// Calls that were made and not issued yet.
    pub(crate) pieces: Pieces,
    /// Set by an error after which nothing can be asked of it any more.
    dead: Cell<bool>,
}

impl Device {
    /// Makes the device current on this thread, with a context and a stream of its own. If that fails half-way, nothing of it
    /// remains. It makes graphs until there is an objection.
    pub(crate) fn open(
        acl: &'static Acl,
        options: DeviceOptions,
        chip: Chip,
        objection: Arc<OnceLock<String>>,
    ) -> Result<Self, AscendError> {
        // SAFETY: the first call of this thread, which makes the device current for all that follow.
        check(acl, "aclrtSetDevice", unsafe { (acl.runtime.set_device)(options.id) })?;
        let mut device = Self {
            acl,
            options,
            chip,
            context: Context::NULL,
            stream: Stream::NULL,
            pool: Pool::default(),
            pinned: Pinned::NONE,
            workspace: None,
            zeros: None,
            comm: None,
            pieces: Pieces::new(acl.runtime.graph_functions(), objection),
            dead: Cell::new(false),
        };
        match device.create() {
            Ok(()) => Ok(device),
            Err(error) => {
                device.close();
                Err(error)
            }
        }
    }

    fn create(&mut self) -> Result<(), AscendError> {
        let runtime = &self.acl.runtime;
        let mut pinned = std::ptr::null_mut();
        let flags = (stream_flag::FAST_LAUNCH | stream_flag::FAST_SYNC) as u32;
        // SAFETY: out pointers are valid, and the device is current.
        unsafe {
            let code = (runtime.create_context)(&raw mut self.context, self.options.id);
            self.check("aclrtCreateContext", code)?;
            self.check("aclrtSetCurrentContext", (runtime.set_context)(self.context))?;
            let code = (runtime.create_stream)(&raw mut self.stream, 0, flags);
            self.check("aclrtCreateStreamWithConfig", code)?;
            self.check("aclrtMallocHost", (runtime.malloc_host)(&raw mut pinned, Pinned::BYTES))?;
        }
        // SAFETY: just allocated, and freed when the device is closed.
        self.pinned = unsafe { Pinned::new(pinned.cast(), Pinned::BYTES) };
        Ok(())
    }

    /// Gives everything back, as far as the device still takes it.
    pub(crate) fn close(mut self) {
        let runtime = &self.acl.runtime;
        // SAFETY: what is destroyed was made and is used no more. What a dead device refuses is gone anyway, so results do not
        // matter.
        unsafe {
            let done = !self.dead.get()
                && (self.stream == Stream::NULL || (runtime.synchronize)(self.stream, self.timeout_ms()) == 0);
            // A stream that is not done is ended first: it may still use the memory.
            if !done && self.stream != Stream::NULL {
                (runtime.destroy_stream_by_force)(self.stream);
            }
            self.pieces.retire_graphs();
            self.pieces.destroy_retired();
            if let (Some(comm), Some(collectives)) = (self.comm.take(), &self.acl.collectives) {
                (collectives.destroy)(comm);
            }
            self.pool.drain().into_iter().for_each(|segment| _ = (runtime.free)(segment.as_ptr()));
            if !self.pinned.start().is_null() {
                (runtime.free_host)(self.pinned.start().cast());
            }
            if done && self.stream != Stream::NULL {
                (runtime.destroy_stream)(self.stream);
            }
            if self.context != Context::NULL {
                (runtime.destroy_context)(self.context);
            }
            (runtime.reset_device)(self.options.id);
        }
    }

    pub(crate) fn chip(&self) -> Chip {
        self.chip
    }

    pub(crate) fn operators(&self) -> &'static Operators {
        &self.acl.operators
    }

    pub(crate) fn acl(&self) -> &'static Acl {
        self.acl
    }

    #[cfg(test)]
    pub(crate) fn context(&self) -> Context {
        self.context
    }

    #[cfg(test)]
    pub(crate) fn workspace_now(&self) -> Option<(Address, usize)> {
        self.workspace
    }

    pub(crate) fn stream(&self) -> Stream {
        self.stream
    }

    fn check(&self, call: &'static str, code: i32) -> Result<(), AscendError> {
        check(self.acl, call, code).inspect_err(|error| self.note(error))
    }

    pub(crate) fn note(&self, error: &AscendError) {
        self.dead.set(self.dead.get() || error.class().is_final());
    }

    fn timeout_ms(&self) -> i32 {
        i32::try_from(self.options.timeout.as_millis()).unwrap_or(i32::MAX)
    }

    // Objects.

    pub(crate) fn tensor(&self, view: &View) -> Tensor {
        Tensor::new(view)
    }

    pub(crate) fn list(&self, views: &[&View]) -> TensorList {
        TensorList(views.iter().map(|view| self.tensor(view)).collect())
    }

    pub(crate) fn scalar(&self, value: f32, dtype: DataType) -> Scalar {
        Scalar::new(value, dtype)
    }

    pub(crate) fn ints(&self, values: &[i64]) -> IntArray {
        IntArray(values.to_vec())
    }

    // Operators.

    /// The protocol: `prepare` checks arguments and makes an executor, which the second phase consumes even if it fails. The
    /// workspace may be used by the next operator at once, since both are on one stream.
    pub(crate) fn two_phase(
        &mut self,
        name: &'static str,
        execute: Execute,
        prepare: impl FnOnce(*mut u64, *mut ExecutorPtr) -> i32,
    ) -> Result<(), AscendError> {
        let (mut size, mut executor) = (0, ExecutorPtr::NULL);
        self.check(name, prepare(&raw mut size, &raw mut executor))?;
        let workspace = match self.workspace(size as usize) {
            Ok(workspace) => workspace,
            Err(error) => {
                // No workspace where one is needed is refused by the second phase, which consumes the executor: the one way
                // to be rid of it that is documented.
                // SAFETY: the executor is fresh and used once; the library owns the text, which concerns nobody.
                unsafe {
                    execute(std::ptr::null_mut(), size, executor, self.stream);
                    (self.acl.runtime.recent_error)();
                }
                return Err(error);
            }
        };
        // SAFETY: the executor is fresh and used once; the workspace has `size` bytes.
        let code = unsafe { execute(workspace.as_ptr(), size, executor, self.stream) };
        self.check(name, code)?;
        self.settle()
    }

    /// Behind an operation: waits for it where that was asked for.
    pub(crate) fn settle(&mut self) -> Result<(), AscendError> {
        if self.options.blocking { self.synchronize() } else { Ok(()) }
    }

    fn workspace(&mut self, bytes: usize) -> Result<Address, AscendError> {
        if bytes == 0 {
            return Ok(Address::NULL);
        }
        if let Some((address, _)) = self.workspace.filter(|(_, size)| *size >= bytes) {
            return Ok(address);
        }
        if self.pieces.is_capturing() {
            return Err(AscendError::OutOfMemory {
                bytes,
                message: "the workspace stays while a graph is captured".into(),
            });
        }
        if let Some((address, _)) = self.workspace.take() {
            self.free(address);
        }
        let address = if self.pieces.is_ending() { self.alloc_apart(bytes)? } else { self.alloc(bytes)? };
        self.workspace = Some((address, bytes));
        Ok(address)
    }

    /// Gives the workspace back, which otherwise stays as large as the largest was.
    pub(crate) fn release_workspace(&mut self) {
        if let Some((address, _)) = self.workspace.take() {
            self.free(address);
            self.pieces.start_anew();
        }
    }
}

/// Turns a code into an error with the library's words, which only this thread can read, and only now.
pub(crate) fn check(acl: &Acl, call: &'static str, code: i32) -> Result<(), AscendError> {
    if code == 0 {
        return Ok(());
    }
    // SAFETY: the library owns the text; it is copied before anything else is called.
    let message = unsafe {
        let text = (acl.runtime.recent_error)();
        if text.is_null() { String::new() } else { CStr::from_ptr(text).to_string_lossy().into_owned() }
    };
    Err(AscendError::Call { call, code, message, late: false })
}

/// Values as the bytes of a float type, to nearest even.
pub(crate) fn encode(values: &[f32], dtype: DataType) -> Vec<u8> {
    match dtype {
        DataType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DataType::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        DataType::BF16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        other => panic!("no floats of {other:?}"),
    }
}

/// Values as a type keeps them.
pub(crate) fn rounded(mut values: Vec<f32>, dtype: DataType) -> Vec<f32> {
    match dtype {
        DataType::F16 => values.iter_mut().for_each(|x| *x = f16::from_f32(*x).to_f32()),
        DataType::BF16 => values.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32()),
        _ => {}
    }
    values
}

/// The reverse of [`encode`] for f32.
pub(crate) fn decode(bytes: &[u8], out: &mut Vec<f32>) {
    out.clear();
    out.extend(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)));
}
