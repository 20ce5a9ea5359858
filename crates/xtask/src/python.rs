//! Environments of Python packages, below `target`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

/// The Python of an environment in this folder with these requirements, made if there is none, and made anew when they change.
pub fn environment(folder: &Path, requirements: &Path) -> Result<PathBuf> {
    let (python, installed) = (folder.join("bin/python"), folder.join("requirements.txt"));
    let wanted = fs::read(requirements).with_context(|| requirements.display().to_string())?;
    if fs::read(&installed).is_ok_and(|installed| installed == wanted) {
        return Ok(python);
    }
    if folder.exists() {
        fs::remove_dir_all(folder)?;
    }
    finished(Command::new("python3").args(["-m", "venv"]).arg(folder))?;
    finished(Command::new(&python).args(["-m", "pip", "install", "--quiet", "-r"]).arg(requirements))?;
    fs::write(installed, wanted)?;
    Ok(python)
}

/// Runs a command that must end well.
pub fn finished(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("{command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}
