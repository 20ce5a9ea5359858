//! Any manifest that keeps the rules is read as it was written, and the schema refuses nothing that the parser takes.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use baton_handoff::{
    Case, Chat, Computed, Digest, FORMAT, Feature, FileEntry, Manifest, ModelFacts, PrecisionClass, TensorEntry,
    Tolerances, Trained, VERSION,
};
use proptest::collection::{btree_map, btree_set, vec};
use proptest::option;
use proptest::prelude::*;
use serde_json::{Map, Value, json};

/// With six decimals, as they are written.
fn six(range: std::ops::RangeInclusive<i64>) -> impl Strategy<Value = f64> {
    range.prop_map(|millionths| millionths as f64 / 1e6)
}

fn text() -> impl Strategy<Value = String> {
    "[^\\p{Cc}]{1,20}"
}

fn digest() -> impl Strategy<Value = Digest> {
    any::<[u8; 32]>().prop_map(Digest)
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        six(-1_000_000..=1_000_000).prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 20, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            btree_map(".{0,5}", inner, 0..4).prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

fn object() -> impl Strategy<Value = Map<String, Value>> {
    btree_map(".{0,5}", value(), 0..4).prop_map(|map| map.into_iter().collect())
}

fn objects(count: std::ops::Range<usize>) -> impl Strategy<Value = Vec<Value>> {
    vec(object().prop_map(Value::Object), count)
}

prop_compose! {
    fn chat()(messages in objects(1..3), tools in objects(0..2), template_kwargs in object(), add_generation_prompt in any::<bool>())
        -> Chat {
        Chat { messages, tools, template_kwargs, add_generation_prompt }
    }
}

prop_compose! {
    /// Tokens of at most a sixteenth of the probability each, as many as `k`, best first.
    fn list(k: usize)(ids in btree_set(any::<u32>(), k), mut logprobs in vec(six(-30_000_000..=-2_772_600), k))
        -> Vec<(u32, f64)> {
        logprobs.sort_by(|a, b| b.total_cmp(a));
        ids.into_iter().zip(logprobs).collect()
    }
}

fn case(k: usize) -> impl Strategy<Value = Case> {
    let ids = (vec(any::<u32>(), 1..6), vec(any::<u32>(), 0..5));
    ids.prop_flat_map(move |(prompt_ids, greedy_ids)| {
        let count = prompt_ids.len() + greedy_ids.len();
        let values = (vec(six(0..=20_000_000), greedy_ids.len()), vec(six(-20_000_000..=0), count - 1));
        let top = btree_map(0..count as u32, list(k), 1..4);
        let texts = (text(), option::of(chat()), option::of(".{0,20}"));
        (Just((prompt_ids, greedy_ids)), values, top, texts)
    })
    .prop_map(|((prompt_ids, greedy_ids), (margins, logprobs), top, (name, chat, prompt))| {
        let prompt = prompt.or_else(|| chat.as_ref().map(|_| String::new()));
        Case { name, chat, prompt, prompt_ids, greedy_ids, margins, logprobs, top }
    })
}

/// Classes that widen from one to the next.
fn tolerances() -> impl Strategy<Value = BTreeMap<PrecisionClass, Tolerances>> {
    use PrecisionClass::{Float32, Half, Int4, Int8};
    let steps = vec((0..=1_000i64, 0..=100i64, 0..=100i64, 0..=100i64, 0..=100i64, 0..=100i64), 4);
    (steps, vec(any::<bool>(), 4)).prop_map(|(steps, given)| {
        let mut sum = [0; 6];
        let mut all = BTreeMap::new();
        for ((class, step), given) in [Float32, Half, Int8, Int4].into_iter().zip(steps).zip(given) {
            for (sum, step) in sum.iter_mut().zip([step.0, step.1, step.2, step.3, step.4, step.5]) {
                *sum += step;
            }
            let [max, mean, p99, kl, agreement, ratio] = sum.map(|n| n as f64 / 1e3);
            let bounds = Tolerances {
                max_abs_logprob_diff: max.max(mean).max(p99),
                mean_abs_logprob_diff: mean,
                p99_abs_logprob_diff: p99,
                kl,
                top1_agreement: 1.0 - agreement,
                perplexity_ratio: 1.0 + ratio,
            };
            if given {
                all.insert(class, bounds);
            }
        }
        all
    })
}

fn files() -> impl Strategy<Value = BTreeMap<String, FileEntry>> {
    let entry = (any::<u64>(), digest()).prop_map(|(bytes, sha256)| FileEntry { bytes, sha256 });
    // Folders and files are told apart by their first letter, so that no name is both.
    btree_map("(d[^\\p{Cc}/\\\\]{0,5}/){0,7}f[^\\p{Cc}/\\\\]{0,20}", entry, 1..5)
}

prop_compose! {
    fn facts()(name in text(), license in option::of(text()), lineage in object(), dtypes in [0usize..3, 0..3],
        quantization in option::of("[A-Za-z0-9_.-]{1,10}"), framework in option::of(text()), commit in option::of(text()),
        device in option::of(text())) -> (ModelFacts, Trained, Computed) {
        let [trained, computed] = dtypes.map(|i| ["float32", "bfloat16", "float16"][i].to_owned());
        (
            ModelFacts { name, license, lineage },
            Trained { dtype: trained, quantization, framework: framework.clone(), commit },
            Computed { dtype: computed, framework, device },
        )
    }
}

prop_compose! {
    fn manifest()(files in files(), (model, trained, computed) in facts(), tolerances in tolerances(),
        cases in (2usize..9).prop_flat_map(|k| vec(case(k), 1..4)),
        requires in btree_set((0..Feature::ALL.len()).prop_map(|i| Feature::ALL[i]), 0..4),
        tensors in btree_map(text(), ("[A-Z0-9_]{1,8}", vec(any::<u64>(), 0..=8), digest()), 0..3)) -> Manifest {
        let mut seen = BTreeSet::new();
        let tensor = |(dtype, shape, sha256)| TensorEntry { dtype, shape, sha256 };
        Manifest {
            format: FORMAT.into(),
            version: VERSION,
            model,
            generation: Manifest::generation_of(&files),
            files,
            tensors: tensors.into_iter().map(|(name, entry)| (name, tensor(entry))).collect(),
            trained,
            computed,
            requires: requires.into_iter().collect(),
            tolerances,
            cases: cases.into_iter().filter(|case| seen.insert(case.name.clone())).collect(),
        }
    }
}

fn schema() -> jsonschema::Validator {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/handoff.schema.json");
    jsonschema::draft202012::new(&serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()).unwrap()
}

/// Puts a value in the place of the `at`-th one of a tree, counted as they are met.
fn replace(value: &mut Value, at: &mut usize, with: &Value) {
    if *at == 0 {
        *value = with.clone();
    }
    *at = at.wrapping_sub(1);
    match value {
        Value::Array(items) => items.iter_mut().for_each(|item| replace(item, at, with)),
        Value::Object(map) => map.values_mut().for_each(|item| replace(item, at, with)),
        _ => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_manifest_is_read_as_it_was_written(manifest in manifest()) {
        let text = serde_json::to_vec_pretty(&manifest).unwrap();
        let read = Manifest::parse(&text);
        prop_assert!(read.is_ok(), "{}", read.unwrap_err());
        prop_assert_eq!(read.unwrap(), manifest);
        let value = serde_json::from_slice(&text).unwrap();
        let errors: Vec<_> = schema().iter_errors(&value).map(|e| e.to_string()).collect();
        prop_assert!(errors.is_empty(), "{errors:?}");
    }

    #[test]
    fn what_the_parser_takes_the_schema_takes(at in 0usize..150, with in value()) {
        let mut changed = common::manifest([("config.json", b"{}" as &[u8])]);
        replace(&mut changed, &mut at.clone(), &with);
        if Manifest::parse(changed.to_string().as_bytes()).is_ok() {
            prop_assert!(schema().is_valid(&changed), "{changed}");
        }
    }
}

#[test]
fn fields_that_may_be_absent_are_what_the_page_says_they_are() {
    let mut sparse = common::manifest([("config.json", b"{}" as &[u8])]);
    sparse["model"] = json!({"name": "x"});
    for field in ["requires", "tolerances"] {
        sparse.as_object_mut().unwrap().remove(field);
    }
    sparse["cases"][0]["chat"] = json!({"messages": [{}]});
    let read = Manifest::parse(sparse.to_string().as_bytes()).unwrap();
    assert!(read.requires.is_empty() && read.tolerances.is_empty() && read.tensors.is_empty());
    assert!(read.cases[0].chat.as_ref().unwrap().add_generation_prompt);
    assert!(read.model.license.is_none());
}
