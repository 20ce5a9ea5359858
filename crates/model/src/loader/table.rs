//! Experts by token: the integers of a checkpoint that decide what is computed.

use std::collections::HashSet;

use baton_device::Backend;

use super::{Loader, hash};
use crate::LoadError;
use crate::checkpoint::CheckpointError;

impl<B: Backend> Loader<'_, B> {
    /// A table by its full name, `[vocab, k]`: the experts of each token, all below `experts`, none twice.
    pub(crate) fn token_table(&mut self, name: &str, experts: usize) -> Result<Vec<u32>, LoadError> {
        let shape = &self.specs[name].shape;
        let (entry, part) = self.checkpoint.tensor(name)?;
        if self.sees_all() {
            hash(&mut self.digest, self.hash_all, name, entry.stored_type, shape, &part);
        }
        let stored: Vec<i64> = match entry.stored_type {
            "I64" => part.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect(),
            _ => part.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b).into()).collect(),
        };
        let table = experts_by_token(&stored, shape[1], experts)
            .map_err(|reason| CheckpointError::Table { tensor: name.to_owned(), reason })?;
        self.weight_bytes += 4 * table.len() as u64;
        Ok(table)
    }
}

fn experts_by_token(stored: &[i64], top_k: usize, experts: usize) -> Result<Vec<u32>, String> {
    let mut table = Vec::with_capacity(stored.len());
    for (token, row) in stored.chunks_exact(top_k).enumerate() {
        let mut seen = HashSet::new();
        for &expert in row {
            let known = u32::try_from(expert).ok().filter(|&expert| (expert as usize) < experts);
            table.push(known.ok_or_else(|| format!("token {token} has expert {expert}, there are {experts}"))?);
            if !seen.insert(expert) {
                return Err(format!("token {token} has expert {expert} twice"));
            }
        }
    }
    Ok(table)
}
