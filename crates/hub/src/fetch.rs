//! From a listing to blobs: several files at once, each resumed where it stopped, checked, synced, then renamed.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread,
};

use sha1::Sha1;
use sha2::{Digest, Sha256};
use ureq::http::header;

use crate::{
    Event, HubError, Options, Progress,
    cache::{Fetched, Folder, SMALL_BYTES, sync_folder},
    client::{self, Client},
    directory,
    error::at,
    listing::RemoteFile,
};

const BUFFER_BYTES: usize = 256 << 10;
/// A connection that brought this much did well, and failures are counted anew.
const PROGRESS_BYTES: u64 = 1 << 20;

/// Fetches the files that the cache lacks, and gives all of them with their digests, and the bytes that came.
pub(crate) struct Fetch<'a> {
    pub(crate) client: &'a Client<'a>,
    pub(crate) folder: &'a Folder,
    pub(crate) options: &'a Options,
    pub(crate) progress: &'a Progress<'a>,
}

impl Fetch<'_> {
    /// All of `files`, in order, and how many bytes were not there before.
    pub(crate) fn all(&self, commit: &str, files: &[RemoteFile]) -> Result<(Vec<Fetched>, u64), HubError> {
        let blobs = self.folder.create()?;
        let present: Vec<Option<String>> = files.iter().map(|f| self.present(f)).collect::<Result<_, _>>()?;
        let absent = || files.iter().zip(&present).filter(|(_, digest)| digest.is_none()).map(|(file, _)| file);
        let needed: u64 = absent().map(|f| f.size - self.partial_bytes(f)).fold(0, u64::saturating_add);
        let free = at(&blobs, (self.options.free_space)(&blobs))?;
        if needed > free {
            return Err(HubError::Space { needed, free, path: blobs });
        }
        let size = files.iter().map(|f| f.size).fold(0, u64::saturating_add);
        let present_bytes = size.saturating_sub(needed);
        (self.progress)(Event::Listed { commit, files: files.len(), size, present: present_bytes });

        let mut queue: Vec<&RemoteFile> = absent().collect();
        queue.sort_by_key(|f| std::cmp::Reverse(f.size));
        let run = Run { stop: AtomicBool::new(false), here: AtomicU64::new(present_bytes) };
        let mut digests: BTreeMap<String, String> = self.parallel(&queue, &run)?.into_iter().collect();
        at(&blobs, sync_folder(&blobs))?;
        let fetched = files.iter().zip(present).map(|(file, present)| {
            let sha256 = present.or_else(|| digests.remove(&file.name)).expect("present or fetched");
            Fetched { name: file.name.clone(), size: file.size, sha256 }
        });
        Ok((fetched.collect(), needed))
    }

    /// The digest of a blob that need not be fetched. Without a published digest a small file is always fetched again.
    fn present(&self, file: &RemoteFile) -> Result<Option<String>, HubError> {
        let path = self.folder.blob(&file.blob);
        if !fs::metadata(&path).is_ok_and(|m| m.is_file() && m.len() == file.size) {
            return Ok(None);
        }
        let small = file.size <= SMALL_BYTES;
        match &file.sha256 {
            Some(published) if small => Ok((at(&path, sha256(&path))? == *published).then(|| published.clone())),
            Some(published) => Ok(Some(published.clone())),
            None if small => Ok(None),
            None => at(&path, sha256(&path)).map(Some),
        }
    }

    fn incomplete(&self, file: &RemoteFile) -> PathBuf {
        self.folder.blob(&format!("{}.incomplete", file.blob))
    }

    fn partial_bytes(&self, file: &RemoteFile) -> u64 {
        let len = fs::metadata(self.incomplete(file)).map_or(0, |m| m.len());
        if file.can_resume() && len <= file.size { len } else { 0 }
    }

    /// Names and digests, in any order. The first failure stops the others.
    fn parallel(&self, queue: &[&RemoteFile], run: &Run) -> Result<Vec<(String, String)>, HubError> {
        let next = AtomicUsize::new(0);
        let results = Mutex::new(Ok(Vec::new()));
        let work = || {
            while let Some(file) = queue.get(next.fetch_add(1, Ordering::Relaxed)) {
                let result = self.one(file, run);
                let mut results = results.lock().unwrap_or_else(PoisonError::into_inner);
                match (result, &mut *results) {
                    (Ok(digest), Ok(done)) => done.push((file.name.clone(), digest)),
                    (Err(error), Ok(_)) => {
                        run.stop.store(true, Ordering::Relaxed);
                        *results = Err(error);
                        return;
                    }
                    (_, Err(_)) => return,
                }
            }
        };
        thread::scope(|scope| {
            for _ in 0..self.options.parallel.clamp(1, queue.len().max(1)) {
                scope.spawn(work);
            }
        });
        results.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    /// One file, until it is a blob; its digest.
    fn one(&self, file: &RemoteFile, run: &Run) -> Result<String, HubError> {
        // Held against other tools, which use the same name for the same bytes.
        let _lock = self.folder.lock(&file.blob, self.progress)?;
        if let Some(digest) = self.present(file)? {
            return Ok(digest); // one of them, or an equal file of this checkpoint, was here first
        }
        let path = self.incomplete(file);
        let mut partial = Partial::open(&path, if file.can_resume() { file.size } else { 0 }, &run.here)?;
        let mut retry = self.client.retry();
        while partial.len < file.size {
            let before = partial.len;
            match self.stream(file, &mut partial, run) {
                Ok(()) => {}
                Err(error) => {
                    if partial.len.saturating_sub(before) >= PROGRESS_BYTES {
                        retry.progressed();
                    }
                    retry.wait(&file.name, error)?;
                }
            }
        }
        let digest = hex(partial.hasher);
        let mut digests = vec![(file.sha256.as_deref(), digest.clone())];
        if let Some(id) = file.git_id() {
            digests.push((Some(id), at(&path, git_id(&path, file.size))?));
        }
        let wrong =
            digests.into_iter().find_map(|(expected, actual)| Some((expected.filter(|e| **e != actual)?, actual)));
        if let Some((expected, actual)) = wrong {
            at(&path, fs::remove_file(&path))?;
            return Err(HubError::Digest { file: file.name.clone(), expected: expected.into(), actual });
        }
        at(&path, partial.file.sync_all())?;
        at(&path, fs::rename(&path, self.folder.blob(&file.blob)))?;
        Ok(digest)
    }

    /// One request: appends what comes, up to the file's end.
    fn stream(&self, file: &RemoteFile, partial: &mut Partial<'_>, run: &Run) -> Result<(), HubError> {
        let response = self.client.get(&file.url, partial.len)?;
        let wrong_size = |actual| match actual {
            Some(0) => HubError::Empty { file: file.name.clone() },
            actual => HubError::Size { file: file.name.clone(), expected: file.size, actual },
        };
        if file.validator.is_some() && directory::validator(&response) != file.validator {
            return Err(HubError::Changed { file: file.name.clone() });
        }
        if client::text(&response, header::CONTENT_ENCODING).is_some_and(|e| e != "identity") {
            let reason = "the server compresses, though it was asked not to".into();
            return Err(HubError::Answer { url: crate::error::shown(&file.url), reason });
        }
        if response.status() == 206 {
            let range = client::text(&response, header::CONTENT_RANGE).and_then(parse_content_range);
            match range {
                Some((start, total)) if start == partial.len => {
                    if total.is_some_and(|total| total != file.size) {
                        return Err(wrong_size(total));
                    }
                }
                _ => return Err(self.start_over(file, partial)),
            }
        } else if response.status() == 200 {
            // Also an answer to a range that the server does not know: the file comes from its beginning.
            partial.restart()?;
            let length = client::content_length(&response);
            if length.is_some_and(|length| length != file.size) {
                return Err(wrong_size(length));
            }
        } else {
            return Err(self.start_over(file, partial));
        }
        let mut body = response.into_body().into_reader();
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            if run.stop.load(Ordering::Relaxed) {
                return Err(HubError::Stopped);
            }
            let n = match body.read(&mut buffer) {
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => 0,
                Err(e) => return Err(self.client.failure(&file.url, e.into())),
            };
            if n == 0 && partial.len == file.size {
                return Ok(());
            }
            if n == 0 {
                return Err(HubError::CutOff { file: file.name.clone(), got: partial.len, size: file.size });
            }
            if n as u64 > file.size - partial.len {
                partial.restart()?;
                return Err(wrong_size(None));
            }
            partial.append(&buffer[..n])?;
            (self.progress)(Event::Bytes {
                file: &file.name,
                done: partial.len,
                size: file.size,
                all_done: run.here.load(Ordering::Relaxed),
            });
        }
    }

    /// After an answer that does not fit what is here: the next request asks for everything.
    fn start_over(&self, file: &RemoteFile, partial: &mut Partial<'_>) -> HubError {
        let got = partial.len;
        match partial.restart() {
            Ok(()) => HubError::CutOff { file: file.name.clone(), got, size: file.size },
            Err(error) => error,
        }
    }
}

