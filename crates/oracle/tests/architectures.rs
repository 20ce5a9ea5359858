//! Every architecture that candle-transformers has, on the golden checkpoints: logits after each prompt and
//! over decode steps, ours on the reference backend against candle's, both in float32.
//!
//! Where candle 0.11.1 computes something else than the checkpoint's own framework does, both models are
//! given a config without that feature; the case says so and by how much candle is off with it. The goldens of
//! transformers judge the feature itself.

mod common;

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models;
use common::Feeding::{self, Afresh, ByToken, Cached};
use common::{Feed, TOLERANCE, candle, compare, golden, json, ours, texts};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tempfile::TempDir;

type Build = fn(&Value, VarBuilder<'static>) -> Result<Feed>;

struct Case {
    name: &'static str,
    /// Set in the config that both read.
    both: Value,
    /// Set besides in the config that candle reads.
    candle: Value,
    feeding: Feeding,
    build: Build,
}

impl Case {
    fn of(name: &'static str, build: Build) -> Self {
        Self { name, both: json!({}), candle: json!({}), feeding: Cached, build }
    }
}

fn config<T: DeserializeOwned>(config: &Value) -> T {
    serde_json::from_value(config.clone()).unwrap()
}

fn llama(c: &Value, vb: VarBuilder<'static>) -> Result<Feed> {
    let config = config::<models::llama::LlamaConfig>(c).into_config(false);
    let model = models::llama::Llama::load(vb, &config)?;
    let mut cache = models::llama::Cache::new(true, DType::F32, &config, &Device::Cpu)?;
    Ok(candle(move |tokens, position| model.forward(tokens, position, &mut cache)))
}

/// Models that are built and called alike.
macro_rules! causal {
    ($($name:ident: $config:path, $model:path $(, $flag:literal)?;)*) => {
        $(
            fn $name(c: &Value, vb: VarBuilder<'static>) -> Result<Feed> {
                let mut model = <$model>::new($($flag,)? &config::<$config>(c), vb)?;
                Ok(candle(move |tokens, position| model.forward(tokens, position)))
            }
        )*
    };
}

causal! {
    mistral: models::mistral::Config, models::mistral::Model;
    mixtral: models::mixtral::Config, models::mixtral::Model;
    qwen2: models::qwen2::Config, models::qwen2::ModelForCausalLM;
    qwen3: models::qwen3::Config, models::qwen3::ModelForCausalLM;
    qwen3_moe: models::qwen3_moe::Config, models::qwen3_moe::ModelForCausalLM;
    phi3: models::phi3::Config, models::phi3::Model;
    gemma2: models::gemma2::Config, models::gemma2::Model, false;
    gemma3: models::gemma3::Config, models::gemma3::Model, false;
    deepseek2: models::deepseek2::DeepSeekV2Config, models::deepseek2::DeepSeekV2;
}

/// The case of a golden checkpoint.
fn case(name: &str) -> Case {
    // Candle counts the distance to the oldest token in sight, transformers the tokens in sight; and it masks a
    // context that is computed at once, not a step on top of the cache.
    let window = |tokens: usize| json!({"sliding_window": tokens - 1});
    // Longer than any context here.
    let unlimited = json!({"sliding_window": 1024});
    match name {
        "llama-rope3" => Case::of("llama-rope3", llama),
        "llama-256" => Case::of("llama-256", llama),
        "mistral-window" => Case { candle: window(48), feeding: Afresh, ..Case::of("mistral-window", mistral) },
        "mixtral" => Case {
            candle: json!({"sliding_window": 39, "use_flash_attn": false}),
            feeding: Afresh,
            ..Case::of("mixtral", mixtral)
        },
        // Candle does not read use_sliding_window, which is false here.
        "qwen2-tied" => Case { candle: unlimited, ..Case::of("qwen2-tied", qwen2) },
        "qwen2-untied" => Case { candle: unlimited, ..Case::of("qwen2-untied", qwen2) },
        // Candle does not read max_window_layers: every layer has the window.
        "qwen2-window" => Case {
            both: json!({"max_window_layers": 0}),
            candle: window(24),
            feeding: Afresh,
            ..Case::of("qwen2-window", qwen2)
        },
        "qwen3" => Case::of("qwen3", qwen3),
        "qwen3-moe" => Case::of("qwen3-moe", qwen3_moe),
        // Candle has no window in Phi-3.
        "phi3" => Case { both: json!({"sliding_window": null}), ..Case::of("phi3", phi3) },
        // Candle gives every layer the window, not every other, and scales by head_dim.
        "gemma2" => {
            Case { both: json!({"sliding_window": 1024, "query_pre_attn_scalar": 32}), ..Case::of("gemma2", gemma2) }
        }
        // Candle scales by head_dim and has no scaled rope. Its cache refuses several tokens at once ("slice-set
        // only supports contiguous tensors"), and holds exactly the window.
        "gemma3" => Case {
            both: json!({"rope_scaling": null, "query_pre_attn_scalar": 32}),
            feeding: ByToken,
            ..Case::of("gemma3", gemma3)
        },
        // Candle takes the best experts for the best groups ("gather invalid index 5 with dim size 4"), and
        // rms_norm_eps for the norms of the latents, which is 1e-6 in transformers whatever the config says.
        "deepseek-v2" => {
            Case { both: json!({"topk_method": "greedy", "rms_norm_eps": 1e-6}), ..Case::of("deepseek-v2", deepseek2) }
        }
        "deepseek-v2-bias" => Case::of("deepseek-v2-bias", deepseek2),
        "deepseek-v2-lite" => Case::of("deepseek-v2-lite", deepseek2),
        // Not here, because candle cannot load them: llama-bias (it has no biases in Llama; loaded without
        // them it is another model), qwen3-moe-sparse (it does not read mlp_only_layers), deepseek-v3.
        _ => panic!("no case {name}"),
    }
}

fn set(config: &mut Value, changes: &Value) {
    let config = config.as_object_mut().unwrap();
    for (key, value) in changes.as_object().unwrap() {
        config.insert(key.clone(), value.clone());
    }
}

/// The checkpoint with the config that both read.
fn checkpoint(case: &Case) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(golden(case.name)).unwrap().map(|e| e.unwrap()) {
        if !entry.file_name().to_str().unwrap().starts_with("golden.") {
            fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
        }
    }
    let mut config = json(&golden(case.name).join("config.json"));
    set(&mut config, &case.both);
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    folder
}

