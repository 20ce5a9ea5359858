//! A bundle's files against its manifest: nothing missing, nothing more, and every byte as it was handed over.
//!
//! Invariant: a [`Snapshot`] holds the state that each file had before it was hashed, of the descriptor that was hashed. So
//! whoever reads the files afterwards, and finds the snapshot [unchanged](Snapshot::unchanged), has read what was checked.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use baton_model::Files;
use sha2::{Digest as _, Sha256};

use crate::manifest::FileEntry;
use crate::place::{Identity, Opened, Place};
use crate::{Digest, MANIFEST, MAX_MANIFEST, Manifest, ManifestError, SIGNATURE, SignatureStatus, TrustedKeys};

/// Bytes read at once: large, since files are; and one buffer a thread.
pub(crate) const PIECE: usize = 1 << 20;
/// Threads that hash: more only wait for the disk.
const MAX_THREADS: usize = 16;
/// Longest signature file that is read; minisign's own are a few hundred bytes.
const MAX_SIGNATURE: u64 = 16 << 10;

/// What is wrong with a file of a bundle.
#[derive(Debug, thiserror::Error)]
pub enum FileProblem {
    /// Listed, and not there.
    #[error("{name} is missing")]
    Missing {
        /// The file.
        name: String,
    },
    /// There, and not listed.
    #[error("{name} is not listed in {MANIFEST}")]
    Extra {
        /// The file.
        name: String,
    },
    /// A link that is not the hub cache's own.
    #[error("{name} is a link to \"{target}\"; only files, and the hub cache's links to its blobs, are read")]
    Link {
        /// The file.
        name: String,
        /// Where it leads.
        target: String,
    },
    /// Neither a file nor, where one can be, a folder.
    #[error("{name} is {kind}, not a file")]
    NotRegular {
        /// The file.
        name: String,
        /// What it is.
        kind: &'static str,
    },
    /// A name that no manifest could list.
    #[error("the file name \"{name}\" {reason}")]
    Name {
        /// The name, shortened and escaped.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Without content, and should have some.
    #[error("{name} is empty, often a failed download; expected {expected} bytes")]
    Empty {
        /// The file.
        name: String,
        /// Its length in the manifest.
        expected: u64,
    },
    /// Of another length.
    #[error("{name} has {found} bytes; expected {expected}")]
    Size {
        /// The file.
        name: String,
        /// Its length in the manifest.
        expected: u64,
        /// Its length.
        found: u64,
    },
    /// Of the same length, and other content.
    #[error("{name} has SHA-256 {found}; expected {expected}")]
    Digest {
        /// The file.
        name: String,
        /// In the manifest.
        expected: Digest,
        /// Of its content.
        found: Digest,
    },
    /// Written, replaced, added or removed meanwhile.
    #[error("{name} changed while the bundle was read")]
    Changed {
        /// The file.
        name: String,
    },
    /// More than is ever needed.
    #[error("the folder has more than {limit} entries")]
    TooMany {
        /// The folder.
        name: String,
        /// The limit.
        limit: usize,
    },
    /// The system refused.
    #[error("{name} cannot be read: {source}")]
    Io {
        /// The file.
        name: String,
        /// The system's reason.
        source: io::Error,
    },
}

impl FileProblem {
    pub(crate) fn io(name: &str, source: io::Error) -> Self {
        let name = name.to_owned();
        // A file that ends early was cut since its length was asked for.
        if source.kind() == io::ErrorKind::UnexpectedEof { Self::Changed { name } } else { Self::Io { name, source } }
    }

