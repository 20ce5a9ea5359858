//! Chat templates: Jinja as transformers runs it, within bounds.
//!
//! A template comes with the checkpoint and its input with a request; neither is trusted. It sees nothing but the
//! values given here, and its length, nesting, work, memory and output are limited, so that any template on any
//! input ends quickly in a text or a typed error.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use chrono::NaiveDateTime;
use chrono::format::{Item, StrftimeItems};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value};
use serde_json::Map;

use crate::json::tojson;
use crate::sandbox::{Overrun, Sandbox};
use crate::tools::History;
use crate::{TextError, pycompat};

/// Longest template source accepted. The longest in use have about 32 KiB.
pub const MAX_TEMPLATE_BYTES: usize = 128 << 10;

/// Longest prompt a template may render.
pub const MAX_RENDERED_BYTES: usize = 16 << 20;

/// Work and memory of one rendering: an instruction costs one, 64 bytes of data cost one. So strings and lists made
/// by a template stay below 64 MiB altogether.
const FUEL: u64 = 1 << 20;

/// Time of one rendering or compilation. Honest ones take milliseconds; this is for what fuel does not count.
const TIME: Duration = Duration::from_secs(10);

/// Nested calls and loops.
const MAX_RECURSION: usize = 100;

/// Longest part of a template's own message that is passed on.
const MAX_RAISED_CHARS: usize = 500;

/// Marks the end of the message to be continued, as transformers does; the space shows whether the template trims.
const CONTINUE_TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

const NAME: &str = "chat";

/// What a chat template is given.
#[derive(Debug, Clone, Default)]
pub struct ChatInput {
    /// Array of message objects, their shape already checked.
    pub messages: serde_json::Value,
    /// Array of tools; absent, null and empty all mean that there are none.
    pub tools: Option<serde_json::Value>,
    /// Write what opens the assistant's turn at the end.
    pub add_generation_prompt: bool,
    /// End the prompt inside the last message, to be continued by the model.
    pub continue_final_message: bool,
    /// Further template variables (`chat_template_kwargs`). They cannot replace the ones above or a special token.
    pub kwargs: Map<String, serde_json::Value>,
}

impl ChatInput {
    /// Whether there is at least one tool.
    pub(crate) fn has_tools(&self) -> bool {
        self.tools.as_ref().and_then(serde_json::Value::as_array).is_some_and(|tools| !tools.is_empty())
    }

    /// The text of the last message, or of its last part that has text.
    pub(crate) fn continued_text(&self) -> Option<&str> {
        match self.messages.as_array()?.last()?.get("content")? {
            serde_json::Value::String(text) => Some(text),
            serde_json::Value::Array(parts) => parts.iter().rev().find_map(|part| part.get("text")?.as_str()),
            _ => None,
        }
    }

    /// The same text, to be changed.
    fn continued_text_mut(messages: &mut serde_json::Value) -> Option<&mut String> {
        match messages.as_array_mut()?.last_mut()?.get_mut("content")? {
            serde_json::Value::String(text) => Some(text),
            serde_json::Value::Array(parts) => parts.iter_mut().rev().find_map(|part| match part.get_mut("text")? {
                serde_json::Value::String(text) => Some(text),
                _ => None,
            }),
            _ => None,
        }
    }
}

/// A compiled chat template.
pub(crate) struct ChatTemplate {
    env: Arc<Environment<'static>>,
    sandbox: Sandbox,
    special: Vec<(String, String)>,
    history: History,
}

impl ChatTemplate {
    /// Compiles a template. `special`: the special tokens that it sees by name.
    pub(crate) fn new(source: &str, special: Vec<(String, String)>) -> Result<Self, TextError> {
        if source.len() > MAX_TEMPLATE_BYTES {
            return Err(TextError::TemplateTooLarge { bytes: source.len(), max: MAX_TEMPLATE_BYTES });
        }
        let source_has_tools = source.contains("tool");
        let source = without_generation_blocks(source);
        let sandbox = Sandbox::default();
        let syntax = |e: &Error| TextError::TemplateSyntax {
            line: e.line().unwrap_or(0),
            reason: e.detail().unwrap_or("syntax error").to_owned(),
        };
        let compiled = sandbox.run(TIME, move || environment(source).map_err(|e| syntax(&e)));
        let env = Arc::new(compiled.map_err(|e| match e {
            Overrun::Panic => TextError::TemplateSyntax { line: 0, reason: "the parser failed".into() },
            other => overrun(other),
        })??);
        let template = Self { env, sandbox, special, history: History::default() };
        let history = match source_has_tools {
            true => History::probe(|chat, now| template.render(chat, now)),
            false => History::default(),
        };
        Ok(Self { history, ..template })
    }

    /// Whether it tells the model of a chat's tools.
    pub(crate) fn shows_tools(&self) -> bool {
        self.history.shows_tools
    }

    /// Renders a chat.
    pub(crate) fn render(&self, chat: &ChatInput, now: NaiveDateTime) -> Result<String, TextError> {
        if !chat.continue_final_message {
            return self.render_messages(chat, chat.messages.clone(), now);
        }
        if chat.add_generation_prompt {
            return Err(TextError::ContinueFinalMessage("cannot be combined with add_generation_prompt"));
        }
        let mut messages = chat.messages.clone();
        let text = ChatInput::continued_text_mut(&mut messages)
            .ok_or(TextError::ContinueFinalMessage("the last message has no text to continue"))?;
        text.push_str(CONTINUE_TAG);
        let mut prompt = self.render_messages(chat, messages, now)?;
        let at = prompt
            .rfind(CONTINUE_TAG.trim_end())
            .ok_or(TextError::ContinueFinalMessage("the chat template drops the last message"))?;
        let keeps_spaces = prompt[at..].starts_with(CONTINUE_TAG);
        prompt.truncate(at);
        if !keeps_spaces {
            prompt.truncate(prompt.trim_end().len());
        }
        Ok(prompt)
    }

