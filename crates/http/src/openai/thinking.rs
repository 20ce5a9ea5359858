//! Whether, and how hard, a model is to think: the words for it in requests and in chat templates.

use serde_json::{Map, Value};

use crate::error::ApiError;
use crate::fields::Fields;

/// How hard to think, if at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effort {
    None,
    Minimal,
    Low,
    Medium,
    High,
    Xhigh,
    Max,
}

impl Effort {
    /// Reads a field that names an effort.
    pub fn read(fields: &mut Fields, name: &str) -> Result<Option<Self>, ApiError> {
        Ok(Some(match fields.string(name)?.as_deref() {
            None => return Ok(None),
            Some("none") => Self::None,
            Some("minimal") => Self::Minimal,
            Some("low") => Self::Low,
            Some("medium") => Self::Medium,
            Some("high") => Self::High,
            Some("xhigh") => Self::Xhigh,
            Some("max") => Self::Max,
            Some(_) => {
                let accepted = "none, minimal, low, medium, high, xhigh or max";
                return Err(ApiError::out_of_range(&fields.path(name), accepted));
            }
        }))
    }

    /// The template's word for it. One that knows a word (`has`) is given it; else those that DeepSeek's models do not
    /// have become the nearest that they have, as in DeepSeek's API.
    pub fn word(self, has: impl Fn(&str) -> bool) -> &'static str {
        let (own, near) = match self {
            Self::None => ("none", "none"),
            Self::Minimal => ("minimal", "low"),
            Self::Low => ("low", "low"),
            Self::Medium => ("medium", "high"),
            Self::High => ("high", "high"),
            Self::Xhigh => ("xhigh", "high"),
            Self::Max => ("max", "max"),
        };
        if has(own) { own } else { near }
    }
}

/// Switches thinking on or off by the names that Qwen's and DeepSeek's templates have for it.
pub(crate) fn switch(kwargs: &mut Map<String, Value>, on: bool) {
    kwargs.insert("enable_thinking".into(), on.into());
    kwargs.insert("thinking".into(), on.into());
}

/// `thinking`, as DeepSeek's API has it; true: enabled.
pub(crate) fn thinking(fields: &mut Fields) -> Result<Option<bool>, ApiError> {
    let Some(mut thinking) = fields.object("thinking")? else { return Ok(None) };
    let kind = thinking.string("type")?;
    let on = match thinking.required("type", kind)?.as_str() {
        "enabled" => true,
        "disabled" => false,
        _ => return Err(ApiError::out_of_range("thinking.type", "enabled or disabled")),
    };
    thinking.finish()?;
    Ok(Some(on))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_gets_its_own_words_and_others_are_mapped_as_deepseek_does() {
        let all = [Effort::Minimal, Effort::Low, Effort::Medium, Effort::High, Effort::Xhigh, Effort::Max];
        assert_eq!(all.map(|effort| effort.word(|_| false)), ["low", "low", "high", "high", "high", "max"]);
        assert_eq!(all.map(|effort| effort.word(|w| w == "medium")), ["low", "low", "medium", "high", "high", "max"]);
    }
}
