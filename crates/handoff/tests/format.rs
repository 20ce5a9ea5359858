//! The format as three texts have it: the parser, the JSON Schema, and the page that describes both.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use baton_handoff::{Digest, Feature, Manifest, ManifestError};
use jsonschema::Validator;
use serde_json::{Value, json};

fn models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models")
}

fn page() -> String {
    fs::read_to_string(models().join("HANDOFF.md")).unwrap()
}

fn schema() -> Validator {
    let schema: Value =
        serde_json::from_str(&fs::read_to_string(models().join("handoff.schema.json")).unwrap()).unwrap();
    jsonschema::draft202012::meta::validate(&schema).unwrap();
    jsonschema::draft202012::new(&schema).unwrap()
}

/// The first block of that language in the page.
fn block(language: &str) -> String {
    let page = page();
    let (_, rest) = page.split_once(&format!("```{language}\n")).unwrap();
    rest.split_once("```").unwrap().0.to_owned()
}

fn manifest() -> Value {
    common::manifest([("config.json", b"{}" as &[u8]), ("train/data.py", b"")])
}

fn parse(value: &Value) -> Result<Manifest, ManifestError> {
    Manifest::parse(value.to_string().as_bytes())
}

#[test]
fn good_manifests_pass_parser_and_schema() {
    let signed = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/signed/handoff.json")).unwrap();
    for text in [block("json").into_bytes(), signed, manifest().to_string().into_bytes()] {
        Manifest::parse(&text).unwrap();
        let value = serde_json::from_slice(&text).unwrap();
        let errors: Vec<_> = schema().iter_errors(&value).map(|e| e.to_string()).collect();
        assert!(errors.is_empty(), "{errors:?}");
    }
}

/// Whether the schema can express a rule.
#[derive(PartialEq)]
enum Schema {
    Too,
    CannotSay,
}
use Schema::{CannotSay, Too};

