//! Names of modules as configs of quantisation and of adapters list them: parts of names, whole names, and the
//! regular expressions in use (`re:.*lm_head`, `re:.*mlp\.gate$`): characters, escapes, `.`, and `*` after
//! one of these. Others are refused. As in Python's `re.match`, only the beginning is anchored.

/// Some modules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Pattern {
    /// Every name that contains this one, whole components of it.
    Part(String),
    /// This name.
    Exact(String),
    /// Every name that begins like this.
    Regex(Vec<Item>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Item {
    /// `None` for any character; `'\0'`, which no name holds, for the end.
    char: Option<char>,
    /// Any number of it.
    star: bool,
}

const END: Item = Item { char: Some('\0'), star: false };
/// Characters of a pattern, at most: matching takes pattern times name.
const MAX_LEN: usize = 256;

impl Pattern {
    /// A name, or an expression after `re:`.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        match text.strip_prefix("re:") {
            None => Ok(Pattern::Exact(text.to_owned())),
            Some(expression) => Self::regex(expression),
        }
    }

    /// A regular expression.
    pub(crate) fn regex(expression: &str) -> Result<Self, String> {
        let refuse = |what: &str| {
            let text: String = expression.chars().take(60).collect();
            Err(format!("the pattern {text:?} {what}"))
        };
        if expression.len() > MAX_LEN {
            return refuse("is too long");
        }
        let mut items = Vec::new();
        let mut chars = expression.trim_start_matches('^').chars();
        while let Some(c) = chars.next() {
            let char = match c {
                '$' if chars.as_str().is_empty() => {
                    items.push(END);
                    break;
                }
                '.' => None,
                '\\' => match chars.next() {
                    Some(c) if !c.is_alphanumeric() => Some(c),
                    _ => return refuse("has an escape that is not supported"),
                },
                '*' | '+' | '?' | '(' | ')' | '[' | ']' | '{' | '}' | '|' | '^' | '$' | '\0' => {
                    return refuse("uses more than characters, `.` and `.*`, which is not supported");
                }
                c => Some(c),
            };
            let star = chars.as_str().starts_with('*');
            if star {
                chars.next();
            }
            items.push(Item { char, star });
        }
        Ok(Pattern::Regex(items))
    }

    pub(crate) fn matches(&self, name: &str) -> bool {
        match self {
            Pattern::Part(part) => format!(".{name}.").contains(&format!(".{part}.")),
            Pattern::Exact(exact) => name == exact,
            Pattern::Regex(items) => begins(items, name),
        }
    }
}

/// Whether `name` begins with what `items` describe: the places reached, item by item.
fn begins(items: &[Item], name: &str) -> bool {
    let chars: Vec<char> = name.chars().chain(['\0']).collect();
    let fits = |item: &Item, c: char| item.char.map_or(c != '\0', |wanted| wanted == c);
    let mut reached = vec![false; chars.len() + 1];
    reached[0] = true;
    for item in items {
        let mut next = vec![false; reached.len()];
        for at in 0..reached.len() {
            next[at] |= item.star && reached[at];
            let from = reached[at] || (item.star && next[at]);
            if from && at < chars.len() && fits(item, chars[at]) {
                next[at + 1] = true;
            }
        }
        reached = next;
    }
    reached.contains(&true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_what_they_say() {
        let regex = |text: &str| Pattern::parse(&format!("re:{text}")).unwrap();
        for (pattern, name, wanted) in [
            (regex(".*lm_head"), "lm_head", true),
            (regex(".*mlp\\.gate$"), "model.layers.3.mlp.gate", true),
            (regex(".*mlp.gate$"), "model.layers.3.mlp.gate_proj", false),
            (regex(".*mlp.gate"), "model.layers.3.mlp.gate_proj", true),
            (regex("model"), "lm_model", false),
            (regex("^a*b.*$"), "aaab.c", true),
            (regex(".*a.*a$"), "aba", true),
            (Pattern::parse("lm_head").unwrap(), "lm_head.x", false),
            (Pattern::Part("gate".into()), "mlp.gate", true),
            (Pattern::Part("gate".into()), "mlp.gate_proj", false),
            (Pattern::Part("model.layers.1".into()), "model.layers.10.q", false),
            (Pattern::Part("layers.1".into()), "model.layers.1.q", true),
        ] {
            assert_eq!(pattern.matches(name), wanted, "{pattern:?} on {name}");
        }
        for bad in ["re:(a|b)", "re:a+", "re:[ab]", "re:\\d", "re:\\"] {
            assert!(Pattern::parse(bad).is_err(), "{bad}");
        }
    }
}
