//! A server that is measured from outside while it is loaded: its memory, descriptors and threads, and how soon `/live` answers.

use std::{
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use baton_loadgen::{Client, LocalServer, Quantiles, Target, resident_mib};
use tokio::task::JoinHandle;

use super::record::Record;

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(50);

/// What was seen.
#[derive(Default)]
pub struct Seen {
    /// From connecting to the whole answer of `/live`, each on a connection of its own, as a kubelet asks.
    pub live: Vec<Duration>,
    /// Probes without a 200.
    pub failed: usize,
    /// Seconds since the begin, and memory resident, in MiB.
    pub resident_mib: Vec<(f64, f64)>,
}

impl Seen {
    /// Latencies of `/live`.
    pub fn quantiles(&self) -> Quantiles {
        Quantiles::of(self.live.iter().copied())
    }

    /// That `/live` was there all the time, and soon, while this was done.
    pub fn live_must_answer(&self, meanwhile: &str, record: &mut Record) {
        let (p99, failed) = (self.quantiles().p99_ms, self.failed);
        record.must(
            format!("/live, {meanwhile}: p99 {p99:.1} ms of {} (below 100), {failed} failed", self.live.len()),
            !self.live.is_empty() && p99 < 100.0 && failed == 0,
        );
    }

    /// The most memory.
    pub fn peak_mib(&self) -> f64 {
        self.resident_mib.iter().map(|(_, mib)| *mib).fold(0.0, f64::max)
    }

    /// The mean of the memory within a part of the time, from 0 to 1.
    pub fn mean_mib(&self, from: f64, to: f64) -> f64 {
        let end = self.resident_mib.last().map_or(0.0, |(at, _)| *at);
        let part = self.resident_mib.iter().filter(|(at, _)| (from * end..=to * end).contains(at));
        let (sum, count) = part.fold((0.0, 0), |(sum, count), (_, mib)| (sum + mib, count + 1));
        sum / f64::from(count.max(1))
    }
}

/// Looks at a server until it is told to stop.
pub struct Watch {
    stop: Arc<AtomicBool>,
    seen: JoinHandle<Seen>,
}

impl Watch {
    /// Begins.
    pub fn begin(server: &LocalServer) -> Self {
        let (target, pid, stop) = (server.target().clone(), server.pid(), Arc::new(AtomicBool::new(false)));
        let seen = tokio::spawn(watch(target, pid, stop.clone()));
        Self { stop, seen }
    }

    /// Ends, and says what was seen.
    pub async fn end(self) -> Result<Seen> {
        self.stop.store(true, Relaxed);
        Ok(self.seen.await?)
    }
}

async fn watch(target: Target, pid: u32, stop: Arc<AtomicBool>) -> Seen {
    let (mut seen, begin) = (Seen::default(), Instant::now());
    while !stop.load(Relaxed) {
        let asked = Instant::now();
        match Client::new(target.clone()).get("/live").await {
            Ok((status, _)) if status == 200 => seen.live.push(asked.elapsed()),
            _ => seen.failed += 1,
        }
        if let Ok(mib) = resident_mib(pid) {
            seen.resident_mib.push((begin.elapsed().as_secs_f64(), mib));
        }
        tokio::time::sleep(PAUSE).await;
    }
    seen
}

/// Entries of a folder of a process in /proc: `fd`, `task`.
pub fn entries(server: &LocalServer, folder: &str) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{}/{folder}", server.pid()))?.count())
}

/// Seconds of a core that the threads of a process have had, by their names.
pub fn core_seconds(server: &LocalServer) -> Result<Vec<(String, f64)>> {
    let mut all: Vec<(String, f64)> = Vec::new();
    for task in fs::read_dir(format!("/proc/{}/task", server.pid()))? {
        let stat = fs::read_to_string(task?.path().join("stat"))?;
        let (begin, end) = (stat.find('(').context("a name")?, stat.rfind(')').context("a name")?);
        let name = stat[begin + 1..end].trim_end_matches(|c: char| c.is_ascii_digit() || c == '-').to_owned();
        let fields: Vec<&str> = stat[end + 2..].split(' ').collect();
        // User and system time, in hundredths.
        let seconds = (fields[11].parse::<f64>()? + fields[12].parse::<f64>()?) / 100.0;
        match all.iter_mut().find(|(known, _)| *known == name) {
            Some((_, sum)) => *sum += seconds,
            None => all.push((name, seconds)),
        }
    }
    Ok(all)
}

/// Starts a server that says nothing but warnings.
pub async fn start(binary: &Path, flags: &[&str]) -> Result<LocalServer> {
    LocalServer::start(binary, &[&["--log-level", "warn"], flags].concat()).await
}
