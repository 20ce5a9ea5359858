//! SentencePiece and tiktoken files encode and decode as in the libraries that they are made for.

#[allow(dead_code)] // each test file uses its part
mod common;

use baton_text::{TextError, TextFiles, TextModel, TokenizerFile};
use common::golden_file;
use serde_json::{Value, json};

const TIKTOKEN: &str = "ranks.tiktoken";

/// A checkpoint that has its vocabulary in `content`, under the name that the case gives it.
fn load(name: &str, content: &[u8], config: &Value) -> Result<TextModel, TextError> {
    let config = (!config.is_null()).then(|| config.to_string());
    TextModel::new(&TextFiles {
        tokenizer: TokenizerFile::new(name, content),
        tokenizer_config: config.as_ref().map(String::as_bytes),
        special_tokens_map: None,
        chat_template_jinja: None,
    })
}

struct Case {
    name: String,
    model: TextModel,
    /// Text, ids, and what they decode to.
    encoded: Vec<(String, Vec<u32>, String)>,
}

fn cases() -> Vec<Case> {
    let golden: Value = serde_json::from_slice(&golden_file("converted", "golden.json")).unwrap();
    let case = |case: &Value| {
        let (name, file) = (case["name"].as_str().unwrap(), case["file"].as_str().unwrap());
        let kept_as = if file.ends_with(".model") { "tokenizer.model" } else { name };
        let model = load(kept_as, &golden_file("converted", file), &case["tokenizer_config"]);
        let encoded = case["encode"].as_array().unwrap().iter().map(|entry| {
            let text = golden["texts"][entry["text"].as_u64().unwrap() as usize].as_str().unwrap();
            let ids = serde_json::from_value(entry["ids"].clone()).unwrap();
            (text.to_owned(), ids, entry["decoded"].as_str().unwrap_or(text).to_owned())
        });
        let model = model.unwrap_or_else(|e| panic!("{name}: {e}"));
        Case { name: name.to_owned(), model, encoded: encoded.collect() }
    };
    golden["cases"].as_array().unwrap().iter().map(case).collect()
}

