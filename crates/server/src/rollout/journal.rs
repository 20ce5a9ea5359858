//! The journal of rollouts: one JSON object a line, appended and synced before what it says takes effect.
//!
//! Invariant: what is in the file is the truth after a crash. A last line that was cut off never took effect, and is
//! dropped; a line before it that cannot be read is damage, and nothing starts on it. A file that has grown long is
//! replaced by a short one that says the same, in one step.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use tracing::{error, warn};

use super::ledger::{Ledger, Record};
use super::policy::{Phase, Transition};
use crate::state_dir::StateDir;

/// Name of the file in the state folder.
const FILE: &str = "rollout.jsonl";
/// Records from which on the file is made short.
const LONG: usize = 2000;
/// Rollouts whose records a short file still has.
const KEPT_ROLLOUTS: u64 = 5;
/// Bytes of a file that is read.
const MAX_BYTES: u64 = 64 << 20;

/// Why there is no journal.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The system refused.
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    /// Something other than a crash changed it.
    #[error(
        "{} is damaged at line {line}: {reason}; put back an intact copy, or move the file away to start without \
         the promotions that it records",
        path.display()
    )]
    Damaged { path: PathBuf, line: usize, reason: String },
}

/// The journal, open at its end.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    /// Bytes of whole records.
    len: u64,
    records: Vec<Record>,
    /// Records that the disk has not taken yet.
    unwritten: Vec<Record>,
    ledger: Ledger,
    _dir: StateDir,
}

impl Journal {
    /// Reads the journal of a state folder, or begins one. A rollout that was under way is over: what it had promoted
    /// serves, and what it had not is rolled back.
    pub fn open(dir: StateDir) -> Result<Self, JournalError> {
        let path = dir.file(FILE);
        let io = |source| JournalError::Io { path: path.clone(), source };
        let options = || File::options().read(true).append(true).create(true).mode(0o600).clone();
        let mut file = options().open(&path).map_err(io)?;
        let (mut ledger, mut records) = (Ledger::default(), Vec::new());
        let text = read(&mut file).map_err(io)?;
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        for (number, line) in text[..whole].lines().enumerate() {
            let damaged = |reason| JournalError::Damaged { path: path.clone(), line: number + 1, reason };
            let record: Record = serde_json::from_str(line).map_err(|error| damaged(error.to_string()))?;
            ledger.apply(&record).map_err(damaged)?;
            records.push(record);
        }
        if whole < text.len() {
            let (path, bytes) = (path.display(), text.len() - whole);
            warn!(%path, bytes, "the last line of the journal was cut off by a crash; what it began to say never happened");
            file.set_len(whole as u64).and_then(|()| file.sync_all()).map_err(io)?;
        }
        let mut journal = Self { path, file, len: whole as u64, records, unwritten: Vec::new(), ledger, _dir: dir };
        journal.end_interrupted()?;
        Ok(journal)
    }

    fn end_interrupted(&mut self) -> Result<(), JournalError> {
        let Some(phase) = self.ledger.phase.filter(|phase| !phase.is_terminal()) else { return Ok(()) };
        let rollout = self.ledger.rollout;
        warn!(rollout, phase = phase.name(), "a rollout was interrupted by a restart");
        let reason = "interrupted by a restart".into();
        let ends = [Transition::RolledBack { reason }, Transition::Retired];
        let decided = matches!(phase, Phase::Promoting | Phase::RollingBack);
        self.append(rollout, &ends[usize::from(decided)..])
    }

    /// Forgets all promotions: base models serve again.
    pub fn reset(&mut self) -> Result<(), JournalError> {
        self.append(self.ledger.rollout, &[Transition::Reset])
    }

    /// What the records say.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Adds what is to happen to a rollout; it is on disk when this returns. After an error none of it shall happen.
    ///
    /// # Panics
    /// If it cannot happen.
    pub fn append(&mut self, rollout: u64, transitions: &[Transition]) -> Result<(), JournalError> {
        let before = (self.ledger.clone(), self.unwritten.len());
        self.push(rollout, transitions);
        self.flush().inspect_err(|_| {
            self.ledger = before.0;
            self.unwritten.truncate(before.1);
        })
    }

    /// Adds what happens to a rollout in any case: if the disk does not take it now, it goes before the next.
    ///
    /// # Panics
    /// If it cannot happen.
    pub fn note(&mut self, rollout: u64, transitions: &[Transition]) {
        self.push(rollout, transitions);
        if let Err(error) = self.flush() {
            error!(%error, rollout, "the journal does not know this yet; after a crash now, the rollout counts as interrupted");
        }
    }

