//! One device as its owner thread sees it: context, stream, memory, and the protocol of operators in two phases.
//!
//! Invariants: everything here happens on the owner thread. All work is on one stream, in order; the host sees a result only
//! after [`Device::synchronize`].

use std::ffi::CStr;
use std::time::Duration;

use half::{bf16, f16};

use crate::abi::consts::{malloc_policy, mem_attr, memcpy_kind, stream_flag};
use crate::abi::operators::{Execute, Operators};
use crate::abi::{Context, ExecutorPtr, Stream};
use crate::chip::Chip;
use crate::error::AscendError;
use crate::libraries::Acl;
use crate::memory::{Pinned, Pool};
use crate::object::{Address, DataType, IntArray, Scalar, Tensor, TensorList, View};

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
}

impl Device {
    /// Makes the device current on this thread, with a context and a stream of its own.
    pub(crate) fn open(acl: &'static Acl, options: DeviceOptions, chip: Chip) -> Result<Self, AscendError> {
        let runtime = &acl.runtime;
        let (mut context, mut stream, mut pinned) = (Context::NULL, Stream::NULL, std::ptr::null_mut());
        // SAFETY: out pointers are valid; the thread makes the device current before anything needs one.
        unsafe {
            check(acl, "aclrtSetDevice", (runtime.set_device)(options.id))?;
            check(acl, "aclrtCreateContext", (runtime.create_context)(&raw mut context, options.id))?;
            check(acl, "aclrtSetCurrentContext", (runtime.set_context)(context))?;
            let flags = (stream_flag::FAST_LAUNCH | stream_flag::FAST_SYNC) as u32;
            check(acl, "aclrtCreateStreamWithConfig", (runtime.create_stream)(&raw mut stream, 0, flags))?;
            check(acl, "aclrtMallocHost", (runtime.malloc_host)(&raw mut pinned, Pinned::BYTES))?;
        }
        // SAFETY: just allocated, and freed when the device is closed.
        let pinned = unsafe { Pinned::new(pinned.cast(), Pinned::BYTES) };
        Ok(Self { acl, options, chip, context, stream, pool: Pool::default(), pinned, workspace: None, zeros: None })
    }

    /// Gives everything back, as far as the device still takes it.
    pub(crate) fn close(mut self) {
        let runtime = &self.acl.runtime;
        let blocks = self.pool.drain();
        // SAFETY: nothing is used after this; what a dead device refuses is gone anyway, so results do not matter.
        unsafe {
            if (runtime.synchronize)(self.stream, self.timeout_ms()) == 0 {
                blocks.into_iter().for_each(|block| _ = (runtime.free)(block.as_ptr()));
                (runtime.free_host)(self.pinned.start().cast());
                (runtime.destroy_stream)(self.stream);
            } else {
                (runtime.destroy_stream_by_force)(self.stream);
                blocks.into_iter().for_each(|block| _ = (runtime.free)(block.as_ptr()));
                (runtime.free_host)(self.pinned.start().cast());
            }
            (runtime.destroy_context)(self.context);
            (runtime.reset_device)(self.options.id);
        }
    }

    pub(crate) fn chip(&self) -> Chip {
        self.chip
    }

