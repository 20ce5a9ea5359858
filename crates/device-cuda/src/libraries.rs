//! Finding CUDA's libraries. They are opened by name when first used; what is opened from a given folder before is then
//! found by its name, unless the system has one with a shorter name.
//!
//! Invariant: nothing of a library but its version is asked before [`ready`] has found that all that serving needs is there
//! and new enough.

use std::collections::BTreeMap;
use std::ffi::{OsStr, c_int, c_void};
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use baton_device::{DeviceError, LibraryFacts, Result};
use cudarc::cublaslt::sys as cublaslt;
use cudarc::driver::sys as driver;
use cudarc::nccl::sys::ncclResult_t;
use cudarc::nvrtc::sys as nvrtc;
use libloading::Library;

use crate::compiler;
use crate::nccl::{self, Nccl};

/// Folders, separated by colons, whose libraries go before the system's: those of the Python packages `nvidia-*`, say.
pub(crate) const FOLDERS: &str = "BATON_CUDA_LIBS";

/// A library by what it is for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Role {
    /// For reports.
    name: &'static str,
    /// How its file is called.
    file: &'static str,
    /// Where it comes from.
    origin: &'static str,
    present: unsafe fn() -> bool,
    /// The library itself, once it is found.
    library: unsafe fn() -> &'static Library,
    /// A function that it has.
    function: &'static str,
    /// What its version is called, and how it is asked for; zeros if it does not tell.
    title: &'static str,
    version: fn() -> Version,
    /// The oldest version that has every function that is called: calling one that is not there ends the program.
    oldest: Version,
    /// Whether nothing works without it.
    needed: bool,
}

/// Major and minor.
type Version = (c_int, c_int);

/// What is used of CUDA.
const ROLES: [Role; 4] = [
    Role {
        name: "driver",
        file: "libcuda.so",
        origin: "the NVIDIA driver brings it",
        present: driver::is_culib_present,
        library: driver::culib,
        function: "cuInit",
        title: "driver's CUDA",
        version: || {
            // SAFETY: a valid out pointer; no device is asked.
            let version =
                told(|version| unsafe { driver::cuDriverGetVersion(version) == driver::CUresult::CUDA_SUCCESS });
            (version / 1000, version % 1000 / 10)
        },
        oldest: (12, 0),
        needed: true,
    },
    Role {
        name: "compiler",
        file: "libnvrtc.so",
        origin: "the CUDA toolkit or the Python package nvidia-cuda-nvrtc brings it",
        present: nvrtc::is_culib_present,
        library: nvrtc::culib,
        function: "nvrtcVersion",
        title: "NVRTC",
        version: compiler::version,
        oldest: (12, 0),
        needed: true,
    },
    Role {
        name: "products",
        file: "libcublasLt.so",
        origin: "the CUDA toolkit or the Python package nvidia-cublas brings it",
        present: cublaslt::is_culib_present,
        library: cublaslt::culib,
        function: "cublasLtCreate",
        title: "cuBLASLt",
        // SAFETY: asks nothing of a device.
        version: || parts(unsafe { cublaslt::cublasLtGetVersion() } as c_int),
        oldest: (12, 0),
        needed: true,
    },
    Role {
        name: "collectives",
        file: nccl::FILE,
        origin: "the Python package nvidia-nccl brings it, 2.13 or newer; needed for several GPUs",
        present: || nccl::find().is_some(),
        library: || &nccl::find().expect("it is present").library,
        function: "ncclAllReduce",
        title: "NCCL",
        version: || {
            let nccl = nccl::find().expect("it is present");
            // SAFETY: a valid out pointer; no device is asked.
            parts(told(|version| unsafe { (nccl.version)(version) == ncclResult_t::ncclSuccess }))
        },
        oldest: (2, 13),
        needed: false,
    },
];

/// A number that a library tells; 0 if it does not.
fn told(ask: impl FnOnce(*mut c_int) -> bool) -> c_int {
    let mut number = 0;
    if ask(&raw mut number) { number } else { 0 }
}

/// Of a version as cuBLASLt and NCCL count them.
fn parts(version: c_int) -> Version {
    (version / 10_000, version % 10_000 / 100)
}

/// What there is.
pub(crate) struct Found {
    /// A role and its library's version, if it can be opened.
    roles: [(Role, Option<Version>); 4],
    /// Files of the given folders that are used, and those that are not with the reason.
    files: BTreeMap<PathBuf, std::result::Result<(), String>>,
}

impl Found {
    /// Every reason why a GPU cannot be used.
    pub(crate) fn missing(&self) -> Vec<String> {
        self.roles.iter().filter(|(role, _)| role.needed).filter_map(|found| self.objection(found)).collect()
    }

    /// Why a role's library cannot be used.
    fn objection(&self, (role, version): &(Role, Option<Version>)) -> Option<String> {
        let [(_, driver), ..] = self.roles;
        match version {
            None => Some(format!("{} is not found: {}", role.file, role.origin)),
            Some(version) => unsuitable(role, *version, driver),
        }
    }

    /// The versions that were told, by what they are called.
    pub(crate) fn versions(&self) -> impl Iterator<Item = (String, String)> {
        let told = |(role, version): &(Role, Option<Version>)| {
            version.map(|(major, minor)| (role.title.to_owned(), format!("{major}.{minor}")))
        };
        self.roles.iter().filter_map(told)
    }

