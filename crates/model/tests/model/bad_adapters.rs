//! Adapters that are damaged, hostile or of a kind that would not be applied exactly: each is a typed error that names
//! the cause, none a panic, none silently applied in part.

use std::fs;
use std::path::Path;

use crate::common::checkpoint::{Tensor, find, read_tensors, with_header, write_tensors};
use crate::common::{Rng, adapted, folder, options};
use baton_device::Reference;
use baton_model::{Adapter, AdapterError, AdapterLoader, Files, LoadOptions, load};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
const Q0: &str = "base_model.model.model.layers.0.self_attn.q_proj";

/// A copy of a golden adapter that a test may damage, and the loader of its model.
struct Copy {
    folder: TempDir,
    loader: AdapterLoader<Reference>,
}

impl Copy {
    fn of(case: &str, base: &str) -> Self {
        let copy = Self { folder: TempDir::new().unwrap(), loader: loader(base, 16) };
        for name in [CONFIG, WEIGHTS] {
            copy.write(name, &fs::read(folder("lora").join(case).join(name)).unwrap());
        }
        copy
    }

    fn llama() -> Self {
        Self::of("llama-all", "llama-rope3")
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn write(&self, name: &str, content: &[u8]) {
        fs::write(self.path().join(name), content).unwrap();
    }

    fn edit_config(&self, edit: impl FnOnce(&mut Map<String, Value>)) -> &Self {
        let mut config: Value = serde_json::from_slice(&fs::read(self.path().join(CONFIG)).unwrap()).unwrap();
        edit(config.as_object_mut().unwrap());
        self.write(CONFIG, &serde_json::to_vec(&config).unwrap());
        self
    }

    fn set(&self, field: &str, value: Value) -> &Self {
        self.edit_config(|config| _ = config.insert(field.into(), value))
    }

    fn edit_weights(&self, edit: impl FnOnce(&mut Vec<Tensor>)) -> &Self {
        let mut tensors = read_tensors(&fs::read(self.path().join(WEIGHTS)).unwrap());
        edit(&mut tensors);
        self.write(WEIGHTS, &write_tensors(&tensors));
        self
    }

    fn load(&self) -> Result<Adapter, AdapterError> {
        self.loader.load(self.path())
    }

    #[track_caller]
    fn assert_refused(&self, wanted: &[&str]) {
        let message = self.load().expect_err("it was loaded").to_string();
        assert!(wanted.iter().all(|w| message.contains(w)), "{wanted:?} not in: {message}");
    }
}

fn loader(base: &str, max_lora_rank: usize) -> AdapterLoader<Reference> {
    let options = LoadOptions { max_lora_rank, ..options() };
    let files = Files::folder(folder(base)).unwrap();
    load(Reference::new(), &files, &options).unwrap().0.adapter_loader().unwrap()
}

#[test]
fn missing_empty_and_pickled_files_are_named() {
    let copy = Copy::llama();
    copy.write(WEIGHTS, b"");
    copy.assert_refused(&["adapter_model.safetensors is empty"]);
    fs::rename(copy.path().join(WEIGHTS), copy.path().join("adapter_model.bin")).unwrap();
    copy.assert_refused(&["adapter_model.bin is a pickle", WEIGHTS]);
    fs::remove_file(copy.path().join("adapter_model.bin")).unwrap();
    copy.assert_refused(&["no adapter weights"]);
    assert!(matches!(copy.load(), Err(AdapterError::NoWeights { .. })));
    fs::remove_file(copy.path().join(CONFIG)).unwrap();
    copy.assert_refused(&["there is no adapter", "adapter_config.json is missing"]);
    for path in ["/no/such/folder", concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")] {
        assert!(matches!(copy.loader.load(Path::new(path)), Err(AdapterError::Missing { .. })));
    }
}

#[test]
fn kinds_of_adapters_that_are_not_applied_exactly_are_refused_by_name() {
    for (field, value) in [
        ("peft_type", json!("LOHA")),
        ("task_type", json!("SEQ_CLS")),
        ("bias", json!("all")),
        ("use_dora", json!(true)),
        ("use_qalora", json!(true)),
        ("lora_bias", json!(true)),
        ("fan_in_fan_out", json!(true)),
        ("modules_to_save", json!(["lm_head"])),
        ("layer_replication", json!([[0, 2], [1, 2]])),
        ("trainable_token_indices", json!([1])),
        ("target_parameters", json!(["mlp.experts.gate_up_proj"])),
        ("alora_invocation_tokens", json!([5])),
    ] {
        Copy::llama().set(field, value).assert_refused(&[CONFIG, field, "supported"]);
    }
    // What says nothing is fine.
    for (field, value) in [("modules_to_save", json!([])), ("use_dora", json!(null)), ("loftq_config", json!({}))] {
        assert!(Copy::llama().set(field, value).load().is_ok(), "{field}");
    }
}

#[test]
fn values_that_mean_nothing_are_refused_by_field_and_all_at_once() {
    for (field, value) in [
        ("r", json!(0)),
        ("r", json!("8")),
        ("r", json!(1e300)),
        ("lora_alpha", json!(-1)),
        ("lora_alpha", json!(null)),
        ("use_rslora", json!("yes")),
        ("rank_pattern", json!(["q_proj"])),
        ("rank_pattern", json!({"q_proj": 1.5})),
        ("alpha_pattern", json!({"q_proj": 0})),
        ("alpha_pattern", json!({"(q|k)_proj": 4})),
        ("target_modules", json!(null)),
        ("target_modules", json!([])),
        ("target_modules", json!([1])),
        ("exclude_modules", json!([""])),
        ("layers_to_transform", json!([-1])),
    ] {
        Copy::llama().set(field, value).assert_refused(&[CONFIG, field]);
    }
    let many: Map<String, Value> = (0..2000).map(|i| (format!("m{i}"), json!(1))).collect();
    Copy::llama().set("rank_pattern", many.into()).assert_refused(&["rank_pattern", "1024"]);
    Copy::llama().set("r", json!(0)).set("use_dora", json!(true)).assert_refused(&["r is 0", "use_dora"]);
    Copy::llama().edit_config(|config| config.clear()).assert_refused(&["r is missing", "target_modules is missing"]);
    let copy = Copy::llama();
    copy.write(CONFIG, b"[]");
    copy.assert_refused(&["not a JSON object"]);
}

#[test]
fn tensors_that_are_missing_left_over_or_of_another_size_are_each_named() {
    let weights = |edit: fn(&mut Vec<Tensor>), wanted: &[&str]| {
        Copy::llama().edit_weights(edit).assert_refused(wanted);
    };
    weights(|t| t.retain(|t| t.name != format!("{Q0}.lora_B.weight")), &["layers.0.self_attn.q_proj has no lora_B"]);
    weights(|t| t.retain(|t| !t.name.contains("layers.1.mlp.up_proj")), &["layers.1.mlp.up_proj", "has no tensors"]);
    weights(|t| t.clear(), &["has no LoRA matrices"]);
    for (name, wanted) in [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight", "DoRA"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "embedding"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias", "bias"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "no LoRA matrix"),
        ("base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight", "no linear layer of this model"),
        ("base_model.model.lm_head.lora_A.weight", "embeddings and head"),
        ("base_model.model.model.layers.0.mlp.experts.3.up_proj.lora_A.weight", "routed experts"),
    ] {
        let copy = Copy::llama();
        copy.edit_weights(|tensors| {
            let a = find(tensors, &format!("{Q0}.lora_A.weight")).clone();
            tensors.push(Tensor { name: name.into(), ..a });
        });
        copy.assert_refused(&[name.trim_start_matches("base_model.model.").split(".lora_").next().unwrap(), wanted]);
    }
    let transposed = |t: &mut Vec<Tensor>| find(t, &format!("{Q0}.lora_A.weight")).shape.reverse();
    weights(transposed, &["q_proj.lora_A.weight has shape [128, 4]", "[4, 128]"]);
    weights(|t| find(t, &format!("{Q0}.lora_B.weight")).dtype = "I32".into(), &["dtype I32", "F32, F16 or BF16"]);
    Copy::llama().set("r", json!(8)).assert_refused(&["has shape [4, 128]", "[8, 128]", "more"]);
    Copy::llama().set("rank_pattern", json!({"q_proj": 2})).assert_refused(&["q_proj", "[2, 128]"]);
}

