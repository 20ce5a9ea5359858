//! The simulator as tests use it: a folder of its library under CANN's names, and its own functions.
//!
//! Invariant: the simulator has one state in a process, so one test has it at a time.

#![allow(dead_code)] // each test file uses its part

use std::collections::BTreeMap;
use std::ffi::{CString, c_char};
use std::path::PathBuf;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use libloading::Library;
use serde_json::Value;
use tempfile::TempDir;

/// CANN's names.
pub const NAMES: [&str; 8] = [
    "libascendcl.so",
    "libacl_rt.so",
    "libnnopbase.so",
    "libopapi.so",
    "libopapi_nn.so",
    "libopapi_math.so",
    "libopapi_transformer.so",
    "libhccl.so",
];

/// The simulator's library, which is built beside the tests.
pub fn library() -> PathBuf {
    let test = std::env::current_exe().expect("this test's path");
    let library = test.parent().expect("its folder").join("libascend_sim.so");
    assert!(library.exists(), "{} is built with the tests", library.display());
    library
}

/// A folder in which the library has these names.
pub fn folder(names: &[&str]) -> TempDir {
    let folder = TempDir::new().expect("a folder for links");
    for name in names {
        std::os::unix::fs::symlink(library(), folder.path().join(name)).expect("a link");
    }
    folder
}

/// All names, for a library that lacks a function: the simulator again, with another name in its place. Its state is its own.
pub fn without(function: &str) -> TempDir {
    let mut bytes = std::fs::read(library()).expect("the library");
    let name = [b"\0", function.as_bytes(), b"\0"].concat();
    let places: Vec<usize> = (0..bytes.len() - name.len()).filter(|&at| bytes[at..].starts_with(&name)).collect();
    assert!(!places.is_empty(), "{function} is there");
    places.into_iter().for_each(|at| bytes[at + 1] = b'x');
    let folder = TempDir::new().expect("a folder");
    std::fs::write(folder.path().join("simulator"), &bytes).expect("a copy");
    for name in NAMES {
        std::os::unix::fs::symlink("simulator", folder.path().join(name)).expect("a link");
    }
    folder
}

/// All names; kept for as long as the process lives.
pub fn libraries() -> PathBuf {
    static FOLDER: LazyLock<TempDir> = LazyLock::new(|| folder(&NAMES));
    FOLDER.path().to_owned()
}

/// The simulator, to one test at a time.
pub struct Simulator {
    library: Library,
    /// What tests before it left live: some leave something on purpose.
    before: BTreeMap<String, u64>,
    _turn: MutexGuard<'static, ()>,
}

impl Simulator {
    /// As it is by default, with nothing counted.
    pub fn new() -> Self {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: opening the library runs nothing.
        let library = unsafe { Library::new(library()) }.expect("the simulator");
        let mut simulator = Self { library, before: BTreeMap::new(), _turn: turn };
        simulator.calm();
        for setting in ["soc=Ascend910B3", "devices=1", "memory=2147483648", "collective_timeout=60000", "perturb=off"]
        {
            simulator.control(setting);
        }
        simulator.reset();
        simulator.before = simulator.live();
        simulator
    }

    /// Forgets counters and violations.
    pub fn reset(&self) {
        // SAFETY: the type of the exported function.
        unsafe { (self.library.get::<unsafe extern "C" fn()>(b"ascend_sim_reset").expect("a symbol"))() }
    }

    /// No faults any more.
    pub fn calm(&self) {
        ["fault=", "lost=0", "hang=off", "stub=off", "slow=0"].iter().for_each(|setting| self.control(setting));
    }

    /// `key=value`, as the simulator's documentation lists them.
    pub fn control(&self, setting: &str) {
        let text = CString::new(setting).expect("a text");
        // SAFETY: the type of the exported function, and a text that ends in zero.
        let code = unsafe {
            let control = self.library.get::<unsafe extern "C" fn(*const c_char) -> i32>(b"ascend_sim_control");
            (control.expect("a symbol"))(text.as_ptr())
        };
        assert_eq!(code, 0, "{setting}");
    }

    /// What was counted since it was taken, and what is live.
    pub fn report(&self) -> Value {
        type Report = unsafe extern "C" fn(*mut c_char, usize) -> usize;
        // SAFETY: the type of the exported function, and room for as many bytes as it wants.
        let bytes = unsafe {
            let report = self.library.get::<Report>(b"ascend_sim_report").expect("a symbol");
            let mut bytes = vec![0u8; report(std::ptr::null_mut(), 0) + 1];
            report(bytes.as_mut_ptr().cast(), bytes.len());
            bytes.pop();
            bytes
        };
        serde_json::from_slice(&bytes).expect("JSON")
    }

    /// That the caller broke no rule.
    pub fn expect_no_violation(&self) {
        assert_eq!(self.violations(), [""; 0]);
    }

    /// Rules that were broken.
    pub fn violations(&self) -> Vec<String> {
        serde_json::from_value(self.report()["violations"].clone()).expect("texts")
    }

    /// Handles, blocks and buffers that are live since it was taken, by kind, where there are any.
    pub fn live(&self) -> BTreeMap<String, u64> {
        let live: BTreeMap<String, u64> = serde_json::from_value(self.report()["live"].clone()).expect("numbers");
        let more = |(kind, count): (String, u64)| {
            let more = count.saturating_sub(self.before.get(&kind).copied().unwrap_or(0));
            (more > 0).then_some((kind, more))
        };
        live.into_iter().filter_map(more).collect()
    }

    /// That nothing is left and no rule was broken.
    pub fn expect_clean(&self) {
        assert_eq!((self.live(), self.violations()), (BTreeMap::new(), vec![]));
    }
}
