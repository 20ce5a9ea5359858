//! Pulls against a scripted server: what it may do to us, and what must hold all the same.

mod bundle;
mod cache;
mod directory;
mod faults;
mod hostile;
mod model;
mod server;
