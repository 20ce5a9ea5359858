//! The simulators of vendors' runtimes under the names of the libraries that they stand for.
//!
//! Invariant: all names lead to one file, so that whoever opens several of them has one machine.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// A simulator.
struct Simulator {
    package: &'static str,
    /// How the name of its library begins.
    library: &'static str,
    /// Where it is put if nothing is said.
    folder: &'static str,
    /// Makes the names in a folder.
    name: fn(&Path, &Path) -> Result<()>,
}

const ASCEND: Simulator =
    Simulator { package: "baton-ascend-sim", library: "libascend_sim", folder: "target/ascend-sim", name: link };
const CUDA: Simulator = Simulator {
    package: "baton-cuda-sim",
    library: "libcuda_sim",
    folder: "target/cuda-sim",
    name: |library, folder| {
        fs::create_dir_all(folder)?;
        Ok(cuda_sim::name_library(library, folder)?)
    },
};

/// The libraries of a CANN toolkit whose operators are split by field.
const NAMES: [&str; 7] = [
    "libascendcl.so",
    "libnnopbase.so",
    "libopapi.so",
    "libopapi_nn.so",
    "libopapi_math.so",
    "libopapi_transformer.so",
    "libhccl.so",
];

#[derive(clap::Args)]
pub struct Args {
    /// The folder to make; what it has under these names is replaced [default: ascend-sim or cuda-sim in target]
    folder: Option<PathBuf>,
    /// Build with optimisation and without debug information
    #[arg(long)]
    release: bool,
}

/// Of the Ascend runtime.
pub fn ascend(args: &Args) -> Result<()> {
    make(&ASCEND, args)
}

/// Of CUDA.
pub fn cuda(args: &Args) -> Result<()> {
    make(&CUDA, args)
}

fn make(simulator: &Simulator, args: &Args) -> Result<()> {
    let folder = args.folder.as_deref().unwrap_or(Path::new(simulator.folder));
    (simulator.name)(&build(simulator, args.release)?, folder)?;
    #[allow(clippy::print_stdout)] // the chore's result
    {
        println!("{}", fs::canonicalize(folder)?.display());
    }
    Ok(())
}

/// Builds a simulator; the file of its library.
fn build(simulator: &Simulator, release: bool) -> Result<PathBuf> {
    let output = Command::new(env!("CARGO"))
        .args(["build", "-p", simulator.package, "--message-format=json-render-diagnostics"])
        .args(release.then_some("--release"))
        .current_dir(crate::root())
        .stderr(Stdio::inherit())
        .output()
        .context("cargo did not start")?;
    ensure!(output.status.success(), "the simulator was not built");
    let text = String::from_utf8(output.stdout)?;
    let messages = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let files = messages.flat_map(|message| message["filenames"].as_array().cloned().unwrap_or_default());
    let library = files.filter_map(|file| Some(PathBuf::from(file.as_str()?))).find(|file| {
        let name = file.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.starts_with(simulator.library) && name.ends_with(".so"))
    });
    library.context("cargo named no shared library of the simulator")
}

fn link(library: &Path, folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    for name in NAMES {
        let link = folder.join(name);
        if link.symlink_metadata().is_ok() {
            fs::remove_file(&link).with_context(|| link.display().to_string())?;
        }
        symlink(library, &link).with_context(|| link.display().to_string())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_names_are_one_file_also_when_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let (first, second) = (folder.path().join("first.so"), folder.path().join("second.so"));
        for library in [&first, &second, &second] {
            fs::write(library, "library").unwrap();
            link(library, &folder.path().join("names")).unwrap();
            for name in NAMES {
                assert_eq!(
                    fs::canonicalize(folder.path().join("names").join(name)).unwrap(),
                    fs::canonicalize(library).unwrap()
                );
            }
        }
    }
}
