//! `config.json` and `generation_config.json`: what is read, and what is refused with every reason.

use std::fs;

use crate::common::{CASES, Rng, folder};
use baton_device::{DType, GroupScore, Groups, Scoring};
use baton_model::{Architecture, Family, GenerationConfig, LlamaConfig, ModelConfig, RopeScaling};
use serde_json::{Value, json};

fn config(case: &str) -> Value {
    crate::common::json(folder(case).join("config.json"))
}

fn parse(config: &Value) -> Result<ModelConfig, String> {
    ModelConfig::parse(config.to_string().as_bytes()).map_err(|e| e.to_string())
}

/// The refusal of a golden config in which these fields are replaced.
pub fn refusal(case: &str, fields: Value) -> String {
    let mut config = config(case);
    for (name, value) in fields.as_object().unwrap() {
        config[name] = value.clone();
    }
    parse(&config).expect_err(&fields.to_string())
}

#[test]
fn published_configs_are_read() {
    for (case, architecture) in CASES.iter().zip([
        Architecture::Llama,
        Architecture::Llama,
        Architecture::Llama,
        Architecture::Mistral,
        Architecture::Mixtral,
        Architecture::Qwen2,
        Architecture::Qwen2,
        Architecture::Qwen2,
        Architecture::Qwen3,
        Architecture::Qwen3Moe,
        Architecture::Qwen3Moe,
        Architecture::Phi3,
        Architecture::Gemma2,
        Architecture::Gemma3,
        Architecture::DeepseekV2,
        Architecture::DeepseekV2,
        Architecture::DeepseekV2,
        Architecture::DeepseekV3,
        Architecture::DeepseekV32,
        Architecture::DeepseekV32,
        Architecture::DeepseekV4,
        Architecture::DeepseekV4,
    ]) {
        let config = parse(&config(case)).unwrap();
        assert_eq!(config.architecture, architecture, "{case}");
        assert!(config.dtype.is_some());
    }
}

#[test]
fn the_newer_style_means_the_same() {
    for case in ["llama-rope3", "deepseek-v3", "qwen3"] {
        let old = config(case);
        let mut new = old.clone();
        let fields = new.as_object_mut().unwrap();
        let (theta, scaling) = (fields.remove("rope_theta").unwrap(), fields.remove("rope_scaling").unwrap());
        let mut rope = if scaling.is_null() { json!({"rope_type": "default"}) } else { scaling };
        if let Some(kind) = rope.as_object_mut().unwrap().remove("type") {
            rope["rope_type"] = kind;
        }
        rope["rope_theta"] = theta;
        fields.insert("rope_parameters".into(), rope);
        let dtype = fields.remove("torch_dtype").unwrap();
        fields.insert("dtype".into(), dtype);
        assert_eq!(parse(&new).unwrap(), parse(&old).unwrap(), "{case}");
        assert_eq!(parse(&new).unwrap().dtype, Some(DType::BF16));
    }
}

#[test]
fn configs_as_transformers_rewrites_them_mean_the_same() {
    let rewritten = crate::common::json(folder("configs.json"));
    for case in CASES {
        assert_eq!(parse(&rewritten[case]).unwrap(), parse(&config(case)).unwrap(), "{case}");
    }
}

#[test]
fn unknown_architectures_are_refused_by_name_with_the_supported_ones() {
    let fields = json!({"architectures": ["MambaForCausalLM"], "model_type": "mamba"});
    let message = refusal("qwen3", fields);
    for wanted in ["MambaForCausalLM", "LlamaForCausalLM", "DeepseekV3ForCausalLM"] {
        assert!(message.contains(wanted), "{message}");
    }
    assert!(refusal("qwen3", json!({"model_type": "llama"})).contains("model_type is \"llama\""));
    assert!(refusal("qwen3", json!({"architectures": null, "model_type": "gpt2"})).contains("gpt2"));
    assert!(refusal("qwen3", json!({"architectures": null, "model_type": null})).contains("missing"));
    assert!(refusal("qwen3", json!({"architectures": ["Qwen3ForSequenceClassification"]})).contains("Classification"));
    let mut only_type = config("qwen3");
    only_type.as_object_mut().unwrap().remove("architectures");
    assert_eq!(parse(&only_type).unwrap().architecture, Architecture::Qwen3);
}

