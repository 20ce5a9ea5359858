//! A program with a time limit, whose output goes to files.

use std::{
    fs::{self, File},
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

/// How a program ended.
pub struct Ended {
    /// `None`: by a signal, which a program that reached its limit is ended by.
    pub code: Option<i32>,
    /// Whether its time was up.
    pub late: bool,
    /// The end of what it said on standard error.
    pub said: String,
}

impl Ended {
    /// An error in its own words unless it succeeded.
    pub fn succeeded(&self) -> Result<(), String> {
        match (self.late, self.code) {
            (true, _) => Err(format!("its time was up: {}", self.said)),
            (_, Some(0)) => Ok(()),
            (_, Some(code)) => Err(format!("exit code {code}: {}", self.said)),
            (_, None) => Err(format!("ended by a signal: {}", self.said)),
        }
    }
}

/// Bytes of its output that are quoted.
const QUOTED: usize = 2000;

/// Runs a program until `until` at most. Its output is in `NAME.out` and `NAME.err` in the folder `logs`.
///
/// # Errors
/// It does not start.
pub fn run(command: &mut Command, logs: &Path, name: &str, until: Instant) -> Result<Ended> {
    let [out, err] = ["out", "err"].map(|ending| logs.join(format!("{name}.{ending}")));
    let file = |path: &Path| File::create(path).with_context(|| path.display().to_string());
    command.stdin(Stdio::null()).stdout(file(&out)?).stderr(file(&err)?);
    let mut child = command.spawn().with_context(|| format!("starting {:?}", command.get_program()))?;
    let mut late = false;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() >= until {
            late = true;
            child.kill()?;
        }
        thread::sleep(Duration::from_millis(20));
    };
    Ok(Ended { code: status.code(), late, said: end_of(&err) })
}

/// The last words in a file.
pub fn end_of(file: &Path) -> String {
    let bytes = fs::read(file).unwrap_or_default();
    String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(QUOTED)..]).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_ends_by_itself_or_at_its_limit_and_is_quoted() {
        let folder = tempfile::tempdir().unwrap();
        let shell = |script: &str, until| {
            let ended = run(Command::new("sh").args(["-c", script]), folder.path(), "sh", until).unwrap();
            (ended.succeeded(), ended.late)
        };
        let far = Instant::now() + Duration::from_secs(600);
        assert_eq!(shell("echo yes", far), (Ok(()), false));
        assert_eq!(fs::read_to_string(folder.path().join("sh.out")).unwrap(), "yes\n");
        assert_eq!(shell("echo no >&2; exit 3", far), (Err("exit code 3: no".into()), false));
        let (ended, late) = shell("exec sleep 600", Instant::now());
        assert!(late && ended.unwrap_err().contains("time was up"));
        assert!(run(&mut Command::new("/nowhere/program"), folder.path(), "none", far).is_err());
    }
}
