//! Kernels: CUDA C++ that lies in the binary as text, compiled by NVRTC for the GPU that is found, and kept on disk.
//!
//! A kernel is asked for by a C++ name expression (`rms_norm<bf16>`). Those of one source file that were asked for since
//! the last time are compiled together, files side by side. Invariant: what is taken from disk was made of the same
//! sources, options and names by the same NVRTC version, and is undamaged.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use baton_device::{DeviceError, Result};
use cudarc::driver::sys::{self, CUfunction, CUfunction_attribute, CUmodule, CUresult, CUstream};
use cudarc::nvrtc::sys::{self as nvrtc, nvrtcResult};
use sha2::{Digest, Sha256};

use crate::context::{Context, Handle};
use crate::gpu::Launch;

/// A file of kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    /// Norms, sums, functions of single numbers, rotation, copies of rows.
    Rows,
    /// Products with weights, rows of weights.
    Linear,
    /// Attention over keys and values.
    Attention,
    /// Attention over latents.
    Latent,
    /// Writing to the cache.
    Cache,
    /// Experts.
    Moe,
}

/// Headers that sources may include.
const HEADERS: [(&CStr, &str); 3] = [
    (c"baton.cuh", include_str!("../kernels/baton.cuh")),
    (c"blocks.cuh", include_str!("../kernels/blocks.cuh")),
    (c"context.cuh", include_str!("../kernels/context.cuh")),
];

/// Dynamic shared memory that a kernel may have without being told so.
const SHARED: u32 = 48 << 10;

impl Source {
    /// All of them.
    pub const ALL: [Source; 6] =
        [Source::Rows, Source::Linear, Source::Attention, Source::Latent, Source::Cache, Source::Moe];

    /// The file's name.
    pub const fn file(self) -> &'static str {
        match self {
            Source::Rows => "rows.cu",
            Source::Linear => "linear.cu",
            Source::Attention => "attention.cu",
            Source::Latent => "latent.cu",
            Source::Cache => "cache.cu",
            Source::Moe => "moe.cu",
        }
    }

    /// Its text.
    pub const fn text(self) -> &'static str {
        match self {
            Source::Rows => include_str!("../kernels/rows.cu"),
            Source::Linear => include_str!("../kernels/linear.cu"),
            Source::Attention => include_str!("../kernels/attention.cu"),
            Source::Latent => include_str!("../kernels/latent.cu"),
            Source::Cache => include_str!("../kernels/cache.cu"),
            Source::Moe => include_str!("../kernels/moe.cu"),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.file())
    }
}

/// A kernel, compiled or to be.
#[derive(Debug, Clone)]
pub(crate) struct Kernel(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    function: OnceLock<Function>,
}

#[derive(Debug)]
struct Function {
    handle: Handle<CUfunction>,
    /// Whether it was told that it may have more shared memory than [`SHARED`]; the result of telling it.
    shared: OnceLock<CUresult>,
    /// The most that it may have then.
    most: i32,
}

impl Kernel {
    /// Its function, if it is compiled.
    pub(crate) fn function(&self) -> Option<CUfunction> {
        self.0.function.get().map(|function| function.handle.0)
    }

