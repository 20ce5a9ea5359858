//! Vocabularies as GGUF files have them encode and decode as the tokenizer.json they were made from.

#[allow(dead_code)] // each test file uses its part
mod common;

use baton_text::{GgufVocab, TextError, TextModel};
use common::golden_file;
use serde_json::Value;

fn json(name: &str, file: &str) -> Value {
    serde_json::from_slice(&golden_file(name, file)).unwrap()
}

/// The vocabulary of a reference tokenizer as llama.cpp's converter writes it.
fn vocab(name: &str, model: &str, pre: Option<&str>) -> GgufVocab {
    let (tokenizer, config) = (json(name, "tokenizer.json"), json(name, "tokenizer_config.json"));
    let mut tokens: Vec<(u64, String, i32)> = Vec::new();
    for (token, id) in tokenizer["model"]["vocab"].as_object().unwrap() {
        let kind = if token.starts_with("<0x") { 6 } else { 1 };
        tokens.push((id.as_u64().unwrap(), token.clone(), kind));
    }
    for added in tokenizer["added_tokens"].as_array().unwrap() {
        let (id, text) = (added["id"].as_u64().unwrap(), added["content"].as_str().unwrap());
        tokens.retain(|t| t.0 != id);
        let kind = match (text, added["special"].as_bool().unwrap()) {
            ("<unk>", _) => 2,
            (_, true) => 3,
            (_, false) => 4,
        };
        tokens.push((id, text.to_owned(), kind));
    }
    tokens.sort();
    assert!(tokens.iter().map(|t| t.0).eq(0..tokens.len() as u64));
    let id_of = |key: &str| {
        let token = config.get(key)?;
        let text = token.as_str().or(token["content"].as_str())?;
        tokens.iter().find(|t| t.1 == text).map(|t| t.0 as u32)
    };
    let merges = tokenizer["model"]["merges"].as_array().unwrap();
    let merge = |m: &Value| format!("{} {}", m[0].as_str().unwrap(), m[1].as_str().unwrap());
    let scored = model == "llama";
    let template = config["chat_template"].as_str().map(ToOwned::to_owned);
    GgufVocab {
        model: model.into(),
        pre: pre.map(Into::into),
        scores: if scored { (0..tokens.len()).map(|id| -(id as f32)).collect() } else { Vec::new() },
        token_types: tokens.iter().map(|t| t.2).collect(),
        merges: if scored { Vec::new() } else { merges.iter().map(merge).collect() },
        bos: id_of("bos_token"),
        eos: id_of("eos_token"),
        add_bos: Some(id_of("bos_token").is_some() && name != "deepseek"),
        add_eos: None,
        add_space_prefix: scored.then_some(name != "gemma"),
        chat_template: template,
        tokens: tokens.into_iter().map(|t| t.1).collect(),
    }
}

