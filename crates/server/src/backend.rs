//! The one place that names concrete devices.

use std::path::Path;

use anyhow::{Result, bail};
use baton_device::conformance::{self, Case, Outcome};
use baton_device::{Backend, Caps, DeviceError, DeviceFacts, DeviceMemory, LatentOps, MoeOps, Reference};
use baton_device_cpu::{CpuBackend, CpuOptions, Limits};
use baton_model::{Adapter, AdapterError, Files, LoadError, LoadOptions, LoadReport, Runner, load};

use crate::memory;

/// A device by the name an operator gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// Our kernels on the host's processors.
    Cpu,
    /// The naive judge.
    Reference,
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

/// A device on which conformance cases are run.
pub struct CaseRunner {
    pub caps: Caps,
    pub run: Box<dyn Fn(&Case) -> Result<Outcome, DeviceError>>,
}

impl Device {
    /// What a machine may have: one of each kind.
    pub const KINDS: &[Self] = &[Device::Cpu];

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

    /// Finds out what the device is, whether or not it can serve, and loads nothing.
    pub fn probe(self) -> DeviceFacts {
        let memory = memory::total_bytes().zip(memory::available_bytes());
        let memory = memory.map(|(total, free)| DeviceMemory { total, free });
        match self {
            Device::Cpu => DeviceFacts { memory, ..baton_device_cpu::probe() },
            Device::Reference => DeviceFacts { device: "reference".into(), count: 1, memory, ..DeviceFacts::default() },
        }
    }

    /// Opens the device for conformance cases, on all cores.
    pub fn case_runner(self) -> Result<CaseRunner, DeviceError> {
        Ok(match self {
            Device::Cpu => case_runner(CpuBackend::new(&CpuOptions { threads: 0, isa: None })?),
            Device::Reference => case_runner(Reference::new()),
        })
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
    let load_adapter =
        runner.adapter_loader().map(|loader| -> LoadAdapter { Box::new(move |folder| loader.load(folder)) });
    Ok(Loaded { runner: Box::new(runner), load_adapter, report, caps })
}

fn case_runner<B: conformance::Full>(backend: B) -> CaseRunner {
    CaseRunner { caps: backend.caps().clone(), run: Box::new(move |case| conformance::run(case, &backend)) }
}
