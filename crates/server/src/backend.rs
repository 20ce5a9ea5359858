//! The one place that names concrete devices.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use baton_device::conformance::{self, Case, Outcome};
use baton_device::{
    Backend, Caps, CompressedOps, DType, DeviceError, DeviceFacts, DeviceMemory, LatentOps, Limits, Reference,
};
use baton_device_ascend::{AscendBackend, AscendOptions, Chip, Search};
use baton_device_cpu::{CpuBackend, CpuOptions};
use baton_device_cuda::{CudaBackend, CudaOptions};
use baton_model::{
    Adapter, AdapterError, AdapterLoader, Files, KvCacheSize, LoadError, LoadOptions, LoadReport, ModelRunner, Ranks,
    RunError, Runner, SequenceStep, StepPlan, Tokens, load, load_ranks, stored_dtype,
};

use crate::{memory, settings::Settings};

/// How long a rank is waited for by the others, which are as far as it is but for differences of load.
const RANK_TIMEOUT: Duration = Duration::from_secs(60);

/// The longest that an accelerator is waited for, where nothing is said.
const ACCELERATOR_TIMEOUT: Duration = Duration::from_secs(60);
/// Where it is to be waited for without end: the longest that its runtime can be told.
const FOR_EVER: Duration = Duration::from_millis(i32::MAX as u64);

/// The share of a device's own memory that is taken where nothing is said.
const DEVICE_SHARE: f64 = 0.9;

/// A device by the name an operator gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// Our kernels on the host's processors.
    Cpu,
    /// The naive judge.
    Reference,
    /// A Huawei Ascend NPU, by its number among those that the runtime sees.
    Ascend(u32),
    /// An NVIDIA GPU, by its number among those that the driver shows.
    Cuda(u32),
}

/// How a device is used.
#[derive(Debug, Clone)]
pub struct DeviceOptions {
    /// Among how many of its kind the model is shared out.
    pub ranks: usize,
    /// Of the host; 0 takes all cores.
    pub threads: usize,
    /// The longest that a step may wait for the device; `None`: for ever.
    pub timeout: Option<Duration>,
    /// Operations are composed of simple operators where the device has fused ones, too.
    pub composed: bool,
    /// Where kernels that were compiled for the device are kept; in memory if `None`.
    pub kernels: Option<PathBuf>,
}

impl Default for DeviceOptions {
    fn default() -> Self {
        Self { ranks: 1, threads: 0, timeout: None, composed: false, kernels: None }
    }
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
    /// Which operators do what, where the device has several ways.
    pub forms: Vec<String>,
}

/// A device on which conformance cases are run.
pub struct CaseRunner {
    pub caps: Caps,
    pub run: RunCase,
}

/// Runs a case on a device.
pub type RunCase = Box<dyn Fn(&Case) -> Result<Outcome, DeviceError>>;

impl Device {
    /// What a machine may have: one of each kind.
    pub const KINDS: &[Self] = &[Device::Cpu, Device::Cuda(0), Device::Ascend(0)];

