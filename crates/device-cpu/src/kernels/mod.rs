//! The kernels. Each file states the order in which it adds, which is the same for every batch.

pub(crate) mod attention;
pub(crate) mod blocks;
pub(crate) mod chosen;
pub(crate) mod compressed;
pub(crate) mod context;
pub(crate) mod gather;
pub(crate) mod grouped;
pub(crate) mod latent;
pub(crate) mod linear;
pub(crate) mod moe;
pub(crate) mod pairs;
pub(crate) mod pooling;
pub(crate) mod quantize;
pub(crate) mod rope;
pub(crate) mod rows;
pub(crate) mod scratch;
pub(crate) mod streams;
