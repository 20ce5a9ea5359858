//! The pieces of a step for composed attention: neighbouring sequences with equally many rows each, padded to the longest
//! context among them, so that steady decode is one piece whatever the batch. Pieces are cut where their scratch memory would
//! pass [`MAX_CONTEXT`] or [`MAX_SCORES`].

use super::Span;
use crate::backend::BLOCK;

/// Positions whose keys and values are gathered at a time, unless one sequence has more: twice 256 MiB in f32 for 8 heads
/// of 128.
const MAX_CONTEXT: usize = 1 << 16;
/// Scores of a head at a time, unless one row has more: twice 128 MiB in f32 for 32 heads.
const MAX_SCORES: usize = 1 << 20;
/// Rows that are computed together: `sequences` times `rows` from `first_row` on, each over `blocks` blocks of context.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) first_row: usize,
    pub(crate) sequences: usize,
    pub(crate) rows: usize,
    pub(crate) blocks: usize,
    /// Position of the first row of each sequence.
    starts: Vec<usize>,
    /// Where its block numbers `[sequences, blocks]` begin in the indices,
    pub(super) table: usize,
    /// and its counts `[sequences, rows, blocks]` of visible positions in each block.
    pub(super) visible: usize,
}

impl Piece {
    /// Positions of context of each sequence, padding included.
    pub(crate) fn context(&self) -> usize {
        self.blocks * BLOCK
    }

    pub(super) fn scores(&self) -> usize {
        self.sequences * self.rows * self.context()
    }

    /// For each row and block, how many of the positions `0..limit(position of the row)` lie in it.
    fn counts(&self, limit: impl Fn(usize) -> usize) -> impl Iterator<Item = i32> {
        let positions = self.starts.iter().flat_map(|&start| start..start + self.rows);
        positions.flat_map(move |position| {
            let limit = limit(position);
            (0..self.blocks).map(move |block| limit.saturating_sub(block * BLOCK).min(BLOCK) as i32)
        })
    }

    /// Whether a piece of one sequence can join this one.
    fn takes(&self, other: &Piece) -> bool {
        let joined = Piece { sequences: self.sequences + 1, blocks: self.blocks.max(other.blocks), ..self.clone() };
        self.rows == other.rows && joined.sequences * joined.context() <= MAX_CONTEXT && joined.scores() <= MAX_SCORES
    }
}

/// Appends what composed attention needs, and says what is computed together.
pub(super) fn append_pieces(indices: &mut Vec<i32>, spans: &[Span]) -> Vec<Piece> {
    let mut pieces: Vec<(Piece, Vec<&[u32]>)> = Vec::new();
    let mut first_row = 0;
    for s in spans {
        let most = (MAX_SCORES / (s.start + s.len).next_multiple_of(BLOCK)).max(1);
        for start in (s.start..s.start + s.len).step_by(most) {
            let rows = most.min(s.start + s.len - start);
            let blocks = (start + rows).div_ceil(BLOCK);
            let piece = Piece { first_row, sequences: 1, rows, blocks, starts: vec![start], table: 0, visible: 0 };
            first_row += rows;
            match pieces.last_mut() {
                Some((last, tables)) if last.takes(&piece) => {
                    last.sequences += 1;
                    last.blocks = last.blocks.max(blocks);
                    last.starts.push(start);
                    tables.push(&s.table);
                }
                _ => pieces.push((piece, vec![&s.table])),
            }
        }
    }
    for (piece, tables) in &mut pieces {
        piece.table = indices.len();
        for (table, start) in tables.iter().zip(&piece.starts) {
            let own = (start + piece.rows).div_ceil(BLOCK);
            indices.extend((0..piece.blocks).map(|i| table[if i < own { i } else { 0 }] as i32));
        }
        piece.visible = indices.len();
        indices.extend(piece.counts(|position| position + 1));
    }
    pieces.into_iter().map(|(piece, _)| piece).collect()
}

/// Appends for each row and block how many positions lie before the row's window, and says where.
pub(super) fn append_hidden(indices: &mut Vec<i32>, pieces: &[Piece], window: usize) -> usize {
    let start = indices.len();
    for piece in pieces {
        indices.extend(piece.counts(|position| (position + 1).saturating_sub(window)));
    }
    start
}

