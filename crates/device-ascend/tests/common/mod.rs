//! What the tests share: the simulator under the names of CANN's libraries.
//!
//! Invariant: the simulator has one state in a process, so one test has it at a time.

#![allow(dead_code)] // each test file uses its part

use std::ffi::{CString, c_char};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_device::DType;
use baton_device_ascend::{AscendBackend, AscendOptions, Search};
use libloading::Library;
use serde_json::Value;

/// A chip of each family, as the runtime calls it.
pub const A2: &str = "Ascend910B3";
pub const P310: &str = "Ascend310P3";

/// The simulator, while it is this test's turn.
pub struct Simulator {
    library: Library,
    _turn: MutexGuard<'static, ()>,
}

impl Simulator {
    /// Waits for its turn; counters are zero and no violation is known.
    pub fn new() -> Self {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the library of this workspace; its initialisers do nothing that a process would notice.
        let library = unsafe { Library::new(libraries().join("libascendcl.so")) }.expect("the simulator is a library");
        let simulator = Self { library, _turn: turn };
        simulator.reset();
        simulator
    }

    /// Forgets counters and violations.
    pub fn reset(&self) {
        // SAFETY: the type is that of the simulator's source.
        unsafe { self.library.get::<extern "C" fn()>(b"ascend_sim_reset").expect("exported")() }
    }

    /// Sets `key=value`, in the simulator's grammar.
    pub fn control(&self, text: &str) {
        let text = CString::new(text).expect("no zero in it");
        // SAFETY: the type is that of the simulator's source; the text ends with a zero.
        let code = unsafe {
            let control: libloading::Symbol<'_, unsafe extern "C" fn(*const c_char) -> i32> =
                self.library.get(b"ascend_sim_control").expect("exported");
            control(text.as_ptr())
        };
        assert_eq!(code, 0, "{text:?}");
    }

    /// What happened since the counters were reset.
    pub fn report(&self) -> Value {
        // SAFETY: the type is that of the simulator's source; it writes no more than it is given room for.
        let text = unsafe {
            let report: libloading::Symbol<'_, unsafe extern "C" fn(*mut c_char, usize) -> usize> =
                self.library.get(b"ascend_sim_report").expect("exported");
            let len = report(std::ptr::null_mut(), 0);
            let mut text = vec![0_u8; len + 1];
            report(text.as_mut_ptr().cast(), text.len());
            text.truncate(len);
            text
        };
        serde_json::from_slice(&text).expect("JSON")
    }

    /// Opens a simulated chip with activations of a type.
    pub fn open(&self, chip: &str, activations: DType) -> AscendBackend {
        self.control(&format!("soc={chip}"));
        AscendBackend::new(&options(activations)).unwrap()
    }

    /// As above, with fused operators where chip and shape allow.
    pub fn open_fused(&self, chip: &str, activations: DType) -> AscendBackend {
        self.control(&format!("soc={chip}"));
        AscendBackend::new(&AscendOptions { fused: true, ..options(activations) }).unwrap()
    }

    /// That the caller broke no rule since the counters were reset.
    pub fn expect_no_violation(&self) {
        assert_eq!(self.report()["violations"], serde_json::json!([]));
    }
}

/// For a simulated device.
pub fn options(activations: DType) -> AscendOptions {
    AscendOptions {
        device: 0,
        search: Search { folder: Some(libraries()) },
        activations,
        timeout: Duration::from_secs(60),
        blocking: false,
        fused: false,
    }
}

/// A folder in which the simulator has the names of CANN's libraries.
pub fn libraries() -> PathBuf {
    let executable = std::env::current_exe().expect("a test has a path");
    let folder = executable.parent().expect("it lies in a folder");
    let built = [folder, folder.parent().expect("deps lies in a folder")]
        .into_iter()
        .flat_map(|folder| ["libascend_sim.so", "libbaton_ascend_sim.so"].map(|name| folder.join(name)))
        .find(|path| path.exists())
        .expect("the simulator is built with the tests");
    let links = Path::new(env!("CARGO_TARGET_TMPDIR")).join("ascend-libraries");
    std::fs::create_dir_all(&links).expect("a folder for links");
    for name in ["libascendcl.so", "libnnopbase.so", "libopapi.so", "libhccl.so"] {
        // Another test may make the same link at the same time.
        let _ = std::os::unix::fs::symlink(&built, links.join(name));
    }
    links
}