#[test]
fn what_is_not_built_is_refused_by_name() {
    for (case, fields, wanted) in [
        (
            "llama-256",
            json!({"quantization_config": {"quant_method": "bitsandbytes"}}),
            "supported: fp8, compressed-tensors, gptq, awq",
        ),
        ("llama-256", json!({"hidden_act": "gelu"}), "hidden_act is \"gelu\""),
        ("mistral-window", json!({"attention_bias": true}), "attention_bias"),
        ("qwen3", json!({"mlp_bias": true}), "mlp_bias"),
        ("llama-256", json!({"sliding_window": 64}), "sliding_window"),
        ("deepseek-v2", json!({"sliding_window": 64}), "DeepseekV2ForCausalLM has full attention only"),
        ("qwen3-moe", json!({"sliding_window": 64, "use_sliding_window": true}), "sliding_window"),
        (
            "qwen3",
            json!({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
            "no sliding_window is in use",
        ),
        ("qwen3", json!({"layer_types": ["full_attention", "chunked_attention", "full_attention"]}), "layer_types"),
        ("qwen3", json!({"layer_types": ["full_attention"]}), "layer_types"),
        ("mistral-window", json!({"layer_types": vec!["full_attention"; 3]}), "layer_types"),
        ("mistral-window", json!({"sliding_window": 0}), "sliding_window is 0"),
        ("gemma2", json!({"sliding_window": null}), "no sliding_window is in use"),
        ("gemma2", json!({"hidden_activation": "gelu"}), "hidden_activation is \"gelu\""),
        ("gemma3", json!({"use_bidirectional_attention": true}), "use_bidirectional_attention"),
        ("phi3", json!({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}), "\"longrope\"; supported"),
        ("llama-256", json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor is 0.5"),
        ("phi3", json!({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.75}}), "factor is 0.75"),
        ("llama-256", json!({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}), "dynamic"),
        ("llama-256", json!({"rope_scaling": {"factor": 2.0}}), "rope_type"),
        ("llama-256", json!({"torch_dtype": "float8_e4m3fn"}), "float8_e4m3fn"),
        ("deepseek-v3", json!({"scoring_func": "softmax"}), "scoring_func"),
        ("deepseek-v3", json!({"topk_method": "greedy"}), "topk_method"),
        ("deepseek-v3", json!({"moe_layer_freq": 2}), "moe_layer_freq"),
        ("deepseek-v2", json!({"scoring_func": "sigmoid"}), "scoring_func"),
        ("deepseek-v2", json!({"topk_method": "noaux_tc"}), "topk_method"),
        ("deepseek-v3", json!({"num_key_value_heads": 2}), "num_key_value_heads"),
        ("deepseek-v32", json!({"index_topk": 0}), "index_topk is 0"),
        ("deepseek-v32", json!({"index_topk": null}), "index_topk"),
        ("deepseek-v32", json!({"index_n_heads": 0}), "index_n_heads is 0"),
        ("deepseek-v32", json!({"index_head_dim": 15}), "index_head_dim 15 is less than the 16 columns"),
        ("deepseek-v32", json!({"q_lora_rank": null}), "q_lora_rank"),
        ("deepseek-v32", json!({"layer_types": vec!["full_attention"; 4]}), "layer_types"),
        ("deepseek-v32", json!({"mlp_layer_types": vec!["sparse"; 4]}), "mlp_layer_types"),
        ("deepseek-v3", json!({"architectures": ["DeepseekV41ForCausalLM"]}), "DeepseekV41ForCausalLM"),
        ("deepseek-v4", json!({"architectures": ["DeepseekV41ForCausalLM"]}), "DeepseekV41ForCausalLM"),
        ("deepseek-v4", json!({"model_type": "deepseek_v41"}), "model_type is \"deepseek_v41\""),
        ("deepseek-v4", json!({"architectures": null, "model_type": "deepseek_v41"}), "\"deepseek_v41\"; supported"),
        ("deepseek-v4", json!({"scoring_func": "sigmoid"}), "scoring_func is \"sigmoid\"; supported: \"sqrtsoftplus\""),
        ("deepseek-v4", json!({"topk_method": "greedy"}), "topk_method is \"greedy\""),
        ("deepseek-v4", json!({"norm_topk_prob": false}), "norm_topk_prob is false"),
        ("deepseek-v4", json!({"n_group": 4}), "n_group is 4"),
        ("deepseek-v4", json!({"n_shared_experts": 2}), "n_shared_experts is 2"),
        ("deepseek-v4", json!({"hidden_act": "gelu"}), "hidden_act is \"gelu\""),
        ("deepseek-v4", json!({"num_key_value_heads": 4}), "num_key_value_heads is 4"),
        ("deepseek-v4", json!({"attention_bias": true}), "attention_bias is true"),
        ("deepseek-v4", json!({"mlp_bias": true}), "mlp_bias is true"),
        ("deepseek-v4", json!({"tie_word_embeddings": true}), "tie_word_embeddings is true"),
    ] {
        let message = refusal(case, fields);
        assert!(message.contains(wanted), "{wanted} not in: {message}");
    }
    // What changes nothing is ignored.
    let mut ignored = config("qwen3");
    ignored["auto_map"] = json!({"AutoModel": "evil.py"});
    ignored["layer_types"] = json!(vec!["full_attention"; 3]);
    assert!(parse(&ignored).is_ok());
}

/// The family's part of a golden config in which some fields are replaced and some left out.
pub fn changed(case: &str, fields: Value, left_out: &[&str]) -> ModelConfig {
    let mut config = config(case);
    for (name, value) in fields.as_object().unwrap() {
        config[name] = value.clone();
    }
    left_out.iter().for_each(|name| drop(config.as_object_mut().unwrap().remove(*name)));
    parse(&config).unwrap_or_else(|e| panic!("{case}, {fields}: {e}"))
}

fn llama(config: &ModelConfig) -> &LlamaConfig {
    let Family::Llama(own) = &config.family else { panic!("{config:?}") };
    own
}

#[test]
fn windows_are_of_the_layers_that_transformers_gives_them_to() {
    let sliding = |n: usize, window: usize| vec![Some(window); n];
    let name = |s: &bool| if *s { "sliding_attention" } else { "full_attention" };
    let types = |sliding: &[bool]| sliding.iter().map(name).collect::<Vec<_>>();
    for (case, fields, left_out, expected) in [
        ("mistral-window", json!({}), &[][..], sliding(3, 48)),
        ("mistral-window", json!({"layer_types": vec!["sliding_attention"; 3]}), &[], sliding(3, 48)),
        ("mistral-window", json!({"sliding_window": null}), &[], vec![None; 3]),
        ("mistral-window", json!({}), &["sliding_window"], sliding(3, 4096)),
        ("phi3", json!({}), &[], sliding(2, 100)),
        ("phi3", json!({}), &["sliding_window"], vec![None; 2]),
        ("qwen2-tied", json!({}), &[], vec![None; 2]),
        ("qwen2-tied", json!({"use_sliding_window": true, "max_window_layers": 1}), &[], vec![None, Some(64)]),
        ("qwen2-tied", json!({"use_sliding_window": true}), &["max_window_layers"], vec![None; 2]),
        ("qwen3", json!({"layer_types": vec!["full_attention"; 3]}), &[], vec![None; 3]),
        (
            "qwen3",
            json!({"use_sliding_window": true, "sliding_window": 9, "layer_types": types(&[true, false, true])}),
            &[],
            vec![Some(9), None, Some(9)],
        ),
        ("gemma2", json!({}), &[], vec![Some(40), None]),
        ("gemma2", json!({"layer_types": types(&[false, true])}), &[], vec![None, Some(40)]),
        ("gemma3", json!({}), &[], vec![Some(32), None, Some(32), None]),
        ("gemma3", json!({"num_hidden_layers": 7}), &["sliding_window_pattern"], {
            let mut windows = sliding(7, 32);
            windows[5] = None;
            windows
        }),
    ] {
        assert_eq!(llama(&changed(case, fields.clone(), left_out)).windows, expected, "{case}, {fields}");
    }
}

#[test]
fn soft_caps_are_gemma_2s_unless_stated() {
    let caps = |config: &ModelConfig| (llama(config).softcap, config.logit_softcap);
    let names = ["attn_logit_softcapping", "final_logit_softcapping"];
    assert_eq!(caps(&changed("gemma2", json!({}), &[])), (Some(5.0), Some(8.0)));
    assert_eq!(caps(&changed("gemma2", json!({}), &names)), (Some(50.0), Some(30.0)));
    assert_eq!(caps(&changed("gemma2", json!({names[0]: null, names[1]: null}), &[])), (None, None));
    assert_eq!(caps(&changed("gemma3", json!({}), &names)), (None, None));
    assert_eq!(caps(&changed("qwen3", json!({names[0]: 3.0}), &[])), (None, None));
}

#[test]
fn gemma_3_has_two_rotary_bases_in_either_style() {
    let old = changed("gemma3", json!({}), &[]);
    let windowed = llama(&old).window_rope.clone().unwrap();
    assert_eq!((old.rope.theta, &old.rope.scaling), (1e6, &RopeScaling::Linear { factor: 8.0 }));
    assert_eq!((windowed.theta, &windowed.scaling), (1e4, &RopeScaling::None));
    let parameters = json!({
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    });
    let old_names = ["rope_theta", "rope_local_base_freq", "rope_scaling"];
    assert_eq!(changed("gemma3", json!({"rope_parameters": parameters}), &old_names), old);
    let message =
        refusal("gemma3", json!({"rope_parameters": {"full_attention": {"rope_type": "odd"}, "sliding_attention": 3}}));
    for wanted in ["rope_parameters.full_attention.rope_type", "rope_parameters.sliding_attention is not an object"] {
        assert!(message.contains(wanted), "{message}");
    }
}

#[test]
fn experts_are_in_the_layers_that_the_config_names() {
    let layers = |case, fields| changed(case, fields, &[]).moe.unwrap().layers;
    assert_eq!(layers("qwen3-moe", json!({})), [true; 3]);
    assert_eq!(layers("qwen3-moe", json!({"decoder_sparse_step": 2})), [false, true, false]);
    assert_eq!(layers("qwen3-moe", json!({"mlp_only_layers": [0, 2]})), [false, true, false]);
    assert_eq!(layers("deepseek-v2", json!({})), [false, true, true]);
    assert_eq!(changed("qwen3", json!({}), &[]).moe, None);
}

#[test]
fn v2_weighs_experts_by_plain_shares_and_groups_by_their_best() {
    let routing = |case, fields| changed(case, fields, &[]).moe.unwrap().routing;
    let grouped = routing("deepseek-v2", json!({"norm_topk_prob": true}));
    assert_eq!(grouped.groups, Some(Groups { count: 4, kept: 2, score: GroupScore::Best }));
    assert_eq!((grouped.norm_topk_prob, grouped.scaling_factor, &grouped.scoring), (false, 4.0, &Scoring::Softmax));
    assert_eq!(routing("deepseek-v2", json!({"topk_method": "greedy"})).groups, None);
    assert_eq!(routing("deepseek-v2-lite", json!({})).groups, None);
}

#[test]
fn absurd_fields_are_refused_all_at_once() {
    let message = refusal(
        "llama-rope3",
        json!({
            "hidden_size": 0, "num_hidden_layers": -3, "vocab_size": 1e30, "intermediate_size": "wide",
            "rms_norm_eps": null, "max_position_embeddings": u64::MAX, "tie_word_embeddings": "yes",
            "eos_token_id": "end", "rope_theta": -1.0,
            "rope_scaling": {"rope_type": "llama3", "factor": 0.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0},
        }),
    );
    for wanted in [
        "hidden_size is 0",
        "num_hidden_layers is -3",
        "vocab_size",
        "intermediate_size is \"wide\"",
        "rms_norm_eps is missing",
        "max_position_embeddings",
        "tie_word_embeddings is \"yes\"",
        "eos_token_id is \"end\"",
        "rope_theta is -1",
        "rope_scaling.factor is 0",
        "low_freq_factor below high_freq_factor",
        "rope_scaling.original_max_position_embeddings is missing",
    ] {
        assert!(message.contains(wanted), "{wanted} not in: {message}");
    }
    for (case, fields, wanted) in [
        ("llama-256", json!({"num_key_value_heads": 3}), "not a multiple"),
        ("llama-256", json!({"hidden_size": 255}), "not a multiple"),
        ("qwen3", json!({"head_dim": 31}), "odd"),
        ("deepseek-v3", json!({"n_group": 3}), "3 groups"),
        ("deepseek-v3", json!({"topk_group": 5}), "topk_group 5"),
        ("deepseek-v3", json!({"num_experts_per_tok": 9}), "num_experts_per_tok 9"),
        ("deepseek-v3", json!({"first_k_dense_replace": 4}), "first_k_dense_replace"),
        ("deepseek-v3", json!({"n_routed_experts": 4096, "num_hidden_layers": 1000}), "experts"),
        ("qwen3-moe", json!({"num_experts_per_tok": 13}), "num_experts_per_tok 13 exceeds the 12"),
        ("qwen3-moe", json!({"mlp_only_layers": [-1]}), "mlp_only_layers"),
        ("deepseek-v2", json!({"num_experts_per_tok": 9}), "exceeds the 8 experts"),
        ("gemma2", json!({"attn_logit_softcapping": 0.0}), "attn_logit_softcapping is 0"),
    ] {
        let message = refusal(case, fields);
        assert!(message.contains(wanted), "{wanted} not in: {message}");
    }
    let long = refusal("qwen3", json!({"hidden_act": "x".repeat(100_000)}));
    assert!(long.len() < 500, "a long value is cut");
}

#[test]
fn json_that_is_none_is_refused() {
    let deep = "[".repeat(200_000);
    for bytes in [&b"{"[..], b"[]", b"\xff\xfe", b"null", deep.as_bytes()] {
        assert!(ModelConfig::parse(bytes).unwrap_err().to_string().starts_with("config.json"));
    }
}

/// Any single field of any config replaced by any odd value: an error or a config, never a panic.
#[test]
fn no_field_makes_parsing_panic() {
    let odd = [
        json!(null),
        json!(0),
        json!(1),
        json!(-1),
        json!(3),
        json!(u64::MAX),
        json!(1e308),
        json!(0.5),
        json!(""),
        json!([]),
        json!({}),
        json!([1, "a"]),
        json!(true),
        json!({"rope_type": "yarn", "factor": 1e4, "original_max_position_embeddings": 1}),
        json!({"rope_type": "llama3", "factor": 1, "low_freq_factor": 1e-5, "high_freq_factor": 1e5}),
    ];
    let mut rng = Rng(9);
    for case in CASES {
        let config = config(case);
        let names: Vec<&String> = config.as_object().unwrap().keys().collect();
        for name in &names {
            for value in &odd {
                let mut changed = config.clone();
                changed[name.as_str()] = value.clone();
                changed[names[rng.below(names.len())].as_str()] = odd[rng.below(odd.len())].clone();
                if let Ok(config) = parse(&changed) {
                    assert!(config.rope.inv_freq().iter().all(|f| f.is_finite()), "{name} {value}");
                }
            }
        }
    }
}

#[test]
fn generation_configs_are_read_and_checked() {
    let config = parse(&config("qwen3")).unwrap();
    let file = fs::read(folder("qwen3").join("generation_config.json")).unwrap();
    assert_eq!(GenerationConfig::parse(Some(&file), &config).unwrap().eos_token_ids, [500, 498]);
    assert_eq!(GenerationConfig::parse(None, &config).unwrap().eos_token_ids, [500]);
    let all = br#"{"eos_token_id": 7, "do_sample": true, "temperature": 0.6, "top_k": -1, "top_p": 0.95,
        "min_p": 0.0, "repetition_penalty": 1.05, "max_new_tokens": 2048, "transformers_version": "4.51.0"}"#;
    let expected = GenerationConfig {
        eos_token_ids: vec![7],
        do_sample: Some(true),
        temperature: Some(0.6),
        top_k: Some(0),
        top_p: Some(0.95),
        min_p: Some(0.0),
        repetition_penalty: Some(1.05),
        max_new_tokens: Some(2048),
    };
    assert_eq!(GenerationConfig::parse(Some(all), &config).unwrap(), expected);
    let bad = br#"{"temperature": -1, "top_p": 1.5, "top_k": -2, "repetition_penalty": 0, "eos_token_id": [1.5]}"#;
    let message = GenerationConfig::parse(Some(bad), &config).unwrap_err().to_string();
    for wanted in ["generation_config.json", "temperature", "top_p", "top_k", "repetition_penalty", "eos_token_id"] {
        assert!(message.contains(wanted), "{wanted} not in: {message}");
    }
}

#[test]
fn rope_scaling_keeps_high_frequencies_and_divides_low_ones() {
    let plain = parse(&config("llama-256")).unwrap().rope.inv_freq();
    let with = |scaling: Value| {
        let mut config = config("llama-256");
        config["rope_scaling"] = scaling;
        parse(&config).unwrap().rope
    };
    let linear = with(json!({"type": "linear", "factor": 4.0})).inv_freq();
    assert!(plain.iter().zip(&linear).all(|(p, l)| *l == p / 4.0));

    let yarn = with(json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}));
    let llama3 = with(json!({"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256}));
    for scaled in [yarn.inv_freq(), llama3.inv_freq()] {
        assert_eq!(scaled[0], plain[0]);
        assert!((scaled[31] / plain[31] - 0.25).abs() < 1e-6);
        assert!(scaled.windows(2).all(|w| w[0] > w[1]), "{scaled:?}");
    }
    // 0.1 ln(4) + 1; outside DeepSeek no factor on the softmax scale is given.
    assert!((yarn.attention_factor() - 1.138_629_4).abs() < 1e-6);
    assert_eq!((yarn.softmax_factor(), llama3.attention_factor()), (1.0, 1.0));
    let RopeScaling::Yarn { beta_fast, beta_slow, .. } = yarn.scaling else { panic!("{yarn:?}") };
    assert_eq!((beta_fast, beta_slow), (32.0, 1.0));
}
