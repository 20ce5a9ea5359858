//! The results of a batch: two files to which whole lines are added, each on disk before it counts.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader, ErrorKind, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::batches::batch::{Batch, Counts};
use crate::batches::input::IdDigest;
use crate::files::{FileInfo, Files, Full, now};
use crate::keys::Owner;
use crate::store::new_id;

/// A line's result.
#[derive(Debug)]
pub(super) enum Outcome {
    /// A reply, whatever its status.
    Reply { status: u16, request_id: String, body: Bytes },
    /// It was not asked, or its reply is not known.
    Unanswered { code: &'static str, message: &'static str },
}

impl Outcome {
    fn is_success(&self) -> bool {
        matches!(self, Self::Reply { status: 200..=299, .. })
    }

    /// The line as OpenAI writes it.
    fn line(self, custom_id: &str) -> Vec<u8> {
        let (response, error) = match self {
            Self::Reply { status, request_id, body } => {
                let body: Value = serde_json::from_slice(&body).unwrap_or_default();
                (json!({"status_code": status, "request_id": request_id, "body": body}), Value::Null)
            }
            Self::Unanswered { code, message } => (Value::Null, json!({"code": code, "message": message})),
        };
        let line = json!({"id": new_id("batch_req_"), "custom_id": custom_id, "response": response, "error": error});
        let mut line = crate::json::write(&line);
        line.push(b'\n');
        line
    }
}

/// Both files, and which lines they have.
pub(super) struct Results {
    files: Arc<Files>,
    output: Appended,
    errors: Appended,
    done: HashSet<IdDigest>,
}

/// A file that grows by lines.
struct Appended {
    id: String,
    file: File,
    /// Bytes of whole lines.
    bytes: u64,
    lines: u64,
}

#[derive(Deserialize)]
struct Written {
    custom_id: String,
}

impl Results {
    /// What a batch has so far. A last line that was cut off never counted.
    pub fn open(files: Arc<Files>, batch: &Batch) -> io::Result<Self> {
        let mut done = HashSet::new();
        let output = Appended::open(&files, &batch.output_file_id, &mut done)?;
        let errors = Appended::open(&files, &batch.error_file_id, &mut done)?;
        Ok(Self { files, output, errors, done })
    }

    /// How many lines have a result.
    pub fn counts(&self, total: u64) -> Counts {
        Counts { total, completed: self.output.lines, failed: self.errors.lines }
    }

    /// Whether a line has its result.
    pub fn has(&self, custom_id: &str) -> bool {
        self.done.contains(&IdDigest::of(custom_id))
    }

    /// Adds a line's result; it is on disk when this returns.
    pub fn add(&mut self, custom_id: &str, outcome: Outcome) -> io::Result<()> {
        let to = if outcome.is_success() { &mut self.output } else { &mut self.errors };
        let line = outcome.line(custom_id);
        self.files.reserve(line.len() as u64).map_err(|Full| io::Error::new(ErrorKind::QuotaExceeded, Full))?;
        to.append(&line).inspect_err(|_| self.files.release(line.len() as u64))?;
        self.done.insert(IdDigest::of(custom_id));
        Ok(())
    }

    /// Lets the files exist, those that have lines, for the owner of the batch.
    pub fn publish(&self, batch_id: &str, batch: &Batch, owner: Owner) -> io::Result<()> {
        for (file, name) in [(&self.output, "output"), (&self.errors, "error")] {
            if file.lines == 0 {
                std::fs::remove_file(self.files.data(&file.id))?;
                continue;
            }
            let created_at = now();
            let info = FileInfo {
                bytes: file.bytes,
                created_at,
                expires_at: batch.results_expire_after.map(|seconds| created_at + seconds),
                filename: format!("{batch_id}_{name}.jsonl"),
                purpose: "batch_output".to_owned(),
            };
            self.files.publish(&file.id, owner, info)?;
        }
        Ok(())
    }
}

impl Appended {
    fn open(files: &Files, id: &str, done: &mut HashSet<IdDigest>) -> io::Result<Self> {
        let options = || File::options().read(true).write(true).create(true).mode(0o600).clone();
        let mut file = options().open(files.data(id))?;
        let (mut bytes, mut lines, mut line) = (0, 0, Vec::new());
        let mut reader = BufReader::new(&file);
        while reader.read_until(b'\n', &mut line)? > 0 && line.ends_with(b"\n") {
            let written: Written = serde_json::from_slice(&line)?;
            done.insert(IdDigest::of(&written.custom_id));
            bytes += line.len() as u64;
            lines += 1;
            line.clear();
        }
        let found = file.metadata()?.len();
        if bytes < found {
            file.set_len(bytes)?;
            file.sync_all()?;
            files.release(found - bytes);
        }
        file.seek(SeekFrom::Start(bytes))?;
        Ok(Self { id: id.to_owned(), file, bytes, lines })
    }

    fn append(&mut self, line: &[u8]) -> io::Result<()> {
        let written = self.file.write_all(line).and_then(|()| self.file.sync_data());
        if let Err(error) = written {
            // Half a line must not stand before the next one.
            self.file.set_len(self.bytes).and_then(|()| self.file.seek(SeekFrom::Start(self.bytes))).ok();
            return Err(error);
        }
        self.bytes += line.len() as u64;
        self.lines += 1;
        Ok(())
    }
}