    /// Puts it on a stream.
    pub(crate) fn launch(
        &self,
        context: &Context,
        launch: &Launch,
        args: &mut [*mut c_void],
        stream: CUstream,
    ) -> Result<()> {
        let Launch { grid, block, shared } = *launch;
        let Function { handle, shared: told, most } = self.0.function.get().expect("compiled");
        if shared > SHARED {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a function of this context.
            let tell = || unsafe { sys::cuFuncSetAttribute(handle.0, attribute, *most) };
            context.check("cuFuncSetAttribute", *told.get_or_init(tell))?;
        }
        // SAFETY: arguments as the kernel's signature has them, which is its caller's to know; what they point to lives until
        // the call returns.
        let code = unsafe {
            sys::cuLaunchKernel(
                handle.0,
                grid[0],
                grid[1],
                grid[2],
                block[0],
                block[1],
                block[2],
                shared,
                stream,
                args.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        match code {
            CUresult::CUDA_SUCCESS => Ok(()),
            code => Err(context.failure("launch", code, &format!("{} {launch:?}", self.0.name))),
        }
    }
}

/// Kernels that were asked for, and the modules of those that are compiled.
pub(crate) struct Programs {
    target: Target,
    cache: Option<PathBuf>,
    kernels: BTreeMap<(Source, String), Kernel>,
    modules: Vec<Handle<CUmodule>>,
}

impl Programs {
    pub(crate) fn new(capability: (i32, i32), cache: Option<PathBuf>) -> Self {
        Self { target: Target::Chip(capability), cache, kernels: BTreeMap::new(), modules: Vec::new() }
    }

    /// The kernel of a name expression.
    pub(crate) fn kernel(&mut self, source: Source, name: String) -> Kernel {
        let new = || Kernel(Arc::new(Inner { name: name.clone(), function: OnceLock::new() }));
        self.kernels.entry((source, name.clone())).or_insert_with(new).clone()
    }

    /// Everything that was asked for.
    pub(crate) fn names(&self) -> Vec<(Source, String)> {
        self.kernels.keys().cloned().collect()
    }

    /// Compiles what is not yet.
    pub(crate) fn compile(&mut self, context: &Context) -> Result<()> {
        let mut wanted: BTreeMap<Source, Vec<Kernel>> = BTreeMap::new();
        for ((source, _), kernel) in self.kernels.iter().filter(|(_, kernel)| kernel.function().is_none()) {
            wanted.entry(*source).or_default().push(kernel.clone());
        }
        let (target, cache) = (self.target, self.cache.as_deref());
        let images = std::thread::scope(|scope| {
            let image = |(source, kernels): (&Source, &Vec<Kernel>)| {
                let (source, names) = (*source, kernels.iter().map(|kernel| kernel.0.name.clone()).collect::<Vec<_>>());
                scope.spawn(move || {
                    let unit = Unit { source, names, target };
                    unit.image(cache).map(|image| (unit, image))
                })
            };
            let threads: Vec<_> = wanted.iter().map(image).collect();
            threads.into_iter().map(|thread| thread.join().expect("a compiler's thread")).collect::<Vec<_>>()
        });
        context.enter()?;
        for (kernels, image) in wanted.values().zip(images) {
            let failed = |reason| DeviceError::Execution { device: context.name.clone(), op: "compile", reason };
            let (unit, image) = image.map_err(failed)?;
            let (module, image) = match load(context, &image) {
                Ok(module) => (module, image),
                // It may have come from disk, and be of another driver's making.
                Err(_) => {
                    let image = unit.fresh(cache).map_err(failed)?;
                    (load(context, &image)?, image)
                }
            };
            self.modules.push(module);
            for (kernel, lowered) in kernels.iter().zip(&image.lowered) {
                let function = function(context, module, lowered)?;
                kernel.0.function.set(function).expect("compiled once: its owner holds a lock");
            }
        }
        Ok(())
    }

    /// Gives everything back; nothing of it runs any more.
    pub(crate) fn free(&mut self, context: &Context) {
        for module in self.modules.drain(..) {
            if context.enter_to_free() {
                // SAFETY: loaded once.
                unsafe { sys::cuModuleUnload(module.0) };
            }
        }
    }
}

fn load(context: &Context, image: &Image) -> Result<Handle<CUmodule>> {
    let mut module = std::ptr::null_mut();
    // SAFETY: a valid out pointer, and a whole image: NVRTC made it, and PTX ends in zero.
    let code = unsafe { sys::cuModuleLoadData(&raw mut module, image.code.as_ptr().cast()) };
    context.check("cuModuleLoadData", code)?;
    Ok(Handle(module))
}

fn function(context: &Context, module: Handle<CUmodule>, lowered: &CStr) -> Result<Function> {
    let (mut function, mut fixed) = (std::ptr::null_mut(), 0);
    // SAFETY: valid out pointers, a text that ends in zero, a module of this context.
    unsafe {
        context
            .check("cuModuleGetFunction", sys::cuModuleGetFunction(&raw mut function, module.0, lowered.as_ptr()))?;
        let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
        context.check("cuFuncGetAttribute", sys::cuFuncGetAttribute(&raw mut fixed, attribute, function))?;
    }
    let most = context.attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
    Ok(Function { handle: Handle(function), shared: OnceLock::new(), most: most - fixed })
}

/// What is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    /// A chip's own code, by its compute capability.
    Chip((i32, i32)),
    /// PTX, which the driver compiles for a chip that NVRTC does not know yet.
    Ptx((i32, i32)),
}

impl Target {
    fn option(self) -> String {
        match self {
            Target::Chip((major, minor)) => format!("--gpu-architecture=sm_{major}{minor}"),
            Target::Ptx((major, minor)) => format!("--gpu-architecture=compute_{major}{minor}"),
        }
    }
}

/// What every NVRTC that speaks our dialect can make: PTX of the newest chip that kernels were written for.
const PTX: Target = Target::Ptx((9, 0));

/// Kernels of one source that are compiled together.
struct Unit {
    source: Source,
    names: Vec<String>,
    target: Target,
}

/// Compiled kernels.
#[derive(Debug, PartialEq, Eq)]
struct Image {
    /// The names of the unit's kernels in the code, in its order.
    lowered: Vec<CString>,
    /// A cubin, or PTX that ends in zero.
    code: Vec<u8>,
}

impl Unit {
    /// From disk, or fresh.
    fn image(&self, cache: Option<&Path>) -> std::result::Result<Image, String> {
        let kept = cache.and_then(|folder| Image::decode(&std::fs::read(folder.join(self.file_name())).ok()?));
        match kept.filter(|image| image.lowered.len() == self.names.len()) {
            Some(image) => Ok(image),
            None => self.fresh(cache),
        }
    }