    /// Reads `--device`.
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "auto" | "cpu" => Ok(Device::Cpu),
            "reference" => Ok(Device::Reference),
            "ascend" => Ok(Device::Ascend(0)),
            "cuda" => Ok(Device::Cuda(0)),
            other => match other.split_once(':').map(|(kind, number)| (kind, number.parse())) {
                Some(("ascend", Ok(number))) => Ok(Device::Ascend(number)),
                Some(("cuda", Ok(number))) => Ok(Device::Cuda(number)),
                _ => {
                    bail!("--device {other}: this build serves on cpu, cuda:N, ascend:N and reference (auto takes cpu)")
                }
            },
        }
    }

    /// Tokens of a step unless others are asked for: above these, prompts are computed hardly faster, as far as that was measured.
    pub fn step_tokens(self) -> usize {
        match self {
            Device::Cpu | Device::Reference | Device::Ascend(_) => 128,
            // Reasoned, not measured: tiles of a product must fill all multiprocessors, also where a model is narrow.
            Device::Cuda(_) => 4096,
        }
    }

    /// Measures what the machine gives so many threads of the CPU.
    pub fn cpu_limits(threads: usize) -> Result<Limits> {
        Ok(CpuBackend::new(&CpuOptions { threads, isa: None })?.limits()?)
    }

    /// Measures what the device does at most in the type that a checkpoint is computed in; `None` where nobody knows how.
    pub fn limits(self, threads: usize, files: &Files, options: &LoadOptions) -> Result<Option<Limits>> {
        Ok(match self {
            Device::Cpu => Some(Self::cpu_limits(threads)?),
            Device::Cuda(number) => {
                Some(CudaBackend::new(&cuda(number, self.activations_of(files, options)?, None))?.limits()?)
            }
            Device::Reference | Device::Ascend(_) => None,
        })
    }

    /// Finds out what the device is, whether or not it can serve, and loads nothing.
    pub fn probe(self) -> DeviceFacts {
        let memory = memory::total_bytes().zip(memory::available_bytes());
        let memory = memory.map(|(total, free)| DeviceMemory { total, free });
        match self {
            Device::Cpu => DeviceFacts { memory, ..baton_device_cpu::probe() },
            Device::Reference => DeviceFacts { device: "reference".into(), count: 1, memory, ..DeviceFacts::default() },
            Device::Ascend(number) => baton_device_ascend::probe(&Search::from_env(), number),
            Device::Cuda(number) => baton_device_cuda::probe(number),
        }
    }

    /// The types of activations that a device computes in, the one that it serves in first; of some kinds that is known only
    /// when it was looked at.
    pub fn activations(self, facts: impl FnOnce() -> DeviceFacts) -> &'static [DType] {
        match self {
            Device::Cpu | Device::Reference => &[DType::F32],
            Device::Ascend(_) => match facts().chip.as_deref().and_then(Chip::from_soc_name) {
                Some(chip) if !chip.has_bf16() => &[DType::F16],
                _ => &[DType::BF16, DType::F16, DType::F32],
            },
            Device::Cuda(_) => &[DType::BF16, DType::F16, DType::F32],
        }
    }

    /// Opens the device for conformance cases with activations of a type that it computes in, on all cores; `kernels` as in
    /// [`DeviceOptions`].
    pub fn case_runner(self, activations: DType, kernels: Option<PathBuf>) -> Result<CaseRunner, DeviceError> {
        Ok(match self {
            Device::Cpu => case_runner(CpuBackend::new(&CpuOptions { threads: 0, isa: None })?),
            Device::Reference => case_runner(Reference::new()),
            // So that an error names the operator that caused it.
            Device::Ascend(number) => {
                case_runner(AscendBackend::new(&AscendOptions { blocking: true, ..ascend(number, activations) })?)
            }
            Device::Cuda(number) => case_runner(CudaBackend::new(&cuda(number, activations, kernels))?),
        })
    }

    /// The cache of each rank. Where nothing is said, a device with memory of its own gives what its share leaves, and ranks on
    /// the host share a quarter of its `free` bytes; what cannot be known is not limited: the allocation itself then decides.
    pub fn cache_size(self, settings: &Settings, free: Option<u64>) -> Result<KvCacheSize> {
        let share = settings.gpu_memory_utilization;
        if let Some(bytes) = settings.kv_cache_memory_bytes {
            ensure!(
                share.is_none(),
                "--kv-cache-memory-bytes and --gpu-memory-utilization both size the cache: give one"
            );
            return Ok(KvCacheSize::Bytes(bytes));
        }
        Ok(match self {
            Device::Cpu | Device::Reference => {
                ensure!(
                    share.is_none(),
                    "--gpu-memory-utilization is of devices with memory of their own; here it is --kv-cache-memory-bytes"
                );
                let quarter = free.map_or(u64::MAX, |free| free / 4);
                KvCacheSize::AtMost(quarter / settings.tensor_parallel_size as u64)
            }
            Device::Ascend(_) | Device::Cuda(_) => {
                let share = share.unwrap_or(DEVICE_SHARE);
                ensure!(share > 0.0 && share <= 1.0, "--gpu-memory-utilization {share}: above 0, at most 1");
                KvCacheSize::Share(share)
            }
        })
    }

    /// The cache for measuring: half of the host's `free` bytes, or what the usual share of the device's own memory leaves.
    pub fn ample_cache(self, free: Option<u64>) -> KvCacheSize {
        match self {
            Device::Cpu | Device::Reference => KvCacheSize::AtMost(free.map_or(u64::MAX, |free| free / 2)),
            Device::Ascend(_) | Device::Cuda(_) => KvCacheSize::Share(DEVICE_SHARE),
        }
    }

    /// `--device-timeout`, or what the device needs where nothing is said. The CPU computes on threads of ours, and a step
    /// of a large model may rightly take minutes there.
    pub fn timeout(self, given: Option<Duration>) -> Option<Duration> {
        match self {
            Device::Cpu | Device::Reference => given.filter(|timeout| !timeout.is_zero()),
            Device::Ascend(_) | Device::Cuda(_) => {
                Some(given.unwrap_or(ACCELERATOR_TIMEOUT)).filter(|timeout| !timeout.is_zero())
            }
        }
    }

    /// Loads a checkpoint onto the device.
    pub fn load(self, device: DeviceOptions, files: &Files, options: &LoadOptions) -> Result<Loaded> {
        let DeviceOptions { ranks, threads, timeout, composed, kernels } = device;
        let cpu = CpuOptions { threads, isa: None };
        Ok(match (self, ranks) {
            (Device::Cpu, 1) => erased(CpuBackend::new(&cpu).map_err(LoadError::from)?, files, options)?,
            (Device::Cpu, _) => {
                erased_ranks(CpuBackend::ranks(&cpu, ranks, RANK_TIMEOUT).map_err(LoadError::from)?, files, options)?
            }
            (Device::Reference, 1) => erased(Reference::new(), files, options)?,
            (Device::Reference, _) => erased_ranks(Reference::ranks(ranks, RANK_TIMEOUT), files, options)?,
            (Device::Ascend(number), _) => {
                let activations = self.activations_of(files, options)?;
                let timeout = timeout.unwrap_or(FOR_EVER).min(FOR_EVER);
                let device = AscendOptions { timeout, fused: !composed, ..ascend(number, activations) };
                if ranks == 1 {
                    let (mut runner, report) =
                        load(AscendBackend::new(&device).map_err(LoadError::from)?, files, options)?;
                    warm_up(&mut runner)?;
                    let forms = runner.backend().forms();
                    Loaded { forms, ..loaded(runner, report) }
                } else {
                    let devices: Vec<u32> = (number..).take(ranks).collect();
                    let backends = AscendBackend::ranks(&device, &devices).map_err(LoadError::from)?;
                    let (mut runner, report) = load_ranks(backends, files, options, timeout)?;
                    warm_up(&mut runner)?;
                    let forms = runner.backend().forms();
                    Loaded { forms, ..loaded_ranks(runner, report, ranks) }
                }
            }
            (Device::Cuda(number), _) => {
                let device = cuda(number, self.activations_of(files, options)?, kernels);
                if ranks == 1 {
                    let (mut runner, report) =
                        load(CudaBackend::new(&device).map_err(LoadError::from)?, files, options)?;
                    warm_up(&mut runner)?;
                    loaded(runner, report)
                } else {
                    let devices: Vec<u32> = (number..).take(ranks).collect();
                    let backends = CudaBackend::ranks(&device, &devices).map_err(LoadError::from)?;
                    let (mut runner, report) = load_ranks(backends, files, options, timeout.unwrap_or(FOR_EVER))?;
                    warm_up(&mut runner)?;
                    loaded_ranks(runner, report, ranks)
                }
            }
        })
    }

    /// The type of activations for a checkpoint: what is asked for, else what it is stored in where the device computes in
    /// that.
    fn activations_of(self, files: &Files, options: &LoadOptions) -> Result<DType, LoadError> {
        if let Some(asked) = options.dtype {
            return Ok(asked);
        }
        let (own, stored) = (self.activations(|| self.probe()), stored_dtype(files)?);
        Ok(*own.iter().find(|dtype| **dtype == stored).unwrap_or(&own[0]))
    }
}

