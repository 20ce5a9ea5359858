//! The lines of a batch's input: checked all before the first is answered, then read one by one.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::batches::batch::BatchError;
use crate::error::ApiError;
use crate::fields::Fields;
use crate::json::{self, MAX_VALUES};

/// Lines of an input, as OpenAI has it.
const MAX_LINES: u64 = 50_000;
/// Longest `custom_id`, in bytes.
const MAX_ID_BYTES: usize = 512;
/// Errors that are told.
const MAX_ERRORS: usize = 100;
/// What a line has besides its body, in bytes.
const ENVELOPE_BYTES: usize = 4096;

/// A request of a batch.
#[derive(Debug)]
pub(super) struct Line {
    pub custom_id: String,
    pub body: Map<String, Value>,
}

/// A `custom_id`, for comparing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct IdDigest([u8; 16]);

impl IdDigest {
    pub fn of(custom_id: &str) -> Self {
        let digest: [u8; 32] = Sha256::digest(custom_id).into();
        Self(digest[..16].try_into().expect("half of it"))
    }
}

/// The lines that are left of an input.
pub(super) struct Lines {
    reader: BufReader<File>,
    /// Longest line, in bytes.
    limit: usize,
    /// Lines read, empty ones included.
    number: u64,
}

impl Lines {
    /// The lines of a file. `body_limit`: of each body, in bytes.
    pub fn new(file: File, body_limit: usize) -> Self {
        Self { reader: BufReader::new(file), limit: body_limit.saturating_add(ENVELOPE_BYTES), number: 0 }
    }

    /// The next line that is not empty.
    fn next(&mut self) -> io::Result<Option<Result<Vec<u8>, ApiError>>> {
        loop {
            let mut line = Vec::new();
            let read = Read::by_ref(&mut self.reader).take(self.limit as u64 + 1).read_until(b'\n', &mut line)?;
            if read == 0 {
                return Ok(None);
            }
            self.number += 1;
            if line.pop_if(|last| *last == b'\n').is_none() && read > self.limit {
                return Ok(Some(Err(ApiError::request_too_large(self.limit))));
            }
            if !line.trim_ascii().is_empty() {
                return Ok(Some(Ok(line)));
            }
        }
    }

    /// The next request of an input that has been checked.
    pub fn next_request(&mut self, endpoint: &str) -> io::Result<Option<Line>> {
        match self.next()? {
            None => Ok(None),
            Some(line) => match line.and_then(|line| read(&line, endpoint)) {
                Ok(line) => Ok(Some(line)),
                Err(_) => Err(io::Error::new(io::ErrorKind::InvalidData, "the input of a batch has changed")),
            },
        }
    }
}

/// Checks all lines, and says how many there are, or what is wrong with them.
pub(super) fn check(mut lines: Lines, endpoint: &str) -> io::Result<Result<u64, Vec<BatchError>>> {
    let (mut total, mut seen, mut errors) = (0, HashSet::new(), Vec::new());
    while let Some(line) = lines.next()? {
        total += 1;
        let checked = line.and_then(|line| read(&line, endpoint)).and_then(|line| {
            match seen.insert(IdDigest::of(&line.custom_id)) {
                true => Ok(()),
                false => Err(ApiError::invalid("custom_id", "custom_id must be another one in every line")),
            }
        });
        if let Err(error) = checked {
            errors.push(of_line(&error, lines.number));
        }
        if total > MAX_LINES {
            let message = format!("a batch may have at most {MAX_LINES} lines");
            errors.push(of_line(&ApiError::invalid("input_file_id", message), lines.number));
        }
        if total > MAX_LINES || errors.len() >= MAX_ERRORS {
            break;
        }
    }
    if total == 0 {
        errors.push(BatchError {
            code: "empty_file".into(),
            message: "the input file has no lines".into(),
            param: Some("input_file_id".into()),
            line: None,
        });
    }
    Ok(if errors.is_empty() { Ok(total) } else { Err(errors) })
}

fn of_line(error: &ApiError, number: u64) -> BatchError {
    let (code, message) = (error.code().to_owned(), error.message().to_owned());
    BatchError { code, message, param: error.param().map(str::to_owned), line: Some(number) }
}

fn read(line: &[u8], endpoint: &str) -> Result<Line, ApiError> {
    let mut fields = Fields::new(json::parse_object(line, &mut MAX_VALUES.clone())?);
    let custom_id = fields.string("custom_id")?;
    let custom_id = fields.required("custom_id", custom_id)?;
    if !(1..=MAX_ID_BYTES).contains(&custom_id.len()) {
        return Err(ApiError::out_of_range("custom_id", format!("1 to {MAX_ID_BYTES} bytes long")));
    }
    let method = fields.string("method")?;
    if fields.required("method", method)? != "POST" {
        return Err(ApiError::out_of_range("method", "POST"));
    }
    let url = fields.string("url")?;
    if fields.required("url", url)? != endpoint {
        return Err(ApiError::out_of_range("url", "the endpoint of the batch"));
    }
    let body = fields.object("body")?;
    let body = fields.required("body", body)?.into_rest();
    fields.finish()?;
    Ok(Line { custom_id, body })
}
