//! What the tools of a chat mean for its outputs: how to find calls in them, and the grammar that demands them.
//!
//! A grammar is made where the request demands something: a call, one of a certain tool, or arguments by a strict schema.
//! Its frames are read by the splitters of `baton_text`; else the model is free, and what it writes is only read.

use std::sync::Arc;

use baton_grammar::{self as grammar, Grammar, Literal, Spec, Thinking, ToolFrame};
use baton_text::{TextModel, ToolSplitter, ToolSyntax};
use serde_json::json;

use crate::error::ApiError;
use crate::generate::grammar::{ALLOWED, compile};
use crate::generation::Generation;
use crate::openai::chat_request::ChatRequest;
use crate::openai::structured::Structured;
use crate::openai::tools::{Tool, ToolChoice, Tools};
use crate::service::Service;

/// How to find the calls of tools in an output.
#[derive(Clone)]
pub(crate) struct ToolCalls {
    syntax: ToolSyntax,
    /// The tools that may be called.
    names: Arc<[String]>,
    /// The output ends with its first call.
    single: bool,
}

impl ToolCalls {
    /// Of the tools of a request; `None` if none may be called.
    ///
    /// # Errors
    /// If the model cannot call tools.
    pub fn new(text: &TextModel, tools: &Tools) -> Result<Option<Self>, ApiError> {
        let names: Arc<[String]> = tools.callable().map(|tool| tool.name.clone()).collect();
        if names.is_empty() {
            return Ok(None);
        }
        let syntax = text.tool_syntax().map_err(|error| ApiError::invalid("tools", error.to_string()))?;
        Ok(Some(Self { syntax, names, single: tools.single() }))
    }

    /// A splitter for one output.
    pub fn splitter(&self) -> ToolSplitter {
        ToolSplitter::new(self.syntax, self.names.clone(), self.single)
    }

    /// The grammar of a chat's outputs; `None` if they may be anything.
    ///
    /// Of calls that are demanded all arguments are as the schemas say, but a schema that is not strict promises nothing:
    /// where one cannot be compiled, they are any objects.
    pub async fn grammar(
        &self,
        service: &Service,
        generation: &Arc<Generation>,
        request: &ChatRequest,
        thinking: Option<Thinking>,
    ) -> Result<Option<Arc<dyn Grammar>>, ApiError> {
        let (text, tools) = (&generation.text, &request.tools);
        let compile = |all_schemas, thinking| {
            let form = self.form(text, tools, request.structured.clone(), all_schemas);
            compile(service, generation, &request.params, form, thinking)
        };
        let demanded = matches!(tools.choice(), ToolChoice::Required | ToolChoice::Named(_));
        if demanded && !tools.callable().all(|tool| tool.strict) {
            let best = compile(true, thinking.clone()).await;
            if best.is_ok() {
                return best;
            }
        }
        compile(false, thinking).await
    }

    /// The form of the outputs, if they must have one. `otherwise`: the form of an answer without a call.
    fn form(
        &self,
        text: &TextModel,
        tools: &Tools,
        otherwise: Option<Structured>,
        all_schemas: bool,
    ) -> Option<Structured> {
        let own_field = if tools.are_all_allowed() { "tools" } else { ALLOWED };
        let (otherwise, field) = match otherwise {
            Some(Structured { spec, field }) => (Some(Box::new(spec)), field),
            None => (None, own_field.into()),
        };
        let choice = match tools.choice() {
            ToolChoice::Required => grammar::ToolChoice::Required,
            ToolChoice::Named(name) => grammar::ToolChoice::Named(name.clone()),
            ToolChoice::Auto | ToolChoice::None if otherwise.is_none() && !tools.callable().any(|tool| tool.strict) => {
                return None;
            }
            ToolChoice::Auto | ToolChoice::None => grammar::ToolChoice::Auto { otherwise },
        };
        let any = || json!({"type": "object"});
        let tool = |tool: &Tool| grammar::Tool {
            name: tool.name.clone(),
            parameters: tool.parameters.clone().map_or_else(any, Into::into),
            strict: tool.strict || all_schemas,
        };
        // Grammars know a token that stands for itself by its id only.
        let known = |marker: &str| {
            let id = text.token_id(marker)?;
            Some(if text.is_control(id) { Literal::Token(id) } else { Literal::Text(marker.to_owned()) })
        };
        let spec = Spec::Tools {
            frame: frame(self.syntax, known),
            tools: tools.allowed().map(tool).collect(),
            choice,
            parallel: !self.single,
        };
        Some(Structured { spec, field })
    }
}

