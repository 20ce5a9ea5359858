//! Texts and pairs become what transformers makes of them, by the tokenizers of `crates/encoder`'s golden cases.

use std::path::Path;

use baton_text::{EncoderInput, TextFiles, TextModel, TokenizerFile};
use serde_json::Value;

fn data(file: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../encoder/tests/data").join(file)).unwrap()
}

fn model(case: &str) -> TextModel {
    TextModel::new(&TextFiles {
        tokenizer: TokenizerFile::Json(&data(&format!("{case}/tokenizer.json"))),
        tokenizer_config: None,
        special_tokens_map: None,
        chat_template_jinja: None,
    })
    .unwrap()
}

fn input(model: &TextModel, texts: &[&str], max_tokens: usize) -> EncoderInput {
    let parts: Vec<_> = texts.iter().map(|text| model.part(text, max_tokens).unwrap()).collect();
    model.input(&parts[0], parts.get(1), max_tokens).unwrap()
}

#[test]
fn ids_and_types_equal_those_of_transformers() {
    for case in ["bert", "bert-score", "xlm-roberta", "xlm-roberta-score"] {
        let model = model(case);
        let golden: Value = serde_json::from_slice(&data(&format!("{case}/golden.json"))).unwrap();
        for entry in golden["texts"].as_array().unwrap() {
            let texts: Vec<&str> = match &entry["text"] {
                Value::Array(pair) => pair.iter().map(|text| text.as_str().unwrap()).collect(),
                text => vec![text.as_str().unwrap()],
            };
            let EncoderInput { ids, type_ids } = input(&model, &texts, 512);
            assert_eq!(Value::from(ids.clone()), entry["ids"], "{case}");
            if !entry["type_ids"].is_null() {
                assert_eq!(Value::from(type_ids), entry["type_ids"], "{case}");
            }
            let parts: Vec<_> = texts.iter().map(|text| model.part(text, 1).unwrap()).collect();
            assert_eq!(model.input_len(&parts[0], parts.get(1)), ids.len(), "{case}");
        }
    }
}

#[test]
fn what_is_too_long_is_cut_at_its_end_the_longer_text_first_and_special_tokens_stay() {
    let model = model("bert");
    let long = "x ".repeat(50);
    // [CLS] 2, [SEP] 3, x 31, a 8.
    assert_eq!(input(&model, &[&long], 5).ids, [2, 31, 31, 31, 3]);
    assert_eq!(input(&model, &["a", &long], 7).ids, [2, 8, 3, 31, 31, 31, 3]);
    assert_eq!(input(&model, &[&long, "a"], 7).ids, [2, 31, 31, 31, 3, 8, 3]);
    let both = input(&model, &[&long, &"a ".repeat(50)], 8);
    assert_eq!((both.ids, both.type_ids), (vec![2, 31, 31, 3, 8, 8, 8, 3], vec![0, 0, 0, 0, 1, 1, 1, 1]));
    assert_eq!(input(&model, &[&long], 2).ids, [2, 3]);
    let part = model.part(&long, 1).unwrap();
    assert!(model.input(&part, None, 1).is_err());
    assert!(model.input(&part, Some(&part), 2).is_err());
}
