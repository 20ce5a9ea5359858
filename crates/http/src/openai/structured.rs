//! What the form of an answer is asked for with: `response_format`, `structured_outputs`, and llama-server's `grammar` and
//! `json_schema`.

use baton_grammar::{Spec, Structure};
use serde_json::Value;

use crate::error::ApiError;
use crate::fields::Fields;
use crate::json;

/// Longest name of a schema, in bytes.
const MAX_NAME_BYTES: usize = 64;

/// The form that an answer must have.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Structured {
    pub spec: Spec,
    /// The field that asks for it.
    pub field: String,
}

impl Structured {
    /// Reads all fields that ask for a form; at most one of them may. `budget`: JSON values that may still be read, for
    /// documents inside strings.
    pub fn read(fields: &mut Fields, budget: &mut usize) -> Result<Option<Self>, ApiError> {
        let format = fields.object("response_format")?.map(response_format).transpose()?.flatten();
        let outputs =
            fields.object("structured_outputs")?.map(|outputs| structured_outputs(outputs, budget)).transpose()?;
        let grammar = fields.string("grammar")?.map(|text| Self { spec: Spec::Grammar(text), field: "grammar".into() });
        let schema = fields.take("json_schema");
        let schema = schema.map(|schema| Self { spec: Spec::JsonSchema(schema), field: "json_schema".into() });
        let mut asked = [format, outputs, grammar, schema].into_iter().flatten();
        match (asked.next(), asked.next()) {
            (_, Some(second)) => {
                let message = "the form of the answer must be asked for in one way only: response_format, \
                               structured_outputs, grammar or json_schema";
                Err(ApiError::invalid(&second.field, message))
            }
            (asked, None) => Ok(asked),
        }
    }
}

/// OpenAI's. `schema` beside `json_object` is llama-server's, the triggers are vLLM's.
fn response_format(mut format: Fields) -> Result<Option<Structured>, ApiError> {
    let kind = format.string("type")?;
    let kind = format.required("type", kind)?;
    let (spec, field) = match kind.as_str() {
        "text" => (None, String::new()),
        "json_object" => match format.take("schema") {
            None => (Some(Spec::JsonObject), format.path("type")),
            Some(schema) => (Some(Spec::JsonSchema(schema)), format.path("schema")),
        },
        "json_schema" => {
            let schema = format.object("json_schema")?;
            let (schema, field) = named_schema(format.required("json_schema", schema)?)?;
            (Some(Spec::JsonSchema(schema)), field)
        }
        "structural_tag" => (Some(structural_tag(&mut format)?), format.path("structures")),
        _ => {
            let accepted = "text, json_object, json_schema or structural_tag";
            return Err(ApiError::out_of_range(&format.path("type"), accepted));
        }
    };
    format.finish()?;
    Ok(spec.map(|spec| Structured { spec, field }))
}

/// The schema of `response_format.json_schema`, and its path. It is always kept to, `strict` or not.
fn named_schema(mut named: Fields) -> Result<(Value, String), ApiError> {
    let name = named.string("name")?;
    let name = named.required("name", name)?;
    let is_plain = |name: &str| name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
    if name.is_empty() || name.len() > MAX_NAME_BYTES || !is_plain(&name) {
        let accepted = format!("1 to {MAX_NAME_BYTES} letters, digits, hyphens and underscores");
        return Err(ApiError::out_of_range(&named.path("name"), accepted));
    }
    named.string("description")?;
    named.bool("strict")?;
    let schema = named.take("schema");
    let schema = named.required("schema", schema)?;
    let field = named.path("schema");
    named.finish()?;
    Ok((schema, field))
}

/// vLLM's.
fn structured_outputs(mut outputs: Fields, budget: &mut usize) -> Result<Structured, ApiError> {
    let mut asked = Vec::new();
    if let Some(schema) = outputs.take("json") {
        asked.push((Spec::JsonSchema(parsed(schema, &outputs.path("json"), budget)?), "json"));
    }
    if let Some(pattern) = outputs.string("regex")? {
        asked.push((Spec::Regex(pattern), "regex"));
    }
    if let Some(choices) = outputs.array("choice")? {
        let text = |choice: Value| match choice {
            Value::String(text) => Ok(text),
            _ => Err(ApiError::wrong_type(&outputs.path("choice"), "an array of strings")),
        };
        asked.push((Spec::Choice(choices.into_iter().map(text).collect::<Result<_, _>>()?), "choice"));
    }
    if let Some(grammar) = outputs.string("grammar")? {
        asked.push((Spec::Grammar(grammar), "grammar"));
    }
    if let Some(tag) = outputs.take("structural_tag") {
        let path = outputs.path("structural_tag");
        let mut tag = Fields::of(path.clone(), parsed(tag, &path, budget)?)?;
        let kind = tag.string("type")?;
        if kind.is_some_and(|kind| kind != "structural_tag") {
            return Err(ApiError::out_of_range(&tag.path("type"), "structural_tag"));
        }
        asked.push((structural_tag(&mut tag)?, "structural_tag"));
        tag.finish()?;
    }
    if outputs.bool("json_object")? == Some(true) {
        asked.push((Spec::JsonObject, "json_object"));
    }
    // JSON is always written without line breaks and indentation, and there is one way to compile.
    outputs.bool("disable_any_whitespace")?;
    outputs.bool("disable_fallback")?;
    let path = outputs.path("").trim_end_matches('.').to_owned();
    let one = asked.len() == 1;
    let asked = asked.pop().map(|(spec, name)| Structured { spec, field: outputs.path(name) });
    outputs.finish()?;
    match asked {
        Some(asked) if one => Ok(asked),
        _ => {
            let accepted = "an object with exactly one of json, regex, choice, grammar, structural_tag and json_object";
            Err(ApiError::out_of_range(&path, accepted))
        }
    }
}

/// vLLM takes some values also as JSON in a string.
fn parsed(value: Value, path: &str, budget: &mut usize) -> Result<Value, ApiError> {
    let Value::String(text) = value else { return Ok(value) };
    let refused = |_| ApiError::invalid(path, "a string here must be a JSON object as text");
    json::parse_object(text.as_bytes(), budget).map(Value::Object).map_err(refused)
}

/// `structures` and `triggers`.
fn structural_tag(tag: &mut Fields) -> Result<Spec, ApiError> {
    let structures = tag.array("structures")?;
    let structures = tag.required("structures", structures)?;
    let path = tag.path("structures");
    let structure = |(i, value): (usize, Value)| {
        let mut structure = Fields::of(format!("{path}[{i}]"), value)?;
        let begin = structure.string("begin")?;
        let begin = structure.required("begin", begin)?;
        let schema = structure.take("schema");
        let schema = structure.required("schema", schema)?;
        let end = structure.string("end")?;
        let end = structure.required("end", end)?;
        structure.finish()?;
        Ok(Structure { begin, schema, end })
    };
    let structures = structures.into_iter().enumerate().map(structure).collect::<Result<_, ApiError>>()?;
    let triggers = tag.array("triggers")?;
    let triggers = tag.required("triggers", triggers)?.into_iter().map(|trigger| match trigger {
        Value::String(text) => Ok(text),
        _ => Err(ApiError::wrong_type(&tag.path("triggers"), "an array of strings")),
    });
    let triggers = triggers.collect::<Result<_, _>>()?;
    Ok(Spec::StructuralTag { structures, triggers })
}
