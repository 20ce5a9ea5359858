//! Checkpoints, architectures and the runner, by what they compute. One executable, for each compiles the runner anew for every
//! backend; those that count what a simulator does are in `simulators`.

#[path = "../../../device-ascend/tests/common/mod.rs"]
mod ascend_sim;
#[path = "../../../device-cuda/tests/common/mod.rs"]
mod cuda;

mod adapters;
mod ahead;
mod bad_adapters;
mod bad_checkpoints;
mod bad_gguf;
mod common;
mod compressed;
mod configs;
mod configs_v4;
mod equalities;
mod export;
mod fuzz_corpus;
mod gguf;
mod gguf_layouts;
mod golden;
mod indexed;
mod mtp;
mod quantized;
mod released;
mod sampling;
mod supported;
mod variants;