    /// Compiled now, and kept on disk if there is a place.
    fn fresh(&self, cache: Option<&Path>) -> std::result::Result<Image, String> {
        let began = std::time::Instant::now();
        let image = match self.compile() {
            Err(Refusal::Option(_)) if self.target != PTX => {
                Unit { source: self.source, names: self.names.clone(), target: PTX }.compile()
            }
            result => result,
        };
        let image = image.map_err(|refusal| refusal.to_string())?;
        tracing::debug!(file = %self.source, kernels = self.names.len(), ms = began.elapsed().as_millis(), "compiled");
        if let Some(folder) = cache
            && let Err(error) = keep(folder, &self.file_name(), &image.encode())
        {
            tracing::warn!(folder = %folder.display(), %error, "compiled kernels are not kept");
        }
        Ok(image)
    }

    /// By everything that decides what comes out.
    fn file_name(&self) -> String {
        let (major, minor) = version();
        let mut hash = Sha256::new();
        let mut part = |text: &str| {
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text);
        };
        HEADERS.iter().for_each(|(_, text)| part(text));
        part(self.source.file());
        part(self.source.text());
        self.options().iter().for_each(|option| part(option));
        part(&format!("{major}.{minor}"));
        self.names.iter().for_each(|name| part(name));
        let digest: String = hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        format!("{}-{digest}", self.source.file().trim_end_matches(".cu"))
    }

    fn options(&self) -> [String; 2] {
        [self.target.option(), "--std=c++17".into()]
    }

