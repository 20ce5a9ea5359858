//! Where a request stands in a distributed trace, by W3C's `traceparent`.
//!
//! A header that is not exactly as the standard has it is none, and the request begins a trace of its own.

use http::HeaderMap;

const TRACEPARENT: &str = "traceparent";

/// The place of a request in a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceContext {
    /// The trace. Not 0.
    pub trace_id: u128,
    /// The span that the request was sent in; `None`: the trace begins here.
    pub parent_id: Option<u64>,
    /// The span of the request itself. Not 0.
    pub span_id: u64,
    /// Whether whoever began the trace wants it recorded; true of a trace that begins here.
    pub sampled: bool,
}

impl TraceContext {
    /// The place that a request is sent from, if it says so.
    pub(crate) fn incoming(headers: &HeaderMap) -> Option<Self> {
        let mut given = headers.get_all(TRACEPARENT).iter();
        let (Some(header), None) = (given.next(), given.next()) else { return None };
        let (trace_id, parent_id, sampled) = parse(header.to_str().ok()?)?;
        Some(Self { trace_id, parent_id: Some(parent_id), span_id: id(), sampled })
    }

    /// The beginning of a trace.
    pub(crate) fn root() -> Self {
        Self { trace_id: u128::from(id()) << 64 | u128::from(id()), parent_id: None, span_id: id(), sampled: true }
    }
}

fn id() -> u64 {
    // Drawn once more in the one case of 2^64 that means no id.
    std::iter::repeat_with(rand::random).find(|id| *id != 0).expect("there is no end of random numbers")
}

/// Trace, parent and whether it is sampled: `00-<32 hex digits>-<16>-<2>`. Later versions may have more behind that.
fn parse(header: &str) -> Option<(u128, u64, bool)> {
    let mut parts = header.split('-');
    let mut number = |digits| hex(parts.next()?, digits);
    let (version, trace, parent, flags) = (number(2)?, number(32)?, number(16)?, number(2)?);
    let known = version == 0 && parts.next().is_none() || (1..0xff).contains(&version);
    (known && trace != 0 && parent != 0).then_some((trace, parent as u64, flags & 1 == 1))
}

/// A number in exactly so many lower-case hex digits.
fn hex(text: &str, digits: usize) -> Option<u128> {
    let lower = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    (text.len() == digits && text.bytes().all(lower)).then(|| u128::from_str_radix(text, 16).ok())?
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

    fn incoming(given: &[&str]) -> Option<TraceContext> {
        let mut headers = HeaderMap::new();
        given.iter().for_each(|value| _ = headers.append(TRACEPARENT, HeaderValue::from_str(value).unwrap()));
        TraceContext::incoming(&headers)
    }

    #[test]
    fn a_traceparent_is_taken_with_its_ids_and_its_flag() {
        for (flags, sampled) in [("01", true), ("00", false), ("03", true), ("02", false)] {
            let context = incoming(&[&format!("00-{TRACE}-b7ad6b7169203331-{flags}")]).unwrap();
            assert_eq!(format!("{:032x}", context.trace_id), TRACE);
            assert_eq!((context.parent_id, context.sampled), (Some(0xb7ad_6b71_6920_3331), sampled));
        }
        assert!(incoming(&[&format!("cc-{TRACE}-b7ad6b7169203331-01-what-comes")]).is_some());
    }

    #[test]
    fn anything_else_is_no_traceparent() {
        let well = format!("00-{TRACE}-b7ad6b7169203331-01");
        let upper = TRACE.to_uppercase();
        let bad = [
            "",
            "00",
            &well[..54],
            &format!("{well}-"),
            &format!("{well}0"),
            &format!("ff-{TRACE}-b7ad6b7169203331-01"),
            &format!("0-{TRACE}-b7ad6b7169203331-01"),
            &format!("00-{upper}-b7ad6b7169203331-01"),
            &format!("00-{TRACE}-0000000000000000-01"),
            &format!("00-{:032}-b7ad6b7169203331-01", 0),
            &format!("00-{TRACE}-+7ad6b7169203331-01"),
            &format!(" {well}"),
        ];
        bad.iter().for_each(|header| assert_eq!(incoming(&[header]), None, "{header}"));
        assert_eq!(incoming(&[&well, &well]), None, "twice");
        assert_eq!(incoming(&[]), None);
    }

    #[test]
    fn a_trace_that_begins_here_is_like_no_other() {
        let (one, other) = (TraceContext::root(), TraceContext::root());
        assert!(one.trace_id != other.trace_id && one.span_id != other.span_id && one.sampled);
        assert_eq!(one.parent_id, None);
    }
}
