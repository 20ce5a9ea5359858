//! Writes what is asked for as grammars of llguidance.
//!
//! Everything of the client's goes in as a quoted string, a quoted regular expression or JSON, or is a grammar of its own
//! between `%lark {` and `}`, whose brackets have been counted.

use std::fmt::Write;

use llguidance::api::TopLevelGrammar;
use llguidance::regex_to_lark;
use serde_json::Value;

use crate::spec::{Literal, Spec, Structure, Tool, ToolChoice, ToolFrame};
use crate::{GrammarError, Limits, gbnf, regex, schema};

/// Any text.
const ANY_TEXT: &str = r"/(.|\n)*/";

/// The grammar of a specification; [`Spec::Any`] has none.
pub(crate) fn grammar(spec: &Spec, limits: &Limits) -> Result<Option<TopLevelGrammar>, GrammarError> {
    Ok(Some(match spec {
        Spec::Any => return Ok(None),
        Spec::JsonObject => TopLevelGrammar::from_json_schema(schema::any_object()),
        Spec::JsonSchema(schema) => TopLevelGrammar::from_json_schema(schema::prepared(schema, limits)?),
        spec => TopLevelGrammar::from_lark(lark(spec, limits)?),
    }))
}

/// As a Lark grammar with the rule `start`.
fn lark(spec: &Spec, limits: &Limits) -> Result<String, GrammarError> {
    match spec {
        Spec::Any => Ok(format!("start: {ANY_TEXT}\n")),
        Spec::JsonObject => Ok(format!("start: {}\n", json(&schema::any_object()))),
        Spec::JsonSchema(schema) => Ok(format!("start: {}\n", json(&schema::prepared(schema, limits)?))),
        Spec::Regex(pattern) => Ok(format!("start: /{}/\n", expression(pattern, limits)?)),
        Spec::Choice(choices) => choice(choices, limits),
        Spec::Grammar(text) => own(text, limits),
        Spec::StructuralTag { structures, triggers } => structural(structures, triggers, limits),
        Spec::Tools { frame, tools, choice, parallel } => calls(frame, tools, choice, *parallel, limits),
    }
}

/// A regular expression between the slashes of a Lark grammar. It always matches all of the output, so anchors at its ends
/// say nothing.
fn expression(pattern: &str, limits: &Limits) -> Result<String, GrammarError> {
    regex::check(pattern, limits)?;
    let pattern = pattern.strip_prefix('^').unwrap_or(pattern);
    let escaped =
        pattern.strip_suffix('$').is_some_and(|rest| rest.bytes().rev().take_while(|&b| b == b'\\').count() % 2 == 1);
    let pattern = pattern.strip_suffix('$').filter(|_| !escaped).unwrap_or(pattern);
    if pattern.is_empty() {
        return Err(GrammarError::Invalid("a regular expression must match some text".into()));
    }
    Ok(regex_to_lark(pattern, ""))
}

fn choice(choices: &[String], limits: &Limits) -> Result<String, GrammarError> {
    if choices.is_empty() || choices.len() > limits.values || choices.iter().any(String::is_empty) {
        let accepted = format!("choices must be 1 to {} texts of at least one byte", limits.values);
        return Err(GrammarError::Invalid(accepted));
    }
    let bytes: usize = choices.iter().map(String::len).sum();
    if bytes > limits.spec_bytes {
        return Err(GrammarError::TooLarge(format!("choices may have {} bytes together", limits.spec_bytes)));
    }
    let choices: Vec<String> = choices.iter().map(|choice| quoted(choice)).collect();
    Ok(format!("start: CHOICE\nCHOICE: {}\n", choices.join(" | ")))
}

/// The client's own grammar.
fn own(text: &str, limits: &Limits) -> Result<String, GrammarError> {
    if text.len() > limits.spec_bytes {
        return Err(GrammarError::TooLarge(format!("a grammar may have at most {} bytes", limits.spec_bytes)));
    }
    let mut depth = 0usize;
    for c in text.chars() {
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        // Brackets in texts are counted as well: whoever needs more of them open at once can write them in parts.
        if depth > limits.depth {
            return Err(GrammarError::TooLarge(format!("groups of a grammar may be nested {} deep", limits.depth)));
        }
    }
    if text.lines().filter(|line| line.contains(':')).count() > limits.schemas {
        return Err(GrammarError::TooLarge(format!("a grammar may have at most {} rules", limits.schemas)));
    }
    if gbnf::is_gbnf(text) { gbnf::to_lark(text) } else { Ok(text.to_owned()) }
}

