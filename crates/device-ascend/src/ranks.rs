//! Several devices that compute one model: a communicator joins them, and sums run on each one's stream.
//!
//! Invariants: every rank's own thread joins and sums. A rank waits for the others on its stream alone, so a rank that does not
//! come is a stream that does not end, which the device's timeout bounds. Once a rank has left, the others stand at
//! another sum than it: the communicator is of no use any more, to anybody.

use std::ffi::CStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use baton_device::{DeviceError, Result as SeamResult, World};

use crate::abi::Comm;
use crate::abi::consts::{hccl_reduce, hccl_type};
use crate::abi::runtime::{Collectives, ROOT_INFO_BYTES};
use crate::device::Device;
use crate::error::AscendError;
use crate::object::{Address, DataType, View};
use crate::owner::Owner;

type Result<T> = std::result::Result<T, AscendError>;

/// By what ranks find each other.
pub(crate) struct RootInfo([u8; ROOT_INFO_BYTES]);

/// A rank's place among those that it was joined with.
pub(crate) struct Place {
    pub(crate) world: World,
    left: Arc<AtomicBool>,
}

impl Place {
    /// Of a device by itself.
    pub(crate) fn alone() -> Self {
        Self { world: World::ALONE, left: Arc::default() }
    }

    /// This rank comes to no further sum.
    pub(crate) fn leave(&self) {
        self.left.store(self.world.size > 1, Ordering::Relaxed);
    }

    /// An error if a rank has left.
    pub(crate) fn all_here(&self, device: &str) -> SeamResult<()> {
        if !self.left.load(Ordering::Relaxed) {
            return Ok(());
        }
        Err(DeviceError::Poisoned {
            device: device.to_owned(),
            reason: "a rank left in the middle of a step: the ranks must be joined anew".into(),
        })
    }
}

/// Joins devices as ranks, in this order.
pub(crate) fn join(owners: &[Arc<Owner>]) -> SeamResult<Vec<Place>> {
    let size = owners.len();
    if size == 1 {
        return Ok(vec![Place::alone()]);
    }
    let info = Arc::new(owners[0].call("ranks", |device| device.root_info())?);
    // All at once: joining waits for the others.
    for (rank, owner) in owners.iter().enumerate() {
        let info = info.clone();
        owner.submit("ranks", move |device| device.join(&info, rank as u32, size as u32))?;
    }
    owners.iter().try_for_each(|owner| owner.call("ranks", |_| Ok(())))?;
    let left: Arc<AtomicBool> = Arc::default();
    Ok((0..size).map(|rank| Place { world: World { rank, size }, left: left.clone() }).collect())
}

impl Device {
    fn collectives(&self) -> Result<&'static Collectives> {
        self.acl().collectives.as_ref().ok_or(AscendError::Missing { operator: "HcclAllReduce (libhccl.so)" })
    }

    fn root_info(&mut self) -> Result<RootInfo> {
        let mut info = RootInfo([0; ROOT_INFO_BYTES]);
        let collectives = self.collectives()?;
        // SAFETY: as many bytes as the type has.
        self.collective("HcclGetRootInfo", unsafe { (collectives.root_info)(info.0.as_mut_ptr()) })?;
        Ok(info)
    }

    fn join(&mut self, info: &RootInfo, rank: u32, size: u32) -> Result<()> {
        let mut comm = Comm::NULL;
        let collectives = self.collectives()?;
        // SAFETY: valid pointers; this thread's device is current.
        let code = unsafe { (collectives.init_rank)(size, info.0.as_ptr(), rank, &raw mut comm) };
        self.collective("HcclCommInitRootInfo", code)?;
        self.comm = Some(comm);
        Ok(())
    }

    /// Queues `x = sum of x over the ranks`; contiguous, of equal size on each.
    pub(crate) fn all_reduce(&mut self, x: &View) -> Result<()> {
        assert!(x.is_contiguous(), "sums are over whole rows");
        let dtype = match x.dtype {
            DataType::F32 => hccl_type::FP32,
            DataType::F16 => hccl_type::FP16,
            DataType::BF16 => hccl_type::BFP16,
            other => panic!("no sums of {other:?}"),
        };
        self.end_piece()?;
        let (collectives, comm) = (self.collectives()?, self.comm.expect("joined"));
        let start = x.base.0 + x.offset as usize * x.dtype.bytes();
        let data = Address(start).as_ptr();
        // SAFETY: the block is the caller's, and has as many elements; it may be both input and output.
        let code = unsafe {
            (collectives.all_reduce)(data, data, x.numel() as u64, dtype, hccl_reduce::SUM, comm, self.stream())
        };
        self.collective("HcclAllReduce", code)?;
        self.settle()
    }

    fn collective(&self, call: &'static str, code: i32) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        let collectives = self.collectives()?;
        // SAFETY: the library owns the text.
        let message = unsafe {
            let text = (collectives.error_string)(code);
            if text.is_null() { String::new() } else { CStr::from_ptr(text).to_string_lossy().into_owned() }
        };
        let error = AscendError::Collective { call, code, message };
        self.note(&error);
        Err(error)
    }
}
