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

/// Ampere and Hopper (CUDA C++ Programming Guide, technical specifications by compute capability, as those below).
const CHIPS: [Chip; 2] = [chip(8, 0, 163), chip(9, 0, 227)];
/// Others that were there when the compiler came out: of Ampere, Ada and Blackwell, in servers and in workstations.
const OTHERS: [Chip; 4] = [chip(8, 6, 99), chip(8, 9, 99), chip(10, 0, 227), chip(12, 0, 99)];
/// Of a block, on all of them.
const REGISTERS: u64 = 64 << 10;
/// What a line of the list begins with.
const LINE: &str = "kernel\t";
/// Tells the process that lists kernels the compute capability, as the simulator takes it.
const CAPABILITY: &str = "BATON_TEST_CAPABILITY";

const fn chip(major: i32, minor: i32, shared_kib: u64) -> Chip {
    Chip { capability: (major, minor), shared: shared_kib << 10 }
}

#[test]
fn kernels_of_every_template_compile_for_ampere_and_hopper() {
    CHIPS.iter().for_each(|chip| chip.compile("list_of_bf16", one_of_each_kind()));
}

#[test]
#[ignore = "minutes: cargo xtask long gpu"]
fn kernels_of_every_template_compile_for_other_chips() {
    OTHERS.iter().for_each(|chip| chip.compile("list_of_bf16", one_of_each_kind()));
}

#[test]
#[ignore = "a quarter of an hour: cargo xtask long gpu"]
fn every_kernel_compiles_for_ampere_and_hopper() {
    CHIPS.iter().for_each(|chip| chip.compile("list_of_all", |_| true));
}

/// Of each template with each format of weights, or without one, the first.
fn one_of_each_kind() -> impl FnMut(&str) -> bool {
    let mut kinds = BTreeSet::new();
    move |name| {
        let (template, arguments) = name.split_once('<').unwrap_or((name, ""));
        // Of codes those of each kind, whatever their scales.
        let codes = arguments.find("Coded<").and_then(|at| arguments[at..].split('>').next());
        let blocks_or_floats = arguments
            .split([',', '>'])
            .map(str::trim)
            .find(|argument| argument.starts_with("Dense") || BLOCKS.iter().any(|block| block.name() == *argument));
        kinds.insert((template.to_owned(), codes.or(blocks_or_floats).map(str::to_owned)))
    }
}

impl Chip {
    /// Compiles what a list has for this chip and is chosen, and sees that the chip has what the largest launch of each kernel takes:
    /// a simulator knows of no registers, of no bounds that a kernel was compiled for, and not how much shared memory it has by
    /// itself.
    fn compile(&self, list: &str, mut chosen: impl FnMut(&str) -> bool) {
        let Some(folder) = std::env::var_os("BATON_NVRTC") else {
            eprintln!("skipped, no NVRTC: BATON_NVRTC names no folder");
            return;
        };
        if !cuda_sim::can_compile() {
            return;
        }
        let wanted = self.listed(list);
        assert!(wanted.len() == Source::ALL.len(), "kernels of {:?}", wanted.keys());
        // SAFETY: no other test of this binary is run with this one, so that no thread reads the environment meanwhile.
        unsafe { std::env::set_var("BATON_CUDA_LIBS", folder) };
        baton_device_cuda::probe(0);
        let (major, minor) = self.capability;
        for (source, launches) in wanted {
            let began = Instant::now();
            let (launched, asked): (Vec<_>, Vec<_>) = launches.into_iter().partition(|(_, launch)| launch.threads > 0);
            let launches: Vec<_> = launched.into_iter().chain(asked).filter(|(name, _)| chosen(name)).collect();
            let names: Vec<String> = launches.iter().map(|(name, _)| name.clone()).collect();
            let (code, lowered) = compile(source, &names, self.capability)
                .unwrap_or_else(|log| panic!("{source} for {major}.{minor}: {log}"));
            let kernels = cubin::kernels(&code);
            let needs: Vec<Needs> = lowered.iter().map(|name| kernels[name.to_str().unwrap()]).collect();
            let launched = launches.iter().zip(&needs).filter(|((_, launch), _)| launch.threads > 0);
            let launched = launched.map(|((name, launch), needs)| self.check(name, launch, needs)).count();
            assert!(launched > 0, "{source}");
            let (kernels, bytes, seconds) = (names.len(), code.len(), began.elapsed().as_secs_f32());
            eprintln!(
                "{source} for {major}.{minor}: {kernels} kernels, {launched} launched, {bytes} bytes, {seconds:.1} s"
            );
            for (name, Needs { registers, frame, .. }) in names.iter().zip(&needs).filter(|(_, needs)| needs.frame > 0)
            {
                eprintln!("  {name} keeps {frame} bytes of a thread in memory, beside {registers} registers");
            }
        }
    }

    fn check(&self, name: &str, launch: &Launch, needs: &Needs) {
        let (Launch { threads, shared }, on) = (*launch, self.capability);
        assert!(needs.registers > 0, "{name}: {needs:?}");
        assert!(
            needs.threads == 0 || threads <= needs.threads,
            "{name} runs with {threads} threads on {on:?} and is made for {needs:?}"
        );
        // Warps get them in pieces of 256.
        let registers = threads.div_ceil(32) * (32 * needs.registers).next_multiple_of(256);
        assert!(
            registers <= REGISTERS,
            "{name} takes {registers} registers with {threads} threads on {on:?}: {needs:?}"
        );
        let shared = shared + needs.shared;
        assert!(shared <= self.shared, "{name} takes {shared} bytes of shared memory on {on:?}: {needs:?}");
    }

    /// Kernels by source and name, with what was launched at most, as another process lists them.
    fn listed(&self, list: &str) -> BTreeMap<Source, BTreeMap<String, Launch>> {
        let (major, minor) = self.capability;
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--ignored", "--exact", list, "--nocapture"]).env_remove("BATON_CUDA_LIBS");
        let output = command.env(CAPABILITY, format!("{major}{minor}")).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let mut wanted: BTreeMap<Source, BTreeMap<String, Launch>> = BTreeMap::new();
        for line in String::from_utf8(output.stdout).unwrap().lines().filter_map(|line| line.strip_prefix(LINE)) {
            let [file, name, threads, shared] = line.split('\t').collect::<Vec<_>>()[..] else { panic!("{line}") };
            let source = Source::ALL.into_iter().find(|source| source.file() == file).unwrap();
            let launch = wanted.entry(source).or_default().entry(name.to_owned()).or_default();
            // It is listed once for each type of activations.
            launch.threads = launch.threads.max(threads.parse().unwrap());
            launch.shared = launch.shared.max(shared.parse().unwrap());
        }
        wanted
    }
}

/// The largest block of a kernel, and its dynamic shared memory in bytes; none of one that was asked for and met no case.
#[derive(Default, Clone, Copy)]
struct Launch {
    threads: u64,
    shared: u64,
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
    let capability = std::env::var(CAPABILITY).expect("whoever lists says for which chip");
    simulator.control(&format!("cc={capability}"));
    for &dtype in activations {
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
