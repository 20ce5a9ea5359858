//! The tensors that a config asks for, compared with those that a checkpoint has, and widened to f32.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;

use crate::config::{Config, Family, Task};
use crate::error::LoadError;
use crate::source::{Source, TensorInfo};

/// The tensors of a model without its head lie under this, unless they lie at the top.
fn prefix(family: Family) -> &'static str {
    match family {
        Family::Bert => "bert.",
        Family::Roberta => "roberta.",
    }
}

/// The weights, and how they were found.
pub(crate) struct Weights {
    pub builder: VarBuilder<'static>,
    /// In front of the names of the model without its head, without the dot; empty if there is nothing.
    pub prefix: &'static str,
    /// Bytes as kept.
    pub bytes: u64,
}

/// Loads exactly the tensors that the config asks for.
pub(crate) fn load(source: &dyn Source, config: &Config) -> Result<Weights, LoadError> {
    let stored = source.tensors();
    let prefix = prefix(config.architecture.family);
    let prefixed = config.architecture.task == Task::Score || stored.iter().any(|t| t.name.starts_with(prefix));
    let prefix = if prefixed { prefix } else { "" };
    let wanted = wanted(config, prefix);
    let found = verify(&stored, &wanted, prefix)?;

    let (mut tensors, mut bytes) = (HashMap::new(), 0);
    for (name, info) in found {
        let tensor = widened(source, info)?;
        bytes += tensor.elem_count() as u64 * 4;
        tensors.insert(name, tensor);
    }
    let builder = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    Ok(Weights { builder, prefix: prefix.trim_end_matches('.'), bytes })
}

/// Names and shapes.
fn wanted(config: &Config, prefix: &str) -> BTreeMap<String, Vec<usize>> {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let mut wanted = BTreeMap::new();
    let mut table = |name: &str, rows: usize| {
        wanted.insert(format!("{prefix}embeddings.{name}_embeddings.weight"), vec![rows, hidden]);
    };
    table("word", config.vocab_size);
    table("position", config.max_position_embeddings);
    table("token_type", config.type_vocab_size);
    let mut norm = |name: String| {
        wanted.insert(format!("{name}.weight"), vec![hidden]);
        wanted.insert(format!("{name}.bias"), vec![hidden]);
    };
    norm(format!("{prefix}embeddings.LayerNorm"));
    for layer in 0..config.num_layers {
        norm(format!("{prefix}encoder.layer.{layer}.attention.output.LayerNorm"));
        norm(format!("{prefix}encoder.layer.{layer}.output.LayerNorm"));
    }
    let mut linear = |name: String, out: usize, inputs: usize| {
        wanted.insert(format!("{name}.weight"), vec![out, inputs]);
        wanted.insert(format!("{name}.bias"), vec![out]);
    };
    for layer in 0..config.num_layers {
        let layer = format!("{prefix}encoder.layer.{layer}");
        for name in ["self.query", "self.key", "self.value", "output.dense"] {
            linear(format!("{layer}.attention.{name}"), hidden, hidden);
        }
        linear(format!("{layer}.intermediate.dense"), inner, hidden);
        linear(format!("{layer}.output.dense"), hidden, inner);
    }
    if let Some([dense, out]) = head(config) {
        linear(dense.into(), hidden, hidden);
        linear(out.into(), 1, hidden);
    }
    wanted
}

/// Names of the two layers that make a score of the first token's vector, if there is to be one.
pub(crate) fn head(config: &Config) -> Option<[&'static str; 2]> {
    match (config.architecture.task, config.architecture.family) {
        (Task::Embed, _) => None,
        (Task::Score, Family::Bert) => Some(["bert.pooler.dense", "classifier"]),
        (Task::Score, Family::Roberta) => Some(["classifier.dense", "classifier.out_proj"]),
    }
}

/// The stored tensors by the names that are wanted, if all are there as they should be, and no others.
fn verify<'a>(
    stored: &'a [TensorInfo],
    wanted: &BTreeMap<String, Vec<usize>>,
    prefix: &str,
) -> Result<Vec<(String, &'a TensorInfo)>, LoadError> {
    let (mut found, mut reasons): (BTreeMap<String, &TensorInfo>, _) = (BTreeMap::new(), Vec::new());
    for info in stored {
        let name = current_name(&info.name);
        match wanted.get(&name) {
            None if ignorable(&name, prefix) => {}
            None => reasons.push(format!("tensor {name} is not part of this model")),
            Some(shape) if *shape != info.shape => {
                reasons.push(format!("tensor {name} has shape {:?}, the config asks for {shape:?}", info.shape));
            }
            Some(_) if !["F32", "F16", "BF16"].contains(&info.dtype.as_str()) => {
                reasons.push(format!("tensor {name} has dtype {}; weights are F32, F16 or BF16", info.dtype));
            }
            Some(_) => {
                if found.insert(name.clone(), info).is_some() {
                    reasons.push(format!("tensor {name} is there twice, by its new name and its old one"));
                }
            }
        }
    }
    // One of the wrong shape is not missing besides.
    let there: Vec<String> = stored.iter().map(|info| current_name(&info.name)).collect();
    let missing = wanted.keys().filter(|name| !there.contains(name));
    reasons.extend(missing.map(|name| format!("tensor {name} is missing")));
    LoadError::tensors(reasons)?;
    Ok(found.into_iter().collect())
}

/// The first BERT checkpoints call weight and bias of their norms by Greek letters.
fn current_name(name: &str) -> String {
    match (name.strip_suffix(".gamma"), name.strip_suffix(".beta")) {
        (Some(norm), _) => format!("{norm}.weight"),
        (_, Some(norm)) => format!("{norm}.bias"),
        _ => name.to_owned(),
    }
}

/// Buffers, and heads for what is not asked of the model.
fn ignorable(name: &str, prefix: &str) -> bool {
    let at = |start: &str| name.starts_with(start);
    let in_model = name.strip_prefix(prefix).unwrap_or_default();
    ["embeddings.position_ids", "embeddings.token_type_ids"].contains(&in_model)
        || in_model.starts_with("pooler.")
        || at("cls.")
        || at("lm_head.")
}

fn widened(source: &dyn Source, info: &TensorInfo) -> Result<Tensor, LoadError> {
    let dtype = match info.dtype.as_str() {
        "F16" => DType::F16,
        "BF16" => DType::BF16,
        _ => DType::F32,
    };
    let mut tensor = None;
    let mut read = |bytes: &[u8]| tensor = Some(Tensor::from_raw_buffer(bytes, dtype, &info.shape, &Device::Cpu));
    source.tensor(&info.name, &mut read).map_err(|reason| LoadError::File { file: info.name.clone(), reason })?;
    let unread = || LoadError::File { file: info.name.clone(), reason: "it was not read".into() };
    let tensor = tensor.ok_or_else(unread)??.to_dtype(DType::F32)?;
    let finite = tensor.flatten_all()?.to_vec1::<f32>()?.iter().all(|x| x.is_finite());
    if finite { Ok(tensor) } else { Err(LoadError::NotFinite { tensor: info.name.clone() }) }
}
