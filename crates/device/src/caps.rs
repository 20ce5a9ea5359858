//! What a device can do, what a model needs, and the list of every mismatch.

use std::collections::BTreeSet;

use crate::WeightFormat;

/// An operation of the seam, by the name used in refusals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Op {
    /// Attention over full paged keys and values.
    PagedAttention,
    /// Multi-head latent attention ([`crate::LatentOps`]).
    LatentAttention,
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
    /// Formats in which linear and expert weights can be kept.
    pub weight_formats: BTreeSet<WeightFormat>,
    /// Operations offered beyond those that every backend has.
    pub ops: BTreeSet<Op>,
    /// Formats whose weights meet activations that were made narrow: bytes for those in blocks, as [`crate::int8`] says,
    /// bf16 for bf16. The others meet them in f32.
    pub narrow_activations: BTreeSet<WeightFormat>,
    /// Whether a row's result is bit-identical whatever the other rows are.
    pub row_invariant: bool,
}

/// What a model needs of a device.
#[derive(Debug, Clone, Default)]
pub struct Requirements {
    /// Operations.
    pub ops: BTreeSet<Op>,
    /// Weight formats.
    pub weight_formats: BTreeSet<WeightFormat>,
}

impl Caps {
    /// Every reason why a model cannot run here; empty if it can.
    pub fn refusals(&self, needs: &Requirements) -> Vec<String> {
        let ops = needs.ops.difference(&self.ops).map(|op| format!("device {} has no {op:?}", self.device));
        let offered = || self.weight_formats.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let formats = needs
            .weight_formats
            .difference(&self.weight_formats)
            .map(|f| format!("device {} cannot keep {f} weights; it keeps {}", self.device, offered()));
        ops.chain(formats).collect()
    }
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
            weight_formats: [WeightFormat::F32].into(),
            ops: [Op::PagedAttention].into(),
            narrow_activations: BTreeSet::new(),
            row_invariant: true,
        };
        let needs = Requirements {
            ops: [Op::PagedAttention, Op::LatentAttention, Op::FusedMoe].into(),
            weight_formats: [WeightFormat::BF16, WeightFormat::F32].into(),
        };
        let refusals = caps.refusals(&needs);
        assert_eq!(refusals.len(), 3, "{refusals:?}");
        assert!(refusals[2].contains("bf16") && refusals[2].contains("it keeps f32"), "{refusals:?}");
    }
}
