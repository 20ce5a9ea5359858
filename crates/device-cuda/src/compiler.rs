//! NVRTC, and what it made before, on disk or in memory.
//!
//! Invariant: what is taken from disk was made of the same sources, options and names by the same version of NVRTC, and is
//! undamaged; and nobody else could have put it there. A driver that does not take it gets a fresh one.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_int};
use std::fs::DirBuilder;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::nvrtc::sys::{self as nvrtc, nvrtcResult};
use sha2::{Digest, Sha256};

use crate::program::{HEADERS, Source};

/// What is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
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
pub(crate) struct Unit {
    pub(crate) source: Source,
    pub(crate) names: Vec<String>,
    pub(crate) target: Target,
}

/// Compiled kernels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Image {
    /// The names of the unit's kernels in the code, in its order.
    pub(crate) lowered: Vec<CString>,
    /// A cubin, or PTX that ends in zero.
    pub(crate) code: Vec<u8>,
}

impl Unit {
    /// As it was kept, or fresh.
    pub(crate) fn image(&self, cache: Option<&Path>) -> Result<Image, String> {
        let name = self.file_name();
        let kept = match cache {
            Some(folder) => std::fs::read(folder.join(name)).ok().and_then(|bytes| Image::decode(&bytes)),
            None => in_memory().get(&name).cloned(),
        };
        match kept.filter(|image| image.lowered.len() == self.names.len()) {
            Some(image) => Ok(image),
            None => self.fresh(cache),
        }
    }