/// What the threads of a pull share.
struct Run {
    /// A file failed: the others end too.
    stop: AtomicBool,
    /// Bytes of all files that are here.
    here: AtomicU64,
}

/// A file that grows, and the digest of what it holds.
struct Partial<'a> {
    path: PathBuf,
    file: File,
    hasher: Sha256,
    len: u64,
    /// Follows the length of this file and others.
    here: &'a AtomicU64,
}

impl<'a> Partial<'a> {
    /// Opens what an earlier run left, unless that is longer than `keep` bytes. What it keeps is in `here` already.
    fn open(path: &Path, keep: u64, here: &'a AtomicU64) -> Result<Self, HubError> {
        let file = at(path, File::options().create(true).truncate(false).read(true).write(true).open(path))?;
        let mut partial = Partial { path: path.into(), file, hasher: Sha256::new(), len: 0, here };
        let len = at(path, partial.file.metadata())?.len();
        if len > keep {
            partial.restart()?;
        } else {
            partial.len = at(path, hash(&mut partial.file, &mut partial.hasher))?;
        }
        Ok(partial)
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), HubError> {
        at(&self.path, self.file.write_all(bytes))?;
        self.hasher.update(bytes);
        self.len += bytes.len() as u64;
        self.here.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn restart(&mut self) -> Result<(), HubError> {
        at(&self.path, self.file.set_len(0))?;
        at(&self.path, self.file.seek(SeekFrom::Start(0)))?;
        self.hasher = Sha256::new();
        self.here.fetch_sub(self.len, Ordering::Relaxed);
        self.len = 0;
        Ok(())
    }
}

/// Hashes a file from where it stands to its end.
fn hash(file: &mut File, hasher: &mut impl Digest) -> io::Result<u64> {
    let (mut buffer, mut len) = (vec![0; BUFFER_BYTES], 0);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(len),
            n => {
                hasher.update(&buffer[..n]);
                len += n as u64;
            }
        }
    }
}

