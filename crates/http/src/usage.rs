//! Who has used how much: requests and tokens by the name of the key.
//!
//! Invariants: what a request adds is what its summary says, once, when it has ended; counts only grow; a name is that of a
//! key that was known when the request came, so no client can make one up. With a state folder the counts are a file of it,
//! replaced in one step: what a crash costs is the last [`EVERY`].

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::service::Service;
use crate::store::replace_file;
use crate::summary::Known;

/// Who sends no key that is known, and who comes when [`MOST_NAMES`] have come before. No listed key may be called so.
pub const OTHER: &str = "other";
/// Names that are told apart, those of keys that are gone included.
const MOST_NAMES: usize = 1000;
/// How often counts that have changed are written.
const EVERY: Duration = Duration::from_secs(5);

/// What the requests of one name came to. A request counts when an engine has taken it, with its whole prompts and with the
/// tokens that it was given, however it ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Used {
    pub requests: u64,
    pub prompt_tokens: u64,
    /// Of the prompt tokens those that came from the prefix cache.
    pub cached_tokens: u64,
    pub completion_tokens: u64,
}

/// The counts as the file has them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Ledger {
    /// When counting began, in seconds since 1970.
    since: u64,
    keys: BTreeMap<String, Used>,
}

/// See the head of the file.
#[derive(Debug)]
pub(crate) struct Usage {
    file: Option<PathBuf>,
    /// Whether somebody keeps it up to date.
    kept: AtomicBool,
    ledger: Mutex<Ledger>,
    /// What the file has; held while it is written.
    written: Mutex<Option<Ledger>>,
}

impl Default for Usage {
    /// Counts that begin now, and end with the process.
    fn default() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let ledger = Mutex::new(Ledger { since, keys: [(OTHER.to_owned(), Used::default())].into() });
        Self { file: None, kept: AtomicBool::new(false), ledger, written: Mutex::default() }
    }
}

impl Usage {
    /// The counts of this file, which need not be there yet.
    ///
    /// # Errors
    /// If the system refuses, or if the file is none of ours: nobody's counts are begun anew in silence.
    pub fn open(file: PathBuf) -> io::Result<Self> {
        let ledger: Ledger = match fs::read(&file) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| {
                let reason = format!("{}: {error}; move it away to count from zero", file.display());
                io::Error::new(ErrorKind::InvalidData, reason)
            })?,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Ok(Self { file: Some(file), ..Self::default() });
            }
            Err(error) => return Err(error),
        };
        let written = Mutex::new(Some(ledger.clone()));
        Ok(Self { file: Some(file), written, ledger: Mutex::new(ledger), ..Self::default() })
    }

    /// Counts a request that has ended.
    pub fn add(&self, known: &Known) {
        if known.submitted.is_none() {
            return;
        }
        let mut ledger = self.ledger.lock();
        let name = known.key.as_deref().unwrap_or(OTHER);
        let fits = ledger.keys.len() < MOST_NAMES || ledger.keys.contains_key(name);
        let used = ledger.keys.entry(if fits { name } else { OTHER }.to_owned()).or_default();
        used.requests += 1;
        used.prompt_tokens += known.prompt_tokens;
        used.cached_tokens += known.cached_tokens;
        used.completion_tokens += known.completion_tokens;
    }

    /// What each name has used, in the order of names.
    pub fn by_key(&self) -> BTreeMap<String, Used> {
        self.ledger.lock().keys.clone()
    }

    /// All of it for an admin.
    pub fn json(&self) -> Value {
        let Ledger { since, keys } = self.ledger.lock().clone();
        #[derive(Serialize)]
        struct Row {
            key: String,
            #[serde(flatten)]
            used: Used,
        }
        let rows: Vec<Row> = keys.into_iter().map(|(key, used)| Row { key, used }).collect();
        json!({"object": "list", "since": since, "data": rows})
    }

    /// The same as a table for a spreadsheet. No name of a key needs quotes.
    pub fn csv(&self) -> String {
        let mut text = "key,requests,prompt_tokens,cached_tokens,completion_tokens\n".to_owned();
        for (name, used) in self.by_key() {
            let Used { requests, prompt_tokens, cached_tokens, completion_tokens } = used;
            text += &format!("{name},{requests},{prompt_tokens},{cached_tokens},{completion_tokens}\n");
        }
        text
    }

    /// Writes what has changed to the file, if there is one. It blocks.
    pub fn save(&self) -> io::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let mut written = self.written.lock();
        let ledger = self.ledger.lock().clone();
        if written.as_ref() != Some(&ledger) {
            replace_file(file, &serde_json::to_vec(&ledger)?)?;
            *written = Some(ledger);
        }
        Ok(())
    }
}

