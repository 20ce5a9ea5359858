//! Which names a bundle's files may have, and the one link that may stand for a file.

/// Longest part of a name.
const MAX_SEGMENT: usize = 255;
/// Most parts of a name.
const MAX_SEGMENTS: usize = 8;

/// Why a name is not that of a file below the bundle's folder: parts divided by `/`, each plain.
pub(crate) fn objection(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        return Some("is empty");
    }
    if name.starts_with('/') {
        return Some("is absolute");
    }
    if name.contains('\\') || name.chars().any(char::is_control) {
        return Some("has a backslash or a control character");
    }
    if name.split('/').count() > MAX_SEGMENTS {
        return Some("has more than 8 parts");
    }
    name.split('/').find_map(|part| match part {
        "" => Some("has an empty part"),
        "." | ".." => Some("has a part . or .."),
        part if part.len() > MAX_SEGMENT => Some("has a part of more than 255 bytes"),
        _ => None,
    })
}

/// The blob that a link in the hub cache stands for: `snapshots/<commit>/<name>` leads to `../../blobs/<hex>`, one folder
/// up more for each that the name has. No other link has this form.
pub(crate) fn hub_blob<'a>(name: &str, target: &'a str) -> Option<&'a str> {
    let folders = name.matches('/').count();
    let blob = target.strip_prefix(&"../".repeat(folders + 2))?.strip_prefix("blobs/")?;
    // Git's SHA-1 of small files, SHA-256 of large ones.
    let hex = blob.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    (hex && matches!(blob.len(), 40 | 64)).then_some(blob)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_relative_names_are_taken() {
        let eight = ["a"; 8].join("/");
        for good in ["config.json", "train/data.py", ".gitattributes", "a b/é…", &eight, &"x".repeat(255)] {
            assert_eq!(objection(good), None, "{good}");
        }
        let nine = ["a"; 9].join("/");
        let bad = [
            "",
            "/",
            "/etc/passwd",
            "..",
            "../x",
            "a/../b",
            "a/..",
            ".",
            "./a",
            "a//b",
            "a/",
            "a\\b",
            "..\\x",
            "a\0b",
            "a\nb",
            "a\u{85}b",
            &nine,
            &"x".repeat(256),
        ];
        for bad in bad {
            assert!(objection(bad).is_some(), "{bad:?}");
        }
    }

    #[test]
    fn a_link_is_the_caches_only_at_its_own_depth_and_with_a_hash() {
        let (sha1, sha256) = ("a1".repeat(20), "0f".repeat(32));
        assert_eq!(hub_blob("config.json", &format!("../../blobs/{sha1}")), Some(&*sha1));
        assert_eq!(hub_blob("train/data.py", &format!("../../../blobs/{sha256}")), Some(&*sha256));
        let bad = [
            format!("../../../blobs/{sha1}"),
            format!("../blobs/{sha1}"),
            format!("/blobs/{sha1}"),
            format!("../../blobs/{sha1}/x"),
            format!("../../blobs/../{}", &sha1[3..]),
            format!("../../blobs/{}", sha1.to_uppercase()),
            format!("../.././blobs/{sha1}"),
            "../../blobs/".into(),
            "config.json".into(),
        ];
        for target in bad {
            assert_eq!(hub_blob("config.json", &target), None, "{target}");
        }
    }
}
