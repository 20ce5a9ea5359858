//! Takes the calls of tools out of an answer's text.
//!
//! Invariants: the state is a function of the characters seen, never of how they were cut into pieces; calls are
//! numbered from 0 in the order in which they are sent; no character of the answer is sent twice, and none is lost but
//! what frames calls.
//!
//! A call begins once its tool's name is known, whole, to be one of the request's, and its arguments have begun.
//! Everything before that is held, and if no call comes of it, it is content, marker included. From then on the
//! arguments are passed on as they come, to the end of their JSON object. If they turn out not to be JSON, there is no
//! telling where they end: then all text to the end of the call's frame, or of the answer, belongs to them, since part
//! of them has been sent. White space that touches a call is dropped.

use std::sync::Arc;

use super::json::{Scanner, Seen};
use super::object::{ObjectCall, Step};
use super::{ToolSyntax, name_in_head};
use crate::Segment;

/// Longest text between the begin of a call and its arguments: markers, a name and an id.
const MAX_HEAD_BYTES: usize = 512;

#[derive(Debug)]
enum State {
    /// In the answer's other text.
    Outside,
    /// Behind the begin of a call or of a list of them.
    Opened,
    /// In a list, before the object of its first call.
    List,
    /// In a call that is an object. Boxed to keep the state small.
    Object(Box<ObjectCall>),
    /// In a call of another form, before its arguments.
    Head(String),
    /// In the arguments of such a call.
    Arguments(Scanner),
    /// In arguments that are not JSON.
    Broken,
    /// In a list, behind a call. `more`: and behind a separator.
    Between { more: bool },
    /// Behind the only call that is wanted.
    Over,
}

/// Splits one output's answer into content and calls of tools.
#[derive(Debug)]
pub struct ToolSplitter {
    syntax: ToolSyntax,
    names: Arc<[String]>,
    single: bool,
    state: State,
    /// In an array of calls, which ends with a bracket.
    in_array: bool,
    /// A proper prefix of a marker that is looked for.
    partial: String,
    /// What becomes content if no call comes of it. Outside of calls, only white space and what counts as such.
    held: String,
    /// Calls that have begun.
    calls: usize,
    /// No content has been sent since the last call, or since the beginning.
    bare: bool,
    out: Vec<Segment>,
}

impl ToolSplitter {
    /// A splitter for one output. `names`: the tools that may be called; a call of another is content. `single`: the
    /// answer ends with the first call.
    pub fn new(syntax: ToolSyntax, names: Arc<[String]>, single: bool) -> Self {
        Self {
            syntax,
            names,
            single,
            state: State::Outside,
            in_array: false,
            partial: String::new(),
            held: String::new(),
            calls: 0,
            bare: true,
            out: Vec::new(),
        }
    }

    /// Takes the next piece of the answer and gives what is settled.
    pub fn push(&mut self, text: &str) -> Vec<Segment> {
        text.chars().for_each(|c| self.step(c));
        std::mem::take(&mut self.out)
    }

    /// The answer has ended: what was held back belongs to where it stands.
    pub fn flush(&mut self) -> Vec<Segment> {
        let partial = std::mem::take(&mut self.partial);
        match std::mem::replace(&mut self.state, State::Over) {
            // Of a frame that was cut off.
            State::Outside if self.behind_call() => {}
            State::Between { more: false } => self.held.clear(),
            State::Broken => self.arguments(&partial),
            State::Outside | State::Opened | State::List | State::Head(_) | State::Between { more: true } => {
                self.held += &partial;
                self.release();
            }
            // What is held here belongs to a call that has not begun.
            State::Object(_) => self.release(),
            State::Arguments(_) | State::Over => {}
        }
        std::mem::take(&mut self.out)
    }

    /// Calls that have begun.
    pub fn calls(&self) -> usize {
        self.calls
    }

    /// Whether the last call that has begun still lacks a part of its arguments.
    pub fn in_arguments(&self) -> bool {
        match &self.state {
            State::Arguments(_) | State::Broken => true,
            State::Object(call) => call.has_begun() && !call.has_arguments(),
            _ => false,
        }
    }

