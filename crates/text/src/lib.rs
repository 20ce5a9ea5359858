//! Text on both sides of a model: tokenizer, chat template, detokenisation, stop strings, reasoning.
