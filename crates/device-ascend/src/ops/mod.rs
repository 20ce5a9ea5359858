//! Operations of the seam as operators of CANN, a file a family. Each works on views, on the owner thread.

pub(crate) mod rows;
