//! Tensor by tensor: which ones of the safetensors files are not those of the manifest, and what became of them.
//!
//! Digests of files say that something changed; digests of tensors still say what, when those of the files were made anew.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use serde::Deserialize;
use serde_json::Value;

use crate::bundle::{FileProblem, PIECE, digest, in_parallel};
use crate::manifest::TensorEntry;
use crate::place::Opened;
use crate::strict::{self, shown};
use crate::{Bundle, Digest};

/// Longest header that is read, as by whoever loads it.
const MAX_HEADER: u64 = 32 << 20;
/// Largest matrix that is transposed to see whether that is what happened to it, in bytes.
const MAX_TRANSPOSED: u64 = 1 << 30;
/// Rows and columns that are transposed at once: a block of them stays in the cache.
const BLOCK: usize = 64;

/// What is wrong with a tensor.
#[derive(Debug, thiserror::Error)]
pub enum TensorProblem {
    /// A file of tensors that cannot be read.
    #[error(transparent)]
    File(#[from] FileProblem),
    /// A file whose header is none.
    #[error("{name} is not a safetensors file: {reason}")]
    Damaged {
        /// The file.
        name: String,
        /// What is wrong with its header.
        reason: String,
    },
    /// Listed, and in no file.
    #[error("tensor {name} is missing")]
    Missing {
        /// The tensor.
        name: String,
    },
    /// In a file, and not listed.
    #[error("tensor {name} is not listed")]
    Extra {
        /// The tensor.
        name: String,
    },
    /// In two files.
    #[error("tensor {name} is in two files")]
    Twice {
        /// The tensor.
        name: String,
    },
    /// Of another element type or shape.
    #[error("tensor {name} is {found}; expected {expected}")]
    Form {
        /// The tensor.
        name: String,
        /// Element type and shape in the manifest.
        expected: String,
        /// Element type and shape in the file.
        found: String,
    },
    /// Each has the other's content.
    #[error("tensors {name} and {with} are swapped")]
    Swapped {
        /// The tensor.
        name: String,
        /// The other one.
        with: String,
    },
    /// With the content of another one.
    #[error("tensor {name} has the content of {of}")]
    Misplaced {
        /// The tensor.
        name: String,
        /// The other one.
        of: String,
    },
    /// A matrix whose rows and columns changed places.
    #[error("tensor {name} is transposed")]
    Transposed {
        /// The tensor.
        name: String,
    },
    /// With content that nothing explains.
    #[error("tensor {name} has SHA-256 {found}; expected {expected}")]
    Digest {
        /// The tensor.
        name: String,
        /// In the manifest.
        expected: Digest,
        /// Of its bytes.
        found: Digest,
    },
}

impl TensorProblem {
    /// The tensor, or the file, that it is about.
    pub fn name(&self) -> &str {
        match self {
            Self::File(problem) => problem.name(),
            Self::Damaged { name, .. }
            | Self::Missing { name }
            | Self::Extra { name }
            | Self::Twice { name }
            | Self::Form { name, .. }
            | Self::Swapped { name, .. }
            | Self::Misplaced { name, .. }
            | Self::Transposed { name }
            | Self::Digest { name, .. } => name,
        }
    }
}

/// A tensor of a file.
struct Stored<'a> {
    file: &'a Opened,
    file_name: &'a str,
    dtype: String,
    shape: Vec<u64>,
    /// Counted from the start of the file.
    offset: u64,
    bytes: u64,
}

