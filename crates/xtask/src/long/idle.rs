//! Ten thousand connections that say nothing, and a flood of five times as many as there may be: what they cost, when they are closed, and that
//! probes are answered beside them.

use std::{
    collections::VecDeque,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use baton_loadgen::LocalServer;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
};

use super::{Setting, record::Record, watched};

const CONNECTIONS: usize = 10_000;
/// Descriptors of this process besides.
const SPARE: u64 = 500;
/// A head may take so long, and an idle connection stay so long.
const HEAD_TIMEOUT: f64 = 10.0;
/// That a timer may be late on a busy machine.
const LATE: f64 = 2.0;
/// Long enough for the slowest of a hundred probes.
const FLOOD: Duration = Duration::from_secs(10);

/// Runs the check.
pub fn check(setting: &Setting) -> Result<()> {
    let binary = setting.binary()?;
    let limits = getrlimit(Resource::Nofile);
    let wanted = CONNECTIONS as u64 + SPARE;
    ensure!(
        limits.maximum.is_none_or(|most| wanted <= most),
        "{wanted} descriptors are needed, {:?} allowed",
        limits.maximum
    );
    setrlimit(Resource::Nofile, Rlimit { current: Some(wanted.max(limits.current.unwrap_or(0))), ..limits })?;
    let mut record = Record::new("idle");
    super::runtime()?.block_on(async {
        for (name, begin) in [("silent", &b""[..]), ("kept", b"GET /live HTTP/1.1\r\nhost: localhost\r\n\r\n")] {
            idle(&binary, name, begin, &mut record).await?;
        }
        flood(&binary, &mut record).await
    })?;
    record.finish(setting)
}

/// Opens connections, each of which begins like this; where that is a request, it is answered.
async fn open(server: &LocalServer, count: usize, begin: &'static [u8]) -> Result<Vec<TcpStream>> {
    let address = server.address();
    let mut opened = Vec::new();
    while opened.len() < count {
        let mut some = JoinSet::new();
        for _ in 0..200.min(count - opened.len()) {
            some.spawn(async move {
                let mut stream = TcpStream::connect(address).await?;
                if !begin.is_empty() {
                    stream.write_all(begin).await?;
                    ensure!(stream.read(&mut [0; 4096]).await? > 0, "no answer");
                }
                anyhow::Ok(stream)
            });
        }
        while let Some(stream) = some.join_next().await {
            opened.push(stream??);
        }
    }
    Ok(opened)
}

async fn idle(binary: &Path, name: &str, begin: &'static [u8], record: &mut Record) -> Result<()> {
    let server = watched::start(binary, &["--max-connections", "20000"]).await?;
    drop(open(&server, 500, begin).await?);
    let before = server.resident_mib()?;
    let watch = watched::Watch::begin(&server);
    let start = Instant::now();
    let connections = open(&server, CONNECTIONS, begin).await?;
    let opened = start.elapsed().as_secs_f64();
    // The system has taken them; the server has when it says so.
    while server.metric("baton_http_connections").await? < CONNECTIONS as f64 {
        ensure!(start.elapsed().as_secs_f64() < HEAD_TIMEOUT, "the first are closed before the last are open");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let each = (server.resident_mib()? - before) * 1024.0 / CONNECTIONS as f64;
    record.figure(&format!("{name}_seconds_to_open"), opened)?;
    record.figure(&format!("{name}_kib_per_connection"), each)?;
    let mut closed = JoinSet::new();
    for mut stream in connections {
        closed.spawn(async move { stream.read_to_end(&mut Vec::new()).await });
    }
    closed.join_all().await;
    let seconds = start.elapsed().as_secs_f64();
    let seen = watch.end().await?;
    record.must(
        format!("{name}: all are closed {seconds:.1} s after the first was opened (opening, 10 s, {LATE} s)"),
        seconds <= opened + HEAD_TIMEOUT + LATE,
    );
    seen.live_must_answer(name, record);
    Ok(())
}

/// Five times as many as there may be, and for each more that is opened the oldest is closed, as fast as can be.
async fn flood(binary: &Path, record: &mut Record) -> Result<()> {
    let server = watched::start(binary, &["--max-connections", "2000"]).await?;
    let watch = watched::Watch::begin(&server);
    let (start, mut connections, mut opened) = (Instant::now(), VecDeque::new(), 0);
    while start.elapsed() < FLOOD {
        connections.extend(open(&server, 200, b"").await?);
        opened += 200;
        connections.drain(..connections.len().saturating_sub(CONNECTIONS));
    }
    let seen = watch.end().await?;
    record.figure("flood_connections_per_second", f64::from(opened) / start.elapsed().as_secs_f64())?;
    seen.live_must_answer("flood", record);
    Ok(())
}
