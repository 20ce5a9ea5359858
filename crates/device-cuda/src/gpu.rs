//! A GPU as the operations use it: memory, kernels, and a queue of launches.
//!
//! Invariants: everything that a step does runs on one stream, in the order in which it was queued. A lock is held over
//! queue and stream together; where memory's lock is taken as well, it is taken second. Loading has a stream and a lock
//! of its own and touches only memory that no queued work uses.

use std::any::Any;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use baton_device::{DeviceError, DeviceMemory, Result, StepMemory};
use cudarc::driver::sys::{self, CUresult, CUstream};

use crate::blas::{Blas, Matmul};
use crate::context::{Context, Handle};
use crate::memory::{Block, Buffer, Kind, Memory};
use crate::program::{Kernel, Programs, Source};
use crate::queue::{Fetch, Queue};
use crate::staging::{Loader, Slot};
use crate::statistics::{Counters, Statistics, add};

/// Shape of a launch. A grid with a zero in it is no work.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Launch {
    /// Blocks.
    pub(crate) grid: [u32; 3],
    /// Threads of a block.
    pub(crate) block: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub(crate) shared: u32,
}

/// An argument of a kernel.
#[derive(Debug, Clone)]
pub(crate) enum Arg {
    /// Any pointer.
    Ptr(u64),
    /// `int`.
    I32(i32),
    /// `long long`.
    I64(i64),
    /// `float`.
    F32(f32),
    /// A struct by value, padding zeroed, aligned to 8 bytes at most.
    Bytes(Box<[u8]>),
}

/// How a GPU is opened.
pub(crate) struct GpuOptions {
    /// Number among the devices that the driver shows.
    pub(crate) device: u32,
    /// Where compiled kernels are kept; in memory if `None`.
    pub(crate) cache: Option<PathBuf>,
    /// Replay steps as graphs.
    pub(crate) graphs: bool,
    /// Every buffer an allocation of its own.
    pub(crate) isolated: bool,
}

/// An open GPU.
pub(crate) struct Gpu {
    context: Arc<Context>,
    capability: (i32, i32),
    multiprocessors: usize,
    queue: Mutex<Queue>,
    loader: Mutex<Loader>,
    blas: Blas,
    programs: Mutex<Programs>,
    memory: Mutex<Memory>,
    counters: Counters,
    /// What graphs refer to: dropped behind the queue, which has them.
    outlived: Mutex<Vec<Arc<dyn Any + Send + Sync>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gpu {
    /// Opens a device. The libraries are there.
    ///
    /// # Errors
    /// [`DeviceError::Unavailable`] with what is missing, and what fails on the device.
    pub(crate) fn open(options: &GpuOptions) -> Result<Arc<Self>> {
        let context = Context::open(options.device)?;
        context.enter()?;
        let capability = context.capability()?;
        if capability < OLDEST {
            return Err(DeviceError::Unavailable { device: context.name.clone(), reason: too_old(capability) });
        }
        let count = context.attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        Ok(Arc::new(Self {
            capability,
            multiprocessors: count.max(1) as usize,
            programs: Mutex::new(Programs::new(capability, options.cache.clone())),
            queue: Mutex::new(Queue::new(&context, options.graphs)?),
            loader: Mutex::new(Loader::new(&context)?),
            blas: Blas::new(&context)?,
            memory: Mutex::new(Memory::new(options.isolated)),
            counters: Counters::default(),
            outlived: Mutex::default(),
            context,
        }))
    }

    /// As an operator names it: `cuda:0`.
    pub(crate) fn name(&self) -> &str {
        &self.context.name
    }

    /// The device's context.
    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Compute capability.
    pub(crate) fn capability(&self) -> (i32, i32) {
        self.capability
    }

    /// Multiprocessors, for grids that fill the device.
    pub(crate) fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    /// The kernel of a C++ name expression. It is compiled with all others that were asked for, when [`Gpu::compile`] is
    /// called or one of them is first launched.
    pub(crate) fn kernel(&self, source: Source, name: impl Into<String>) -> Result<Kernel> {
        Ok(lock(&self.programs).kernel(source, name.into()))
    }

    /// Compiles what was asked for.
    pub(crate) fn compile(&self) -> Result<()> {
        lock(&self.programs).compile(&self.context)
    }

    /// All kernels that were asked for.
    pub(crate) fn kernels(&self) -> Vec<(Source, String)> {
        lock(&self.programs).names()
    }

    /// Queues a kernel.
    pub(crate) fn launch(&self, kernel: &Kernel, launch: Launch, args: &[Arg]) -> Result<()> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        self.context.whole()?;
        if kernel.function().is_none() {
            self.compile()?;
        }
        let full = self.with_queue(|queue| {
            queue.push(kernel, launch, args);
            Ok(queue.is_full())
        })?;
        if full { self.flush() } else { Ok(()) }
    }

