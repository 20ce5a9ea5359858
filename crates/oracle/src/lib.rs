//! Nothing but tests: what `baton-model` computes against what candle-transformers computes from the same
//! checkpoints. A crate of its own, so that candle is compiled for nothing else.