    pub(crate) fn operators(&self) -> &'static Operators {
        &self.acl.operators
    }

    fn check(&self, call: &'static str, code: i32) -> Result<(), AscendError> {
        check(self.acl, call, code)
    }

    fn timeout_ms(&self) -> i32 {
        i32::try_from(self.options.timeout.as_millis()).unwrap_or(i32::MAX)
    }

    // Objects.

    pub(crate) fn tensor(&self, view: &View) -> Result<Tensor, AscendError> {
        Tensor::new(&self.acl.meta, view)
    }

    pub(crate) fn list(&self, views: &[&View]) -> Result<TensorList, AscendError> {
        let tensors = views.iter().map(|view| self.tensor(view)).collect::<Result<_, _>>()?;
        TensorList::new(&self.acl.meta, tensors)
    }

    pub(crate) fn scalar(&self, value: f32, dtype: DataType) -> Result<Scalar, AscendError> {
        Scalar::new(&self.acl.meta, value, dtype)
    }

    pub(crate) fn ints(&self, values: &[i64]) -> Result<IntArray, AscendError> {
        IntArray::new(&self.acl.meta, values)
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
                if let Some(destroy) = self.acl.meta.destroy_executor {
                    // SAFETY: the executor has not been consumed. That this frees one that is not repeatable: UNCONFIRMED.
                    unsafe { destroy(executor) };
                }
                return Err(error);
            }
        };
        // SAFETY: the executor is fresh and used once; the workspace has `size` bytes.
        let code = unsafe { execute(workspace.as_ptr(), size, executor, self.stream) };
        self.check(name, code)?;
        if self.options.blocking { self.synchronize() } else { Ok(()) }
    }

    fn workspace(&mut self, bytes: usize) -> Result<Address, AscendError> {
        if bytes == 0 {
            return Ok(Address::NULL);
        }
        if let Some((address, size)) = self.workspace {
            if size >= bytes {
                return Ok(address);
            }
            self.workspace = None;
            self.free(address);
        }
        let address = self.alloc(bytes)?;
        self.workspace = Some((address, bytes));
        Ok(address)
    }

    // Memory.

    /// A block of at least `bytes`; its contents are whatever they were.
    pub(crate) fn alloc(&mut self, bytes: usize) -> Result<Address, AscendError> {
        let bytes = Pool::block_bytes(bytes);
        if let Some(address) = self.pool.take(bytes) {
            return Ok(address);
        }
        let address = match self.malloc(bytes) {
            Err(AscendError::Call { code: 207001 | 207018, .. }) => {
                self.release_free()?;
                self.malloc(bytes)?
            }
            other => other?,
        };
        self.pool.adopt(address, bytes);
        Ok(address)
    }

    fn malloc(&self, bytes: usize) -> Result<Address, AscendError> {
        let mut ptr = std::ptr::null_mut();
        // SAFETY: a valid out pointer; `bytes` is over 0.
        let code = unsafe { (self.acl.runtime.malloc)(&raw mut ptr, bytes, malloc_policy::HUGE_FIRST) };
        self.check("aclrtMalloc", code)?;
        Ok(Address(ptr.addr()))
    }

    /// Takes a block back; work that was queued may still use it.
    pub(crate) fn free(&mut self, address: Address) {
        self.pool.give_back(address);
    }

    /// Gives free blocks to the device, for blocks of other sizes.
    fn release_free(&mut self) -> Result<(), AscendError> {
        self.synchronize()?;
        for address in self.pool.drain_free() {
            // SAFETY: nothing uses the block: it was given back, and the stream is done.
            self.check("aclrtFree", unsafe { (self.acl.runtime.free)(address.as_ptr()) })?;
        }
        Ok(())
    }

    /// Free and total bytes of the device.
    pub(crate) fn memory(&self) -> Result<(usize, usize), AscendError> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: valid out pointers.
        let code = unsafe { (self.acl.runtime.mem_info)(mem_attr::HBM, &raw mut free, &raw mut total) };
        self.check("aclrtGetMemInfo", code)?;
        Ok((free, total))
    }

    /// Runs `work` with a block that is given back behind it.
    pub(crate) fn with_scratch<T>(
        &mut self,
        bytes: usize,
        work: impl FnOnce(&mut Self, Address) -> Result<T, AscendError>,
    ) -> Result<T, AscendError> {
        let block = self.alloc(bytes)?;
        let result = work(self, block);
        self.free(block);
        result
    }

    /// Runs `work` with contiguous scratch views, which are given back behind it.
    pub(crate) fn with_views<const N: usize, T>(
        &mut self,
        shapes: [(DataType, &[usize]); N],
        work: impl FnOnce(&mut Self, [View; N]) -> Result<T, AscendError>,
    ) -> Result<T, AscendError> {
        let mut bytes = 0;
        let starts = shapes.map(|(dtype, dims)| {
            let start = bytes;
            bytes += Pool::block_bytes(dims.iter().product::<usize>() * dtype.bytes());
            start
        });
        self.with_scratch(bytes, |device, block| {
            let view = |i: usize| View::new(Address(block.0 + starts[i]), shapes[i].0, shapes[i].1);
            work(device, std::array::from_fn(view))
        })
    }

    /// At least `bytes` zero bytes, which nobody writes to.
    pub(crate) fn zeros(&mut self, bytes: usize) -> Result<Address, AscendError> {
        if let Some((address, size)) = self.zeros {
            if size >= bytes {
                return Ok(address);
            }
            self.zeros = None;
            self.free(address);
        }
        let address = self.alloc(bytes)?;
        self.zeros = Some((address, bytes));
        self.clear(address, bytes)?;
        Ok(address)
    }

    // Copies.

    /// Queues a copy of `data` to `to`. It is complete in itself: `data` may go at once.
    pub(crate) fn upload(&mut self, data: &[u8], to: Address) -> Result<(), AscendError> {
        for (piece, at) in data.chunks(Pinned::BYTES / 2).zip((0..).step_by(Pinned::BYTES / 2)) {
            let pinned = self.pinned(piece.len())?;
            // SAFETY: the pinned bytes are as many and used by nothing in flight; the device's block is the caller's.
            let code = unsafe {
                std::ptr::copy_nonoverlapping(piece.as_ptr(), pinned, piece.len());
                (self.acl.runtime.memcpy_async)(
                    Address(to.0 + at).as_ptr(),
                    piece.len(),
                    pinned.cast(),
                    piece.len(),
                    memcpy_kind::HOST_TO_DEVICE,
                    self.stream,
                )
            };
            self.check("aclrtMemcpyAsync", code)?;
        }
        Ok(())
    }

    /// Waits for everything queued and brings `len` bytes to the host.
    pub(crate) fn download(&mut self, from: Address, len: usize) -> Result<Vec<u8>, AscendError> {
        let mut data = Vec::with_capacity(len);
        while data.len() < len {
            let bytes = (len - data.len()).min(Pinned::BYTES / 2);
            let pinned = self.pinned(bytes)?;
            // SAFETY: the pinned bytes are as many and used by nothing in flight.
            let code = unsafe {
                (self.acl.runtime.memcpy_async)(
                    pinned.cast(),
                    bytes,
                    Address(from.0 + data.len()).as_ptr(),
                    bytes,
                    memcpy_kind::DEVICE_TO_HOST,
                    self.stream,
                )
            };
            self.check("aclrtMemcpyAsync", code)?;
            self.synchronize()?;
            // SAFETY: the copy is done, and the next one begins after this.
            data.extend_from_slice(unsafe { std::slice::from_raw_parts(pinned, bytes) });
        }
        Ok(data)
    }

    /// Queues a copy between blocks of the device.
    pub(crate) fn copy_within(&mut self, from: Address, to: Address, bytes: usize) -> Result<(), AscendError> {
        let kind = memcpy_kind::DEVICE_TO_DEVICE;
        // SAFETY: both ranges are the caller's blocks.
        let code =
            unsafe { (self.acl.runtime.memcpy_async)(to.as_ptr(), bytes, from.as_ptr(), bytes, kind, self.stream) };
        self.check("aclrtMemcpyAsync", code)
    }

    /// Queues a fill with zero bytes.
    pub(crate) fn clear(&mut self, at: Address, bytes: usize) -> Result<(), AscendError> {
        // SAFETY: the range is the caller's block.
        let code = unsafe { (self.acl.runtime.memset_async)(at.as_ptr(), bytes, 0, bytes, self.stream) };
        self.check("aclrtMemsetAsync", code)
    }

    fn pinned(&mut self, len: usize) -> Result<*mut u8, AscendError> {
        if let Some(pinned) = self.pinned.take(len) {
            return Ok(pinned);
        }
        self.synchronize()?;
        Ok(self.pinned.take(len).expect("a piece is at most half of the arena"))
    }

    /// Waits until all queued work is done, or for as long as was allowed.
    pub(crate) fn synchronize(&mut self) -> Result<(), AscendError> {
        // SAFETY: our own stream.
        let code = unsafe { (self.acl.runtime.synchronize)(self.stream, self.timeout_ms()) };
        let result = self.check("aclrtSynchronizeStreamWithTimeout", code);
        match result {
            Ok(()) => self.pinned.reset(),
            Err(AscendError::Call { call, code, message, .. }) => {
                return Err(AscendError::Call { call, code, message, late: true });
            }
            Err(_) => {}
        }
        result
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
