//! A vocabulary in each form that is read, with its `tokenizer_config.json`: what loads also encodes and decodes.

use super::parts;
use baton_text::{GgufVocab, TextFiles, TextModel, TokenizerFile};
use serde_json::Value;

/// Words, spaces, digits, several scripts, special tokens and what looks like them.
const TEXT: &str =
    "Hello  world, it's 12345 o'clock\r\n\n\tΕλλάδα 漢字かな 👩‍👩‍👧 e\u{301}ﬁ <s><|x|>[INST]<0x0A>\u{0}\u{FFFD}▁  ";

/// The first byte of the second part says what it is; ranks of tiktoken have their file's name before them, in a line.
pub fn run(data: &[u8]) -> bool {
    let [config, tokenizer] = parts::split(data);
    let config = (!config.is_empty()).then_some(config);
    let Some((kind, content)) = tokenizer.split_first() else { return false };
    let tokenizer = match kind {
        b'j' => TokenizerFile::Json(content),
        b's' => TokenizerFile::SentencePiece(content),
        b't' => {
            let at = content.iter().position(|b| *b == b'\n').unwrap_or_default();
            let name = str::from_utf8(&content[..at]).unwrap_or_default();
            TokenizerFile::Tiktoken { name, ranks: &content[at..] }
        }
        b'g' => return TextModel::from_gguf(&gguf(content)).is_ok_and(|model| encode_and_decode(&model)),
        _ => return false,
    };
    let (special_tokens_map, chat_template_jinja) = (None, None);
    let files = TextFiles { tokenizer, tokenizer_config: config, special_tokens_map, chat_template_jinja };
    TextModel::new(&files).is_ok_and(|model| encode_and_decode(&model))
}

fn encode_and_decode(model: &TextModel) -> bool {
    for special in [false, true] {
        if let Ok(ids) = model.encode(TEXT, special) {
            model.decode(&ids, special);
        }
        let mut stream = model.detokenizer(special);
        for id in 0..model.vocab_size().min(2000) as u32 + 1 {
            stream.push(id);
        }
        stream.flush();
    }
    true
}

/// A vocabulary by the keys of its fields, in JSON.
fn gguf(content: &[u8]) -> GgufVocab {
    let json: Value = serde_json::from_slice(content).unwrap_or_default();
    let list = |key: &str| json[key].as_array().map(Vec::as_slice).unwrap_or_default();
    let strings = |key: &str| list(key).iter().filter_map(|v| Some(v.as_str()?.to_owned())).collect();
    let string = |key: &str| json[key].as_str().map(str::to_owned);
    let id = |key: &str| json[key].as_u64().map(|id| id as u32);
    GgufVocab {
        model: string("model").unwrap_or_default(),
        pre: string("pre"),
        tokens: strings("tokens"),
        scores: list("scores").iter().map(|v| v.as_f64().unwrap_or(f64::NAN) as f32).collect(),
        token_types: list("token_types").iter().map(|v| v.as_i64().unwrap_or_default() as i32).collect(),
        merges: strings("merges"),
        bos: id("bos"),
        eos: id("eos"),
        add_bos: json["add_bos"].as_bool(),
        add_eos: json["add_eos"].as_bool(),
        add_space_prefix: json["add_space_prefix"].as_bool(),
        chat_template: string("chat_template"),
    }
}
