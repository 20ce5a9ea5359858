//! Kernels that the shared list of cases asks for, compiled by the real NVRTC for the chips that kernels are written for.
//! It needs no GPU, but NVRTC: a folder with it in `BATON_NVRTC`. Without one the tests say that they were skipped.
//!
//! Libraries are opened once in a process, so the list of kernels is made by another one, on simulated GPUs.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::time::Instant;

use baton_device::{Backend, DType, conformance};
use baton_device_cuda::{Source, compile};
use common::Simulator;
use common::cases::{BLOCKS, Part};

/// Ampere and Hopper.
const CHIPS: [(i32, i32); 2] = [(8, 0), (9, 0)];
/// What a line of the list begins with.
const LINE: &str = "kernel\t";

#[test]
fn kernels_of_every_template_compile_for_ampere_and_hopper() {
    let mut kinds = BTreeSet::new();
    // Of each template with each format of weights, or without one, the first.
    compile_for_chips("list_of_bf16", |name| {
        let (template, arguments) = name.split_once('<').unwrap_or((name, ""));
        // Of codes those of each kind, whatever their scales.
        let codes = arguments.find("Coded<").and_then(|at| arguments[at..].split('>').next());
        let blocks_or_floats = arguments
            .split([',', '>'])
            .map(str::trim)
            .find(|argument| argument.starts_with("Dense") || BLOCKS.iter().any(|block| block.name() == *argument));
        kinds.insert((template.to_owned(), codes.or(blocks_or_floats).map(str::to_owned)))
    });
}

#[test]
#[ignore = "a quarter of an hour: cargo xtask long gpu"]
fn every_kernel_compiles_for_ampere_and_hopper() {
    compile_for_chips("list_of_all", |_| true);
}

/// Compiles what a list has and is chosen.
fn compile_for_chips(list: &str, mut chosen: impl FnMut(&str) -> bool) {
    let Some(folder) = std::env::var_os("BATON_NVRTC") else {
        eprintln!("skipped, no NVRTC: BATON_NVRTC names no folder");
        return;
    };
    if !cuda_sim::can_compile() {
        return;
    }
    let wanted = listed(list);
    assert!(wanted.len() == Source::ALL.len(), "kernels of {:?}", wanted.keys());
    // SAFETY: no other test of this binary is run with this one, so that no thread reads the environment meanwhile.
    unsafe { std::env::set_var("BATON_CUDA_LIBS", folder) };
    baton_device_cuda::probe(0);
    for (source, mut names) in wanted {
        names.retain(|name| chosen(name));
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
fn listed(list: &str) -> BTreeMap<Source, Vec<String>> {
    let mut command = Command::new(std::env::current_exe().unwrap());
    let output = command.args(["--ignored", "--exact", list, "--nocapture"]).env_remove("BATON_CUDA_LIBS").output();
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
#[ignore = "lists for another test what the cases ask for"]
fn list_of_bf16() {
    list(Part::OfEachKind, &[DType::BF16]);
}

#[test]
#[ignore = "lists for another test what the cases ask for"]
fn list_of_all() {
    list(Part::All, &[DType::F32, DType::F16, DType::BF16]);
}

#[allow(clippy::print_stdout)] // its output is what it is for
fn list(part: Part, activations: &[DType]) {
    let Some(simulator) = Simulator::new() else { return };
    for &dtype in activations {
        let backend = simulator.open(dtype);
        for case in part.cases() {
            if backend.caps().refusals(&case.needs()).is_empty() {
                conformance::evaluate(&case, &backend, dtype).unwrap();
            }
        }
        for (source, name) in backend.kernels() {
            println!("{LINE}{source}\t{name}");
        }
    }
}
