//! What names a generation: a digest of all files of its checkpoint.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use baton_handoff::{MANIFEST, SIGNATURE};
use baton_model::Files;
use sha2::{Digest, Sha256};

/// Folders inside each other, at most.
const MAX_DEPTH: usize = 8;
/// Bytes read at once.
const CHUNK: usize = 1 << 20;

/// SHA-256, in hex, of what `sha256sum` prints of all files in byte order of their names; the hand-off's own files are
/// no part of what is served.
pub fn digest(files: &Files) -> Result<String> {
    let mut names = Vec::new();
    match files {
        Files::Embedded(files) => {
            names.extend(
                files.iter().map(|(name, content)| ((*name).to_owned(), hex(Sha256::digest(content).as_slice()))),
            );
        }
        Files::Gguf(path) => names.push((files.names()?.concat(), of_file(path)?)),
        Files::Folder(folder) => walk(folder, "", 0, &mut names)?,
    }
    names.sort();
    let listing: String = names.iter().map(|(name, digest)| format!("{digest}  {name}\n")).collect();
    Ok(hex(Sha256::digest(listing).as_slice()))
}

fn walk(folder: &Path, prefix: &str, depth: usize, names: &mut Vec<(String, String)>) -> Result<()> {
    ensure!(depth < MAX_DEPTH, "{}: more than {MAX_DEPTH} folders inside each other", folder.display());
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let (path, kind) = entry.and_then(|entry| Ok((entry.path(), entry.file_type()?)))?;
        let name = path.file_name().and_then(|name| name.to_str()).context("a file name is not UTF-8")?;
        let name = format!("{prefix}{name}");
        if kind.is_dir() {
            walk(&path, &format!("{name}/"), depth + 1, names)?;
        } else if path.is_file() && ![MANIFEST, SIGNATURE].contains(&&*name) {
            names.push((name, of_file(&path)?));
        }
    }
    Ok(())
}

fn of_file(path: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    let mut read = || -> io::Result<()> {
        let (mut file, mut chunk) = (File::open(path)?, vec![0; CHUNK]);
        loop {
            match file.read(&mut chunk)? {
                0 => return Ok(()),
                bytes => hash.update(&chunk[..bytes]),
            }
        }
    };
    read().with_context(|| path.display().to_string())?;
    Ok(hex(hash.finalize().as_slice()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
