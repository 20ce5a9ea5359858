//! Outputs drawn from generated schemas are JSON, and the `jsonschema` crate, which shares no code with the compiler's,
//! accepts them.

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};

use baton_grammar::Spec;
use common::{Random, begin, draw, text};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Map, Value, json};

const SCHEMAS: u32 = 1000;
/// Longest output, in tokens.
const MOST: usize = 600;

fn scalar() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(json!({ "type": "null" })),
        Just(json!({ "type": "boolean" })),
        Just(json!({ "type": "string" })),
        Just(json!({ "type": ["string", "integer", "null"] })),
        (-200i64..200, 0i64..300)
            .prop_map(|(low, span)| json!({ "type": "integer", "minimum": low, "maximum": low + span })),
        (-50i64..50).prop_map(|low| json!({ "type": "integer", "exclusiveMinimum": low })),
        (1i64..12).prop_map(|step| json!({ "type": "integer", "multipleOf": step, "minimum": -5000, "maximum": 5000 })),
        (-90i32..90, 0i32..90).prop_map(|(low, span)| {
            json!({ "type": "number", "minimum": f64::from(low) / 4.0, "maximum": f64::from(low + span) / 4.0 })
        }),
        (0u64..5, 0u64..8)
            .prop_map(|(low, span)| json!({ "type": "string", "minLength": low, "maxLength": low + span })),
        prop::sample::select(vec!["^[a-z]{1,5}$", "^(\\d{2}-)+x$", "a+b", "^[^\"\\\\]*$", "^$|^é.$", "[\\w.]+@[a-z]+"])
            .prop_map(|pattern| json!({ "type": "string", "pattern": pattern })),
        prop::sample::select(vec!["date", "uuid", "ipv4"])
            .prop_map(|format| json!({ "type": "string", "format": format })),
        prop::collection::vec(constant(), 1..5).prop_map(|values| json!({ "enum": values })),
        constant().prop_map(|value| json!({ "const": value })),
    ]
}

fn constant() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-1000i64..1000).prop_map(Value::from),
        "[a-zé\"\\\\\n]{0,6}".prop_map(Value::from),
        Just(json!({ "a": [1, "b", {}] })),
    ]
}

/// Schemas that may point to `$defs/leaf`, and to `$defs/tree`, which contains itself.
fn schema() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        8 => scalar(),
        1 => Just(json!({ "$ref": "#/$defs/leaf" })),
        1 => Just(json!({ "$ref": "#/$defs/tree" })),
    ];
    leaf.prop_recursive(3, 20, 4, |inner| {
        prop_oneof![
            3 => object(inner.clone()),
            2 => (inner.clone(), 0u64..3, 0u64..3).prop_map(|(items, low, span)| {
                json!({ "type": "array", "items": items, "minItems": low, "maxItems": low + span })
            }),
            1 => inner.clone().prop_map(|items| json!({ "type": "array", "items": items })),
            1 => prop::collection::vec(inner.clone(), 1..4).prop_map(|items| {
                json!({ "type": "array", "minItems": items.len(), "prefixItems": items, "items": false })
            }),
            2 => prop::collection::vec(inner.clone(), 1..4).prop_map(|options| json!({ "anyOf": options })),
            1 => inner.prop_map(|values| {
                json!({ "type": "object", "additionalProperties": values })
            }),
        ]
    })
}

fn object(inner: impl Strategy<Value = Value> + Clone) -> impl Strategy<Value = Value> {
    let property = ("[a-z_é\" ]{1,6}", inner, any::<bool>());
    (prop::collection::vec(property, 0..5), any::<bool>()).prop_map(|(list, open)| {
        let required: Vec<_> =
            list.iter().filter(|(_, _, required)| *required).map(|(name, ..)| name.clone()).collect();
        let properties: Map<_, _> = list.into_iter().map(|(name, schema, _)| (name, schema)).collect();
        let required: Vec<_> = required.iter().collect::<std::collections::BTreeSet<_>>().into_iter().collect();
        json!({ "type": "object", "properties": properties, "required": required, "additionalProperties": open })
    })
}

fn document() -> impl Strategy<Value = Value> {
    (schema(), scalar()).prop_map(|(schema, leaf)| {
        let tree = json!({ "type": "object", "additionalProperties": false, "required": ["v"], "properties": {
            "v": { "$ref": "#/$defs/leaf" },
            "next": { "anyOf": [{ "type": "null" }, { "$ref": "#/$defs/tree" }] },
        }});
        let mut root = json!({ "allOf": [schema] });
        // At the root itself, but beside no other keyword that would restrict it.
        if let Value::Object(object) = &root["allOf"][0] {
            root = Value::Object(object.clone());
        }
        root["$defs"] = json!({ "leaf": leaf, "tree": tree });
        root
    })
}

#[test]
fn outputs_of_a_thousand_schemas_parse_and_validate() {
    let (complete, cut) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let config = Config { cases: SCHEMAS, max_shrink_iters: 200, failure_persistence: None, ..Config::default() };
    let judged = TestRunner::new(config).run(&(document(), any::<u64>()), |(schema, seed)| {
        let mut constraint = begin(&Spec::JsonSchema(schema.clone()), None);
        let Some(output) = draw(&mut *constraint, &mut Random(seed), MOST) else {
            cut.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        };
        complete.fetch_add(1, Ordering::Relaxed);
        let output = String::from_utf8(text(&output)).map_err(|_| TestCaseError::fail("not UTF-8"))?;
        // A grammar counts no years: in every one February has 29 days.
        let judged = output.replace("-02-29\"", "-02-28\"");
        let value: Value = match serde_json::from_str(&judged) {
            Ok(value) => value,
            // JSON bounds no number; this reader has bounds.
            Err(error) if error.to_string().contains("number out of range") => return Ok(()),
            Err(error) => return Err(TestCaseError::fail(format!("{error}: {output}"))),
        };
        let validator = jsonschema::options().should_validate_formats(true).build(&schema);
        let validator = validator.map_err(|error| TestCaseError::fail(error.to_string()))?;
        prop_assert!(validator.is_valid(&value), "{output} is not valid");
        Ok(())
    });
    judged.unwrap();
    let (complete, cut) = (complete.into_inner(), cut.into_inner());
    // Recursive schemas may go on; most outputs must not.
    assert!(complete > 9 * cut, "{complete} complete outputs, {cut} cut ones");
}

#[test]
fn what_a_pattern_excludes_is_excluded_in_its_escaped_form_too() {
    let cases = [
        (r#"^[^"\\]*$"#, vec![r#""a\"b""#, r#""a\\b""#], vec![r#""ab""#, r#""""#, r#""\n""#]),
        (r#"^[^"\n]*$"#, vec![r#""a\"b""#, r#""\n""#], vec![r#""a\\b""#, r#""\t""#]),
        (r#"^[^a\\]*$"#, vec![r#""b\\b""#, r#""a""#], vec![r#""b\"b""#]),
        (r#"^.$"#, vec![r#""\n""#], vec![r#""\"""#, r#""\\""#]),
        (r#"^\P{P}$"#, vec![r#""\"""#, r#""\\""#], vec![r#""a""#]),
    ];
    for (pattern, bad, good) in cases {
        let spec = Spec::JsonSchema(json!({ "type": "string", "pattern": pattern }));
        bad.iter().for_each(|text| assert!(!common::accepts(&spec, text), "{pattern} {text}"));
        good.iter().for_each(|text| assert!(common::accepts(&spec, text), "{pattern} {text}"));
    }
}
