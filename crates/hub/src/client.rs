//! HTTP as a pull needs it: redirects that keep the token at home, typed failures, retries with back-off.

use std::{
    fs,
    io::{self, Read},
    time::Duration,
};

use ureq::{
    Agent, Body,
    http::{HeaderName, Response, Uri, header},
    tls::{PemItem, RootCerts, TlsConfig},
};

use crate::{
    Event, HubError, Options, Progress,
    error::{at, shown},
};

const MAX_REDIRECTS: usize = 10;

/// A hub's header for the digest of a file that is kept elsewhere, and that for its size.
pub(crate) const LINKED_ETAG: HeaderName = HeaderName::from_static("x-linked-etag");
pub(crate) const LINKED_SIZE: HeaderName = HeaderName::from_static("x-linked-size");

/// Scheme, host and port.
type Origin = (String, String, u16);

pub(crate) struct Client<'a> {
    agent: Agent,
    options: &'a Options,
    progress: &'a Progress<'a>,
    /// The only place that may see the token.
    hub: Origin,
}

impl<'a> Client<'a> {
    pub(crate) fn new(options: &'a Options, progress: &'a Progress<'a>) -> Result<Self, HubError> {
        let hub = options.endpoint.parse().ok().filter(|uri: &Uri| uri.query().is_none()).and_then(|uri| origin(&uri));
        let Some(hub) = hub else {
            let reason = format!("{:?} is not http(s)://HOST without credentials", shown(&options.endpoint));
            return Err(HubError::Setting { name: "HF_ENDPOINT", reason });
        };
        let mut tls = TlsConfig::builder();
        if let Some(file) = &options.ca_file {
            let pem = at(file, fs::read(file))?;
            let certificates: Vec<_> = ureq::tls::parse_pem(&pem)
                .filter_map(|item| match item {
                    Ok(PemItem::Certificate(certificate)) => Some(certificate),
                    _ => None,
                })
                .collect();
            if certificates.is_empty() {
                let reason = format!("{} has no PEM certificate", file.display());
                return Err(HubError::Setting { name: "SSL_CERT_FILE", reason });
            }
            tls = tls.root_certs(RootCerts::new_with_certs(&certificates));
        }
        let config = Agent::config_builder()
            .tls_config(tls.build())
            .http_status_as_error(false)
            // Redirects are followed here, where the token's rule is.
            .max_redirects(0)
            // A resumed file must be the same bytes: no compression on the way.
            .accept_encoding("identity")
            .user_agent(concat!("baton/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(options.stall))
            .timeout_recv_response(Some(options.stall))
            .timeout_per_read(Some(options.stall))
            .timeout_per_write(Some(options.stall))
            .build();
        Ok(Client { agent: config.new_agent(), options, progress, hub })
    }

    /// Asks for a file from byte `from` on. Besides success, 416 is an answer: there is nothing from there on.
    pub(crate) fn get(&self, url: &str, from: u64) -> Result<Response<Body>, HubError> {
        self.request("GET", url, from)
    }

    /// Asks for a file's size and validator, with retries. A hub gives them beside its redirect to where the file is,
    /// which is then not followed.
    pub(crate) fn head(&self, url: &str) -> Result<Response<Body>, HubError> {
        self.retrying(url, || self.request("HEAD", url, 0))
    }

    /// A whole document of at most `limit` bytes, with retries.
    pub(crate) fn document(&self, url: &str, limit: u64) -> Result<Vec<u8>, HubError> {
        self.retrying(url, || {
            let mut bytes = Vec::new();
            let body = self.get(url, 0)?.into_body().into_reader();
            body.take(limit + 1).read_to_end(&mut bytes).map_err(|e| self.failure(url, e.into()))?;
            if bytes.len() as u64 > limit {
                let reason = format!("the answer is longer than {limit} bytes");
                return Err(HubError::Answer { url: shown(url), reason });
            }
            Ok(bytes)
        })
    }

    pub(crate) fn retry(&self) -> Retry<'_> {
        Retry { options: self.options, progress: self.progress, failed: 0 }
    }

    fn retrying<T>(&self, url: &str, mut ask: impl FnMut() -> Result<T, HubError>) -> Result<T, HubError> {
        let mut retry = self.retry();
        loop {
            match ask() {
                Ok(answer) => return Ok(answer),
                Err(error) => retry.wait(&shown(url), error)?,
            }
        }
    }

    fn request(&self, method: &str, url: &str, from: u64) -> Result<Response<Body>, HubError> {
        let bad = |url: &str, reason| HubError::Redirect { url: shown(url), reason };
        let mut url = url.to_owned();
        for _ in 0..=MAX_REDIRECTS {
            let uri: Uri = url.parse().map_err(|_| bad(&url, "it is not a URL"))?;
            let origin = origin(&uri).ok_or_else(|| bad(&url, "it is not an http(s) URL without credentials"))?;
            let mut request = ureq::http::Request::builder().method(method).uri(&uri);
            if from > 0 {
                request = request.header(header::RANGE, format!("bytes={from}-"));
            }
            if let (Some(token), true) = (&self.options.token, origin == self.hub) {
                request = request.header(header::AUTHORIZATION, format!("Bearer {}", token.0));
            }
            let request = request.body(()).map_err(|_| bad(&url, "it is not a URL"))?;
            let response = self.agent.run(request).map_err(|e| self.failure(&url, e))?;
            let status = response.status().as_u16();
            match status {
                200 | 206 | 416 => return Ok(response),
                _ if method == "HEAD" && response.headers().contains_key(LINKED_ETAG) => return Ok(response),
                301 | 302 | 303 | 307 | 308 => {
                    let location =
                        text(&response, header::LOCATION).ok_or_else(|| bad(&url, "a redirect to nowhere"))?;
                    let next = join(&uri, location);
                    if origin.0 == "https" && !next.starts_with("https://") {
                        return Err(bad(&url, "a redirect from https to http"));
                    }
                    url = next;
                }
                401 | 403 => return Err(HubError::Denied { url: shown(url), status }),
                404 | 410 => return Err(HubError::NotFound { url: shown(url) }),
                _ => {
                    let seconds = text(&response, header::RETRY_AFTER).and_then(|t| t.trim().parse().ok());
                    let retry_after = seconds.map(Duration::from_secs);
                    return Err(HubError::Status { url: shown(url), status, retry_after });
                }
            }
        }
        Err(bad(&url, "more than 10 redirects"))
    }

    /// Types a failure of the HTTP library.
    pub(crate) fn failure(&self, url: &str, error: ureq::Error) -> HubError {
        match error {
            ureq::Error::Timeout(_) => HubError::Stalled { url: shown(url), after: self.options.stall },
            // So rustls says that it refuses a certificate, or was refused.
            ureq::Error::Io(cause) if cause.kind() == io::ErrorKind::InvalidData => {
                HubError::Tls { url: shown(url), cause: cause.into() }
            }
            error => HubError::Connection { url: shown(url), cause: error.into() },
        }
    }
}

/// Counts failures in a row and waits between them.
pub(crate) struct Retry<'a> {
    options: &'a Options,
    progress: &'a Progress<'a>,
    failed: u32,
}