    /// As reports have them.
    pub(crate) fn facts(&self) -> Vec<LibraryFacts> {
        let facts = |(role, version): &(Role, Option<Version>)| {
            let mut facts = LibraryFacts { role: role.name.into(), ..LibraryFacts::default() };
            let own = self.files.iter().filter(|(path, _)| is_called(path, role.file));
            for (path, result) in own {
                match result {
                    Ok(()) => facts.opened.push(path.display().to_string()),
                    Err(reason) => facts.tried.push((path.display().to_string(), reason.clone())),
                }
            }
            match (version.is_some(), facts.opened.is_empty()) {
                (true, true) => facts.opened.push(role.file.into()),
                (false, true) => facts.tried.push((role.file.into(), format!("not found: {}", role.origin))),
                _ => {}
            }
            facts
        };
        self.roles.iter().map(facts).collect()
    }
}

/// Why a library that is there cannot be used.
fn unsuitable(role: &Role, version: Version, driver: Option<Version>) -> Option<String> {
    let Role { file, oldest, .. } = role;
    let number = |(major, minor): Version| format!("{major}.{minor}");
    if version < *oldest {
        return Some(format!("{file} has version {}; {} or newer is needed", number(version), number(*oldest)));
    }
    // Within a major version of CUDA a driver takes what newer libraries make.
    let driver = driver.filter(|driver| role.needed && driver.0 < version.0)?;
    Some(format!(
        "{file} is of CUDA {}, the driver of {}: a newer driver is needed, or libraries of CUDA {}",
        number(version),
        number(driver),
        driver.0
    ))
}

/// Opens what is to be found, once.
pub(crate) fn find() -> &'static Found {
    static FOUND: OnceLock<Found> = OnceLock::new();
    FOUND.get_or_init(|| {
        // SAFETY: initialisers of the libraries that the operator named. They stay open for ever.
        let open = |path: &PathBuf| unsafe { Library::new(path) }.map(ManuallyDrop::new);
        // NVRTC opens the last by name when it compiles.
        let files = ROLES.map(|role| role.file).into_iter().chain(["libnvrtc-builtins.so"]);
        let given: Vec<_> = files.flat_map(given).map(|path| (open(&path), path)).collect();
        // SAFETY: as above, of those that the system finds.
        let roles = ROLES.map(|role| (role, unsafe { (role.present)() }.then(role.version)));
        let used = |(library, path): (std::result::Result<ManuallyDrop<Library>, libloading::Error>, PathBuf)| {
            let library = library.map_err(|error| error.to_string());
            let result = library.and_then(|library| match ROLES.iter().find(|role| is_called(&path, role.file)) {
                Some(role) if !is_taken(role, &library) => {
                    Err(format!("it is not the one that is found as {}", role.file))
                }
                _ => Ok(()),
            });
            if let Err(reason) = &result {
                tracing::warn!(file = %path.display(), reason, "a library of {FOLDERS} is not used");
            }
            (path, result)
        };
        Found { roles, files: given.into_iter().map(used).collect() }
    })
}

/// Whether a library is the one that is called in its role. The bare name is looked for before those with a version, so
/// that it is not if the system has another by that name, or if no version that is looked for is its own.
fn is_taken(role: &Role, library: &Library) -> bool {
    let address = |library: &Library| {
        // SAFETY: only the address is looked at.
        let function = unsafe { library.get::<*const c_void>(role.function) };
        function.ok().map(|function| *function)
    };
    // SAFETY: initialisers of libraries that the system finds.
    let called = unsafe { (role.present)().then(|| (role.library)()) };
    address(library).is_some_and(|own| Some(own) == called.and_then(address))
}

/// An error that names what is missing, if anything is.
pub(crate) fn ready(device: &str) -> Result<()> {
    let missing = find().missing();
    if missing.is_empty() {
        return Ok(());
    }
    Err(DeviceError::Unavailable { device: device.to_owned(), reason: missing.join("; ") })
}

/// What joins several GPUs, or an error.
pub(crate) fn collectives(device: &str) -> Result<&'static Nccl> {
    let found = find();
    let [.., collectives] = &found.roles;
    match found.objection(collectives) {
        Some(reason) => Err(DeviceError::Unavailable { device: device.to_owned(), reason }),
        None => Ok(nccl::find().expect("as found")),
    }
}

/// Files of the given folders that are called so, but for a version.
pub(crate) fn given(file: &str) -> Vec<PathBuf> {
    let folders = std::env::var_os(FOLDERS).unwrap_or_default();
    let entries = std::env::split_paths(&folders).flat_map(std::fs::read_dir).flatten().flatten();
    let mut paths: Vec<_> = entries.map(|entry| entry.path()).filter(|path| is_called(path, file)).collect();
    paths.sort();
    paths
}

/// Whether a path's file is `file`, or that with a version.
fn is_called(path: &Path, file: &str) -> bool {
    let rest = path.file_name().and_then(OsStr::to_str).and_then(|name| name.strip_prefix(file));
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_that_are_too_old_or_newer_than_the_driver_takes_are_not_called() {
        let [driver, compiler, products, collectives] = ROLES;
        let refused = |role: &Role, version, with| unsuitable(role, version, Some(with)).is_some();
        assert!(refused(&driver, (11, 8), (11, 8)) && !refused(&driver, (12, 0), (12, 0)));
        for library in [compiler, products] {
            assert!(refused(&library, (11, 8), (13, 0)));
            assert!(refused(&library, (13, 0), (12, 9)));
            for (version, with) in [((12, 9), (12, 2)), ((12, 0), (13, 1)), ((13, 1), (13, 0))] {
                assert!(!refused(&library, version, with), "{version:?} with {with:?}");
            }
        }
        // NCCL counts for itself.
        assert!(refused(&collectives, parts(2_708), (13, 0)) && refused(&collectives, (2, 12), (13, 0)));
        assert!(!refused(&collectives, parts(22_803), (12, 0)));
    }
}
