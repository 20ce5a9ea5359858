//! Codes under scales in device memory: `Coded` of `kernels/coded.cuh`.
//!
//! A row has its own scales, so that it lies whole wherever a matrix is cut: one for every 32, 64 or 128 columns, as many as share one
//! in the checkpoint. Where columns that share one do not lie together (in the order of activations, or behind a cut), the device has
//! them in another order, each group padded to whole runs, and whoever multiplies brings its rows into that order.
//!
//! Invariant: an element is `(code - zero) · scale` with code, zero and scale of [`Coding`], in f32.

use baton_device::{Code, CodedRows, Coding};

use crate::tensor::DataType;
use crate::weights::{CHUNK, SPAN, padded, place};

/// Runs of columns that can share a scale.
const RUNS: [usize; 3] = [SPAN, 64, CHUNK];

/// How codes lie: the parameters of `Coded`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Layout {
    code: Code,
    /// Columns under one scale, of [`RUNS`].
    run: usize,
    scales: DataType,
    zeros: bool,
}

impl Layout {
    pub(crate) fn type_name(self) -> String {
        let Self { code, run, scales, zeros } = self;
        let code = match code {
            Code::Int4 => "Int<4>",
            Code::Int8 => "Int<8>",
            Code::E2M1 => "Float<4, 2>",
            Code::E4M3 => "Float<8, 4>",
            Code::E5M2 => "Float<8, 5>",
        };
        format!("Coded<{code}, {run}, {}, {zeros}>", scales.name())
    }

    /// Where the planes of a row begin: codes, scales, zeros; and where the last ends.
    fn planes(self, k: usize) -> [usize; 4] {
        let (spans, runs) = (k.div_ceil(SPAN), SPAN / self.run);
        let codes = 16 * self.code.bits() * spans;
        let scales = codes + runs * spans * self.scales.bytes();
        [0, codes, scales, scales + if self.zeros { runs * spans } else { 0 }]
    }

    pub(crate) fn row_bytes(self, k: usize) -> usize {
        self.planes(k)[3].next_multiple_of(16)
    }

    /// Rows of `k` columns, the matrix's or those of `order`.
    pub(crate) fn pack(self, coding: &Coding, rows: &CodedRows, k: usize, order: Option<&[i32]>) -> Vec<u8> {
        let (Self { code, run, .. }, columns, groups) = (self, coding.group_of.len(), coding.groups);
        let source = |column: usize| match order {
            Some(order) => usize::try_from(order[column]).ok(),
            None => Some(column).filter(|column| *column < columns),
        };
        // Each run's group, and the columns of its codes; a run of padding alone is in none.
        let runs: Vec<_> = (0..k.div_ceil(SPAN) * (SPAN / run))
            .map(|number| {
                let sources =
                    (number * run..(number + 1) * run).map(|column| if column < k { source(column) } else { None });
                let sources: Vec<_> = sources.collect();
                (sources.iter().flatten().next().map(|column| coding.group_of[*column] as usize), sources)
            })
            .collect();
        let places: Vec<_> = (0..SPAN).map(|column| place(column, code.bits(), CHUNK)).collect();
        let ([_, scales, zeros, _], stride, size) = (self.planes(k), self.row_bytes(k), self.scales.bytes());
        let mut out = vec![0; rows.codes.len() / columns * stride];
        for (row, (codes, out)) in rows.codes.chunks_exact(columns).zip(out.chunks_exact_mut(stride)).enumerate() {
            for (number, (group, sources)) in runs.iter().enumerate() {
                let Some(group) = group else { continue };
                let at = row * groups + group;
                let zero = rows.zeros.get(at).copied().unwrap_or(code.zero());
                for (column, source) in (number * run..).zip(sources) {
                    let (byte, shift) = places[column % SPAN];
                    out[column / SPAN * 16 * code.bits() + byte] |=
                        source.map_or(zero, |source| codes[source]) << shift;
                }
                out[scales + number * size..][..size].copy_from_slice(&self.scales.encode(&rows.scales[at..=at]));
                if self.zeros {
                    out[zeros + number] = zero;
                }
            }
        }
        out
    }
}

/// How codes are to lie, and in which order their columns, if not in their own.
pub(crate) fn arrange(coding: &Coding) -> (Layout, Option<Vec<i32>>) {
    let &Coding { code, scales, zeros, ref group_of, .. } = coding;
    let scales = DataType::of(scales).expect("scales are floats");
    let layout = |run| Layout { code, run, scales, zeros };
    let is_one = |run: &[u32]| run.iter().all(|group| *group == run[0]);
    if let Some(run) = RUNS.into_iter().find(|run| group_of.chunks(*run).all(is_one)) {
        return (layout(run), None);
    }
    // Whichever takes the least: longer runs have fewer scales, and more padding.
    let ordered = RUNS.map(|run| (layout(run), order(group_of, run)));
    let bytes = |(layout, order): &(Layout, Vec<i32>)| layout.row_bytes(order.len());
    let (layout, order) = ordered.into_iter().min_by_key(bytes).expect("there are runs");
    (layout, Some(order))
}

/// Columns by their group, those of each filled up to whole runs.
fn order(group_of: &[u32], run: usize) -> Vec<i32> {
    let mut columns: Vec<i32> = (0..group_of.len() as i32).collect();
    columns.sort_by_key(|column| group_of[*column as usize]);
    let mut order = Vec::with_capacity(padded(group_of.len()));
    for group in columns.chunk_by(|a, b| group_of[*a as usize] == group_of[*b as usize]) {
        order.extend(group);
        order.resize(order.len().next_multiple_of(run), -1);
    }
    order
}

