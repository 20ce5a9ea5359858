//! What grammars cost with a large vocabulary. Not run by default: figures are those of the machine.

mod common;

use std::time::{Duration, Instant};

use baton_grammar::{Compiler, Limits, Spec, Token, Vocabulary};
use common::Random;
use serde_json::json;

/// As many tokens as large models have: bytes, and pieces of words, most of them a few letters long.
fn large(size: usize) -> Vocabulary {
    let mut random = Random(5);
    let mut seen = std::collections::HashSet::new();
    let mut tokens: Vec<Token> = (0..=255).map(|byte| Token::Text(vec![byte])).collect();
    tokens.push(Token::Control("<|end|>".into()));
    tokens.extend(
        ["{\"", "\":", "\",", "\"}", "\": ", ", \"", "[{", "}]", "],", "0.", "00"].map(|t| Token::Text(t.into())),
    );
    while tokens.len() < size {
        let space = if random.below(2) == 0 { " " } else { "" };
        let length = 2 + random.below(3) + random.below(3) + random.below(3);
        let letters = b"eeeettaaooiinnsshhrrddllccuummwwffggyyppbbvkjxqz";
        let word: String = (0..length).map(|_| char::from(letters[random.below(letters.len())])).collect();
        let word = space.to_owned() + &word;
        if seen.insert(word.clone()) {
            tokens.push(Token::Text(word.into_bytes()));
        }
    }
    Vocabulary::new(tokens)
}

fn typical() -> Spec {
    Spec::JsonSchema(json!({
        "type": "object",
        "properties": {
            "name": { "type": "string" },
            "age": { "type": "integer", "minimum": 0, "maximum": 150 },
            "email": { "type": "string", "format": "email" },
            "tags": { "type": "array", "items": { "enum": ["red", "green", "blue"] }, "maxItems": 5 },
            "address": {
                "type": "object",
                "properties": { "street": { "type": "string" }, "city": { "type": "string" } },
                "required": ["street", "city"],
                "additionalProperties": false,
            },
        },
        "required": ["name", "age", "email", "tags", "address"],
        "additionalProperties": false,
    }))
}

#[test]
#[ignore = "measures the machine; its largest vocabulary takes minutes in a debug build"]
#[expect(clippy::print_stdout, reason = "figures are what this is for")]
fn masks_of_a_large_vocabulary_take_less_than_a_step() {
    let outputs = [
        r#"{"name":"some person with a long name","age":31,"email":"some.person@example.com","tags":["red","blue"],"address":{"street":"a street","city":"a city"}}"#,
        r#"{"name":"x","age":5,"email":"a@b.c","tags":[],"address":{"street":"s","city":"c"}}"#,
    ];
    for size in [1024, 32_000, 128_000, 256_000] {
        let begun = Instant::now();
        let compiler = Compiler::new(large(size), Limits::default());
        let built = begun.elapsed();
        let begun = Instant::now();
        let grammar = compiler.compile(&typical(), None).expect("valid");
        let compiled = begun.elapsed();
        let (mut masks, mut accepts, mut begins): (Vec<Duration>, Vec<_>, Vec<_>) = Default::default();
        for output in outputs.iter().cycle().take(20) {
            let begun = Instant::now();
            let mut constraint = grammar.begin(&[256]);
            begins.push(begun.elapsed());
            for byte in output.bytes() {
                let begun = Instant::now();
                let mask = constraint.masks(&[]).expect("a mask").remove(0).expect("restricted");
                masks.push(begun.elapsed());
                assert!(mask.allows(u32::from(byte)));
                let begun = Instant::now();
                constraint.accept(u32::from(byte)).expect("allowed");
                accepts.push(begun.elapsed());
            }
        }
        let summary = |times: &mut Vec<Duration>| {
            times.sort_unstable();
            let mean = times.iter().sum::<Duration>() / times.len() as u32;
            format!("mean {mean:?}, median {:?}, p99 {:?}", times[times.len() / 2], times[times.len() * 99 / 100])
        };
        println!("{size} tokens: built in {built:?}, compiled in {compiled:?}");
        println!("  begin: {}", summary(&mut begins));
        println!("  mask: {}", summary(&mut masks));
        println!("  accept: {}", summary(&mut accepts));
        assert!(masks[masks.len() / 2] < Duration::from_millis(10));
    }
}

/// Resident memory, in bytes.
fn resident() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").expect("Linux");
    pages.split(' ').nth(1).and_then(|pages| pages.parse::<usize>().ok()).expect("a number") * 4096
}

#[test]
#[ignore = "10,000 schemas take minutes in a debug build"]
#[expect(clippy::print_stdout, reason = "figures are what this is for")]
fn ten_thousand_schemas_keep_memory_under_the_cap() {
    let limits = Limits::default();
    let compiler = Compiler::new(large(32_000), limits.clone());
    let compile = |i: usize| {
        let properties: serde_json::Map<_, _> =
            (0..20).map(|p| (format!("p{i}_{p}"), json!({ "type": "string", "maxLength": 1 + p }))).collect();
        compiler
            .compile(&Spec::JsonSchema(json!({ "type": "object", "properties": properties })), None)
            .expect("valid");
    };
    (0..20).for_each(&compile);
    let (before, begun) = (resident(), Instant::now());
    (20..10_020).for_each(&compile);
    let (grown, took) = (resident().saturating_sub(before), begun.elapsed());
    println!("10,000 schemas: {took:?}, memory grew by {} KiB", grown >> 10);
    assert!(grown < limits.cached_bytes);
}
