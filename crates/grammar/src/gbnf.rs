//! Reads GBNF, llama.cpp's form of grammars, as Lark.
//!
//! A rule that does not lead back to itself becomes a terminal: one regular expression. The others stay rules. A terminal
//! takes as much text as it can, so an output is always one of the grammar's, but where two neighbours could share a text in
//! several ways not each of them is tried.

use std::collections::HashMap;
use std::fmt::Write;

use crate::GrammarError;
use crate::lark::quoted;

/// Whether a grammar is written in GBNF.
pub(crate) fn is_gbnf(text: &str) -> bool {
    text.contains("::=")
}

/// The same grammar in Lark. The depth of its groups has been checked.
pub(crate) fn to_lark(text: &str) -> Result<String, GrammarError> {
    let rules = Reader::new(text)?.rules()?;
    let index: HashMap<&str, usize> = rules.iter().enumerate().map(|(i, rule)| (rule.name.as_str(), i)).collect();
    let root = *index.get("root").ok_or_else(|| refused("must have a rule root"))?;
    let mut calls = Vec::new();
    for rule in &rules {
        let mut callees = Vec::new();
        callees_of(&rule.body, &index, &mut callees)?;
        calls.push(callees);
    }
    let terminal = terminals(&calls);
    let name = |i: usize| if terminal[i] { format!("RULE_{i}") } else { format!("rule_{i}") };
    let mut lark = format!("start: {}\n", name(root));
    for (i, rule) in rules.iter().enumerate() {
        let mut body = String::new();
        write_alternatives(&rule.body, &|called| name(index[called]), &mut body);
        writeln!(lark, "{}: {body}", name(i)).expect("a String takes all");
    }
    Ok(lark)
}

fn refused(what: &str) -> GrammarError {
    GrammarError::Invalid(format!("a grammar in GBNF {what}"))
}

struct Rule {
    name: String,
    body: Alternatives,
}

type Alternatives = Vec<Vec<Item>>;

struct Item {
    atom: Atom,
    /// How often, at least and at most.
    times: (u32, Option<u32>),
}

enum Atom {
    Literal(String),
    /// Characters as a class of a regular expression.
    Class(String),
    Rule(String),
    Group(Alternatives),
}

/// Which rules do not lead back to themselves, and lead to no rule that does.
fn terminals(calls: &[Vec<usize>]) -> Vec<bool> {
    let mut terminal = vec![false; calls.len()];
    let mut callers = vec![Vec::new(); calls.len()];
    let mut open: Vec<usize> = calls.iter().map(Vec::len).collect();
    calls.iter().enumerate().for_each(|(caller, callees)| callees.iter().for_each(|&c| callers[c].push(caller)));
    let mut settled: Vec<usize> = (0..calls.len()).filter(|&i| open[i] == 0).collect();
    while let Some(rule) = settled.pop() {
        terminal[rule] = true;
        for &caller in &callers[rule] {
            open[caller] -= 1;
            if open[caller] == 0 {
                settled.push(caller);
            }
        }
    }
    terminal
}

fn callees_of(body: &Alternatives, index: &HashMap<&str, usize>, callees: &mut Vec<usize>) -> Result<(), GrammarError> {
    body.iter().flatten().try_for_each(|item| match &item.atom {
        Atom::Rule(name) => {
            callees.push(*index.get(name.as_str()).ok_or_else(|| refused("must define every rule that it uses"))?);
            Ok(())
        }
        Atom::Group(body) => callees_of(body, index, callees),
        Atom::Literal(_) | Atom::Class(_) => Ok(()),
    })
}

