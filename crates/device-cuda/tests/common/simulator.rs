//! The simulator as tests use it.
//!
//! Invariant: the simulator has one state in a process, so one test has it at a time.

#![allow(dead_code)] // each test file uses its part

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use tempfile::TempDir;

/// Kinds of things that are given back when a backend is dropped.
const KINDS: [&str; 14] = [
    "contexts",
    "streams",
    "events",
    "modules",
    "graphs",
    "graph_execs",
    "programs",
    "blas_handles",
    "blas_descs",
    "blas_layouts",
    "blas_preferences",
    "communicators",
    "device_blocks",
    "host_blocks",
];

/// The simulator, to one test at a time.
pub struct Simulator {
    simulator: cuda_sim::Simulator,
    /// What tests before it left live: a context that breaks keeps what was made in it.
    before: Vec<u64>,
    _turn: MutexGuard<'static, ()>,
}

impl Simulator {
    /// As it is by default, with nothing counted; CUDA's libraries are its. `None`, and a word about it, on a machine that cannot
    /// compile kernels.
    pub fn new() -> Option<Self> {
        if !cuda_sim::can_compile() {
            return None;
        }
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        libraries();
        let simulator = cuda_sim::Simulator::new();
        simulator.reset();
        let before = KINDS.map(|kind| simulator.count(&format!("live.{kind}"))).to_vec();
        Some(Self { simulator, before, _turn: turn })
    }

    /// `key=value`, as the simulator's documentation lists them.
    pub fn control(&self, setting: &str) {
        self.simulator.control(setting);
    }

    /// One of the simulator's counts.
    pub fn count(&self, name: &str) -> u64 {
        self.simulator.count(name)
    }

    /// Every setting as at first, and nothing counted.
    pub fn begin_anew(&self) {
        self.simulator.reset();
    }

    /// How often each function was called.
    pub fn calls(&self) -> BTreeMap<String, u64> {
        let report = self.simulator.report();
        let call = |entry: &str| {
            let (name, count) = entry.trim_matches(['{', '}']).rsplit_once(':')?;
            Some((name.strip_prefix("\"calls.")?.strip_suffix('"')?.to_owned(), count.parse().ok()?))
        };
        report.split(',').filter_map(call).collect()
    }

    /// Things of a kind that are live.
    pub fn live_of(&self, kind: &str) -> u64 {
        self.count(&format!("live.{kind}"))
    }

    /// Kinds of which more is live than at first, and how much more.
    pub fn left(&self) -> Vec<(&'static str, u64)> {
        let left = |(kind, before): (&&'static str, &u64)| {
            let now = self.live_of(kind);
            (now > *before).then(|| (*kind, now - before))
        };
        KINDS.iter().zip(&self.before).filter_map(left).collect()
    }

    /// That nothing is left and no rule was broken.
    pub fn expect_clean(&self) {
        assert_eq!(self.left(), [], "left");
        assert_eq!(self.count("messages"), 0, "{}", self.simulator.report());
    }
}

/// Makes CUDA's libraries the simulator's.
pub fn libraries() {
    static FOLDER: LazyLock<TempDir> = LazyLock::new(|| {
        let folder = TempDir::new().expect("a folder for libraries");
        cuda_sim::library_folder(folder.path()).expect("libraries of the simulator");
        // SAFETY: whoever reads this variable has waited here, and Rust's readers of others wait for it.
        unsafe { std::env::set_var("BATON_CUDA_LIBS", folder.path()) };
        folder
    });
    LazyLock::force(&FOLDER);
}

/// Where tests keep compiled kernels: beside their own files.
pub fn cache() -> PathBuf {
    std::env::current_exe().expect("this test's path").with_file_name("cuda-kernels")
}