/// What is done to a good manifest, what the parser then says, and whether the schema refuses it too.
type Breach = (fn(&mut Value), &'static str, Schema);

fn remove(object: &mut Value, field: &str) {
    object.as_object_mut().unwrap().remove(field).unwrap();
}

/// Puts other files in, with their generation.
fn files(manifest: &mut Value, names: &[&str]) {
    let other = common::manifest(names.iter().map(|name| (*name, b"x" as &[u8])));
    (manifest["files"], manifest["generation"]) = (other["files"].clone(), other["generation"].clone());
}

const SHA256: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

#[rustfmt::skip]
const BREACHES: &[Breach] = &[
    // The whole.
    (|m| m["format"] = json!("other"), "has the format \"other\"; only \"baton-handoff\" is read", Too),
    (|m| m["version"] = json!(2), "has version 2 of its format; only version 1 is read", Too),
    (|m| m["version"] = json!(0), "has version 0", Too),
    (|m| m["version"] = json!("1"), "expected u64", Too),
    (|m| m["surprise"] = json!(1), "unknown field `surprise`", Too),
    (|m| remove(m, "format"), "missing field `format`", Too),
    (|m| remove(m, "version"), "missing field `version`", Too),
    (|m| remove(m, "model"), "missing field `model`", Too),
    (|m| remove(m, "generation"), "missing field `generation`", Too),
    (|m| remove(m, "files"), "missing field `files`", Too),
    (|m| remove(m, "trained"), "missing field `trained`", Too),
    (|m| remove(m, "computed"), "missing field `computed`", Too),
    (|m| remove(m, "cases"), "missing field `cases`", Too),
    // Facts.
    (|m| m["model"]["extra"] = json!(1), "unknown field `extra`", Too),
    (|m| m["model"]["name"] = json!(""), "model.name is empty", Too),
    (|m| m["model"]["name"] = json!("x".repeat(1025)), "model.name is empty, longer", Too),
    (|m| m["model"]["license"] = json!("\u{1b}[2J"), "model.license is empty, longer", Too),
    (|m| m["model"]["lineage"] = json!([]), "an object is expected here", Too),
    (|m| m["model"]["lineage"] = json!({"a": vec![0; 70_000]}), "more than 65536 values", CannotSay),
    (|m| m["trained"]["surprise"] = json!(1), "unknown field `surprise`", Too),
    (|m| m["trained"]["dtype"] = json!("bf16"), "trained.dtype is \"bf16\", not one of float32, bfloat16, float16", Too),
    (|m| m["trained"]["quantization"] = json!("two words"), "trained.quantization is \"two words\", not a word", Too),
    (|m| m["trained"]["commit"] = json!("a\nb"), "trained.commit is empty, longer", Too),
    (|m| m["computed"]["dtype"] = json!("float64"), "computed.dtype is \"float64\"", Too),
    (|m| m["computed"]["device"] = json!("\u{9b}"), "computed.device is empty, longer", Too),
    (|m| m["requires"] = json!(["telepathy"]), "unknown variant `telepathy`, expected one of `latent_attention`", Too),
    (|m| m["requires"] = json!(["fp8", "fp8"]), "requires has a word twice", Too),
    // Files.
    (|m| { m["files"] = json!({}); m["generation"] = json!(SHA256) }, "files is empty", Too),
    (|m| m["generation"] = json!(SHA256), "generation is e3b0", CannotSay),
    (|m| m["generation"] = json!(SHA256.to_uppercase()), "64 lower-case hex digits", Too),
    (|m| m["files"]["config.json"]["bytes"] = json!(-1), "invalid value: integer `-1`", Too),
    (|m| m["files"]["config.json"]["bytes"] = json!(1.5), "invalid type: floating point", Too),
    (|m| m["files"]["config.json"]["sha256"] = json!("00"), "64 lower-case hex digits", Too),
    (|m| m["files"]["config.json"]["mode"] = json!(7), "unknown field `mode`", Too),
    (|m| remove(&mut m["files"]["config.json"], "bytes"), "missing field `bytes`", Too),
    (|m| files(m, &["../x"]), "file name \"../x\" has a part . or ..", Too),
    (|m| files(m, &["a/../x"]), "file name \"a/../x\" has a part . or ..", Too),
    (|m| files(m, &["a/."]), "file name \"a/.\" has a part . or ..", Too),
    (|m| files(m, &["/etc/passwd"]), "file name \"/etc/passwd\" is absolute", Too),
    (|m| files(m, &["a//b"]), "has an empty part", Too),
    (|m| files(m, &["a/"]), "has an empty part", Too),
    (|m| files(m, &[""]), "file name \"\" is empty", Too),
    (|m| files(m, &["a\\b"]), "has a backslash", Too),
    (|m| files(m, &["a\0b"]), "file name \"a\\u{0}b\" has a backslash or a control character", Too),
    (|m| files(m, &["1/2/3/4/5/6/7/8/9"]), "has more than 8 parts", Too),
    (|m| files(m, &[&"x".repeat(256)]), "more than 255 bytes", Too),
    (|m| files(m, &[&"é".repeat(128)]), "more than 255 bytes", CannotSay),
    (|m| files(m, &["handoff.json"]), "is the manifest's or its signature's", Too),
    (|m| files(m, &["handoff.json.minisig"]), "is the manifest's or its signature's", Too),
    (|m| files(m, &["a/b", "a/b/c"]), "a/b is a file and a folder", CannotSay),
    // Tensors.
    (|m| m["tensors"] = json!({"w": {"dtype": "bf16", "shape": [], "sha256": SHA256}}), "dtype \"bf16\"", Too),
    (|m| m["tensors"] = json!({"w": {"dtype": "BF16", "shape": vec![0; 9], "sha256": SHA256}}), "w has 9 dimensions", Too),
    (|m| m["tensors"] = json!({"w": {"dtype": "BF16", "shape": [-1], "sha256": SHA256}}), "invalid value", Too),
    (|m| m["tensors"] = json!({"": {"dtype": "BF16", "shape": [], "sha256": SHA256}}), "the name of a tensor", Too),
    (|m| m["tensors"] = json!({"w": {"dtype": "BF16", "shape": []}}), "missing field `sha256`", Too),
    (|m| m["tensors"] = json!({"w": {"dtype": "BF16", "shape": [], "sha256": SHA256, "x": 1}}), "unknown field `x`", Too),
    // Tolerances.
    (|m| m["tolerances"]["double"] = common::tolerances(0.1, 1.0), "unknown variant `double`", Too),
    (|m| m["tolerances"]["int4"]["extra"] = json!(1), "unknown field `extra`", Too),
    (|m| remove(&mut m["tolerances"]["int4"], "kl"), "missing field `kl`", Too),
    (|m| m["tolerances"]["float32"]["kl"] = json!(-1.0), "tolerances of float32: kl is -1", Too),
    (|m| m["tolerances"]["float32"]["mean_abs_logprob_diff"] = json!(-0.1), "mean_abs_logprob_diff is -0.1", Too),
    (|m| m["tolerances"]["float32"]["kl"] = Value::Null, "invalid type: null", Too),
    (|m| m["tolerances"]["int4"]["mean_abs_logprob_diff"] = json!(0.6), "the mean difference 0.6 exceeds the maximum 0.5", CannotSay),
    (|m| m["tolerances"]["int4"]["p99_abs_logprob_diff"] = json!(0.7), "the 99th percentile 0.7 exceeds the maximum 0.5", CannotSay),
    (|m| m["tolerances"]["int4"]["top1_agreement"] = json!(1.1), "top1_agreement is 1.1, more than 1", Too),
    (|m| m["tolerances"]["int4"]["top1_agreement"] = json!(-0.1), "top1_agreement is -0.1", Too),
    (|m| m["tolerances"]["float32"]["perplexity_ratio"] = json!(0.99), "perplexity_ratio is 0.99, less than 1", Too),
    (|m| m["tolerances"]["half"] = common::tolerances(0.6, 0.95), "tolerances of half: max_abs_logprob_diff 0.6 allows more than the coarser int4 with 0.5", CannotSay),
    (|m| m["tolerances"]["half"] = common::tolerances(0.1, 0.8), "tolerances of half: top1_agreement 0.8 allows more than the coarser int4 with 0.9", CannotSay),
    // Cases.
    (|m| m["cases"] = json!([]), "cases is empty", Too),
    (|m| m["cases"][0]["top"] = json!({}), "no case has a position in top", CannotSay),
    (|m| m["cases"][0]["x"] = json!(1), "unknown field `x`", Too),
    (|m| m["cases"][1]["name"] = json!("chat"), "the name of case chat occurs twice", CannotSay),
    (|m| m["cases"][1]["name"] = json!("a\rb"), "the name of a case is empty, longer", Too),
    (|m| { m["cases"][1]["prompt_ids"] = json!([]); m["cases"][1]["logprobs"] = json!([]) }, "case ids: prompt_ids is empty", Too),
    (|m| m["cases"][0]["prompt_ids"][0] = json!(-1), "invalid value", Too),
    (|m| m["cases"][0]["prompt_ids"][0] = json!(4294967296u64), "invalid value", Too),
    (|m| m["cases"][0]["margins"] = json!([1.0]), "case chat: 1 margins for 2 greedy_ids", CannotSay),
    (|m| m["cases"][0]["margins"][1] = json!(-0.5), "case chat: a margin is -0.5", Too),
    (|m| m["cases"][0]["logprobs"] = json!([-1.0]), "case chat: 1 logprobs, but 5 ids have 4", CannotSay),
    (|m| m["cases"][1]["logprobs"] = json!([-1.0, -1.0]), "case ids: 2 logprobs, but 2 ids have 1", CannotSay),
    (|m| m["cases"][0]["logprobs"][2] = json!(0.1), "case chat: a logprob is 0.1, above 0", Too),
    (|m| m["cases"][0]["logprobs"][2] = Value::Null, "invalid type: null", Too),
    (|m| m["cases"][0]["top"]["5"] = json!([[1, -1.0], [2, -1.0]]), "case chat: top at 5 lies behind its 5 ids", CannotSay),
    (|m| m["cases"][0]["top"]["x"] = json!([[1, -1.0], [2, -1.0]]), "invalid", Too),
    (|m| m["cases"][0]["top"]["01"] = json!([[1, -1.0], [2, -1.0]]), "invalid number", Too),
    (|m| m["cases"][0]["top"]["1"] = json!([[1, -2.0], [2, -1.0]]), "case chat: top at 1 is not sorted", CannotSay),
    (|m| m["cases"][0]["top"]["1"] = json!([[1, -1.0], [1, -2.0]]), "case chat: top at 1 has an id twice", CannotSay),
    (|m| m["cases"][0]["top"]["1"] = json!([[1, -1.0], [2, -1.5], [3, -2.0]]), "top at 2 has 2 tokens, the first list has 3", CannotSay),
    (|m| m["cases"][0]["top"] = json!({"1": [[1, -1.0]]}), "top has lists of 1", Too),
    (|m| m["cases"][0]["top"]["1"] = json!([[1, 0.5], [2, -1.0]]), "top at 1 has the logprob 0.5, above 0", Too),
    (|m| m["cases"][0]["top"]["1"] = json!([[1, -0.1], [2, -0.2]]), "top at 1 has a probability of 1.723568", CannotSay),
    (|m| m["cases"][0]["top"]["1"] = json!([[1, -1.0, 0], [2, -1.0]]), "trailing characters", Too),
    (|m| m["cases"][0]["top"]["1"] = json!([[1], [2, -1.0]]), "invalid length 1", Too),
    (|m| remove(&mut m["cases"][0], "prompt"), "case chat: a chat needs the prompt", Too),
    (|m| m["cases"][0]["chat"]["messages"] = json!([]), "case chat: the chat has no messages", Too),
    (|m| m["cases"][0]["chat"]["messages"] = json!(["hi"]), "case chat: a message or a tool is not an object", Too),
    (|m| m["cases"][0]["chat"]["tools"] = json!([1]), "case chat: a message or a tool is not an object", Too),
    (|m| m["cases"][0]["chat"]["x"] = json!(1), "unknown field `x`", Too),
    (|m| m["cases"][0]["chat"]["template_kwargs"] = json!([]), "an object is expected here", Too),
    (|m| m["cases"][0]["chat"]["add_generation_prompt"] = json!(1), "invalid type", Too),
];

#[test]
fn every_rule_refuses_what_breaks_it_by_name_and_the_schema_does_so_where_it_can() {
    let schema = schema();
    for (breach, message, in_schema) in BREACHES {
        let mut broken = manifest();
        breach(&mut broken);
        let error = parse(&broken).expect_err(message).to_string();
        assert!(error.contains(message), "{error:?} does not say {message:?}");
        assert_eq!(!schema.is_valid(&broken), *in_schema == Too, "the schema on: {message}");
    }
}

#[test]
fn all_breaches_are_reported_at_once_up_to_a_bound() {
    let mut broken = manifest();
    broken["trained"]["dtype"] = json!("bf16");
    broken["generation"] = json!(SHA256);
    broken["tolerances"]["int4"]["kl"] = json!(-1.0);
    broken["cases"][1]["name"] = json!("chat");
    let Err(ManifestError::Invalid { problems, more: 0 }) = parse(&broken) else { panic!() };
    assert!(problems.len() >= 4, "{problems:?}");

    broken["cases"] = json!((0..100).map(|_| broken["cases"][1].clone()).collect::<Vec<_>>());
    let Err(ManifestError::Invalid { problems, more }) = parse(&broken) else { panic!() };
    assert!(problems.len() < 50 && more > 50, "{} and {more}", problems.len());
}

#[test]
fn the_version_is_judged_before_anything_that_a_later_one_may_have_changed() {
    let text = br#"{"cases": "elsewhere", "version": 7, "format": "baton-handoff", "new": [{"a": 1, "a": 2}]}"#;
    let error = Manifest::parse(text).unwrap_err();
    assert!(matches!(error, ManifestError::Version { found: 7 }), "{error}");
    assert!(error.to_string().contains("only version 1 is read"));
}

#[test]
fn no_name_may_occur_twice_at_any_depth() {
    let text = manifest().to_string();
    Manifest::parse(text.as_bytes()).unwrap();
    let doubled = [
        (r#""version":1"#, r#""version":1,"version":1"#),
        (r#""generation""#, r#""requires":[],"generation""#),
        (r#""bytes":2"#, r#""bytes":2,"bytes":2"#),
        (r#""files":{"#, &format!(r#""files":{{"config.json":{{"bytes":2,"sha256":"{SHA256}"}},"#)),
        // An escape makes the same name of other bytes.
        (r#""files":{"#, &format!(r#""files":{{"c\u006fnfig.json":{{"bytes":2,"sha256":"{SHA256}"}},"#)),
        (r#""steps":100"#, r#""steps":100,"steps":100"#),
        (r#""tolerances":{"#, &format!(r#""tolerances":{{"int4":{},"#, common::tolerances(0.5, 0.9))),
        (r#""role":"user""#, r#""role":"user","role":"user""#),
        (r#""thinking":false"#, r#""thinking":false,"thinking":true"#),
        (r#""type":"function""#, r#""type":"function","type":"function""#),
        (r#""top":{"2""#, r#""top":{"2":[[5,-1.0],[6,-1.0]],"2""#),
        (r#""greedy_ids":[]"#, r#""greedy_ids":[],"greedy_ids":[]"#),
    ];
    for (once, twice) in doubled {
        assert!(text.contains(once), "{once}");
        let error = Manifest::parse(text.replacen(once, twice, 1).as_bytes()).unwrap_err().to_string();
        assert!(error.contains("twice") || error.contains("duplicate field"), "{twice}: {error}");
    }
}

#[test]
fn what_is_not_json_or_more_than_json_is_refused() {
    let text = manifest().to_string();
    let wrong = [
        String::new(),
        "null".into(),
        "[]".into(),
        text[..text.len() - 1].into(),
        format!("{text}{text}"),
        text.replacen("-3.1", "NaN", 1),
        text.replacen("-3.1", "-Infinity", 1),
        text.replacen("-3.1", "-1e999", 1),
        format!("\u{feff}{text}"),
        text.replacen("\"lineage\":{", &format!("\"lineage\":{{\"deep\":{}{},", "[".repeat(5000), "]".repeat(5000)), 1),
    ];
    for text in wrong {
        let error = Manifest::parse(text.as_bytes()).unwrap_err();
        assert!(matches!(error, ManifestError::Json { .. }), "{error}");
        assert!(error.to_string().len() < 2000);
    }
    Manifest::parse(b"\xff\xfe").unwrap_err();
    Manifest::parse(
        &text
            .replace("\"hi\"", "\"h@i\"")
            .into_bytes()
            .into_iter()
            .map(|b| if b == b'@' { 0xff } else { b })
            .collect::<Vec<_>>(),
    )
    .unwrap_err();
}

#[test]
fn counts_are_bounded_however_large_the_text() {
    let refused = |value: &Value, message: &str| {
        let error = parse(value).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
        assert!(error.len() < 20_000, "{} bytes", error.len());
    };
    let many = 100_000;
    let mut manifest = manifest();
    let names: Vec<_> = (0..many).map(|i| format!("file-{i}")).collect();
    let listed = common::manifest(names.iter().map(|name| (name.as_str(), b"" as &[u8])));
    refused(&listed, "files has 100000 entries, at most 65536");

    let case = manifest["cases"][1].clone();
    let cases = (0..many).map(|i| {
        let mut case = case.clone();
        case["name"] = json!(format!("case-{i}"));
        case
    });
    manifest["cases"] = cases.collect();
    refused(&manifest, "cases has 100000 entries, at most 8192");

    // Two bytes make a value of many; none is built.
    let brackets = format!(r#"{{"format": "baton-handoff", "x": [{}0]}}"#, "[],".repeat(3 << 20));
    let error = Manifest::parse(brackets.as_bytes()).unwrap_err().to_string();
    assert!(error.contains("more than 4194304 values"), "{error}");

    let spaces = " ".repeat(baton_handoff::MAX_MANIFEST as usize + 1);
    assert!(matches!(Manifest::parse(spaces.as_bytes()), Err(ManifestError::TooLarge { .. })));
    let name = format!(r#"{{"format": "baton-handoff", "version": 1, "{}": 0}}"#, "x".repeat(1 << 20));
    assert!(Manifest::parse(name.as_bytes()).unwrap_err().to_string().len() < 2000);
}

#[test]
fn control_characters_of_a_manifest_do_not_reach_a_terminal() {
    let mut broken = manifest();
    files(&mut broken, &["\u{1b}[31mred"]);
    broken["format"] = json!("baton-handoff");
    assert!(!parse(&broken).unwrap_err().to_string().contains('\u{1b}'));
    broken["format"] = json!("\u{1b}c");
    assert!(!parse(&broken).unwrap_err().to_string().contains('\u{1b}'));
    broken = manifest();
    broken["\u{1b}c"] = json!(1);
    assert!(!parse(&broken).unwrap_err().to_string().contains('\u{1b}'));
}

#[test]
fn the_page_lists_every_feature_and_every_field_of_the_schema() {
    let page = page();
    let (_, table) = page.split_once("### Required features").unwrap();
    let words = table.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next()).take(Feature::ALL.len());
    assert_eq!(words.collect::<Vec<_>>(), Feature::ALL.map(Feature::word));

    let schema: Value =
        serde_json::from_str(&fs::read_to_string(models().join("handoff.schema.json")).unwrap()).unwrap();
    let enumerated: Vec<_> = schema["properties"]["requires"]["items"]["enum"].as_array().unwrap().iter().collect();
    assert_eq!(enumerated, Feature::ALL.map(|f| json!(f.word())).iter().collect::<Vec<_>>());
    fn fields(schema: &Value, found: &mut Vec<String>) {
        for (name, inner) in schema.as_object().into_iter().flatten() {
            if name == "properties" {
                found.extend(inner.as_object().unwrap().keys().cloned());
            }
            fields(inner, found);
        }
    }
    let mut names = Vec::new();
    fields(&schema, &mut names);
    assert!(names.len() > 40, "{names:?}");
    for name in names {
        let described = [format!("`{name}`"), format!(".{name}`"), format!("`{name}.")];
        assert!(described.iter().any(|text| page.contains(text)), "{name} is not described");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn the_pages_shell_line_prints_the_generation() {
    let folder = tempfile::tempdir().unwrap();
    let files: &[(&str, &[u8])] =
        &[("config.json", b"{}"), ("a b/é.txt", b"1"), ("a b-c", b"2"), ("a.b", b""), ("Z", b"3"), ("train/x/y", b"4")];
    let manifest = common::write(folder.path(), files);
    fs::write(folder.path().join("handoff.json.minisig"), "x").unwrap();
    let shell =
        std::process::Command::new("sh").args(["-c", &block("sh")]).current_dir(folder.path()).output().unwrap();
    let printed = String::from_utf8(shell.stdout).unwrap();
    assert_eq!(printed.split(' ').next(), manifest["generation"].as_str());
    let parsed = parse(&manifest).unwrap();
    assert_eq!(Manifest::generation_of(&parsed.files), parsed.generation);
    assert_ne!(parsed.generation, Digest::of(b""));
}
