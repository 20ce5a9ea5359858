//! The collector: where it is, how it is reached, and what it answers.
//!
//! The setting says where, OpenTelemetry's own variables say how; what they say and cannot be had is refused at the start.
//! Nothing is sent anywhere but to the one [`Endpoint`]: no redirect is followed, and no proxy of the environment is used.
//!
//! ureq sends, on the thread on which the library exports: the library's own client for hyper would need a runtime there, and
//! a second implementation of TLS beside it.

use std::{
    fmt, fs,
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use async_trait::async_trait;
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{Compression, Protocol, RetryPolicy, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceResponse;
use parking_lot::Mutex;
use prost::Message;
use serde::{Serialize, Serializer};
use ureq::{
    Agent,
    http::{HeaderMap, HeaderName, HeaderValue, Uri},
    tls::{Certificate, ClientCert, PemItem, PrivateKey, RootCerts, TlsConfig, parse_pem},
};

/// The path that collectors listen on, where an endpoint names none.
const PATH: &str = "/v1/traces";
/// How long a batch may take to be taken, attempts and pauses together. No attempt begins later, but one that is under way
/// then may end later: it has as long for itself.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The longest answer that is read, in bytes.
const MAX_ANSWER: u64 = 64 << 10;
/// Failures are not logged more often.
const COMPLAINTS: Duration = Duration::from_secs(60);

/// An http or https URL without credentials.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint(Uri);

/// Why a text is no endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it must be http://HOST:PORT or https://HOST:PORT, perhaps with a path, without credentials and query")]
pub struct EndpointError;

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

impl Serialize for Endpoint {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// How a collector is reached.
#[derive(Debug, Clone)]
pub struct Means {
    timeout: Duration,
    gzip: bool,
    headers: HeaderMap,
    tls: TlsConfig,
}

impl Means {
    /// As OpenTelemetry's variables say, those for traces before those for everything, and an empty one as if it were not there.
    /// Headers are put on what the library sends: it reads them itself too, but passes over what it cannot read, takes an empty
    /// variable for one that is there, and decodes twice what it is given.
    ///
    /// # Errors
    /// If one of them asks for what cannot be had.
    pub fn of(variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let given = |name: &str| {
            let names = ["OTEL_EXPORTER_OTLP_TRACES_", "OTEL_EXPORTER_OTLP_"].map(|begin| format!("{begin}{name}"));
            names.into_iter().find_map(|name| {
                let value = variable(&name).filter(|value| !value.is_empty())?;
                Some((name, value))
            })
        };
        if let Some((name, protocol)) = given("PROTOCOL") {
            ensure!(protocol == "http/protobuf", "{name}: http/protobuf is what is spoken");
        }
        let gzip = match given("COMPRESSION") {
            None => false,
            Some((name, compression)) => match compression.as_str() {
                "gzip" => true,
                "none" => false,
                _ => bail!("{name}: it must be gzip or none"),
            },
        };
        let timeout = match given("TIMEOUT") {
            None => TIMEOUT,
            Some((name, millis)) => {
                let millis = millis.parse().ok().filter(|millis| *millis > 0);
                Duration::from_millis(millis.with_context(|| format!("{name}: it must be milliseconds, at least 1"))?)
            }
        };
        let mut headers = HeaderMap::new();
        if let Some((variable, entries)) = given("HEADERS") {
            for entry in entries.split_terminator(',') {
                // They are secrets, so the refusal does not show them.
                let (name, value) = header(entry).with_context(|| {
                    format!(
                        "{variable}: it must be NAME=VALUE, with commas between several, and values percent-encoded"
                    )
                })?;
                headers.insert(name, value);
            }
        }
        let file = |name: &str| {
            let read = |(name, path): (String, String)| {
                fs::read(&path).map(|pem| (name.clone(), pem)).with_context(|| format!("{name}: {path}"))
            };
            given(name).map(read).transpose()
        };
        let mut tls = TlsConfig::builder();
        if let Some((name, pem)) = file("CERTIFICATE")? {
            tls = tls.root_certs(RootCerts::new_with_certs(&certificates(&name, &pem)?));
        }
        match (file("CLIENT_CERTIFICATE")?, file("CLIENT_KEY")?) {
            (None, None) => {}
            (Some((name, chain)), Some((key_name, key))) => {
                let key =
                    PrivateKey::from_pem(&key).ok().with_context(|| format!("{key_name}: no key in PEM is there"))?;
                tls = tls.client_cert(Some(ClientCert::new_with_certs(&certificates(&name, &chain)?, key)));
            }
            _ => bail!("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE and OTEL_EXPORTER_OTLP_CLIENT_KEY need each other"),
        }
        Ok(Self { timeout, gzip, headers, tls: tls.build() })
    }

    /// The library's exporter to this collector, and where it counts the spans that the collector says it did not take,
    /// behind a status that says it took them.
    pub(super) fn exporter(self, endpoint: &Endpoint) -> Result<(SpanExporter, Arc<AtomicU64>)> {
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .proxy(None)
            .timeout_global(Some(self.timeout))
            .tls_config(self.tls)
            .build()
            .new_agent();
        let rejected = Arc::new(AtomicU64::new(0));
        let client = Client {
            agent,
            endpoint: endpoint.clone(),
            headers: self.headers,
            rejected: rejected.clone(),
            last_complaint: Mutex::new(None),
        };
        let mut builder = SpanExporter::builder()
            .with_http()
            .with_http_client(client)
            .with_endpoint(endpoint.to_string())
            .with_protocol(Protocol::HttpBinary)
            .with_timeout(self.timeout)
            // As often as fits into that time.
            .with_retry_policy(RetryPolicy::recommended().with_max_retries(usize::MAX));
        if self.gzip {
            builder = builder.with_compression(Compression::Gzip);
        }
        Ok((builder.build()?, rejected))
    }
}

/// The header that an entry is, if it is one that can be sent.
fn header(entry: &str) -> Option<(HeaderName, HeaderValue)> {
    let (name, value) = entry.split_once('=')?;
    let value = percent_decoded(value.trim()).filter(|value| !value.is_empty() && value.is_ascii())?;
    let mut value = HeaderValue::from_str(&value).ok()?;
    // Shown nowhere.
    value.set_sensitive(true);
    Some((HeaderName::from_str(name.trim()).ok()?, value))
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut parts = text.split('%');
    let mut bytes = parts.next()?.as_bytes().to_vec();
    for part in parts {
        let (byte, rest) = part.split_at_checked(2)?;
        bytes.push(u8::from_str_radix(byte, 16).ok()?);
        bytes.extend(rest.as_bytes());
    }
    String::from_utf8(bytes).ok()
}

/// What a file has of certificates, at least one.
fn certificates(name: &str, pem: &[u8]) -> Result<Vec<Certificate<'static>>> {
    let mut certificates = Vec::new();
    for item in parse_pem(pem) {
        if let PemItem::Certificate(certificate) = item.ok().with_context(|| format!("{name}: it must be PEM"))? {
            certificates.push(certificate);
        }
    }
    ensure!(!certificates.is_empty(), "{name}: no certificate in PEM is there");
    Ok(certificates)
}

/// Sends what the library has written, and waits for the answer.
#[derive(Debug)]
struct Client {
    agent: Agent,
    endpoint: Endpoint,
    headers: HeaderMap,
    rejected: Arc<AtomicU64>,
    last_complaint: Mutex<Option<Instant>>,
}

impl Client {
    fn complain(&self, reason: &dyn fmt::Display) {
        let mut last = self.last_complaint.lock();
        if last.is_none_or(|last| last.elapsed() >= COMPLAINTS) {
            *last = Some(Instant::now());
            tracing::warn!(endpoint = %self.endpoint, %reason, "traces are not taken by the collector");
        }
    }
}

#[async_trait]
impl HttpClient for Client {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (mut parts, body) = request.into_parts();
        for (name, value) in &self.headers {
            parts.headers.insert(name.clone(), value.clone());
        }
        let response =
            self.agent.run(Request::from_parts(parts, &body[..])).inspect_err(|error| self.complain(error))?;
        let (parts, mut body) = response.into_parts();
        // What cannot be read is no reason to send the spans twice.
        let answer = body.with_config().limit(MAX_ANSWER).read_to_vec().unwrap_or_default();
        if parts.status.is_success() {
            let answer = ExportTraceServiceResponse::decode(&answer[..]).unwrap_or_default();
            let rejected = answer.partial_success.map_or(0, |partial| partial.rejected_spans);
            if let Some(rejected) = u64::try_from(rejected).ok().filter(|rejected| *rejected > 0) {
                self.rejected.fetch_add(rejected, Ordering::Relaxed);
                self.complain(&format_args!("it rejects {rejected} spans"));
            }
        } else {
            self.complain(&parts.status);
        }
        Ok(Response::from_parts(parts, answer.into()))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

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

    fn means(variables: &[(&str, &str)]) -> Result<Means> {
        let variables: BTreeMap<_, _> = variables.iter().copied().collect();
        Means::of(|name| variables.get(name).map(|value| (*value).to_owned()))
    }

    #[test]
    fn a_variable_for_traces_goes_before_the_one_for_everything_and_an_empty_one_is_none() {
        let both = [("OTEL_EXPORTER_OTLP_TIMEOUT", "3000"), ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "200")];
        assert_eq!(means(&both).unwrap().timeout, Duration::from_millis(200));
        assert_eq!(means(&both[..1]).unwrap().timeout, Duration::from_secs(3));
        assert_eq!(means(&[("OTEL_EXPORTER_OTLP_TIMEOUT", "")]).unwrap().timeout, TIMEOUT);
        assert!(means(&[("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")]).unwrap().gzip);
        let headers = |value| {
            let variables = [("OTEL_EXPORTER_OTLP_TRACES_HEADERS", value), ("OTEL_EXPORTER_OTLP_HEADERS", "a=b,c=d")];
            means(&variables).unwrap().headers
        };
        assert_eq!((headers("")["a"].as_bytes(), headers("").len()), (&b"b"[..], 2));
        assert_eq!((headers("a=e")["a"].as_bytes(), headers("a=e").len()), (&b"e"[..], 1));
    }

    #[test]
    fn headers_that_would_not_be_sent_are_refused_without_showing_them() {
        let taken = ["a=b value", "api-key=s%20ecret%3D, x-scope = evaluation ,", "authorization=Basic c2VjcmV0Cg=="];
        let decoded = [
            &[("a", "b value")][..],
            &[("api-key", "s ecret="), ("x-scope", "evaluation")],
            &[("authorization", "Basic c2VjcmV0Cg==")],
        ];
        for (value, decoded) in taken.into_iter().zip(decoded) {
            let known = means(&[("OTEL_EXPORTER_OTLP_HEADERS", value)]).unwrap();
            let mut headers: Vec<_> =
                known.headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
            headers.sort_unstable();
            assert_eq!(headers, decoded);
            let shown = format!("{known:?}");
            assert!(decoded.iter().all(|(_, value)| !shown.contains(value)), "{shown}");
        }
        for value in [
            "secret",
            "=secret",
            "a=",
            "a b=secret",
            "a=b,secret",
            "a=secret%4",
            "a=secret%xx",
            "a=secret%C3%B6",
            "a=%ff",
        ] {
            for name in ["OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS"] {
                let refusal = format!("{:#}", means(&[(name, value)]).unwrap_err());
                assert!(refusal.contains(name) && !refusal.contains("secret"), "{value}: {refusal}");
            }
        }
    }

    #[test]
    fn certificates_and_a_key_in_pem_are_taken_together() {
        let rcgen::CertifiedKey { cert, signing_key } = rcgen::generate_simple_self_signed(["a".to_owned()]).unwrap();
        let folder = tempfile::TempDir::new().unwrap();
        let file = |name: &str, pem: String| {
            let path = folder.path().join(name);
            fs::write(&path, pem).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let (certificates, key) =
            (file("cert.pem", cert.pem() + &cert.pem()), file("key.pem", signing_key.serialize_pem()));
        let given = [
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", &*certificates),
            ("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", &certificates),
            ("OTEL_EXPORTER_OTLP_CLIENT_KEY", &key),
        ];
        let tls = means(&given).unwrap().tls;
        assert_eq!(tls.client_cert().map(|shown| shown.certs().len()), Some(2));
        assert!(matches!(tls.root_certs(), RootCerts::Specific(roots) if roots.len() == 2));
        let swapped =
            [("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", &*key), ("OTEL_EXPORTER_OTLP_CLIENT_KEY", &certificates)];
        assert!(means(&swapped).is_err());
    }

    #[test]
    fn what_the_variables_ask_for_and_cannot_be_had_is_refused_by_name() {
        let empty = tempfile::NamedTempFile::new().unwrap();
        let empty = empty.path().to_str().unwrap();
        for (name, value, accepted) in [
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "http/protobuf"),
            ("OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "zstd", "gzip"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s", "milliseconds"),
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/there/is/none", "/there/is/none"),
            ("OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE", empty, "no certificate"),
            ("OTEL_EXPORTER_OTLP_CLIENT_KEY", empty, "need each other"),
        ] {
            let refusal = format!("{:#}", means(&[(name, value)]).unwrap_err());
            assert!(refusal.contains(name) && refusal.contains(accepted), "{refusal}");
        }
    }
}
