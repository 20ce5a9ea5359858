//! What a device can do, what a model needs, and the list of every mismatch.

use std::collections::BTreeSet;

use crate::{DType, KvDtype, WeightFormat};

/// An operation of the seam, by the name used in refusals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Op {
    /// Attention over full paged keys and values.
    PagedAttention,
    /// Multi-head latent attention ([`crate::LatentOps`]).
    LatentAttention,
    /// Latent attention to the positions that an indexer chooses ([`crate::LatentOps::indexed_attention`]).
    IndexedAttention,
    /// Attention to a window and to pooled entries, and what else DeepSeek-V4 needs ([`crate::CompressedOps`]).
    CompressedAttention,
    /// Routed experts ([`crate::MoeOps`]).
    FusedMoe,
}

/// What a backend offers.
#[derive(Debug, Clone)]
pub struct Caps {
    /// Device as shown in logs: `cpu`, `reference`.
    pub device: String,
    /// Instruction set or chip in use, part of the system fingerprint.
    pub isa: String,
    /// Worker threads, where the device has such a thing.
    pub threads: usize,
    /// Tokens per cache block.
    pub kv_block_size: usize,
    /// How a cache can keep its elements.
    pub kv_dtypes: BTreeSet<KvDtype>,
    /// Formats in which linear and expert weights can be kept.
    pub weight_formats: BTreeSet<WeightFormat>,
    /// Element type of activations between operations.
    pub activations: DType,
    /// Operations offered beyond those that every backend has.
    pub ops: BTreeSet<Op>,
    /// Formats whose weights meet activations that were made narrow: bytes for those in blocks, as [`crate::int8`] says,
    /// bf16 for bf16. The others meet them in f32.
    pub narrow_activations: BTreeSet<WeightFormat>,
    /// Whether a row's result is bit-identical whatever the other rows are.
    pub row_invariant: bool,
    /// Whether it computes while its host goes on, and keeps the tokens that it chooses: then the next step may be asked for
    /// before they come to the host.
    pub runs_ahead: bool,
    /// Whether a step that came before is replayed at less cost, so that it is worth a few rows more to have fewer different
    /// ones.
    pub replays_steps: bool,
}

/// What a model needs of a device.
#[derive(Debug, Clone, Default)]
pub struct Requirements {
    /// Operations.
    pub ops: BTreeSet<Op>,
    /// Weight formats.
    pub weight_formats: BTreeSet<WeightFormat>,
    /// How the cache is to be kept.
    pub kv_dtypes: BTreeSet<KvDtype>,
}

impl Caps {
    /// How a cache is kept that rounds as little as this device can.
    ///
    /// # Panics
    /// If it keeps none.
    pub fn widest_kv_dtype(&self) -> KvDtype {
        *KvDtype::ALL.iter().find(|dtype| self.kv_dtypes.contains(dtype)).expect("a device keeps a cache")
    }

    /// Every reason why a model cannot run here; empty if it can.
    pub fn refusals(&self, needs: &Requirements) -> Vec<String> {
        let ops = needs.ops.difference(&self.ops).map(|op| format!("device {} has no {op:?}", self.device));
        let formats = needs.weight_formats.difference(&self.weight_formats).map(|format| {
            format!("device {} cannot keep {format} weights; it keeps {}", self.device, listed(&self.weight_formats))
        });
        let dtypes = needs.kv_dtypes.difference(&self.kv_dtypes).map(|dtype| {
            format!("device {} cannot keep a cache in {dtype}; it keeps {}", self.device, listed(&self.kv_dtypes))
        });
        ops.chain(formats).chain(dtypes).collect()
    }
}

fn listed<T: ToString>(offered: &BTreeSet<T>) -> String {
    offered.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_name_every_mismatch_at_once() {
        let caps = Caps {
            device: "toy".into(),
            isa: String::new(),
            threads: 1,
            kv_block_size: 16,
            kv_dtypes: [KvDtype::F32, KvDtype::F16].into(),
            weight_formats: [WeightFormat::F32].into(),
            activations: DType::F32,
            ops: [Op::PagedAttention].into(),
            narrow_activations: BTreeSet::new(),
            row_invariant: true,
            runs_ahead: false,
            replays_steps: false,
        };
        let needs = Requirements {
            ops: [Op::PagedAttention, Op::LatentAttention, Op::FusedMoe].into(),
            weight_formats: [WeightFormat::BF16, WeightFormat::F32].into(),
            kv_dtypes: [KvDtype::F16, KvDtype::Int8].into(),
        };
        let refusals = caps.refusals(&needs);
        assert_eq!(refusals.len(), 4, "{refusals:?}");
        assert!(refusals[2].contains("bf16") && refusals[2].contains("it keeps f32"), "{refusals:?}");
        assert!(refusals[3].contains("int8") && refusals[3].contains("it keeps f32, f16"), "{refusals:?}");
    }
}
