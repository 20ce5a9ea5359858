//! The one place that names concrete devices.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};
use baton_device::{Backend, Caps, LatentOps, MoeOps, Reference};
use baton_device_cpu::{CpuBackend, CpuOptions, Limits};
use baton_model::{
    Adapter, AdapterError, AdapterLoader, Files, LoadError, LoadOptions, LoadReport, Runner, load, load_ranks,
};

/// How long a rank is waited for by the others, which are as far as it is but for differences of load.
const RANK_TIMEOUT: Duration = Duration::from_secs(60);

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
    /// Of each rank.
    pub caps: Caps,
    /// Among how many ranks the model is shared out.
    pub ranks: usize,
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

    /// Loads a checkpoint onto so many ranks of the device; `threads` 0 takes all cores.
    pub fn load(self, ranks: usize, threads: usize, files: &Files, options: &LoadOptions) -> Result<Loaded> {
        let cpu = CpuOptions { threads, isa: None };
        Ok(match (self, ranks) {
            (Device::Cpu, 1) => erased(CpuBackend::new(&cpu)?, files, options)?,
            (Device::Cpu, _) => erased_ranks(CpuBackend::ranks(&cpu, ranks, RANK_TIMEOUT)?, files, options)?,
            (Device::Reference, 1) => erased(Reference::new(), files, options)?,
            (Device::Reference, _) => erased_ranks(Reference::ranks(ranks, RANK_TIMEOUT), files, options)?,
        })
    }
}

/// On one device.
fn erased<B: Backend + LatentOps + MoeOps>(
    backend: B,
    files: &Files,
    options: &LoadOptions,
) -> Result<Loaded, LoadError> {
    let caps = backend.caps().clone();
    let (runner, report) = load(backend, files, options)?;
    let load_adapter = runner.adapter_loader().map(erased_loader);
    Ok(Loaded { runner: Box::new(runner), load_adapter, report, caps, ranks: 1 })
}

/// On all ranks, in their order.
fn erased_ranks<B: Backend + LatentOps + MoeOps>(
    backends: Vec<B>,
    files: &Files,
    options: &LoadOptions,
) -> Result<Loaded, LoadError> {
    let (caps, ranks) = (backends[0].caps().clone(), backends.len());
    let (runner, report) = load_ranks(backends, files, options, RANK_TIMEOUT)?;
    let load_adapter = runner.adapter_loader().map(erased_loader);
    Ok(Loaded { runner: Box::new(runner), load_adapter, report, caps, ranks })
}

fn erased_loader<B: Backend>(loader: AdapterLoader<B>) -> LoadAdapter {
    Box::new(move |folder| loader.load(folder))
}