fn weights(folder: &Path) -> HashMap<String, Tensor> {
    let mut tensors = HashMap::new();
    for path in fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()) {
        if path.extension().is_some_and(|e| e == "safetensors") {
            tensors.extend(candle_core::safetensors::load(path, &Device::Cpu).unwrap());
        }
    }
    tensors
}

/// How far candle is from ours, after changes of the config that candle alone reads.
fn difference(case: &Case, changes: Value) -> f32 {
    let folder = checkpoint(case);
    let mut config = json(&folder.path().join("config.json"));
    set(&mut config, &case.candle);
    set(&mut config, &changes);
    let weights = weights(folder.path());
    let judge = || {
        let vb = VarBuilder::from_tensors(weights.clone(), DType::F32, &Device::Cpu);
        (case.build)(&config, vb).unwrap_or_else(|e| panic!("{}: candle: {e}", case.name))
    };
    // Up to several windows, and quick enough without optimisation.
    let texts = texts(case.name, 200);
    compare(ours(folder.path()), judge, case.feeding, &texts).worst
}

/// A test for each case.
macro_rules! agrees {
    ($($test:ident: $case:literal,)*) => {
        mod agrees {
            use super::*;
            $(
                #[test]
                fn $test() {
                    let off = difference(&case($case), json!({}));
                    assert!(off <= TOLERANCE, "off by {off}");
                }
            )*
        }
    };
}

agrees! {
    llama_with_llama3_rope: "llama-rope3",
    llama_with_tied_embeddings: "llama-256",
    mistral_with_a_window: "mistral-window",
    mixtral_with_a_window: "mixtral",
    qwen2_with_tied_embeddings: "qwen2-tied",
    qwen2_in_float16: "qwen2-untied",
    qwen2_with_a_window: "qwen2-window",
    qwen3_dense: "qwen3",
    qwen3_with_experts: "qwen3-moe",
    phi3_without_window: "phi3",
    gemma2_without_window: "gemma2",
    gemma3_with_a_window_in_every_other_layer: "gemma3",
    deepseek_v2_without_groups: "deepseek-v2",
    deepseek_v2_with_biases: "deepseek-v2-bias",
    deepseek_v2_lite_with_yarn: "deepseek-v2-lite",
}

/// One that is wrong in a small way is found out, on whichever side the mistake is.
#[test]
fn a_judge_that_is_slightly_wrong_disagrees() {
    for (name, changes) in [
        ("llama-rope3", json!({"rope_theta": 501000})),
        ("llama-256", json!({"rms_norm_eps": 2e-5})),
        ("qwen3", json!({"rope_theta": 1001000})),
        ("qwen3-moe", json!({"norm_topk_prob": false})),
        ("gemma2", json!({"final_logit_softcapping": 8.1})),
        ("deepseek-v2", json!({"routed_scaling_factor": 4.01})),
    ] {
        let off = difference(&case(name), changes.clone());
        assert!(off > 2.0 * TOLERANCE, "{name} with {changes}: off by only {off}");
    }
}

/// What the cases say of candle, and by how much its logits are then off, so that a case is widened when candle
/// changes.
#[test]
fn candle_differs_where_the_cases_say() {
    let unchanged = |name| Case { both: json!({}), ..case(name) };
    for (case, changes, measured) in [
        (case("mixtral"), json!({"sliding_window": 40}), 2.6),
        (Case { feeding: Cached, ..case("mistral-window") }, json!({}), 15.5),
        (case("qwen2-tied"), json!({"sliding_window": 64}), 4.1),
        (unchanged("qwen2-window"), json!({}), 12.3),
        (unchanged("phi3"), json!({}), 8.3),
        (Case { both: json!({"query_pre_attn_scalar": 32}), ..case("gemma2") }, json!({}), 5.8),
        (Case { both: json!({"sliding_window": 1024}), ..case("gemma2") }, json!({}), 0.5),
        (Case { both: json!({"query_pre_attn_scalar": 32}), ..case("gemma3") }, json!({}), 4.2),
        (Case { both: json!({"topk_method": "greedy"}), ..case("deepseek-v2") }, json!({}), 1.1),
    ] {
        let off = difference(&case, changes);
        assert!(off > measured * 0.9, "{}: off by only {off}, once {measured}", case.name);
    }
}