#[test]
fn a_weight_that_is_not_finite_is_refused_wherever_it_lies() {
    for side in ["A", "B"] {
        let copy = Copy::llama();
        copy.edit_weights(|tensors| {
            let data = &mut find(tensors, &format!("{Q0}.lora_{side}.weight")).data;
            data[4 * 77..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
        });
        copy.assert_refused(&[&format!("{Q0}.lora_{side}.weight holds NaN at element 77")]);
    }
}

#[test]
fn targets_of_the_config_and_tensors_of_the_file_must_agree() {
    let copy = Copy::of("qwen3-patterns", "qwen3");
    copy.set("target_modules", json!(["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj", "q_porj"]));
    copy.assert_refused(&["target_modules: q_porj is no linear layer of this model"]);
    copy.set("target_modules", json!(["q_proj", "v_proj", "gate_proj", "up_proj"]));
    copy.assert_refused(&["layers.0.mlp.down_proj has tensors, but target_modules leaves it out"]);
    copy.set("target_modules", json!("all-linear")).assert_refused(&["layers.0.self_attn.k_proj", "has no tensors"]);
    copy.set("exclude_modules", json!(["k_proj", "self_attn.o_proj"]));
    assert!(copy.load().is_ok());
    // What a regular expression leaves open, the tensors say.
    copy.set("target_modules", json!("(?i).*(Q|V)_proj$")).set("exclude_modules", json!(null));
    assert!(copy.load().is_ok());

    for (name, wanted) in [("kv_b_proj", "latent attention absorbs it"), ("mlp.gate", "routers")] {
        let copy = Copy::of("deepseek-v3", "deepseek-v3");
        copy.edit_config(|config| config["target_modules"].as_array_mut().unwrap().push(name.into()));
        copy.assert_refused(&[name, wanted]);
    }
}

#[test]
fn a_rank_above_the_limit_and_a_foreign_model_are_refused() {
    let copy = Copy { loader: loader("llama-rope3", 3), ..Copy::llama() };
    copy.assert_refused(&["has rank 4; at most 3 is accepted"]);
    let copy = Copy { loader: loader("qwen3", 16), ..Copy::llama() };
    copy.assert_refused(&["layers.0.self_attn.q_proj.lora_A.weight has shape [4, 128]", "[4, 96]"]);
    let copy = Copy { loader: loader("phi3", 16), ..Copy::llama() };
    copy.assert_refused(&["layers.0.self_attn.q_proj is no linear layer of this model"]);
}

#[test]
fn a_runner_loaded_without_adapters_offers_no_loader() {
    let runner = load(Reference::new(), &Files::folder(folder("llama-rope3")).unwrap(), &options()).unwrap().0;
    assert!(runner.adapter_loader().is_none());
}

#[test]
fn bytes_changed_at_random_never_panic() {
    let copy = Copy::llama();
    let weights = fs::read(copy.path().join(WEIGHTS)).unwrap();
    let config = fs::read(copy.path().join(CONFIG)).unwrap();
    let header = u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize + 8;
    for seed in 0..400 {
        let mut rng = Rng(seed);
        let (mut weights, mut config) = (weights.clone(), config.clone());
        for _ in 0..1 + rng.below(4) {
            weights[rng.below(header)] = rng.next() as u8;
            let at = rng.below(config.len());
            config[at] = if rng.below(2) == 0 { rng.next() as u8 } else { b"0123456789{}[]\",:"[rng.below(17)] };
        }
        copy.write(WEIGHTS, &weights);
        let _ = copy.load();
        copy.write(CONFIG, &config);
        let _ = copy.load();
        copy.write(WEIGHTS, &with_header(b"{}", &[]));
        assert!(copy.load().is_err());
    }
}

#[test]
fn the_digest_tells_contents_apart_and_nothing_else() {
    let copy = Copy::llama();
    let same = copy.load().unwrap();
    assert_eq!(same.digest(), copy.load().unwrap().digest());
    assert_eq!(same.digest(), adapted(Reference::new(), "llama-rope3", &["llama-all"]).1[0].digest());
    let other = copy.set("lora_alpha", json!(9)).load().unwrap();
    assert_ne!(same.digest(), other.digest());
    copy.edit_weights(|tensors| find(tensors, &format!("{Q0}.lora_A.weight")).data[0] ^= 1);
    assert_ne!(other.digest(), copy.load().unwrap().digest());
    assert_eq!((same.rank(), same.bytes() > 0), (4, true));
}
