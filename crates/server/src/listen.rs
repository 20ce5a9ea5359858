//! Where to listen, and whether that may be done.
//!
//! Invariant: nothing is bound to an address that other machines reach unless clients must show a key or a certificate
//! there, or the operator has said that they need not.

use std::{io, net::SocketAddr};

use anyhow::{Context, Result, bail};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::{TcpListener, TcpSocket, lookup_host};

/// Connections at once, at most, where neither the settings nor the system say less.
const MOST_CONNECTIONS: usize = 16 << 10;
/// Connections that the system holds until they are accepted, if it allows so many. With the usual 128 most of a burst of clients
/// would wait for their next attempt, which comes a second later.
const BACKLOG: u32 = 4096;
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
    // The first that can be had, as `TcpListener::bind` chooses.
    let mut failure = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in addresses {
        match bind(address) {
            Ok(listener) => return Ok(listener),
            Err(error) => failure = error,
        }
    }
    Err(failure).with_context(place)
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // A port is not kept from us by connections of a server before us that are still ending.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
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

    #[tokio::test]
    async fn a_burst_of_clients_is_held_until_it_is_accepted() {
        let allowed = std::fs::read_to_string("/proc/sys/net/core/somaxconn").expect("what the system allows");
        let clients = (BACKLOG as usize).min(allowed.trim().parse().expect("a number")).min(500);
        let listener = listen("127.0.0.1", 0, false).await.unwrap();
        let address = listener.local_addr().unwrap();
        let connect = || std::net::TcpStream::connect_timeout(&address, std::time::Duration::from_secs(30));
        let held: Vec<_> = (0..clients).map(|_| connect().expect("nobody has to try again")).collect();
        for _ in held {
            listener.accept().await.unwrap();
        }
    }

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
