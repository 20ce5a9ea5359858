//! Reading `multipart/form-data` (RFC 7578) as it arrives: what is kept in memory is one piece of the body.
//!
//! multer (and with it axum's extractor) is not used: it takes in all that has arrived before it gives any of it out, up to
//! the limit of the whole body, and has no other for the head of a part.

use std::time::Duration;

use axum::body::Body;
use http::HeaderMap;
use http::header::CONTENT_TYPE;
use http_body_util::BodyExt;
use tokio::time::{Instant, timeout_at};

use crate::error::ApiError;

/// Longest head of a part, in bytes.
const MAX_HEAD_BYTES: usize = 8 << 10;
/// Longest boundary, by RFC 2046.
const MAX_BOUNDARY_BYTES: usize = 70;
/// A body that arrives slower than this, in bytes per second, is given up once its time is over.
const MIN_RATE: u64 = 32 << 10;

/// A body of parts.
pub(crate) struct Multipart {
    body: Body,
    /// What ends a part: line break, two hyphens, boundary.
    delimiter: Vec<u8>,
    buffer: Vec<u8>,
    /// Bytes read of the body, and how many it may have.
    read: u64,
    limit: u64,
    begun: Instant,
    /// Time that the body has besides what its bytes take.
    patience: Duration,
    at: At,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum At {
    /// Before the first part or inside of one.
    Part,
    /// Just behind a delimiter.
    Delimiter,
    End,
}

/// The head of a part.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub name: String,
    pub filename: Option<String>,
}

impl Multipart {
    /// Begins to read a body of at most `limit` bytes.
    pub fn new(headers: &HeaderMap, body: Body, limit: u64, patience: Duration) -> Result<Self, ApiError> {
        let kind = headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
        let boundary = kind.and_then(boundary).ok_or_else(malformed)?;
        let delimiter = [b"\r\n--", boundary.as_bytes()].concat();
        // The first delimiter may stand at the very beginning.
        let buffer = b"\r\n".to_vec();
        let (begun, at) = (Instant::now(), At::Part);
        Ok(Self { body, delimiter, buffer, read: 0, limit, begun, patience, at })
    }

    /// The head of the next part, once the one before has been read; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Part>, ApiError> {
        while self.chunk().await?.is_some() {}
        if self.at == At::End {
            return Ok(None);
        }
        while self.buffer.len() < 2 {
            self.fill().await?;
        }
        match &self.buffer[..2] {
            b"--" => {
                // What comes behind the last part says nothing; it is read so that the client sees its reply.
                self.at = At::End;
                while self.fill_or_end().await? {
                    self.buffer.clear();
                }
                return Ok(None);
            }
            b"\r\n" => {}
            _ => return Err(malformed()),
        }
        let head = loop {
            if let Some(end) = find(&self.buffer, b"\r\n\r\n") {
                break self.buffer.drain(..end + 4).collect::<Vec<_>>();
            }
            if self.buffer.len() > MAX_HEAD_BYTES {
                return Err(malformed());
            }
            self.fill().await?;
        };
        self.at = At::Part;
        part(&head).ok_or_else(malformed).map(Some)
    }

    /// More of the part's content; `None` at its end.
    pub async fn chunk(&mut self) -> Result<Option<Vec<u8>>, ApiError> {
        if self.at != At::Part {
            return Ok(None);
        }
        loop {
            if let Some(end) = find(&self.buffer, &self.delimiter) {
                let content = self.buffer[..end].to_vec();
                self.buffer.drain(..end + self.delimiter.len());
                self.at = At::Delimiter;
                return Ok(Some(content));
            }
            // The last bytes may be the beginning of the delimiter.
            let safe = (self.buffer.len() + 1).saturating_sub(self.delimiter.len());
            if safe > 0 {
                return Ok(Some(self.buffer.drain(..safe).collect()));
            }
            self.fill().await?;
        }
    }

    /// The part's content as text of at most so many bytes.
    pub async fn text(&mut self, name: &str, max_bytes: usize) -> Result<String, ApiError> {
        let mut text = Vec::new();
        while let Some(chunk) = self.chunk().await? {
            text.extend(chunk);
            if text.len() > max_bytes {
                return Err(ApiError::out_of_range(name, format!("text of at most {max_bytes} bytes")));
            }
        }
        String::from_utf8(text).map_err(|_| ApiError::wrong_type(name, "text in UTF-8"))
    }

    /// Takes in more of the body, which must not end here.
    async fn fill(&mut self) -> Result<(), ApiError> {
        if self.fill_or_end().await? { Ok(()) } else { Err(malformed()) }
    }

    /// Takes in more of the body; false at its end.
    async fn fill_or_end(&mut self) -> Result<bool, ApiError> {
        loop {
            let deadline = self.begun + self.patience + Duration::from_secs(self.read / MIN_RATE);
            let frame = timeout_at(deadline, self.body.frame()).await.map_err(|_| ApiError::request_timeout())?;
            let Some(frame) = frame else { return Ok(false) };
            let frame = frame.map_err(|_| ApiError::body("could not be read to its end"))?;
            let Ok(data) = frame.into_data() else { continue };
            self.read += data.len() as u64;
            if self.read > self.limit {
                return Err(ApiError::request_too_large(self.limit as usize));
            }
            self.buffer.extend_from_slice(&data);
            return Ok(true);
        }
    }

    /// What is left of the body, for a refusal that is to be seen.
    pub fn into_rest(self) -> Body {
        self.body
    }
}

fn malformed() -> ApiError {
    ApiError::body("is not multipart/form-data with a boundary, as its content-type must say it is")
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    let first = wanted[0];
    let mut from = 0;
    while let Some(at) = bytes[from..].iter().position(|&byte| byte == first) {
        if bytes[from + at..].starts_with(wanted) {
            return Some(from + at);
        }
        from += at + 1;
    }
    None
}

