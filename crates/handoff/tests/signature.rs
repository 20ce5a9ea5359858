//! Signatures made by another implementation, as `minisign -S` makes them, and what is wrong with wrong ones.

use std::fs;
use std::path::Path;

use baton_handoff::{Bundle, KeyError, MANIFEST, SIGNATURE, SignatureStatus, TrustedKeys};
use baton_model::Files;

fn data(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)).unwrap()
}

fn keys(names: &[&str]) -> TrustedKeys {
    TrustedKeys::parse(&names.iter().map(|name| data(name)).collect::<String>()).unwrap()
}

fn check(trusted: &[&str], signature: &str) -> SignatureStatus {
    keys(trusted).check(data("signed/handoff.json").as_bytes(), Some(data(signature).as_bytes()))
}

/// The id in a key file's comment, as minisign writes it.
fn id(key: &str) -> String {
    data(key).lines().next().unwrap().rsplit(' ').next().unwrap().to_owned()
}

#[test]
fn good_signatures_are_good_under_any_of_several_keys() {
    for (signature, signer) in
        [("signed/handoff.json.minisig", "first.pub"), ("legacy.minisig", "first.pub"), ("other.minisig", "second.pub")]
    {
        let status = check(&["first.pub", "second.pub"], signature);
        let SignatureStatus::Good { key, trusted_comment } = &status else { panic!("{signature}: {status:?}") };
        assert_eq!(key.to_string(), id(signer));
        assert_eq!(trusted_comment, "timestamp:1790000000\\tfile:handoff.json");
        assert!(status.accepted(&keys(&["first.pub"])));
    }
}

#[test]
fn a_signature_by_an_unknown_key_is_refused_with_its_id() {
    let status = check(&["second.pub"], "signed/handoff.json.minisig");
    assert!(matches!(&status, SignatureStatus::UnknownKey { key } if key.to_string() == id("first.pub")), "{status:?}");
    assert!(status.to_string().contains(&id("first.pub")));
    assert!(!status.accepted(&keys(&["second.pub"])));
}

#[test]
fn a_key_id_alone_convinces_nobody_and_does_not_stand_in_anothers_way() {
    // Made by the second key under the first one's id.
    assert!(matches!(check(&["first.pub"], "claims-first.minisig"), SignatureStatus::Bad { .. }));
    assert!(matches!(check(&["first.pub", "same-id.pub"], "claims-first.minisig"), SignatureStatus::Good { .. }));
    assert!(matches!(check(&["same-id.pub"], "signed/handoff.json.minisig"), SignatureStatus::Bad { .. }));
}

#[test]
fn every_flipped_bit_of_manifest_or_signature_is_refused() {
    let (manifest, signature) =
        (data("signed/handoff.json").into_bytes(), data("signed/handoff.json.minisig").into_bytes());
    let trusted = keys(&["first.pub"]);
    for bit in (0..manifest.len() * 8).step_by(13) {
        let mut flipped = manifest.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(matches!(trusted.check(&flipped, Some(&signature)), SignatureStatus::Bad { .. }), "bit {bit}");
    }
    // All but the untrusted comment is covered.
    let covered = signature.iter().position(|byte| *byte == b'\n').unwrap() + 1;
    let last = signature.len() - 1;
    for bit in covered * 8..last * 8 {
        let mut flipped = signature.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        let status = trusted.check(&manifest, Some(&flipped));
        assert!(!status.accepted(&trusted), "bit {bit}: {status:?}");
    }
}

#[test]
fn without_keys_a_signature_is_not_checked_and_with_keys_none_is_a_failure() {
    let (none, some) = (TrustedKeys::default(), keys(&["first.pub"]));
    let manifest = data("signed/handoff.json");
    let status = none.check(manifest.as_bytes(), Some(data("signed/handoff.json.minisig").as_bytes()));
    assert!(matches!(&status, SignatureStatus::NotChecked { key } if key.to_string() == id("first.pub")), "{status:?}");
    assert!(status.accepted(&none) && !status.accepted(&some));
    let unsigned = some.check(manifest.as_bytes(), None);
    assert_eq!(unsigned, SignatureStatus::Unsigned);
    assert!(unsigned.accepted(&none) && !unsigned.accepted(&some));
}

