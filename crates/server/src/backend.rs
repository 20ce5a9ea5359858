//! The one place that names concrete devices.

use anyhow::{Result, bail};
use baton_device::{Backend, Caps, LatentOps, MoeOps, Reference};
use baton_device_cpu::{CpuBackend, CpuOptions};
use baton_model::{Files, LoadError, LoadOptions, LoadReport, Runner, load};

/// A device by the name an operator gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// Our kernels on the host's processors.
    Cpu,
    /// The naive judge.
    Reference,
}

/// A model ready to run.
pub struct Loaded {
    pub runner: Box<dyn Runner>,
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

    /// Loads a checkpoint onto the device; `threads` 0 takes all cores.
    pub fn load(self, threads: usize, files: &Files, options: &LoadOptions) -> Result<Loaded> {
        Ok(match self {
            Device::Cpu => erased(CpuBackend::new(&CpuOptions { threads, isa: None })?, files, options)?,
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
    Ok(Loaded { runner: Box::new(runner), report, caps })
}
