//! Calls of tools in the text of an answer: the forms that models write them in, and what takes them out again.
//!
//! A [`ToolSyntax`] is how one family of models writes calls, by the name that vLLM gives its parser; a
//! [`ToolSplitter`] separates the calls of one output from its other text.

mod history;
mod json;
mod object;
mod splitter;
#[cfg(test)]
mod tests;

pub(crate) use history::History;
pub use splitter::ToolSplitter;

/// How a model writes calls of tools.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ToolSyntax {
    /// DeepSeek V3 and R1: marked by special tokens, with the arguments in a fenced block.
    DeepseekV3,
    /// DeepSeek V3.1: marked by special tokens.
    DeepseekV31,
    /// Nous Hermes, Qwen 2.5 and Qwen 3: objects between `<tool_call>` and `</tool_call>`.
    Hermes,
    /// Llama 3: objects, separated by semicolons, that are the whole answer or stand behind `<|python_tag|>`.
    Llama3Json,
    /// Mistral: behind `[TOOL_CALLS]` an array of objects, or a name and its arguments.
    Mistral,
}

/// The begin of one of DeepSeek's calls.
const DEEPSEEK_CALL: &str = "<｜tool▁call▁begin｜>";
/// Before the name (V3) or behind it (V3.1).
const DEEPSEEK_SEP: &str = "<｜tool▁sep｜>";
const PYTHON_TAG: &str = "<|python_tag|>";
const TOOL_CALLS: &str = "[TOOL_CALLS]";

impl ToolSyntax {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::DeepseekV3, Self::DeepseekV31, Self::Hermes, Self::Llama3Json, Self::Mistral];

    /// The name by which it is asked for.
    pub fn name(self) -> &'static str {
        match self {
            Self::DeepseekV3 => "deepseek_v3",
            Self::DeepseekV31 => "deepseek_v31",
            Self::Hermes => "hermes",
            Self::Llama3Json => "llama3_json",
            Self::Mistral => "mistral",
        }
    }

    /// The syntax that a chat template writes earlier calls in. `has_token`: whether the vocabulary has a token of this
    /// text.
    pub(crate) fn detect(template: &str, has_token: impl Fn(&str) -> bool) -> Option<Self> {
        let has = |text: &str| template.contains(text);
        // In a string of the template quotes may be escaped.
        let has_key = |key: &str| has(&format!("\"{key}\":")) || has(&format!("\\\"{key}\\\":"));
        let found = if has(DEEPSEEK_CALL) && has("```json") {
            Self::DeepseekV3
        } else if has(DEEPSEEK_CALL) {
            Self::DeepseekV31
        } else if has(TOOL_CALLS) {
            Self::Mistral
        } else if has("<tool_call>") && has_key("name") && has_key("arguments") && !has("<function=") {
            Self::Hermes
        } else if has_key("name") && has_key("parameters") && has("<|eot_id|>") {
            Self::Llama3Json
        } else {
            return None;
        };
        found.missing_token(has_token).is_none().then_some(found)
    }

    /// A token without which a model cannot write the syntax, and which the vocabulary does not have.
    pub(crate) fn missing_token(self, has_token: impl Fn(&str) -> bool) -> Option<&'static str> {
        let needed: &[&str] = match self {
            Self::DeepseekV3 | Self::DeepseekV31 => &[DEEPSEEK_CALL, DEEPSEEK_SEP],
            Self::Mistral => &[TOOL_CALLS],
            // Their markers may be spelled.
            Self::Hermes | Self::Llama3Json => &[],
        };
        needed.iter().copied().find(|token| !has_token(token))
    }

    /// Texts that the splitter looks for, which must reach it even if they are special tokens.
    pub(crate) fn markers(self) -> impl Iterator<Item = &'static str> {
        let within: &[&str] = match self {
            Self::DeepseekV3 | Self::DeepseekV31 => &[DEEPSEEK_SEP],
            Self::Mistral => &["[ARGS]", "[CALL_ID]"],
            Self::Hermes | Self::Llama3Json => &[],
        };
        let around = [self.begin()].into_iter().chain(self.opener()).chain(self.closers().iter().copied());
        around.chain(within.iter().copied())
    }

    /// What begins a call, or a list of them.
    fn begin(self) -> &'static str {
        match self {
            Self::DeepseekV3 | Self::DeepseekV31 => DEEPSEEK_CALL,
            Self::Hermes => "<tool_call>",
            Self::Llama3Json => PYTHON_TAG,
            Self::Mistral => TOOL_CALLS,
        }
    }

    /// What ends a call's text, where something does.
    fn end(self) -> Option<&'static str> {
        match self {
            Self::DeepseekV3 | Self::DeepseekV31 => Some("<｜tool▁call▁end｜>"),
            Self::Hermes => Some("</tool_call>"),
            Self::Llama3Json | Self::Mistral => None,
        }
    }

    /// What may stand before the first call.
    fn opener(self) -> Option<&'static str> {
        match self {
            Self::DeepseekV3 | Self::DeepseekV31 => Some("<｜tool▁calls▁begin｜>"),
            Self::Hermes | Self::Llama3Json | Self::Mistral => None,
        }
    }

    /// What may stand behind a call.
    fn closers(self) -> &'static [&'static str] {
        match self {
            Self::DeepseekV3 => &["```<｜tool▁call▁end｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"],
            Self::DeepseekV31 => &["<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"],
            Self::Hermes => &["</tool_call>"],
            Self::Llama3Json | Self::Mistral => &[],
        }
    }

    /// What separates calls of a list, where they stand in one.
    fn separator(self) -> Option<char> {
        match self {
            Self::Llama3Json => Some(';'),
            Self::Mistral => Some(','),
            _ => None,
        }
    }
}

/// The name of the tool, from the text between the begin of a call and the brace that opens its arguments.
fn name_in_head(syntax: ToolSyntax, head: &str) -> Option<&str> {
    match syntax {
        ToolSyntax::DeepseekV3 => {
            let (_, call) = head.split_once(DEEPSEEK_SEP)?;
            let (name, fence) = call.split_once('\n')?;
            matches!(fence.trim(), "```json" | "```" | "").then(|| name.trim())
        }
        ToolSyntax::DeepseekV31 => Some(head.trim().strip_suffix(DEEPSEEK_SEP)?.trim()),
        ToolSyntax::Mistral => {
            let head = head.trim();
            let head = head.strip_suffix("[ARGS]").unwrap_or(head);
            Some(head.split_once("[CALL_ID]").map_or(head, |(name, _id)| name).trim())
        }
        ToolSyntax::Hermes | ToolSyntax::Llama3Json => None,
    }
}
