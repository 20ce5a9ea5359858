//! Tensors that lie in a GGUF file in another order than in a Hugging Face checkpoint.

use baton_device::{DType, HostTensor};
use half::{bf16, f16};

use super::{CheckpointError, Entry, OpenFile};

/// How a tensor is made of what the file has.
#[derive(Debug)]
pub(super) enum Arrangement {
    /// Rows (or elements of a vector) alternate between the halves of each of so many heads.
    Interleaved(usize),
    Latent(LatentHalves),
}

/// The up-projection of latent attention as two tensors, each with the number of its file.
#[derive(Debug)]
pub(crate) struct LatentHalves {
    /// `[heads, rank, nope]`: of each head the key rows, transposed.
    pub(crate) key: (usize, Entry),
    /// `[heads, v, rank]`: of each head the value rows.
    pub(crate) value: (usize, Entry),
}

/// Rows `2i` of each head, then its rows `2i + 1`.
pub(super) fn deinterleaved(data: &[u8], rows: usize, heads: usize) -> Vec<u8> {
    let (head, row) = (data.len() / heads, data.len() / rows);
    let half = |head, first| <[u8]>::chunks_exact(head, row).skip(first).step_by(2).flatten().copied();
    data.chunks_exact(head).flat_map(|head| half(head, 0).chain(half(head, 1))).collect()
}

impl LatentHalves {
    /// The header of the whole `[heads * (nope + v), rank]`: of the halves' type if they have one float type,
    /// else of f32, which holds every stored value.
    ///
    /// # Panics
    /// If the halves do not have three dimensions, with heads and rank in common.
    pub(super) fn joined(&self, name: String) -> Entry {
        let (key, value) = (&self.key.1, &self.value.1);
        let (&[heads, rank, nope], &[value_heads, v, value_rank]) = (&key.shape[..], &value.shape[..]) else {
            panic!("{} and {} have three dimensions each", key.name, value.name)
        };
        assert_eq!((heads, rank), (value_heads, value_rank), "{} and {}", key.name, value.name);
        let float = |e: &&Entry| matches!(e.stored_type, "F16" | "BF16");
        let same = Some(key).filter(float).filter(|k| k.stored_type == value.stored_type);
        let stored_type = same.map_or("F32", |k| k.stored_type);
        let shape = vec![heads * (nope + v), rank];
        let bytes = Entry::dtype_of(stored_type).expect("a float type").bytes(shape[0] * rank);
        Entry { name, stored_type, shape, offset: 0, bytes }
    }

    /// Its bytes: per head first the key rows, then the value rows.
    pub(super) fn join(&self, files: &[OpenFile], dtype: DType) -> Result<Vec<u8>, CheckpointError> {
        let (key, value) = (widened(files, &self.key)?, widened(files, &self.value)?);
        let (heads, rank) = (self.key.1.shape[0], self.key.1.shape[1]);
        let per_head = key.chunks_exact(key.len() / heads).zip(value.chunks_exact(value.len() / heads));
        let rows = per_head.flat_map(|(key, value)| {
            let nope = key.len() / rank;
            let transposed = (0..nope).flat_map(move |n| key.iter().skip(n).step_by(nope));
            transposed.chain(value)
        });
        Ok(match dtype {
            DType::F16 => rows.flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
            DType::BF16 => rows.flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
            _ => rows.flat_map(|x| x.to_le_bytes()).collect(),
        })
    }
}

fn widened(files: &[OpenFile], (file, entry): &(usize, Entry)) -> Result<Vec<f32>, CheckpointError> {
    let part = files[*file].part(entry.offset, entry.bytes)?;
    Ok(HostTensor::new(&entry.name, entry.dtype().expect("a weight's"), entry.shape.clone(), &part).to_f32())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_of_heads_are_taken_apart() {
        assert_eq!(deinterleaved(&[0, 1, 2, 3, 10, 11, 12, 13], 8, 2), [0, 2, 1, 3, 10, 12, 11, 13]);
        assert_eq!(deinterleaved(&[0, 0, 1, 1, 2, 2, 3, 3], 4, 1), [0, 0, 2, 2, 1, 1, 3, 3]);
    }
}
