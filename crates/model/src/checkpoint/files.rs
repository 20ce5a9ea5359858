//! Where a checkpoint's files lie: a folder, or the binary itself.
//!
//! Names are plain file names, never paths, so nothing outside the folder is reached through a name
//! that a checkpoint brings. (A file of the folder may be a link, as in Hugging Face's cache.)

use std::borrow::Cow;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Deref;
use std::path::{Path, PathBuf};

use memmap2::{Mmap, MmapOptions};

/// The files of a checkpoint.
#[derive(Debug, Clone)]
pub enum Files {
    /// A folder on disk.
    Folder(PathBuf),
    /// A GGUF file on disk; of a split one the first.
    Gguf(PathBuf),
    /// Names and contents, embedded in the binary.
    Embedded(&'static [(&'static str, &'static [u8])]),
}

/// A file that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// No such folder.
    #[error("{} is not a folder with a checkpoint: {reason}", path.display())]
    Folder {
        /// As given by the operator.
        path: PathBuf,
        /// What is there instead.
        reason: String,
    },
    /// No such file.
    #[error("{name} is missing")]
    Missing {
        /// The file.
        name: String,
    },
    /// A file without content: often a download that failed.
    #[error("{name} is empty")]
    Empty {
        /// The file.
        name: String,
    },
    /// A name that is a path, or could be taken for one.
    #[error("{name:?} is not a plain file name")]
    NotPlain {
        /// The name.
        name: String,
    },
    /// More than a file of this kind can be.
    #[error("{name} has {bytes} bytes; at most {limit} are read")]
    TooLarge {
        /// The file.
        name: String,
        /// Its length.
        bytes: u64,
        /// The limit.
        limit: u64,
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

impl Files {
    /// The files of a folder, which must exist.
    pub fn folder(path: impl Into<PathBuf>) -> Result<Self, FileError> {
        let path = path.into();
        match fs::metadata(&path) {
            Ok(meta) if meta.is_dir() => Ok(Files::Folder(path)),
            Ok(_) => Err(FileError::Folder { path, reason: "it is a file".into() }),
            Err(error) => Err(FileError::Folder { path, reason: error.to_string() }),
        }
    }

    /// A `.gguf` file, or else a folder.
    pub fn at(path: impl Into<PathBuf>) -> Result<Self, FileError> {
        let path = path.into();
        let named = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
        if named && path.is_file() { Ok(Files::Gguf(path)) } else { Self::folder(path) }
    }

    /// The names of all files.
    pub fn names(&self) -> Result<Vec<String>, FileError> {
        match self {
            Files::Embedded(files) => Ok(files.iter().map(|(name, _)| (*name).to_owned()).collect()),
            Files::Gguf(path) => Ok(path.file_name().into_iter().map(|n| n.to_string_lossy().into_owned()).collect()),
            Files::Folder(path) => {
                let entries = fs::read_dir(path).and_then(Iterator::collect::<io::Result<Vec<_>>>);
                let entries =
                    entries.map_err(|error| FileError::Folder { path: path.clone(), reason: error.to_string() })?;
                Ok(entries.iter().filter_map(|e| e.file_name().into_string().ok()).collect())
            }
        }
    }

    /// The content of a small file; `None` if there is none of that name.
    pub fn read(&self, name: &str, limit: u64) -> Result<Option<Cow<'static, [u8]>>, FileError> {
        let Some(file) = self.open(name)? else { return Ok(None) };
        let bytes = file.len();
        if bytes == 0 {
            return Err(FileError::Empty { name: name.into() });
        }
        if bytes > limit {
            return Err(FileError::TooLarge { name: name.into(), bytes, limit });
        }
        match file.source {
            Source::Embedded(content) => Ok(Some(content.into())),
            Source::Disk(mut disk, _) => {
                let mut content = Vec::new();
                let read = disk.by_ref().take(limit).read_to_end(&mut content);
                read.map_err(|source| FileError::Io { name: name.into(), source })?;
                Ok(Some(content.into()))
            }
        }
    }

    /// Opens a file for mapping parts of it; `None` if there is none of that name.
    pub(crate) fn open(&self, name: &str) -> Result<Option<OpenFile>, FileError> {
        let plain = !name.is_empty() && Path::new(name).file_name().is_some_and(|f| f == name);
        if !plain || name.contains(['/', '\\', '\0']) {
            return Err(FileError::NotPlain { name: name.chars().take(200).collect() });
        }
        let on_disk = |path: PathBuf| {
            let found = disk_file(&path).map_err(|source| FileError::Io { name: name.into(), source })?;
            Ok::<_, FileError>(found.map(|(file, len)| Source::Disk(file, len)))
        };
        let source = match self {
            Files::Embedded(files) => files.iter().find(|f| f.0 == name).map(|f| Source::Embedded(f.1)),
            // What lies beside a GGUF file is another model's, unless it is another part of a split one.
            Files::Gguf(_) if !name.ends_with(".gguf") => None,
            Files::Folder(folder) => on_disk(folder.join(name))?,
            Files::Gguf(path) => on_disk(path.with_file_name(name))?,
        };
        Ok(source.map(|source| OpenFile { name: name.into(), source }))
    }
}

/// Opens a regular file; anything else (a pipe would block, a device would never end) is refused.
fn disk_file(path: &Path) -> io::Result<Option<(File, u64)>> {
    let meta = match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        meta => meta?,
    };
    if !meta.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let file = File::open(path)?;
    let len = file.metadata()?.len();
    Ok(Some((file, len)))
}

