//! Fetches checkpoints: from a model hub into the cache shared with Hugging Face tools, or from a directory
//! served over HTTP(S).
//!
//! [`pull`] finds what it needs in the cache or fetches it; its answer is a folder in Hugging Face layout. Nothing
//! else in Baton opens a URL. What holds for every run, whatever the server does and whenever it is killed:
//!
//! - **A snapshot folder appears whole or not at all.** Files land as blobs, each under its final name only after its
//!   size and digest were checked and its bytes synced; the folder of links is renamed into place last.
//! - **One revision is pinned first**, to a commit, and every file comes from that commit.
//! - **Names, digests and sizes from a server are not trusted**: they are checked before they become a path or a
//!   length. Weights are fetched in formats that cannot carry code only.
//! - **A bundle is fetched whole.** Where there is a `handoff.json`, exactly the files that it lists come, each with the
//!   size and digest that it promises; else only names that are known to belong to a checkpoint.
//! - **The token goes to the configured hub only**, also when that redirects.

mod bundle;
mod cache;
mod client;
mod directory;
mod error;
mod fetch;
mod listing;
mod names;
mod options;
mod pull;
mod repository;
mod target;

pub use error::{BoxError, HubError};
pub use options::{Options, Token};
pub use pull::{Event, Progress, Snapshot, pull};
pub use target::Target;