    /// The file that it is about; `.` is the folder itself.
    pub fn name(&self) -> &str {
        match self {
            Self::Missing { name }
            | Self::Extra { name }
            | Self::Link { name, .. }
            | Self::NotRegular { name, .. }
            | Self::Name { name, .. }
            | Self::Empty { name, .. }
            | Self::Size { name, .. }
            | Self::Digest { name, .. }
            | Self::Changed { name }
            | Self::TooMany { name, .. }
            | Self::Io { name, .. } => name,
        }
    }
}

/// Why a bundle cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// Its folder.
    #[error("the bundle's folder cannot be read: {0}")]
    Folder(io::Error),
    /// The manifest or its signature as a file.
    #[error(transparent)]
    File(#[from] FileProblem),
    /// What the manifest says.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
}

/// A checkpoint with its manifest.
#[derive(Debug)]
pub struct Bundle {
    pub(crate) place: Arc<Place>,
    manifest: Manifest,
    json: Vec<u8>,
    signature: Option<Vec<u8>>,
    /// Of the manifest and the signature, as they were read.
    read: BTreeMap<String, Identity>,
}

/// What the files of a bundle are.
#[derive(Debug)]
pub struct Integrity {
    /// Everything that is not as the manifest has it, by name; empty if the files are what was handed over.
    pub problems: Vec<FileProblem>,
    /// The files as they were hashed.
    pub snapshot: Snapshot,
}

/// The state of all files at one time.
#[derive(Debug, Clone)]
pub struct Snapshot {
    place: Arc<Place>,
    files: BTreeMap<String, Identity>,
    /// Names of whatever else was there.
    odd: BTreeSet<String>,
}

impl Bundle {
    /// Reads the manifest beside a checkpoint's files; `None` if there is none.
    ///
    /// # Errors
    /// A folder, manifest or signature that cannot be read, and a manifest that breaks the format.
    pub fn open(files: &Files) -> Result<Option<Self>, BundleError> {
        let place = Place::of(files).map_err(BundleError::Folder)?;
        let mut read = BTreeMap::new();
        let Some(json) = small(&place, MANIFEST, MAX_MANIFEST, &mut read)? else { return Ok(None) };
        let manifest = Manifest::parse(&json)?;
        let signature = small(&place, SIGNATURE, MAX_SIGNATURE, &mut read)?;
        Ok(Some(Self { place: Arc::new(place), manifest, json, signature, read }))
    }

    /// What was handed over, as it claims.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Of the manifest itself, golden cases and tolerances included.
    pub fn manifest_digest(&self) -> Digest {
        Digest::of(&self.json)
    }

    /// Whether a trusted key signed the manifest.
    pub fn signature(&self, keys: &TrustedKeys) -> SignatureStatus {
        keys.check(&self.json, self.signature.as_deref())
    }

    /// Compares all files with the manifest. `progress` gets the bytes hashed since it was last called, from several
    /// threads; at the end [`Manifest::total_bytes`] in all, if every file has its length.
    pub fn verify_files(&self, progress: &(dyn Fn(u64) + Sync)) -> Integrity {
        let (found, mut problems) = self.place.scan();
        let odd: BTreeSet<String> = problems.iter().map(|problem| problem.name().to_owned()).collect();
        let mut right_size = Vec::new();
        for (name, entry) in &self.manifest.files {
            match found.get(name) {
                Some(identity) if identity.bytes == entry.bytes => right_size.push((name.as_str(), entry, *identity)),
                Some(identity) => problems.push(wrong_size(name, entry.bytes, identity.bytes)),
                None if odd.contains(name) => {}
                None => problems.push(FileProblem::Missing { name: name.clone() }),
            }
        }
        let own = [MANIFEST, SIGNATURE];
        let rewritten = own.into_iter().filter(|name| found.get(*name) != self.read.get(*name));
        problems.extend(rewritten.map(|name| FileProblem::Changed { name: name.into() }));
        let extra =
            found.keys().filter(|name| !own.contains(&name.as_str()) && !self.manifest.files.contains_key(*name));
        problems.extend(extra.map(|name| FileProblem::Extra { name: name.clone() }));
        // The largest first, so that the last thread is not left alone with it.
        right_size.sort_by_key(|(_, entry, _)| std::cmp::Reverse(entry.bytes));
        problems.extend(in_parallel(&right_size, |(name, entry, identity), buffer| {
            self.compare(name, entry, *identity, buffer, progress).err()
        }));
        problems.sort_by(|a, b| a.name().cmp(b.name()));
        Integrity { problems, snapshot: Snapshot { place: self.place.clone(), files: found, odd } }
    }

