//! CUDA C++ compiled by the host's compiler into a library that [`crate::emulator`] runs.
//!
//! Invariant: what the real compiler refuses by rule and the host's would take is refused here: options that are not its own, headers that
//! were not given. The source sees `BATON_EMULATED`, so that it can give the emulator's functions where a device has assembly.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU64, Ordering},
};

/// Beside those of the target. `-O1`, for compiling a kernel takes longer than running it, and a third less than with `-O2`. What the host
/// would not notice and a device would is checked: alignment, and indices of arrays.
const FLAGS: &str = "-shared -fPIC -O1 -ffp-contract=fast -fno-strict-aliasing -fvisibility=hidden -fno-exceptions -fno-rtti -w \
    -U_FORTIFY_SOURCE -fsanitize=alignment,bounds -fsanitize-undefined-trap-on-error -DBATON_EMULATED -include emulate.h";

/// The emulator's headers and how they are compiled, as one text for checksums.
pub fn emulator() -> String {
    HEADERS.iter().map(|(_, text)| *text).chain([FLAGS]).collect()
}

const HEADERS: [(&str, &str); 3] = [
    ("emulate.h", include_str!("../include/emulate.h")),
    ("emulate_cuda.h", include_str!("../include/emulate_cuda.h")),
    ("emulate_tensor.h", include_str!("../include/emulate_tensor.h")),
];

/// The host's C++ compiler: `CXX` and nothing else if that is set, else `c++`, `g++` or `clang++` of the path.
pub fn compiler() -> Option<PathBuf> {
    let names = match std::env::var_os("CXX").filter(|name| !name.is_empty()) {
        Some(named) => vec![PathBuf::from(named)],
        None => ["c++", "g++", "clang++"].map(PathBuf::from).to_vec(),
    };
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = |name: PathBuf| match name.components().count() {
        1 => std::env::split_paths(&path).map(|folder| folder.join(&name)).find(|file| file.is_file()),
        _ => name.is_file().then_some(name),
    };
    names.into_iter().find_map(found)
}

/// Whether kernels can be compiled, for tests that need it and are left out where they cannot: it says so.
///
/// # Panics
/// They cannot, and `CUDA_SIM_REQUIRE` is set: nothing may be left out.
pub fn can_compile() -> bool {
    let can = compiler().is_some();
    if !can {
        assert!(
            std::env::var_os("CUDA_SIM_REQUIRE").is_none(),
            "CUDA_SIM_REQUIRE is set, and there is no C++ compiler"
        );
        eprintln!("skipped: no C++ compiler");
    }
    can
}

/// What is to be compiled.
#[derive(Clone)]
pub struct Source {
    pub text: String,
    pub name: String,
    /// Names by which the text includes them, and their texts.
    pub headers: Vec<(String, String)>,
    /// Kernels that are wanted.
    pub expressions: Vec<String>,
}

/// What the options ask for.
#[derive(Debug, PartialEq, Eq)]
pub struct Target {
    /// Ten times the major number of the compute capability plus the minor.
    pub arch: u32,
    /// Machine code of that architecture, not portable code.
    pub exact: bool,
    pub defines: Vec<String>,
    pub standard: String,
}

/// Reads the options; the error names one that is not accepted.
pub fn target(options: &[String]) -> Result<Target, String> {
    let mut target = Target { arch: 75, exact: false, defines: Vec::new(), standard: "c++17".to_owned() };
    for option in options {
        let (name, value) = option.split_once('=').unwrap_or((option, ""));
        let refused = || format!("nvrtc: error: invalid value for {option}");
        match name {
            "--gpu-architecture" | "-arch" => {
                let (kind, number) = value.split_once('_').ok_or_else(refused)?;
                target.exact = match kind {
                    "sm" => true,
                    "compute" => false,
                    _ => return Err(refused()),
                };
                target.arch = number.parse().map_err(|_| refused())?;
                if ![75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121].contains(&target.arch) {
                    return Err(refused());
                }
            }
            "-std" | "--std" if ["c++17", "c++20"].contains(&value) => target.standard = value.to_owned(),
            "-std" | "--std" => return Err(refused()),
            "--define-macro" | "-D" if !value.is_empty() => target.defines.push(value.to_owned()),
            "--use_fast_math" | "-use_fast_math" | "--fmad" | "-fmad" | "-lineinfo" | "--generate-line-info" => {}
            "--ptxas-options" | "-default-device" | "--device-as-default-execution-space" | "--maxrregcount" => {}
            "--extra-device-vectorization" | "-extra-device-vectorization" | "--restrict" | "-restrict" => {}
            _ => match option.strip_prefix("-D") {
                Some(define) if !define.is_empty() => target.defines.push(define.to_owned()),
                _ => return Err(format!("nvrtc: error: unrecognized option {option}")),
            },
        }
    }
    Ok(target)
}

