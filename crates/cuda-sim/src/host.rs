//! The simulator's library as tests of other crates use it: under the names that callers look for, and with its own functions.
//!
//! Invariant: the library has one state in a process, and this crate, linked into a test, has another that nobody uses. So everything here
//! goes through the library's symbols.

use std::{
    ffi::{CString, c_char},
    io,
    path::{Path, PathBuf},
    process::Command,
};

use libloading::Library;

/// The libraries that the simulator stands for, as they are called where only what programs need is installed.
const NAMES: [&str; 4] = ["libcuda.so.1", "libnvrtc.so.13", "libcublasLt.so.13", "libnccl.so.2"];

/// The simulator's library, which is built beside the test that asks.
pub fn library() -> PathBuf {
    let test = std::env::current_exe().expect("this test's path");
    let library = test.parent().expect("its folder").join("libcuda_sim.so");
    assert!(library.exists(), "{} is built with the tests", library.display());
    library
}

/// Makes in `folder` the libraries by which the simulator that was built with the tests is found.
///
/// # Errors
/// As [`name_library`].
pub fn library_folder(folder: &Path) -> io::Result<()> {
    name_library(&library(), folder)
}

/// Makes in `folder` the libraries by which the simulator, `library`, is found: empty ones that bring it along. Opened by path, they are found
/// by name afterwards, for that is how the system's loader knows libraries.
///
/// # Errors
/// The host's compiler, which links them, is missing or fails.
pub fn name_library(library: &Path, folder: &Path) -> io::Result<()> {
    let compiler = crate::compiler().ok_or_else(|| io::Error::other("no C++ compiler"))?;
    let source = folder.join("empty.c");
    std::fs::write(&source, "")?;
    for name in NAMES {
        let mut command = Command::new(&compiler);
        command.args(["-shared", "-nostdlib", "-Wl,--no-as-needed"]).arg(format!("-Wl,-soname,{name}"));
        let status = command.arg("-o").arg(folder.join(name)).arg(&source).arg(library).status()?;
        if !status.success() {
            return Err(io::Error::other(format!("{name} could not be linked")));
        }
    }
    std::fs::remove_file(source)
}

/// The simulator's own functions.
pub struct Simulator {
    library: Library,
}

impl Simulator {
    /// Opens the library, which is the same as that behind the names of [`library_folder`].
    #[expect(clippy::new_without_default, reason = "it opens a library")]
    pub fn new() -> Self {
        // SAFETY: opening the library runs nothing.
        Self { library: unsafe { Library::new(library()) }.expect("the simulator") }
    }

    /// Every setting as at the start, and no counts.
    pub fn reset(&self) {
        self.control("default");
        // SAFETY: the type of the exported function.
        unsafe { (self.library.get::<unsafe extern "C" fn()>(b"cuda_sim_reset").expect("a symbol"))() }
    }

    /// `key=value`, as the crate's head lists them.
    pub fn control(&self, setting: &str) {
        let text = CString::new(setting).expect("a text");
        // SAFETY: the type of the exported function, and a text that ends in zero.
        let code = unsafe {
            let control = self.library.get::<unsafe extern "C" fn(*const c_char) -> i32>(b"cuda_sim_control");
            (control.expect("a symbol"))(text.as_ptr())
        };
        assert_eq!(code, 0, "{setting}");
    }

    /// One of the counts: `live.KIND`, `bytes.device`, `bytes.peak.DEVICE`, `calls.SYMBOL`, `copies.DIRECTION`,
    /// `copied.DIRECTION` in bytes, `messages`; of kernels that ran `kernels.NAME`, and of their blocks `threads.NAME` and bytes of
    /// dynamic shared memory `shared.NAME`, at most; 0 if nothing was counted under that name.
    pub fn count(&self, name: &str) -> u64 {
        let name = CString::new(name).expect("a text");
        // SAFETY: the type of the exported function, and a text that ends in zero.
        unsafe {
            let count = self.library.get::<unsafe extern "C" fn(*const c_char) -> u64>(b"cuda_sim_count");
            (count.expect("a symbol"))(name.as_ptr())
        }
    }

    /// All counts, and what was refused or failed in words, as JSON.
    pub fn report(&self) -> String {
        type Report = unsafe extern "C" fn(*mut c_char, usize) -> usize;
        // SAFETY: the type of the exported function, and room for as many bytes as it wants.
        let bytes = unsafe {
            let report = self.library.get::<Report>(b"cuda_sim_report").expect("a symbol");
            let mut bytes = vec![0u8; report(std::ptr::null_mut(), 0) + 1];
            report(bytes.as_mut_ptr().cast(), bytes.len());
            bytes.pop();
            bytes
        };
        String::from_utf8(bytes).expect("JSON is UTF-8")
    }
}
