//! `config.json` of DeepSeek-V4, in the style of its release and in that of transformers.

use baton_device::Scoring;
use baton_model::{DeepseekV4Config, Family, ModelConfig, RopeConfig, RopeScaling, V4Attention, V4Layer};
use serde_json::{Value, json};

use crate::configs::{changed, refusal};

fn deepseek_v4(config: &ModelConfig) -> &DeepseekV4Config {
    let Family::DeepseekV4(own) = &config.family else { panic!("{config:?}") };
    own
}

#[test]
fn layers_of_deepseek_v4_are_what_ratios_or_types_say() {
    let layers = |config: &ModelConfig| deepseek_v4(config).layers.clone();
    let layer = |attention, hashed| V4Layer { attention, hashed };
    let (window, sparse, heavy) =
        (V4Attention::Window, |rate| V4Attention::Sparse { rate }, |rate| V4Attention::Heavy { rate });
    let published = [
        layer(window, true),
        layer(sparse(4), true),
        layer(heavy(128), false),
        layer(sparse(4), false),
        layer(heavy(128), false),
    ];
    assert_eq!(layers(&changed("deepseek-v4", json!({}), &[])), published);
    let newer = [
        layer(window, true),
        layer(heavy(16), false),
        layer(sparse(3), false),
        layer(window, false),
        layer(sparse(3), false),
    ];
    assert_eq!(layers(&changed("deepseek-v4-b", json!({}), &[])), newer);

    // Entries of prediction layers may be missing; rates may be stated; both styles may say the same.
    let names = ["sliding", "compressed_sparse", "heavily_compressed", "compressed_sparse", "heavily_compressed"];
    let types = names.map(|name| format!("{name}_attention"));
    let kinds = ["hash_moe", "hash_moe", "moe", "moe", "moe"];
    for fields in [
        json!({"compress_ratios": [0, 4, 128, 4, 128]}),
        json!({"layer_types": types, "mlp_layer_types": kinds}),
        json!({"compress_rates": {"compressed_sparse_attention": 4}}),
    ] {
        assert_eq!(layers(&changed("deepseek-v4", fields, &[])), published);
    }
    let fields =
        json!({"layer_types": types, "mlp_layer_types": kinds, "compress_rate_csa": 5, "compress_rate_hca": 7});
    let other = changed("deepseek-v4", fields, &["compress_ratios", "num_hash_layers"]);
    assert_eq!(layers(&other)[1..3], [layer(sparse(5), true), layer(heavy(7), false)]);
    let none = changed("deepseek-v4", json!({"compress_ratios": vec![0; 5], "num_hash_layers": 0}), &["index_topk"]);
    assert_eq!((layers(&none), &deepseek_v4(&none).indexer), (vec![layer(window, false); 5], &None));
}

