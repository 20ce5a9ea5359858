//! A server of one's own: started on a free loopback port, killed when dropped.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use crate::{Client, Target};

/// Between two looks at a server that is waited for: at first, and when it takes long.
const SOON: Duration = Duration::from_millis(5);
const SELDOM: Duration = Duration::from_millis(50);

/// A port that nobody listens on.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Memory of a process that is resident now, in MiB (Linux).
pub fn resident_mib(pid: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).context("VmRSS")?;
    Ok(line.trim().trim_end_matches("kB").trim().parse::<f64>()? / 1024.0)
}

/// A running server.
#[derive(Debug)]
pub struct LocalServer {
    child: Child,
    address: SocketAddr,
    target: Target,
    ready: Duration,
}

impl LocalServer {
    /// Starts `baton serve --port FREE flags…` and waits until it is ready.
    pub async fn start(baton: &Path, flags: &[&str]) -> Result<Self> {
        let port = free_port()?;
        let mut command = Command::new(baton);
        command.args(["serve", "--port", &port.to_string()]).args(flags);
        Self::launch(command, port, "/ready", Duration::from_secs(60)).await
    }

    /// Runs a command that serves on `port`, and waits until the route `ready` answers 200.
    pub async fn launch(mut command: Command, port: u16, ready: &str, limit: Duration) -> Result<Self> {
        let start = Instant::now();
        let child = command.stdin(Stdio::null()).spawn().with_context(|| format!("starting {command:?}"))?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let target = Target { base: format!("http://{address}"), api_key: None };
        let mut server = Self { child, address, target, ready: Duration::ZERO };
        let client = server.client();
        while !client.get(ready).await.is_ok_and(|(status, _)| status == 200) {
            ensure!(start.elapsed() < limit, "not ready after {limit:?}");
            if let Some(status) = server.child.try_wait()? {
                bail!("the server ended: {status}");
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        server.ready = start.elapsed();
        Ok(server)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The same, as clients are told it.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// A client with connections of its own.
    pub fn client(&self) -> Client {
        Client::new(self.target.clone())
    }

    /// From starting the process to the first 200 of its route for that.
    pub fn ready(&self) -> Duration {
        self.ready
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Memory resident now, in MiB (Linux).
    pub fn resident_mib(&self) -> Result<f64> {
        resident_mib(self.pid())
    }

    /// The sum over all series of one metric.
    pub async fn metric(&self, name: &str) -> Result<f64> {
        let (_, text) = self.client().get("/metrics").await?;
        let values: Vec<f64> = text
            .lines()
            .filter(|l| l.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])))
            .filter_map(|l| l.rsplit(' ').next()?.parse().ok())
            .collect();
        ensure!(!values.is_empty(), "no metric {name}");
        Ok(values.iter().sum())
    }

    /// Waits until nothing runs, nothing is answered and no block is in use, for no longer than this; how long it took, to a tenth.
    pub async fn idle(&self, limit: Duration) -> Result<Duration> {
        let begin = Instant::now();
        loop {
            let running = self.metric("vllm:num_requests_running").await?;
            let in_flight = self.metric("baton_http_requests_in_flight").await?;
            let used = self.metric("vllm:kv_cache_usage_perc").await?;
            let waited = begin.elapsed();
            if running == 0.0 && in_flight == 0.0 && used == 0.0 {
                return Ok(waited);
            }
            ensure!(
                waited < limit,
                "{running} run, {in_flight} are answered and {used} of the blocks are in use, {limit:?} after the last came"
            );
            tokio::time::sleep((waited / 10).clamp(SOON, SELDOM)).await;
        }
    }

    /// Sends SIGTERM, as a supervisor does.
    pub fn terminate(&self) -> Result<()> {
        let status = Command::new("kill").args(["-TERM", &self.pid().to_string()]).status()?;
        ensure!(status.success(), "kill: {status}");
        Ok(())
    }

    /// Waits for the process to end by itself.
    pub async fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            ensure!(start.elapsed() < limit, "still running after {limit:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Drop for LocalServer {
    fn drop(&mut self) {
        // Already gone is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