    fn push(&mut self, rollout: u64, transitions: &[Transition]) {
        for transition in transitions {
            let unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
            let record = Record { seq: self.ledger.seq + 1, unix_ms, rollout, transition: transition.clone() };
            self.ledger.apply(&record).unwrap_or_else(|reason| panic!("{record:?}: {reason}"));
            self.unwritten.push(record);
        }
    }

    fn flush(&mut self) -> Result<(), JournalError> {
        let text: String = self.unwritten.iter().map(line).collect();
        let written = self.file.write_all(text.as_bytes()).and_then(|()| self.file.sync_data());
        if let Err(source) = written {
            // Half a line must not stand before the next one.
            self.file.set_len(self.len).ok();
            return Err(JournalError::Io { path: self.path.clone(), source });
        }
        self.len += text.len() as u64;
        self.records.append(&mut self.unwritten);
        let over = self.ledger.phase.is_none_or(Phase::is_terminal);
        if self.records.len() >= LONG && over {
            // The long one is as good.
            self.compact().unwrap_or_else(|error| warn!(%error, "the journal stays long"));
        }
        Ok(())
    }

    /// Puts a short file in the place of the long one.
    fn compact(&mut self) -> Result<(), JournalError> {
        let io = |source| JournalError::Io { path: self.path.clone(), source };
        let from = self.ledger.rollout.saturating_sub(KEPT_ROLLOUTS - 1);
        let first = self.records.iter().position(|r| r.rollout >= from).unwrap_or(self.records.len());
        // The first that is kept must be a beginning.
        let first = first
            + self.records[first..].iter().position(|r| matches!(r.transition, Transition::Started(_))).unwrap_or(0);
        let (seq, rollout) = (self.ledger.seq + 1, self.ledger.rollout);
        let transition = Transition::Compacted { promotions: self.ledger.promotions.clone() };
        let unix_ms = self.records.last().map_or(0, |record| record.unix_ms);
        let records: Vec<Record> =
            self.records[first..].iter().cloned().chain([Record { seq, unix_ms, rollout, transition }]).collect();
        let mut ledger = Ledger::default();
        for record in &records {
            ledger.apply(record).unwrap_or_else(|reason| panic!("{record:?}: {reason}"));
        }
        let text: String = records.iter().map(line).collect();
        let new = self.path.with_extension("new");
        let mut file = File::options().create(true).write(true).truncate(true).mode(0o600).open(&new).map_err(io)?;
        file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(io)?;
        fs::rename(&new, &self.path).map_err(io)?;
        // From here on the short one counts.
        let folder = self.path.parent().unwrap_or(Path::new("."));
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(io)?;
        self.file = File::options().append(true).open(&self.path).map_err(io)?;
        (self.len, self.records, self.ledger) = (text.len() as u64, records, ledger);
        Ok(())
    }
}

fn line(record: &Record) -> String {
    serde_json::to_string(record).expect("a record is written") + "\n"
}

