//! Which matrices of an adapter belong to which projections of a model; everything left over is a reason for refusal.

use std::collections::BTreeMap;

use super::AdapterError;
use super::config::{LoraConfig, Targets, ends_with};
use crate::checkpoint::{Checkpoint, Entry, at_most};
use crate::loader::Slot;

pub(super) const WEIGHTS: &str = "adapter_model.safetensors";

/// What peft puts in front of the names of a model's modules.
const PREFIX: &str = "base_model.model.";

/// The two matrices of a module, by their tensors' names.
pub(super) struct Matrices<'a> {
    /// `[rank, in]`.
    pub(super) a: &'a str,
    /// `[out, rank]`.
    pub(super) b: &'a str,
    /// The projections in which the module is kept.
    pub(super) slots: Vec<usize>,
}

/// The matrices by module, in the order of their names.
pub(super) fn pair_up<'a>(
    config: &LoraConfig,
    checkpoint: &'a Checkpoint,
    slots: &[Slot],
    max_rank: usize,
) -> Result<BTreeMap<&'a str, Matrices<'a>>, AdapterError> {
    let mut modules: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    slots.iter().enumerate().for_each(|(i, slot)| modules.entry(&slot.module).or_default().push(i));

    let mut reasons = Vec::new();
    let mut found: BTreeMap<&str, [Option<&Entry>; 2]> = BTreeMap::new();
    for entry in checkpoint.entries() {
        match parse(&entry.name) {
            Some((module, side)) => found.entry(module).or_default()[side] = Some(entry),
            None => reasons.push(format!("tensor {} {}", entry.name, foreign(&entry.name))),
        }
    }
    let mut pairs = BTreeMap::new();
    for (&module, sides) in &found {
        let Some(own) = modules.get(module) else {
            reasons.push(format!("{module} {}", refusal(module)));
            continue;
        };
        if config.selects(module) == Some(false) {
            reasons.push(format!("{module} has tensors, but target_modules leaves it out"));
        }
        let [Some(a), Some(b)] = *sides else {
            let missing = if sides[0].is_none() { "lora_A" } else { "lora_B" };
            reasons.push(format!("{module} has no {missing}"));
            continue;
        };
        let [out_features, in_features] = slots[own[0]].shape;
        let rank = config.rank(module);
        if rank > max_rank {
            reasons.push(format!("{module} has rank {rank}; at most {max_rank} is accepted"));
        }
        reasons.extend(mismatch(a, [rank, in_features]));
        reasons.extend(mismatch(b, [out_features, rank]));
        pairs.insert(module, Matrices { a: &a.name, b: &b.name, slots: own.clone() });
    }
    let bare = modules.keys().filter(|module| config.selects(module) == Some(true) && !found.contains_key(*module));
    reasons.extend(bare.map(|module| format!("{module}, which target_modules names, has no tensors")));
    if let Targets::Names(names) = &config.targets {
        let known = |name: &str| modules.keys().any(|module| ends_with(module, name));
        let unknown = names.iter().filter(|name| !known(name) && !found.keys().any(|m| ends_with(m, name)));
        reasons.extend(unknown.map(|name| {
            let name: String = name.chars().filter(|c| !c.is_control()).take(100).collect();
            format!("target_modules: {name} {}", refusal(&name))
        }));
    }
    if found.is_empty() {
        reasons.push(format!("{WEIGHTS} has no LoRA matrices"));
    }
    if reasons.is_empty() { Ok(pairs) } else { Err(AdapterError::Tensors { reasons: at_most(reasons) }) }
}

/// The module of a matrix, and whether it is A (0) or B (1).
fn parse(name: &str) -> Option<(&str, usize)> {
    let name = name.strip_prefix(PREFIX)?;
    let sides = [".lora_A.weight", ".lora_B.weight"];
    sides.iter().enumerate().find_map(|(side, suffix)| Some((name.strip_suffix(suffix)?, side)))
}

/// What a tensor is that is no matrix of a linear layer.
fn foreign(name: &str) -> &'static str {
    if name.contains("lora_magnitude_vector") {
        "belongs to DoRA, which is not supported"
    } else if name.contains("lora_embedding") {
        "adapts an embedding, which is not supported"
    } else if name.ends_with(".bias") {
        "is a bias, which adapters may not have"
    } else {
        "is no LoRA matrix: base_model.model.<module>.lora_A.weight and .lora_B.weight are read"
    }
}

/// Why a module cannot be adapted.
fn refusal(module: &str) -> &'static str {
    if ends_with(module, "kv_b_proj") {
        "cannot be adapted: latent attention absorbs it"
    } else if module.contains(".experts") {
        "cannot be adapted: routed experts are not"
    } else if ends_with(module, "lm_head") || ends_with(module, "embed_tokens") {
        "cannot be adapted: embeddings and head are not"
    } else if ends_with(module, "gate") {
        "cannot be adapted: routers are not"
    } else {
        "is no linear layer of this model"
    }
}

/// Why a matrix is not the one that is needed.
fn mismatch(entry: &Entry, shape: [usize; 2]) -> Option<String> {
    if entry.shape != shape {
        let Entry { name, shape: actual, .. } = entry;
        return Some(format!("tensor {name} has shape {actual:?}; rank and layer ask for {shape:?}"));
    }
    let dtype = entry.stored_type;
    entry.dtype().is_none().then(|| format!("tensor {} has dtype {dtype}; F32, F16 or BF16 are read", entry.name))
}