fn structural(structures: &[Structure], triggers: &[String], limits: &Limits) -> Result<String, GrammarError> {
    if structures.is_empty() || structures.len() > limits.tools || triggers.is_empty() || triggers.len() > limits.tools
    {
        let accepted = format!("structural tags need 1 to {} structures and triggers", limits.tools);
        return Err(GrammarError::Invalid(accepted));
    }
    let mut text = String::from("start: (");
    let names: Vec<_> = (0..structures.len()).map(|i| format!("tag_{i}")).collect();
    writeln!(text, "{})* TEXT\nTEXT: {ANY_TEXT}", names.join(" | ")).expect("a String takes all");
    for (i, structure) in structures.iter().enumerate() {
        let found = triggers.iter().enumerate().find(|(_, t)| !t.is_empty() && structure.begin.starts_with(t.as_str()));
        let Some((at, trigger)) = found else {
            return Err(GrammarError::Invalid("begin of a structure must start with one of the triggers".into()));
        };
        let rest = &structure.begin[trigger.len()..];
        let schema = json(&schema::prepared(&structure.schema, limits)?);
        writeln!(text, "tag_{i}: trigger_{at} {} {schema} {}", quoted(rest), quoted(&structure.end))
            .expect("a String takes all");
    }
    for (at, trigger) in triggers.iter().enumerate() {
        if text.contains(&format!(": trigger_{at} ")) {
            writeln!(text, "trigger_{at}[lazy]: {ANY_TEXT} {}", quoted(trigger)).expect("a String takes all");
        }
    }
    Ok(text)
}

fn calls(
    frame: &ToolFrame,
    tools: &[Tool],
    choice: &ToolChoice,
    parallel: bool,
    limits: &Limits,
) -> Result<String, GrammarError> {
    if tools.is_empty() || tools.len() > limits.tools {
        return Err(GrammarError::Invalid(format!("1 to {} tools can be called", limits.tools)));
    }
    let named = |tool: &Tool| !matches!(choice, ToolChoice::Named(name) if *name != tool.name);
    let callable: Vec<(usize, &Tool)> = tools.iter().enumerate().filter(|(_, tool)| named(tool)).collect();
    if callable.is_empty() {
        return Err(GrammarError::Invalid("the tool that is to be called must be one of the tools".into()));
    }

    let mut text = String::new();
    let mut line = |rule: String| text.extend([rule.as_str(), "\n"]);
    let opening: Vec<Literal> = frame.begin.iter().chain(&frame.before_name).cloned().collect();
    let more = match parallel && !matches!(choice, ToolChoice::Named(_)) {
        true => format!("({} {} call)*", literals(&frame.between), literals(&frame.before_name)),
        false => String::new(),
    };
    let rest = format!("call {more} {}", literals(&frame.end));
    match choice {
        ToolChoice::Required | ToolChoice::Named(_) => line(format!("start: {} {rest}", literals(&opening))),
        ToolChoice::Auto { otherwise: Some(spec) } => {
            line(format!("start: otherwise | {} {rest}", literals(&opening)));
            line(format!("otherwise: %lark {{\n{}\n}}", lark(spec, limits)?));
        }
        ToolChoice::Auto { otherwise: None } => match opening.split_first() {
            Some((Literal::Text(trigger), opening)) => {
                line(format!("start: TEXT | trigger {} {rest}", literals(opening)));
                line(format!("TEXT: {ANY_TEXT}"));
                line(format!("trigger[lazy]: {ANY_TEXT} {}", quoted(trigger)));
            }
            Some((Literal::Token(_), _)) => {
                line(format!("start: TEXT | SOME_TEXT? {} {rest}", literals(&opening)));
                line(format!("TEXT: {ANY_TEXT}"));
                line(r"SOME_TEXT: /(.|\n)+/".to_owned());
            }
            None => {
                let needed = "calls must begin with something that tells them from text";
                return Err(GrammarError::Invalid(needed.into()));
            }
        },
    }
    let names: Vec<_> = callable.iter().map(|(index, _)| format!("call_{index}")).collect();
    line(format!("call: {}", names.join(" | ")));
    for (index, tool) in callable {
        let schema = match tool.strict {
            true => {
                let refused = |reason| GrammarError::Tool { index, reason: Box::new(reason) };
                schema::prepared(&tool.parameters, limits).map_err(refused)?
            }
            false => schema::any_object(),
        };
        line(format!(
            "call_{index}: {} {} {} {}",
            quoted(&tool.name),
            literals(&frame.before_arguments),
            json(&schema),
            literals(&frame.after_arguments),
        ));
    }
    Ok(text)
}

fn literals(literals: &[Literal]) -> String {
    let one = |literal: &Literal| match literal {
        Literal::Text(text) => quoted(text),
        Literal::Token(id) => format!("<[{id}]>"),
    };
    literals.iter().map(one).collect::<Vec<_>>().join(" ")
}

fn json(schema: &Value) -> String {
    format!("%json {schema}")
}

/// A text as Lark writes it: JSON's escapes, and no control character as it is.
pub(crate) fn quoted(text: &str) -> String {
    Value::from(text).to_string().replace('\u{7f}', "\\u007f")
}