#[test]
fn what_is_no_signature_is_malformed() {
    let good = data("signed/handoff.json.minisig");
    let lines: Vec<_> = good.lines().collect();
    let malformed = [
        String::new(),
        "untrusted comment: x".into(),
        lines[..3].join("\n"),
        good.replace("trusted comment: timestamp", "timestamp"),
        good.replace(lines[1], "RUQ="),
        good.replace(lines[1], "not base64 at all"),
        good.replace(lines[1], &lines[1].replacen("RU", "RV", 1)),
        good.replace(lines[3], "AAAA"),
    ];
    for text in malformed {
        let status = keys(&["first.pub"]).check(b"", Some(text.as_bytes()));
        assert!(matches!(status, SignatureStatus::Malformed { .. }), "{text:?}: {status:?}");
    }
    assert!(matches!(keys(&["first.pub"]).check(b"", Some(b"\xff\xff")), SignatureStatus::Malformed { .. }));
}

#[test]
fn keys_are_read_as_files_or_bare_lines_and_anything_else_is_named_by_line() {
    let file = data("first.pub");
    let bare = file.lines().nth(1).unwrap();
    for text in [file.as_str(), bare, &format!("# ours\r\n\r\n{bare}\r\n")] {
        let ids: Vec<_> = TrustedKeys::parse(text).unwrap().ids().map(|key| key.to_string()).collect();
        assert_eq!(ids, [id("first.pub")]);
    }
    let mut both = keys(&["first.pub"]);
    both.extend(keys(&["second.pub"]));
    assert_eq!(both.ids().map(|key| key.to_string()).collect::<Vec<_>>(), [id("first.pub"), id("second.pub")]);

    assert!(matches!(TrustedKeys::parse("# nothing\n"), Err(KeyError::None)));
    assert!(matches!(TrustedKeys::parse(&format!("{file}junk\n")), Err(KeyError::Malformed { line: 3, .. })));
    // A signature in the place of a key, and a key that was cut.
    assert!(matches!(
        TrustedKeys::parse(&data("signed/handoff.json.minisig")),
        Err(KeyError::Malformed { line: 2, .. })
    ));
    assert!(matches!(TrustedKeys::parse(&bare[..40]), Err(KeyError::Malformed { line: 1, .. })));
    assert!(matches!(TrustedKeys::parse(&"#".repeat(1 << 20)), Err(KeyError::TooLarge { .. })));
}

#[test]
fn a_bundles_signature_is_over_the_bytes_of_its_manifest() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", MANIFEST, SIGNATURE] {
        fs::write(folder.path().join(name), data(&format!("signed/{name}"))).unwrap();
    }
    let open = || Bundle::open(&Files::Folder(folder.path().into())).unwrap().unwrap();
    assert!(open().verify_files(&|_| {}).problems.is_empty());
    assert!(matches!(open().signature(&keys(&["first.pub"])), SignatureStatus::Good { .. }));
    assert!(matches!(open().signature(&TrustedKeys::default()), SignatureStatus::NotChecked { .. }));

    // The same manifest in other bytes is not what was signed.
    fs::write(folder.path().join(MANIFEST), data("signed/handoff.json").replace('\n', "")).unwrap();
    assert!(open().verify_files(&|_| {}).problems.is_empty());
    assert!(matches!(open().signature(&keys(&["first.pub"])), SignatureStatus::Bad { .. }));

    fs::remove_file(folder.path().join(SIGNATURE)).unwrap();
    assert_eq!(open().signature(&keys(&["first.pub"])), SignatureStatus::Unsigned);
}
