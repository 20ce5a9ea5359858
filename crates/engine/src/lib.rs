//! Continuous batching over a paged cache: requests in, token streams out.