fn write_alternatives(body: &Alternatives, name: &dyn Fn(&str) -> String, out: &mut String) {
    for (i, items) in body.iter().enumerate() {
        out.push_str(if i > 0 { " | " } else { "" });
        if items.is_empty() {
            out.push_str("\"\"");
        }
        for Item { atom, times } in items {
            match atom {
                Atom::Literal(text) => out.push_str(&quoted(text)),
                Atom::Class(class) => write!(out, "/{class}/").expect("a String takes all"),
                Atom::Rule(called) => out.push_str(&name(called)),
                Atom::Group(body) => {
                    out.push('(');
                    write_alternatives(body, name, out);
                    out.push(')');
                }
            }
            match times {
                (1, Some(1)) => {}
                (0, Some(1)) => out.push('?'),
                (0, None) => out.push('*'),
                (1, None) => out.push('+'),
                (least, None) => write!(out, "{{{least},}}").expect("a String takes all"),
                (least, Some(most)) => write!(out, "{{{least},{most}}}").expect("a String takes all"),
            }
            out.push(' ');
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
enum Word {
    Name(String),
    Literal(String),
    Class(String),
    Times(u32, Option<u32>),
    Defines,
    Or,
    Open,
    Close,
}

struct Reader {
    /// Backwards, so that the next one is the last.
    words: Vec<Word>,
}

impl Reader {
    fn new(text: &str) -> Result<Self, GrammarError> {
        let mut words = Scanner(text).words()?;
        words.reverse();
        Ok(Self { words })
    }

    fn rules(mut self) -> Result<Vec<Rule>, GrammarError> {
        let mut rules = Vec::new();
        while let Some(word) = self.words.pop() {
            let (Word::Name(name), Some(Word::Defines)) = (word, self.words.pop()) else {
                return Err(refused("must be rules of the form: name ::= body"));
            };
            rules.push(Rule { name, body: self.alternatives()? });
        }
        Ok(rules)
    }

    /// Up to a closing parenthesis, the next rule or the end.
    fn alternatives(&mut self) -> Result<Alternatives, GrammarError> {
        let mut body: Alternatives = vec![Vec::new()];
        loop {
            let begins_rule = matches!(&self.words[..], [.., Word::Defines, Word::Name(_)]);
            let word = match self.words.last() {
                None | Some(Word::Close) => return Ok(body),
                Some(_) if begins_rule => return Ok(body),
                Some(_) => self.words.pop().expect("there is one"),
            };
            let atom = match word {
                Word::Or => {
                    body.push(Vec::new());
                    continue;
                }
                Word::Times(least, most) => {
                    let item = body.last_mut().and_then(|items| items.last_mut());
                    let item = item.ok_or_else(|| refused("must have something before each repetition"))?;
                    // A repetition of a repetition repeats the group.
                    let inner =
                        Item { atom: std::mem::replace(&mut item.atom, Atom::Group(Vec::new())), times: item.times };
                    item.atom = if inner.times == (1, Some(1)) { inner.atom } else { Atom::Group(vec![vec![inner]]) };
                    item.times = (least, most);
                    continue;
                }
                Word::Open => {
                    let group = self.alternatives()?;
                    if self.words.pop() != Some(Word::Close) {
                        return Err(refused("must close its parentheses"));
                    }
                    Atom::Group(group)
                }
                Word::Literal(text) => Atom::Literal(text),
                Word::Class(class) => Atom::Class(class),
                Word::Name(name) => Atom::Rule(name),
                Word::Close | Word::Defines => return Err(refused("must be rules of the form: name ::= body")),
            };
            body.last_mut().expect("never empty").push(Item { atom, times: (1, Some(1)) });
        }
    }
}

struct Scanner<'a>(&'a str);

impl Scanner<'_> {
    fn words(mut self) -> Result<Vec<Word>, GrammarError> {
        let mut words = Vec::new();
        while let Some(c) = self.0.chars().next() {
            let rest = &self.0[c.len_utf8()..];
            let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
            if let Some(rest) = self.0.strip_prefix("::=") {
                words.push(Word::Defines);
                self.0 = rest;
                continue;
            }
            if is_name(c) {
                let end = self.0.find(|c| !is_name(c)).unwrap_or(self.0.len());
                words.push(Word::Name(self.0[..end].to_owned()));
                self.0 = &self.0[end..];
                continue;
            }
            self.0 = rest;
            match c {
                ' ' | '\t' | '\r' | '\n' => {}
                '#' => self.0 = rest.find('\n').map_or("", |at| &rest[at..]),
                '|' => words.push(Word::Or),
                '(' => words.push(Word::Open),
                ')' => words.push(Word::Close),
                '*' => words.push(Word::Times(0, None)),
                '+' => words.push(Word::Times(1, None)),
                '?' => words.push(Word::Times(0, Some(1))),
                '.' => words.push(Word::Class(r"(?s:.)".to_owned())),
                '{' => words.push(self.times()?),
                '"' | '\'' => words.push(Word::Literal(self.literal(c)?)),
                '[' => words.push(Word::Class(self.class()?)),
                _ => return Err(refused("may have names, texts, classes, groups and repetitions only")),
            }
        }
        Ok(words)
    }

    /// Behind `{`.
    fn times(&mut self) -> Result<Word, GrammarError> {
        let malformed = || refused("must write repetitions as {3}, {3,} or {3,5}");
        let (inside, rest) = self.0.split_once('}').ok_or_else(malformed)?;
        self.0 = rest;
        let number = |text: &str| text.trim().parse::<u32>().map_err(|_| malformed());
        let (least, most) = match inside.split_once(',') {
            None => (number(inside)?, Some(number(inside)?)),
            Some((least, most)) if most.trim().is_empty() => (number(least)?, None),
            Some((least, most)) => (number(least)?, Some(number(most)?)),
        };
        if most.is_some_and(|most| most < least) { Err(malformed()) } else { Ok(Word::Times(least, most)) }
    }

    fn literal(&mut self, quote: char) -> Result<String, GrammarError> {
        let mut text = String::new();
        loop {
            match self.character()? {
                (c, false) if c == quote => return Ok(text),
                (c, _) => text.push(c),
            }
        }
    }

    /// A class as a regular expression writes it.
    fn class(&mut self) -> Result<String, GrammarError> {
        let mut class = String::from("[");
        if let Some(rest) = self.0.strip_prefix('^') {
            class.push('^');
            self.0 = rest;
        }
        let mut empty = true;
        loop {
            match self.character()? {
                (']', false) if empty => return Err(refused("must have a character in each class")),
                (']', false) => return Ok(class + "]"),
                ('-', false) if !empty && !self.0.starts_with(']') => class.push('-'),
                (c, _) => write!(class, "\\x{{{:x}}}", u32::from(c)).expect("a String takes all"),
            }
            empty = false;
        }
    }

    /// The next character of a literal or class, and whether it was escaped.
    fn character(&mut self) -> Result<(char, bool), GrammarError> {
        let unfinished = || refused("must close its texts and classes");
        let mut chars = self.0.chars();
        let c = chars.next().ok_or_else(unfinished)?;
        if c != '\\' {
            self.0 = chars.as_str();
            return Ok((c, false));
        }
        let escaped = chars.next().ok_or_else(unfinished)?;
        self.0 = chars.as_str();
        let digits = match escaped {
            'n' => return Ok(('\n', true)),
            'r' => return Ok(('\r', true)),
            't' => return Ok(('\t', true)),
            'x' => 2,
            'u' => 4,
            'U' => 8,
            other => return Ok((other, true)),
        };
        let malformed = || refused("must write escapes as \\x0a, \\u000a or \\U0000000a");
        let code = self.0.get(..digits).ok_or_else(malformed)?;
        self.0 = &self.0[digits..];
        let code = u32::from_str_radix(code, 16).ok().and_then(char::from_u32);
        code.map(|c| (c, true)).ok_or_else(malformed)
    }
}
