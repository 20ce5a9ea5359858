//! `baton pull`: fetches a checkpoint and prints its folder. Progress goes to standard error, the folder to standard
//! output, so that `baton serve "$(baton pull ID)"` works.

use std::env;

use anyhow::Result;
use baton_hub::{Event, Options, Snapshot, Target};
use clap::Args;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

/// What `baton pull` takes. The hub's own settings come from the environment, as for Hugging Face tools.
#[derive(Debug, Args)]
#[command(after_help = "Environment, as Hugging Face tools read it: HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN, \
    HF_TOKEN_PATH, HF_HUB_OFFLINE; SSL_CERT_FILE for certificates instead of the built-in ones; HTTPS_PROXY, NO_PROXY.")]
pub struct PullArgs {
    /// ORG/NAME or ORG/NAME@REVISION of a hub, or http(s)://HOST/FOLDER/
    #[arg(value_name = "ID")]
    target: Target,

    /// Ask the server for the revision's newest commit, even if the cache holds one
    #[arg(long)]
    refresh: bool,

    /// Files fetched at once
    #[arg(long, value_name = "N", default_value_t = 4)]
    parallel: usize,
}

/// Runs the command.
pub fn main(args: &PullArgs) -> Result<()> {
    let mut options = options()?;
    options.refresh = args.refresh;
    options.parallel = args.parallel;
    let snapshot = fetch(&args.target, &options)?;
    #[allow(clippy::print_stdout)] // what was asked for
    {
        println!("{}", snapshot.folder.display());
    }
    Ok(())
}

/// What the environment says.
pub fn options() -> Result<Options> {
    Ok(Options::from_env(|name| env::var(name).ok())?)
}

/// Gives the checkpoint's folder, fetching what the cache lacks, with a progress bar if a terminal is there.
pub fn fetch(target: &Target, options: &Options) -> Result<Snapshot> {
    let display = Display::new(target.to_string());
    let result = baton_hub::pull(target, options, &|event| display.show(&event));
    display.bar.finish_and_clear();
    Ok(result?)
}

/// How bytes on their way are shown.
pub fn bar_style() -> ProgressStyle {
    let style = "{bar:30} {bytes}/{total_bytes} {bytes_per_sec}, {eta} left";
    ProgressStyle::with_template(style).expect("a valid template")
}

/// One bar over all files, on a terminal; the lines above it appear anywhere.
struct Display {
    target: String,
    bar: ProgressBar,
}

impl Display {
    fn new(target: String) -> Self {
        Display { target, bar: ProgressBar::no_length().with_style(bar_style()) }
    }

    fn show(&self, event: &Event<'_>) {
        match event {
            Event::Waiting { path } => self.line(&format!("waiting for another pull, which holds {}", path.display())),
            Event::Listed { commit, files, size, present } => {
                let (total, here) = (HumanBytes(*size), HumanBytes(*present));
                self.line(&format!("{} at {commit}: {files} files, {total}, of which {here} are here", self.target));
                self.bar.set_length(*size);
                self.bar.set_position(*present);
                self.bar.reset_eta();
            }
            Event::Bytes { all_done, .. } => self.bar.set_position(*all_done),
            Event::Retry { error, delay, .. } => {
                self.line(&format!("{error}; again in {} s", delay.as_secs_f32()));
            }
            // Events of a later version are not for this display.
            _ => {}
        }
    }

    fn line(&self, text: &str) {
        self.bar.suspend(|| eprintln!("{text}"));
    }
}