    /// Whether nothing more can come, whatever text does.
    pub fn is_over(&self) -> bool {
        matches!(self.state, State::Over)
    }

    fn step(&mut self, c: char) {
        match &mut self.state {
            State::Outside => self.outside(c),
            State::Opened | State::List if c.is_whitespace() => self.held.push(c),
            State::Opened => self.opened(c),
            State::List if c == '{' => self.object(c),
            State::List => self.no_call(c),
            State::Object(call) => {
                let step = call.step(c, |name| self.names.iter().any(|known| known == name));
                self.in_object(c, step);
            }
            State::Head(_) => self.head(c),
            State::Arguments(scanner) => match scanner.step(c) {
                Seen::Inside => self.arguments(c.encode_utf8(&mut [0; 4])),
                Seen::End => {
                    self.arguments(c.encode_utf8(&mut [0; 4]));
                    self.end_call();
                }
                Seen::Wrong => self.broken(c),
            },
            State::Broken => self.broken(c),
            &mut State::Between { more } => self.between(c, more),
            State::Over => {}
        }
    }

    fn outside(&mut self, c: char) {
        if self.partial.is_empty() {
            if c.is_whitespace() {
                if !self.behind_call() {
                    self.held.push(c);
                }
                return;
            }
            // Llama 3 needs no marker where the answer begins.
            if self.syntax == ToolSyntax::Llama3Json && self.calls == 0 && self.bare && c == '{' {
                return self.object(c);
            }
        }
        self.partial.push(c);
        let (begin, opener, closers) = (self.syntax.begin(), self.syntax.opener(), self.syntax.closers());
        let markers = || [begin].into_iter().chain(opener).chain(closers.iter().copied());
        while !markers().any(|marker| marker.starts_with(&self.partial)) {
            let first = self.partial.remove(0);
            self.bare = false;
            if first.is_whitespace() {
                self.held.push(first);
            } else {
                self.plain(first.encode_utf8(&mut [0; 4]));
            }
        }
        let marker = markers().find(|marker| *marker == self.partial);
        if marker.is_some() {
            self.partial.clear();
        }
        match marker {
            None => {}
            Some(marker) if marker == begin => {
                self.held += marker;
                self.state = State::Opened;
            }
            Some(marker) if Some(marker) == opener => self.held += marker,
            Some(_) if self.behind_call() => {}
            Some(marker) => self.plain(marker),
        }
    }

    /// Whether nothing but what frames it has been seen since the last call.
    fn behind_call(&self) -> bool {
        self.calls > 0 && self.bare && self.held.is_empty()
    }

    /// Text that belongs to no call.
    fn plain(&mut self, text: &str) {
        self.bare = false;
        self.held += text;
        self.release();
    }

    /// The first visible character behind a begin tells the form.
    fn opened(&mut self, c: char) {
        match (self.syntax, c) {
            (ToolSyntax::Hermes | ToolSyntax::Llama3Json, '{') => self.object(c),
            (ToolSyntax::Hermes | ToolSyntax::Llama3Json, _) => self.no_call(c),
            (ToolSyntax::Mistral, '[') => {
                self.held.push(c);
                self.in_array = true;
                self.state = State::List;
            }
            _ => {
                self.state = State::Head(String::new());
                self.head(c);
            }
        }
    }

    fn object(&mut self, c: char) {
        let mut call = ObjectCall::new();
        call.step(c, |_| true);
        self.held.push(c);
        self.state = State::Object(Box::new(call));
    }

    fn in_object(&mut self, c: char, step: Step) {
        let State::Object(call) = &self.state else { return };
        match step {
            Step::More if call.has_begun() => {}
            Step::More => self.held.push(c),
            Step::Begin(name, arguments) => {
                let complete = call.has_arguments();
                self.begin_call(name, &arguments);
                if complete && self.single {
                    self.end_call();
                }
            }
            Step::Arguments(c) => {
                let complete = call.has_arguments();
                self.arguments(c.encode_utf8(&mut [0; 4]));
                if complete && self.single {
                    self.end_call();
                }
            }
            Step::Whole(name, arguments) => {
                self.begin_call(name, &arguments);
                self.end_call();
            }
            Step::End => self.end_call(),
            Step::Wrong if !call.has_begun() => self.no_call(c),
            Step::Wrong if call.has_arguments() => {
                self.end_call();
                self.step(c);
            }
            Step::Wrong => self.broken(c),
        }
    }

