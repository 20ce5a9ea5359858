//! Where a checkpoint's files come from.

use std::borrow::Cow;

/// The files of a checkpoint. Whoever implements it bounds their sizes, keeps names inside the checkpoint, and has found every
/// tensor to lie within its file with exactly the bytes that its shape and type take.
pub trait Source {
    /// The content of a small file; `None` if there is none of that name. A name may have one folder in front.
    ///
    /// # Errors
    /// Why it cannot be read.
    fn read(&self, name: &str) -> Result<Option<Cow<'static, [u8]>>, String>;

    /// All tensors.
    fn tensors(&self) -> Vec<TensorInfo>;

    /// The bytes of a tensor that [`tensors`](Self::tensors) lists, in row-major order, little-endian.
    ///
    /// # Errors
    /// Why it cannot be read.
    fn tensor(&self, name: &str, visit: &mut dyn FnMut(&[u8])) -> Result<(), String>;
}

/// A tensor as a checkpoint describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Its element type, as safetensors spells it: `F32`, `BF16`, ….
    pub dtype: String,
    /// Its dimensions, the slowest first.
    pub shape: Vec<usize>,
}
