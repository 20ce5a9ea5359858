//! Python's methods on template values: minijinja-contrib's and a few more, with the cost of those that can make much
//! out of little charged before they run.

use minijinja::value::{ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};

/// Widest field and longest precision of `str.format`.
const MAX_FORMAT_DIGITS: usize = 3;

/// The engine's hook for methods it does not know.
pub(crate) fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        match name {
            "split" | "splitlines" | "rsplit" => charge_pieces(state, text, name, args)?,
            "format" => charge_format(state, text, args)?,
            _ => {}
        }
        match name {
            "rsplit" => return rsplit(text, args),
            "removeprefix" => {
                let (prefix,): (&str,) = from_args(args)?;
                return Ok(Value::from(text.strip_prefix(prefix).unwrap_or(text)));
            }
            "removesuffix" => {
                let (suffix,): (&str,) = from_args(args)?;
                return Ok(Value::from(text.strip_suffix(suffix).unwrap_or(text)));
            }
            _ => {}
        }
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

/// `str.rsplit` with a separator.
fn rsplit(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (separator, limit): (&str, Option<i64>) = from_args(args)?;
    if separator.is_empty() {
        return Err(Error::new(ErrorKind::InvalidOperation, "rsplit: empty separator"));
    }
    let limit = limit.and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX).saturating_add(1);
    let mut pieces: Vec<Value> = text.rsplitn(limit, separator).map(Value::from).collect();
    pieces.reverse();
    Ok(Value::from(pieces))
}

/// Each piece becomes a value, however short it is.
fn charge_pieces(state: &State, text: &str, name: &str, args: &[Value]) -> Result<(), Error> {
    let separator = args.first().and_then(Value::as_str).filter(|s| !s.is_empty());
    let pieces = match (name, separator) {
        ("splitlines", _) => text.bytes().filter(|&b| b == b'\n').count(),
        (_, Some(separator)) => text.matches(separator).count(),
        (_, None) => text.bytes().filter(u8::is_ascii_whitespace).count(),
    };
    state.consume_fuel(pieces as u64)
}

/// Every field may write the longest argument; widths are limited outright.
fn charge_format(state: &State, format: &str, args: &[Value]) -> Result<(), Error> {
    let mut digits = 0;
    for byte in format.bytes() {
        digits = if byte.is_ascii_digit() { digits + 1 } else { 0 };
        if digits > MAX_FORMAT_DIGITS {
            return Err(Error::new(ErrorKind::InvalidOperation, "format: field too wide"));
        }
    }
    let fields = format.bytes().filter(|&b| b == b'{').count();
    let longest = args.iter().map(|arg| if arg.kind() == ValueKind::String { arg.len().unwrap_or(0) } else { 0 });
    // A string's length is in characters of up to four bytes; an engine's unit of fuel pays for 64 bytes.
    let bytes = longest.max().unwrap_or(0).saturating_mul(4).saturating_add(1000).saturating_mul(fields);
    state.consume_fuel(bytes as u64 / 64)
}