    /// Queues a call that puts work on a stream. `key` says everything about it: addresses, sizes, algorithm. Equal keys
    /// of equal `op` are equal work.
    pub(crate) fn call(
        &self,
        op: &'static str,
        key: &[u64],
        run: impl Fn(&Context, CUstream) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        self.context.whole()?;
        self.with_queue(|queue| {
            queue.push_call(op, key, Box::new(run));
            Ok(())
        })
    }

    /// Holds something until all graphs are given back.
    pub(crate) fn outlive(&self, what: Arc<dyn Any + Send + Sync>) {
        lock(&self.outlived).push(what);
    }

    /// Queues a matrix product of cuBLASLt.
    pub(crate) fn matmul(&self, product: &Matmul) -> Result<()> {
        self.blas.queue(self, product)
    }

    /// Queues `bytes` bytes of `value`.
    pub(crate) fn fill(&self, address: u64, bytes: usize, value: u8) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.call("fill", &[address, bytes as u64, u64::from(value)], move |context, stream| {
            // SAFETY: the memory is the caller's until the stream has passed.
            context.check("fill", unsafe { sys::cuMemsetD8Async(address, value, bytes, stream) })
        })
    }

    /// Queues a copy on the device; the ranges do not overlap.
    pub(crate) fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        self.call("copy", &[from, to, bytes as u64], move |context, stream| {
            // SAFETY: both ranges are the caller's until the stream has passed.
            context.check("copy", unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, stream) })
        })
    }

    /// Memory that lasts, with whatever contents.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    pub(crate) fn alloc(self: &Arc<Self>, bytes: usize, what: &'static str) -> Result<Buffer> {
        Ok(Buffer::new(self, self.block(bytes, Kind::Lasting, what)?, Kind::Lasting))
    }

    /// Asks the driver for blocks of these sizes at once, so that many of them take no more than their sum. Those that find no
    /// room together are asked for one by one.
    pub(crate) fn reserve_together(&self, kind: Kind, blocks: impl IntoIterator<Item = usize>) -> Result<()> {
        self.context.enter()?;
        let mut memory = lock(&self.memory);
        match memory.together(blocks) {
            Some(bytes) => self.chunk(&mut memory, kind, bytes).map(|_| ()),
            None => Ok(()),
        }
    }

    /// Memory for use within an operation, as [`Gpu::alloc`]: equal steps get equal addresses. It may be dropped as soon as
    /// what uses it is queued.
    pub(crate) fn scratch(self: &Arc<Self>, bytes: usize) -> Result<Buffer> {
        Ok(Buffer::new(self, self.block(bytes, Kind::Scratch, "scratch")?, Kind::Scratch))
    }

    /// [`Gpu::alloc`], filled with `bytes`.
    pub(crate) fn load(self: &Arc<Self>, bytes: &[u8], what: &'static str) -> Result<Buffer> {
        let buffer = self.alloc(bytes.len(), what)?;
        self.write(&buffer, 0, bytes)?;
        Ok(buffer)
    }

    /// A place for something of a step, for `bytes` at first.
    pub(crate) fn slot(self: &Arc<Self>, bytes: usize, what: &'static str) -> Result<Slot> {
        Ok(Slot::new(what, self.alloc(bytes, what)?))
    }

    /// Copies to a buffer that no queued work uses, and waits. For loading.
    pub(crate) fn write(&self, buffer: &Buffer, offset: usize, bytes: &[u8]) -> Result<()> {
        assert!(offset + bytes.len() <= buffer.bytes(), "{} bytes at {offset} of {}", bytes.len(), buffer.bytes());
        let mut loader = lock(&self.loader);
        loader.write(&self.context, buffer.address() + offset as u64, bytes)
    }

    /// Makes room in a slot, and gives its address.
    pub(crate) fn reserve(self: &Arc<Self>, slot: &Slot, bytes: usize) -> Result<u64> {
        slot.reserve(bytes, |bytes, what| self.alloc(bytes, what))
    }

    /// Copies into a slot, behind what was queued before if that uses it, and gives its address.
    pub(crate) fn upload(self: &Arc<Self>, slot: &Slot, bytes: &[u8]) -> Result<u64> {
        let address = self.reserve(slot, bytes.len())?;
        self.upload_to(address, bytes)?;
        Ok(address)
    }

    /// Copies into a buffer of the caller, behind what was queued before if that uses it.
    pub(crate) fn upload_to(&self, address: u64, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.context.enter()?;
        add(&self.counters.uploads, 1);
        add(&self.counters.uploaded, bytes.len());
        let range: Range<u64> = address..address + bytes.len() as u64;
        self.with_queue(|queue| {
            if queue.uses(&range) {
                queue.flush(&self.context, &self.counters)?;
            }
            queue.upload(&self.context, &self.counters, address, bytes)
        })
    }

    /// Runs what is queued and begins a copy to the host, at whose end [`Gpu::finish`] waits.
    pub(crate) fn fetch(&self, address: u64, bytes: usize) -> Result<Fetch> {
        self.context.enter()?;
        add(&self.counters.reads, usize::from(bytes > 0));
        add(&self.counters.read, bytes);
        self.with_queue(|queue| {
            queue.flush(&self.context, &self.counters)?;
            queue.fetch(&self.context, address, bytes)
        })
    }

    /// Waits for a copy to the host, and for nothing that was asked for later.
    pub(crate) fn finish(&self, fetch: &Fetch, out: &mut [u8]) -> Result<()> {
        self.context.enter()?;
        add(&self.counters.waits, 1);
        fetch.arrival.wait(&self.context, out)?;
        self.with_queue(|queue| {
            if queue.fetched(fetch) {
                self.release();
            }
            Ok(())
        })
    }

    /// Runs what is queued, copies to the host and waits.
    pub(crate) fn read(&self, address: u64, out: &mut [u8]) -> Result<()> {
        self.context.enter()?;
        add(&self.counters.waits, 1);
        add(&self.counters.reads, 1);
        add(&self.counters.read, out.len());
        self.with_queue(|queue| {
            queue.flush(&self.context, &self.counters)?;
            queue.read(&self.context, address, out)?;
            self.release();
            Ok(())
        })
    }

    /// Hands what is queued to the device.
    pub(crate) fn flush(&self) -> Result<()> {
        self.context.enter()?;
        self.with_queue(|queue| queue.flush(&self.context, &self.counters))
    }

    /// Runs what is queued, and waits.
    pub(crate) fn synchronize(&self) -> Result<()> {
        self.context.enter()?;
        add(&self.counters.waits, 1);
        self.with_queue(|queue| {
            queue.flush(&self.context, &self.counters)?;
            queue.synchronize(&self.context)?;
            self.release();
            Ok(())
        })
    }

    /// Memory of the device as the driver tells it. What is reserved here for steps to come is not free.
    pub(crate) fn memory(&self) -> Result<DeviceMemory> {
        self.synchronize()?;
        let (free, total) = self.context.memory()?;
        Ok(DeviceMemory { total: total as u64, free: free as u64 })
    }

    /// Has `steps` queue what steps queue, of which nothing runs, and keeps what they took. Scratch becomes one piece: it holds
    /// whatever takes no more at once, since operations give it back in the reverse of the order in which they took it.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] if scratch is not to be had again as one piece.
    pub(crate) fn rehearse(&self, steps: impl FnOnce() -> Result<()>) -> Result<StepMemory> {
        self.synchronize()?;
        self.with_queue(|queue| {
            queue.begin_rehearsal();
            Ok(())
        })?;
        let result = steps().and_then(|()| self.flush());
        let graphs = self.with_queue(|queue| queue.end_rehearsal(&self.context))?;
        result?;
        self.give_up_scratch()?;
        let (_, most) = lock(&self.memory).scratch();
        self.reserve_together(Kind::Scratch, [most])?;
        let memory = lock(&self.memory);
        let (scratch, _) = memory.scratch();
        if scratch < most as u64 && memory.together([most]).is_some() {
            return Err(DeviceError::OutOfMemory {
                device: self.name().to_owned(),
                bytes: most,
                what: "what steps compute in",
            });
        }
        Ok(StepMemory { scratch, graphs })
    }

    /// What was done so far.
    pub(crate) fn statistics(&self) -> Statistics {
        self.counters.read(lock(&self.memory).allocated())
    }

    /// Called by buffers that are dropped.
    pub(crate) fn give_back(&self, block: Block, kind: Kind) {
        lock(&self.memory).give(kind, block);
    }

    fn with_queue<T>(&self, work: impl FnOnce(&mut Queue) -> Result<T>) -> Result<T> {
        work(&mut lock(&self.queue))
    }

    fn block(&self, bytes: usize, kind: Kind, what: &'static str) -> Result<Block> {
        self.context.enter()?;
        let no_room = || DeviceError::OutOfMemory { device: self.name().to_owned(), bytes, what };
        // Also a size that did not fit into its type.
        if bytes > isize::MAX as usize {
            return Err(no_room());
        }
        if let Some(block) = lock(&self.memory).take(kind, bytes) {
            return Ok(block);
        }
        if lock(&self.memory).is_waiting() {
            self.synchronize()?;
        }
        if let Some(block) = self.grow(bytes, kind)? {
            return Ok(block);
        }
        self.give_up_scratch()?;
        self.grow(bytes, kind)?.ok_or_else(no_room)
    }

    /// What earlier steps left for later ones is for whoever finds no room.
    fn give_up_scratch(&self) -> Result<()> {
        self.with_queue(|queue| {
            queue.flush(&self.context, &self.counters)?;
            queue.synchronize(&self.context)?;
            let idle = lock(&self.memory).idle_scratch();
            idle.into_iter().for_each(|chunk| self.free(chunk));
            Ok(())
        })
    }

    /// A block, for which the driver gives a chunk if it must; `None` if it has no room.
    fn grow(&self, bytes: usize, kind: Kind) -> Result<Option<Block>> {
        let mut memory = lock(&self.memory);
        if let Some(block) = memory.take(kind, bytes) {
            return Ok(Some(block));
        }
        for wanted in memory.wanted(bytes) {
            if self.chunk(&mut memory, kind, wanted)? {
                return Ok(memory.take(kind, bytes));
            }
        }
        Ok(None)
    }

    /// Whether the driver gave so many bytes.
    fn chunk(&self, memory: &mut Memory, kind: Kind, bytes: usize) -> Result<bool> {
        let mut address = 0;
        // SAFETY: a valid out pointer.
        match unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes) } {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => Ok(false),
            code => {
                self.context.check("cuMemAlloc", code)?;
                add(&self.counters.allocations, 1);
                memory.add(kind, address, bytes);
                Ok(true)
            }
        }
    }

    /// Gives back what nothing uses any more: the stream has passed, and nothing is queued.
    fn release(&self) {
        let idle = lock(&self.memory).passed();
        idle.into_iter().for_each(|chunk| self.free(chunk));
    }

    fn free(&self, address: u64) {
        if self.context.enter().is_ok() {
            // SAFETY: allocated once, and nothing uses it.
            unsafe { sys::cuMemFree_v2(address) };
        }
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // What fails here fails because the device is gone, and then nothing is left to give back.
        let _ = self.synchronize();
        let chunks = lock(&self.memory).all();
        chunks.into_iter().for_each(|chunk| self.free(chunk));
    }
}

/// The oldest compute capability whose instructions kernels use.
pub(crate) const OLDEST: (i32, i32) = (8, 0);

/// Why an older one does not do.
pub(crate) fn too_old((major, minor): (i32, i32)) -> String {
    let (oldest, least) = OLDEST;
    format!(
        "its compute capability is {major}.{minor}; kernels need {oldest}.{least} (Ampere) or newer: bf16 on tensor cores and \
         asynchronous copies"
    )
}

// Handles are kept apart by the locks above.
const _: fn() = || {
    fn shared<T: Send + Sync>() {}
    shared::<Gpu>();
    shared::<Handle<CUstream>>();
};
