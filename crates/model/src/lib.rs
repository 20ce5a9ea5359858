//! From a checkpoint folder to sampled tokens: typed configs, checkpoint files, architectures written
//! against [`baton_device::Backend`], the sampler, and the [`Runner`] that the engine drives.
//!
//! Generic below, erased above: architectures are generic over a backend, the engine sees only
//! `dyn Runner`. No HTTP, no async, no text.

mod adapter;
mod arch;
mod begun;
mod buckets;
mod checkpoint;
mod choosable;
mod config;
mod constraint;
mod cost;
mod export;
mod gguf;
mod load;
mod loader;
mod params;
mod philox;
mod precision;
mod quant;
mod ranks;
mod rehearsal;
mod room;
mod runner;
mod sampler;
mod split;
mod step;

pub use baton_device::PASSED;

pub use adapter::{Adapter, AdapterError, AdapterLoader};
pub use checkpoint::{CheckpointError, FileError, Files, StoredAs, Tensors};
pub use config::{
    Architecture, ConfigError, DeepseekConfig, DeepseekV4Config, Family, GenerationConfig, IndexerConfig, LlamaConfig,
    ModelConfig, MoeConfig, QuantizationConfig, RopeConfig, RopeScaling, V4Attention, V4Layer,
};
pub use constraint::{Constraint, ConstraintError, Grammar, StepMasks, TokenMask};
pub use cost::StepCost;
pub use export::{ExportError, NewCheckpoint, NewTensor, quantize, tensor_shapes};
pub use gguf::GgufTokenizer;
pub use load::{KvCacheSize, LoadError, LoadOptions, LoadReport, load, stored_dtype};
pub use params::SamplingParams;
pub use precision::{Conversion, Quantization};
pub use ranks::{Ranks, load_ranks};
pub use runner::ModelRunner;
pub use sampler::Sampler;
pub use step::{
    Passing, RunError, RunSpec, Runner, SampleRequest, SampledToken, Score, ScoreRequest, SequenceFailure,
    SequenceOutput, SequenceStep, StepOutput, StepPlan, Tokens,
};