/// Writes the counts of a service every few seconds until it drains, however often it is asked to. The last ones are written
/// by whoever drains it.
pub(crate) async fn keep(service: Service) {
    let usage = service.usage();
    if usage.file.is_none() || usage.kept.swap(true, Ordering::Relaxed) {
        return;
    }
    let draining = service.draining().clone();
    while draining.run_until_cancelled(sleep(EVERY)).await.is_some() {
        save(&service).await;
    }
}

/// Writes the counts of a service. What the system refuses is logged.
pub(crate) async fn save(service: &Service) {
    let usage = Arc::clone(service.usage());
    // Its refusal is logged there, and is no client's.
    let _ = service.disk_work(move || usage.save()).await;
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    fn request(key: Option<&str>, tokens: u64) -> Known {
        let submitted = Some(Duration::ZERO);
        let key = key.map(Arc::from);
        Known { key, submitted, prompt_tokens: tokens, cached_tokens: 1, completion_tokens: 2, ..Known::default() }
    }

    #[test]
    fn a_request_counts_once_under_the_name_of_its_key_and_only_if_an_engine_took_it() {
        let usage = Usage::default();
        for (key, tokens) in [(Some("a"), 10), (None, 5), (Some("a"), 20)] {
            usage.add(&request(key, tokens));
        }
        usage.add(&Known { submitted: None, ..request(Some("b"), 7) });
        let used = |requests, prompt_tokens| Used {
            requests,
            prompt_tokens,
            cached_tokens: requests,
            completion_tokens: 2 * requests,
        };
        assert_eq!(usage.by_key(), BTreeMap::from([("a".to_owned(), used(2, 30)), (OTHER.to_owned(), used(1, 5))]));
        let table = "key,requests,prompt_tokens,cached_tokens,completion_tokens\na,2,30,2,4\nother,1,5,1,2\n";
        assert_eq!(usage.csv(), table);
    }

    #[test]
    fn names_are_bounded_and_none_of_the_counts_is_lost() {
        let usage = Usage::default();
        for number in 0..MOST_NAMES + 50 {
            usage.add(&request(Some(&format!("key-{number}")), 1));
        }
        let keys = usage.by_key();
        assert_eq!(keys.len(), MOST_NAMES);
        assert_eq!(keys.values().map(|used| used.requests).sum::<u64>(), MOST_NAMES as u64 + 50);
        usage.add(&request(Some("key-0"), 1));
        assert_eq!(usage.by_key()["key-0"].requests, 2, "who is known stays known");
    }

    #[test]
    fn counts_go_on_where_the_file_ends_and_a_damaged_file_is_refused() {
        let folder = TempDir::new().unwrap();
        let file = folder.path().join("usage.json");
        let first = Usage::open(file.clone()).unwrap();
        first.add(&request(Some("a"), 3));
        first.save().unwrap();
        let second = Usage::open(file.clone()).unwrap();
        assert_eq!(second.json(), first.json());
        second.add(&request(Some("a"), 4));
        fs::remove_file(&file).unwrap();
        second.save().unwrap();
        second.save().unwrap();
        assert_eq!(Usage::open(file.clone()).unwrap().by_key()["a"].prompt_tokens, 7);
        fs::remove_file(&file).unwrap();
        second.save().unwrap();
        assert!(!file.exists(), "what has not changed is not written again");

        for damaged in ["", "{\"since\":", "{\"since\": 1, \"keys\": {\"a\": {\"requests\": -1}}}"] {
            fs::write(&file, damaged).unwrap();
            let refusal = Usage::open(file.clone()).unwrap_err().to_string();
            assert!(refusal.contains("usage.json") && refusal.contains("move it away"), "{refusal}");
        }
    }
}
