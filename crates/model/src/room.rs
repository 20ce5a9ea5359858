//! How large a cache may be: as many bytes as were allowed, or what a share of the device's memory leaves beside all the rest.
//!
//! Where a part of the cache passes, that part comes first: it is for as many sequences as a step has, however long they are. The
//! rest is for what is kept of them.
//!
//! Invariant: what does not fit is refused before anything is served, and if it can be known before weights are read.

use baton_device::{Backend, KvSpec, StepMemory};

use crate::load::{KvCacheSize, LoadError, nobodys_blocks};
use crate::step::{Passing, RunSpec};

/// Devices give memory in pieces of 2 MiB: the cache may be cut from one more than it fills, and other things too.
const ROUNDING: u64 = 4 << 20;

/// What the cache may take.
pub(crate) enum Room {
    /// So many bytes; if `bounded`, no more than it can ever use.
    Bytes { bytes: u64, bounded: bool },
    /// What is left of a device's memory.
    Share(Memory),
}

impl Room {
    /// Before anything is loaded.
    ///
    /// # Errors
    /// If the cache, or in a share of the device's memory so many bytes of weights, cannot fit.
    pub(crate) fn new<B: Backend>(
        backend: &B,
        size: KvCacheSize,
        kv: &KvSpec,
        spec: &RunSpec,
        weights: u64,
    ) -> Result<Self, LoadError> {
        let (bytes, bounded) = match size {
            KvCacheSize::AtMost(bytes) => (bytes, true),
            KvCacheSize::Bytes(bytes) => (bytes, false),
            KvCacheSize::Share(share) => {
                let memory = Memory::of(backend, share)?;
                memory.expect(weights)?;
                return Ok(Self::Share(memory));
            }
        };
        blocks_of(kv, spec, bytes, bounded)?;
        Ok(Self::Bytes { bytes, bounded })
    }

    /// Blocks of the cache, when the weights are there and `steps` is what steps take.
    pub(crate) fn blocks<B: Backend>(
        &self,
        backend: &B,
        kv: &KvSpec,
        spec: &RunSpec,
        steps: StepMemory,
    ) -> Result<usize, LoadError> {
        match self {
            Self::Bytes { bytes, bounded } => blocks_of(kv, spec, *bytes, *bounded),
            Self::Share(before) => {
                let nobodys = nobodys_blocks(backend.caps()) * (kv.kept_bytes() + kv.passing_bytes());
                let spare = ROUNDING + nobodys as u64;
                Memory::of(backend, before.share)?.blocks(kv, spec, steps, [before.used, spare])
            }
        }
    }
}

/// A device's memory, and the share of it that is ours.
pub(crate) struct Memory {
    share: f64,
    total: u64,
    used: u64,
}

impl Memory {
    fn of<B: Backend>(backend: &B, share: f64) -> Result<Self, LoadError> {
        let none = || format!("a share of the memory of {}, which has none of its own", backend.caps().device);
        let memory = backend.memory()?.ok_or_else(|| LoadError::Unsupported { reasons: vec![none()] })?;
        Ok(Self { share, total: memory.total, used: memory.total.saturating_sub(memory.free) })
    }

    /// Bytes of the share that are not in use.
    fn left(&self) -> u64 {
        ((self.total as f64 * self.share) as u64).saturating_sub(self.used)
    }

    fn no_room(&self, when: &'static str, reason: String) -> LoadError {
        let Self { share, total, used } = *self;
        LoadError::NoRoom { share, total, used, when, reason }
    }

    /// `Ok` if so many bytes of weights may fit.
    fn expect(&self, weights: u64) -> Result<(), LoadError> {
        if weights <= self.left() {
            return Ok(());
        }
        let reason = format!("the weights take {weights} bytes, {} are left for them", self.left());
        Err(self.no_room("before loading", reason))
    }

