//! Five hundred clients that ask for long streams and do not read them: what the server keeps for them, and that it gives them up.

use std::time::{Duration, Instant};

use anyhow::Result;
use tokio::net::TcpStream;

use super::{Setting, record::Record, unread, watched};

const READERS: u32 = 500;
const TOKENS: u32 = 900;
/// Until the server has taken what all of them ask for.
const TAKEN: Duration = Duration::from_secs(10);
/// A client may take nothing for 60 s; what it stalls is generated before.
const LIMIT: Duration = Duration::from_secs(240);

/// Runs the check.
pub fn check(setting: &Setting) -> Result<()> {
    let binary = setting.binary()?;
    let mut record = Record::new("readers");
    super::runtime()?.block_on(async {
        let server = watched::start(&binary, &[]).await?;
        // What runs and is read at once is not to be counted as kept for those who do not read.
        let mut warm = Vec::new();
        for seed in 0..64 {
            let (client, question) = (server.client(), unread::question(TOKENS, seed));
            warm.push(tokio::spawn(async move { client.stream("/v1/chat/completions", question).await }));
        }
        for reply in warm {
            reply.await??;
        }
        let before = server.resident_mib()?;
        let watch = watched::Watch::begin(&server);
        let mut readers: Vec<TcpStream> = Vec::new();
        for seed in 0..READERS {
            readers.push(unread::stream(&server, unread::question(TOKENS, seed)).await?);
        }
        let asked = Instant::now();
        let mut all = 0.0;
        while all < f64::from(READERS) && asked.elapsed() < TAKEN {
            tokio::time::sleep(Duration::from_millis(50)).await;
            all = server.metric("baton_http_requests_in_flight").await?.max(all);
        }
        record.figure("readers", READERS)?;
        record.figure("in_flight_at_once", all)?;
        record.must(format!("{all} are answered at once (all of them)"), all >= f64::from(READERS));
        let gone = server.idle(LIMIT).await?;
        let seen = watch.end().await?;
        record.figure("seconds_until_all_are_given_up", gone.as_secs_f64())?;
        let grown = seen.peak_mib() - before;
        record.must(format!("memory grew by {grown:.1} MiB (below 64)"), grown < 64.0);
        seen.live_must_answer("readers", &mut record);
        drop(readers);
        anyhow::Ok(())
    })?;
    record.finish(setting)
}
