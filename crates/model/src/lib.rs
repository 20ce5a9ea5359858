//! From a checkpoint folder to sampled tokens: typed configs, checkpoint files, architectures written
//! against [`baton_device::Backend`], the sampler, and the [`Runner`] that the engine drives.
//!
//! Generic below, erased above: architectures are generic over a backend, the engine sees only
//! `dyn Runner`. No HTTP, no async, no text.

mod params;
mod step;

pub use params::SamplingParams;
pub use step::{
    RunError, RunSpec, Runner, SampleRequest, SampledToken, SequenceFailure, SequenceOutput, SequenceStep, StepOutput,
    StepPlan,
};
