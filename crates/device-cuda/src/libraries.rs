//! Finding CUDA's libraries. They are opened by name when first used; what is opened from a given folder before is then
//! found by its name.
//!
//! Invariant: nothing of a library is called before [`ready`] has found all that serving needs.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use baton_device::{DeviceError, LibraryFacts, Result};
use libloading::Library;

/// Folders, separated by colons, whose libraries go before the system's: those of the Python packages `nvidia-*`, say.
pub(crate) const FOLDERS: &str = "BATON_CUDA_LIBS";

/// A library by what it is for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Role {
    /// For reports.
    pub(crate) name: &'static str,
    /// How its file is called.
    pub(crate) file: &'static str,
    /// Where it comes from.
    origin: &'static str,
    present: unsafe fn() -> bool,
    /// Whether nothing works without it.
    pub(crate) needed: bool,
}

/// What is used of CUDA.
pub(crate) const ROLES: [Role; 4] = [
    Role {
        name: "driver",
        file: "libcuda.so",
        origin: "the NVIDIA driver brings it",
        present: cudarc::driver::sys::is_culib_present,
        needed: true,
    },
    Role {
        name: "compiler",
        file: "libnvrtc.so",
        origin: "the CUDA toolkit or the Python package nvidia-cuda-nvrtc brings it",
        present: cudarc::nvrtc::sys::is_culib_present,
        needed: true,
    },
    Role {
        name: "products",
        file: "libcublasLt.so",
        origin: "the CUDA toolkit or the Python package nvidia-cublas brings it",
        present: cudarc::cublaslt::sys::is_culib_present,
        needed: true,
    },
    Role {
        name: "collectives",
        file: "libnccl.so",
        origin: "the Python package nvidia-nccl brings it; needed for several GPUs",
        present: cudarc::nccl::sys::is_culib_present,
        needed: false,
    },
];

/// What there is.
pub(crate) struct Found {
    /// A role and whether its library can be opened.
    pub(crate) roles: [(Role, bool); 4],
    /// Files of the given folders that were opened, and those that were not with the loader's words.
    pub(crate) files: BTreeMap<PathBuf, std::result::Result<(), String>>,
}

impl Found {
    /// Every reason why a GPU cannot be used.
    pub(crate) fn missing(&self) -> Vec<String> {
        let absent = self.roles.iter().filter(|(role, there)| role.needed && !there);
        absent.map(|(role, _)| format!("{} is not found: {}", role.file, role.origin)).collect()
    }

    /// As reports have them.
    pub(crate) fn facts(&self) -> Vec<LibraryFacts> {
        let facts = |(role, there): &(Role, bool)| {
            let mut facts = LibraryFacts { role: role.name.into(), ..LibraryFacts::default() };
            let own = self.files.iter().filter(|(path, _)| is_called(path, role.file));
            for (path, result) in own {
                match result {
                    Ok(()) => facts.opened.push(path.display().to_string()),
                    Err(reason) => facts.tried.push((path.display().to_string(), reason.clone())),
                }
            }
            match (there, facts.opened.is_empty()) {
                (true, true) => facts.opened.push(role.file.into()),
                (false, true) => facts.tried.push((role.file.into(), format!("not found: {}", role.origin))),
                _ => {}
            }
            facts
        };
        self.roles.iter().map(facts).collect()
    }
}

/// Opens what is to be found, once.
pub(crate) fn find() -> &'static Found {
    static FOUND: OnceLock<Found> = OnceLock::new();
    FOUND.get_or_init(|| {
        let folders = std::env::var_os(FOLDERS).unwrap_or_default();
        let mut files = BTreeMap::new();
        for path in std::env::split_paths(&folders).flat_map(libraries) {
            // SAFETY: initialisers of the libraries that the operator named.
            let opened = unsafe { Library::new(&path) };
            // It stays open for ever.
            let result = opened.map(std::mem::forget).map_err(|error| error.to_string());
            files.insert(path, result);
        }
        // SAFETY: as above, of those that the system finds.
        Found { roles: ROLES.map(|role| (role, unsafe { (role.present)() })), files }
    })
}

/// An error that names what is missing, if anything is.
pub(crate) fn ready(device: &str) -> Result<()> {
    let missing = find().missing();
    if missing.is_empty() {
        return Ok(());
    }
    Err(DeviceError::Unavailable { device: device.to_owned(), reason: missing.join("; ") })
}

/// An error if there is nothing to join several GPUs with.
pub(crate) fn collectives(device: &str) -> Result<()> {
    match find().roles.iter().find(|(role, _)| role.name == "collectives") {
        Some((role, false)) => {
            let reason = format!("{} is not found: {}", role.file, role.origin);
            Err(DeviceError::Unavailable { device: device.to_owned(), reason })
        }
        _ => Ok(()),
    }
}

/// The shared objects in a folder that have a role, and the one that NVRTC opens by name when it compiles.
fn libraries(folder: PathBuf) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let wanted = |path: &PathBuf| {
        let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
        name.starts_with("libnvrtc-builtins.so") || ROLES.iter().any(|role| is_called(path, role.file))
    };
    let mut paths: Vec<PathBuf> = entries.filter(wanted).collect();
    paths.sort();
    paths
}

/// Whether a path's file is `file`, or that with a version.
fn is_called(path: &Path, file: &str) -> bool {
    let rest = path.file_name().and_then(OsStr::to_str).and_then(|name| name.strip_prefix(file));
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}