    fn render_messages(
        &self,
        chat: &ChatInput,
        mut messages: serde_json::Value,
        now: NaiveDateTime,
    ) -> Result<String, TextError> {
        self.history.adapt(&mut messages);
        let tools = chat.tools.clone().filter(|_| chat.has_tools());
        let kwargs = chat.kwargs.iter().map(|(name, value)| (name.clone(), Value::from(Serde(value))));
        let special = self.special.iter().map(|(name, token)| (name.clone(), Value::from(token.as_str())));
        let own = [
            ("messages", Value::from(Serde(messages))),
            ("tools", Value::from(Serde(tools))),
            ("add_generation_prompt", Value::from(chat.add_generation_prompt)),
            ("raise_exception", Value::from_function(raise_exception)),
            ("strftime_now", Value::from_function(move |format: &str| strftime(now, format))),
        ];
        // Of two entries with one name the later counts.
        let own = own.into_iter().map(|(name, value)| (name.to_owned(), value));
        let context: BTreeMap<String, Value> = kwargs.chain(special).chain(own).collect();
        let env = self.env.clone();
        // All values made by the template are dropped before the job ends: dropping recurses too.
        let render = move || {
            let mut out = Capped(Vec::new());
            env.get_template(NAME)?.render_captured_to(context, &mut out)?;
            Ok(String::from_utf8_lossy(&out.0).into_owned())
        };
        self.sandbox.run(TIME, move || render().map_err(|e| render_error(&e))).map_err(overrun)?
    }
}

/// An environment in which a template sees only what is listed here, with the template compiled.
fn environment(source: String) -> Result<Environment<'static>, Error> {
    let mut env = Environment::new();
    env.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_unknown_method_callback(pycompat::method);
    env.set_fuel(Some(FUEL));
    env.set_recursion_limit(MAX_RECURSION);
    env.set_debug(false);
    env.add_filter("tojson", tojson);
    env.add_template_owned(NAME, source)?;
    Ok(env)
}

fn overrun(overrun: Overrun) -> TextError {
    match overrun {
        Overrun::Time => TextError::TemplateLimit("time"),
        Overrun::Thread => TextError::TemplateLimit("threads"),
        Overrun::Panic => TextError::TemplateFailed { line: 0, reason: "the template engine failed".into() },
    }
}

/// The source with `{% generation %}` blocks, which mark what to train on, turned into blocks that do nothing.
fn without_generation_blocks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out.push_str(before);
        rest = tag;
        let Some(end) = tag.find("%}") else { break };
        let inner = &tag[..end];
        let name = inner.trim_matches(|c: char| c.is_ascii_whitespace() || matches!(c, '-' | '+'));
        let replacement = match name {
            "generation" => "if true",
            "endgeneration" => "endif",
            _ => continue,
        };
        out.push_str(&inner.replace(name, replacement));
        rest = &tag[end..];
    }
    out + rest
}

/// The message of a template's `raise_exception`, carried as the source of a minijinja error.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(message: String) -> Result<Value, Error> {
    let message = message.chars().take(MAX_RAISED_CHARS).collect();
    Err(Error::new(ErrorKind::InvalidOperation, "raised by the template").with_source(Raised(message)))
}

fn strftime(now: NaiveDateTime, format: &str) -> Result<String, Error> {
    let items: Vec<Item> = StrftimeItems::new(format).collect();
    let mut text = String::new();
    // Formatting fails on a directive that is unknown or needs a time zone.
    let written = std::fmt::Write::write_fmt(&mut text, format_args!("{}", now.format_with_items(items.iter())));
    written.map_err(|_| Error::new(ErrorKind::InvalidOperation, "strftime_now: unsupported format"))?;
    Ok(text)
}

fn render_error(error: &Error) -> TextError {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(cause) = source {
        if let Some(Raised(message)) = cause.downcast_ref() {
            return TextError::TemplateRaised(message.clone());
        }
        match cause.downcast_ref::<Error>().map(Error::kind) {
            Some(ErrorKind::OutOfFuel) => return TextError::TemplateLimit("work and memory"),
            Some(ErrorKind::WriteFailure) => return TextError::TemplateLimit("output bytes"),
            _ => {}
        }
        source = cause.source();
    }
    // Details of other kinds may quote values, which are the user's.
    let quotes_names_only = matches!(
        error.kind(),
        ErrorKind::UnknownFilter | ErrorKind::UnknownTest | ErrorKind::UnknownFunction | ErrorKind::UnknownMethod
    );
    let reason = match error.detail() {
        Some(detail) if quotes_names_only => detail.to_owned(),
        _ => error.kind().to_string(),
    };
    TextError::TemplateFailed { line: error.line().unwrap_or(0), reason }
}

/// Output that fails when it outgrows [`MAX_RENDERED_BYTES`].
struct Capped(Vec<u8>);

impl io::Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > MAX_RENDERED_BYTES - self.0.len() {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
