//! Finds and opens CANN's libraries, by role. What decides is which functions are there, never a version.
//!
//! Invariant: a library that was opened is never closed: the runtime has threads and exit handlers of its own.

use std::env;
use std::fmt;
use std::path::PathBuf;

use libloading::Library;

use crate::abi::Symbol;
use crate::abi::operators::Operators;
use crate::abi::runtime::{Collectives, Meta, Runtime};

/// What a library is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Devices, memory, streams.
    Runtime,
    /// Tensors and executors.
    Meta,
    /// Operators.
    Operators,
    /// Several devices together.
    Collectives,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Runtime => "runtime",
            Role::Meta => "meta",
            Role::Operators => "operators",
            Role::Collectives => "collectives",
        })
    }
}

impl Role {
    /// File names, the first that serves is taken; of operators all.
    pub fn candidates(self) -> &'static [&'static str] {
        match self {
            Role::Runtime => &["libascendcl.so", "libacl_rt.so"],
            Role::Meta => &["libnnopbase.so"],
            Role::Operators => &[
                "libopapi_nn.so",
                "libopapi_math.so",
                "libopapi_transformer.so",
                "libopapi.so",
                "libaclnn_ops_infer.so",
                "libaclnn_math.so",
            ],
            Role::Collectives => &["libhccl.so"],
        }
    }
}

/// Where libraries are looked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Search {
    /// This folder alone, if given: `BATON_ASCEND_LIBS`.
    pub folder: Option<PathBuf>,
}

impl Search {
    /// As the environment says.
    pub fn from_env() -> Self {
        Self { folder: env::var_os("BATON_ASCEND_LIBS").map(PathBuf::from) }
    }

    /// What to open for a file name, in order: by the loader's own path first, so that the toolkit's environment script wins,
    /// then in the folders where toolkits are installed.
    fn places(&self, name: &str) -> Vec<PathBuf> {
        if let Some(folder) = &self.folder {
            return vec![folder.join(name)];
        }
        let homes = ["ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"].into_iter().filter_map(env::var_os).map(PathBuf::from);
        let defaults = ["/usr/local/Ascend/cann", "/usr/local/Ascend/ascend-toolkit/latest"].map(PathBuf::from);
        let folders = homes.chain(defaults).map(|root| root.join("lib64").join(name));
        std::iter::once(PathBuf::from(name)).chain(folders).collect()
    }
}

/// A library that was opened or tried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    /// For what.
    pub role: Role,
    /// By which path or name.
    pub place: PathBuf,
    /// Why it does not serve; `None` if it does.
    pub problem: Option<String>,
}

/// Why there are no libraries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unavailable {
    /// In a sentence.
    pub reason: String,
    /// Everything that was tried.
    pub attempts: Vec<Attempt>,
}

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

/// The functions of an installation.
pub(crate) struct Acl {
    pub(crate) runtime: Runtime,
    pub(crate) meta: Meta,
    pub(crate) operators: Operators,
    pub(crate) collectives: Option<Collectives>,
    /// What was opened and what was tried.
    pub(crate) attempts: Vec<Attempt>,
}

impl Acl {
    /// Opens the libraries of a search. They stay open for the life of the process.
    pub(crate) fn load(search: &Search) -> Result<&'static Self, Unavailable> {
        let mut attempts = Vec::new();
        let runtime = first(search, Role::Runtime, &mut attempts, |library| {
            // SAFETY: by CANN's ABI these names have the types of the table.
            unsafe { Runtime::load(|name| symbol(library, name)) }
        });
        let meta = first(search, Role::Meta, &mut attempts, |library| {
            // SAFETY: as above.
            unsafe { Meta::load(|name| symbol(library, name)) }
        });
        let libraries = all(search, Role::Operators, &mut attempts);
        let find = |name: &'static str| {
            let prepare = format!("{name}GetWorkspaceSize");
            libraries.iter().find_map(|library| Some([symbol(library, &prepare)?, symbol(library, name)?]))
        };
        // SAFETY: both phases come from one library, and have the types of the list by CANN's ABI.
        let operators = unsafe { Operators::load(find) };
        let collectives = first(search, Role::Collectives, &mut attempts, |library| {
            // SAFETY: as above.
            unsafe { Collectives::load(|name| symbol(library, name)) }
        });
        let missing: Vec<_> = [
            (Role::Runtime, runtime.is_some()),
            (Role::Meta, meta.is_some()),
            (Role::Operators, !libraries.is_empty()),
        ]
        .into_iter()
        .filter_map(|(role, found)| (!found).then_some(role))
        .collect();
        let (Some(runtime), Some(meta), []) = (runtime, meta, missing.as_slice()) else {
            return Err(Unavailable { reason: reason(&missing, &attempts), attempts });
        };
        Ok(Box::leak(Box::new(Self { runtime, meta, operators, collectives, attempts })))
    }

    /// Every symbol that is looked for, and whether it is there.
    pub(crate) fn symbols(&self) -> Vec<(&'static str, bool)> {
        Operators::NAMES.iter().map(|&name| (name, self.operators.has(name))).collect()
    }
}

/// The first candidate that has everything.
fn first<T>(
    search: &Search,
    role: Role,
    attempts: &mut Vec<Attempt>,
    take: impl Fn(&'static Library) -> Result<T, Vec<&'static str>>,
) -> Option<T> {
    for place in role.candidates().iter().flat_map(|name| search.places(name)) {
        let taken = open(&place)
            .and_then(|library| take(library).map_err(|missing| format!("it lacks {}", missing.join(", "))));
        let (taken, problem) = match taken {
            Ok(taken) => (Some(taken), None),
            Err(problem) => (None, Some(problem)),
        };
        attempts.push(Attempt { role, place, problem });
        if taken.is_some() {
            return taken;
        }
    }
    None
}

/// All candidates that can be opened, each once.
fn all(search: &Search, role: Role, attempts: &mut Vec<Attempt>) -> Vec<&'static Library> {
    let mut libraries = Vec::new();
    for name in role.candidates() {
        for place in search.places(name) {
            let opened = open(&place);
            attempts.push(Attempt { role, place, problem: opened.as_ref().err().cloned() });
            if let Ok(library) = opened {
                libraries.push(library);
                break;
            }
        }
    }
    libraries
}

fn open(place: &PathBuf) -> Result<&'static Library, String> {
    // SAFETY: opening runs the library's initialisers; it is CANN's, or what the operator put in its place.
    let library = unsafe { Library::new(place) }.map_err(|error| error.to_string())?;
    Ok(Box::leak(Box::new(library)))
}

fn symbol(library: &'static Library, name: &str) -> Option<Symbol> {
    // SAFETY: only the address is taken here; whoever casts it answers for its type. The library is never closed.
    let symbol = unsafe { library.get::<*const std::ffi::c_void>(name.as_bytes()) }.ok()?;
    Some(Symbol(*symbol))
}

fn reason(missing: &[Role], attempts: &[Attempt]) -> String {
    let roles: Vec<_> = missing.iter().map(Role::to_string).collect();
    let tried: Vec<_> = attempts
        .iter()
        .filter(|attempt| missing.contains(&attempt.role))
        .filter_map(|attempt| Some(format!("{}: {}", attempt.place.display(), attempt.problem.as_ref()?)))
        .collect();
    format!(
        "no usable CANN library for {}; is the toolkit installed and its set_env.sh sourced? tried {}",
        roles.join(", "),
        tried.join("; ")
    )
}