fn read(file: &mut File) -> io::Result<String> {
    let bytes = file.metadata()?.len();
    if bytes > MAX_BYTES {
        return Err(io::Error::other(format!("it has {bytes} bytes; at most {MAX_BYTES} are read")));
    }
    let mut content = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut content)?;
    // Bytes that are no text make a line that is no record.
    Ok(String::from_utf8_lossy(&content).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rollout::plan::Plan;
    use crate::rollout::policy::{Part, Started};

    fn open(dir: &Path) -> Result<Journal, JournalError> {
        Journal::open(StateDir::open(dir).unwrap())
    }

    fn started(model: &str) -> Transition {
        let plan = serde_json::from_value::<Plan>(serde_json::json!({"model": model})).unwrap();
        Transition::Started(Started { base: "base".into(), names: vec!["name".into()], plan }.into())
    }

    /// A rollout, up to and with the record of this number.
    fn rollout(journal: &mut Journal, model: &str, records: usize) {
        let id = journal.ledger().rollout + 1;
        let admitted = Transition::Admitted { summary: "passed".into() };
        let share = Transition::Share(Part { part: 0.5, stage: Some(0) });
        let loaded = Transition::Loaded { generation: model.repeat(64) };
        let all = [started(model), loaded, admitted, share, Transition::Promoted, Transition::Retired];
        for transition in all.into_iter().take(records) {
            journal.append(id, &[transition]).unwrap();
        }
    }

    #[test]
    fn what_was_promoted_is_known_after_a_restart_and_what_was_under_way_is_rolled_back() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("new/state");
        for interrupted in 1..=5 {
            let mut journal = open(&file).unwrap();
            rollout(&mut journal, "b", 6);
            rollout(&mut journal, "c", interrupted);
            drop(journal);
            let journal = open(&file).unwrap();
            let (phase, serves) = match interrupted {
                5 => (Phase::Promoted, "c"),
                _ => (Phase::RolledBack, "b"),
            };
            assert_eq!(journal.ledger().phase, Some(phase), "{interrupted}");
            let promoted = &journal.ledger().promotions["base"];
            assert_eq!((promoted.model.to_str(), promoted.generation.as_str()), (Some(serves), &*serves.repeat(64)));
        }
    }

    #[test]
    fn a_line_cut_off_anywhere_never_happened_and_the_file_is_mended() {
        let dir = tempfile::tempdir().unwrap();
        rollout(&mut open(dir.path()).unwrap(), "b", 6);
        let whole = fs::read(dir.path().join(FILE)).unwrap();
        let before_last = whole[..whole.len() - 1].iter().rposition(|&b| b == b'\n').unwrap() + 1;
        let last = whole.len() - before_last;
        for cut in 1..=last {
            fs::write(dir.path().join(FILE), &whole[..whole.len() - cut]).unwrap();
            drop(open(dir.path()).unwrap());
            // The promotion held; its last record is written again.
            let mut journal = open(dir.path()).unwrap();
            assert_eq!((journal.ledger().phase, journal.ledger().seq), (Some(Phase::Promoted), 6), "{cut}");
            rollout(&mut journal, "c", 6);
        }
    }

    #[test]
    fn damage_before_the_last_line_is_named_by_its_line() {
        let dir = tempfile::tempdir().unwrap();
        rollout(&mut open(dir.path()).unwrap(), "b", 6);
        let whole = fs::read_to_string(dir.path().join(FILE)).unwrap();
        let lines: Vec<&str> = whole.lines().collect();
        let text = |lines: &[&[&str]]| lines.concat().join("\n") + "\n";
        let swapped = text(&[&lines[..2], &[lines[3], lines[2]], &lines[4..]]);
        let missing = text(&[&lines[..2], &lines[3..]]);
        for damaged in [
            whole.replace("\"admitted\"", "\"admired\""),
            whole.replacen("\"seq\":3", "\"seq\":4", 1),
            swapped,
            missing,
        ] {
            fs::write(dir.path().join(FILE), &damaged).unwrap();
            let error = open(dir.path()).unwrap_err().to_string();
            assert!(error.contains("rollout.jsonl is damaged at line 3"), "{error}");
            assert_eq!(fs::read_to_string(dir.path().join(FILE)).unwrap(), damaged);
        }
    }

    #[test]
    fn a_long_journal_becomes_a_short_one_that_says_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = open(dir.path()).unwrap();
        for n in 0..2 * LONG / 6 {
            rollout(&mut journal, ["b", "c"][n % 2], 6);
            assert!(journal.records.len() <= LONG);
            // Numbers go on.
            assert_eq!(journal.ledger().rollout, n as u64 + 1);
        }
        let said = journal.ledger().clone();
        drop(journal);
        assert_eq!(*open(dir.path()).unwrap().ledger(), said);
    }

    #[test]
    fn what_the_disk_does_not_take_does_not_happen_or_is_written_before_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = open(dir.path()).unwrap();
        rollout(&mut journal, "b", 3);
        let (said, file) = (journal.ledger().clone(), dir.path().join(FILE));
        let good = std::mem::replace(&mut journal.file, File::open(&file).unwrap());
        journal.append(1, &[Transition::Promoted]).unwrap_err();
        assert_eq!(*journal.ledger(), said);
        journal.note(1, &[Transition::RolledBack { reason: "it is full".into() }]);
        assert_eq!(journal.ledger().phase, Some(Phase::RollingBack));
        journal.file = good;
        journal.append(1, &[Transition::Retired]).unwrap();
        let said = journal.ledger().clone();
        drop(journal);
        let journal = open(dir.path()).unwrap();
        assert_eq!((journal.ledger(), said.phase), (&said, Some(Phase::RolledBack)));
    }

    #[test]
    fn two_servers_do_not_share_a_folder() {
        let dir = tempfile::tempdir().unwrap();
        let first = StateDir::open(dir.path()).unwrap();
        assert!(StateDir::open(dir.path()).unwrap_err().to_string().contains("another server"));
        drop(first);
        StateDir::open(dir.path()).unwrap();
    }
}
