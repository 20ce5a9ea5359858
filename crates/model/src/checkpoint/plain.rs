//! The tensors of a checkpoint whose model is made elsewhere: everything is checked that needs no config.

use std::ops::Deref;

use super::{Checkpoint, CheckpointError, Files};

/// The open weight files of a checkpoint. Names are distinct, and every tensor lies within its file.
#[derive(Debug)]
pub struct Tensors(Checkpoint);

/// A tensor as the header of its file describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredAs<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its element type, as safetensors spells it: `F32`, `BF16`, ….
    pub dtype: &'static str,
    /// Its dimensions, the slowest first.
    pub shape: &'a [usize],
}

impl Tensors {
    /// Opens the files and reads their headers.
    ///
    /// # Errors
    /// No weights in safetensors, or damaged ones.
    pub fn open(files: &Files) -> Result<Self, CheckpointError> {
        Checkpoint::open(files).map(Self)
    }

    /// All tensors, by name.
    pub fn iter(&self) -> impl Iterator<Item = StoredAs<'_>> {
        self.0.entries().map(|e| StoredAs { name: &e.name, dtype: e.stored_type, shape: &e.shape })
    }

    /// A tensor's elements in row-major order, as they are stored; `None` if there is none of that name.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn read(&self, name: &str) -> Result<Option<impl Deref<Target = [u8]> + use<>>, CheckpointError> {
        if !self.0.tensors.contains_key(name) {
            return Ok(None);
        }
        let (_, part) = self.0.tensor(name)?;
        Ok(Some(part))
    }
}
