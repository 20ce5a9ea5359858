//! How an error is sent, and what can be asked of one.

use std::time::Duration;

use axum::response::{IntoResponse, Response};
use http::header::{CONNECTION, CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderName, HeaderValue, StatusCode};
use serde::Serialize;

use super::{ApiError, Refusal, Retry};
use crate::json;

/// Longest message on the wire, in characters.
const MAX_MESSAGE_CHARS: usize = 300;

const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

impl ApiError {
    /// The error object as text.
    pub fn to_json(&self) -> Vec<u8> {
        json::write(&self.object())
    }

    /// The error object.
    pub fn object(&self) -> impl Serialize + '_ {
        #[derive(Serialize)]
        struct Body<'a> {
            error: Object<'a>,
        }
        #[derive(Serialize)]
        struct Object<'a> {
            message: &'a str,
            r#type: &'static str,
            param: Option<&'a str>,
            code: &'static str,
        }
        let error =
            Object { message: self.message(), r#type: self.kind, param: self.param.as_deref(), code: self.code };
        Body { error }
    }

    /// What is sent of its message.
    pub fn message(&self) -> &str {
        match self.message.char_indices().nth(MAX_MESSAGE_CHARS) {
            Some((end, _)) => &self.message[..end],
            None => &self.message,
        }
    }

    /// The path of the field to blame.
    pub fn param(&self) -> Option<&str> {
        self.param.as_deref()
    }

    /// The status to answer with, where nothing has been sent yet.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// When the same request may go well, if it may: there was no room for it, or nothing to answer it yet.
    pub fn retry_after(&self) -> Option<Duration> {
        match self.retry {
            Retry::After(seconds) => Some(Duration::from_secs(seconds.into())),
            Retry::Unsaid | Retry::Never => None,
        }
    }

    /// Whether the generation is to blame, and not the request, the load or a drain.
    pub fn is_breakdown(&self) -> bool {
        self.status == StatusCode::INTERNAL_SERVER_ERROR || self.code == "engine_down"
    }

    /// Why the request was not taken up, if that is what it says.
    pub fn refusal(&self) -> Option<Refusal> {
        self.refusal
    }

    /// The error's `code`.
    pub fn code(&self) -> &'static str {
        self.code
    }
}

/// The response carries the error, for the log and for routes that write it in another form.
impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, self.to_json()).into_response();
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        match self.retry {
            Retry::Unsaid => {}
            Retry::After(seconds) => {
                headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
            }
            Retry::Never => {
                headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
            }
        }
        if self.close {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response.extensions_mut().insert(self);
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_four_keys_are_present_and_the_message_is_bounded() {
        let json: serde_json::Value =
            serde_json::from_slice(&ApiError::invalid("stop", "x".repeat(1000)).to_json()).unwrap();
        let error = json["error"].as_object().unwrap();
        assert_eq!(error.keys().collect::<Vec<_>>(), ["message", "type", "param", "code"]);
        assert_eq!(error["message"].as_str().unwrap().len(), MAX_MESSAGE_CHARS);
    }
}
