//! Server-sent events, the part that OpenAI streams use: `data:` lines, comments, blank lines.

/// Splits a byte stream into the payloads of its events. Bytes may be cut anywhere.
#[derive(Debug, Default)]
pub struct EventParser {
    line: Vec<u8>,
    data: String,
}

impl EventParser {
    /// Payloads completed by `bytes`.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut events = Vec::new();
        for &b in bytes {
            if b != b'\n' {
                self.line.push(b);
                continue;
            }
            let line = String::from_utf8_lossy(&self.line).trim_end_matches('\r').to_owned();
            self.line.clear();
            if line.is_empty() {
                if !self.data.is_empty() {
                    events.push(std::mem::take(&mut self.data));
                }
            } else if let Some(data) = line.strip_prefix("data:") {
                if !self.data.is_empty() {
                    self.data.push('\n');
                }
                self.data.push_str(data.strip_prefix(' ').unwrap_or(data));
            }
        }
        events
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_cut_of_the_bytes_gives_the_same_events() {
        let stream = "data: {\"a\":1}\n\n: keep-alive\n\ndata: é\r\ndata:two\n\ndata: [DONE]\n\n".as_bytes();
        let whole = EventParser::default().push(stream);
        assert_eq!(whole, ["{\"a\":1}", "é\ntwo", "[DONE]"]);
        for cut in 0..stream.len() {
            let mut parser = EventParser::default();
            let mut events = parser.push(&stream[..cut]);
            events.extend(parser.push(&stream[cut..]));
            assert_eq!(events, whole, "cut at {cut}");
        }
    }
}
