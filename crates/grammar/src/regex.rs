//! Bounds on regular expressions that their parser does not have: length, depth of groups, and counts; and a correction of
//! what it makes of some classes.

use crate::{GrammarError, Limits};

/// Refuses an expression beyond the limits. Whether it is one at all its parser decides.
pub(crate) fn check(pattern: &str, limits: &Limits) -> Result<(), GrammarError> {
    if pattern.len() > limits.regex_bytes {
        let most = format!("a regular expression may have at most {} bytes", limits.regex_bytes);
        return Err(GrammarError::TooLarge(most));
    }
    // Of each open group and of the whole: how often at most its parts repeat what they repeat.
    let mut open = vec![1u64];
    // The same of what stands right before, which a repetition multiplies.
    let mut last = 1u64;
    let mut rest = pattern;
    while let Some(c) = rest.chars().next() {
        rest = &rest[c.len_utf8()..];
        match c {
            '\\' => rest = behind_escape(rest),
            '[' => rest = behind_class(rest),
            '(' => {
                open.push(1);
                if open.len() > limits.depth {
                    let most = format!("groups of a regular expression may be nested at most {} deep", limits.depth);
                    return Err(GrammarError::TooLarge(most));
                }
            }
            ')' if open.len() > 1 => {
                last = open.pop().unwrap_or(1);
                raise(&mut open, last);
                continue;
            }
            '{' => {
                let (inner, behind) = rest.split_once('}').unwrap_or((rest, ""));
                rest = behind;
                let numbers =
                    inner.split(',').map(str::trim).filter(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()));
                // A number too long to be read is a large one.
                let times = numbers.map(|n| n.parse().unwrap_or(u64::MAX)).max().unwrap_or(1).max(1);
                last = last.saturating_mul(times);
                if last > limits.repetitions {
                    return Err(GrammarError::TooLarge(format!(
                        "counts of a regular expression, multiplied where they are nested, may reach at most {}",
                        limits.repetitions
                    )));
                }
                raise(&mut open, last);
                continue;
            }
            _ => {}
        }
        last = 1;
    }
    Ok(())
}

/// The expression, but that classes which exclude something exclude NUL as well.
///
/// A class that has all control characters but not the quotation mark or the backslash (`[^"]`) would let `\"` through when
/// derivre 0.3 writes it for the inside of a JSON string: it takes a short cut there for classes that have all of them.
pub(crate) fn without_nul(pattern: &str) -> String {
    let mut out = String::with_capacity(pattern.len());
    let mut rest = pattern;
    while let Some(c) = rest.chars().next() {
        rest = &rest[c.len_utf8()..];
        out.push(c);
        match c {
            '\\' if rest.starts_with('P') => {
                // The complement of a property, as a class.
                let behind = behind_escape(rest);
                out.pop();
                out.push_str(r"[^\x00\p");
                out.push_str(&rest[1..rest.len() - behind.len()]);
                out.push(']');
                rest = behind;
            }
            '\\' => {
                let escaped = rest.chars().next();
                out.extend(escaped);
                rest = &rest[escaped.map_or(0, char::len_utf8)..];
            }
            '[' => {
                let behind = behind_class(rest);
                let mut class = &rest[..rest.len() - behind.len()];
                if let Some(excluded) = class.strip_prefix('^') {
                    out.push_str(r"^\x00");
                    class = excluded;
                    // What would no longer come first.
                    if class.starts_with(['-', ']']) {
                        out.push('\\');
                    }
                }
                out.push_str(class);
                rest = behind;
            }
            _ => {}
        }
    }
    out
}

fn raise(open: &mut [u64], times: u64) {
    if let Some(innermost) = open.last_mut() {
        *innermost = (*innermost).max(times);
    }
}

/// Behind an escape such as `\n`, `\x{41}` or `\p{Greek}`, whose braces are no count.
fn behind_escape(rest: &str) -> &str {
    let mut chars = rest.chars();
    let kind = chars.next();
    match (kind, chars.as_str().strip_prefix('{')) {
        (Some('x' | 'u' | 'U' | 'p' | 'P'), Some(inner)) => inner.split_once('}').map_or("", |(_, behind)| behind),
        // A property of one letter.
        (Some('p' | 'P'), None) => {
            chars.next();
            chars.as_str()
        }
        _ => chars.as_str(),
    }
}

/// Behind the first bracket that may end a class. Of nested classes the rest is read as text, which counts nothing less.
fn behind_class(rest: &str) -> &str {
    let rest = rest.strip_prefix('^').unwrap_or(rest);
    let mut escaped = false;
    let ends = |(at, c): &(usize, char)| {
        let escapes = !escaped && *c == '\\';
        let literal = std::mem::replace(&mut escaped, escapes);
        // A bracket that comes first is one of the class.
        *c == ']' && !literal && *at > 0
    };
    let end = rest.char_indices().find(ends);
    end.map_or("", |(at, _)| &rest[at + 1..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_that_exclude_exclude_nul_too() {
        let cases = [
            ("[^\"]*", r#"[^\x00"]*"#),
            (r"[^]a]b[^-z]", r"[^\x00\]a]b[^\x00\-z]"),
            (r"\[^a[b^c]\\[^\]]", r"\[^a[b^c]\\[^\x00\]]"),
            (r"\PL\P{Greek}\d\pL", r"[^\x00\pL][^\x00\p{Greek}]\d\pL"),
            ("[", "["),
            ("é[^é", "é[^\\x00é"),
            ("a\\", "a\\"),
        ];
        for (pattern, expected) in cases {
            assert_eq!(without_nul(pattern), expected, "{pattern}");
        }
    }

    #[test]
    fn counts_multiply_where_they_are_nested_and_only_there() {
        let limits = Limits { repetitions: 100, depth: 4, regex_bytes: 60, ..Limits::default() };
        let good = [
            "a{100}b{100}",
            "(a{10}){10}",
            "(a{2}|b{10}){10}",
            r"\x{2000}\p{Greek}\u{20000}",
            "[{300}]",
            r"[\]{300}]",
            "[]{300}]",
            r"\{300}",
            "(((a)))",
            "a{,3}{x}",
        ];
        for pattern in good {
            assert_eq!(check(pattern, &limits), Ok(()), "{pattern}");
        }
        let bad = [
            "a{101}",
            "a{3,101}",
            "a{99999999999999999999999}",
            "(a{11}){10}",
            "a{11}{10}",
            "((a{5}){5}){5}",
            "(x(a{11})y){10}",
            r"[{](a{11}){10}",
            r"[\]{](a{11}){10}",
            r"\\(a{11}){10}",
            "((((a))))",
            &"a".repeat(61),
        ];
        for pattern in bad {
            assert!(check(pattern, &limits).is_err(), "{pattern}");
        }
    }
}