impl Bundle {
    /// Compares the tensors of the safetensors files with those of the manifest, in a pass of its own; nothing is
    /// compared if it lists none. `progress` gets the bytes hashed since it was last called, from several threads.
    pub fn verify_tensors(&self, progress: &(dyn Fn(u64) + Sync)) -> Vec<TensorProblem> {
        let expected = &self.manifest().tensors;
        if expected.is_empty() {
            return Vec::new();
        }
        let mut problems = Vec::new();
        let files = self.safetensors(&mut problems);
        let mut stored = BTreeMap::new();
        for (file_name, file) in &files {
            match tensors(file_name, file) {
                Ok(tensors) => {
                    for (name, tensor) in tensors {
                        if stored.insert(name.clone(), tensor).is_some() {
                            problems.push(TensorProblem::Twice { name });
                        }
                    }
                }
                Err(problem) => problems.push(problem),
            }
        }
        let missing = expected.keys().filter(|name| !stored.contains_key(*name));
        problems.extend(missing.map(|name| TensorProblem::Missing { name: name.clone() }));
        let extra = stored.keys().filter(|name| !expected.contains_key(*name));
        problems.extend(extra.map(|name| TensorProblem::Extra { name: name.clone() }));
        problems.extend(differences(expected, &stored, progress));
        problems.sort_by(|a, b| a.name().cmp(b.name()));
        problems
    }

    fn safetensors(&self, problems: &mut Vec<TensorProblem>) -> Vec<(&str, Opened)> {
        let names = self.manifest().files.keys().filter(|name| name.ends_with(".safetensors"));
        let mut opened = Vec::new();
        for name in names {
            match self.place.open(name) {
                Ok(Some(file)) => opened.push((name.as_str(), file)),
                Ok(None) => problems.push(FileProblem::Missing { name: name.clone() }.into()),
                Err(problem) => problems.push(problem.into()),
            }
        }
        opened
    }
}

/// Hashes the tensors that are expected, and explains those that differ.
fn differences(
    expected: &BTreeMap<String, TensorEntry>,
    stored: &BTreeMap<String, Stored<'_>>,
    progress: &(dyn Fn(u64) + Sync),
) -> Vec<TensorProblem> {
    let pairs: Vec<_> = expected.iter().filter_map(|(name, entry)| Some((name, entry, stored.get(name)?))).collect();
    let found = in_parallel(&pairs, |(name, entry, tensor), buffer| {
        let io = |error| TensorProblem::File(FileProblem::io(tensor.file_name, error));
        let found = digest(tensor.file, tensor.offset, tensor.bytes, buffer, progress).map_err(io);
        let wrong = |found| found != entry.sha256 || tensor.dtype != entry.dtype || tensor.shape != entry.shape;
        match found {
            Ok(found) => wrong(found).then_some(Ok((*name, found))),
            Err(problem) => Some(Err(problem)),
        }
    });
    let mut problems = Vec::new();
    let mut differing = BTreeMap::new();
    for result in found {
        match result {
            Ok((name, found)) => _ = differing.insert(name, found),
            Err(problem) => problems.push(problem),
        }
    }
    if differing.is_empty() {
        return problems;
    }
    // Where a content belongs, among tensors of one form; of several places one that lacks it.
    let (right, wrong): (Vec<_>, Vec<_>) = expected.iter().partition(|(name, _)| !differing.contains_key(name));
    let homes: BTreeMap<_, _> = right
        .into_iter()
        .chain(wrong)
        .map(|(name, entry)| ((entry.sha256, entry.dtype.as_str(), entry.shape.as_slice()), name))
        .collect();
    let mut explained = BTreeSet::new();
    for (name, found) in &differing {
        let (entry, tensor) = (&expected[*name], &stored[*name]);
        let other = homes.get(&(*found, tensor.dtype.as_str(), tensor.shape.as_slice())).filter(|other| *other != name);
        let back = other.is_some_and(|other| differing.get(other) == Some(&entry.sha256));
        let name = (*name).clone();
        problems.push(match other {
            _ if explained.contains(&name) => continue,
            Some(with) if back => {
                explained.insert((*with).clone());
                TensorProblem::Swapped { name, with: (*with).clone() }
            }
            _ if is_transposed(entry, tensor) => TensorProblem::Transposed { name },
            _ if tensor.dtype != entry.dtype || tensor.shape != entry.shape => TensorProblem::Form {
                name,
                expected: format!("{} {:?}", entry.dtype, entry.shape),
                found: format!("{} {:?}", tensor.dtype, tensor.shape),
            },
            Some(of) => TensorProblem::Misplaced { name, of: (*of).clone() },
            None => TensorProblem::Digest { name, expected: entry.sha256, found: *found },
        });
    }
    problems
}

