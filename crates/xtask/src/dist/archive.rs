//! Archives that say nothing of when, where and by whom they were made: the same files give the same bytes.

use std::{
    collections::BTreeMap,
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

/// The file that may be run.
const PROGRAM: &str = "baton";

/// Writes a folder's files as `<folder>.tar.gz` beside it, all of one `time`, in seconds since 1970.
pub fn write(folder: &Path, time: i64) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let mode = if path.ends_with(PROGRAM) { 0o755 } else { 0o644 };
        fs::set_permissions(path, Permissions::from_mode(mode))?;
    }
    fs::set_permissions(folder, Permissions::from_mode(0o755))?;
    let name = folder.file_name().and_then(|name| name.to_str()).context("a folder with a name")?;
    let parent = folder.parent().context("a folder in a folder")?;
    let file = fs::File::create(parent.join(format!("{name}.tar.gz")))?;
    let mut tar = Command::new("tar")
        .args(["--format=ustar", "--sort=name", "--owner=0", "--group=0", "--numeric-owner"])
        .arg(format!("--mtime=@{time}"))
        .args(["-cf", "-", name])
        .current_dir(parent)
        .stdout(Stdio::piped())
        .spawn()
        .context("tar did not start")?;
    let packed = tar.stdout.take().context("tar writes")?;
    let gzip = Command::new("gzip").args(["-9", "--no-name"]).stdin(packed).stdout(file).status()?;
    ensure!(tar.wait()?.success() && gzip.success(), "{name} was not packed");
    Ok(())
}

/// Writes `SHA256SUMS` of a folder's files, as `sha256sum --check` reads it.
pub fn sums(folder: &Path) -> Result<()> {
    let mut sums = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_file() && name != "SHA256SUMS" {
            let digest = Sha256::digest(fs::read(&path)?);
            sums.insert(name, digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>());
        }
    }
    let lines: String = sums.iter().map(|(name, digest)| format!("{digest}  {name}\n")).collect();
    Ok(fs::write(folder.join("SHA256SUMS"), lines)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(names: &[&str], mode: u32) -> (tempfile::TempDir, Vec<u8>) {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("baton-1");
        fs::create_dir(&folder).unwrap();
        for name in names {
            fs::write(folder.join(name), format!("of {name}")).unwrap();
            fs::set_permissions(folder.join(name), Permissions::from_mode(mode)).unwrap();
        }
        write(&folder, 1_700_000_000).unwrap();
        let bytes = fs::read(dir.path().join("baton-1.tar.gz")).unwrap();
        (dir, bytes)
    }

    #[test]
    fn the_same_files_give_the_same_bytes_whoever_made_them_in_whatever_order() {
        let (dir, first) = made(&["baton", "LICENSE", "README.md"], 0o600);
        let (_, second) = made(&["README.md", "LICENSE", "baton"], 0o777);
        assert!(first == second);
        let listing = Command::new("tar").args(["-tvzf", "baton-1.tar.gz"]).current_dir(dir.path()).output().unwrap();
        let listing = String::from_utf8(listing.stdout).unwrap();
        let lines: Vec<Vec<&str>> = listing.lines().map(|line| line.split_whitespace().collect()).collect();
        let found: Vec<_> = lines.iter().map(|line| (line[0], line[1], *line.last().unwrap())).collect();
        assert_eq!(
            found,
            [
                ("drwxr-xr-x", "0/0", "baton-1/"),
                ("-rw-r--r--", "0/0", "baton-1/LICENSE"),
                ("-rw-r--r--", "0/0", "baton-1/README.md"),
                ("-rwxr-xr-x", "0/0", "baton-1/baton"),
            ]
        );
    }

    #[test]
    fn sums_are_what_sha256sum_checks() {
        let (dir, _) = made(&["baton"], 0o644);
        for _ in 0..2 {
            sums(dir.path()).unwrap();
        }
        let check = |dir: &Path| {
            let mut check = Command::new("sha256sum");
            check.args(["--check", "--strict", "--quiet", "SHA256SUMS"]).current_dir(dir);
            check.output().unwrap().status.success()
        };
        assert!(check(dir.path()));
        assert_eq!(fs::read_to_string(dir.path().join("SHA256SUMS")).unwrap().lines().count(), 1);
        fs::write(dir.path().join("baton-1.tar.gz"), "another").unwrap();
        assert!(!check(dir.path()));
    }
}
