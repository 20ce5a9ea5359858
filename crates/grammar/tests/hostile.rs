//! Specifications made to hurt: all are refused, or compiled and followed, within bounds.

mod common;

use std::time::{Duration, Instant};

use baton_grammar::{Compiler, Limits, Spec, Structure, Vocabulary};
use common::{COMPILER, Random, begin, draw, mask};
use serde_json::{Value, json};

/// Longest that one compilation may take. It is some times of what is measured, as tests share their processors.
const MOST: Duration = Duration::from_secs(5);

fn nested(depth: usize, leaf: Value, wrap: impl Fn(Value) -> Value) -> Value {
    (0..depth).fold(leaf, |inner, _| wrap(inner))
}

fn refused() -> Vec<(&'static str, Spec)> {
    let schema = Spec::JsonSchema;
    let regex = |text: &str| Spec::Regex(text.into());
    let grammar = |text: &str| Spec::Grammar(text.into());
    let array = |inner| json!({ "type": "array", "items": inner });
    let properties = |count: usize, schema: Value| -> Value {
        (0..count).map(|i| (format!("p{i}"), schema.clone())).collect::<serde_json::Map<_, _>>().into()
    };
    vec![
        ("no schema", schema(json!("string"))),
        ("unsatisfiable", schema(json!(false))),
        ("unknown type", schema(json!({ "type": "str" }))),
        ("deep", schema(nested(60, json!({}), array))),
        ("deep value", schema(json!({ "const": nested(60, json!(1), |v| json!([v])) }))),
        ("huge enum", schema(json!({ "enum": (0..100_000).collect::<Vec<_>>() }))),
        ("empty enum", schema(json!({ "enum": [] }))),
        ("many properties", schema(json!({ "properties": properties(5000, json!({ "type": "null" })) }))),
        ("many alternatives", schema(json!({ "anyOf": vec![json!({ "type": "object" }); 5000] }))),
        ("remote reference", schema(json!({ "$ref": "https://example.com/schema.json" }))),
        ("file reference", schema(json!({ "$ref": "file:///etc/passwd" }))),
        ("dangling reference", schema(json!({ "$ref": "#/$defs/nothing" }))),
        ("reference to itself", schema(json!({ "$ref": "#" }))),
        (
            "references in a circle",
            schema(json!({ "$ref": "#/$defs/a", "$defs": {
            "a": { "$ref": "#/$defs/b" }, "b": { "$ref": "#/$defs/a" } } })),
        ),
        (
            "endless object",
            schema(json!({ "type": "object", "required": ["a"], "properties": { "a": { "$ref": "#" } } })),
        ),
        ("huge count", schema(json!({ "type": "array", "minItems": 4_000_000_000u64 }))),
        ("huge length", schema(json!({ "type": "string", "minLength": 1_000_000_000u64 }))),
        ("negative count", schema(json!({ "type": "array", "maxItems": -1 }))),
        ("contradiction", schema(json!({ "type": "integer", "minimum": 3, "maximum": 2 }))),
        ("unsupported keyword", schema(json!({ "type": "array", "uniqueItems": true }))),
        ("negation", schema(json!({ "not": {} }))),
        ("options of the compiler", schema(json!({ "x-guidance": { "lenient": true } }))),
        ("unknown format", schema(json!({ "type": "string", "format": "secret" }))),
        ("pattern with look-ahead", schema(json!({ "type": "string", "pattern": "(?=a)b" }))),
        ("explosive pattern", schema(json!({ "type": "string", "pattern": "((a{1,100}){1,100}){1,100}" }))),
        ("explosive name", schema(json!({ "patternProperties": { "(a{1,1000}){1,1000}": {} } }))),
        ("empty regex", regex("")),
        ("open group", regex("(a")),
        ("look-behind", regex("(?<=a)b")),
        ("back-reference", regex(r"(a)\1")),
        ("repeated repetition", regex("(a{1,1000}){1,1000}")),
        ("repetition beyond counting", regex("a{99999999999999999999}")),
        ("huge repetition", regex("a{1000000}")),
        ("chained repetition", regex("a{100}{100}{100}")),
        ("deep groups", regex(&("(".repeat(1000) + "a" + &")".repeat(1000)))),
        ("long regex", regex(&"a".repeat(100_000))),
        ("nothing matches", regex("[^\\x{0}-\\x{10FFFF}]")),
        ("no choice", Spec::Choice(vec![])),
        ("empty choice", Spec::Choice(vec![String::new()])),
        ("many choices", Spec::Choice((0..100_000).map(|i| i.to_string()).collect())),
        ("empty grammar", grammar("")),
        ("no grammar", grammar("I think that")),
        ("no start", grammar("rule: \"a\"")),
        ("undefined rule", grammar("start: rule")),
        ("circular terminal", grammar("start: A\nA: B\nB: A")),
        ("only itself", grammar("start: start")),
        ("deep grammar", grammar(&format!("start: {}\"a\"{}", "(".repeat(50_000), ")".repeat(50_000)))),
        ("many rules", grammar(&(0..50_000).map(|i| format!("r{i}: \"a\"\n")).collect::<String>())),
        ("long grammar", grammar(&"# ".repeat(500_000))),
        ("import", grammar("%import python.code\nstart: code")),
        ("unclosed GBNF", grammar("root ::= \"a")),
        ("undefined in GBNF", grammar("root ::= rule")),
        ("no root in GBNF", grammar("start ::= \"a\"")),
        ("circular GBNF", grammar("root ::= a\na ::= b\nb ::= a")),
        ("deep GBNF", grammar(&format!("root ::= {}\"a\"{}", "(".repeat(50_000), ")".repeat(50_000)))),
        ("no trigger", Spec::StructuralTag { structures: vec![], triggers: vec![] }),
        (
            "wrong trigger",
            Spec::StructuralTag {
                structures: vec![Structure { begin: "<a>".into(), schema: json!({}), end: String::new() }],
                triggers: vec!["<b>".into()],
            },
        ),
    ]
}