#[test]
fn texts_encode_and_decode_as_in_the_original_library() {
    let mut wrong = Vec::new();
    for Case { name, model, encoded } in cases() {
        assert!(encoded.len() > 80, "{name}");
        for (text, ids, decoded) in encoded {
            let ours = model.encode(&text, false).unwrap();
            if ours != ids {
                wrong.push(format!("{name}: {text:?}: {ours:?} for {ids:?}"));
            }
            let ours = model.decode(&ids, false);
            if ours != decoded {
                wrong.push(format!("{name}: {ids:?}: {ours:?} for {decoded:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn streams_join_to_the_decoding() {
    for Case { name, model, encoded } in cases() {
        for (_, ids, _) in encoded {
            let mut stream = model.detokenizer(false);
            let text: String = ids.iter().map(|&id| stream.push(id)).collect();
            assert_eq!(text + &stream.flush(), model.decode(&ids, false), "{name}: {ids:?}");
        }
    }
}

fn converted(name: &str, file: &str, config: Value) -> TextModel {
    load(name, &golden_file("converted", file), &config).unwrap()
}

#[test]
fn bos_and_eos_are_written_as_the_config_says_and_bos_if_it_says_nothing() {
    let ends = |model: &TextModel| {
        let (ids, with) = (model.encode("a", false).unwrap(), model.encode("a", true).unwrap());
        let at = with.windows(ids.len()).position(|w| w == ids).unwrap();
        (with[..at].to_vec(), with[at + ids.len()..].to_vec())
    };
    let spm = |config| converted("tokenizer.model", "bpe.model", config);
    assert_eq!(ends(&spm(Value::Null)), (vec![1], vec![]));
    assert_eq!(ends(&spm(json!({"tokenizer_class": "LlamaTokenizer"}))), (vec![1], vec![]));
    assert_eq!(ends(&spm(json!({"add_bos_token": false, "add_eos_token": true}))), (vec![], vec![2]));
    assert_eq!(ends(&spm(json!({"bos_token": "[CALL]"}))).0, [spm(Value::Null).token_id("[CALL]").unwrap()]);
    assert_eq!(spm(Value::Null).eos_token_id(), Some(2));

    let llama3 = converted("tokenizer.model", TIKTOKEN, Value::Null);
    assert_eq!(ends(&llama3), (vec![llama3.token_id("<|begin_of_text|>").unwrap()], vec![]));
    assert_eq!(llama3.eos_token_id(), llama3.token_id("<|end_of_text|>"));
    let qwen = converted("qwen.tiktoken", TIKTOKEN, Value::Null);
    assert_eq!((ends(&qwen), qwen.eos_token_id()), ((vec![], vec![]), Some(700)));
    let chat = converted("qwen.tiktoken", TIKTOKEN, json!({"eos_token": "<|im_end|>"}));
    assert_eq!(chat.eos_token_id(), Some(702));
}

#[test]
fn control_pieces_are_special_and_user_defined_ones_are_not() {
    let model = converted("tokenizer.model", "bpe.model", Value::Null);
    let special = |token: &str| model.is_special(model.token_id(token).unwrap());
    assert!(["<unk>", "<s>", "</s>", "[CALL]"].into_iter().all(special));
    assert!(!["<x>", "<0x0A>", "▁"].into_iter().any(special));
    let ids = model.encode("[CALL] a<x>", true).unwrap();
    assert_eq!(model.decode(&ids, true), " a<x>");
    let config = json!({"added_tokens_decoder": {"3": {"content": "<y>", "special": true}}});
    let renamed = converted("tokenizer.model", "bpe.model", config);
    assert_eq!((renamed.token_id("<y>"), renamed.is_special(3)), (Some(3), true));
    let config = json!({"added_tokens_decoder": {"2": {"content": "<end>", "special": true}}});
    assert_eq!(converted("tokenizer.model", "bpe.model", config).eos_token_id(), Some(2));
}

#[test]
fn the_file_that_needs_no_conversion_is_chosen() {
    let choose = |names: &[&str]| {
        let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
        TokenizerFile::choose(&names).map(str::to_owned)
    };
    let all = ["b.tiktoken", "a.tiktoken", "config.json", "tiktoken.model", "tokenizer.model", "tokenizer.json"];
    let chosen: Vec<_> = (2..=all.len()).filter_map(|n| choose(&all[..n])).collect();
    assert_eq!(chosen, ["a.tiktoken", "a.tiktoken", "tiktoken.model", "tokenizer.model", "tokenizer.json"]);
    assert_eq!(choose(&["config.json", "tokenizer_config.json", "vocab.json"]), None);
    assert!(all.iter().all(|name| !name.ends_with(".model") || TokenizerFile::NAMES.contains(name)));
}

/// A field of a protocol buffer that is text, bytes or a message of less than 128 bytes.
fn field(tag: u8, content: &[u8]) -> Vec<u8> {
    [&[tag << 3 | 2, u8::try_from(content.len()).unwrap()], content].concat()
}

#[test]
fn a_vocabulary_that_cannot_be_converted_is_refused_by_name() {
    let piece = |text: &str| field(1, &field(1, text.as_bytes()));
    let unknown = field(1, &[field(1, b"<unk>"), vec![3 << 3, 2]].concat());
    let spm = |parts: &[Vec<u8>]| [vec![unknown.clone()], parts.to_vec()].concat().concat();
    let bpe = field(2, &[3 << 3, 2]);
    let added = |id: &str, content: &str| json!({"added_tokens_decoder": {id: {"content": content}}});
    let model = "tokenizer.model";
    let truncated = golden_file("converted", "bpe.model")[..5000].to_vec();
    let claims = field(3, &field(2, &[0, 0, 0, 64, 1, 2, 3, 4]));
    let ranks = golden_file("converted", TIKTOKEN);
    let edited = |from: &str, to: &str| String::from_utf8(ranks.clone()).unwrap().replacen(from, to, 1).into_bytes();
    let refusals: Vec<(&str, Vec<u8>, Value, &str)> = vec![
        (model, truncated, Value::Null, "tokenizer.model: it is not a SentencePiece model"),
        (model, b"\n".to_vec(), Value::Null, "not a SentencePiece model"),
        (model, spm(&[field(2, &[3 << 3, 3])]), Value::Null, "model type is 3; unigram (1) and BPE (2) are read"),
        (model, spm(&[piece("a"), piece("a"), bpe.clone()]), Value::Null, "ids 1 and 2 have the same piece"),
        (model, spm(&[claims]), Value::Null, "truncated"),
        (model, spm(&[field(3, &[5 << 3, 0])]), Value::Null, "only '▁' before words"),
        (model, spm(&[field(5, &field(2, b"abcd"))]), Value::Null, "denormalizer"),
        (model, piece("a"), Value::Null, "no unknown piece"),
        (model, spm(std::slice::from_ref(&bpe)), added("7", "<x>"), "has id 7; there are ids up to 0"),
        (model, spm(&[piece("a"), bpe.clone()]), added("2", "a"), "ids 1 and 2 have the same piece"),
        (model, spm(&[piece("a")]), added("2", "a"), "ids 1 and 2 have the same piece"),
        (model, spm(&[piece("")]), Value::Null, "the piece of id 1 is empty"),
        (model, spm(&[bpe]), added("x", "<x>"), "added_tokens_decoder is not an object"),
        ("own.tiktoken", ranks.clone(), Value::Null, "own.tiktoken: it does not say how text is split"),
        (model, ranks.clone(), json!({"tokenizer_class": "OwnTokenizer"}), "\"OwnTokenizer\" is not known"),
        (model, edited("IQ== 33", "IQ== 34"), Value::Null, "a rank occurs twice"),
        (model, edited("IQ== 33\n", ""), Value::Null, "byte 0x21 has no rank"),
        (model, edited("IQ== 33", "IQ==33"), Value::Null, "line 34: not base64"),
        (model, edited("IQ== 33", "I!== 33"), Value::Null, "line 34: not base64"),
        (model, edited("IQ== 33", "IQ== 4000000000"), Value::Null, "line 34"),
        (model, edited("IQ== 33", "Ig== 33"), Value::Null, "has the bytes of another"),
        (
            model,
            (0..128_001).map(|rank| format!("AA== {rank}\n")).collect::<String>().into(),
            Value::Null,
            "128001 ranks",
        ),
        (model, ranks, added("5", "<x>"), "special token of id 5 is another"),
        (model, b"{}".to_vec(), Value::Null, "line 1"),
    ];
    for (name, content, config, wanted) in refusals {
        match load(name, &content, &config) {
            Err(error) => assert!(error.to_string().contains(wanted), "{wanted} not in: {error}"),
            Ok(_) => panic!("{wanted}: it was loaded"),
        }
    }
}