fn cases() -> Vec<(&'static str, GgufVocab)> {
    vec![
        ("llama3", vocab("llama3", "gpt2", Some("llama-bpe"))),
        ("chatml", vocab("chatml", "gpt2", Some("qwen2"))),
        ("deepseek", vocab("deepseek", "gpt2", Some("deepseek-v3"))),
        ("spm", vocab("spm", "llama", Some("default"))),
        ("gemma", vocab("gemma", "llama", None)),
    ]
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn texts_encode_and_decode_as_with_the_tokenizer_json() {
    for (name, vocab) in cases() {
        let model = TextModel::from_gguf(&vocab).unwrap();
        let golden = json(name, "tokenizer_golden.json");
        let texts = golden["encode"].as_array().unwrap();
        assert!(texts.len() > 10);
        for case in texts {
            let text = case["text"].as_str().unwrap();
            assert_eq!(model.encode(text, true).unwrap(), ids(&case["ids"]), "{name}: {text:?}");
            let plain = ids(&case["ids_no_special"]);
            assert_eq!(model.encode(text, false).unwrap(), plain, "{name}: {text:?}");
            assert_eq!(model.decode(&plain, false), case["decoded"].as_str().unwrap(), "{name}");
            assert_eq!(model.decode(&plain, true), case["decoded_skip_special"].as_str().unwrap(), "{name}");
        }
        assert_eq!(model.eos_token_id(), vocab.eos, "{name}");
        assert_eq!(model.has_chat_template(), vocab.chat_template.is_some(), "{name}");
    }
}

#[test]
fn bos_and_eos_are_written_where_the_file_says_so() {
    let base = vocab("llama3", "gpt2", Some("llama-bpe"));
    let (bos, eos) = (base.bos.unwrap(), base.eos.unwrap());
    for (add_bos, add_eos) in [(Some(true), Some(true)), (Some(false), Some(true)), (None, None), (Some(false), None)] {
        let model = TextModel::from_gguf(&GgufVocab { add_bos, add_eos, ..base.clone() }).unwrap();
        let mut wanted = model.encode("a text", false).unwrap();
        assert!(!wanted.is_empty() && !wanted.contains(&eos));
        if add_bos != Some(false) {
            wanted.insert(0, bos); // what is usual for this kind
        }
        if add_eos == Some(true) {
            wanted.push(eos);
        }
        assert_eq!(model.encode("a text", true).unwrap(), wanted, "{add_bos:?} {add_eos:?}");
    }
}

#[test]
fn fillers_are_no_part_of_the_vocabulary() {
    let mut vocab = vocab("chatml", "gpt2", Some("qwen2"));
    let before = vocab.tokens.len();
    vocab.tokens.push("[PAD505]".into());
    vocab.token_types.push(5);
    let model = TextModel::from_gguf(&vocab).unwrap();
    assert_eq!((model.vocab_size(), model.token_id("[PAD505]")), (before, None));
}

#[test]
fn every_named_way_to_split_compiles_and_loses_no_text() {
    let base = vocab("llama3", "gpt2", None);
    let text = "Hello, world's 12345 years\r\n\n  of 漢字かな と ελληνικά — “quoted”!  ";
    let names = ["default", "gpt-2", "llama-bpe", "qwen2", "deepseek-r1-qwen", "deepseek-llm", "deepseek-coder"];
    for pre in names.into_iter().chain(["deepseek-v3"]) {
        let model = TextModel::from_gguf(&GgufVocab { pre: Some(pre.into()), ..base.clone() }).unwrap();
        assert_eq!(model.decode(&model.encode(text, false).unwrap(), false), text, "{pre}");
    }
}

#[test]
fn a_vocabulary_that_does_not_hold_together_is_refused_by_name() {
    let good = vocab("llama3", "gpt2", Some("llama-bpe"));
    let broken: [(GgufVocab, &str); 8] = [
        (GgufVocab { model: "wordpiece".into(), ..good.clone() }, "supported: gpt2, llama"),
        (GgufVocab { pre: Some("tekken".into()), ..good.clone() }, "\"tekken\"; supported: llama-bpe"),
        (GgufVocab { tokens: Vec::new(), ..good.clone() }, "tokens is missing"),
        (GgufVocab { token_types: vec![1], ..good.clone() }, "token_type has 1 entries for 512 tokens"),
        (GgufVocab { merges: vec!["h".into()], ..good.clone() }, "merges"),
        (GgufVocab { merges: vec!["h qqqq".into()], ..good.clone() }, "merges"),
        (GgufVocab { bos: Some(512), ..good.clone() }, "bos_token_id is 512"),
        (GgufVocab { model: "llama".into(), ..good }, "scores is missing"),
    ];
    for (vocab, wanted) in broken {
        match TextModel::from_gguf(&vocab) {
            Err(TextError::Tokenizer(reason)) => assert!(reason.contains(wanted), "{wanted} not in: {reason}"),
            other => panic!("{wanted}: {other:?}"),
        }
    }
}
