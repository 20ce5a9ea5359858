//! Several GPUs that compute one model: NCCL joins them, and sums are queued like everything else.
//!
//! A step's graph has them in it if `NCCL_GRAPH_REGISTER=0` is in the environment. Without it NCCL may agree with the other ranks on
//! buffers while it is captured, and waits for ever for one that runs the same step without a graph, which the lists of
//! different ranks do not rule out. Then a step is graphs with sums between them.
//!
//! Invariants: a rank waits for the others on its stream alone. Once a rank has left, the others stand at another sum than
//! it: what NCCL still waits for is aborted, which ends their streams, and the ranks are of no use any more, to anybody.
//! Communicators are given back when every rank's GPU is closed: NCCL waits for the graphs that hold its sums.

use std::ffi::{CStr, c_int, c_void};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use baton_device::{DeviceError, Result, Rows, World};
use cudarc::nccl::sys::{cudaStream_t, ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclResult_t};

use crate::context::{Context, Handle};
use crate::gpu::Gpu;
use crate::libraries;
use crate::nccl::Nccl;
use crate::tensor::{DataType, Tensor};

/// A rank's place among those that it was joined with.
pub(crate) struct Place {
    pub(crate) world: World,
    /// `None` of a device by itself.
    group: Option<Arc<Group>>,
}

/// Ranks that were joined.
pub(crate) struct Group {
    nccl: &'static Nccl,
    /// Each rank's end, until they were aborted.
    ends: Vec<Mutex<Option<Handle<ncclComm_t>>>>,
    contexts: Vec<Arc<Context>>,
    /// Whether graphs may have sums in them.
    captured: bool,
    /// Why there are to be no more sums.
    failed: OnceLock<String>,
}

impl Place {
    /// Of a device by itself.
    pub(crate) fn alone() -> Self {
        Self { world: World::ALONE, group: None }
    }

    /// Queues `x = sum of x over the ranks`.
    ///
    /// # Errors
    /// [`DeviceError::Poisoned`] if a rank has left; it need not show here.
    pub(crate) fn all_reduce(&self, gpu: &Arc<Gpu>, x: &mut Tensor) -> Result<()> {
        let (at, count) = (x.address(), x.rows() * x.cols());
        if count == 0 {
            return Ok(());
        }
        let dtype = match x.dtype() {
            DataType::F32 => ncclDataType_t::ncclFloat32,
            DataType::F16 => ncclDataType_t::ncclFloat16,
            DataType::BF16 => ncclDataType_t::ncclBfloat16,
        };
        let key = [at, count as u64, dtype as u64];
        self.collective(gpu, "all_reduce", &key, "ncclAllReduce", move |nccl, end, stream| {
            let data = at as *mut c_void;
            // SAFETY: the communicator is this rank's and live, its stream is of the device that it was made for; so many elements
            // are the caller's until the stream has passed, and they may be both input and output.
            unsafe { (nccl.all_reduce)(data, data, count, dtype, ncclRedOp_t::ncclSum, end, stream) }
        })
    }

    /// Queues a copy of what the first rank has to all of them: words of 32 bits at an address of each one's own.
    ///
    /// # Errors
    /// As [`Place::all_reduce`].
    pub(crate) fn broadcast(&self, gpu: &Arc<Gpu>, at: u64, words: usize) -> Result<()> {
        self.collective(gpu, "broadcast", &[at, words as u64], "ncclBroadcast", move |nccl, end, stream| {
            let (data, dtype) = (at as *mut c_void, ncclDataType_t::ncclInt32);
            // SAFETY: as in `all_reduce`; the first rank is number 0.
            unsafe { (nccl.broadcast)(data, data, words, dtype, 0, end, stream) }
        })
    }

    /// Queues a call of NCCL that `op` and `key` say everything about.
    fn collective(
        &self,
        gpu: &Arc<Gpu>,
        op: &'static str,
        key: &[u64],
        name: &'static str,
        call: impl Fn(&Nccl, ncclComm_t, cudaStream_t) -> ncclResult_t + Send + 'static,
    ) -> Result<()> {
        let Some(group) = &self.group else { return Ok(()) };
        group.whole(gpu.name())?;
        if !group.captured {
            gpu.flush()?;
        }
        let captured = group.captured;
        let (group, rank) = (group.clone(), self.world.rank);
        gpu.call(op, key, move |context, stream| {
            group.with(rank, &context.name, name, |end| call(group.nccl, end, stream.cast()))
        })?;
        if captured { Ok(()) } else { gpu.flush() }
    }

    /// An error if what sums gave is worth nothing: a rank has left, or NCCL has failed meanwhile.
    pub(crate) fn whole(&self, device: &str) -> Result<()> {
        let Some(group) = &self.group else { return Ok(()) };
        group.with(self.world.rank, device, "a sum over the ranks", |end| {
            let mut state = ncclResult_t::ncclSuccess;
            // SAFETY: a live communicator, a valid out pointer.
            match unsafe { (group.nccl.async_error)(end, &raw mut state) } {
                ncclResult_t::ncclSuccess => state,
                code => code,
            }
        })
    }