/// The boundary that a content type names.
fn boundary(kind: &str) -> Option<&str> {
    let (kind, rest) = kind.split_once(';')?;
    if !kind.trim().eq_ignore_ascii_case("multipart/form-data") {
        return None;
    }
    let boundary = parameter(rest, "boundary")?;
    ((1..=MAX_BOUNDARY_BYTES).contains(&boundary.len()) && boundary.is_ascii()).then_some(boundary)
}

/// A parameter of a header's value, without its quotes. A quote inside of a quoted one is not read: browsers and libraries
/// write it as `%22`.
fn parameter<'a>(mut rest: &'a str, wanted: &str) -> Option<&'a str> {
    loop {
        rest = rest.trim_start_matches([';', ' ', '\t']);
        let (name, after) = rest.split_once('=')?;
        let value;
        (value, rest) = match after.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"')?,
            None => after.split_at(after.find(';').unwrap_or(after.len())),
        };
        if name.trim().eq_ignore_ascii_case(wanted) {
            return Some(value.trim());
        }
    }
}

/// What the head of a part says.
fn part(head: &[u8]) -> Option<Part> {
    let head = std::str::from_utf8(head).ok()?;
    let disposition = head.split("\r\n").find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.trim().eq_ignore_ascii_case("content-disposition").then_some(value)
    })?;
    let (kind, rest) = disposition.split_once(';')?;
    let filename = parameter(rest, "filename").map(str::to_owned);
    let name = parameter(rest, "name")?.to_owned();
    kind.trim().eq_ignore_ascii_case("form-data").then_some(Part { name, filename })
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::convert::Infallible;
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use bytes::Bytes;
    use http::HeaderValue;
    use hyper::body::Frame;

    use super::*;

    /// A body that arrives in these pieces.
    struct Pieces(VecDeque<Bytes>);

    impl axum::body::HttpBody for Pieces {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            Poll::Ready(self.0.pop_front().map(|piece| Ok(Frame::data(piece))))
        }
    }

    async fn read(kind: &'static str, bytes: &[u8], piece: usize) -> Result<Vec<(Part, Vec<u8>)>, ApiError> {
        let headers = HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static(kind))]);
        let pieces = bytes.chunks(piece).map(Bytes::copy_from_slice).collect();
        let body = Body::new(Pieces(pieces));
        let mut multipart = Multipart::new(&headers, body, 1 << 20, Duration::from_secs(5))?;
        let mut parts = Vec::new();
        while let Some(part) = multipart.next().await? {
            let mut content = Vec::new();
            while let Some(chunk) = multipart.chunk().await? {
                content.extend(chunk);
            }
            parts.push((part, content));
        }
        Ok(parts)
    }

    const KIND: &str = "multipart/form-data; charset=utf-8; boundary=\"-x y\"";
    const BODY: &[u8] = b"preamble\r\n---x y\r\ncontent-disposition: form-data; name=\"a\"\r\n\r\n\
        ---x z\r\n---x\r\r\n-\r\n---x y\r\nContent-Type: text/plain\r\nContent-Disposition: form-data; filename=\"f; name=g\";name=b\r\n\r\n\
        \r\n---x y\r\ncontent-disposition:form-data;name=c\r\n\r\n\r\n\r\n---x y--\r\nepilogue";

    #[tokio::test]
    async fn the_parts_are_the_same_however_the_body_is_cut() {
        let part =
            |name: &str, filename: Option<&str>| Part { name: name.into(), filename: filename.map(str::to_owned) };
        let expected = [
            (part("a", None), b"---x z\r\n---x\r\r\n-".to_vec()),
            (part("b", Some("f; name=g")), Vec::new()),
            (part("c", None), b"\r\n".to_vec()),
        ];
        for piece in 1..=BODY.len() {
            assert_eq!(read(KIND, BODY, piece).await.unwrap(), expected, "{piece}");
        }
        let at_once = &BODY[b"preamble\r\n".len()..];
        assert_eq!(read(KIND, at_once, 7).await.unwrap(), expected, "no preamble");
    }

    #[tokio::test]
    async fn what_is_cut_off_or_no_form_is_refused() {
        // The last part ends with the hyphens behind the last delimiter.
        for end in 0..BODY.len() - b"--\r\nepilogue".len() + 1 {
            assert!(read(KIND, &BODY[..end], 64).await.is_err(), "{end}");
        }
        for kind in
            ["application/json", "multipart/form-data", "multipart/mixed; boundary=x", "multipart/form-data; boundary="]
        {
            assert!(read(kind, BODY, 64).await.is_err(), "{kind}");
        }
        let form = |head: &str| format!("--b\r\n{head}\r\n\r\nx\r\n--b--");
        let long = format!("content-disposition: form-data; name={}", "x".repeat(2 * MAX_HEAD_BYTES));
        let heads =
            ["a: b", "content-disposition: attachment; name=a", "content-disposition: form-data; title=a", &long];
        for head in heads {
            assert!(read("multipart/form-data; boundary=b", form(head).as_bytes(), 64).await.is_err(), "{head:.60}");
        }
        let fine = form("content-disposition: form-data; name=a");
        assert_eq!(read("multipart/form-data; boundary=b", fine.as_bytes(), 64).await.unwrap().len(), 1);
    }

    #[tokio::test]
    async fn a_body_over_the_limit_is_given_up_on() {
        let body = [BODY, &vec![b'x'; 2 << 20]].concat();
        assert_eq!(read(KIND, &body, 4096).await.unwrap_err().code(), "request_too_large");
    }
}
