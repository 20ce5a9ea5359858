//! Checkpoints that are damaged, hostile, or ask for what is not built: each is refused with its reasons.

mod common;

use baton_encoder::{LoadError, LoadOptions, Pooling};
use common::Checkpoint;
use serde_json::{Value, json};

#[test]
fn every_tensor_must_be_there_with_its_shape_and_type_and_no_other() {
    let mut checkpoint = Checkpoint::case("bert");
    let (name, other) = ("encoder.layer.1.output.dense.weight", "encoder.layer.0.output.dense.bias");
    let taken = checkpoint.tensors.remove(name).unwrap();
    checkpoint.tensors.insert("encoder.layer.2.output.dense.weight".into(), taken);
    checkpoint.tensors.get_mut(other).unwrap().0 = "I16".into();
    checkpoint.tensors.get_mut("embeddings.LayerNorm.weight").unwrap().1 = vec![4, 8];
    let refusal = checkpoint.refusal();
    for reason in [
        format!("tensor {name} is missing"),
        "tensor encoder.layer.2.output.dense.weight is not part of this model".into(),
        format!("tensor {other} has dtype I16"),
        "tensor embeddings.LayerNorm.weight has shape [4, 8], the config asks for [32]".into(),
    ] {
        assert!(refusal.contains(&reason), "{reason}: {refusal}");
    }
}

#[test]
fn weights_must_be_finite() {
    let mut checkpoint = Checkpoint::case("xlm-roberta");
    let tensor = checkpoint.tensors.get_mut("encoder.layer.0.attention.self.key.bias").unwrap();
    tensor.2[2..4].copy_from_slice(&0x7c00_u16.to_le_bytes());
    assert!(matches!(checkpoint.load(&LoadOptions::default()), Err(LoadError::NotFinite { .. })));
}

#[test]
fn old_names_prefixes_and_heads_for_other_tasks_are_understood() {
    let plain = Checkpoint::case("bert");
    let mut published = plain.clone();
    published.tensors = plain
        .tensors
        .iter()
        .map(|(name, tensor)| {
            let name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta");
            (format!("bert.{name}"), tensor.clone())
        })
        .chain([("cls.predictions.bias".into(), ("F32".into(), vec![1], vec![0; 4]))])
        .chain([("bert.embeddings.position_ids".into(), ("I64".into(), vec![1, 40], vec![0; 320]))])
        .collect();
    let published = published.edit("config.json", |config| config["architectures"] = json!(["BertForMaskedLM"]));
    let input = common::input(&common::golden("bert")[0]);
    let run = |checkpoint: &Checkpoint| {
        let encoder = checkpoint.load(&LoadOptions::default()).unwrap();
        encoder.run(&[&input]).unwrap().remove(0).unwrap()
    };
    assert_eq!(run(&plain), run(&published));
}

#[test]
fn configs_out_of_range_are_refused_with_every_reason() {
    let sizes = [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
    ];
    for bad in [json!(0), json!(-1), json!(1u64 << 40), json!(1.5), json!("12"), json!([]), Value::Null] {
        let checkpoint =
            Checkpoint::case("bert").edit("config.json", |config| sizes.iter().for_each(|s| config[*s] = bad.clone()));
        let refusal = checkpoint.refusal();
        assert!(sizes.iter().all(|size| refusal.contains(size)), "{bad}: {refusal}");
    }
    for (field, value) in [
        ("hidden_act", json!("swish")),
        ("position_embedding_type", json!("relative_key")),
        ("is_decoder", json!(true)),
        ("quantization_config", json!({"bits": 4})),
        ("layer_norm_eps", json!(-1.0)),
        ("pad_token_id", json!(99)),
        ("type_vocab_size", json!(0)),
        ("num_attention_heads", json!(5)),
        ("architectures", json!(["LlamaForCausalLM"])),
        ("architectures", json!(["BertModel", "BertModel"])),
    ] {
        let refusal = Checkpoint::case("bert").edit("config.json", |config| config[field] = value.clone()).refusal();
        assert!(refusal.contains(field), "{field} {value}: {refusal}");
    }
    let classes = json!({"0": "no", "1": "yes"});
    let two = Checkpoint::case("bert-score").edit("config.json", |config| config["id2label"] = classes);
    assert!(two.refusal().contains("one label"));
    let softmax = |config: &mut Value| config["sbert_ce_default_activation_function"] = json!("torch.nn.Softmax");
    assert!(Checkpoint::case("bert-score").edit("config.json", softmax).refusal().contains("Identity or Sigmoid"));
    for bytes in [&b""[..], b"[]", b"{", b"\xff", &[b'['; 100_000]] {
        let mut checkpoint = Checkpoint::case("bert");
        checkpoint.files.insert("config.json".into(), bytes.to_vec());
        assert!(checkpoint.refusal().contains("config.json"));
    }
}

#[test]
fn what_sentence_transformers_would_do_besides_is_refused_by_name() {
    let modules = |change: fn(&mut Value)| Checkpoint::case("bert").edit("modules.json", change).refusal();
    let dense = |modules: &mut Value| modules[2]["type"] = json!("sentence_transformers.models.Dense");
    assert!(modules(dense).contains("Normalize"));
    for path in ["../1_Pooling", "/etc", "", ".", "a/b", "a\\b", "missing"] {
        let changed = Checkpoint::case("bert").edit("modules.json", |modules| modules[1]["path"] = json!(path));
        assert!(changed.refusal().contains("modules.json"), "{path}");
    }
    let pooling = |change: fn(&mut Value)| Checkpoint::case("bert").edit("1_Pooling/config.json", change).refusal();
    let one = "exactly one of mean, cls, max and last token";
    assert!(pooling(|config| config["pooling_mode_cls_token"] = json!(true)).contains(one));
    assert!(pooling(|config| config["pooling_mode_mean_tokens"] = json!(false)).contains(one));
    assert!(pooling(|config| *config = json!({"pooling_mode": "weightedmean"})).contains(one));
    let named = Checkpoint::case("bert").edit("1_Pooling/config.json", |c| *c = json!({"pooling_mode": "lasttoken"}));
    assert_eq!(named.load(&LoadOptions::default()).unwrap().spec().pooling, Pooling::Last);
    let lower = |config: &mut Value| config["do_lower_case"] = json!(true);
    assert!(Checkpoint::case("bert").edit("sentence_bert_config.json", lower).refusal().contains("do_lower_case"));
}

#[test]
fn options_that_do_not_suit_the_model_are_refused() {
    let bert = Checkpoint::case("bert");
    for max_model_len in [Some(0), Some(41)] {
        let options = LoadOptions { max_model_len, pooling: None };
        assert!(bert.load(&options).err().unwrap().to_string().contains("1 to 40"));
    }
    let options = LoadOptions { pooling: Some(Pooling::Mean), max_model_len: None };
    assert!(Checkpoint::case("bert-score").load(&options).is_err());
}