#[cfg(test)]
mod tests {
    use baton_device::DType;

    use super::*;

    fn coding(code: Code, zeros: bool, group_of: Vec<u32>) -> Coding {
        let groups = group_of.iter().max().map_or(0, |group| *group as usize + 1);
        Coding { code, scales: DType::F16, zeros, groups, group_of }
    }

    fn rows(coding: &Coding, rows: usize) -> CodedRows {
        let mask = if coding.code.bits() == 4 { 15 } else { 255 };
        let cells = rows * coding.groups;
        CodedRows {
            codes: (0..rows * coding.group_of.len()).map(|i| (i * 37 + i / 7) as u8 & mask).collect(),
            scales: (0..cells).map(|i| 0.5 + i as f32 / 16.0).collect(),
            zeros: if coding.zeros { (0..cells).map(|i| (i * 5 + 3) as u8 & mask).collect() } else { Vec::new() },
        }
    }

    /// Code, scale and zero of an element as the device finds them: by the words that its header tells of.
    fn element(layout: Layout, row: &[u8], k: usize, column: usize) -> (u8, f32, u8) {
        let bits = layout.code.bits();
        let (span, chunk, rest) = (column / SPAN, column % SPAN / CHUNK, column % CHUNK);
        let (lane, field, second) = (rest / 8, 4 * chunk + rest % 8 / 2, rest % 2);
        let at = ((span * 4 + lane) * bits + field / (16 / bits)) * 4;
        let word = u32::from_le_bytes(row[at..at + 4].try_into().unwrap());
        let code = (word >> (field % (16 / bits) * bits) >> (16 * second)) as u8 & (((1u16 << bits) - 1) as u8);
        let [_, scales, zeros, _] = layout.planes(k);
        let run = column / layout.run;
        let scale = half::f16::from_le_bytes([row[scales + 2 * run], row[scales + 2 * run + 1]]).to_f32();
        (code, scale, if layout.zeros { row[zeros + run] } else { layout.code.zero() })
    }

    #[test]
    fn every_element_is_where_the_device_looks_for_it_and_padding_means_zero() {
        let shuffled = |columns: usize, groups: u32| (0..columns as u32).map(|c| c * 7 % 11 % groups).collect();
        let cases: [(Vec<u32>, usize, bool); 7] = [
            (Coding::groups_of(300, 128), 128, true),
            (Coding::groups_of(5, 5), 128, true),
            (Coding::groups_of(192, 64), 64, true),
            (Coding::groups_of(200, 96), 32, true),
            (Coding::groups_of(384, 128)[64..].to_vec(), 64, true),
            (Coding::groups_of(100, 20), 32, false),
            (shuffled(256, 4), 32, false),
        ];
        for (group_of, run, in_order) in cases {
            for (code, zeros) in [(Code::Int4, true), (Code::Int8, false), (Code::E4M3, false), (Code::E2M1, false)] {
                let coding = coding(code, zeros, group_of.clone());
                let (layout, order) = arrange(&coding);
                assert_eq!((layout.run, order.is_none()), (run, in_order), "{group_of:?}");
                let k = order.as_ref().map_or(padded(group_of.len()), Vec::len);
                let rows = rows(&coding, 3);
                let packed = layout.pack(&coding, &rows, k, order.as_deref());
                for (row, bytes) in packed.chunks(layout.row_bytes(k)).enumerate() {
                    let mut seen = vec![false; group_of.len()];
                    for column in 0..k.next_multiple_of(SPAN) {
                        let (code, scale, zero) = element(layout, bytes, k, column);
                        let source = match &order {
                            Some(order) => order.get(column).and_then(|source| usize::try_from(*source).ok()),
                            None => Some(column).filter(|column| *column < group_of.len()),
                        };
                        let Some(source) = source else {
                            assert!(scale == 0.0 || code == zero, "column {column} of {k}");
                            continue;
                        };
                        let at = row * coding.groups + group_of[source] as usize;
                        let own = rows.zeros.get(at).copied().unwrap_or(layout.code.zero());
                        let wanted = (rows.codes[row * group_of.len() + source], rows.scales[at], own);
                        assert_eq!((code, scale, zero), wanted, "column {column} of {k}");
                        seen[source] = true;
                    }
                    assert!(seen.iter().all(|seen| *seen));
                }
            }
        }
    }

    #[test]
    fn codes_in_another_order_take_no_more_than_their_groups_do() {
        // In the order of activations each group has its size; a cut leaves some of each.
        let whole: Vec<u32> = (0..4096u32).map(|column| column * 1021 % 4096 / 128).collect();
        let (layout, order) = arrange(&coding(Code::Int4, true, whole.clone()));
        assert_eq!((layout.run, order.map(|order| order.len())), (128, Some(4096)));
        let (layout, order) = arrange(&coding(Code::Int4, true, whole[..2048].to_vec()));
        let bytes = layout.row_bytes(order.unwrap().len());
        assert!(bytes < 2048 * 3 / 4, "{bytes} for 1024");
    }

    #[test]
    fn scales_of_every_row_take_little_beside_codes() {
        for (code, size, most) in [(Code::E4M3, 128, 1.032), (Code::Int8, 4096, 1.017), (Code::Int4, 128, 1.032)] {
            let (layout, _) = arrange(&Coding {
                scales: if code == Code::E4M3 { DType::F32 } else { DType::F16 },
                ..coding(code, false, Coding::groups_of(4096, size))
            });
            let more = layout.row_bytes(4096) as f64 / (4096 * code.bits() / 8) as f64;
            assert!((1.0..most).contains(&more), "{code}: {more}");
        }
    }
}
