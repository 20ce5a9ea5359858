//! The NVIDIA backend.