#[test]
fn hostile_specifications_are_refused_at_once() {
    let mut accepted = Vec::new();
    for (name, spec) in refused() {
        let begun = Instant::now();
        let outcome = COMPILER.compile(&spec, None);
        let took = begun.elapsed();
        assert!(took < MOST, "{name}: {took:?}");
        let Err(error) = outcome else {
            accepted.push(name);
            continue;
        };
        let error = error.to_string();
        assert!(error.chars().count() <= 250, "{name}: {error}");
        // In our words alone.
        assert!(!error.contains("p1") && !error.contains("aaa") && !error.contains("example.com"), "{name}: {error}");
    }
    assert!(accepted.is_empty(), "{accepted:?}");
}

/// Legitimate in form, and as costly as the limits let them be.
fn costly() -> Vec<(&'static str, Spec)> {
    let regex = |text: &str| Spec::Regex(text.into());
    let properties: serde_json::Map<_, _> = (0..400)
        .map(|i| (format!("property_{i}"), json!({ "type": "string", "pattern": format!("^x{i}[a-z]*$") })))
        .collect();
    let doubling: String = (1..30).map(|i| format!("r{i} ::= r{} r{}\n", i - 1, i - 1)).collect();
    let chain: String = (1..1500).map(|i| format!("r{i}: r{} \"b\" | \"c\"\n", i - 1)).collect();
    vec![
        ("nested quantifiers", regex("(a+)+b")),
        ("alternatives that overlap", regex("(a|aa)*b(.*a){20}")),
        ("far look-back", regex("(.|\\n)*a(.|\\n){1000}")),
        ("large repetition", regex("([a-z]{1,90}[0-9]){1,100}")),
        ("unicode classes", regex("(\\w{1,50}\\s){1,100}")),
        ("optional properties", Spec::JsonSchema(json!({ "type": "object", "properties": properties }))),
        ("long tuple", Spec::JsonSchema(json!({ "type": "array", "items": { "type": "integer" }, "minItems": 2000 }))),
        ("long string", Spec::JsonSchema(json!({ "type": "string", "minLength": 9000 }))),
        ("doubling", Spec::Grammar(format!("root ::= r29\nr0 ::= \"a\"\n{doubling}"))),
        ("chain of rules", Spec::Grammar(format!("start: r1499\nr0: \"a\"\n{chain}"))),
        ("no end", Spec::Grammar("start: \"a\" start".into())),
        ("left recursion", Spec::Grammar("start: start \"a\" | \"a\"".into())),
        ("ambiguity", Spec::Grammar("start: e\ne: e e | \"a\" | \"\"".into())),
        ("hidden left recursion", Spec::Grammar("start: x? start \"a\" | \"b\"\nx: \"\"".into())),
    ]
}

#[test]
fn costly_specifications_are_bounded_when_they_are_compiled_and_at_each_token() {
    for (name, spec) in costly() {
        let begun = Instant::now();
        let outcome = COMPILER.compile(&spec, None);
        assert!(begun.elapsed() < MOST, "{name}: {:?}", begun.elapsed());
        let Ok(grammar) = outcome else { continue };
        let mut constraint = grammar.begin(&[common::END]);
        let mut random = Random(7);
        for _ in 0..60 {
            let begun = Instant::now();
            let Ok(masks) = constraint.masks(&[]) else { break };
            assert!(begun.elapsed() < MOST, "{name}: a mask took {:?}", begun.elapsed());
            let allowed: Vec<u32> = masks[0].as_ref().expect("one").ids().filter(|&id| id != common::END).collect();
            let Some(&token) = allowed.get(random.below(allowed.len().max(1))) else { break };
            if constraint.accept(token).is_err() {
                break;
            }
        }
    }
}

#[test]
fn what_is_kept_of_compiled_grammars_is_bounded() {
    let limits = Limits { cached: 8, ..Limits::default() };
    let compiler = Compiler::new(Vocabulary::new(common::tokens()), limits);
    let spec = |i: usize| Spec::Regex(format!("x{i}"));
    let kept = compiler.compile(&spec(0), None).expect("valid");
    for i in 1..8 {
        compiler.compile(&spec(i), None).expect("valid");
    }
    assert!(std::ptr::addr_eq(&*kept, &*compiler.compile(&spec(0), None).expect("valid")), "it is still there");
    for i in 8..16 {
        compiler.compile(&spec(i), None).expect("valid");
    }
    assert!(!std::ptr::addr_eq(&*kept, &*compiler.compile(&spec(0), None).expect("valid")), "it had to go");
}

#[test]
fn a_failure_of_one_sequence_leaves_the_grammar_to_others() {
    let spec = Spec::Regex("(ab)+".into());
    let mut broken = begin(&spec, None);
    assert!(broken.accept(u32::from(b'x')).is_err());
    assert!(broken.masks(&[]).is_err());
    let mut other = begin(&spec, None);
    assert!(mask(&mut *other).is_some());
    assert!(draw(&mut *other, &mut Random(1), 100).is_some());
}
