//! One JSON value, followed character by character to its end.
//!
//! Structure is judged strictly and scalars loosely: what a parser accepts is never refused here, and text that cannot
//! go on to be JSON is noticed at the first character that shows it, but for numbers, literals and escapes.

/// What a character means to the value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Seen {
    /// The value goes on.
    Inside,
    /// The value ends with this character.
    End,
    /// This character cannot stand here.
    Wrong,
}

/// Where in its value a scanner stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum At {
    /// Before a value.
    Value,
    /// Behind `[`.
    FirstItem,
    /// Behind `{`.
    FirstKey,
    /// Behind the comma in an object.
    Key,
    /// Behind a key.
    Colon,
    /// In a string.
    Text { key: bool, escaped: bool },
    /// In a number or a literal.
    Scalar,
    /// Behind a value in an object or array.
    After,
}

/// Follows one array or object.
#[derive(Debug, Clone)]
pub(super) struct Scanner {
    /// The open containers; true for an object.
    open: Vec<bool>,
    at: At,
}

impl Scanner {
    /// Before the value.
    pub(super) fn new() -> Self {
        Self { open: Vec::new(), at: At::Value }
    }

    /// Open containers, and where in the innermost one the scanner stands.
    pub(super) fn place(&self) -> (usize, At) {
        (self.open.len(), self.at)
    }

    /// Takes the next character. Nothing may follow an end or a wrong one.
    pub(super) fn step(&mut self, c: char) -> Seen {
        // JSON's own white space, not Unicode's.
        let space = matches!(c, ' ' | '\t' | '\n' | '\r');
        self.at = match (self.at, c) {
            (At::Text { key, escaped: true }, _) => At::Text { key, escaped: false },
            (At::Text { key, .. }, '\\') => At::Text { key, escaped: true },
            (At::Text { key: true, .. }, '"') => At::Colon,
            (At::Text { .. }, '"') => At::After,
            (At::Text { .. }, _) => return Seen::Inside,
            (At::Scalar, c) if c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.') => At::Scalar,
            (At::Scalar, c) => {
                self.at = At::After;
                return self.step(c);
            }
            (_, _) if space => return Seen::Inside,
            (At::Value | At::FirstItem, '{') => self.enter(true),
            (At::Value | At::FirstItem, '[') => self.enter(false),
            (At::FirstItem, ']') => return self.leave(false),
            // A value that stands alone is an array or an object.
            (At::Value | At::FirstItem, _) if self.open.is_empty() => return Seen::Wrong,
            (At::Value | At::FirstItem, '"') => At::Text { key: false, escaped: false },
            (At::Value | At::FirstItem, c) if c.is_ascii_alphanumeric() || c == '-' => At::Scalar,
            (At::FirstKey | At::Key, '"') => At::Text { key: true, escaped: false },
            (At::FirstKey, '}') => return self.leave(true),
            (At::Colon, ':') => At::Value,
            (At::After, ',') => match self.open.last() {
                Some(true) => At::Key,
                _ => At::Value,
            },
            (At::After, '}') => return self.leave(true),
            (At::After, ']') => return self.leave(false),
            _ => return Seen::Wrong,
        };
        Seen::Inside
    }

    fn enter(&mut self, object: bool) -> At {
        self.open.push(object);
        if object { At::FirstKey } else { At::FirstItem }
    }

    fn leave(&mut self, object: bool) -> Seen {
        if self.open.pop() != Some(object) {
            return Seen::Wrong;
        }
        self.at = At::After;
        if self.open.is_empty() { Seen::End } else { Seen::Inside }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The characters up to the end of the value, or those before the wrong one.
    fn extent(text: &str) -> Result<&str, &str> {
        let mut scanner = Scanner::new();
        for (at, c) in text.char_indices() {
            match scanner.step(c) {
                Seen::Inside => {}
                Seen::End => return Ok(&text[..at + c.len_utf8()]),
                Seen::Wrong => return Err(&text[..at]),
            }
        }
        Err(text)
    }

    #[test]
    fn a_value_ends_where_its_outermost_bracket_closes() {
        for value in [r#"{}"#, r#"[ ]"#, r#" {"a": [1, {"}": "]\"}"}, -2.5e+7, null], "é": "\\"}"#] {
            assert_eq!(extent(&format!("{value}}} rest")), Ok(value));
        }
    }

    #[test]
    fn what_cannot_become_json_is_noticed_at_once() {
        for (good, bad) in [
            (r#"{"a": "b""#, "x"),
            (r#"{"a""#, ","),
            ("{", "a"),
            (r#"{"a":1,"#, "}"),
            (r#"{"a":[1,2"#, "}"),
            ("[1, 2", ";"),
            ("", "1"),
            ("", "x"),
        ] {
            assert_eq!(extent(&format!("{good}{bad}")), Err(good));
        }
    }

    fn value() -> impl Strategy<Value = serde_json::Value> {
        let leaf = prop_oneof![
            Just(serde_json::Value::Null),
            any::<bool>().prop_map(Into::into),
            any::<f64>().prop_map(Into::into),
            any::<i64>().prop_map(Into::into),
            ".{0,8}".prop_map(Into::into),
        ];
        leaf.prop_recursive(4, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Into::into),
                prop::collection::vec((".{0,4}", inner), 0..4)
                    .prop_map(|entries| serde_json::Value::Object(entries.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn every_json_text_is_followed_to_its_end(values in prop::collection::vec(value(), 0..4), pretty in any::<bool>()) {
            let value = serde_json::Value::from(values);
            let text = if pretty { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) }.unwrap();
            let more = format!("{text}]");
            prop_assert_eq!(extent(&more), Ok(text.as_str()));
        }
    }
}
