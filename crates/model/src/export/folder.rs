//! A folder with a new checkpoint: written beside its place, put there when it is whole.
//!
//! Invariant: under its name there is either nothing or a complete checkpoint, synced to disk; what was
//! begun and not finished is removed.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use baton_device::DType;
use serde_json::{Map, Value, json};

use super::ExportError;
use crate::checkpoint::{INDEX, SINGLE};

/// Bytes of tensors in a file, unless a single one has more.
const SHARD_BYTES: u64 = 4 << 30;

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewTensor {
    name: String,
    /// As safetensors spells it.
    stored_type: &'static str,
    shape: Vec<usize>,
    bytes: u64,
}

impl NewTensor {
    /// A tensor of a logical shape. Rows of blocks are stored as bytes.
    pub fn new(name: String, shape: &[usize], dtype: DType) -> Self {
        let bytes = dtype.bytes(shape.iter().product()) as u64;
        let (stored_type, shape) = match (dtype, shape) {
            (DType::F32, _) => ("F32", shape.to_vec()),
            (DType::F16, _) => ("F16", shape.to_vec()),
            (DType::BF16, _) => ("BF16", shape.to_vec()),
            (DType::Ggml(_), [outer @ .., cols]) => ("U8", [outer, &[dtype.bytes(*cols)]].concat()),
            (DType::Ggml(_), []) => panic!("{name}: a scalar is no block"),
        };
        Self { name, stored_type, shape, bytes }
    }

    /// Its name in the checkpoint.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The bytes that it takes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// A checkpoint being written.
#[derive(Debug)]
pub struct NewCheckpoint {
    target: PathBuf,
    /// Beside it; removed when dropped, unless it has been renamed.
    partial: PathBuf,
    /// Each shard's.
    shards: Vec<Vec<NewTensor>>,
}

impl NewCheckpoint {
    /// Begins the folder `target`, which must not exist, for those tensors, which its disk must have room for.
    pub fn create(target: &Path, tensors: Vec<NewTensor>) -> Result<Self, ExportError> {
        Self::in_shards(target, tensors, SHARD_BYTES)
    }

    fn in_shards(target: &Path, tensors: Vec<NewTensor>, shard_bytes: u64) -> Result<Self, ExportError> {
        let failed = |source| ExportError::Write { path: target.to_owned(), source };
        if target.symlink_metadata().is_ok() {
            return Err(ExportError::Exists { path: target.to_owned() });
        }
        let name = target.file_name().ok_or_else(|| failed(io::Error::other("it has no name")))?;
        let parent = match target.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        fs::create_dir_all(parent).map_err(failed)?;
        let disk = rustix::fs::statvfs(parent).map_err(|error| failed(error.into()))?;
        let (free, needed) = (disk.f_bavail.saturating_mul(disk.f_frsize), tensors.iter().map(|t| t.bytes).sum());
        if needed > free {
            return Err(ExportError::Space { path: parent.to_owned(), needed, free });
        }
        let partial = parent.join(format!(".{}.{}.partial", name.to_string_lossy(), std::process::id()));
        fs::create_dir(&partial).map_err(failed)?;
        Ok(Self { target: target.to_owned(), partial, shards: shards(tensors, shard_bytes) })
    }

    /// Writes a file beside the weights.
    pub fn write_file(&self, name: &str, content: &[u8]) -> Result<(), ExportError> {
        let write = |mut file: File| file.write_all(content).and_then(|()| file.sync_all());
        let path = self.partial.join(name);
        File::create_new(&path).and_then(write).map_err(|source| ExportError::Write { path, source })
    }

    /// Where it is for now.
    pub fn path(&self) -> &Path {
        &self.partial
    }

    /// Writes the tensors, each as what `content` hands to its writer, then puts the folder in its place. `progress` is
    /// told the bytes written and those to be written.
    ///
    /// # Panics
    /// If a tensor gets another number of bytes than it has.
    pub fn write_tensors(
        mut self,
        progress: &dyn Fn(u64, u64),
        content: impl FnMut(&NewTensor, &mut dyn FnMut(&[u8]) -> Result<(), ExportError>) -> Result<(), ExportError>,
    ) -> Result<(), ExportError> {
        self.write_weights(progress, content)?;
        self.finish()
    }

    /// Writes the tensors, and leaves the folder where it is.
    pub(super) fn write_weights(
        &mut self,
        progress: &dyn Fn(u64, u64),
        mut content: impl FnMut(&NewTensor, &mut dyn FnMut(&[u8]) -> Result<(), ExportError>) -> Result<(), ExportError>,
    ) -> Result<(), ExportError> {
        let shards = std::mem::take(&mut self.shards);
        let total = shards.iter().flatten().map(|t| t.bytes).sum();
        let mut done = 0;
        progress(done, total);
        let names: Vec<String> = match shards.len() {
            1 => vec![SINGLE.into()],
            count => (1..=count).map(|i| format!("model-{i:05}-of-{count:05}.safetensors")).collect(),
        };
        for (name, tensors) in names.iter().zip(&shards) {
            let path = self.partial.join(name);
            let failed = |source| ExportError::Write { path: path.clone(), source };
            let mut file = BufWriter::new(File::create_new(&path).map_err(failed)?);
            file.write_all(&header(tensors)).map_err(failed)?;
            for tensor in tensors {
                let end = done + tensor.bytes;
                content(tensor, &mut |bytes| {
                    file.write_all(bytes).map_err(failed)?;
                    done += bytes.len() as u64;
                    progress(done, total);
                    Ok(())
                })?;
                assert_eq!(done, end, "{} has {} bytes", tensor.name, tensor.bytes);
            }
            file.into_inner().map_err(|error| failed(error.into_error()))?.sync_all().map_err(failed)?;
        }
        if shards.len() > 1 {
            self.write_file(INDEX, &index(&names, &shards, total))?;
        }
        Ok(())
    }