/// Whether the file holds the columns of the expected matrix where its rows should be, whatever shape it says.
fn is_transposed(entry: &TensorEntry, tensor: &Stored<'_>) -> bool {
    let &[rows, columns] = entry.shape.as_slice() else { return false };
    let mut shape = tensor.shape.clone();
    shape.sort_unstable();
    let same = tensor.dtype == entry.dtype && shape == [rows.min(columns), rows.max(columns)];
    // A tensor without bytes could claim any number of elements.
    let whole = rows.checked_mul(columns).is_some_and(|n| n > 0 && tensor.bytes >= n && tensor.bytes.is_multiple_of(n));
    if !same || !whole || rows < 2 || columns < 2 || tensor.bytes > MAX_TRANSPOSED {
        return false;
    }
    let mut content = vec![0; tensor.bytes as usize];
    if tensor.file.read_exact_at(&mut content, tensor.offset).is_err() {
        return false;
    }
    Digest::of(&transpose(&content, columns as usize, rows as usize)) == entry.sha256
}

/// The transposed of a row-major matrix `[rows, columns]`.
fn transpose(matrix: &[u8], rows: usize, columns: usize) -> Vec<u8> {
    let size = matrix.len() / (rows * columns);
    let mut out = vec![0; matrix.len()];
    for (first_row, first_column) in
        (0..rows).step_by(BLOCK).flat_map(|r| (0..columns).step_by(BLOCK).map(move |c| (r, c)))
    {
        for row in first_row..rows.min(first_row + BLOCK) {
            for column in first_column..columns.min(first_column + BLOCK) {
                let (from, to) = ((row * columns + column) * size, (column * rows + row) * size);
                out[to..to + size].copy_from_slice(&matrix[from..from + size]);
            }
        }
    }
    out
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The header of a safetensors file. Only what hashing relies on is checked; the rest is for whoever loads it.
fn tensors<'a>(name: &'a str, file: &'a Opened) -> Result<Vec<(String, Stored<'a>)>, TensorProblem> {
    let damaged = |reason: String| TensorProblem::Damaged { name: name.into(), reason };
    let io = |error: io::Error| TensorProblem::File(FileProblem::io(name, error));
    let bytes = file.identity.bytes;
    let mut prefix = [0; 8];
    if bytes < prefix.len() as u64 {
        return Err(damaged(format!("it has {bytes} bytes")));
    }
    file.read_exact_at(&mut prefix, 0).map_err(io)?;
    let length = u64::from_le_bytes(prefix);
    let rest = (bytes - 8).checked_sub(length).filter(|_| length <= MAX_HEADER);
    let Some(rest) = rest else { return Err(damaged(format!("its header claims {length} bytes"))) };
    let mut header = vec![0; length as usize];
    for (piece, offset) in header.chunks_mut(PIECE).zip((8..).step_by(PIECE)) {
        file.read_exact_at(piece, offset).map_err(io)?;
    }
    strict::bound_values(&header).map_err(damaged)?;
    let mut json = serde_json::Deserializer::from_slice(&header);
    let raw: BTreeMap<String, Value> = strict::distinct(&mut json)
        .and_then(|raw| json.end().map(|()| raw))
        .map_err(|e| damaged(shown(&e.to_string())))?;
    let raw = raw.into_iter().filter(|(name, _)| name != "__metadata__");
    // Ranges that overlap could make a small file cost any number of passes.
    let mut left = rest;
    raw.map(|(tensor, value)| {
        let RawTensor { dtype, shape, data_offsets: (from, to) } =
            serde_json::from_value(value).map_err(|e| damaged(format!("tensor {}: {e}", shown(&tensor))))?;
        let range = to.checked_sub(from).filter(|_| to <= rest);
        let Some((bytes, after)) = range.and_then(|bytes| Some((bytes, left.checked_sub(bytes)?))) else {
            return Err(damaged(format!("tensor {} has bytes {from}..{to} of {rest}", shown(&tensor))));
        };
        left = after;
        Ok((tensor, Stored { file, file_name: name, dtype, shape, offset: 8 + length + from, bytes }))
    })
    .collect()
}
