//! Encoder models.
