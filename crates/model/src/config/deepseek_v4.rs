//! The fields of DeepSeek-V4. Published files state how many tokens each layer pools and how many first layers choose experts by
//! token; newer ones, as transformers writes them, the types of layers. Both are read.

use std::ops::RangeInclusive;

use baton_device::{Routing, Scoring};
use serde_json::{Map, Value, json};

use super::families::{indexer, scaling_factor};
use super::fields::{Fields, short};
use super::parse::{HEAD_DIM, HEADS, POSITIONS, WIDTH};
use super::{DeepseekV4Config, RopeConfig, V4Attention, V4Layer, rope};

const RATE: RangeInclusive<usize> = 1..=1 << 16;
/// Four in published models; the CPU has a vector of 16 for them.
const STREAMS: RangeInclusive<usize> = 1..=16;
const ITERATIONS: RangeInclusive<usize> = 1..=1 << 10;
/// Tokens of an entry of sparse and of heavily compressed layers, in published models.
const RATES: [usize; 2] = [4, 128];
const WINDOW: &str = "sliding_attention";
const SPARSE: &str = "compressed_sparse_attention";
const HEAVY: &str = "heavily_compressed_attention";

/// Its own part, and the rotary embedding of the layers that pool nothing.
pub(super) fn parse(
    fields: &mut Fields<'_>,
    [num_layers, num_heads, max_positions]: [usize; 3],
) -> (DeepseekV4Config, RopeConfig) {
    fields.only("num_key_value_heads", &[json!(1)]);
    fields.only("attention_bias", &[json!(false)]);
    fields.only("tie_word_embeddings", &[json!(false)]);
    let head_dim = fields.size("head_dim", HEAD_DIM);
    let rope_dim = rope_dim(fields, head_dim);
    let o_groups = fields.size("o_groups", HEADS);
    if !num_heads.is_multiple_of(o_groups) {
        fields.refuse(format!("num_attention_heads {num_heads} is not a multiple of o_groups {o_groups}"));
    }
    let layers = layers(fields, num_layers);
    let is_sparse = layers.iter().any(|layer| matches!(layer.attention, V4Attention::Sparse { .. }));
    let [rope, compress_rope] = rope::parse_pooling(fields, rope_dim, rope_dim as f64 / head_dim as f64, max_positions);
    let limit = fields.optional_number("swiglu_limit", "a positive number", |v| v > 0.0 && v < 1e9);
    let own = DeepseekV4Config {
        q_lora_rank: fields.size("q_lora_rank", WIDTH),
        head_dim,
        rope_dim,
        o_lora_rank: fields.size("o_lora_rank", WIDTH),
        o_groups,
        window: fields.size("sliding_window", POSITIONS),
        layers,
        compress_rope,
        indexer: is_sparse.then(|| indexer(fields, rope_dim)),
        streams: fields.size("hc_mult", STREAMS),
        mixing_iterations: fields.size("hc_sinkhorn_iters", ITERATIONS),
        mixing_eps: fields.number("hc_eps", "a number from 0 to 1", |v| (0.0..=1.0).contains(&v)) as f32,
        expert_limit: limit.unwrap_or(10.0) as f32,
    };
    (own, rope)
}

/// Columns of a head that are rotated: `qk_rope_head_dim`, or a share of the head. Where both are there, they say the same.
fn rope_dim(fields: &mut Fields<'_>, head_dim: usize) -> usize {
    let share = fields.optional_number("partial_rotary_factor", "a number above 0 up to 1", |v| v > 0.0 && v <= 1.0);
    let Some(columns) = share.map(|share| share * head_dim as f64) else {
        return fields.size("qk_rope_head_dim", 1..=head_dim);
    };
    let dim = fields.size_or("qk_rope_head_dim", (columns.round() as usize).max(1), 1..=head_dim);
    if (columns - dim as f64).abs() > 1e-6 {
        fields.refuse(format!("partial_rotary_factor makes {columns} of head_dim {head_dim}, not {dim} columns"));
    }
    dim
}

