//! Images of compiled programs, and the modules and functions that are loaded from them.
//!
//! Invariant: an image says how long it is, for which device it was compiled and by which emulator, and has a checksum; what does not fit is
//! refused, as a driver refuses a damaged file or another chip's code. A library that was loaded stays: its kernels' stacks may be in use.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Arc, Mutex, PoisonError},
};

use crate::{
    codes::cuda,
    compiler::emulator,
    emulator::{Launch, Library},
    machine::{Fail, Machine, fail},
};

const MAGIC: [u8; 8] = *b"CUDASIM1";
/// Magic, then as little-endian u64: bytes behind the head, their checksum, the emulator's, architecture, whether it is for that one alone.
const HEAD: usize = 48;

pub struct Module {
    pub context: u64,
    library: Arc<Library>,
}

pub struct Function {
    pub module: u64,
    pub context: u64,
    pub library: Arc<Library>,
    /// In the library's table.
    pub kernel: usize,
    /// Bytes of dynamic shared memory that launches may ask for.
    pub dynamic_shared: u32,
}

/// An image of a library for compute capability `arch`; `exact`: machine code, else portable.
pub fn image(library: &[u8], arch: u32, exact: bool) -> Vec<u8> {
    let mut image = MAGIC.to_vec();
    for word in [library.len() as u64, checksum(library), checksum(emulator().as_bytes()), arch.into(), exact.into()] {
        image.extend(word.to_le_bytes());
    }
    image.extend(library);
    image
}

fn checksum(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

/// Loads an image for a device of compute capability `cc`.
///
/// # Safety
/// `image` points to an image as [`image`] makes it, or to at least 48 other bytes.
pub unsafe fn load(image: *const u8, cc: u32) -> Result<Arc<Library>, Fail> {
    static LOADED: Mutex<BTreeMap<u64, Arc<Library>>> = Mutex::new(BTreeMap::new());
    // SAFETY: as the caller promises.
    let head = unsafe { std::slice::from_raw_parts(image, HEAD) };
    if head[..8] != MAGIC {
        return Err(fail!(cuda::INVALID_IMAGE, "this is no image of the simulator's compiler"));
    }
    let word = |at: usize| u64::from_le_bytes(head[at * 8..at * 8 + 8].try_into().expect("8 bytes"));
    let [bytes, sum, made_by, arch, exact] = [1, 2, 3, 4, 5].map(word);
    // SAFETY: the head says how long the image is.
    let library = unsafe { std::slice::from_raw_parts(image.add(HEAD), bytes as usize) };
    if checksum(library) != sum || made_by != checksum(emulator().as_bytes()) {
        return Err(fail!(cuda::INVALID_IMAGE, "the image is damaged, or another version of the compiler made it"));
    }
    let cc = u64::from(cc);
    let fits = if exact == 1 { arch / 10 == cc / 10 && arch <= cc } else { arch <= cc };
    if !fits {
        return Err(fail!(cuda::NO_BINARY_FOR_GPU, "code for compute capability {arch} on a device of {cc}"));
    }
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(library) = loaded.get(&sum) {
        return Ok(Arc::clone(library));
    }
    let opened = Library::open(library).map_err(|text| fail!(cuda::INVALID_IMAGE, "{text}"))?;
    Ok(Arc::clone(loaded.entry(sum).or_insert(Arc::new(opened))))
}

impl Machine {
    pub fn load_module(&mut self, context: u64, library: Arc<Library>) -> u64 {
        self.modules.insert(Module { context, library })
    }

    /// The function of a module by lowered name; the same handle each time.
    pub fn function(&mut self, module: u64, name: &str) -> Result<u64, Fail> {
        let loaded = self.modules.get(module)?;
        let kernel = loaded.library.kernel(name);
        let kernel = kernel.ok_or_else(|| fail!(cuda::NOT_FOUND, "the module has no function {name}"))?;
        let known = self.functions.iter().find(|(_, f)| f.module == module && f.kernel == kernel);
        if let Some((handle, _)) = known {
            return Ok(handle);
        }
        let (context, library) = (loaded.context, Arc::clone(&loaded.library));
        Ok(self.functions.insert(Function { module, context, library, kernel, dynamic_shared: 48 << 10 }))
    }

    pub fn unload(&mut self, module: u64) -> Result<(), Fail> {
        self.modules.remove(module)?;
        self.functions.retain(|function| function.module != module);
        Ok(())
    }

    /// A graph may outlive its functions; it must not run then.
    pub fn function_is_live(&self, launch: &Launch) -> Result<(), Fail> {
        match self.functions.contains(launch.function) {
            true => Ok(()),
            false => Err(fail!(cuda::LAUNCH_FAILED, "{} runs after its module was unloaded", launch.name())),
        }
    }
}
