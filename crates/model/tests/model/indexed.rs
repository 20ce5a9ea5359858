//! What an indexer chooses decides what is computed: each way to choose otherwise shows in the logits.

use serde_json::json;

use crate::common::checkpoint::{Copy, Tensor};
use crate::common::off_by;

const CASES: [&str; 2] = ["deepseek-v32", "deepseek-v32-b"];
/// What goldens are held to.
const TOLERANCE: f64 = 1e-3;

fn edited(case: &str, edit: impl Fn(&mut Tensor)) -> f64 {
    let copy = Copy::of(case);
    copy.edit_weights(|tensors| tensors.iter_mut().for_each(&edit));
    off_by(case, &copy)
}

#[test]
fn one_position_more_or_less_shows() {
    for (case, top_k) in CASES.into_iter().zip([16, 24]) {
        for (asked, differs) in [(top_k, false), (top_k - 1, true), (top_k + 1, true), (1 << 20, true)] {
            let copy = Copy::of(case);
            copy.edit_config(|c| drop(c.insert("index_topk".into(), json!(asked))));
            let off = off_by(case, &copy);
            assert_eq!(off > TOLERANCE, differs, "{case}, {asked} positions: off by {off}");
        }
    }
}

#[test]
fn each_tensor_of_an_indexer_shows() {
    for case in CASES {
        for name in ["k_norm.bias", "k_norm.weight", "wq_b.weight", "wk.weight", "weights_proj.weight"] {
            let name = format!("layers.0.self_attn.indexer.{name}");
            let off = edited(case, |tensor| {
                if tensor.name.ends_with(&name) {
                    tensor.data.fill(0);
                }
            });
            assert!(off > TOLERANCE, "{case}, {name}: off by {off}");
        }
    }
}