    /// Blocks for which there is room beside what is in use, of which `before` bytes were before anything was loaded, what
    /// steps will ask for, and what is to `spare`.
    fn blocks(
        &self,
        kv: &KvSpec,
        spec: &RunSpec,
        steps: StepMemory,
        [before, spare]: [u64; 2],
    ) -> Result<usize, LoadError> {
        let StepMemory { scratch, graphs } = steps;
        let cache = self.left().saturating_sub(graphs + spare);
        let loaded = self.used.saturating_sub(before + scratch);
        tracing::info!(before, loaded, scratch, graphs, cache, "bytes of the device's memory");
        blocks_of(kv, spec, cache, true).map_err(|small| {
            let mut reason = format!(
                "{before} were before, {loaded} are weights and activations, {scratch} are what steps compute in; {graphs} more \
                 are for graphs of steps and {spare} for what is rounded up, which leaves {cache}: {small}"
            );
            if let LoadError::CacheTooSmall { needed_blocks, block_bytes, passing_bytes, blocks, block_size, .. } = small {
                let needed = self.used + graphs + spare + passing_bytes + needed_blocks * block_bytes;
                // A share as it would be asked for.
                let share = (needed as f64 / self.total as f64 * 1000.0).ceil() / 1000.0;
                let shares = (share <= 1.0).then(|| format!("a share of {share}"));
                let contexts = (blocks > 0).then(|| format!("contexts of {} tokens", blocks * block_size as u64));
                let fitting: Vec<_> = shares.into_iter().chain(contexts).collect();
                if !fitting.is_empty() {
                    reason = format!("{reason}; what would fit: {}", fitting.join(", or "));
                }
            }
            self.no_room("with the weights loaded", reason)
        })
    }
}

/// What passes of the cache of a model, if anything does: as much as running sequences may need, so that none ever lacks it, and
/// a share for the prefix cache. In that the last tokens of as many sequences as a step has can rest, so that each can be gone
/// on from, and what a step of prompts leaves on its way, which serves others that begin alike.
pub(crate) fn passing(kv: &KvSpec, spec: &RunSpec) -> Option<Passing> {
    let &RunSpec { max_step_sequences: sequences, max_step_tokens: tokens, .. } = spec;
    let reach = kv.reach()?.min(spec.max_model_len);
    let fewest = Passing::fewest(reach, kv.block_size, sequences, tokens);
    let resting = sequences.saturating_mul(reach.div_ceil(kv.block_size) + 1).saturating_add(tokens / kv.block_size);
    Some(Passing { reach, num_blocks: fewest.saturating_add(resting) })
}

/// Kept blocks of the cache, of so many bytes: at least those of one whole context, and if `bounded` no more than those of as many
/// contexts as a step has sequences.
fn blocks_of(kv: &KvSpec, spec: &RunSpec, bytes: u64, bounded: bool) -> Result<usize, LoadError> {
    let block_bytes = kv.kept_bytes() as u64;
    let passing = spec.passing.map_or(0, |passing| passing.num_blocks as u64);
    let passing_bytes = passing.saturating_mul(kv.passing_bytes() as u64);
    let needed_blocks = spec.max_model_len.div_ceil(kv.block_size) as u64;
    let wanted = if bounded { needed_blocks.saturating_mul(spec.max_step_sequences as u64) } else { u64::MAX };
    // Slots of all blocks are numbered in 32 bits.
    let most = u64::from(u32::MAX) / kv.block_size as u64;
    // Of a model that keeps nothing else there is room for any context.
    let fitting = bytes
        .checked_sub(passing_bytes)
        .filter(|_| passing <= most)
        .map(|left| left.checked_div(block_bytes).unwrap_or(u64::MAX));
    let blocks = fitting.unwrap_or(0).min(wanted).min(most);
    if blocks < needed_blocks {
        return Err(LoadError::CacheTooSmall {
            max_model_len: spec.max_model_len,
            needed_blocks,
            block_size: kv.block_size,
            block_bytes,
            passing_bytes,
            max_step_sequences: spec.max_step_sequences,
            bytes,
            blocks,
        });
    }
    Ok(blocks as usize)
}
