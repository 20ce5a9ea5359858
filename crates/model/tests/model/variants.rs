//! Config switches that no golden has, against an equal model written the other way.

use crate::common::checkpoint::{Copy, Loaded, Tensor, find, probe};
use serde_json::json;

const LAYERS: usize = 3;
const HIDDEN: usize = 96;
const HEADS: usize = 4;
const NOPE: usize = 32;
const ROPE: usize = 16;
const RANK: usize = 32;

fn attention(layer: usize, name: &str) -> String {
    format!("model.layers.{layer}.self_attn.{name}.weight")
}

fn f32_tensor(name: String, shape: Vec<usize>, values: &[f32]) -> Tensor {
    Tensor { name, dtype: "F32".into(), shape, data: values.iter().flat_map(|v| v.to_le_bytes()).collect() }
}

/// Small numbers without pattern.
fn noise(len: usize) -> Vec<f32> {
    let mut rng = crate::common::Rng(len as u64);
    (0..len).map(|_| (rng.below(2001) as f32 / 1000.0 - 1.0) * 0.2).collect()
}

#[track_caller]
fn assert_close(a: Loaded, b: Loaded, tolerance: f32) {
    let (a, b) = (probe(a), probe(b));
    let worst = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst <= tolerance, "off by {worst}");
}

/// Where the input norm's weight is one, `h` has a mean square of one, so that projecting it by the
/// identity and norming it again changes nothing: a query with a latent equals a direct one.
#[test]
fn a_direct_query_is_a_latent_one_through_the_identity() {
    let query = noise(HEADS * (NOPE + ROPE) * HIDDEN);
    let ones = vec![1.0; HIDDEN];
    let identity: Vec<f32> = (0..HIDDEN * HIDDEN).map(|i| if i / HIDDEN == i % HIDDEN { 1.0 } else { 0.0 }).collect();
    let variant = |direct: bool| {
        let copy = Copy::of("deepseek-v3");
        copy.edit_config(|c| drop(c.insert("q_lora_rank".into(), if direct { json!(null) } else { json!(HIDDEN) })));
        copy.edit_weights(|tensors| {
            // The extra layer stays: it is ignored whatever it holds.
            let queries =
                |t: &Tensor| (0..LAYERS).any(|l| t.name.starts_with(&attention(l, "q_").replace(".weight", "")));
            tensors.retain(|t| !queries(t));
            for l in 0..LAYERS {
                let norm = format!("model.layers.{l}.input_layernorm.weight");
                *find(tensors, &norm) = f32_tensor(norm.clone(), vec![HIDDEN], &ones);
                let rows = HEADS * (NOPE + ROPE);
                if direct {
                    tensors.push(f32_tensor(attention(l, "q_proj"), vec![rows, HIDDEN], &query));
                } else {
                    tensors.push(f32_tensor(attention(l, "q_a_proj"), vec![HIDDEN, HIDDEN], &identity));
                    tensors.push(f32_tensor(attention(l, "q_a_layernorm"), vec![HIDDEN], &ones));
                    tensors.push(f32_tensor(attention(l, "q_b_proj"), vec![rows, HIDDEN], &query));
                }
            }
        });
        copy.load().unwrap()
    };
    assert_close(variant(true), variant(false), 1e-3);
}

/// Moves the even rotary rows in front of the odd ones, in every head of `width` rows that ends with them.
fn halve_pairs(tensor: &mut Tensor, width: usize) {
    let row = tensor.data.len() / tensor.shape[0];
    let rope = ROPE * row;
    for head in tensor.data.chunks_mut(width * row) {
        let start = head.len() - rope;
        let pairs = head[start..].to_vec();
        let order = (0..ROPE).step_by(2).chain((1..ROPE).step_by(2));
        for (to, from) in order.enumerate() {
            head[start + to * row..][..row].copy_from_slice(&pairs[from * row..][..row]);
        }
    }
}

#[test]
fn rotary_pairs_may_lie_side_by_side_or_in_halves() {
    let copy = Copy::of("deepseek-v3");
    let expected = copy.load().unwrap();
    copy.edit_config(|c| drop(c.insert("rope_interleave".into(), json!(false))));
    copy.edit_weights(|tensors| {
        for l in 0..LAYERS {
            halve_pairs(find(tensors, &attention(l, "q_b_proj")), NOPE + ROPE);
            halve_pairs(find(tensors, &attention(l, "kv_a_proj_with_mqa")), RANK + ROPE);
        }
    });
    assert_close(copy.load().unwrap(), expected, 1e-4);
}

/// A shared expert whose last projection is zero adds nothing.
#[test]
fn no_shared_experts_are_ones_that_add_nothing() {
    let variant = |present: bool| {
        let copy = Copy::of("deepseek-v3");
        copy.edit_config(|c| drop(c.insert("n_shared_experts".into(), json!(u8::from(present)))));
        copy.edit_weights(|tensors| {
            for t in tensors.iter_mut().filter(|t| t.name.ends_with("shared_experts.down_proj.weight")) {
                t.data.fill(0);
            }
            tensors.retain(|t| present || !t.name.contains("shared_experts"));
        });
        probe(copy.load().unwrap())
    };
    assert!(variant(true) == variant(false));
}

/// Embedding and head of their own but with equal bytes, against one for both.
#[test]
fn a_tied_head_is_the_embedding() {
    let tied = Copy::of("qwen3");
    let untied = Copy::of("qwen3");
    untied.edit_config(|c| drop(c.insert("tie_word_embeddings".into(), json!(false))));
    untied.edit_weights(|tensors| {
        let head = Tensor { name: "lm_head.weight".into(), ..find(tensors, "model.embed_tokens.weight").clone() };
        tensors.push(head);
    });
    assert!(probe(tied.load().unwrap()) == probe(untied.load().unwrap()));
}
