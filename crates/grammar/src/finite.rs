//! Whether a JSON Schema has a value that ends: one that must contain itself has none, though each of its parts is fine.

use std::collections::BTreeSet;

use serde_json::Value;

/// Whether some value may be finite. Wrong only to the schema's favour; its depth has been checked.
pub(crate) fn may_end(root: &Value) -> bool {
    let mut open = BTreeSet::new();
    references(root, &mut open);
    // References to what is known to end: the least such set, so that a circle alone is no reason.
    let mut ending = BTreeSet::new();
    loop {
        let known = |target: &&str| target_of(root, target).is_none_or(|schema| ends(schema, &ending));
        let found: Vec<&str> = open.iter().copied().filter(known).collect();
        if found.is_empty() {
            return ends(root, &ending);
        }
        found.iter().for_each(|target| _ = open.remove(target));
        ending.extend(found);
    }
}

/// All targets of `$ref`s.
fn references<'a>(value: &'a Value, found: &mut BTreeSet<&'a str>) {
    match value {
        Value::Object(object) => {
            found.extend(object.get("$ref").and_then(Value::as_str));
            object.values().for_each(|value| references(value, found));
        }
        Value::Array(values) => values.iter().for_each(|value| references(value, found)),
        _ => {}
    }
}

/// `None` for what is not found so simply.
fn target_of<'a>(root: &'a Value, target: &str) -> Option<&'a Value> {
    root.pointer(target.strip_prefix('#')?)
}

fn ends(schema: &Value, ending: &BTreeSet<&str>) -> bool {
    let Value::Object(object) = schema else { return true };
    let list = |name: &str| object.get(name).and_then(Value::as_array);
    let refers = object.get("$ref").and_then(Value::as_str).is_none_or(|target| ending.contains(target));
    let every = |name| list(name).into_iter().flatten().all(|schema| ends(schema, ending));
    let some = |name| list(name).is_none_or(|schemas| schemas.is_empty() || schemas.iter().any(|s| ends(s, ending)));
    let own = match object.get("type").and_then(Value::as_str) {
        Some("object") => {
            let required = list("required").into_iter().flatten().filter_map(Value::as_str);
            let properties = object.get("properties");
            required.filter_map(|name| properties?.get(name)).all(|schema| ends(schema, ending))
        }
        Some("array") => {
            let least = object.get("minItems").and_then(Value::as_u64).unwrap_or(0) as usize;
            let first = list("prefixItems").map_or(&[][..], Vec::as_slice);
            let more = object.get("items").filter(|_| least > first.len());
            first.iter().take(least).chain(more).all(|schema| ends(schema, ending))
        }
        _ => true,
    };
    refers && own && every("allOf") && some("anyOf") && some("oneOf")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_must_contain_itself_never_ends() {
        let within = |schema: Value| json!({ "type": "object", "required": ["a"], "properties": { "a": schema } });
        let end = json!({ "type": "null" });
        let good = [
            json!({}),
            json!(true),
            within(end.clone()),
            within(json!({ "anyOf": [{ "$ref": "#" }, end] })),
            json!({ "type": "object", "properties": { "a": { "$ref": "#" } } }),
            json!({ "type": "array", "items": { "$ref": "#" } }),
            json!({ "type": ["object", "null"], "required": ["a"], "properties": { "a": { "$ref": "#" } } }),
            json!({ "$ref": "#/$defs/a", "$defs": { "a": { "$ref": "#/$defs/b" }, "b": end } }),
            json!({ "$ref": "#anchor" }),
        ];
        for schema in good {
            assert!(may_end(&schema), "{schema}");
        }
        let bad = [
            within(json!({ "$ref": "#" })),
            json!({ "$ref": "#" }),
            json!({ "type": "array", "items": { "$ref": "#" }, "minItems": 1 }),
            json!({ "type": "array", "prefixItems": [end, { "$ref": "#" }], "minItems": 2 }),
            json!({ "$ref": "#/$defs/a", "$defs": {
                "a": within(json!({ "$ref": "#/$defs/b" })), "b": { "anyOf": [{ "$ref": "#/$defs/a" }, { "$ref": "#" }] } } }),
        ];
        for schema in bad {
            assert!(!may_end(&schema), "{schema}");
        }
    }
}