/// The library's bytes, or the compiler's words.
pub fn compile(source: &Source, target: &Target) -> Result<Vec<u8>, String> {
    static FOLDERS: AtomicU64 = AtomicU64::new(0);
    let compiler = compiler().ok_or("the simulator needs a C++ compiler, and found none")?;
    let number = FOLDERS.fetch_add(1, Ordering::Relaxed);
    let folder = std::env::temp_dir().join(format!("cuda-sim-{}-{number}", std::process::id()));
    let library = write_sources(&folder, source)
        .map_err(|error| format!("{}: {error}", folder.display()))
        .and_then(|()| run_compiler(&compiler, &folder, target));
    std::fs::remove_dir_all(&folder).ok();
    library
}

fn write_sources(folder: &Path, source: &Source) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    for (name, text) in HEADERS {
        std::fs::write(folder.join(name), text)?;
    }
    for (name, text) in &source.headers {
        let path = folder.join(name);
        std::fs::create_dir_all(path.parent().unwrap_or(folder))?;
        std::fs::write(path, with_bounds(text))?;
    }
    let mut text = format!("#line 1 \"{}\"\n{}\n", source.name, with_bounds(&source.text));
    text.push_str(
        "extern \"C\" __attribute__((visibility(\"default\"))) const emulated::Kernel emulated_kernels[] = {\n",
    );
    for expression in &source.expressions {
        text.push_str(&format!("    emulated::kernel<&{expression}>(\"{expression}\"),\n"));
    }
    text.push_str("    {}};\n");
    let count = source.expressions.len();
    text.push_str(&format!(
        "extern \"C\" __attribute__((visibility(\"default\"))) const unsigned emulated_kernel_count = {count};\n"
    ));
    std::fs::write(folder.join("kernels.cpp"), text)
}

/// The source with a check at the head of each kernel that has `__launch_bounds__`: no attribute of the host's compiler keeps them.
fn with_bounds(source: &str) -> String {
    const WORD: &str = "__launch_bounds__";
    let mut out = String::new();
    let mut rest = source;
    while let Some(at) = rest.find(WORD) {
        let (before, after) = rest.split_at(at + WORD.len());
        out.push_str(before);
        rest = after;
        let Some(bounds) = parenthesised(after) else { continue };
        let Some(open) = after[bounds.len()..].find('(').map(|open| bounds.len() + open) else { continue };
        let Some(parameters) = parenthesised(&after[open..]) else { continue };
        let body = &after[open + parameters.len()..];
        if let Some(inside) = body.trim_start().strip_prefix('{') {
            out.push_str(&after[..after.len() - inside.len()]);
            out.push_str(&format!(" ::emulated::launch_bounds{bounds};"));
            rest = inside;
        }
    }
    out + rest
}

/// The text up to the parenthesis that closes the one it begins with.
fn parenthesised(text: &str) -> Option<&str> {
    let mut depth = 0;
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ if depth == 0 => return None,
            _ => {}
        }
        if depth == 0 {
            return Some(&text[..=at]);
        }
    }
    None
}

fn run_compiler(compiler: &Path, folder: &Path, target: &Target) -> Result<Vec<u8>, String> {
    let native = if cfg!(target_arch = "x86_64") { "-march=native" } else { "-mcpu=native" };
    let mut command = Command::new(compiler);
    command.current_dir(folder).args(FLAGS.split_whitespace()).arg(native);
    command.arg(format!("-std={}", target.standard)).arg(format!("-D__CUDA_ARCH__={}0", target.arch));
    command.args(target.defines.iter().map(|define| format!("-D{define}")));
    command.args(["-I.", "kernels.cpp", "-o", "kernels.so"]);
    let output = command.output().map_err(|error| format!("{}: {error}", compiler.display()))?;
    match output.status.success() {
        true => std::fs::read(folder.join("kernels.so")).map_err(|error| error.to_string()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}