/// How a syntax writes calls. `known`: a marker that the vocabulary has as a token.
fn frame(syntax: ToolSyntax, known: impl Fn(&str) -> Option<Literal>) -> ToolFrame {
    let text = |text: &str| Literal::Text(text.to_owned());
    let marker = |marker: &str| known(marker).unwrap_or_else(|| text(marker));
    let if_known = |marker: &str| known(marker).into_iter().collect();
    match syntax {
        ToolSyntax::DeepseekV3 => ToolFrame {
            begin: if_known("<｜tool▁calls▁begin｜>"),
            before_name: vec![marker("<｜tool▁call▁begin｜>"), text("function"), marker("<｜tool▁sep｜>")],
            before_arguments: vec![text("\n```json\n")],
            after_arguments: vec![text("\n```"), marker("<｜tool▁call▁end｜>")],
            between: vec![text("\n")],
            end: if_known("<｜tool▁calls▁end｜>"),
        },
        ToolSyntax::DeepseekV31 => ToolFrame {
            begin: if_known("<｜tool▁calls▁begin｜>"),
            before_name: vec![marker("<｜tool▁call▁begin｜>")],
            before_arguments: vec![marker("<｜tool▁sep｜>")],
            after_arguments: vec![marker("<｜tool▁call▁end｜>")],
            between: Vec::new(),
            end: if_known("<｜tool▁calls▁end｜>"),
        },
        ToolSyntax::Hermes => ToolFrame {
            before_name: vec![marker("<tool_call>"), text("\n{\"name\": \"")],
            before_arguments: vec![text("\", \"arguments\": ")],
            after_arguments: vec![text("}\n"), marker("</tool_call>")],
            between: vec![text("\n")],
            ..ToolFrame::default()
        },
        ToolSyntax::Llama3Json => ToolFrame {
            before_name: vec![text("{\"name\": \"")],
            before_arguments: vec![text("\", \"parameters\": ")],
            after_arguments: vec![text("}")],
            between: vec![text("; ")],
            ..ToolFrame::default()
        },
        // The newer form has a marker behind the name.
        ToolSyntax::Mistral => match known("[ARGS]") {
            Some(arguments) => ToolFrame {
                before_name: vec![marker("[TOOL_CALLS]")],
                before_arguments: vec![arguments],
                ..ToolFrame::default()
            },
            None => ToolFrame {
                begin: vec![marker("[TOOL_CALLS]"), text("[")],
                before_name: vec![text("{\"name\": \"")],
                before_arguments: vec![text("\", \"arguments\": ")],
                after_arguments: vec![text("}")],
                between: vec![text(", ")],
                end: vec![text("]")],
            },
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_text::Segment;

    /// Calls in a frame, as text.
    fn written(frame: &ToolFrame, calls: &[(&str, &str)]) -> String {
        let texts = |literals: &[Literal]| -> String {
            let text = |literal: &Literal| match literal {
                Literal::Text(text) => text.clone(),
                Literal::Token(_) => panic!("no vocabulary here has special tokens"),
            };
            literals.iter().map(text).collect()
        };
        let call = |(name, arguments): &(&str, &str)| {
            let (before, between) = (texts(&frame.before_name), texts(&frame.before_arguments));
            format!("{before}{name}{between}{arguments}{}", texts(&frame.after_arguments))
        };
        let calls: Vec<String> = calls.iter().map(call).collect();
        texts(&frame.begin) + &calls.join(&texts(&frame.between)) + &texts(&frame.end)
    }

    #[test]
    fn calls_in_every_frame_are_found_by_the_splitter() {
        let calls = [("add", r#"{"a": 1}"#), ("no-op", "{}"), ("add", r#"{"s": "}"}"#)];
        for syntax in ToolSyntax::ALL {
            for has_markers in [false, true] {
                let known = |marker: &str| has_markers.then(|| Literal::Text(marker.to_owned()));
                let text = written(&frame(syntax, known), &calls);
                let names = ["add".to_owned(), "no-op".to_owned()].into();
                let mut splitter = ToolSplitter::new(syntax, names, false);
                let mut found = splitter.push(&text);
                found.extend(splitter.flush());
                let expected = calls.iter().enumerate().flat_map(|(index, (name, arguments))| {
                    let text = (*arguments).to_owned();
                    [Segment::Call { index, name: (*name).to_owned() }, Segment::Arguments { index, text }]
                });
                assert_eq!(found, expected.collect::<Vec<_>>(), "{text}");
            }
        }
    }

    #[test]
    fn what_tells_a_call_from_text_stands_alone() {
        for syntax in [ToolSyntax::DeepseekV3, ToolSyntax::DeepseekV31, ToolSyntax::Hermes, ToolSyntax::Mistral] {
            let frame = frame(syntax, |marker| marker.starts_with('<').then(|| Literal::Text(marker.to_owned())));
            let first = frame.begin.first().or(frame.before_name.first()).expect("something begins a call");
            let Literal::Text(first) = first else { panic!("no special tokens here") };
            assert!(["<｜", "<tool", "[TOOL_CALLS]"].iter().any(|marker| first.starts_with(marker)), "{first}");
            assert!(first.ends_with(['>', ']']), "{first}");
        }
    }
}
