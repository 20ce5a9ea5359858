//! The log: lines on standard error that nobody waits for.
//!
//! Whoever logs hands its line to a bounded queue; one thread writes. Where standard error takes no lines, be it a pipe that
//! nobody reads or a full disk, lines are lost and counted, and serving goes on. `tracing-appender` does nearly that: it does not
//! count the lines that cannot be written, nor wait for the last ones no longer than it is told.

use std::{
    any::Any,
    backtrace::Backtrace,
    io::{self, IsTerminal, Write},
    panic::{self, PanicHookInfo},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use crossbeam_channel::{Receiver, Sender, bounded};
use tracing_subscriber::EnvFilter;

use crate::settings::{LogFormat, Settings};

/// Lines that wait, at most.
const QUEUED: usize = 1024;

/// What the writing thread is given.
enum Entry {
    Line(Vec<u8>),
    /// To be answered when all before it is written.
    Flush(Sender<()>),
}

/// The log of this process. Clones are the same log.
#[derive(Clone)]
pub struct Log {
    lines: Lines,
}

impl Log {
    /// Begins to log as the settings say.
    pub fn start(settings: &Settings) -> Result<Self> {
        let filter =
            EnvFilter::try_new(&settings.log_level).with_context(|| format!("--log-level {}", settings.log_level))?;
        let (queue, entries) = bounded(QUEUED);
        let lines = Lines { queue, lost: Arc::default() };
        let lost = lines.lost.clone();
        thread::Builder::new().name("log".into()).spawn(move || write(&entries, &lost))?;
        let writer = lines.clone();
        let builder = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(move || writer.clone())
            .with_ansi(io::stderr().is_terminal());
        match settings.log_format {
            LogFormat::Text => builder.init(),
            LogFormat::Json => builder.json().init(),
        }
        panic::set_hook(Box::new(tell));
        Ok(Self { lines })
    }

    /// How many lines were lost.
    pub fn lost(&self) -> Arc<AtomicU64> {
        self.lines.lost.clone()
    }

    /// Waits until what was logged is written, but no longer than this.
    pub fn flush(&self, patience: Duration) {
        let (written, answer) = bounded(1);
        if self.lines.queue.send_timeout(Entry::Flush(written), patience).is_ok() {
            // Whether it was in time: the process ends either way.
            let _ = answer.recv_timeout(patience);
        }
    }
}

/// Logs a panic.
fn tell(panic: &PanicHookInfo<'_>) {
    let (place, said) = (panic.location().map(ToString::to_string), constant(panic.payload()));
    let (thread, backtrace) = (thread::current(), Backtrace::capture());
    tracing::error!(place, said, thread = thread.name(), %backtrace, "a panic, which is a bug");
}

/// What a panic says, if that was written by whoever wrote the program: what is put together when it runs may have parts of a request.
fn constant(payload: &(dyn Any + Send)) -> Option<&'static str> {
    payload.downcast_ref::<&'static str>().copied()
}

/// Takes lines and never waits.
#[derive(Clone)]
struct Lines {
    queue: Sender<Entry>,
    lost: Arc<AtomicU64>,
}

impl Write for Lines {
    /// A whole line: so the subscriber writes them.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.queue.try_send(Entry::Line(line.to_vec())).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes until nobody can log any more.
fn write(entries: &Receiver<Entry>, lost: &AtomicU64) {
    for entry in entries {
        match entry {
            Entry::Line(line) => {
                if io::stderr().write_all(&line).is_err() {
                    lost.fetch_add(1, Ordering::Relaxed);
                }
            }
            // Whoever asked has perhaps lost its patience.
            Entry::Flush(written) => _ = written.send(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    /// The thread whose panics are logged; those of other tests are told as ever.
    const BREAKS: &str = "breaks";

    #[test]
    fn r46_a_panic_shows_nothing_that_was_put_together_when_it_ran() {
        let others = panic::take_hook();
        panic::set_hook(Box::new(move |panic| match thread::current().name() {
            Some(BREAKS) => tell(panic),
            _ => others(panic),
        }));
        type Broken = fn(&str);
        let panics: [(Option<&str>, Broken); 4] = [
            (Some("a rule was broken"), |_| panic!("a rule was broken")),
            (None, |prompt| panic!("{prompt} is odd")),
            (None, |prompt| drop(prompt[..8].to_owned())),
            (None, |prompt| {
                prompt.parse::<u8>().map_err(|_| prompt).expect("a number");
            }),
        ];
        for (said, broken) in panics {
            let (queue, entries) = bounded(QUEUED);
            let lines = Lines { queue, lost: Arc::default() };
            let subscriber = tracing_subscriber::fmt().json().with_writer(move || lines.clone()).finish();
            let breaks = move || tracing::subscriber::with_default(subscriber, || broken("canary é"));
            let thread = thread::Builder::new().name(BREAKS.to_owned()).spawn(breaks).expect("a thread");
            thread.join().expect_err("it panics");
            let logged: Vec<Vec<u8>> = entries
                .try_iter()
                .map(|entry| match entry {
                    Entry::Line(line) => line,
                    Entry::Flush(_) => unreachable!("nobody asks"),
                })
                .collect();
            let [line] = &logged[..] else { panic!("{} lines", logged.len()) };
            let text = str::from_utf8(line).expect("UTF-8");
            assert!(!text.contains("canary"), "{text}");
            let line: Value = serde_json::from_str(text).expect("JSON");
            let (level, fields) = (&line["level"], &line["fields"]);
            assert_eq!((level.as_str(), fields["said"].as_str()), (Some("ERROR"), said), "{line}");
            assert_eq!(fields["thread"], BREAKS, "{line}");
            let place = fields["place"].as_str().expect("a place");
            assert!(place.starts_with(concat!(file!(), ":")), "{place}");
        }
    }
}