impl Retry<'_> {
    /// Something came: failures are counted anew.
    pub(crate) fn progressed(&mut self) {
        self.failed = 0;
    }

    /// Waits before the next try, or gives the error back.
    pub(crate) fn wait(&mut self, what: &str, error: HubError) -> Result<(), HubError> {
        if !error.is_transient() {
            return Err(error);
        }
        self.failed += 1;
        let backoff = self.options.backoff.saturating_mul(1 << (self.failed - 1).min(16)).min(Options::MAX_BACKOFF);
        let delay = error.retry_after().unwrap_or(backoff);
        if self.failed >= self.options.tries || delay > Options::MAX_RETRY_AFTER {
            return Err(HubError::GaveUp { tries: self.failed, last: Box::new(error) });
        }
        (self.progress)(Event::Retry { what, error: &error, delay });
        (self.options.sleep)(delay);
        Ok(())
    }
}

/// A header's value as text.
pub(crate) fn text(response: &Response<Body>, name: HeaderName) -> Option<&str> {
    response.headers().get(name)?.to_str().ok()
}

/// The body's length, if the server says it.
pub(crate) fn content_length(response: &Response<Body>) -> Option<u64> {
    text(response, header::CONTENT_LENGTH)?.trim().parse().ok()
}

/// `None` for anything but http(s)://HOST[:PORT] without credentials.
fn origin(uri: &Uri) -> Option<Origin> {
    let scheme = uri.scheme_str()?;
    let default = match scheme {
        "http" => 80,
        "https" => 443,
        _ => return None,
    };
    let authority = uri.authority().filter(|a| !a.as_str().contains('@'))?;
    Some((scheme.into(), authority.host().to_ascii_lowercase(), authority.port_u16().unwrap_or(default)))
}

/// A redirect's target (RFC 3986, without dot segments: servers do not send them).
fn join(base: &Uri, location: &str) -> String {
    let scheme = base.scheme_str().unwrap_or_default();
    let authority = base.authority().map_or("", |a| a.as_str());
    if location.contains("://") && !location.starts_with('/') {
        location.into()
    } else if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else {
        let folder = base.path().rsplit_once('/').map_or("", |(folder, _)| folder);
        format!("{scheme}://{authority}{folder}/{location}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_are_joined_to_where_they_were_met() {
        let base: Uri = "http://h:1/a/b?q".parse().unwrap();
        for (location, url) in [
            ("https://cdn/x?s=http://y", "https://cdn/x?s=http://y"),
            ("//cdn/x", "http://cdn/x"),
            ("/x?u=http://y", "http://h:1/x?u=http://y"),
            ("c", "http://h:1/a/c"),
        ] {
            assert_eq!(join(&base, location), url);
        }
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let of = |text: &str| origin(&text.parse().unwrap());
        assert_eq!(of("https://Host/x"), of("https://host:443/y"));
        assert_ne!(of("https://host/"), of("http://host/"));
        assert_ne!(of("http://host:1/"), of("http://host:2/"));
        assert_ne!(of("http://a.host/"), of("http://host/"));
        assert_eq!(of("http://user@host/"), None);
        assert_eq!(of("ftp://host/"), None);
    }
}
