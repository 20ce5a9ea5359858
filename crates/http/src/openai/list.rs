//! Lists that are read page by page.

use serde::Serialize;

use crate::error::ApiError;
use crate::fields::Fields;

/// One page.
#[derive(Debug, Serialize)]
pub(crate) struct Page<T> {
    object: &'static str,
    data: Vec<T>,
    first_id: Option<String>,
    last_id: Option<String>,
    has_more: bool,
}

/// Which page is asked for.
#[derive(Debug)]
pub(crate) struct Paging {
    after: Option<String>,
    limit: usize,
}

impl Paging {
    /// Reads `after` and `limit`, which is 1 to `most` and else `default`.
    pub fn read(fields: &mut Fields, default: usize, most: usize) -> Result<Self, ApiError> {
        let limit = fields.integer("limit", 1..=most as i64)?;
        Ok(Self { after: fields.string("after")?, limit: limit.map_or(default, |limit| limit as usize) })
    }

    /// The page of a list.
    pub fn page<T>(self, mut all: Vec<T>, id: impl Fn(&T) -> &String) -> Result<Page<T>, ApiError> {
        if let Some(after) = self.after {
            let at = all.iter().position(|item| *id(item) == after);
            let at = at.ok_or_else(|| ApiError::invalid("after", "after must be an id of this list"))?;
            all.drain(..=at);
        }
        let has_more = all.len() > self.limit;
        all.truncate(self.limit);
        let (first_id, last_id) = (all.first().map(|item| id(item).clone()), all.last().map(|item| id(item).clone()));
        Ok(Page { object: "list", data: all, first_id, last_id, has_more })
    }
}
