//! What goes to a GPU machine, as a folder and packed: binaries without symbols, the golden checkpoints and the bundled model's
//! questions, laid out as in the repository.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::{elf, git, gpu::correct::GOLDENS, python::finished, root};

/// Arguments of the chore.
#[derive(clap::Args)]
pub struct Args {
    /// The folder to make; it is emptied, and packed as FOLDER.tar.gz beside it
    #[arg(default_value = "target/gpu")]
    folder: PathBuf,
    /// Where `baton` and `xtask` are that were built before, on an older system perhaps, so that they need no newer glibc
    /// than that [default: they are built here, for release]
    #[arg(long, value_name = "DIR")]
    binaries: Option<PathBuf>,
}

const BINARIES: [&str; 2] = ["baton", "xtask"];
/// Files below `models/abacus`.
const QUESTIONS: [&str; 2] = ["eval.jsonl", "eval_reference.jsonl"];
/// What may be carried to the machine.
const MOST: u64 = 64 << 20;

/// Runs the chore.
pub fn main(args: &Args) -> Result<()> {
    let binaries = match &args.binaries {
        Some(folder) => folder.clone(),
        None => built()?,
    };
    let folder = &args.folder;
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    fs::create_dir_all(folder)?;
    let mut glibc = (0, 0);
    for name in BINARIES {
        let binary = folder.join(name);
        stripped(&binaries.join(name), &binary)?;
        glibc = glibc.max(elf::needs(&fs::read(&binary)?)?.glibc);
    }
    models(&root().join("models"), &folder.join("models"))?;
    // Changes that are not committed are not seen.
    let build = json!({"commit": git(&["rev-parse", "HEAD"]), "glibc": format!("{}.{}", glibc.0, glibc.1)});
    fs::write(folder.join("build.json"), build.to_string() + "\n")?;
    let (archive, name) = packed(&folder.canonicalize()?)?;
    let bytes = archive.metadata()?.len();
    #[allow(clippy::print_stdout)] // the chore's result
    {
        let mib = bytes as f64 / f64::from(1 << 20);
        println!("{}: {mib:.1} MiB, needs glibc {}.{}", archive.display(), glibc.0, glibc.1);
        println!("there: tar -xzf {name}.tar.gz && {name}/xtask gpu run --quick --out results.json");
    }
    ensure!(bytes <= MOST, "{bytes} bytes are more than {MOST}");
    Ok(())
}

/// Builds `baton` and `xtask` for release; the folder that they are in.
pub fn built() -> Result<PathBuf> {
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "--release", "--locked", "--package", "baton", "--package", "xtask"]);
    finished(build.current_dir(root()))?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    Ok(target.join("release"))
}

/// Copies a binary without its symbols, which are a third of it.
fn stripped(from: &Path, to: &Path) -> Result<()> {
    finished(Command::new("strip").arg("-o").args([to, from]))
}

/// Golden checkpoints with what was computed from them, and questions.
fn models(from: &Path, to: &Path) -> Result<()> {
    for case in GOLDENS.map(|case| from.join("golden").join(case)) {
        let folder = to.join("golden").join(case.file_name().context("a name")?);
        fs::create_dir_all(&folder)?;
        for file in fs::read_dir(&case).with_context(|| case.display().to_string())? {
            let file = file?.path();
            let name = file.file_name().context("a name")?;
            // The logits are for tests that do not go through a server.
            if name != "golden.safetensors" {
                fs::copy(&file, folder.join(name))?;
            }
        }
    }
    fs::create_dir_all(to.join("abacus"))?;
    for name in QUESTIONS {
        fs::copy(from.join("abacus").join(name), to.join("abacus").join(name))?;
    }
    Ok(())
}

/// Packs a folder; the file beside it, and the folder's name.
fn packed(folder: &Path) -> Result<(PathBuf, String)> {
    let name = folder.file_name().and_then(|name| name.to_str()).context("a folder with a name")?;
    let parent = folder.parent().context("a folder in a folder")?;
    let archive = parent.join(format!("{name}.tar.gz"));
    finished(Command::new("tar").arg("-czf").arg(&archive).arg("-C").arg(parent).arg(name))?;
    Ok((archive, name.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_golden_that_is_judged_and_every_question_is_packed() {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("gpu");
        models(&root().join("models"), &folder).unwrap();
        let (archive, name) = packed(&folder).unwrap();
        assert!(name == "gpu" && archive.metadata().unwrap().len() < MOST / 2);
        fs::remove_dir_all(&folder).unwrap();
        finished(Command::new("tar").arg("-xzf").arg(&archive).arg("-C").arg(place.path())).unwrap();
        let judged =
            |case: &str| ["golden.json", "config.json"].map(|file| folder.join("golden").join(case).join(file));
        assert!(GOLDENS.into_iter().flat_map(judged).all(|file| file.exists()));
        assert!(QUESTIONS.iter().all(|name| folder.join("abacus").join(name).exists()));
    }
}
