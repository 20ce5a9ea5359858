//! Where a bundle's files lie, opened so that nothing outside can be reached by a name in it.
//!
//! Every file is opened from the folder's own descriptor, part by part and never through a link; the one exception is the
//! hub cache's form of a file, a link whose target has no freedom (see [`names::hub_blob`]). What is known of a file is
//! known of the descriptor that is read.

use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use baton_model::Files;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, openat, readlinkat, statat};
use rustix::io::Errno;

use crate::bundle::FileProblem;
use crate::names;
use crate::rules::MAX_FILES;
use crate::strict::shown;

/// Entries of a folder that are looked at: as many files as a manifest may list, and as many folders again.
const MAX_ENTRIES: usize = 2 * MAX_FILES;
/// The folder itself, where a problem is about no file.
const ROOT: &str = ".";

/// The files of a bundle.
#[derive(Debug)]
pub(crate) enum Place {
    /// A folder, held open.
    Folder { path: PathBuf, root: OwnedFd },
    /// Names and contents, embedded in the binary.
    Embedded(&'static [(&'static str, &'static [u8])]),
}

/// What tells one state of a file from another: a change of content changes the time of its inode, at the latest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identity {
    device: u64,
    inode: u64,
    pub(crate) bytes: u64,
    /// Seconds and nanoseconds of the last change of the content, and of the inode.
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Identity {
    fn of(meta: &Metadata) -> Self {
        Self {
            device: meta.dev(),
            inode: meta.ino(),
            bytes: meta.len(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        }
    }
}

/// A regular file, open.
#[derive(Debug)]
pub(crate) struct Opened {
    content: Content,
    pub(crate) identity: Identity,
}

#[derive(Debug)]
enum Content {
    Disk(File),
    Embedded(&'static [u8]),
}

impl Opened {
    fn disk(file: File) -> io::Result<Self> {
        let meta = file.metadata()?;
        if !meta.is_file() {
            return Err(io::Error::other("it was replaced while it was opened"));
        }
        Ok(Self { identity: Identity::of(&meta), content: Content::Disk(file) })
    }

    fn embedded(content: &'static [u8]) -> Self {
        let bytes = content.len() as u64;
        let identity = Identity { device: 0, inode: 0, bytes, modified: (0, 0), changed: (0, 0) };
        Self { content: Content::Embedded(content), identity }
    }

    /// Fills `buffer` from `offset` on; a file that ends before is an error.
    pub(crate) fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        match &self.content {
            Content::Disk(file) => file.read_exact_at(buffer, offset),
            Content::Embedded(content) => {
                let from = usize::try_from(offset).ok().and_then(|offset| content.get(offset..));
                let part = from.and_then(|rest| rest.get(..buffer.len()));
                buffer.copy_from_slice(part.ok_or(io::ErrorKind::UnexpectedEof)?);
                Ok(())
            }
        }
    }

    /// Reads `bytes` from `offset` on in pieces of the size of `buffer`.
    pub(crate) fn pieces(
        &self,
        offset: u64,
        bytes: u64,
        buffer: &mut [u8],
        mut take: impl FnMut(&[u8]),
    ) -> io::Result<()> {
        let mut done = 0;
        while done < bytes {
            let piece = buffer.len().min(usize::try_from(bytes - done).unwrap_or(usize::MAX));
            self.read_exact_at(&mut buffer[..piece], offset + done)?;
            take(&buffer[..piece]);
            done += piece as u64;
        }
        Ok(())
    }

    /// Whether it is still what was opened.
    pub(crate) fn unchanged(&self) -> io::Result<bool> {
        match &self.content {
            Content::Disk(file) => Ok(Identity::of(&file.metadata()?) == self.identity),
            Content::Embedded(_) => Ok(true),
        }
    }
}

impl Place {
    /// Of a checkpoint's files; a GGUF file's bundle is the folder that it lies in.
    pub(crate) fn of(files: &Files) -> io::Result<Self> {
        match files {
            Files::Embedded(files) => Ok(Self::Embedded(files)),
            Files::Folder(path) => Self::folder(path),
            Files::Gguf(path) => {
                let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
                Self::folder(parent.unwrap_or(Path::new(ROOT)))
            }
        }
    }

    fn folder(path: &Path) -> io::Result<Self> {
        let root = rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self::Folder { path: path.to_owned(), root })
    }

    /// The same place, reached by its path again.
    pub(crate) fn again(&self) -> io::Result<Self> {
        match self {
            Self::Folder { path, .. } => Self::folder(path),
            Self::Embedded(files) => Ok(Self::Embedded(files)),
        }
    }

    /// Opens a file by a name that [`names::objection`] has nothing against; `None` if there is none.
    pub(crate) fn open(&self, name: &str) -> Result<Option<Opened>, FileProblem> {
        assert_eq!(names::objection(name), None, "{name:?}");
        match self {
            Self::Embedded(files) => Ok(files.iter().find(|file| file.0 == name).map(|file| Opened::embedded(file.1))),
            Self::Folder { root, .. } => {
                let (folders, leaf) =
                    name.rsplit_once('/').map_or((None, name), |(folders, leaf)| (Some(folders), leaf));
                let mut inner: Option<OwnedFd> = None;
                for folder in folders.into_iter().flat_map(|folders| folders.split('/')) {
                    match subfolder(inner.as_ref().unwrap_or(root).as_fd(), folder) {
                        Ok(opened) => inner = Some(opened),
                        Err(Errno::NOENT) => return Ok(None),
                        Err(error) => return Err(FileProblem::io(name, error.into())),
                    }
                }
                open_leaf(root.as_fd(), inner.as_ref().unwrap_or(root).as_fd(), leaf, name)
            }
        }
    }

    /// Every file with its state, and whatever is neither a file nor a folder.
    pub(crate) fn scan(&self) -> (BTreeMap<String, Identity>, Vec<FileProblem>) {
        let mut scan = Scan { files: BTreeMap::new(), problems: Vec::new(), entries: 0 };
        match self {
            Self::Embedded(files) => {
                for (name, content) in *files {
                    scan.files.insert((*name).to_owned(), Opened::embedded(content).identity);
                }
            }
            Self::Folder { root, .. } => {
                if let Err(problem) = scan.folder(root.as_fd(), root.as_fd(), "") {
                    scan.problems.push(problem);
                }
            }
        }
        scan.problems.sort_by(|a, b| a.name().cmp(b.name()));
        (scan.files, scan.problems)
    }
}

struct Scan {
    files: BTreeMap<String, Identity>,
    problems: Vec<FileProblem>,
    entries: usize,
}

impl Scan {
    /// Looks at a folder whose files' names begin with `prefix`, and at those in it, as deep as a name may have parts.
    /// An error is one that ends the whole scan.
    fn folder(&mut self, root: BorrowedFd<'_>, folder: BorrowedFd<'_>, prefix: &str) -> Result<(), FileProblem> {
        let here = if prefix.is_empty() { ROOT } else { prefix.trim_end_matches('/') };
        let entries = Dir::read_from(folder).map_err(|error| FileProblem::io(here, error.into()))?;
        for entry in entries {
            let entry = entry.map_err(|error| FileProblem::io(here, error.into()))?;
            let leaf = entry.file_name();
            if matches!(leaf.to_bytes(), b"." | b"..") {
                continue;
            }
            self.entries += 1;
            if self.entries > MAX_ENTRIES {
                return Err(FileProblem::TooMany { name: ROOT.into(), limit: MAX_ENTRIES });
            }
            let name = format!("{prefix}{}", leaf.to_string_lossy());
            let objection = leaf.to_str().err().map(|_| "is not UTF-8").or_else(|| names::objection(&name));
            if let Some(reason) = objection {
                self.problems.push(FileProblem::Name { name: shown(&name), reason });
                continue;
            }
            let leaf = &name[prefix.len()..];
            match statat(folder, leaf, AtFlags::SYMLINK_NOFOLLOW).map(|stat| FileType::from_raw_mode(stat.st_mode)) {
                Ok(FileType::Directory) => match subfolder(folder, leaf) {
                    Ok(inner) => self.folder(root, inner.as_fd(), &format!("{name}/"))?,
                    Err(error) => self.problems.push(FileProblem::io(&name, error.into())),
                },
                Ok(_) => match open_leaf(root, folder, leaf, &name) {
                    Ok(Some(opened)) => _ = self.files.insert(name, opened.identity),
                    Ok(None) => {} // gone again: missing, if it was listed
                    Err(problem) => self.problems.push(problem),
                },
                Err(error) => self.problems.push(FileProblem::io(&name, error.into())),
            }
        }
        Ok(())
    }
}

fn subfolder(folder: BorrowedFd<'_>, name: &str) -> Result<OwnedFd, Errno> {
    openat(folder, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

/// Opens the file `leaf` of a folder below `root`; `name` is its whole name. It is never opened before it is known to be
/// regular, and without waiting should it be replaced by a pipe.
fn open_leaf(
    root: BorrowedFd<'_>,
    folder: BorrowedFd<'_>,
    leaf: &str,
    name: &str,
) -> Result<Option<Opened>, FileProblem> {
    let io = |error: Errno| FileProblem::io(name, error.into());
    let kind = match statat(folder, leaf, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => FileType::from_raw_mode(stat.st_mode),
        Err(Errno::NOENT) => return Ok(None),
        Err(error) => return Err(io(error)),
    };
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match kind {
        FileType::RegularFile => openat(folder, leaf, flags, Mode::empty()).map_err(io)?,
        FileType::Symlink => {
            let target = readlinkat(folder, leaf, Vec::new()).map_err(io)?;
            let target = target.to_string_lossy();
            let link = || FileProblem::Link { name: name.into(), target: shown(&target) };
            let blob = names::hub_blob(name, &target).ok_or_else(link)?;
            let blobs = subfolder(root, "../../blobs").map_err(io)?;
            if statat(&blobs, blob, AtFlags::SYMLINK_NOFOLLOW)
                .map(|stat| FileType::from_raw_mode(stat.st_mode))
                .map_err(io)?
                != FileType::RegularFile
            {
                return Err(link());
            }
            openat(&blobs, blob, flags, Mode::empty()).map_err(io)?
        }
        kind => return Err(FileProblem::NotRegular { name: name.into(), kind: kind_name(kind) }),
    };
    Opened::disk(File::from(file)).map(Some).map_err(|source| FileProblem::io(name, source))
}

fn kind_name(kind: FileType) -> &'static str {
    match kind {
        FileType::Directory => "a folder",
        FileType::Fifo => "a pipe",
        FileType::Socket => "a socket",
        FileType::CharacterDevice | FileType::BlockDevice => "a device",
        _ => "of an unknown kind",
    }
}
