//! Kernels that the shared list of cases asks for, compiled by the real NVRTC for the chips that kernels are written for.
//! It needs no GPU, but NVRTC: a folder with it in `BATON_NVRTC`. Without one the tests say that they were skipped.
//!
//! Libraries are opened once in a process, so the list of kernels is made by another one, on simulated GPUs.

#[path = "../common/mod.rs"]
mod common;
mod cubin;

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::time::Instant;

use baton_device::{Backend, DType, conformance};
use baton_device_cuda::{Source, compile};
use common::Simulator;
use common::cases::{BLOCKS, Part};
use cubin::Needs;

/// A chip that kernels are written for.
#[derive(Debug)]
struct Chip {
    capability: (i32, i32),
    /// Bytes of shared memory that a block can have.
    shared: u64,
}

/// Ampere and Hopper (CUDA C++ Programming Guide, technical specifications by compute capability).
const CHIPS: [Chip; 2] =
    [Chip { capability: (8, 0), shared: 163 << 10 }, Chip { capability: (9, 0), shared: 227 << 10 }];
/// Of a block, on both.
const REGISTERS: u64 = 64 << 10;
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

/// Compiles what a list has and is chosen, and sees that each chip has what the largest launch of each kernel takes: a simulator
/// knows of no registers, of no bounds that a kernel was compiled for, and not how much shared memory it has by itself.
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
    for (source, launches) in wanted {
        let (launched, asked): (Vec<_>, Vec<_>) = launches.into_iter().partition(|(_, launch)| launch.threads > 0);
        let launches: Vec<_> = launched.into_iter().chain(asked).filter(|(name, _)| chosen(name)).collect();
        let names: Vec<String> = launches.iter().map(|(name, _)| name.clone()).collect();
        for chip in CHIPS {
            let began = Instant::now();
            let (code, lowered) =
                compile(source, &names, chip.capability).unwrap_or_else(|log| panic!("{source} for {chip:?}: {log}"));
            let kernels = cubin::kernels(&code);
            let needs: Vec<Needs> = lowered.iter().map(|name| kernels[name.to_str().unwrap()]).collect();
            let launched = launches.iter().zip(&needs).filter(|((_, launch), _)| launch.threads > 0);
            let launched = launched.map(|((name, launch), needs)| chip.check(name, launch, needs)).count();
            assert!(launched > 0, "{source}");
            let (kernels, bytes, seconds) = (names.len(), code.len(), began.elapsed().as_secs_f32());
            eprintln!("{source} for {chip:?}: {kernels} kernels, {launched} launched, {bytes} bytes, {seconds:.1} s");
            for (name, Needs { registers, frame, .. }) in names.iter().zip(&needs).filter(|(_, needs)| needs.frame > 0)
            {
                eprintln!("  {name} keeps {frame} bytes of a thread in memory, beside {registers} registers");
            }
        }
    }
}

/// The largest block of a kernel, and its dynamic shared memory in bytes; none of one that was asked for and met no case.
#[derive(Default)]
struct Launch {
    threads: u64,
    shared: u64,
}

impl Chip {
    fn check(&self, name: &str, launch: &Launch, needs: &Needs) {
        let Launch { threads, shared } = *launch;
        assert!(needs.registers > 0, "{name}: {needs:?}");
        assert!(
            needs.threads == 0 || threads <= needs.threads,
            "{name} runs with {threads} threads and is made for {needs:?}"
        );
        // Warps get them in pieces of 256.
        let registers = threads.div_ceil(32) * (32 * needs.registers).next_multiple_of(256);
        assert!(
            registers <= REGISTERS,
            "{name} runs with {threads} threads, which take {registers} registers: {needs:?}"
        );
        let shared = shared + needs.shared;
        assert!(shared <= self.shared, "{name} takes {shared} bytes of shared memory of {}: {needs:?}", self.shared);
    }
}

/// Kernels by source and name, with what any of the chips launched at most, as another process lists them.
fn listed(list: &str) -> BTreeMap<Source, BTreeMap<String, Launch>> {
    let mut command = Command::new(std::env::current_exe().unwrap());
    let output = command.args(["--ignored", "--exact", list, "--nocapture"]).env_remove("BATON_CUDA_LIBS").output();
    let output = output.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut wanted: BTreeMap<Source, BTreeMap<String, Launch>> = BTreeMap::new();
    for line in String::from_utf8(output.stdout).unwrap().lines().filter_map(|line| line.strip_prefix(LINE)) {
        let [file, name, threads, shared] = line.split('\t').collect::<Vec<_>>()[..] else { panic!("{line}") };
        let source = Source::ALL.into_iter().find(|source| source.file() == file).unwrap();
        let launch = wanted.entry(source).or_default().entry(name.to_owned()).or_default();
        launch.threads = launch.threads.max(threads.parse().unwrap());
        launch.shared = launch.shared.max(shared.parse().unwrap());
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
    let each = CHIPS.iter().flat_map(|chip| activations.iter().map(move |dtype| (chip.capability, *dtype)));
    for ((major, minor), dtype) in each {
        simulator.control(&format!("cc={major}{minor}"));
        let backend = simulator.open(dtype);
        for case in part.cases() {
            if backend.caps().refusals(&case.needs()).is_empty() {
                conformance::evaluate(&case, &backend, dtype).unwrap();
            }
        }
        for (source, name) in backend.kernels() {
            let [threads, shared] = ["threads", "shared"].map(|what| simulator.count(&format!("{what}.{name}")));
            println!("{LINE}{source}\t{name}\t{threads}\t{shared}");
        }
    }
}