/// A file of which parts can be mapped.
#[derive(Debug)]
pub(crate) struct OpenFile {
    pub(crate) name: String,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Disk(File, u64),
    Embedded(&'static [u8]),
}

impl OpenFile {
    pub(crate) fn len(&self) -> u64 {
        match &self.source {
            Source::Disk(_, len) => *len,
            Source::Embedded(content) => content.len() as u64,
        }
    }

    /// As [`part`](Self::part), copied: a file that shrinks meanwhile is an error, not a fault.
    pub(crate) fn read(&self, offset: u64, len: usize) -> Result<Part, FileError> {
        assert!(offset + len as u64 <= self.len(), "{}: bytes {offset}+{len} of {}", self.name, self.len());
        match &self.source {
            Source::Embedded(content) => Ok(Part::Embedded(&content[offset as usize..][..len])),
            Source::Disk(file, _) => {
                let (mut file, mut content) = (file, vec![0; len]);
                let read = file.seek(SeekFrom::Start(offset)).and_then(|_| file.read_exact(&mut content));
                read.map_err(|source| FileError::Io { name: self.name.clone(), source })?;
                Ok(Part::Owned(content))
            }
        }
    }

    /// Bytes `offset..offset + len`, which must lie within the file as it was when opened. Pages of
    /// the file stay resident only while the part lives.
    pub(crate) fn part(&self, offset: u64, len: usize) -> Result<Part, FileError> {
        assert!(offset + len as u64 <= self.len(), "{}: bytes {offset}+{len} of {}", self.name, self.len());
        let io = |source| FileError::Io { name: self.name.clone(), source };
        match &self.source {
            Source::Embedded(content) => Ok(Part::Embedded(&content[offset as usize..][..len])),
            Source::Disk(file, known) => {
                // A file that shrank since would fault on access; look again as late as possible.
                if file.metadata().map_err(io)?.len() < *known {
                    return Err(io(io::Error::other("it was truncated while being read")));
                }
                // SAFETY: the map is read-only and the file is not written by this process. The
                // operator must not truncate a checkpoint while it is loaded (the system would then
                // raise SIGBUS); a concurrent change of bytes can only change weights, since every
                // value of an element is valid and sizes come from a header read once.
                let map = unsafe { MmapOptions::new().offset(offset).len(len).map(file) }.map_err(io)?;
                #[cfg(unix)]
                map.advise(memmap2::Advice::Sequential).ok(); // a hint
                Ok(Part::Mapped(map))
            }
        }
    }
}

/// Part of a file.
#[derive(Debug)]
pub(crate) enum Part {
    Mapped(Mmap),
    Embedded(&'static [u8]),
    /// Rearranged, or read instead of mapped.
    Owned(Vec<u8>),
}

impl Deref for Part {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Part::Mapped(map) => map,
            Part::Embedded(content) => content,
            Part::Owned(content) => content,
        }
    }
}
