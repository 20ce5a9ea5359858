//! What this machine offers, for whoever looks before anything is loaded. Nothing here fails or waits for ever: what is not
//! there is a reason in the list.

use std::ffi::c_int;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use baton_device::{DeviceError, DeviceFacts, DeviceMemory, Result};
use cudarc::driver::sys::{self, CUdevice_attribute, CUresult};

use crate::context::Context;
use crate::gpu::{OLDEST, too_old};
use crate::libraries;

/// The longest that the driver may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// What there is of a device.
pub fn probe(device: u32) -> DeviceFacts {
    let name = format!("cuda:{device}");
    let (tell, told) = mpsc::channel();
    let found = DeviceFacts { device: name.clone(), ..DeviceFacts::default() };
    // On a thread of its own: a driver may hang.
    let look = move || _ = tell.send(look(device, found));
    let reason = match std::thread::Builder::new().name(name.clone()).spawn(look) {
        Err(error) => format!("no thread to ask the driver: {error}"),
        Ok(_) => match told.recv_timeout(PATIENCE) {
            Ok(facts) => return facts,
            Err(RecvTimeoutError::Timeout) => format!("the driver does not answer within {} s", PATIENCE.as_secs()),
            Err(RecvTimeoutError::Disconnected) => "asking the driver panicked".into(),
        },
    };
    DeviceFacts { device: name, missing: vec![reason], ..DeviceFacts::default() }
}

fn look(device: u32, mut facts: DeviceFacts) -> DeviceFacts {
    let found = libraries::find();
    facts.libraries = found.facts();
    facts.versions = found.versions().collect();
    facts.missing = found.missing();
    if facts.missing.is_empty()
        && let Err(error) = ask(device, &mut facts)
    {
        facts.missing.push(match error {
            DeviceError::Unavailable { reason, .. } => reason,
            other => other.to_string(),
        });
    }
    facts
}

/// Asks the libraries, which are there.
fn ask(device: u32, facts: &mut DeviceFacts) -> Result<()> {
    let mut count: c_int = 0;
    // SAFETY: a valid out pointer.
    unsafe {
        if sys::cuInit(0) == CUresult::CUDA_SUCCESS && sys::cuDeviceGetCount(&raw mut count) == CUresult::CUDA_SUCCESS {
            facts.count = count as usize;
        }
    }
    let context = Context::open(device)?;
    facts.chip = Some(context.chip()?);
    let capability = context.capability()?;
    facts.details.insert("compute capability".into(), format!("{}.{}", capability.0, capability.1));
    let count = context.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
    facts.details.insert("multiprocessors".into(), count.to_string());
    let (free, total) = context.memory()?;
    facts.memory = Some(DeviceMemory { total: total as u64, free: free as u64 });
    if capability < OLDEST {
        facts.missing.push(too_old(capability));
    }
    Ok(())
}
