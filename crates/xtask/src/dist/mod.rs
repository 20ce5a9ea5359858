//! What is given to others: for each target an archive with the binary and its papers, and the sums of all.
//!
//! Invariant: the same binary and the same papers give the same bytes. Times are the commit's, or `SOURCE_DATE_EPOCH`. What
//! else would make two builds of a binary differ is kept out of it, as far as is known; nobody has compared two.

mod archive;
mod build;
mod graph;
mod licences;
mod sbom;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use chrono::{DateTime, Utc};
use serde_json::json;

use crate::{dist::build::Tools, git, root};

/// The package whose binary it is.
const PACKAGE: &str = "baton";
const X86_64: &str = "x86_64-unknown-linux-gnu";
const AARCH64: &str = "aarch64-unknown-linux-gnu";
/// What there is a release for. A binary linked with musl could open neither CUDA's nor Ascend's libraries.
pub const TARGETS: [&str; 2] = [X86_64, AARCH64];

/// Arguments of the chore.
#[derive(clap::Args)]
pub struct Args {
    /// Only for these [default: all that can be built here]
    #[arg(long = "target", value_name = "TARGET", value_parser = clap::builder::PossibleValuesParser::new(TARGETS))]
    targets: Vec<String>,
    /// The folder to make; one that this chore has filled is emptied, any other is refused
    #[arg(long, value_name = "DIR", default_value = "target/dist")]
    out: PathBuf,
    /// Write what lies beside a binary, licences and bill of materials, and build none
    #[arg(long)]
    papers_only: bool,
    /// Use the machine's own C compiler and linker instead of zig: for its own target alone, and its own glibc or newer
    #[arg(long)]
    without_zig: bool,
}

/// The least processor that a binary runs on; kernels for others are chosen when it runs.
fn least_processor(target: &str) -> &'static str {
    if target == X86_64 { "x86-64-v2" } else { "generic" }
}

/// Runs the chore.
pub fn main(args: &Args) -> Result<()> {
    let out = root().join(&args.out);
    let here = host()?;
    let tools = match args.papers_only || args.without_zig {
        true => Tools::Machine,
        false => Tools::zig().context("zig cannot be installed; --without-zig builds for this machine alone")?,
    };
    let time = time()?;
    empty(&out)?;
    let asked = |target: &&str| args.targets.is_empty() || args.targets.iter().any(|asked| asked == target);
    for target in TARGETS.into_iter().filter(asked) {
        let folder = out.join(format!("baton-{}-{target}", env!("CARGO_PKG_VERSION")));
        fs::create_dir(&folder)?;
        papers(&folder, target, &tools, time)?;
        if args.papers_only {
            continue;
        }
        if let Some(reason) = cannot(target, &here, &tools)? {
            fs::remove_dir_all(&folder)?;
            ensure!(args.targets.is_empty(), "{target}: {reason}");
            say(&format!("{target}: not built: {reason}"));
            continue;
        }
        let cpu = least_processor(target);
        let binary = fs::read(build::binary(&tools, PACKAGE, target, cpu)?)?;
        let needs = build::checked(&binary, target, tools.glibc())?;
        fs::write(folder.join("baton"), &binary)?;
        let glibc = format!("{}.{}", needs.glibc.0, needs.glibc.1);
        let facts = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "commit": git(&["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]),
            "target": target,
            "processor": cpu,
            "glibc": glibc,
            "libraries": needs.libraries,
            "rust": compiler()?,
        });
        fs::write(folder.join("build.json"), serde_json::to_string_pretty(&facts)? + "\n")?;
        archive::write(&folder, time.timestamp())?;
        fs::remove_dir_all(&folder)?;
        let mib = binary.len() as f64 / f64::from(1 << 20);
        say(&format!("{target}: {mib:.1} MiB, for {cpu} and newer, needs glibc {glibc}"));
    }
    archive::sums(&out)?;
    say(&out.canonicalize()?.display().to_string());
    Ok(())
}

