//! Every kernel that the shared list of cases asks for, compiled by the real NVRTC for the chips that kernels are written for.
//! It needs no GPU, but NVRTC: a folder with it in `BATON_NVRTC`. Without one the test says that it was skipped.
//!
//! Libraries are opened once in a process, so the list of kernels is made by another one, on simulated GPUs.

mod common;

use std::collections::BTreeMap;
use std::process::Command;
use std::time::Instant;

use baton_device::{Backend, DType, conformance};
use baton_device_cuda::{Source, compile};
use common::Simulator;

/// Ampere and Hopper.
const CHIPS: [(i32, i32); 2] = [(8, 0), (9, 0)];
/// What a line of the list begins with.
const LINE: &str = "kernel\t";

#[test]
fn every_kernel_compiles_for_ampere_and_hopper() {
    let Some(folder) = std::env::var_os("BATON_NVRTC") else {
        eprintln!("skipped, no NVRTC: BATON_NVRTC names no folder");
        return;
    };
    let wanted = wanted();
    assert!(wanted.len() == Source::ALL.len(), "kernels of {:?}", wanted.keys());
    // SAFETY: this binary's only other test is not run with it, so that no thread reads the environment meanwhile.
    unsafe { std::env::set_var("BATON_CUDA_LIBS", folder) };
    baton_device_cuda::probe(0);
    for (source, names) in wanted {
        for chip in CHIPS {
            let began = Instant::now();
            let code = compile(source, &names, chip).unwrap_or_else(|log| panic!("{source} for {chip:?}: {log}"));
            assert_eq!(code.get(..4), Some(b"\x7fELF".as_slice()), "{source} for {chip:?}");
            let (kernels, bytes, seconds) = (names.len(), code.len(), began.elapsed().as_secs_f32());
            eprintln!("{source} for {chip:?}: {kernels} kernels, {bytes} bytes, {seconds:.1} s");
        }
    }
}

/// Names by source, as another process lists them.
fn wanted() -> BTreeMap<Source, Vec<String>> {
    let mut command = Command::new(std::env::current_exe().unwrap());
    let output = command.args(["--ignored", "--exact", "list", "--nocapture"]).env_remove("BATON_CUDA_LIBS").output();
    let output = output.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut wanted: BTreeMap<Source, Vec<String>> = BTreeMap::new();
    for line in String::from_utf8(output.stdout).unwrap().lines().filter_map(|line| line.strip_prefix(LINE)) {
        let (file, name) = line.split_once('\t').unwrap();
        let source = Source::ALL.into_iter().find(|source| source.file() == file).unwrap();
        let names = wanted.entry(source).or_default();
        if !names.iter().any(|known| known == name) {
            names.push(name.to_owned());
        }
    }
    wanted
}

#[test]
#[ignore = "lists for the other test what the cases ask for"]
#[allow(clippy::print_stdout)] // its output is what it is for
fn list() {
    let Some(simulator) = Simulator::new() else { return };
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let backend = simulator.open(dtype);
        for case in conformance::cases() {
            if backend.caps().refusals(&case.needs()).is_empty() {
                conformance::evaluate(&case, &backend, dtype).unwrap();
            }
        }
        for (source, name) in backend.kernels() {
            println!("{LINE}{source}\t{name}");
        }
    }
}
