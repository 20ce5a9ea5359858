//! What a simulated GPU takes minutes for: all goldens, all cases in every type of activations, every kernel by NVIDIA's own compiler.

use std::{env, process::Command};

use anyhow::{Result, ensure};

use super::{Setting, timed};
use crate::python::finished;

/// The variable that names a folder with NVRTC.
const NVRTC: &str = "BATON_NVRTC";

/// Runs the check.
pub fn check(_: &Setting) -> Result<()> {
    ensure!(
        env::var_os(NVRTC).is_some(),
        "{NVRTC} names a folder with NVRTC: the Python package nvidia-cuda-nvrtc has it"
    );
    timed("goldens", || ignored("baton-model", "model", "golden::gpu_in_f32"))?;
    timed("codes", || ignored("baton-model", "simulators", "codes::every_layout"))?;
    timed("cases", || ignored("baton-device-cuda", "conformance", "all_cases"))?;
    timed("kernels for other chips", || ignored("baton-device-cuda", "nvrtc", "other_chips"))?;
    timed("kernels", || ignored("baton-device-cuda", "nvrtc", "every_kernel"))
}

/// Runs ignored tests of a file by a piece of their names. The simulator's compiler must be there.
fn ignored(package: &str, file: &str, name: &str) -> Result<()> {
    let mut command = Command::new("cargo");
    command.args([
        "test",
        "--release",
        "--locked",
        "-p",
        package,
        "--test",
        file,
        name,
        "--",
        "--ignored",
        "--nocapture",
    ]);
    finished(command.current_dir(crate::root()).env("CUDA_SIM_REQUIRE", "1"))
}