    fn compare(
        &self,
        name: &str,
        entry: &FileEntry,
        identity: Identity,
        buffer: &mut [u8],
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<(), FileProblem> {
        let changed = || FileProblem::Changed { name: name.into() };
        let file = self.place.open(name)?.filter(|file| file.identity == identity).ok_or_else(changed)?;
        let found = digest(&file, 0, entry.bytes, buffer, progress).map_err(|error| FileProblem::io(name, error))?;
        if !file.unchanged().map_err(|error| FileProblem::io(name, error))? {
            return Err(changed());
        }
        if found != entry.sha256 {
            return Err(FileProblem::Digest { name: name.into(), expected: entry.sha256, found });
        }
        Ok(())
    }
}

fn wrong_size(name: &str, expected: u64, found: u64) -> FileProblem {
    let name = name.to_owned();
    if found == 0 { FileProblem::Empty { name, expected } } else { FileProblem::Size { name, expected, found } }
}

/// A small file whole, and the state in which it was read.
fn small(
    place: &Place,
    name: &str,
    limit: u64,
    read: &mut BTreeMap<String, Identity>,
) -> Result<Option<Vec<u8>>, BundleError> {
    let Some(file) = place.open(name)? else { return Ok(None) };
    let bytes = file.identity.bytes;
    if bytes > limit {
        return Err(ManifestError::TooLarge { name: name.into(), bytes, limit }.into());
    }
    let mut content = vec![0; bytes as usize];
    file.read_exact_at(&mut content, 0).map_err(|error| FileProblem::io(name, error))?;
    read.insert(name.into(), file.identity);
    Ok(Some(content))
}

/// SHA-256 of a part of a file.
pub(crate) fn digest(
    file: &Opened,
    offset: u64,
    bytes: u64,
    buffer: &mut [u8],
    progress: &(dyn Fn(u64) + Sync),
) -> io::Result<Digest> {
    let mut hasher = Sha256::new();
    file.pieces(offset, bytes, buffer, |piece| {
        hasher.update(piece);
        progress(piece.len() as u64);
    })?;
    Ok(Digest(hasher.finalize().into()))
}

/// Runs work on the cores, each thread with a buffer for reading. What it gives comes in no order.
pub(crate) fn in_parallel<T: Sync, R: Send>(items: &[T], work: impl Fn(&T, &mut [u8]) -> Option<R> + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let threads = thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS).min(items.len());
    thread::scope(|scope| {
        let run = || {
            let mut buffer = vec![0; PIECE];
            let taken = std::iter::from_fn(|| items.get(next.fetch_add(1, Ordering::Relaxed)));
            taken.filter_map(|item| work(item, &mut buffer)).collect::<Vec<_>>()
        };
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap_or_else(|e| std::panic::resume_unwind(e))).collect()
    })
}

impl Snapshot {
    /// Whether every file is still in the state in which it was hashed, reached by the bundle's path again.
    ///
    /// # Errors
    /// What was written, replaced, added or removed since, by name.
    pub fn unchanged(&self) -> Result<(), Vec<FileProblem>> {
        let place = self.place.again().map_err(|error| vec![FileProblem::io(".", error)])?;
        let (found, problems) = place.scan();
        let odd: BTreeSet<String> = problems.iter().map(|problem| problem.name().to_owned()).collect();
        let names: BTreeSet<_> = self.files.keys().chain(found.keys()).collect();
        let written = names.into_iter().filter(|name| self.files.get(*name) != found.get(*name));
        let changed: BTreeSet<_> = written.chain(self.odd.symmetric_difference(&odd)).collect();
        let changed: Vec<_> = changed.into_iter().map(|name| FileProblem::Changed { name: name.clone() }).collect();
        if changed.is_empty() { Ok(()) } else { Err(changed) }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_file_exchanged_between_its_look_and_its_hash_is_refused_though_its_content_is_right() {
        let data = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/signed");
        let folder = tempfile::tempdir().unwrap();
        for name in ["config.json", MANIFEST] {
            fs::copy(format!("{data}/{name}"), folder.path().join(name)).unwrap();
        }
        let bundle = Bundle::open(&Files::Folder(folder.path().into())).unwrap().unwrap();
        let (found, _) = bundle.place.scan();
        let entry = &bundle.manifest.files["config.json"];
        let compare = || bundle.compare("config.json", entry, found["config.json"], &mut [0; 64], &|_| {});
        compare().unwrap();
        fs::copy(format!("{data}/config.json"), folder.path().join("other")).unwrap();
        fs::rename(folder.path().join("other"), folder.path().join("config.json")).unwrap();
        assert!(matches!(compare(), Err(FileProblem::Changed { .. })));
    }
}
