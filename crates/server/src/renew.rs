//! What may change while the server runs: keys and certificates. Their files are looked at now and then, and at once at
//! SIGHUP.
//!
//! Invariant: what cannot be read or used changes nothing, and the log says so. A change counts when two looks have seen the same, so that
//! a file which is being written is not taken for a short one.

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::interval;
use tracing::{error, info};

/// How often files are looked at.
const LOOK: Duration = Duration::from_secs(2);
/// Longest file.
const MAX_BYTES: u64 = 4 << 20;

/// Files of one purpose, and what is done with their contents.
pub struct Source<T> {
    /// The flags that name them, for messages.
    what: &'static str,
    paths: Vec<PathBuf>,
    parse: fn(&[Vec<u8>]) -> Result<T>,
}

impl<T> Source<T> {
    /// `parse` is given the contents in the order of the paths.
    pub fn new(what: &'static str, paths: Vec<PathBuf>, parse: fn(&[Vec<u8>]) -> Result<T>) -> Self {
        Self { what, paths, parse }
    }

    fn read(&self) -> Result<Vec<Vec<u8>>> {
        let read = |path: &PathBuf| {
            let read = || {
                let mut bytes = Vec::new();
                File::open(path)?.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
                ensure!(bytes.len() as u64 <= MAX_BYTES, "the file has more than {MAX_BYTES} bytes");
                Ok::<_, anyhow::Error>(bytes)
            };
            read().with_context(|| path.display().to_string())
        };
        self.paths.iter().map(read).collect::<Result<_>>().context(self.what)
    }

    /// What the files say now.
    ///
    /// # Errors
    /// If they cannot be read or used.
    pub fn load(self) -> Result<Loaded<T>> {
        let seen = self.read()?;
        let value = (self.parse)(&seen).context(self.what)?;
        Ok(Loaded { value, source: self, seen })
    }
}

/// What files say, and what it was read from.
pub struct Loaded<T> {
    pub value: T,
    source: Source<T>,
    seen: Vec<Vec<u8>>,
}

impl<T: 'static> Loaded<T> {
    /// `apply` is to be told what they say later.
    pub fn renew(self, apply: impl Fn(T) + Send + 'static) -> Renewal {
        let Self { source, seen, value: _ } = self;
        Renewal(Box::new(Watched { source, apply: Box::new(apply), seen: Ok(seen), next: None }))
    }
}

/// Files that are to be watched.
pub struct Renewal(Box<dyn Look>);

trait Look: Send {
    /// Looks at the files; `at_once`: a change need not be seen twice.
    fn look(&mut self, at_once: bool);
}

/// Contents, or why there are none.
type Seen = Result<Vec<Vec<u8>>, String>;

struct Watched<T> {
    source: Source<T>,
    apply: Box<dyn Fn(T) + Send>,
    /// What was applied or refused last.
    seen: Seen,
    /// What differed from it at the last look.
    next: Option<Seen>,
}

impl<T> Look for Watched<T> {
    fn look(&mut self, at_once: bool) {
        let now = self.source.read().map_err(|error| format!("{error:#}"));
        if now == self.seen && !at_once {
            self.next = None;
            return;
        }
        if !at_once && self.next.as_ref() != Some(&now) {
            self.next = Some(now);
            return;
        }
        let what = self.source.what;
        match now
            .as_ref()
            .map_err(Clone::clone)
            .and_then(|bytes| (self.source.parse)(bytes).map_err(|error| format!("{what}: {error:#}")))
        {
            Ok(value) => {
                (self.apply)(value);
                info!("{what}: read again");
            }
            Err(error) => error!(error, "{what}: what was in force stays"),
        }
        (self.seen, self.next) = (now, None);
    }
}

/// Watches from now on, in the background. Without files SIGHUP ends nothing either.
///
/// # Errors
/// If the system takes no handler of signals.
pub fn start(mut renewals: Vec<Renewal>) -> Result<()> {
    let mut asked = signal(SignalKind::hangup())?;
    let mut looks = interval(LOOK);
    tokio::spawn(async move {
        loop {
            let at_once = tokio::select! {
                _ = asked.recv() => true,
                _ = looks.tick(), if !renewals.is_empty() => false,
            };
            let look = move || {
                renewals.iter_mut().for_each(|renewal| renewal.0.look(at_once));
                renewals
            };
            renewals = match tokio::task::spawn_blocking(look).await {
                Ok(renewals) => renewals,
                Err(error) => return error!(%error, "keys and certificates are not read again any more"),
            };
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::{Arc, Mutex};

    use tempfile::TempDir;

    use super::*;

    fn parse(contents: &[Vec<u8>]) -> Result<u32> {
        Ok(std::str::from_utf8(&contents[0])?.parse()?)
    }

    #[test]
    fn a_change_counts_when_it_was_seen_twice_and_what_is_bad_changes_nothing() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("number");
        let write = |text: &str| fs::write(&path, text).unwrap();
        write("1");
        let applied = Arc::new(Mutex::new(Vec::new()));
        let apply = {
            let applied = applied.clone();
            move |number| applied.lock().unwrap().push(number)
        };
        let first = Source::new("--number", vec![path.clone()], parse).load().unwrap();
        assert_eq!(first.value, 1);
        let mut renewal = first.renew(apply);
        let mut look = |at_once| {
            renewal.0.look(at_once);
            applied.lock().unwrap().clone()
        };
        assert!(look(false).is_empty());
        write("2");
        assert!(look(false).is_empty());
        write("23");
        assert!(look(false).is_empty(), "it was still being written");
        assert_eq!(look(false), [23]);
        assert_eq!(look(false), [23]);
        write("nonsense");
        assert_eq!((look(false), look(false)), (vec![23], vec![23]));
        fs::remove_file(&path).unwrap();
        assert_eq!((look(false), look(true)), (vec![23], vec![23]));
        write("4");
        assert_eq!(look(true), [23, 4], "at once");
        assert!(Source::new("--number", vec![folder.path().join("none")], parse).load().is_err());
    }
}