    /// This rank comes to no further sum.
    pub(crate) fn leave(&self) {
        if let Some(group) = &self.group {
            Group::fail(group, || format!("rank {} left in the middle of a step", self.world.rank));
        }
    }

    /// An error if a rank has left: the ranks must be joined anew.
    pub(crate) fn rejoin(&self, device: &str) -> Result<()> {
        self.group.as_ref().map_or(Ok(()), |group| group.whole(device))
    }
}

impl Group {
    fn whole(&self, device: &str) -> Result<()> {
        self.failed.get().map_or(Ok(()), |reason| Err(self.error(device, reason)))
    }

    fn error(&self, device: &str, reason: &str) -> DeviceError {
        let reason = format!("{reason}: the ranks must be joined anew");
        DeviceError::Poisoned { device: device.to_owned(), reason }
    }

    /// Calls NCCL with a rank's end. What fails is the end of the group.
    fn with(
        self: &Arc<Self>,
        rank: usize,
        device: &str,
        call: &str,
        work: impl FnOnce(ncclComm_t) -> ncclResult_t,
    ) -> Result<()> {
        self.whole(device)?;
        let code = {
            let end = self.ends[rank].lock().unwrap_or_else(PoisonError::into_inner);
            // It is taken behind the mark of failure alone.
            end.as_ref().map(|end| work(end.0))
        };
        match code {
            Some(ncclResult_t::ncclSuccess) => self.whole(device),
            Some(code) => {
                Self::fail(self, || format!("{call} gave {}", describe(self.nccl, code)));
                self.whole(device)
            }
            None => self.whole(device),
        }
    }

    /// The first reason counts. What NCCL waits for is aborted by a thread of its own: the last communicator's end waits for
    /// graphs, which are given back with the GPUs, behind the failure of which this is part.
    fn fail(group: &Arc<Self>, reason: impl FnOnce() -> String) {
        let mut first = false;
        group.failed.get_or_init(|| {
            first = true;
            reason()
        });
        if first {
            let group = group.clone();
            let abort = move || {
                for end in &group.ends {
                    let end = end.lock().unwrap_or_else(PoisonError::into_inner).take();
                    // SAFETY: live until now, and nobody has it any more.
                    end.map(|end| unsafe { (group.nccl.abort)(end.0) });
                }
            };
            if let Err(error) = std::thread::Builder::new().name("ranks aborted".into()).spawn(abort) {
                tracing::error!(%error, "sums that others wait for are not aborted");
            }
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The graphs of a broken context are not given back, and would be waited for.
        if self.contexts.iter().any(|context| context.whole().is_err()) {
            return;
        }
        for end in &mut self.ends {
            if let Some(end) = end.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
                // SAFETY: live until now; all ranks' GPUs are closed.
                unsafe { (self.nccl.destroy)(end.0) };
            }
        }
    }
}

/// Joins devices as ranks, in this order.
///
/// # Errors
/// [`DeviceError::Unavailable`] without NCCL, and [`DeviceError::Execution`] with its words.
pub(crate) fn join(gpus: &[Arc<Gpu>], devices: &[u32]) -> Result<Vec<Place>> {
    let size = gpus.len();
    if size == 1 {
        return Ok(vec![Place::alone()]);
    }
    let device = gpus[0].name();
    let nccl = libraries::collectives(device)?;
    let ordinals: Vec<c_int> = devices.iter().map(|device| *device as c_int).collect();
    let mut ends: Vec<ncclComm_t> = vec![std::ptr::null_mut(); size];
    // SAFETY: as many devices and out pointers as said.
    match unsafe { (nccl.init_all)(ends.as_mut_ptr(), size as c_int, ordinals.as_ptr()) } {
        ncclResult_t::ncclSuccess => {}
        code => {
            let reason = format!("ncclCommInitAll of devices {devices:?} gave {}", describe(nccl, code));
            return Err(DeviceError::Execution { device: device.to_owned(), op: "ranks", reason });
        }
    }
    let ends = ends.into_iter().map(|end| Mutex::new(Some(Handle(end)))).collect();
    let contexts = gpus.iter().map(|gpu| gpu.context().clone()).collect();
    let captured = std::env::var("NCCL_GRAPH_REGISTER").is_ok_and(|register| register == "0");
    let group = Arc::new(Group { nccl, ends, contexts, captured, failed: OnceLock::new() });
    gpus.iter().for_each(|gpu| gpu.outlive(group.clone()));
    Ok((0..size).map(|rank| Place { world: World { rank, size }, group: Some(group.clone()) }).collect())
}

/// A code, NCCL's words for it and for what it last met. A newer NCCL has codes that the binding's type has no name for.
fn describe(nccl: &Nccl, code: ncclResult_t) -> String {
    let text = |text: *const std::ffi::c_char| {
        // SAFETY: null or a text that ends in zero; the library owns it.
        if text.is_null() { String::new() } else { unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned() }
    };
    // SAFETY: any code, and no communicator, which it does not look at.
    let (words, last) = unsafe { ((nccl.error_string)(code), (nccl.last_error)(std::ptr::null_mut())) };
    format!("{} ({}; {})", code as u32, text(words), text(last))
}
