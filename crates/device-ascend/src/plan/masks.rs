//! What composed attention adds to scores: made on the device from constants, block by block, of counts that came with the
//! step; kept from layer to layer.

use super::pieces::{Piece, append_hidden};
use super::{Result, Step};
use crate::backend::BLOCK;
use crate::device::Device;
use crate::object::{DataType, View};
use crate::ops::index::{indices_bytes, select};
use crate::ops::rows;

/// Masks of a step that are kept from layer to layer: 64 MiB of f32. Larger ones are made anew in each layer.
const MAX_KEPT: usize = 1 << 24;
/// Added to the score of what a row must not see. Not infinite: a chip may saturate infinities, and a row of only such scores
/// shall give a number.
const MASKED: f32 = -1e30;

/// Constants from which masks are made: row c of `[2, BLOCK + 1, BLOCK]` masks all but the first c positions of a block, or
/// the first c.
pub(crate) fn mask_rows() -> Vec<f32> {
    let row = |visible: fn(usize, usize) -> bool, count: usize| {
        (0..BLOCK).map(move |i| if visible(i, count) { 0.0 } else { MASKED })
    };
    let table = |visible| (0..=BLOCK).flat_map(move |count| row(visible, count));
    table(|i, count| i < count).chain(table(|i, count| i >= count)).collect()
}

impl Step {
    /// Runs `work` with what is added to the scores of a piece, `[sequences, rows, context]` in f32. `constants` are
    /// [`mask_rows`].
    pub(crate) fn with_mask<T>(
        &self,
        device: &mut Device,
        number: usize,
        window: Option<usize>,
        constants: &View,
        work: impl FnOnce(&mut Device, &View) -> Result<T>,
    ) -> Result<T> {
        let piece = &self.pieces[number];
        let dims = [piece.sequences, piece.rows, piece.context()];
        let known = self.memory().masks.iter().find(|(w, n, _)| (*w, *n) == (window, number)).map(|m| m.2.clone());
        if let Some(mask) = known {
            return work(device, &mask);
        }
        if self.pieces.iter().map(Piece::scores).sum::<usize>() > MAX_KEPT {
            return device.with_views([(DataType::F32, &dims)], |device, [mask]| {
                self.mask(device, number, window, constants, &mask)?;
                work(device, &mask)
            });
        }
        let mask = self.keep(device, DataType::F32, &dims)?;
        self.mask(device, number, window, constants, &mask)?;
        self.memory().masks.push((window, number, mask.clone()));
        work(device, &mask)
    }

    /// Writes a mask.
    fn mask(
        &self,
        device: &mut Device,
        number: usize,
        window: Option<usize>,
        constants: &View,
        out: &View,
    ) -> Result<()> {
        let piece = &self.pieces[number];
        let (blocks, half) = (piece.scores() / BLOCK, BLOCK + 1);
        let out = out.reshape(&[blocks, BLOCK]);
        let visible = self.indices(device, piece.visible, blocks)?;
        select(device, &constants.narrow(0, 0, half), &visible, &out)?;
        let Some(window) = window else { return Ok(()) };
        device.with_views([(DataType::F32, &[blocks, BLOCK])], |device, [before]| {
            let constants = constants.narrow(0, half, half);
            match self.windows.iter().find(|(known, _)| *known == window) {
                Some((_, start)) => {
                    let earlier: usize = self.pieces[..number].iter().map(|piece| piece.scores() / BLOCK).sum();
                    let hidden = self.indices(device, start + earlier, blocks)?;
                    select(device, &constants, &hidden, &before)?;
                }
                // A window that was not foreseen: in the first step that has it.
                None => {
                    let mut hidden = Vec::new();
                    append_hidden(&mut hidden, std::slice::from_ref(piece), window);
                    device.with_views([(DataType::I32, &[blocks])], |device, [view]| {
                        device.upload(&indices_bytes(&hidden), view.base)?;
                        select(device, &constants, &view, &before)
                    })?;
                }
            }
            rows::add(device, &out, &before)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constants_mask_what_is_not_among_the_first_or_what_is() {
        let rows = mask_rows();
        let row = |i: usize| &rows[i * BLOCK..][..BLOCK];
        for count in 0..=BLOCK {
            assert_eq!(row(count).iter().position(|x| *x != 0.0).unwrap_or(BLOCK), count);
            assert_eq!(row(BLOCK + 1 + count).iter().filter(|x| **x != 0.0).count(), count);
        }
    }
}
