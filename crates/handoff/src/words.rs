//! Numbers and foreign text as people read them.

/// A number with at most five significant digits.
pub(crate) fn figure(value: f64) -> String {
    let magnitude = value.abs();
    if value == 0.0 || !value.is_finite() || value == value.trunc() && magnitude < 1e6 {
        format!("{value}")
    } else if (1e-3..1e4).contains(&magnitude) {
        let digits = (4 - magnitude.log10().floor() as i32).max(0) as usize;
        let text = format!("{value:.digits$}");
        if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
    } else {
        format!("{value:.2e}")
    }
}

/// Text from outside on one line: what a terminal or a reader could mistake (controls, line breaks, changes of
/// direction) is escaped, and nothing else, so that doing it twice changes nothing.
pub(crate) fn plain(text: &str) -> String {
    let shown = |c: char| match c {
        '"' | '\'' | '\\' => c.to_string(),
        _ => c.escape_debug().to_string(),
    };
    text.chars().map(shown).collect()
}

/// `"1 case"`, `"2 cases"`.
pub(crate) fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_five_digits_at_most_and_no_zeros_behind() {
        for (value, text) in [
            (0.0, "0"),
            (1.0, "1"),
            (0.123456, "0.12346"),
            (0.003, "0.003"),
            (1.0005, "1.0005"),
            (1.000049, "1"),
            (12.3456, "12.346"),
            (2345.67, "2345.7"),
            (9999.99, "10000"),
            (0.000123, "1.23e-4"),
            (123456.7, "1.23e5"),
            (f64::NAN, "NaN"),
            (f64::INFINITY, "inf"),
        ] {
            assert_eq!(figure(value), text);
        }
    }

    #[test]
    fn foreign_text_cannot_move_a_cursor_and_escaping_twice_is_once() {
        let once = plain("\u{1b}[2J a\nb \u{202e}evil \"c\" it's é 漢 \\n");
        assert_eq!(once, "\\u{1b}[2J a\\nb \\u{202e}evil \"c\" it's é 漢 \\n");
        assert_eq!(plain(&once), once);
    }
}
