//! Finds and opens CANN's libraries, by role. What decides is which functions are there, never a version.
//!
//! Invariant: a library that was opened is never closed: the runtime has threads and exit handlers of its own.

use std::collections::BTreeMap;
use std::env;
use std::error::Error;
use std::fmt;
use std::path::PathBuf;

use libloading::Library;

use crate::abi::Symbol;
use crate::abi::operators::{MATMUL_WEIGHT_SIZE, MatmulWeightSize, Operators};
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
    /// In words.
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
    pub(crate) matmul_weight_size: Option<MatmulWeightSize>,
    pub(crate) collectives: Option<Collectives>,
    /// What was opened and what was tried.
    pub(crate) attempts: Vec<Attempt>,
    /// Every function and operator that was looked for, and whether it is there.
    pub(crate) symbols: BTreeMap<&'static str, bool>,
}

impl Acl {
    /// Opens the libraries of a search. They stay open for the life of the process.
    pub(crate) fn load(search: &Search) -> Result<&'static Self, Unavailable> {
        let mut finds = Finds { search, attempts: Vec::new(), symbols: BTreeMap::new() };
        // SAFETY: by CANN's ABI these names have the types of the tables.
        let (runtime, meta, collectives) = unsafe {
            (
                finds.table(Role::Runtime, [Runtime::REQUIRED, Runtime::OPTIONAL], |find| Runtime::load(find)),
                finds.table(Role::Meta, [Meta::REQUIRED, Meta::OPTIONAL], |find| Meta::load(find)),
                finds.table(Role::Collectives, [Collectives::REQUIRED, Collectives::OPTIONAL], |find| {
                    Collectives::load(find)
                }),
            )
        };
        let libraries = finds.operator_libraries();
        // SAFETY: both phases come from one library, and have the types of the list by CANN's ABI.
        let operators = unsafe { Operators::load(|name| libraries.iter().find_map(|library| both(library, name))) };
        finds.symbols.extend(Operators::NAMES.iter().map(|&name| (name, operators.has(name))));
        let size = libraries.iter().find_map(|library| symbol(library, MATMUL_WEIGHT_SIZE));
        // SAFETY: by CANN's ABI a function of this name has this type.
        let matmul_weight_size: Option<MatmulWeightSize> = size.map(|symbol| unsafe { symbol.cast() });
        finds.symbols.insert(MATMUL_WEIGHT_SIZE, matmul_weight_size.is_some());
        let Finds { attempts, symbols, .. } = finds;
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
        Ok(Box::leak(Box::new(Self { runtime, meta, operators, matmul_weight_size, collectives, attempts, symbols })))
    }
}

/// A search under way.
struct Finds<'a> {
    search: &'a Search,
    attempts: Vec<Attempt>,
    symbols: BTreeMap<&'static str, bool>,
}

impl Finds<'_> {
    /// A table of functions, of the first candidate that has all `names[0]`. What may be missing is looked up in the
    /// candidates behind it too.
    fn table<T>(
        &mut self,
        role: Role,
        names: [&'static [&'static str]; 2],
        load: impl FnOnce(&dyn Fn(&'static str) -> Option<Symbol>) -> Result<T, Vec<&'static str>>,
    ) -> Option<T> {
        let [required, optional] = names;
        let mut libraries = Vec::new();
        let find = |libraries: &[&'static Library], name| libraries.iter().find_map(|library| symbol(library, name));
        for name in role.candidates() {
            for place in self.search.places(name) {
                let lacks = |library: &'static Library| {
                    let lacks: Vec<_> = required.iter().copied().filter(|n| symbol(library, n).is_none()).collect();
                    // Behind one that serves, whatever can be opened will do.
                    let serves = lacks.is_empty() || !libraries.is_empty();
                    if serves { Ok(library) } else { Err(format!("it lacks {}", lacks.join(", "))) }
                };
                if let Some(library) = self.attempt(role, place, lacks) {
                    libraries.push(library);
                    break;
                }
            }
            if !libraries.is_empty() && optional.iter().all(|name| find(&libraries, name).is_some()) {
                break;
            }
        }
        let all = required.iter().chain(optional);
        self.symbols.extend(all.map(|&name| (name, find(&libraries, name).is_some())));
        load(&|name| find(&libraries, name)).ok()
    }

    /// All candidates that have operators, each once.
    fn operator_libraries(&mut self) -> Vec<&'static Library> {
        let mut libraries = Vec::new();
        for name in Role::Operators.candidates() {
            let serves = |library| {
                let any = Operators::NAMES.iter().any(|name| both(library, name).is_some());
                if any { Ok(library) } else { Err("it has no operator that is in use".to_owned()) }
            };
            let mut places = self.search.places(name).into_iter();
            libraries.extend(places.find_map(|place| self.attempt(Role::Operators, place, serves)));
        }
        libraries
    }

    /// Opens one, and notes what came of it.
    fn attempt(
        &mut self,
        role: Role,
        place: PathBuf,
        serves: impl FnOnce(&'static Library) -> Result<&'static Library, String>,
    ) -> Option<&'static Library> {
        let result = open(&place).and_then(serves);
        self.attempts.push(Attempt { role, place, problem: result.as_ref().err().cloned() });
        result.ok()
    }
}

