//! A byte-level tokenizer of any size: the 256 bytes, words that no text gives but outputs hold, and three special
//! tokens at the end.

use anyhow::{Result, bail};
use serde_json::{Map, Value, json};

const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
const TEMPLATE: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n\
    {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// The files of the tokenizer.
pub struct Files {
    pub tokenizer: Vec<u8>,
    pub config: Vec<u8>,
    /// The token that ends a text.
    pub end_id: u64,
}

/// A tokenizer of `vocab_size` tokens.
pub fn files(vocab_size: u64) -> Result<Files> {
    let least = 256 + SPECIAL.len() as u64;
    if vocab_size < least {
        bail!("a vocabulary of {vocab_size} tokens; the tokenizer takes at least {least}");
    }
    let first_special = vocab_size - SPECIAL.len() as u64;
    let mut vocab: Map<String, Value> =
        byte_characters().enumerate().map(|(id, character)| (character.to_string(), id.into())).collect();
    vocab.extend((256..first_special).map(|id| (format!("Ġw{id}"), id.into())));
    let special = |(id, content): (u64, &&str)| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    let added: Vec<Value> = (first_special..).zip(&SPECIAL).map(special).collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
    });
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": false,
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[0],
        "chat_template": TEMPLATE,
    });
    Ok(Files {
        tokenizer: serde_json::to_vec(&tokenizer)?,
        config: serde_json::to_vec_pretty(&config)?,
        end_id: vocab_size - 1,
    })
}

/// The characters by which byte-level vocabularies name bytes, by byte: printable ones name themselves, the others are
/// those from U+0100 on.
fn byte_characters() -> impl Iterator<Item = char> {
    let mut next = '\u{100}'..;
    (0..=255u8).map(move |byte| match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
        _ => next.next().expect("a few characters"),
    })
}
