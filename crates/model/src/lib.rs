//! Checkpoints, architectures, and the runner that turns a step plan into sampled tokens.
