//! The replies of `/v1/models`.

use serde::Serialize;

/// One served name.
#[derive(Serialize)]
pub(crate) struct ModelObject<'a> {
    pub id: &'a str,
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: u64,
    pub owned_by: &'a str,
    pub max_model_len: usize,
    /// Of an adapter: the model that it changes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent: Option<&'a str>,
}

/// All served names.
#[derive(Serialize)]
pub(crate) struct ModelList<'a> {
    pub object: &'static str,
    pub data: Vec<ModelObject<'a>>,
}
