//! A byte-level tokenizer of any size: the 256 bytes, words that no text gives but outputs hold, and three special
//! tokens at the end.

use anyhow::{Result, bail};
use serde_json::{Map, Value, json};

const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
/// The chat template.
pub const TEMPLATE: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n\
    {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// A vocabulary.
pub struct Vocab {
    /// By id.
    pub tokens: Vec<String>,
    /// From here on tokens are special.
    pub first_special: usize,
}

impl Vocab {
    /// A vocabulary of so many tokens.
    pub fn new(size: u64) -> Result<Self> {
        let least = 256 + SPECIAL.len() as u64;
        if size < least {
            bail!("a vocabulary of {size} tokens; the tokenizer takes at least {least}");
        }
        let first_special = size - SPECIAL.len() as u64;
        let mut tokens: Vec<String> = byte_characters().map(String::from).collect();
        tokens.extend((256..first_special).map(|id| format!("Ġw{id}")));
        tokens.extend(SPECIAL.map(str::to_owned));
        Ok(Self { tokens, first_special: first_special as usize })
    }

    /// The token that ends a text.
    pub fn end_id(&self) -> u64 {
        self.tokens.len() as u64 - 1
    }
}

/// The files of the tokenizer.
pub struct Files {
    pub tokenizer: Vec<u8>,
    pub config: Vec<u8>,
}

/// A vocabulary as Hugging Face checkpoints have it.
pub fn files(vocab: &Vocab) -> Result<Files> {
    let (plain, specials) = vocab.tokens.split_at(vocab.first_special);
    let ids: Map<String, Value> = plain.iter().enumerate().map(|(id, token)| (token.clone(), id.into())).collect();
    let special = |(id, content): (usize, &String)| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    let added: Vec<Value> = (vocab.first_special..).zip(specials).map(special).collect();
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
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": ids, "merges": []},
    });
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": false,
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[0],
        "chat_template": TEMPLATE,
    });
    Ok(Files { tokenizer: serde_json::to_vec(&tokenizer)?, config: serde_json::to_vec_pretty(&config)? })
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
