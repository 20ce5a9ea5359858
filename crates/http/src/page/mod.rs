//! The page at `/`: a chat with the model, and what the server does, for a browser.
//!
//! Its files are in the binary, and are all that it runs: the policy sent with each lets it load from and talk to this
//! server only, and make no markup out of text. It calls the API as any client does, so nothing here knows a model, a
//! key or a metric; a file is the same for everybody, and needs no key.

use std::sync::LazyLock;

use axum::extract::Path;
use axum::response::{IntoResponse, Response};
use http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, IF_NONE_MATCH, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use http::{HeaderMap, HeaderValue, StatusCode};
use sha2::{Digest, Sha256};

use crate::error::ApiError;

/// What the browser lets the page do.
const POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; \
     form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
);

const SCRIPT: &str = "text/javascript; charset=utf-8";

/// A file as it is sent.
struct File {
    name: &'static str,
    content_type: &'static str,
    text: &'static str,
    /// Of its text; weak, since it may be sent compressed.
    tag: HeaderValue,
}

impl File {
    fn new(name: &'static str, content_type: &'static str, text: &'static str) -> Self {
        let digest: String = Sha256::digest(text).iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        let tag = HeaderValue::try_from(format!("W/\"{digest}\"")).expect("hexadecimal digits in quotes");
        Self { name, content_type, text, tag }
    }

    /// The file, or that it is still the one that the browser has.
    fn send(&self, asked: &HeaderMap) -> Response {
        let headers = [
            (CONTENT_SECURITY_POLICY, POLICY),
            (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
            (REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
            // Kept, and asked for each time: another version of the server has other files.
            (CACHE_CONTROL, HeaderValue::from_static("no-cache")),
            (ETAG, self.tag.clone()),
        ];
        let known = asked.get_all(IF_NONE_MATCH).iter().filter_map(|tags| tags.to_str().ok());
        if known.flat_map(|tags| tags.split(',')).any(|tag| tag.trim() == self.tag) {
            return (StatusCode::NOT_MODIFIED, headers).into_response();
        }
        (headers, [(CONTENT_TYPE, self.content_type)], self.text).into_response()
    }
}

static INDEX: LazyLock<File> =
    LazyLock::new(|| File::new("index.html", "text/html; charset=utf-8", include_str!("index.html")));

/// What the index loads.
static FILES: LazyLock<[File; 16]> = LazyLock::new(|| {
    [
        File::new("style.css", "text/css; charset=utf-8", include_str!("style.css")),
        File::new("icon.svg", "image/svg+xml", include_str!("icon.svg")),
        File::new("theme.js", SCRIPT, include_str!("theme.js")),
        File::new("app.js", SCRIPT, include_str!("app.js")),
        File::new("api.js", SCRIPT, include_str!("api.js")),
        File::new("chart.js", SCRIPT, include_str!("chart.js")),
        File::new("charts.js", SCRIPT, include_str!("charts.js")),
        File::new("chat.js", SCRIPT, include_str!("chat.js")),
        File::new("dom.js", SCRIPT, include_str!("dom.js")),
        File::new("generations.js", SCRIPT, include_str!("generations.js")),
        File::new("metrics.js", SCRIPT, include_str!("metrics.js")),
        File::new("models.js", SCRIPT, include_str!("models.js")),
        File::new("reply.js", SCRIPT, include_str!("reply.js")),
        File::new("settings.js", SCRIPT, include_str!("settings.js")),
        File::new("sse.js", SCRIPT, include_str!("sse.js")),
        File::new("watch.js", SCRIPT, include_str!("watch.js")),
    ]
});

/// `GET /`.
pub(crate) async fn index(asked: HeaderMap) -> Response {
    INDEX.send(&asked)
}

/// `GET /page/{file}`.
pub(crate) async fn file(Path(name): Path<String>, asked: HeaderMap) -> Result<Response, ApiError> {
    let file = FILES.iter().find(|file| file.name == name).ok_or_else(ApiError::route_not_found)?;
    Ok(file.send(&asked))
}
