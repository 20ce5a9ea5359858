//! `tojson` as chat templates expect it: Python's `json.dumps(value, ensure_ascii=False)`, as transformers sets it up,
//! which keeps keys in order and escapes nothing for HTML.

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

/// Nesting that is written; Python gives up near 1000.
const MAX_DEPTH: usize = 200;
/// Longest indentation and separator: they are repeated, so a long one could be made to fill the memory.
const MAX_INDENT: usize = 16;

/// The filter: `tojson(ensure_ascii=false, indent=none, separators=none, sort_keys=false)`.
pub(crate) fn tojson(state: &State, value: Value, args: Rest<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    // jinja2's own filter takes `indent` first, transformers' `ensure_ascii`; a number can only mean the former.
    let (mut ensure_ascii, mut indent) = (kwargs.get("ensure_ascii")?, kwargs.get::<Option<Value>>("indent")?);
    match args.first() {
        Some(flag) if flag.kind() == ValueKind::Bool => ensure_ascii = Some(flag.is_true()),
        Some(width) => indent = Some(width.clone()),
        None => {}
    }
    let separators = kwargs.get::<Option<Vec<String>>>("separators")?;
    let sort_keys = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    kwargs.assert_all_used()?;
    let indent = match indent.filter(|i| !i.is_none() && !i.is_undefined()) {
        None => None,
        Some(text) if text.as_str().is_some() => text.as_str().map(str::to_owned),
        Some(width) => {
            let width = width.as_i64().ok_or_else(|| invalid("tojson: indent is neither a number nor a string"))?;
            Some(" ".repeat(usize::try_from(width).unwrap_or(0).min(MAX_INDENT)))
        }
    };
    let (item, key) = match separators.as_deref() {
        None => (if indent.is_some() { "," } else { ", " }, ": "),
        Some([item, key]) => (item.as_str(), key.as_str()),
        Some(_) => return Err(invalid("tojson: separators is not a pair")),
    };
    if [item, key, indent.as_deref().unwrap_or_default()].iter().any(|text| text.len() > MAX_INDENT) {
        return Err(invalid("tojson: indent or separator too long"));
    }
    let mut writer = Writer {
        state,
        out: String::new(),
        ensure_ascii: ensure_ascii.unwrap_or(false),
        indent: indent.as_deref(),
        item,
        key,
        sort_keys,
    };
    writer.value(&value, 0)?;
    // Not marked safe: nothing is escaped in chat templates.
    Ok(Value::from(writer.out))
}

struct Writer<'a> {
    state: &'a State<'a, 'a>,
    out: String,
    ensure_ascii: bool,
    indent: Option<&'a str>,
    item: &'a str,
    key: &'a str,
    sort_keys: bool,
}

impl Writer<'_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        // Values share parts, so what is written can be far larger than what is stored: pay as it is written.
        self.state.consume_fuel(1)?;
        if depth > MAX_DEPTH {
            return Err(invalid("tojson: nested too deep"));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => self.out.push_str(&value.to_string()),
            ValueKind::Number => self.out.push_str(&python_float(f64::try_from(value.clone())?)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default())?,
            ValueKind::Seq | ValueKind::Iterable => {
                self.out.push('[');
                let mut any = false;
                for item in value.try_iter()? {
                    self.separate(&mut any, depth);
                    self.value(&item, depth + 1)?;
                }
                self.close(any, depth, ']');
            }
            ValueKind::Map => {
                let mut keys = value.try_iter()?.collect::<Vec<_>>();
                if self.sort_keys {
                    keys.sort();
                }
                self.out.push('{');
                let mut any = false;
                for key in keys {
                    self.separate(&mut any, depth);
                    self.map_key(&key)?;
                    self.out.push_str(self.key);
                    self.value(&value.get_item(&key)?, depth + 1)?;
                }
                self.close(any, depth, '}');
            }
            kind => return Err(invalid(format!("tojson: {kind} is not JSON serializable"))),
        }
        Ok(())
    }

    /// Before an item: the separator if one precedes it, and a line of its own where indented.
    fn separate(&mut self, any: &mut bool, depth: usize) {
        if std::mem::replace(any, true) {
            self.out.push_str(self.item);
        }
        self.line(depth + 1);
    }

    fn close(&mut self, any: bool, depth: usize, bracket: char) {
        if any {
            self.line(depth);
        }
        self.out.push(bracket);
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = self.indent {
            self.out.push('\n');
            self.out.push_str(&indent.repeat(depth));
        }
    }

    fn map_key(&mut self, key: &Value) -> Result<(), Error> {
        match key.kind() {
            ValueKind::String => self.string(key.as_str().unwrap_or_default()),
            ValueKind::None => self.string("null"),
            ValueKind::Bool => self.string(if key.is_true() { "true" } else { "false" }),
            ValueKind::Number if key.is_integer() => self.string(&key.to_string()),
            ValueKind::Number => self.string(&python_float(f64::try_from(key.clone())?)),
            kind => Err(invalid(format!("tojson: {kind} is not a key"))),
        }
    }

    fn string(&mut self, text: &str) -> Result<(), Error> {
        self.state.consume_fuel(text.len() as u64 / 16)?;
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && c > '~') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
        Ok(())
    }
}