fn ascend(device: u32, activations: DType) -> AscendOptions {
    AscendOptions {
        device,
        search: Search::from_env(),
        activations,
        timeout: ACCELERATOR_TIMEOUT,
        blocking: false,
        fused: true,
    }
}

fn cuda(device: u32, activations: DType, kernels: Option<PathBuf>) -> CudaOptions {
    CudaOptions { device, activations, cache: kernels, ..CudaOptions::default() }
}

/// Takes a step of one sequence, so that what a device settles when it first meets a shape is settled before anybody waits;
/// three times, since accelerators make graphs of what they meet again, and run them from then on.
fn warm_up(runner: &mut dyn Runner) -> Result<(), RunError> {
    let blocks = |there_are: bool| if there_are { vec![0] } else { Vec::new() };
    let (kept, passing) = (blocks(true), blocks(runner.spec().passing.is_some()));
    let step = SequenceStep {
        id: 0,
        num_computed: 0,
        tokens: Tokens::Known(vec![0]),
        draft: Vec::new(),
        block_table: kept.clone(),
        passing_table: passing.clone(),
        adapter: None,
        sample: None,
        propose: 0,
        scores: Vec::new(),
    };
    let plan = StepPlan::new(vec![step]);
    for _ in 0..3 {
        runner.step(&plan)?;
    }
    runner.clear_blocks(&kept, &passing)
}