    fn head(&mut self, c: char) {
        let State::Head(head) = &mut self.state else { return };
        if c == '{' {
            let name = name_in_head(self.syntax, head).filter(|name| self.names.iter().any(|known| known == name));
            let Some(name) = name.map(str::to_owned) else { return self.no_call(c) };
            let mut scanner = Scanner::new();
            scanner.step(c);
            self.state = State::Arguments(scanner);
            return self.begin_call(name, "{");
        }
        head.push(c);
        self.held.push(c);
        let begin = self.syntax.begin();
        if head.ends_with(begin) {
            // The call that began has come to nothing; this may be one, with what frames it.
            let before = self.held[..self.held.len() - begin.len()].trim_end();
            let before = self.syntax.opener().and_then(|opener| before.strip_suffix(opener)).unwrap_or(before);
            let frame = self.held.split_off(before.trim_end().len());
            self.release();
            self.held = frame;
            self.state = State::Opened;
        } else if head.len() > MAX_HEAD_BYTES {
            self.release();
            self.state = State::Outside;
        }
    }

    /// What is held is no call, and `c` neither.
    fn no_call(&mut self, c: char) {
        self.release_visible();
        self.in_array = false;
        self.state = State::Outside;
        self.step(c);
    }

    /// A character of arguments that are not JSON, or behind them.
    fn broken(&mut self, c: char) {
        self.state = State::Broken;
        let Some(end) = self.syntax.end() else { return self.arguments(c.encode_utf8(&mut [0; 4])) };
        self.partial.push(c);
        while !end.starts_with(&self.partial) {
            let first = self.partial.remove(0);
            self.arguments(first.encode_utf8(&mut [0; 4]));
        }
        if self.partial == end {
            self.partial.clear();
            self.end_call();
        }
    }

    fn between(&mut self, c: char, more: bool) {
        match c {
            _ if c.is_whitespace() => self.held.push(c),
            // Llama 3 may leave its separator out.
            '{' if more || !self.in_array => self.object(c),
            ']' if !more && self.in_array => self.leave_list(),
            _ if !more && Some(c) == self.syntax.separator() => {
                self.held.push(c);
                self.state = State::Between { more: true };
            }
            // The separator frames a call if one follows after all.
            _ if more => {
                self.in_array = false;
                self.state = State::Outside;
                self.step(c);
            }
            _ => {
                self.leave_list();
                self.step(c);
            }
        }
    }

    fn leave_list(&mut self) {
        self.held.clear();
        self.in_array = false;
        self.state = State::Outside;
    }

    fn begin_call(&mut self, name: String, arguments: &str) {
        self.held.clear();
        self.bare = true;
        self.out.push(Segment::Call { index: self.calls, name });
        self.calls += 1;
        self.arguments(arguments);
    }

    fn end_call(&mut self) {
        let in_list = self.in_array || self.syntax == ToolSyntax::Llama3Json;
        self.state = match self.single {
            true => State::Over,
            false if in_list => State::Between { more: false },
            false => State::Outside,
        };
    }

    /// A part of the arguments of the last call.
    fn arguments(&mut self, part: &str) {
        let last = self.calls - 1;
        match self.out.last_mut() {
            _ if part.is_empty() => {}
            Some(Segment::Arguments { index, text }) if *index == last => text.push_str(part),
            _ => self.out.push(Segment::Arguments { index: last, text: part.to_owned() }),
        }
    }

    /// Releases what is held, but for the white space at its end.
    fn release_visible(&mut self) {
        let space = self.held.split_off(self.held.trim_end().len());
        self.release();
        self.held = space;
    }

    fn release(&mut self) {
        let held = std::mem::take(&mut self.held);
        self.bare &= held.trim().is_empty();
        self.content(&held);
    }

    fn content(&mut self, part: &str) {
        match self.out.last_mut() {
            _ if part.is_empty() => {}
            Some(Segment::Content(text)) => text.push_str(part),
            _ => self.out.push(Segment::Content(part.to_owned())),
        }
    }
}