/// Makes a folder, or empties the one that is there if it is this chore's.
fn empty(folder: &Path) -> Result<()> {
    let sums = folder.join("SHA256SUMS");
    if folder.exists() {
        let ours = sums.exists() || fs::read_dir(folder)?.next().is_none();
        ensure!(ours, "{}: it is neither empty nor has it SHA256SUMS; nothing was removed", folder.display());
        fs::remove_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    fs::create_dir_all(folder)?;
    // Without a line nothing passes for complete, and the next run may empty what this one leaves if it fails.
    Ok(fs::write(sums, "")?)
}

/// Writes what lies beside the binary.
fn papers(folder: &Path, target: &str, tools: &Tools, time: DateTime<Utc>) -> Result<()> {
    for name in ["README.md", "CHANGELOG.md", "LICENSE"] {
        fs::copy(root().join(name), folder.join(name)).with_context(|| name.to_owned())?;
    }
    let crates = graph::linked(PACKAGE, target)?;
    let besides: Vec<_> = tools.linked()?.into_iter().collect();
    fs::write(folder.join("LICENSES-THIRD-PARTY.txt"), licences::page(&crates, &besides)?)?;
    // Rust's own page of what its standard library is made of.
    let page = PathBuf::from(rustc(&["--print", "sysroot"])?).join("share/doc/rust/COPYRIGHT-library.html");
    fs::copy(&page, folder.join("LICENSES-RUST-STD.html")).with_context(|| page.display().to_string())?;
    let document = sbom::document(&crates, &compiler()?, time);
    Ok(fs::write(folder.join("baton.cdx.json"), serde_json::to_string_pretty(&document)? + "\n")?)
}

/// Why nothing can be built here for a target.
fn cannot(target: &str, here: &str, tools: &Tools) -> Result<Option<String>> {
    let library = PathBuf::from(rustc(&["--print", "sysroot"])?).join("lib/rustlib").join(target);
    Ok(match tools {
        _ if !library.exists() => Some(format!("no standard library for it: rustup target add {target}")),
        Tools::Machine if target != here => Some("another processor takes zig".to_owned()),
        _ => None,
    })
}

/// When what is built was written.
fn time() -> Result<DateTime<Utc>> {
    let given = env::var("SOURCE_DATE_EPOCH").ok().or_else(|| git(&["log", "-1", "--format=%ct"]));
    let seconds = given.context("no commit, and no SOURCE_DATE_EPOCH")?.parse().context("SOURCE_DATE_EPOCH")?;
    DateTime::from_timestamp(seconds, 0).context("SOURCE_DATE_EPOCH is no time")
}

/// Version of the compiler.
fn compiler() -> Result<String> {
    let version = rustc(&["--version"])?;
    version.split(' ').nth(1).map(str::to_owned).context("rustc has no version")
}

/// The target of this machine.
fn host() -> Result<String> {
    let facts = rustc(&["-vV"])?;
    let host = facts.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned).context("rustc names no host")
}

fn rustc(arguments: &[&str]) -> Result<String> {
    let output = Command::new("rustc").args(arguments).output().context("rustc did not start")?;
    ensure!(output.status.success(), "rustc {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

#[allow(clippy::print_stdout)] // the chore's result
fn say(line: &str) {
    println!("{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_folder_of_this_chore_is_emptied() {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("dist");
        empty(&folder).unwrap();
        fs::write(folder.join("archive"), "").unwrap();
        empty(&folder).unwrap();
        assert!(!folder.join("archive").exists());
        fs::remove_file(folder.join("SHA256SUMS")).unwrap();
        empty(&folder).unwrap();
        assert!(empty(parent.path()).is_err());
        assert!(folder.exists());
    }

    #[test]
    fn papers_are_the_same_whenever_they_are_written_and_name_no_folder_of_this_machine() {
        let time = DateTime::from_timestamp(1_700_000_000, 0).unwrap();
        let write = || {
            let folder = tempfile::tempdir().unwrap();
            papers(folder.path(), X86_64, &Tools::Machine, time).unwrap();
            let mut files: Vec<(String, String)> = fs::read_dir(folder.path())
                .unwrap()
                .map(|file| file.unwrap().path())
                .map(|path| (path.file_name().unwrap().display().to_string(), fs::read_to_string(path).unwrap()))
                .collect();
            files.sort();
            files
        };
        let files = write();
        assert!(files == write());
        let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
        let papers = [
            "CHANGELOG.md",
            "LICENSE",
            "LICENSES-RUST-STD.html",
            "LICENSES-THIRD-PARTY.txt",
            "README.md",
            "baton.cdx.json",
        ];
        assert_eq!(names, papers);
        let folders = [root().canonicalize().unwrap(), env::home_dir().unwrap().join(".cargo")];
        for (name, text) in &files {
            assert!(!folders.iter().any(|folder| text.contains(folder.to_str().unwrap())), "{name}");
        }
    }
}
