//! The layers below the seam, through the simulator.

mod graphs;
mod installations;
mod mutations;
mod products;
mod runtime;
mod sums;

use std::sync::Arc;
use std::time::Duration;

use crate::device::{Device, DeviceOptions};
use crate::error::AscendError;
use crate::installation::{self, Installation};
use crate::libraries::Search;
use crate::object::{Address, DataType, View};
use crate::owner::Owner;
use crate::simulator::libraries;

/// The simulator's libraries.
fn search() -> Search {
    Search { folder: Some(libraries()) }
}

/// Opens a simulated device.
fn open_device(id: i32, timeout: Duration) -> baton_device::Result<Arc<Owner>> {
    let Installation { acl, chip, .. } = installation::find(&search(), id as u32).expect("the simulator");
    Owner::start(acl, format!("ascend:{id}"), DeviceOptions { id, timeout, blocking: false }, chip, None).map(Arc::new)
}

fn open() -> Arc<Owner> {
    open_device(0, Duration::from_secs(60)).expect("the simulator")
}

/// A block with these values.
fn floats(device: &mut Device, values: &[f32], dtype: DataType) -> Result<View, AscendError> {
    let view = View::new(device.alloc(values.len() * dtype.bytes())?, dtype, &[values.len()]);
    device.upload(&crate::device::encode(values, dtype), view.base)?;
    Ok(view)
}

/// The values of a contiguous f32 view, once everything queued is done.
fn values(device: &mut Device, view: &View) -> Result<Vec<f32>, AscendError> {
    let bytes = device.download(Address(view.base.0), view.numel() * view.dtype.bytes())?;
    let mut values = Vec::new();
    crate::device::decode(&bytes, &mut values);
    Ok(values)
}
