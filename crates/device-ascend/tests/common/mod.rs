//! The simulator as tests use it: a folder of its library under CANN's names, and its own functions. What it is told and what
//! it counts is one state for the process, so a test that uses it holds [`Simulator`].
#![allow(dead_code)] // every test uses a part

use std::ffi::{CString, c_char};
use std::path::PathBuf;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use libloading::Library;
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

/// All names; kept for as long as the process lives.
pub fn libraries() -> PathBuf {
    static FOLDER: LazyLock<TempDir> = LazyLock::new(|| folder(&NAMES));
    FOLDER.path().to_owned()
}

/// The simulator, to one test at a time.
pub struct Simulator {
    library: Library,
    _turn: MutexGuard<'static, ()>,
}

impl Simulator {
    /// As it is by default, with nothing counted.
    pub fn take() -> Self {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the library is ours.
        let library = unsafe { Library::new(library()) }.expect("the simulator");
        let simulator = Self { library, _turn: turn };
        simulator.reset();
        simulator
    }

    fn reset(&self) {
        // SAFETY: the type of the exported function.
        unsafe { (self.library.get::<unsafe extern "C" fn()>(b"ascend_sim_reset").expect("a symbol"))() }
    }
}