fn open(place: &PathBuf) -> Result<&'static Library, String> {
    // SAFETY: opening runs the library's initialisers; it is CANN's, or what the operator put in its place.
    let library = unsafe { Library::new(place) };
    // The loader's own words, which name the library that it lacks, are the source. Its own name a reader knows.
    let words = |error: libloading::Error| {
        let words = error.source().map_or_else(|| error.to_string(), ToString::to_string);
        words.strip_prefix(&format!("{}: ", place.display())).map_or(words.clone(), ToOwned::to_owned)
    };
    Ok(Box::leak(Box::new(library.map_err(words)?)))
}

fn symbol(library: &'static Library, name: &str) -> Option<Symbol> {
    // SAFETY: only the address is taken here; whoever casts it answers for its type. The library is never closed.
    let symbol = unsafe { library.get::<*const std::ffi::c_void>(name.as_bytes()) }.ok()?;
    Some(Symbol(*symbol))
}

/// Both phases of an operator, if the library has both.
fn both(library: &'static Library, name: &str) -> Option<[Symbol; 2]> {
    Some([symbol(library, &format!("{name}GetWorkspaceSize"))?, symbol(library, name)?])
}

fn reason(missing: &[Role], attempts: &[Attempt]) -> String {
    let roles: Vec<_> = missing.iter().map(Role::to_string).collect();
    let problems: Vec<_> = attempts
        .iter()
        .filter(|attempt| missing.contains(&attempt.role))
        .filter_map(|attempt| Some((attempt.place.display(), attempt.problem.as_ref()?)))
        .collect();
    let cause = if problems.iter().any(|(_, problem)| problem.contains("libascend_hal")) {
        "the driver is not installed, or its folder is not on the loader's path"
    } else {
        "is the toolkit installed and its set_env.sh sourced?"
    };
    let mut tried: Vec<(&str, Vec<String>)> = Vec::new();
    for (place, problem) in &problems {
        match tried.iter_mut().find(|(known, _)| known == problem) {
            Some((_, places)) => places.push(place.to_string()),
            None => tried.push((problem, vec![place.to_string()])),
        }
    }
    let tried: Vec<_> = tried.iter().map(|(problem, places)| format!("{problem} ({})", places.join(", "))).collect();
    format!("no usable CANN library for {}: {cause} Tried: {}", roles.join(", "), tried.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_cann_the_reason_lists_everything_that_was_tried() {
        let folder = env::temp_dir().join("baton-no-such-folder");
        let search = Search { folder: Some(folder.clone()) };
        let unavailable = Acl::load(&search).err().expect("nothing is there");
        for role in [Role::Runtime, Role::Meta, Role::Operators] {
            for name in role.candidates() {
                let place = folder.join(name).display().to_string();
                assert!(unavailable.reason.contains(&place), "{place} in {unavailable}");
            }
        }
        assert!(unavailable.attempts.iter().all(|attempt| attempt.problem.is_some()));
    }

    #[test]
    fn the_loaders_own_path_comes_before_the_usual_folders_and_a_folder_given_alone() {
        let search = Search::default();
        let places = search.places("libascendcl.so");
        assert_eq!(places[0], PathBuf::from("libascendcl.so"));
        assert!(places.contains(&PathBuf::from("/usr/local/Ascend/cann/lib64/libascendcl.so")));
        let search = Search { folder: Some("x".into()) };
        assert_eq!(search.places("libascendcl.so"), [PathBuf::from("x/libascendcl.so")]);
    }
}
