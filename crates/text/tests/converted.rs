//! SentencePiece and tiktoken files encode and decode as in the libraries that they are made for.

#[allow(dead_code)] // each test file uses its part
mod common;

use baton_text::{TextError, TextFiles, TextModel, TokenizerFile};
use common::golden_file;
use serde_json::{Value, json};

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
