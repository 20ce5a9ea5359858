//! Whether a JSON Schema has a value that ends: one that must contain itself has none, though each of its parts is fine.

use std::collections::BTreeSet;

use serde_json::Value;

/// Schemas that are looked at, at most: references can be made to need each other in the worst order.
const MOST_LOOKS: usize = 1_000_000;

/// Whether some value may be finite; `None` if that takes too long to tell. Wrong only to the schema's favour; its depth
/// has been checked.
pub(crate) fn may_end(root: &Value) -> Option<bool> {
    let mut open = BTreeSet::new();
    references(root, &mut open);
    // References to what is known to end: the least such set, so that a circle alone is no reason.
    let mut known = Known { ending: BTreeSet::new(), looks: MOST_LOOKS };
    loop {
        let before = known.ending.len();
        // The last first: definitions tend to refer to later ones.
        for target in open.iter().rev().filter(|target| !known.ending.contains(*target)).copied().collect::<Vec<_>>() {
            if target_of(root, target).is_none_or(|schema| known.ends(schema)) {
                known.ending.insert(target);
            }
        }
        if known.looks == 0 {
            return None;
        }
        if known.ending.len() == before {
            return Some(known.ends(root));
        }
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

struct Known<'a> {
    ending: BTreeSet<&'a str>,
    looks: usize,
}

impl Known<'_> {
    /// Whether a schema ends, as far as is known. Once there are no looks left nothing is.
    fn ends(&mut self, schema: &Value) -> bool {
        self.looks = self.looks.saturating_sub(1);
        if self.looks == 0 {
            return false;
        }
        let Value::Object(object) = schema else { return true };
        let list = |name: &str| object.get(name).and_then(Value::as_array);
        let own = match object.get("type").and_then(Value::as_str) {
            Some("object") => {
                let required = list("required").into_iter().flatten().filter_map(Value::as_str);
                let properties = object.get("properties");
                required.filter_map(|name| properties?.get(name)).all(|schema| self.ends(schema))
            }
            Some("array") => {
                let least = object.get("minItems").and_then(Value::as_u64).unwrap_or(0) as usize;
                let first = list("prefixItems").map_or(&[][..], Vec::as_slice);
                let more = object.get("items").filter(|_| least > first.len());
                first.iter().take(least).chain(more).all(|schema| self.ends(schema))
            }
            _ => true,
        };
        let refers = object.get("$ref").and_then(Value::as_str).is_none_or(|target| self.ending.contains(target));
        let every = list("allOf").into_iter().flatten().all(|schema| self.ends(schema));
        let mut some = |name| list(name).is_none_or(|all| all.is_empty() || all.iter().any(|one| self.ends(one)));
        refers && own && every && some("anyOf") && some("oneOf")
    }
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
            assert_eq!(may_end(&schema), Some(true), "{schema}");
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
            assert_eq!(may_end(&schema), Some(false), "{schema}");
        }
    }

    #[test]
    fn long_chains_of_references_are_followed_or_given_up_but_never_for_long() {
        let chain = |name: &dyn Fn(usize) -> String, length: usize| {
            let link = |i: usize| match i + 1 < length {
                true => json!({ "$ref": format!("#/$defs/{}", name(i + 1)) }),
                false => json!({ "type": "null" }),
            };
            let defs: serde_json::Map<_, _> = (0..length).map(|i| (name(i), link(i))).collect();
            json!({ "$ref": format!("#/$defs/{}", name(0)), "$defs": defs })
        };
        assert_eq!(may_end(&chain(&|i| format!("d{i:04}"), 1900)), Some(true));
        let backwards = |i: usize| format!("d{:04}", 1900 - i);
        assert_eq!(may_end(&chain(&backwards, 1000)), Some(true));
        assert_eq!(may_end(&chain(&backwards, 1900)), None);
    }
}