    /// Compiled now, and kept: in the folder, or in memory for as long as the process lives.
    pub(crate) fn fresh(&self, cache: Option<&Path>) -> Result<Image, String> {
        let began = std::time::Instant::now();
        let image = match self.compile() {
            Err(Refusal::Option(_)) if self.target != PTX => {
                Unit { source: self.source, names: self.names.clone(), target: PTX }.compile()
            }
            result => result,
        };
        let image = image.map_err(|refusal| refusal.to_string())?;
        tracing::debug!(file = %self.source, kernels = self.names.len(), ms = began.elapsed().as_millis(), "compiled");
        match cache {
            None => _ = in_memory().insert(self.file_name(), image.clone()),
            Some(folder) => {
                if let Err(error) = keep(folder, &self.file_name(), &image.encode()) {
                    tracing::warn!(folder = %folder.display(), %error, "compiled kernels are not kept");
                }
            }
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
    fn compile(&self) -> Result<Image, Refusal> {
        let text = |text: &str| CString::new(text).expect("a text without zeros");
        let (source, file) = (text(self.source.text()), text(self.source.file()));
        let headers: Vec<CString> = HEADERS.iter().map(|(_, header)| text(header)).collect();
        let names: Vec<CString> = self.names.iter().map(|name| text(name)).collect();
        let program = Program::new(&source, &file, &headers)?;
        for name in &names {
            // SAFETY: a live program, and a text that ends in zero and lives longer.
            let code = unsafe { nvrtc::nvrtcAddNameExpression(program.0, name.as_ptr()) };
            program.check("nvrtcAddNameExpression", code)?;
        }
        let options: Vec<CString> = self.options().iter().map(|option| text(option)).collect();
        let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        // SAFETY: as above, and as many as said.
        let code = unsafe { nvrtc::nvrtcCompileProgram(program.0, pointers.len() as c_int, pointers.as_ptr()) };
        program.check("nvrtcCompileProgram", code)?;
        let lowered = names.iter().map(|name| {
            let mut lowered = std::ptr::null();
            // SAFETY: as above; NVRTC's text lives as long as the program.
            unsafe {
                let code = nvrtc::nvrtcGetLoweredName(program.0, name.as_ptr(), &raw mut lowered);
                program.check("nvrtcGetLoweredName", code)?;
                Ok(CStr::from_ptr(lowered).to_owned())
            }
        });
        let lowered = lowered.collect::<Result<_, Refusal>>()?;
        let code = match self.target {
            Target::Chip(_) => program.bytes("nvrtcGetCUBIN", nvrtc::nvrtcGetCUBINSize, nvrtc::nvrtcGetCUBIN)?,
            Target::Ptx(_) => program.bytes("nvrtcGetPTX", nvrtc::nvrtcGetPTXSize, nvrtc::nvrtcGetPTX)?,
        };
        Ok(Image { lowered, code })
    }
}

/// Compiles kernels for a compute capability, without a GPU, and gives the chip's code, and the kernels' names in it. NVRTC is
/// there.
///
/// # Errors
/// The compiler's words.
pub fn compile(source: Source, names: &[String], capability: (i32, i32)) -> Result<(Vec<u8>, Vec<CString>), String> {
    let unit = Unit { source, names: names.to_vec(), target: Target::Chip(capability) };
    unit.compile().map(|image| (image.code, image.lowered)).map_err(|refusal| refusal.to_string())
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
    #[error("{call} gave {}: {log}", name(*code))]
    Call { call: &'static str, code: nvrtcResult, log: String },
}

/// NVRTC's name of a code; a newer one has codes that the binding's type has no name for.
fn name(code: nvrtcResult) -> String {
    // SAFETY: any code; the library's text lives for ever.
    unsafe { CStr::from_ptr(nvrtc::nvrtcGetErrorString(code)) }.to_string_lossy().into_owned()
}

/// A program of NVRTC.
struct Program(nvrtc::nvrtcProgram);

impl Program {
    fn new(source: &CStr, file: &CStr, headers: &[CString]) -> Result<Self, Refusal> {
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

    fn check(&self, call: &'static str, code: nvrtcResult) -> Result<(), Refusal> {
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
    ) -> Result<Vec<u8>, Refusal> {
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

/// What this process compiled without a folder to keep it in, by [`Unit::file_name`]: a device that is opened anew, or a
/// second one, need not wait again.
fn in_memory() -> MutexGuard<'static, BTreeMap<String, Image>> {
    static KEPT: Mutex<BTreeMap<String, Image>> = Mutex::new(BTreeMap::new());
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes the folder for compiled kernels, or finds that nobody else can write to it: they are code that will run.
///
/// # Errors
/// What the system says, or who else can write to it.
pub(crate) fn own(folder: &Path) -> std::io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let (folder, process) = (std::fs::metadata(folder)?, std::fs::metadata("/proc/self")?);
    let mode = folder.mode() & 0o777;
    if folder.uid() != process.uid() || mode & 0o022 != 0 {
        let (owner, own) = (folder.uid(), process.uid());
        let why = format!("user {owner} owns it with mode {mode:o}; it must be writable for user {own} alone");
        return Err(std::io::Error::new(std::io::ErrorKind::PermissionDenied, why));
    }
    Ok(())
}

/// Writes a file whole or not at all, whoever else writes it.
fn keep(folder: &Path, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    static TURN: AtomicU64 = AtomicU64::new(0);
    let turn = TURN.fetch_add(1, Ordering::Relaxed);
    let partial = folder.join(format!("{name}.{}.{turn}.partial", std::process::id()));
    std::fs::write(&partial, bytes)?;
    std::fs::rename(&partial, folder.join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_in_memory_is_not_compiled_again() {
        let Some(_simulator) = crate::simulator::Simulator::new() else { return };
        crate::libraries::ready("cuda:0").unwrap();
        let unit = Unit { source: Source::Rows, names: vec!["scale<float>".into()], target: Target::Chip((9, 0)) };
        let image = unit.image(None).unwrap();
        let other = Image { code: vec![7], ..image.clone() };
        in_memory().insert(unit.file_name(), other.clone());
        assert_eq!(unit.image(None).unwrap(), other);
        assert_eq!(unit.fresh(None).unwrap().lowered, image.lowered);
        assert_ne!(unit.image(None).unwrap(), other);
    }

    #[test]
    fn a_folder_that_others_can_write_to_is_not_taken() {
        use std::os::unix::fs::PermissionsExt;
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("state").join("kernels");
        own(&folder).unwrap();
        assert_eq!(std::fs::metadata(&folder).unwrap().mode() & 0o777, 0o700);
        for (mode, taken) in [(0o755, true), (0o720, false), (0o702, false), (0o700, true)] {
            std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(own(&folder).is_ok(), taken, "{mode:o}");
        }
        std::fs::write(parent.path().join("file"), "").unwrap();
        assert!(own(&parent.path().join("file")).is_err());
    }

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