    /// Runs NVRTC.
    fn compile(&self) -> std::result::Result<Image, Refusal> {
        let text = |text: &str| CString::new(text).expect("a text without zeros");
        let (source, file) = (text(self.source.text()), text(self.source.file()));
        let headers: Vec<CString> = HEADERS.iter().map(|(_, header)| text(header)).collect();
        let names: Vec<CString> = self.names.iter().map(|name| text(name)).collect();
        let program = Program::new(&source, &file, &headers)?;
        // SAFETY (all below): a live program, texts that end in zero and live until it is destroyed, valid out pointers, room
        // for as many bytes as NVRTC says.
        for name in &names {
            // SAFETY: as above.
            program
                .check("nvrtcAddNameExpression", unsafe { nvrtc::nvrtcAddNameExpression(program.0, name.as_ptr()) })?;
        }
        let options: Vec<CString> = self.options().iter().map(|option| text(option)).collect();
        let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        // SAFETY: as above.
        program.check("nvrtcCompileProgram", unsafe {
            nvrtc::nvrtcCompileProgram(program.0, pointers.len() as c_int, pointers.as_ptr())
        })?;
        let lowered = names.iter().map(|name| {
            let mut lowered = std::ptr::null();
            // SAFETY: as above; NVRTC's text lives as long as the program.
            unsafe {
                let code = nvrtc::nvrtcGetLoweredName(program.0, name.as_ptr(), &raw mut lowered);
                program.check("nvrtcGetLoweredName", code)?;
                Ok(CStr::from_ptr(lowered).to_owned())
            }
        });
        let lowered = lowered.collect::<std::result::Result<_, Refusal>>()?;
        let code = match self.target {
            Target::Chip(_) => program.bytes("nvrtcGetCUBIN", nvrtc::nvrtcGetCUBINSize, nvrtc::nvrtcGetCUBIN)?,
            Target::Ptx(_) => program.bytes("nvrtcGetPTX", nvrtc::nvrtcGetPTXSize, nvrtc::nvrtcGetPTX)?,
        };
        Ok(Image { lowered, code })
    }
}

/// Compiles kernels for a compute capability, without a GPU, and gives the chip's code. NVRTC is there.
///
/// # Errors
/// The compiler's words.
pub fn compile(source: Source, names: &[String], capability: (i32, i32)) -> std::result::Result<Vec<u8>, String> {
    let unit = Unit { source, names: names.to_vec(), target: Target::Chip(capability) };
    unit.compile().map(|image| image.code).map_err(|refusal| refusal.to_string())
}

/// NVRTC's version; zeros if it does not tell.
pub(crate) fn version() -> (c_int, c_int) {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: valid out pointers.
    let code = unsafe { nvrtc::nvrtcVersion(&raw mut major, &raw mut minor) };
    if code == nvrtcResult::NVRTC_SUCCESS { (major, minor) } else { (0, 0) }
}

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    /// NVRTC does not know the architecture, or another option.
    #[error("NVRTC does not take an option: {0}")]
    Option(String),
    #[error("{call} gave {code:?}: {log}")]
    Call { call: &'static str, code: nvrtcResult, log: String },
}

/// A program of NVRTC.
struct Program(nvrtc::nvrtcProgram);

impl Program {
    fn new(source: &CStr, file: &CStr, headers: &[CString]) -> std::result::Result<Self, Refusal> {
        let texts: Vec<*const c_char> = headers.iter().map(|header| header.as_ptr()).collect();
        let names: Vec<*const c_char> = HEADERS.iter().map(|(name, _)| name.as_ptr()).collect();
        let mut program = Self(std::ptr::null_mut());
        // SAFETY: texts that end in zero, as many as said; a valid out pointer.
        let code = unsafe {
            nvrtc::nvrtcCreateProgram(
                &raw mut program.0,
                source.as_ptr(),
                file.as_ptr(),
                texts.len() as c_int,
                texts.as_ptr(),
                names.as_ptr(),
            )
        };
        match code {
            nvrtcResult::NVRTC_SUCCESS => Ok(program),
            code => Err(Refusal::Call { call: "nvrtcCreateProgram", code, log: String::new() }),
        }
    }

    fn check(&self, call: &'static str, code: nvrtcResult) -> std::result::Result<(), Refusal> {
        match code {
            nvrtcResult::NVRTC_SUCCESS => Ok(()),
            nvrtcResult::NVRTC_ERROR_INVALID_OPTION => Err(Refusal::Option(self.log())),
            code => Err(Refusal::Call { call, code, log: self.log() }),
        }
    }