#[test]
fn layers_of_deepseek_v4_that_are_not_known_are_refused() {
    let types =
        |last: &str| json!(["sliding_attention", "sliding_attention", "sliding_attention", "sliding_attention", last]);
    for (case, fields, wanted) in [
        ("deepseek-v4", json!({"compress_ratios": [0, 4, 128, 8, 0]}), "compress_ratios[3] is 8; supported: 0, 4, 128"),
        ("deepseek-v4", json!({"compress_ratios": [0, 4, 128, 4, 0, 1]}), "compress_ratios[5] is 1"),
        ("deepseek-v4", json!({"compress_ratios": [0, 4, "128", 4, 0]}), "compress_ratios[2] is \"128\""),
        (
            "deepseek-v4",
            json!({"compress_ratios": [0, 4, 128, 4]}),
            "compress_ratios is not a list with an entry for each of 5",
        ),
        ("deepseek-v4", json!({"compress_ratios": vec![0; 7]}), "compress_ratios is not a list"),
        ("deepseek-v4", json!({"compress_ratios": 4}), "compress_ratios is not a list"),
        ("deepseek-v4", json!({"compress_ratios": null}), "layer_types and compress_ratios are missing"),
        ("deepseek-v4", json!({"num_hash_layers": null}), "mlp_layer_types and num_hash_layers are missing"),
        ("deepseek-v4", json!({"num_hash_layers": 6}), "num_hash_layers is 6, not an integer from 0 to 5"),
        (
            "deepseek-v4",
            json!({"layer_types": types("sliding_attention")}),
            "layer_types and compress_ratios name different",
        ),
        ("deepseek-v4-b", json!({"num_hash_layers": 2}), "mlp_layer_types and num_hash_layers name different"),
        (
            "deepseek-v4-b",
            json!({"layer_types": types("full_attention")}),
            "layer_types[4] is \"full_attention\"; supported",
        ),
        ("deepseek-v4-b", json!({"layer_types": ["sliding_attention"]}), "layer_types is not a list"),
        (
            "deepseek-v4-b",
            json!({"mlp_layer_types": ["moe", "moe", "dense", "moe", "moe"]}),
            "mlp_layer_types[2] is \"dense\"",
        ),
        ("deepseek-v4-b", json!({"mlp_layer_types": vec!["moe"; 6]}), "mlp_layer_types is not a list"),
        (
            "deepseek-v4-b",
            json!({"compress_rates": {"compressed_sparse_attention": 0}}),
            "compress_rates.compressed_sparse_attention is 0",
        ),
        (
            "deepseek-v4-b",
            json!({"compress_rates": {"heavily_compressed_attention": -1}}),
            "compress_rates.heavily_compressed_attention is -1",
        ),
        ("deepseek-v4-b", json!({"compress_rates": 4}), "compress_rates is not an object"),
        ("deepseek-v4-b", json!({"compress_rate_csa": 0}), "compress_rate_csa is 0"),
    ] {
        let message = refusal(case, fields);
        assert!(message.contains(wanted), "{wanted} not in: {message}");
    }
}

#[test]
fn deepseek_v4_stretches_the_rotation_of_layers_that_pool_and_no_other() {
    let config = changed("deepseek-v4", json!({}), &[]);
    let scaling = RopeScaling::Yarn {
        factor: 16.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        original_max_positions: 64,
        attention_factor: 1.0,
        softmax_factor: 1.0,
    };
    assert_eq!(config.rope, RopeConfig { dim: 16, theta: 1e4, scaling: RopeScaling::None });
    assert_eq!(deepseek_v4(&config).compress_rope, RopeConfig { dim: 16, theta: 1.6e5, scaling });
    let plain = |theta| RopeConfig { dim: 8, theta, scaling: RopeScaling::None };
    let config = changed("deepseek-v4-b", json!({}), &["qk_rope_head_dim"]);
    assert_eq!((&config.rope, &deepseek_v4(&config).compress_rope), (&plain(1e4), &plain(4e4)));
    let defaults = changed("deepseek-v4", json!({"rope_scaling": null}), &["rope_theta", "compress_rope_theta"]);
    assert_eq!((defaults.rope.theta, deepseek_v4(&defaults).compress_rope.theta), (1e4, 1.6e5));

    let parts = |main: Value, compress: Value| json!({"rope_parameters": {"main": main, "compress": compress}});
    let plain = json!({"rope_type": "default"});
    let yarn = |more: Value| {
        let mut yarn = json!({"rope_type": "yarn", "factor": 4.0});
        yarn.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        yarn
    };
    for (case, fields, wanted) in [
        (
            "deepseek-v4-b",
            parts(yarn(json!({})), plain.clone()),
            "rope_parameters.main.rope_type is \"yarn\"; supported: \"default\"",
        ),
        ("deepseek-v4-b", parts(plain.clone(), yarn(json!({"factor": 0}))), "rope_parameters.compress.factor is 0"),
        (
            "deepseek-v4-b",
            parts(plain.clone(), yarn(json!({"attention_factor": 1.1}))),
            "compress.attention_factor is 1.1",
        ),
        ("deepseek-v4-b", parts(plain.clone(), json!(3)), "rope_parameters.compress is not an object"),
        (
            "deepseek-v4-b",
            parts(plain.clone(), json!({"rope_type": "default", "partial_rotary_factor": 0.5})),
            "compress.partial_rotary_factor is 0.5, not 0.25",
        ),
        ("deepseek-v4", json!({"rope_scaling": yarn(json!({"mscale": 1.0}))}), "rope_scaling.mscale is no part of"),
        (
            "deepseek-v4",
            json!({"rope_scaling": yarn(json!({"rope_theta": 2.0}))}),
            "rope_scaling.rope_theta could be of either",
        ),
        ("deepseek-v4", json!({"compress_rope_theta": 1}), "compress_rope_theta is 1"),
    ] {
        let message = refusal(case, fields);
        assert!(message.contains(wanted), "{wanted} not in: {message}");
    }
}

