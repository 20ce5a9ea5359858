//! Which names may become paths, and which files of a checkpoint are fetched.

use crate::HubError;

/// The index of a checkpoint in several files.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// The weights of a checkpoint in one file.
pub(crate) const SINGLE: &str = "model.safetensors";
/// The file without which nothing is a checkpoint.
pub(crate) const CONFIG: &str = "config.json";

/// Files any of which is a tokenizer.
pub(crate) const TOKENIZERS: &[&str] = &[
    "tokenizer.json",
    "tokenizer.model",
    "tiktoken.model",
    "cl100k_base.tiktoken",
    "o200k_base.tiktoken",
    "qwen.tiktoken",
    "tekken.json",
    "vocab.json",
];

/// Files besides config and weights where nobody listed them. An allow-list: whatever else a repository holds (pickles,
/// Python, ONNX) stays there.
pub(crate) const OPTIONAL: &[&str] = &[
    "1_Pooling/config.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "cl100k_base.tiktoken",
    "generation_config.json",
    "hf_quant_config.json",
    "merges.txt",
    "modules.json",
    "o200k_base.tiktoken",
    "quantize_config.json",
    "qwen.tiktoken",
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "tekken.json",
    "tiktoken.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
];

/// No file system takes more in one name, and no checkpoint needs it.
const MAX_NAME_BYTES: usize = 255;
/// The most parts that the name of a bundle's file has.
const MAX_LISTED_PARTS: usize = 8;
/// Endings of formats that run code when they are read. No loader of ours reads them; others that share the cache do.
const CODE: &[&str] = &[".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"];

/// Refuses a file name that is not plain and relative; gives the number of its parts, 1 for a file at the top.
pub(crate) fn check_file(name: &str) -> Result<usize, HubError> {
    components(name).map_err(|reason| HubError::Name { name: excerpt(name), reason })
}

/// Refuses a name that no file of a bundle has, or only one that can carry code into whoever loads it.
pub(crate) fn check_listed(name: &str) -> Result<(), HubError> {
    let refused = |reason| Err(HubError::Name { name: excerpt(name), reason });
    if check_file(name)? > MAX_LISTED_PARTS {
        return refused("it has more than 8 parts");
    }
    let lower = name.to_ascii_lowercase();
    if CODE.iter().any(|ending| lower.ends_with(ending)) {
        return refused("files of that format run code when they are read; a bundle has .safetensors or .gguf");
    }
    Ok(())
}

/// As much of a foreign text as a message shows.
pub(crate) fn excerpt(text: &str) -> String {
    text.chars().take(100).collect()
}

/// Refuses a shard's name that is not plain, in a subfolder, or not safetensors.
pub(crate) fn check_shard(name: &str) -> Result<(), HubError> {
    let refused = |reason| Err(HubError::Name { name: excerpt(name), reason });
    if check_file(name)? > 1 {
        return refused("a shard lies beside its index");
    }
    if !name.ends_with(".safetensors") {
        return refused("a shard is a .safetensors file");
    }
    Ok(())
}

/// Refuses a revision that could leave the folder of refs.
pub(crate) fn check_revision(revision: &str) -> Result<(), &'static str> {
    components(revision).map(|_| ())
}

/// The number of components of a plain relative path.
fn components(path: &str) -> Result<usize, &'static str> {
    if path.starts_with('/') {
        return Err("it is absolute");
    }
    if path.contains('\\') || path.chars().any(char::is_control) {
        return Err("it has a backslash or a control character");
    }
    let mut count = 0;
    for part in path.split('/') {
        match part {
            "" => return Err("a part of it is empty"),
            "." | ".." => return Err("it has a part '.' or '..'"),
            part if part.len() > MAX_NAME_BYTES => return Err("it is longer than 255 bytes"),
            _ => count += 1,
        }
    }
    Ok(count)
}

/// A commit: 40 (SHA-1) or 64 (SHA-256) lower-case hexadecimal digits.
pub(crate) fn is_commit(text: &str) -> bool {
    is_hex(text, 40) || is_sha256(text)
}

/// 64 lower-case hexadecimal digits. Only such a text becomes a blob's name.
pub(crate) fn is_sha256(text: &str) -> bool {
    is_hex(text, 64)
}

fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// A file's name below a URL: each part encoded.
pub(crate) fn encode_parts(name: &str) -> String {
    name.split('/').map(encode).collect::<Vec<_>>().join("/")
}

/// Percent-encodes all but the unreserved characters of RFC 3986, for one path segment.
pub(crate) fn encode(segment: &str) -> String {
    let mut encoded = String::with_capacity(segment.len());
    for byte in segment.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => encoded.push(byte.into()),
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_relative_names_pass() {
        assert_eq!(check_file("model-00001-of-00002.safetensors").unwrap(), 1);
        assert_eq!(check_file("original/params.json").unwrap(), 2);
        let long = "x".repeat(300);
        for name in ["", "/", "/x", "../x", "a/../../x", "a/..", "./x", "a//b", "a/", "x\0", "x\n", "a\\b", &long] {
            assert!(matches!(check_file(name), Err(HubError::Name { .. })), "{name:?}");
        }
    }

    #[test]
    fn a_shard_is_a_safetensors_file_beside_its_index() {
        check_shard("a.safetensors").unwrap();
        for name in ["a.bin", "sub/a.safetensors", "../a.safetensors", ""] {
            assert!(matches!(check_shard(name), Err(HubError::Name { .. })), "{name:?}");
        }
    }

    #[test]
    fn digests_are_lower_case_and_of_the_exact_length() {
        let digest = "0123456789abcdef".repeat(4);
        assert!(is_sha256(&digest) && is_commit(&digest) && is_commit(&digest[..40]));
        for text in
            ["", "../../x", &digest[1..], &digest.to_uppercase(), &format!("{digest}0"), &digest.replace('0', "/")]
        {
            assert!(!is_sha256(text) && !is_commit(text), "{text:?}");
        }
    }

    #[test]
    fn a_revision_becomes_one_segment_and_a_file_keeps_its_parts() {
        assert_eq!(encode_parts("train/a b.py"), "train/a%20b.py");
        assert_eq!(encode("refs/pr/1 é"), "refs%2Fpr%2F1%20%C3%A9");
    }
}
