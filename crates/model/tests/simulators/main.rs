//! Tests that have a simulated device to themselves, for they set it or count what it does, each in its turn.

#[path = "../../../device-ascend/tests/common/mod.rs"]
mod ascend_sim;
#[path = "../model/common/mod.rs"]
mod common;
#[path = "../../../device-cuda/tests/common/mod.rs"]
mod cuda;

mod codes;
mod faulty;
mod padding;
mod ranks;
mod share;