    /// What the compiler said.
    fn log(&self) -> String {
        let (mut size, mut log) = (0, Vec::new());
        // SAFETY: a live program, valid out pointers, and room for as many bytes as NVRTC says.
        unsafe {
            if nvrtc::nvrtcGetProgramLogSize(self.0, &raw mut size) == nvrtcResult::NVRTC_SUCCESS {
                log.resize(size, 0);
                nvrtc::nvrtcGetProgramLog(self.0, log.as_mut_ptr().cast());
            }
        }
        String::from_utf8_lossy(&log).trim_end_matches('\0').trim_end().to_owned()
    }

    /// What a pair of functions gives: the size, then the bytes.
    fn bytes(
        &self,
        call: &'static str,
        size_of: unsafe fn(nvrtc::nvrtcProgram, *mut usize) -> nvrtcResult,
        get: unsafe fn(nvrtc::nvrtcProgram, *mut c_char) -> nvrtcResult,
    ) -> std::result::Result<Vec<u8>, Refusal> {
        let mut size = 0;
        // SAFETY: a live program, a valid out pointer, and room for as many bytes as NVRTC says.
        unsafe {
            self.check(call, size_of(self.0, &raw mut size))?;
            let mut bytes = vec![0u8; size];
            self.check(call, get(self.0, bytes.as_mut_ptr().cast()))?;
            Ok(bytes)
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made once.
        unsafe { nvrtc::nvrtcDestroyProgram(&raw mut self.0) };
    }
}

impl Image {
    /// As on disk: the hash of the rest; how many names; each with its length; the code.
    fn encode(&self) -> Vec<u8> {
        let mut rest = (self.lowered.len() as u32).to_le_bytes().to_vec();
        for name in &self.lowered {
            rest.extend((name.count_bytes() as u32).to_le_bytes());
            rest.extend(name.to_bytes());
        }
        rest.extend(&self.code);
        [Sha256::digest(&rest).as_slice(), &rest].concat()
    }

    /// `None` of a file that is damaged.
    fn decode(bytes: &[u8]) -> Option<Self> {
        let (hash, rest) = bytes.split_first_chunk::<32>()?;
        if Sha256::digest(rest).as_slice() != hash {
            return None;
        }
        let mut rest = rest;
        let count = number(&mut rest)?;
        let name = |_| {
            let length = number(&mut rest)?;
            let (name, after) = rest.split_at_checked(length)?;
            rest = after;
            CString::new(name).ok()
        };
        let lowered = (0..count).map(name).collect::<Option<_>>()?;
        Some(Self { lowered, code: rest.to_vec() })
    }
}

/// Takes a number off the front.
fn number(bytes: &mut &[u8]) -> Option<usize> {
    let (number, rest) = bytes.split_first_chunk::<4>()?;
    *bytes = rest;
    Some(u32::from_le_bytes(*number) as usize)
}

/// Writes a file whole or not at all, whoever else writes it.
fn keep(folder: &Path, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    let partial = folder.join(format!("{name}.{}.partial", std::process::id()));
    std::fs::write(&partial, bytes)?;
    std::fs::rename(&partial, folder.join(name))
}

/// Where compiled kernels are kept by default: `$XDG_CACHE_HOME/baton/kernels`, else `~/.cache/baton/kernels`.
pub(crate) fn default_cache() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let caches = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")));
    caches.map(|folder| folder.join("baton").join("kernels"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_comes_back_from_disk_as_it_was_and_no_other_does() {
        let image = Image { lowered: vec![c"_Z1a".into(), c"b".into()], code: (0..200).collect() };
        let bytes = image.encode();
        assert_eq!(Image::decode(&bytes).as_ref(), Some(&image));
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert_eq!(Image::decode(&damaged), None, "byte {at}");
            assert_eq!(Image::decode(&bytes[..at]), None, "cut at {at}");
        }
    }
}
