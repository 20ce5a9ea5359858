//! Operations of the seam as operators of CANN, a file a family. Each works on views, on the owner thread.

pub(crate) mod attention;
mod each_expert;
pub(crate) mod fractal;
pub(crate) mod fused_attention;
pub(crate) mod fused_cache;
pub(crate) mod fused_latent;
pub(crate) mod fused_rows;
pub(crate) mod index;
pub(crate) mod latent;
pub(crate) mod moe;
pub(crate) mod rope;
pub(crate) mod rows;
