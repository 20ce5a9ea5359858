//! A call that is one JSON object with the tool's name and its arguments, in any order.

use serde_json::Value;

use super::json::{At, Scanner, Seen};

/// What a character of the object settles.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing that can be told yet.
    More,
    /// The call of this tool begins, with the first part of its arguments.
    Begin(String, String),
    /// The arguments go on.
    Arguments(char),
    /// The object is complete, and so is the call that has begun.
    End,
    /// The object is complete; this is the whole call.
    Whole(String, String),
    /// The text is no call, or no further part of one. Nothing of the character has been used.
    Wrong,
}

/// Keys under which models write arguments.
const ARGUMENTS: [&str; 2] = ["arguments", "parameters"];

/// The state in such an object.
#[derive(Debug)]
pub(super) struct ObjectCall {
    scanner: Scanner,
    part: Part,
    /// Raw JSON of the part, as far as it is kept.
    text: String,
    name: Option<String>,
    /// Complete arguments that wait for the name, or for the end.
    arguments: Option<String>,
    begun: bool,
    /// Characters of the arguments are passed on as they come.
    streaming: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// Punctuation and white space between keys and values.
    Between,
    Key,
    Name,
    Arguments,
    Other,
}

impl ObjectCall {
    /// Before its opening brace.
    pub(super) fn new() -> Self {
        Self {
            scanner: Scanner::new(),
            part: Part::Between,
            text: String::new(),
            name: None,
            arguments: None,
            begun: false,
            streaming: false,
        }
    }

    /// Whether the call has begun.
    pub(super) fn has_begun(&self) -> bool {
        self.begun
    }

    /// Whether all of the call's arguments have been passed on.
    pub(super) fn has_arguments(&self) -> bool {
        self.begun && !self.streaming
    }

    /// Takes the next character. `known`: whether a tool has this name.
    pub(super) fn step(&mut self, c: char, known: impl Fn(&str) -> bool) -> Step {
        let before = self.scanner.place();
        let seen = self.scanner.step(c);
        let now = self.scanner.place();
        // What stands alone must be an object.
        if seen == Seen::Wrong || (before.0 == 0 && c == '[') {
            return Step::Wrong;
        }
        let begins_value = before == (1, At::Value) && now != before;
        match self.part {
            Part::Between if before.0 == 1 && matches!(now, (1, At::Text { key: true, .. })) => {
                self.part = Part::Key;
                self.text = c.into();
            }
            Part::Between if begins_value => return self.begin_value(c),
            Part::Between => {}
            Part::Key => {
                self.text.push(c);
                if now == (1, At::Colon) && !self.key() {
                    return Step::Wrong;
                }
            }
            Part::Name | Part::Arguments | Part::Other => {
                // A scalar has ended before the character that shows it.
                let scalar_ended = before == (1, At::Scalar) && now.1 != At::Scalar;
                let step = if scalar_ended { Step::More } else { self.keep(c) };
                if (scalar_ended || now == (1, At::After)) && !self.end_value(&known) {
                    return Step::Wrong;
                }
                if seen != Seen::End {
                    return self.begin().unwrap_or(step);
                }
            }
        }
        if seen == Seen::End { self.end() } else { Step::More }
    }

    /// A key is complete: what its value is; false if it is no JSON.
    fn key(&mut self) -> bool {
        let Ok(key) = serde_json::from_str::<String>(&std::mem::take(&mut self.text)) else { return false };
        self.text = key;
        self.part = Part::Between;
        true
    }

    fn begin_value(&mut self, c: char) -> Step {
        let key = std::mem::take(&mut self.text);
        self.part = match key.as_str() {
            "name" if self.name.is_none() => Part::Name,
            key if ARGUMENTS.contains(&key) && self.arguments.is_none() && !self.begun => Part::Arguments,
            _ => Part::Other,
        };
        match (&self.name, self.part) {
            (Some(name), Part::Arguments) if c == '{' => {
                (self.begun, self.streaming) = (true, true);
                Step::Begin(name.clone(), c.into())
            }
            _ => self.keep(c),
        }
    }

    /// A character of a value.
    fn keep(&mut self, c: char) -> Step {
        match self.part {
            Part::Arguments if self.streaming => return Step::Arguments(c),
            Part::Other => {}
            _ => self.text.push(c),
        }
        Step::More
    }

    /// A value is complete; false if it cannot be what it should.
    fn end_value(&mut self, known: &impl Fn(&str) -> bool) -> bool {
        let (part, text) = (self.part, std::mem::take(&mut self.text));
        self.part = Part::Between;
        match part {
            Part::Name => self.name = serde_json::from_str(&text).ok().filter(|name: &String| known(name)),
            Part::Arguments if self.streaming => self.streaming = false,
            Part::Arguments => self.arguments = arguments(text),
            _ => {}
        }
        (part != Part::Name || self.name.is_some())
            && (part != Part::Arguments || self.begun || self.arguments.is_some())
    }

    /// Begins the call once both its parts are there.
    fn begin(&mut self) -> Option<Step> {
        let arguments = self.arguments.take_if(|_| self.name.is_some() && !self.begun)?;
        self.begun = true;
        Some(Step::Begin(self.name.clone()?, arguments))
    }

    /// The closing brace.
    fn end(&mut self) -> Step {
        match self.name.take() {
            _ if self.begun => Step::End,
            Some(name) => Step::Whole(name, self.arguments.take().unwrap_or_else(|| "{}".into())),
            None => Step::Wrong,
        }
    }
}

/// The arguments that a value is: an object, the text of one, or none at all.
fn arguments(value: String) -> Option<String> {
    if value.starts_with('{') {
        return Some(value);
    }
    match serde_json::from_str(&value).ok()? {
        Value::String(text) => matches!(serde_json::from_str(&text), Ok(Value::Object(_))).then_some(text),
        Value::Null => Some("{}".into()),
        _ => None,
    }
}
