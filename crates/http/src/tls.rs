//! TLS on the listeners, by rustls. What a server shows may be replaced: connections that come then see the new one.

use std::io;
use std::sync::Arc;

use parking_lot::RwLock;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// HTTP/2 as TLS names it.
const H2: &[u8] = b"h2";

/// What a server shows of itself, and what it asks of clients. TLS 1.2 and 1.3. Clones are the same.
#[derive(Debug, Clone)]
pub struct Tls(Arc<RwLock<Terms>>);

/// The same terms, with and without an offer of HTTP/2.
#[derive(Debug, Clone)]
struct Terms {
    http1: Arc<ServerConfig>,
    http2: Arc<ServerConfig>,
}

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The certificate file is none.
    #[error("the certificate file has no certificate in PEM form")]
    NoCertificate,
    /// The key file is none.
    #[error("the key file has no private key in PEM form (PKCS#8, PKCS#1 or SEC1)")]
    NoKey,
    /// The file of authorities is none.
    #[error("the file of client authorities has no certificate in PEM form that can be one")]
    NoAuthority,
    /// The two cannot be used, or not together.
    #[error("the certificate and the key cannot be used: {0}")]
    Unusable(#[source] rustls::Error),
}

impl Tls {
    /// Shows this chain of certificates, its own first, with its private key; all in PEM form. With authorities, a client
    /// must show a certificate that one of them has signed.
    ///
    /// # Errors
    /// If a file has not what it should, or the key is another certificate's.
    pub fn new(chain: &[u8], key: &[u8], client_authorities: Option<&[u8]>) -> Result<Self, TlsError> {
        let chain = certificates(chain).ok_or(TlsError::NoCertificate)?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| TlsError::NoKey)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions();
        let builder = builder.map_err(TlsError::Unusable)?;
        let builder = match client_authorities {
            None => builder.with_no_client_auth(),
            Some(authorities) => {
                let mut roots = RootCertStore::empty();
                for authority in certificates(authorities).ok_or(TlsError::NoAuthority)? {
                    roots.add(authority).map_err(|_| TlsError::NoAuthority)?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider).build();
                builder.with_client_cert_verifier(verifier.map_err(|_| TlsError::NoAuthority)?)
            }
        };
        let mut http1 = builder.with_single_cert(chain, key).map_err(TlsError::Unusable)?;
        http1.alpn_protocols = vec![b"http/1.1".into()];
        let mut http2 = http1.clone();
        http2.alpn_protocols.insert(0, H2.into());
        Ok(Self(Arc::new(RwLock::new(Terms { http1: Arc::new(http1), http2: Arc::new(http2) }))))
    }

    /// Goes by the terms of the other from now on. Connections under way stay as they are.
    pub fn replace(&self, other: &Self) {
        let terms = other.0.read().clone();
        *self.0.write() = terms;
    }

    /// Shakes hands, and says whether HTTP/2 is to be spoken, which it may be if that is offered.
    pub(crate) async fn accept<S>(&self, stream: S, http2: bool) -> io::Result<(TlsStream<S>, bool)>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let Terms { http1, http2: both } = self.0.read().clone();
        let stream = TlsAcceptor::from(if http2 { both } else { http1 }).accept(stream).await?;
        let http2 = stream.get_ref().1.alpn_protocol() == Some(H2);
        Ok((stream, http2))
    }
}

/// Certificates in PEM form; `None` if there are none, or one of them is broken.
fn certificates(pem: &[u8]) -> Option<Vec<CertificateDer<'static>>> {
    let all: Vec<_> = CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().ok()?;
    (!all.is_empty()).then_some(all)
}