fn layers(fields: &mut Fields<'_>, num_layers: usize) -> Vec<V4Layer> {
    let [sparse, heavy] = rates(fields);
    if fields.get("compress_ratios").is_some() && [sparse, heavy] != RATES {
        fields.refuse(format!("compress_ratios has rates of 4 and 128, other fields {sparse} and {heavy}"));
    }
    let [sparse, heavy] = [V4Attention::Sparse { rate: sparse }, V4Attention::Heavy { rate: heavy }];
    let types = by_layer(fields, "layer_types", [num_layers; 2], &[WINDOW, SPARSE, HEAVY].join(", "), |value| {
        [(WINDOW, V4Attention::Window), (SPARSE, sparse), (HEAVY, heavy)].into_iter().find(|(name, _)| value == name)
    });
    // Behind the layers' own there may be those of layers that predict further tokens.
    let most = num_layers + fields.size_or("num_nextn_predict_layers", 1, 0..=1 << 10);
    let ratios = by_layer(fields, "compress_ratios", [num_layers, most], "0, 4, 128", |value| {
        [(0, V4Attention::Window), (4, sparse), (128, heavy)].into_iter().find(|(ratio, _)| value == ratio)
    });
    let attention = agreed(fields, ["layer_types", "compress_ratios"], [types, ratios]);

    let kinds = [("hash_moe", true), ("moe", false)];
    let types = by_layer(fields, "mlp_layer_types", [num_layers; 2], "hash_moe, moe", |value| {
        kinds.into_iter().find(|(name, _)| value == name)
    });
    let first = fields.optional_size("num_hash_layers", 0..=num_layers);
    let first = first.map(|first| (0..num_layers).map(|layer| layer < first).collect());
    let hashed = agreed(fields, ["mlp_layer_types", "num_hash_layers"], [types, first]);
    attention.into_iter().zip(hashed).map(|(attention, hashed)| V4Layer { attention, hashed }).collect()
}

/// Tokens of an entry in sparse and in heavily compressed layers.
fn rates(fields: &mut Fields<'_>) -> [usize; 2] {
    let empty = Map::new();
    let map = match fields.get("compress_rates") {
        None => &empty,
        Some(Value::Object(map)) => map,
        Some(_) => {
            fields.refuse("compress_rates is not an object");
            &empty
        }
    };
    let mut own = Fields::new(map, "compress_rates.");
    // The second are the names that transformers first had.
    let names = [(SPARSE, "compress_rate_csa"), (HEAVY, "compress_rate_hca")];
    let rates = std::array::from_fn(|i| {
        let (name, older) = names[i];
        let rate = own.optional_size(name, RATE);
        let other = fields.optional_size(older, RATE);
        if other.is_some() && rate.is_some() && other != rate {
            fields.refuse(format!("{older} and compress_rates.{name} differ"));
        }
        rate.or(other).unwrap_or(RATES[i])
    });
    fields.reasons.append(&mut own.reasons);
    rates
}

/// What `read` gives for each layer, of a list that may have more entries behind them; `None` if it is absent or refused.
fn by_layer<K, T>(
    fields: &mut Fields<'_>,
    name: &str,
    [num_layers, most]: [usize; 2],
    supported: &str,
    read: impl Fn(&Value) -> Option<(K, T)>,
) -> Option<Vec<T>> {
    let value = fields.get(name)?;
    let Some(list) = value.as_array().filter(|list| (num_layers..=most).contains(&list.len())) else {
        fields.refuse(format!("{name} is not a list with an entry for each of {num_layers} layers"));
        return None;
    };
    let entry = |(i, value): (usize, &Value)| match read(value) {
        Some((_, entry)) => Ok(entry),
        None => Err(format!("{name}[{i}] is {}; supported: {supported}", short(value))),
    };
    match list.iter().enumerate().map(entry).collect::<Result<Vec<T>, String>>() {
        Ok(mut entries) => {
            entries.truncate(num_layers);
            Some(entries)
        }
        Err(reason) => {
            fields.refuse(reason);
            None
        }
    }
}

/// What two fields say, of which one may be absent; nothing if they are refused.
fn agreed<T: PartialEq>(fields: &mut Fields<'_>, names: [&str; 2], said: [Option<Vec<T>>; 2]) -> Vec<T> {
    let [first, second] = names;
    match said {
        [Some(said), other] => {
            if other.is_some_and(|other| other != said) {
                fields.refuse(format!("{first} and {second} name different layers"));
            }
            said
        }
        [None, Some(said)] => said,
        [None, None] => {
            if names.iter().all(|name| fields.get(name).is_none()) {
                fields.refuse(format!("{first} and {second} are missing"));
            }
            Vec::new()
        }
    }
}

/// How experts are chosen where the token does not: weights are normalised, whatever `norm_topk_prob` says in transformers.
pub(super) fn routing(fields: &mut Fields<'_>, shares: Routing) -> Routing {
    fields.only("scoring_func", &[json!("sqrtsoftplus")]);
    fields.only("topk_method", &[json!("noaux_tc")]);
    fields.only("norm_topk_prob", &[json!(true)]);
    fields.only("n_group", &[json!(1)]);
    fields.only("topk_group", &[json!(1)]);
    fields.only("n_shared_experts", &[json!(1)]);
    Routing {
        scoring: Scoring::SqrtSoftplus { correction_bias: Vec::new() },
        scaling_factor: scaling_factor(fields, 1.5),
        ..shares
    }
}
