//! Where spans go.

use std::fmt;
use std::str::FromStr;

use ureq::http::Uri;

/// The path that collectors listen on, where an endpoint names none.
const PATH: &str = "/v1/traces";

/// An http or https URL without credentials.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint(Uri);

/// Why a text is no endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it must be http://HOST:PORT or https://HOST:PORT, perhaps with a path, without credentials and query")]
pub struct EndpointError;

impl Endpoint {
    pub(crate) fn uri(&self) -> &Uri {
        &self.0
    }
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let uri: Uri = text.parse().map_err(|_| EndpointError)?;
        let authority = uri.authority().ok_or(EndpointError)?;
        let spoken = matches!(uri.scheme_str(), Some("http" | "https"));
        if !spoken || authority.host().is_empty() || authority.as_str().contains('@') || uri.query().is_some() {
            return Err(EndpointError);
        }
        if !matches!(uri.path(), "" | "/") {
            return Ok(Self(uri));
        }
        let mut parts = uri.into_parts();
        parts.path_and_query = PATH.parse().ok();
        Uri::from_parts(parts).map(Self).map_err(|_| EndpointError)
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_alone_gets_the_path_of_collectors_and_a_path_stays() {
        for (text, url) in [
            ("http://collector:4318", "http://collector:4318/v1/traces"),
            ("http://collector:4318/", "http://collector:4318/v1/traces"),
            ("https://[::1]/otlp/v1/traces", "https://[::1]/otlp/v1/traces"),
        ] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), url);
        }
        for text in [
            "",
            "collector:4318",
            "/v1/traces",
            "grpc://collector:4317",
            "http://",
            "http://user:password@collector",
            "http://collector/?key=1",
        ] {
            assert_eq!(text.parse::<Endpoint>(), Err(EndpointError), "{text}");
        }
    }
}