fn invalid(message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

/// Python's `repr` of a float: shortest digits, an exponent below 1e-4 and from 1e16 on.
fn python_float(x: f64) -> String {
    if x.is_nan() {
        return "NaN".into();
    }
    if x.is_infinite() {
        return if x > 0.0 { "Infinity".into() } else { "-Infinity".into() };
    }
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if x != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let plain = format!("{x}");
    if plain.contains('.') { plain } else { plain + ".0" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use minijinja::{Environment, context};

    fn render(source: &str, json: &str) -> Result<String, Error> {
        let mut env = Environment::new();
        env.add_filter("tojson", tojson);
        let value: serde_json::Value = serde_json::from_str(json).unwrap();
        env.render_str(source, context! { x => Value::from(minijinja::value::Serde(value)) })
    }

    #[test]
    fn json_is_written_as_python_writes_it() {
        // Expected: json.dumps(x, ensure_ascii=False).
        let cases = [
            (
                r#"{"b":1,"a":[true,null,"<&'é\"\\\n\u0001\u007f/"]}"#,
                "{\"b\": 1, \"a\": [true, null, \"<&'é\\\"\\\\\\n\\u0001\u{7f}/\"]}",
            ),
            ("[]", "[]"),
            ("{}", "{}"),
            (
                "[1.0, 0.1, 1e16, 1e15, 0.0001, 0.00001, 1.5e-7, -0.0]",
                "[1.0, 0.1, 1e+16, 1000000000000000.0, 0.0001, 1e-05, 1.5e-07, -0.0]",
            ),
            (
                "[123456789012345678, -1, 18446744073709551615, 1e300]",
                "[123456789012345678, -1, 18446744073709551615, 1e+300]",
            ),
        ];
        for (json, expected) in cases {
            assert_eq!(render("{{ x | tojson }}", json).unwrap(), expected);
        }
    }

    #[test]
    fn json_options_are_those_of_transformers() {
        let json = r#"{"b":[1,{}],"a":"é😀"}"#;
        let cases = [
            ("{{ x | tojson(indent=2) }}", "{\n  \"b\": [\n    1,\n    {}\n  ],\n  \"a\": \"é😀\"\n}"),
            ("{{ x | tojson(sort_keys=true) }}", "{\"a\": \"é😀\", \"b\": [1, {}]}"),
            ("{{ x | tojson(ensure_ascii=true) }}", "{\"b\": [1, {}], \"a\": \"\\u00e9\\ud83d\\ude00\"}"),
            ("{{ x | tojson(separators=(',', ':')) }}", "{\"b\":[1,{}],\"a\":\"é😀\"}"),
            ("{{ x | tojson(indent=none) }}", "{\"b\": [1, {}], \"a\": \"é😀\"}"),
        ];
        for (source, expected) in cases {
            assert_eq!(render(source, json).unwrap(), expected, "{source}");
        }
        assert!(render("{{ x.missing | tojson }}", json).is_err());
        assert!(render("{{ x | tojson(color='red') }}", json).is_err());
    }
}