#[test]
fn the_sizes_of_deepseek_v4_are_read_and_odd_ones_refused() {
    let config = changed("deepseek-v4", json!({}), &["swiglu_limit", "routed_scaling_factor"]);
    let own = deepseek_v4(&config);
    assert_eq!((config.mtp_layers, config.intermediate_size), (0, 16));
    assert_eq!((own.window, own.streams, own.mixing_iterations, own.mixing_eps), (24, 4, 20, 1e-6));
    let moe = config.moe.as_ref().unwrap();
    assert_eq!((&moe.layers, moe.num_shared_experts), (&vec![true; 5], 1));
    assert_eq!(moe.routing.scoring, Scoring::SqrtSoftplus { correction_bias: Vec::new() });
    // As transformers has them where nothing is said.
    assert_eq!((own.expert_limit, moe.routing.scaling_factor), (10.0, 1.5));
    for (fields, wanted) in [
        (json!({"sliding_window": null}), "sliding_window is missing"),
        (json!({"sliding_window": 0}), "sliding_window is 0"),
        (json!({"index_topk": 0}), "index_topk is 0"),
        (json!({"index_n_heads": null}), "index_n_heads is missing"),
        (json!({"index_head_dim": 8}), "index_head_dim 8 is less than the 16 columns"),
        (json!({"o_groups": 3}), "num_attention_heads 4 is not a multiple of o_groups 3"),
        (json!({"o_groups": 0}), "o_groups is 0"),
        (json!({"o_lora_rank": null}), "o_lora_rank is missing"),
        (json!({"q_lora_rank": null}), "q_lora_rank is missing"),
        (json!({"head_dim": null}), "head_dim is missing"),
        (json!({"moe_intermediate_size": null}), "moe_intermediate_size is missing"),
        (json!({"num_experts_per_tok": 9}), "num_experts_per_tok 9 exceeds the 8 experts"),
        (json!({"qk_rope_head_dim": null}), "qk_rope_head_dim is missing"),
        (json!({"qk_rope_head_dim": 15}), "the rotary width 15 is odd"),
        (json!({"qk_rope_head_dim": 50}), "qk_rope_head_dim is 50, not an integer from 1 to 48"),
        (json!({"partial_rotary_factor": 0.25}), "partial_rotary_factor makes 12 of head_dim 48, not 16 columns"),
        (json!({"partial_rotary_factor": 0.3, "qk_rope_head_dim": null}), "of head_dim 48, not 14 columns"),
        (json!({"partial_rotary_factor": 1.5}), "partial_rotary_factor is 1.5"),
        (json!({"compress_rate_csa": 5}), "compress_ratios has rates of 4 and 128, other fields 5 and 128"),
        (json!({"hc_mult": 0}), "hc_mult is 0"),
        (json!({"hc_mult": 17}), "hc_mult is 17, not an integer from 1 to 16"),
        (json!({"hc_sinkhorn_iters": 0}), "hc_sinkhorn_iters is 0"),
        (json!({"hc_eps": null}), "hc_eps is missing"),
        (json!({"swiglu_limit": 0}), "swiglu_limit is 0"),
    ] {
        let message = refusal("deepseek-v4", fields);
        assert!(message.contains(wanted), "{wanted} not in: {message}");
    }
}