/// On one device.
fn erased<B: Backend + LatentOps + CompressedOps>(
    backend: B,
    files: &Files,
    options: &LoadOptions,
) -> Result<Loaded, LoadError> {
    let (runner, report) = load(backend, files, options)?;
    Ok(loaded(runner, report))
}

fn loaded<B: Backend>(runner: ModelRunner<B>, report: LoadReport) -> Loaded {
    let caps = runner.backend().caps().clone();
    let load_adapter = runner.adapter_loader().map(erased_loader);
    Loaded { runner: Box::new(runner), load_adapter, report, caps, ranks: 1, forms: Vec::new() }
}

/// On all ranks, in their order.
fn erased_ranks<B: Backend + LatentOps + CompressedOps>(
    backends: Vec<B>,
    files: &Files,
    options: &LoadOptions,
) -> Result<Loaded, LoadError> {
    let ranks = backends.len();
    let (runner, report) = load_ranks(backends, files, options, RANK_TIMEOUT)?;
    Ok(loaded_ranks(runner, report, ranks))
}

fn loaded_ranks<B: Backend>(runner: Ranks<B>, report: LoadReport, ranks: usize) -> Loaded {
    let caps = runner.backend().caps().clone();
    let load_adapter = runner.adapter_loader().map(erased_loader);
    Loaded { runner: Box::new(runner), load_adapter, report, caps, ranks, forms: Vec::new() }
}

fn erased_loader<B: Backend>(loader: AdapterLoader<B>) -> LoadAdapter {
    Box::new(move |folder| loader.load(folder))
}

fn case_runner<B: conformance::Full>(backend: B) -> CaseRunner {
    CaseRunner { caps: backend.caps().clone(), run: Box::new(move |case| conformance::run(case, &backend)) }
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
        for device in [Device::Ascend(0), Device::Cuda(0)] {
            assert_eq!(device.timeout(None), Some(ACCELERATOR_TIMEOUT));
            assert_eq!(device.timeout(Some(Duration::ZERO)), None);
        }
    }
}
