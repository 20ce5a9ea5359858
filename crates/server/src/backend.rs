//! The one place that names concrete devices.

use std::{path::Path, time::Duration};

use anyhow::{Result, bail};
use baton_device::{Backend, Caps, LatentOps, MoeOps, Reference};
use baton_device_cpu::{CpuBackend, CpuOptions, Limits};
use baton_model::{Adapter, AdapterError, Files, LoadError, LoadOptions, LoadReport, Runner, load};

/// A device by the name an operator gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// Our kernels on the host's processors.
    Cpu,
    /// The naive judge.
    Reference,
}

/// How a device is used.
#[derive(Debug, Clone, Copy, Default)]
pub struct DeviceOptions {
    /// Of the host; 0 takes all cores.
    pub threads: usize,
    /// The longest that a step may wait for the device; `None`: for ever.
    pub timeout: Option<Duration>,
}

/// Loads the adapter of a folder, for one runner.
pub type LoadAdapter = Box<dyn Fn(&Path) -> Result<Adapter, AdapterError> + Send + Sync>;

/// A model ready to run.
pub struct Loaded {
    pub runner: Box<dyn Runner>,
    /// `None` if there are to be no adapters.
    pub load_adapter: Option<LoadAdapter>,
    pub report: LoadReport,
    pub caps: Caps,
}

impl Device {
    /// Reads `--device`.
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "auto" | "cpu" => Ok(Device::Cpu),
            "reference" => Ok(Device::Reference),
            other => bail!("--device {other}: this build serves on cpu and reference (auto takes cpu)"),
        }
    }

    /// Measures what the machine gives so many threads of the CPU.
    pub fn cpu_limits(threads: usize) -> Result<Limits> {
        Ok(CpuBackend::new(&CpuOptions { threads, isa: None })?.limits()?)
    }

    /// `--device-timeout`, or what the device needs where nothing is said. The CPU computes on threads of ours, and a step
    /// of a large model may rightly take minutes there.
    pub fn timeout(self, given: Option<Duration>) -> Option<Duration> {
        match self {
            Device::Cpu | Device::Reference => given.filter(|timeout| !timeout.is_zero()),
        }
    }

    /// Loads a checkpoint onto the device.
    pub fn load(self, device: DeviceOptions, files: &Files, options: &LoadOptions) -> Result<Loaded> {
        let cpu = CpuOptions { threads: device.threads, isa: None };
        Ok(match self {
            Device::Cpu => erased(CpuBackend::new(&cpu)?, files, options)?,
            Device::Reference => erased(Reference::new(), files, options)?,
        })
    }
}

fn erased<B: Backend + LatentOps + MoeOps>(
    backend: B,
    files: &Files,
    options: &LoadOptions,
) -> Result<Loaded, LoadError> {
    let caps = backend.caps().clone();
    let (runner, report) = load(backend, files, options)?;
    let load_adapter =
        runner.adapter_loader().map(|loader| -> LoadAdapter { Box::new(move |folder| loader.load(folder)) });
    Ok(Loaded { runner: Box::new(runner), load_adapter, report, caps })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_of_the_cpu_are_timed_only_if_that_is_asked_for() {
        for device in [Device::Cpu, Device::Reference] {
            let timeout = |seconds: Option<u64>| device.timeout(seconds.map(Duration::from_secs));
            assert_eq!([timeout(None), timeout(Some(0))], [None; 2]);
            assert_eq!(timeout(Some(5)), Some(Duration::from_secs(5)));
        }
    }
}
