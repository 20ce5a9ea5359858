//! Where to listen, and whether that may be done.
//!
//! Invariant: nothing is bound to an address that other machines reach unless clients must show a key or a certificate
//! there, or the operator has said that they need not.

use std::net::SocketAddr;

use anyhow::{Context, Result, bail};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::{TcpListener, lookup_host};

/// Connections at once, at most, where neither the settings nor the system say less.
const MOST_CONNECTIONS: usize = 16 << 10;
/// Descriptors left for files, of many.
const SPARE_DESCRIPTORS: usize = 256;

/// Listens there. `guarded`: clients must show something, or need not on purpose.
///
/// # Errors
/// If it is not guarded and not a loopback address, or the system refuses.
pub async fn listen(host: &str, port: u16, guarded: bool) -> Result<TcpListener> {
    let place = || format!("cannot listen on {host}:{port}");
    let addresses: Vec<SocketAddr> = lookup_host((host, port)).await.with_context(place)?.collect();
    let is_public = |address: &&SocketAddr| !address.ip().to_canonical().is_loopback();
    if let Some(public) = addresses.iter().find(is_public)
        && !guarded
    {
        bail!(
            "refusing to listen on {public}, which other machines may reach, while no client needs a key: give --api-key or \
             --api-keys-file, or ask for certificates with --ssl-ca-certs; --host 127.0.0.1 serves this machine \
             alone, and --allow-unauthenticated everybody"
        );
    }
    TcpListener::bind(&addresses[..]).await.with_context(place)
}

/// How many connections there may be at once, for the descriptors that the process may have: all that the system allows it,
/// since the usual limit is there for programs that wait by `select`.
pub fn connections() -> usize {
    let limits = getrlimit(Resource::Nofile);
    let all = Rlimit { current: limits.maximum, ..limits };
    let may = if setrlimit(Resource::Nofile, all).is_ok() { limits.maximum } else { limits.current };
    within(may.map(|descriptors| usize::try_from(descriptors).unwrap_or(usize::MAX)))
}

fn within(descriptors: Option<usize>) -> usize {
    let left = |all: usize| all.saturating_sub(SPARE_DESCRIPTORS).max(all / 2);
    descriptors.map_or(MOST_CONNECTIONS, left).min(MOST_CONNECTIONS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_descriptors_for_files() {
        assert_eq!(
            [Some(64), Some(1024), Some(1 << 20), None].map(within),
            [32, 768, MOST_CONNECTIONS, MOST_CONNECTIONS]
        );
    }

    #[tokio::test]
    async fn an_address_that_others_reach_needs_a_guard() {
        for host in ["127.0.0.1", "127.3.2.1", "localhost"] {
            listen(host, 0, false).await.unwrap();
        }
        for host in ["0.0.0.0", "::", "192.0.2.1", "::ffff:192.0.2.1"] {
            let refusal = format!("{:#}", listen(host, 0, false).await.unwrap_err());
            assert!(
                refusal.contains("--api-keys-file") && refusal.contains("--allow-unauthenticated"),
                "{host}: {refusal}"
            );
        }
        listen("0.0.0.0", 0, true).await.unwrap();
        // It would be allowed, and is not there.
        assert!(format!("{:#}", listen("192.0.2.1", 0, true).await.unwrap_err()).contains("cannot listen"));
    }
}
