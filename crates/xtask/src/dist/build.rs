//! The release binary for a target, and what builds it.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{elf, python, root};

/// The glibc that zig links against: that of Debian 10 and of RHEL 8.
const GLIBC: (u32, u32) = (2, 28);
/// Separates what `CARGO_ENCODED_RUSTFLAGS` has.
const SEPARATOR: &str = "\x1f";
/// Libraries that every system with glibc has.
const GIVEN: [&str; 7] =
    ["libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libgcc_s.so.1", "ld-linux"];

/// What compiles C and links.
pub enum Tools {
    /// zig, in an environment of Python, whose folder of programs this is.
    Zig(PathBuf),
    /// The machine's own, for its own target alone.
    Machine,
}

impl Tools {
    /// zig, installed below `target` if it is not there yet.
    pub fn zig() -> Result<Self> {
        let requirements = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src/dist/requirements.txt"));
        let python = python::environment(&root().join("target/dist-tools"), requirements)?;
        Ok(Self::Zig(python.parent().context("a Python in a folder")?.to_owned()))
    }

    /// The newest glibc that their binaries may need, if that is promised.
    pub fn glibc(&self) -> Option<(u32, u32)> {
        match self {
            Self::Zig(_) => Some(GLIBC),
            Self::Machine => None,
        }
    }

    /// What these link into every binary, besides what its crates are: a title and the text of its licence.
    pub fn linked(&self) -> Result<Option<(&'static str, String)>> {
        let Self::Zig(programs) = self else { return Ok(None) };
        let script = "import pathlib, ziglang; \
                      print(pathlib.Path(ziglang.__file__).with_name('lib').joinpath('libunwind/LICENSE.TXT').read_text())";
        let output = Command::new(programs.join("python")).args(["-c", script]).output()?;
        ensure!(output.status.success(), "zig has no licence of libunwind");
        Ok(Some(("libunwind and compiler-rt of LLVM, which zig links", String::from_utf8(output.stdout)?)))
    }
}

/// Builds a package's binary of the same name with `cpu` as the least processor, and says where it is.
///
/// Paths of this machine are kept out of it, so that another folder or user is no reason for other bytes.
pub fn binary(tools: &Tools, package: &str, target: &str, cpu: &str) -> Result<PathBuf> {
    let cargo_home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let cargo_home = cargo_home.or_else(|| Some(env::home_dir()?.join(".cargo"))).context("no home folder")?;
    let folder = root().canonicalize()?;
    let flags = [
        "-C".to_owned(),
        format!("target-cpu={cpu}"),
        format!("--remap-path-prefix={}=.", folder.display()),
        format!("--remap-path-prefix={}=cargo", cargo_home.display()),
    ];
    let mut command = Command::new(env!("CARGO"));
    let with_glibc = format!("{target}.{}.{}", GLIBC.0, GLIBC.1);
    match tools {
        Tools::Zig(programs) => {
            command.args(["zigbuild", "--target", &with_glibc]);
            let path = env::var_os("PATH").unwrap_or_default();
            let all: Vec<PathBuf> = [programs.clone()].into_iter().chain(env::split_paths(&path)).collect();
            command.env("PATH", env::join_paths(all)?);
            command.env("CARGO_ZIGBUILD_PYTHON_PATH", programs.join("python"));
        }
        Tools::Machine => {
            command.args(["build", "--target", target]);
        }
    }
    command.args(["--release", "--locked", "--package", package, "--bin", package]);
    command.arg("--message-format=json-render-diagnostics").current_dir(root());
    command.env("CARGO_ENCODED_RUSTFLAGS", OsString::from(flags.join(SEPARATOR)));
    let output = command.stderr(std::process::Stdio::inherit()).output().context("cargo did not start")?;
    ensure!(output.status.success(), "{target}: the binary was not built");
    let text = String::from_utf8(output.stdout)?;
    let messages = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let executable = messages.filter_map(|message| Some(PathBuf::from(message["executable"].as_str()?))).next_back();
    executable.context("cargo named no binary")
}

/// What a binary for this target needs of a system.
///
/// # Errors
/// If it is for another processor, or needs what not every system has: a library, or a newer glibc than is promised.
pub fn checked(binary: &[u8], target: &str, glibc: Option<(u32, u32)>) -> Result<elf::Needs> {
    let needs = elf::needs(binary)?;
    if let Some(promised) = glibc {
        ensure!(needs.glibc <= promised, "{target}: the binary needs glibc {:?}, newer than {promised:?}", needs.glibc);
    }
    ensure!(target.starts_with(needs.processor), "{target}: the binary is for {}", needs.processor);
    let given = |library: &&String| GIVEN.iter().any(|given| library.starts_with(given));
    let more: Vec<_> = needs.libraries.iter().filter(|library| !given(library)).collect();
    ensure!(more.is_empty(), "{target}: the binary needs {more:?}, which not every system has");
    Ok(needs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_binary_for_another_processor_is_refused() {
        let own = std::fs::read(env::current_exe().unwrap()).unwrap();
        let (here, there) = match env::consts::ARCH {
            "x86_64" => ("x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"),
            _ => ("aarch64-unknown-linux-gnu", "x86_64-unknown-linux-gnu"),
        };
        assert!(checked(&own, there, None).unwrap_err().to_string().contains(there));
        // Tests of ours link nothing of C++.
        assert_eq!(checked(&own, here, None).unwrap().processor, env::consts::ARCH);
    }

    #[test]
    fn a_binary_that_needs_a_newer_glibc_than_is_promised_is_refused() {
        let own = std::fs::read(env::current_exe().unwrap()).unwrap();
        let (major, minor) = elf::needs(&own).unwrap().glibc;
        let target = format!("{}-unknown-linux-gnu", env::consts::ARCH);
        assert!(checked(&own, &target, Some((major, minor))).is_ok());
        assert!(checked(&own, &target, Some((major + 1, 0))).is_ok());
        for older in [(major, minor - 1), (major - 1, minor + 1)] {
            let refusal = checked(&own, &target, Some(older)).unwrap_err().to_string();
            assert!(refusal.contains("glibc"), "{refusal}");
        }
        assert_eq!(Tools::Zig(PathBuf::new()).glibc(), Some((2, 28)));
        assert_eq!(Tools::Machine.glibc(), None);
    }
}