    /// Puts the folder in its place.
    pub(super) fn finish(self) -> Result<(), ExportError> {
        if self.target.symlink_metadata().is_ok() {
            return Err(ExportError::Exists { path: self.target.clone() });
        }
        let synced = File::open(&self.partial).and_then(|folder| folder.sync_all());
        let parent = self.partial.parent().expect("it was created in one");
        let placed =
            synced.and_then(|()| fs::rename(&self.partial, &self.target)).and_then(|()| File::open(parent)?.sync_all());
        placed.map_err(|source| ExportError::Write { path: self.target.clone(), source })
    }
}

impl Drop for NewCheckpoint {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.partial)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.partial.display(), %error, "what was begun could not be removed");
        }
    }
}

/// The tensors in files of at most `most` bytes, unless one alone has more.
fn shards(tensors: Vec<NewTensor>, most: u64) -> Vec<Vec<NewTensor>> {
    let (mut shards, mut bytes) = (vec![Vec::new()], 0);
    for tensor in tensors {
        bytes += tensor.bytes;
        if bytes > most && !shards.last().is_some_and(Vec::is_empty) {
            shards.push(Vec::new());
            bytes = tensor.bytes;
        }
        shards.last_mut().expect("there is one").push(tensor);
    }
    shards
}

/// The beginning of a safetensors file: length, JSON, padded to a multiple of eight bytes.
fn header(tensors: &[NewTensor]) -> Vec<u8> {
    let mut entries = Map::new();
    entries.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut start = 0;
    for NewTensor { name, stored_type, shape, bytes } in tensors {
        let end = start + bytes;
        entries.insert(name.clone(), json!({"dtype": stored_type, "shape": shape, "data_offsets": [start, end]}));
        start = end;
    }
    let mut json = Value::from(entries).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    [&(json.len() as u64).to_le_bytes(), json.as_slice()].concat()
}

fn index(names: &[String], shards: &[Vec<NewTensor>], total: u64) -> Vec<u8> {
    let of_shard = |(name, tensors): (&String, &Vec<NewTensor>)| {
        let entry = |t: &NewTensor| (t.name.clone(), Value::from(name.as_str()));
        tensors.iter().map(entry).collect::<Vec<_>>()
    };
    let weight_map: Map<String, Value> = names.iter().zip(shards).flat_map(of_shard).collect();
    let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
    serde_json::to_vec_pretty(&index).expect("JSON serialises")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Files;
    use crate::checkpoint::Checkpoint;

    fn tensors(sizes: &[usize]) -> Vec<NewTensor> {
        sizes.iter().enumerate().map(|(i, n)| NewTensor::new(format!("t{i}"), &[*n], DType::F32)).collect()
    }

    #[test]
    fn a_checkpoint_in_shards_is_read_as_it_was_written() {
        let temp = tempfile::tempdir().unwrap();
        let out = temp.path().join("new");
        let folder = NewCheckpoint::in_shards(&out, tensors(&[3, 2, 9, 1, 1]), 20).unwrap();
        assert_eq!(folder.shards.iter().map(Vec::len).collect::<Vec<_>>(), [2, 1, 2]);
        let content = |t: &NewTensor| vec![t.name.as_bytes()[1]; t.bytes as usize];
        // A piece at a time.
        let pieces = |t: &NewTensor, write: &mut dyn FnMut(&[u8]) -> _| content(t).chunks(5).try_for_each(write);
        folder.write_tensors(&|_, _| {}, pieces).unwrap();
        let checkpoint = Checkpoint::open(&Files::folder(&out).unwrap()).unwrap();
        for tensor in tensors(&[3, 2, 9, 1, 1]) {
            let (entry, part) = checkpoint.tensor(&tensor.name).unwrap();
            assert_eq!((entry.stored_type, &entry.shape), ("F32", &tensor.shape));
            assert_eq!(*part, content(&tensor));
        }
    }

    #[test]
    fn more_than_a_disk_has_is_refused_before_anything_is_written() {
        let temp = tempfile::tempdir().unwrap();
        let error = NewCheckpoint::create(&temp.path().join("new"), tensors(&[1 << 60])).unwrap_err();
        assert!(matches!(error, ExportError::Space { needed, .. } if needed == 1 << 62), "{error}");
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 0);
    }
}