#[cfg(test)]
mod tests {
    use super::super::{Fused, Part, Span, Step};
    use super::*;

    /// A step for composed attention; each sequence has a thousand blocks of its own.
    fn step(spans: &[(usize, usize)]) -> Step {
        let table = |s: usize| (s as u32 * 1000..s as u32 * 1000 + 1000).collect();
        let span = |(s, &(start, len)): (usize, &(usize, usize))| Span { start, len, table: table(s) };
        Step::new(&spans.iter().enumerate().map(span).collect::<Vec<_>>(), &[], &[Part::Composed])
    }

    fn spans() -> [Span; 2] {
        [Span { start: 0, len: 35, table: vec![7] }, Span { start: 250, len: 1, table: vec![4, 9] }]
    }

    #[test]
    fn fused_attention_is_given_whole_sequences_or_short_runs_whose_context_ends_with_them() {
        let step = Step::new(&spans(), &[], &[Part::Whole, Part::Short]);
        let numbers = |part| {
            let Fused { sequences, table, blocks, .. } = step.fused(part);
            let count = sequences.lengths.len() * blocks;
            (sequences.query_ends.clone(), sequences.lengths.clone(), step.indices[*table..][..count].to_vec())
        };
        assert_eq!(numbers(Part::Whole), (vec![35, 36], vec![35, 251], vec![7, 7, 4, 9]));
        let tables = vec![7, 7, 7, 7, 7, 7, 4, 9];
        assert_eq!(numbers(Part::Short), (vec![16, 32, 35, 36], vec![16, 32, 35, 251], tables));
        assert!(step.pieces.is_empty() && step.indices.len() == 2 * 36 + 4 + 8, "nothing of what is not asked for");
    }

    #[test]
    fn steady_decode_is_one_piece_whatever_the_batch() {
        for batch in [1, 2, 33, 64] {
            let spans: Vec<_> = (0..batch).map(|s| (s * 13, 1)).collect();
            let step = step(&spans);
            assert_eq!(step.pieces.len(), 1);
            assert_eq!((step.pieces[0].sequences, step.pieces[0].rows), (batch, 1));
        }
    }

    #[test]
    fn pieces_cover_all_rows_in_order_and_stay_within_their_scratch_memory() {
        let shapes: [&[(usize, usize)]; 5] = [
            &[(0, 1), (0, 17), (0, 70)],
            &[(100_000, 1), (5, 1), (6, 1), (0, 300), (7, 1)],
            &[(0, 8192), (60_000, 4096)],
            &[(40_000, 1), (40_000, 1), (3, 1)],
            &[(0, 5), (8, 5), (900, 5)],
        ];
        for spans in shapes {
            let step = step(spans);
            let mut positions = Vec::new();
            for piece in &step.pieces {
                assert_eq!((piece.first_row, piece.starts.len()), (positions.len(), piece.sequences));
                positions.extend(piece.starts.iter().flat_map(|&start| start..start + piece.rows));
                assert!(piece.sequences == 1 || piece.sequences * piece.context() <= MAX_CONTEXT, "{piece:?}");
                assert!(piece.sequences * piece.rows == 1 || piece.scores() <= MAX_SCORES, "{piece:?}");
                assert!(piece.starts.iter().all(|start| start + piece.rows <= piece.context()), "{piece:?}");
            }
            let expected: Vec<_> = spans.iter().flat_map(|&(start, len)| start..start + len).collect();
            assert_eq!(positions, expected);
        }
    }

    #[test]
    fn a_short_context_is_padded_with_blocks_of_its_own() {
        let step = step(&[(300, 1), (5, 1)]);
        let [piece] = step.pieces.as_slice() else { panic!("{:?}", step.pieces) };
        assert_eq!(step.indices[piece.table..][..6], [0, 1, 2, 1000, 1000, 1000]);
        assert_eq!(step.indices[piece.visible..][..6], [128, 128, 45, 6, 0, 0]);
    }
}
