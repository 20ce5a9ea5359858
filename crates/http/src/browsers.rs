//! What pages may make a browser ask for, where nobody needs a key to ask.
//!
//! A browser asks on behalf of any page that its user visits, and reaches what he reaches: a service on his own machine too. So
//! of requests that no key vouches for two things are looked at, which a browser says and no page can change:
//!
//! - the name that is called (`Host`), without TLS and on a loopback address, or anywhere if the operator lists names. A page whose name was made to lead here (DNS
//!   rebinding) would be one of the service's own. What nobody can make lead here is taken: addresses, `localhost`, and
//!   what the operator names. Under TLS the certificate says the same.
//! - whose page asks (`Sec-Fetch-Site`, else `Origin`), where something may be changed. A page of elsewhere cannot read the
//!   reply without CORS, but the work is done; it may send a body of any content type but JSON's, which is why types are not
//!   what is looked at.
//!
//! Programs that are no browsers do not say whose page they are, and call by address or `localhost`. Public routes are not
//! looked at: they tell and do nothing, and probes may call by any name.

use std::net::IpAddr;
use std::str::FromStr;

use axum::extract::Request;
use http::header::{HOST, ORIGIN};
use http::uri::Authority;
use http::{HeaderMap, HeaderName};

use crate::cors;
use crate::error::ApiError;
use crate::service::ServiceConfig;

const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// A name by which the service may be called, or `*` for all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostName(String);

/// The text is no name of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a host is * or a name or address, without scheme, port and path")]
pub struct HostNameError;

impl FromStr for HostName {
    type Err = HostNameError;

    fn from_str(text: &str) -> Result<Self, HostNameError> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
        // As of the name that is called.
        let name = text.strip_suffix('.').unwrap_or(text);
        let named = !name.is_empty() && name.len() <= 253 && name.bytes().all(plain);
        match text == "*" || named || text.parse::<IpAddr>().is_ok() {
            true => Ok(Self(name.to_ascii_lowercase())),
            false => Err(HostNameError),
        }
    }
}

/// Looks at a request that no key vouches for.
pub(crate) fn check(config: &ServiceConfig, on_loopback: bool, request: &Request) -> Result<(), ApiError> {
    let called = called(request);
    let known = |authority: &Option<Authority>| {
        authority.as_ref().is_some_and(|authority| leads_here(authority.host(), &config.allowed_hosts))
    };
    let by_name = on_loopback || config.check_hosts_everywhere;
    if by_name && config.tls.is_none() && !called.iter().all(known) {
        return Err(ApiError::host_not_allowed());
    }
    let headers = request.headers();
    let changes_nothing = request.method().is_safe();
    match changes_nothing || of_our_own(headers, &called) || cors::allowed(&config.allowed_origins, headers).is_some() {
        true => Ok(()),
        false => Err(ApiError::origin_not_allowed()),
    }
}

/// All that a request says it calls; `None` is nothing that can be called.
fn called(request: &Request) -> Vec<Option<Authority>> {
    let headers = request.headers().get_all(HOST).iter().filter(|host| !host.is_empty());
    let headers = headers.map(|host| Authority::try_from(host.as_bytes()).ok());
    // Of HTTP/2, and of a target that is written in full.
    request.uri().authority().cloned().map(Some).into_iter().chain(headers).collect()
}

/// Whether no name server has a say in where the host is, or the operator vouches for it.
fn leads_here(host: &str, allowed: &[HostName]) -> bool {
    let host = host.to_ascii_lowercase();
    let name = host.strip_suffix('.').unwrap_or(&host);
    let address = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    address.parse::<IpAddr>().is_ok()
        || name == "localhost"
        || name.ends_with(".localhost")
        || allowed.iter().any(|allowed| allowed.0 == "*" || allowed.0 == name)
}

/// Whether it is no page that asks, or one that this service has sent.
fn of_our_own(headers: &HeaderMap, called: &[Option<Authority>]) -> bool {
    match (headers.get(SEC_FETCH_SITE), headers.get(ORIGIN)) {
        // `none`: the user himself.
        (Some(site), _) => site == "same-origin" || site == "none",
        // Browsers that say no more than that; the scheme may be a proxy's.
        (None, Some(origin)) => {
            let origin = origin.to_str().ok().and_then(|origin| origin.split_once("://")?.1.parse::<Authority>().ok());
            origin.is_some() && called.contains(&origin)
        }
        (None, None) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_leads_here_whatever_name_servers_say_is_taken_and_what_is_named() {
        let allowed = ["Baton.lan".parse().unwrap()];
        for host in
            ["localhost", "LOCALHOST", "localhost.", "a.b.localhost", "127.0.0.1", "10.1.2.3", "[::1]", "baton.LAN"]
        {
            assert!(leads_here(host, &allowed), "{host}");
        }
        for host in ["example.org", "localhost.example.org", "notlocalhost", "127.0.0.1.example.org", "x.baton.lan", ""]
        {
            assert!(!leads_here(host, &allowed), "{host}");
            assert!(leads_here(host, &["*".parse().unwrap()]));
        }
        for host in ["baton.lan", "baton.lan."] {
            assert!(leads_here(host, &["baton.lan.".parse().unwrap()]), "{host}");
        }
    }

    #[test]
    fn a_host_is_named_without_scheme_port_and_path() {
        for text in ["*", "baton", "baton.example.org", "my_host", "::1", "10.0.0.1"] {
            assert!(text.parse::<HostName>().is_ok(), "{text}");
        }
        for text in ["", ".", "*.", "http://baton", "baton:8000", "baton/", "*.example.org", "a b"] {
            assert_eq!(text.parse::<HostName>(), Err(HostNameError), "{text}");
        }
    }
}