/// The SHA-256 of a file.
pub(crate) fn sha256(path: &Path) -> io::Result<String> {
    let mut hasher = Sha256::new();
    hash(&mut File::open(path)?, &mut hasher)?;
    Ok(hex(hasher))
}

/// What git calls a file of these bytes.
fn git_id(path: &Path, size: u64) -> io::Result<String> {
    let mut hasher = Sha1::new_with_prefix(format!("blob {size}\0"));
    hash(&mut File::open(path)?, &mut hasher)?;
    Ok(hex(hasher))
}

/// The digest in lower-case hexadecimal digits.
pub(crate) fn hex(hasher: impl Digest) -> String {
    hasher.finalize().iter().fold(String::with_capacity(64), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a String takes all");
        text
    })
}

/// Start and total of `bytes START-END/TOTAL`; the total may be `*`. Nothing unless they make sense together.
fn parse_content_range(value: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = value.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (start, end) = range.split_once('-')?;
    let (start, end): (u64, u64) = (start.parse().ok()?, end.parse().ok()?);
    let total = if total == "*" { None } else { Some(total.parse().ok()?) };
    (start <= end && total.is_none_or(|total| end < total)).then_some((start, total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_content_range_is_taken_only_if_it_makes_sense() {
        assert_eq!(parse_content_range("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(parse_content_range("bytes 0-0/*"), Some((0, None)));
        for value in ["", "bytes", "bytes 5-4/10", "bytes 5-10/10", "bytes */10", "lines 1-2/3", "bytes -1-2/3"] {
            assert_eq!(parse_content_range(value), None, "{value:?}");
        }
    }

    #[test]
    fn files_have_the_ids_that_git_gives_them() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(git_id(file.path(), 0).unwrap(), "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391");
        fs::write(file.path(), "hello\n").unwrap();
        assert_eq!(git_id(file.path(), 6).unwrap(), "ce013625030ba8dba906f756967f9e9ca394464a");
    }

    #[test]
    fn a_partial_file_hashes_what_it_keeps_and_drops_what_is_too_long() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        fs::write(&path, b"abc").unwrap();
        let here = AtomicU64::new(3);
        let mut kept = Partial::open(&path, 6, &here).unwrap();
        kept.append(b"def").unwrap();
        assert_eq!(here.load(Ordering::Relaxed), 6);
        assert_eq!((kept.len, hex(kept.hasher)), (6, hex(Sha256::new_with_prefix("abcdef"))));
        assert_eq!(fs::read(&path).unwrap(), b"abcdef");
        let dropped = Partial::open(&path, 5, &here).unwrap();
        assert_eq!((dropped.len, fs::read(&path).unwrap().len()), (0, 0));
    }
}
