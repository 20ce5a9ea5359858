//! DeepSeek-V4: pools and the attention that reads them, residual streams, experts by token.
//!
//! A layer has a plane of its vectors; where it pools, one of entries and one of running sums; where an indexer chooses among the
//! entries, two more such planes of its own. Vectors and sums pass, so every second plane is one of passing blocks.

use super::latent::chosen;
use super::{AttentionPlan, Experts, KvCache, Linear, Plane, Reference, Tensor, dot, norm, softmax, weighted_sum};
use crate::{
    CompressedOps, Entries, KvBlocks, KvDtype, LayerKv, Mixing, PoolKv, Pooling, Reads, Result, Rows, TokenIds,
    WindowedParams, weigh_experts,
};

/// The planes of a layer.
pub(super) fn planes(
    KvBlocks { kept, passing }: KvBlocks,
    block_size: usize,
    width: usize,
    pool: Option<PoolKv>,
    dtype: KvDtype,
) -> Vec<Plane> {
    let mut planes = vec![Plane::new((passing, block_size), (1, width), dtype)];
    if let Some(pool) = pool {
        for width in [width].into_iter().chain(pool.index) {
            planes.push(Plane::new((kept, pool.slots(block_size)), (1, width), dtype));
            planes.push(Plane::new((passing, 1), (1, pool.sums(width)), KvDtype::F32));
        }
    }
    planes
}

/// What a layer pools, and its planes of vectors, entries and sums.
fn pooled(cache: &mut KvCache, layer: usize, entries: Entries) -> (PoolKv, [&mut Plane; 2]) {
    let LayerKv::Windowed { pool: Some(pool), .. } = cache.kinds[layer] else { panic!("layer {layer} pools nothing") };
    match (&mut cache.layers[layer][1..], entries) {
        ([entries, sums, ..], Entries::Attended) => (pool, [entries, sums]),
        ([_, _, entries, sums], Entries::Index) => (pool, [entries, sums]),
        _ => panic!("layer {layer} has no indexer"),
    }
}

impl AttentionPlan {
    /// Kept block of a position that a row sees.
    fn kept(&self, row: usize, position: usize, block_size: usize) -> usize {
        self.rows[row][position] / block_size
    }

    /// Passing block of a position that a row reads.
    fn passing(&self, row: usize, position: usize, block_size: usize) -> usize {
        self.passing[row][position / block_size] as usize
    }

    /// Slot of an entry that a row sees.
    fn entry(&self, row: usize, entry: usize, pool: PoolKv, block_size: usize) -> usize {
        let (block, slot) = pool.place(entry, block_size);
        self.kept(row, block * block_size, block_size) * pool.slots(block_size) + slot
    }
}

/// The running sums of one entry: for each feature the largest gate, the sum of exponentials, that of values times these.
struct Sums<'a> {
    max: &'a mut [f32],
    sum: &'a mut [f32],
    mixed: &'a mut [f32],
}

impl<'a> Sums<'a> {
    fn of(memory: &'a mut [f32]) -> Self {
        let width = memory.len() / 3;
        let (max, rest) = memory.split_at_mut(width);
        let (sum, mixed) = rest.split_at_mut(width);
        Self { max, sum, mixed }
    }

    fn clear(&mut self) {
        self.max.fill(f32::NEG_INFINITY);
        self.sum.fill(0.0);
        self.mixed.fill(0.0);
    }

    fn add(&mut self, gates: &[f32], bias: &[f32], values: &[f32]) {
        for i in 0..values.len() {
            let gate = gates[i] + bias[i];
            let max = gate.max(self.max[i]);
            let (before, now) = ((self.max[i] - max).exp(), (gate - max).exp());
            self.max[i] = max;
            self.sum[i] = self.sum[i] * before + now;
            self.mixed[i] = self.mixed[i] * before + now * values[i];
        }
    }
}

impl CompressedOps for Reference {
    fn pool(
        &self,
        pooling: &Pooling<'_, Self>,
        entries: Entries,
        cache: &mut KvCache,
        layer: usize,
        plan: &AttentionPlan,
    ) -> Result<()> {
        let block_size = cache.block_size;
        let (pool, [entries, sums]) = pooled(cache, layer, entries);
        let (width, columns) = (entries.width, pool.series() * entries.width);
        assert_eq!((pooling.values.cols, pooling.gates.cols), (columns, columns), "columns of what is pooled");
        for row in 0..plan.rows.len() {
            let position = plan.position(row);
            let mut state = match position {
                0 => {
                    let mut state = vec![0.0; sums.width];
                    state.chunks_exact_mut(3 * width).for_each(|entry| Sums::of(entry).clear());
                    state
                }
                _ => sums.slot(plan.passing(row, position - 1, block_size)).to_vec(),
            };
            let place = position % pool.rate;
            let bias = &pooling.bias[place * columns..][..columns];
            let (current, next) = state.split_at_mut(3 * width);
            // The last series is for the entry of the token, the one before it for the next.
            let own = columns - width..columns;
            let mut current = Sums::of(current);
            current.add(&pooling.gates.row(row)[own.clone()], &bias[own.clone()], &pooling.values.row(row)[own]);
            if pool.overlaps {
                Sums::of(next).add(&pooling.gates.row(row)[..width], &bias[..width], &pooling.values.row(row)[..width]);
            }
            if place + 1 == pool.rate {
                let mut entry: Vec<f32> =
                    current.mixed.iter().zip(&*current.sum).map(|(mixed, sum)| mixed / sum).collect();
                norm(&mut entry, pooling.norm, pooling.eps);
                pooling.table.rotate(&mut entry, pooling.layout, position + 1 - pool.rate);
                entries.put(plan.entry(row, position / pool.rate, pool, block_size), &entry);
                if pool.overlaps {
                    state.copy_within(3 * width.., 0);
                }
                Sums::of(&mut state[(pool.series() - 1) * 3 * width..]).clear();
            }
            sums.put(plan.passing(row, position, block_size), &state);
        }
        Ok(())
    }

    fn windowed_attention(
        &self,
        q: &Tensor,
        kv: &Tensor,
        params: &WindowedParams<'_, Self>,
        cache: &mut KvCache,
        layer: usize,
        plan: &AttentionPlan,
        out: &mut Tensor,
    ) -> Result<()> {
        let WindowedParams { window, scale, sink, ref reads } = *params;
        let block_size = cache.block_size;
        let LayerKv::Windowed { width, pool, .. } = cache.kinds[layer] else { panic!("layer {layer} has no window") };
        let slot = |row, position| plan.passing(row, position, block_size) * block_size + position % block_size;
        for row in 0..kv.rows() {
            cache.layers[layer][0].put(slot(row, plan.position(row)), kv.row(row));
        }
        out.set_rows(q.rows());
        for row in 0..q.rows() {
            let position = plan.position(row);
            let entries = || -> Vec<usize> {
                let pool = pool.unwrap_or_else(|| panic!("layer {layer} pools nothing"));
                (0..pool.visible(position)).map(|entry| plan.entry(row, entry, pool, block_size)).collect()
            };
            let planes = &cache.layers[layer];
            let entries = match reads {
                Reads::Window => Vec::new(),
                Reads::All => entries(),
                Reads::Chosen { q, weights, top_k } => {
                    chosen((q.row(row), weights.row(row)), *top_k, &planes[3], &entries())
                }
            };
            let seen = ((position + 1).saturating_sub(window)..=position).map(|p| planes[0].slot(slot(row, p)));
            let seen: Vec<&[f32]> = seen.chain(entries.iter().map(|&s| planes[1].slot(s))).collect();
            for (head, sink) in sink.iter().enumerate() {
                let query = &q.row(row)[head * width..][..width];
                let mut scores: Vec<f32> = seen.iter().map(|c| scale * dot(query, c)).chain([*sink]).collect();
                softmax(&mut scores);
                weighted_sum(&scores, seen.iter().copied(), &mut out.row_mut(row)[head * width..][..width]);
            }
        }
        Ok(())
    }

    fn grouped_linear(&self, x: &Tensor, groups: &[Linear], out: &mut Tensor) -> Result<()> {
        out.set_rows(x.rows());
        let (inputs, outputs) = (x.cols / groups.len(), out.cols / groups.len());
        for row in 0..x.rows() {
            let parts = x.row(row).chunks_exact(inputs).zip(out.row_mut(row).chunks_exact_mut(outputs));
            groups.iter().zip(parts).for_each(|(weight, (x, out))| weight.apply(x, out));
        }
        Ok(())
    }

    fn clamp(&self, x: &mut Tensor, low: f32, high: f32) -> Result<()> {
        x.data.iter_mut().for_each(|x| *x = x.clamp(low, high));
        Ok(())
    }

    fn fused_moe_by_token(
        &self,
        x: &Tensor,
        logits: &Tensor,
        ids: TokenIds<'_, Vec<Option<u32>>>,
        experts: &Experts,
        out: &mut Tensor,
    ) -> Result<()> {
        let ids = ids.on_host();
        assert_eq!(ids.len(), x.rows(), "a token for each row");
        experts.apply(x, |row| weigh_experts(logits.row(row), ids[row], &experts.routing), out);
        Ok(())
    }

    fn fill_streams(&self, x: &Tensor, streams: &mut Tensor) -> Result<()> {
        streams.set_rows(x.rows());
        for row in 0..x.rows() {
            streams.row_mut(row).chunks_exact_mut(x.cols).for_each(|stream| stream.copy_from_slice(x.row(row)));
        }
        Ok(())
    }

    fn stream_weights(&self, mixing: &Mixing<'_, Self>, x: &mut Tensor) -> Result<()> {
        let &Mixing { streams: n, base, scale, iterations, eps } = mixing;
        let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
        for row in x.data.chunks_exact_mut(x.cols) {
            for (i, (x, base)) in row.iter_mut().zip(base).enumerate() {
                *x = *x * scale[(i / n).min(2)] + base;
            }
            row[..n].iter_mut().for_each(|x| *x = sigmoid(*x) + eps);
            if row.len() == n {
                continue;
            }
            row[n..2 * n].iter_mut().for_each(|x| *x = 2.0 * sigmoid(*x));
            let matrix = &mut row[2 * n..];
            for row in matrix.chunks_exact_mut(n) {
                softmax(row);
                row.iter_mut().for_each(|x| *x += eps);
            }
            for iteration in 0..iterations {
                if iteration > 0 {
                    for row in matrix.chunks_exact_mut(n) {
                        let sum = row.iter().sum::<f32>() + eps;
                        row.iter_mut().for_each(|x| *x /= sum);
                    }
                }
                for column in 0..n {
                    let sum = matrix[column..].iter().step_by(n).sum::<f32>() + eps;
                    matrix[column..].iter_mut().step_by(n).for_each(|x| *x /= sum);
                }
            }
        }
        Ok(())
    }

    fn join_streams(&self, streams: &Tensor, weights: &Tensor, out: &mut Tensor) -> Result<()> {
        out.set_rows(streams.rows());
        for row in 0..streams.rows() {
            let parts = streams.row(row).chunks_exact(out.cols);
            let weights = &weights.row(row)[..parts.len()];
            weighted_sum(weights, parts, out.row_mut(row));
        }
        Ok(())
    }

    fn mix_streams(&self, x: &Tensor, weights: &Tensor, streams: &mut Tensor) -> Result<()> {
        let n = streams.cols / x.cols;
        for row in 0..x.rows() {
            let (weights, before) = (weights.row(row), streams.row(row).to_vec());
            let (post, matrix) = (&weights[n..2 * n], &weights[2 * n..]);
            for (j, stream) in streams.row_mut(row).chunks_exact_mut(x.cols).enumerate() {
                for (column, s) in stream.iter_mut().enumerate() {
                    let mixed: f32 = (0..n).map(|i| matrix[i * n + j] * before[i * x.cols + column]).sum();
                    *s = post[j] * x.row(row)[column] + mixed;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::uniform;
    use crate::{AttentionBatch, Backend, DType, HostRope, HostTensor, KvSpec, RopeLayout, SequenceSpan};

    /// Entry `number` by the formula: one softmax over the gates of all its rows.
    fn entry(number: usize, pool: PoolKv, width: usize, values: &[f32], gates: &[f32], bias: &[f32]) -> Vec<f32> {
        let columns = pool.series() * width;
        // Tokens, and the series by which they count.
        let own = (number * pool.rate..(number + 1) * pool.rate).map(|token| (token, pool.series() - 1));
        let before = (number.saturating_sub(1) * pool.rate..number * pool.rate).map(|token| (token, 0));
        let rows: Vec<_> = if pool.overlaps { before.chain(own).collect() } else { own.collect() };
        let feature = |i: usize| {
            let at =
                |&(token, series): &(usize, usize)| (token * columns, series * width + i, token % pool.rate * columns);
            let gate = |row| {
                let (token, column, place) = at(row);
                gates[token + column] + bias[place + column]
            };
            let mut weights: Vec<f32> = rows.iter().map(gate).collect();
            softmax(&mut weights);
            let value = |row| values[at(row).0 + at(row).1];
            weights.iter().zip(&rows).map(|(weight, row)| weight * value(row)).sum::<f32>()
        };
        (0..width).map(feature).collect()
    }

    #[test]
    fn entries_are_what_one_softmax_over_their_tokens_gives_however_a_sequence_is_cut() {
        let (b, width, len) = (Reference::new(), 6, 101);
        for (rate, overlaps) in [(1, false), (3, true), (4, true), (4, false), (16, true), (20, false), (33, true)] {
            let pool = PoolKv { rate, overlaps, index: Some(width) };
            let columns = pool.series() * width;
            let [values, gates] = [1, 2].map(|seed| uniform(seed, len * columns, 3.0));
            let bias = uniform(3, rate * columns, 1.0);
            let layers = vec![LayerKv::Windowed { width, window: 1, pool: Some(pool) }];
            let block_size = b.caps().kv_block_size;
            let blocks = len.div_ceil(block_size);
            let table: Vec<u32> = (0..blocks as u32).rev().collect();
            let spec = KvSpec { layers, dtype: KvDtype::F32, block_size };
            let mut cache = b.kv_cache(&spec, KvBlocks { kept: blocks, passing: 2 }).unwrap();
            let rope = HostRope { inv_freq: vec![0.3], scale: 1.0, max_positions: len };
            let table_of_angles = b.rope_table(&rope).unwrap();
            let layout = RopeLayout { heads: 1, head_dim: width, offset: width - 2, dim: 2, interleaved: true };
            let norm_weight = uniform(4, width, 1.0);
            let mut start = 0;
            for len in [1, 7, 1, 1, 30, 2, 40, 19] {
                let passing: Vec<u32> = (0..blocks as u32).map(|block| block % 2).collect();
                let sequences = [SequenceSpan { start, len, block_table: &table, passing_table: &passing }];
                let plan = b.plan_attention(&AttentionBatch { sequences: &sequences }).unwrap();
                let rows = |all: &[f32]| {
                    let mut rows = b.tensor(len, columns).unwrap();
                    b.write(&all[start * columns..(start + len) * columns], &mut rows).unwrap();
                    rows
                };
                let pooling = Pooling {
                    values: &rows(&values),
                    gates: &rows(&gates),
                    bias: &bias,
                    norm: &norm_weight,
                    eps: 1e-6,
                    layout,
                    table: &table_of_angles,
                };
                for entries in [Entries::Attended, Entries::Index] {
                    b.pool(&pooling, entries, &mut cache, 0, &plan).unwrap();
                }
                start += len;
            }
            for number in 0..len / rate {
                let mut expected = entry(number, pool, width, &values, &gates, &bias);
                norm(&mut expected, &norm_weight, 1e-6);
                table_of_angles.rotate(&mut expected, layout, number * rate);
                let (block, slot) = pool.place(number, block_size);
                let slot = table[block] as usize * pool.slots(block_size) + slot;
                for plane in [1, 3] {
                    let actual = cache.layers[0][plane].slot(slot);
                    for (a, e) in actual.iter().zip(&expected) {
                        assert!((a - e).abs() < 1e-5, "rate {rate}, entry {number}: {actual:?}, not {expected:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_matrix_of_streams_has_rows_and_columns_of_sum_one() {
        let b = Reference::new();
        for n in [1, 2, 4] {
            let columns = (2 + n) * n;
            let vector = |seed, len: usize| {
                let bytes: Vec<u8> = uniform(seed, len, 1.0).iter().flat_map(|x| x.to_le_bytes()).collect();
                b.vector(&HostTensor::new("test", DType::F32, vec![len], &bytes)).unwrap()
            };
            let mixing =
                Mixing { streams: n, base: &vector(1, columns), scale: &vector(2, 3), iterations: 30, eps: 1e-6 };
            let mut x = b.tensor(3, columns).unwrap();
            b.write(&uniform(4, 3 * columns, 2.0), &mut x).unwrap();
            b.stream_weights(&mixing, &mut x).unwrap();
            for row in 0..3 {
                let (weights, matrix) = x.row(row).split_at(2 * n);
                assert!(weights[..n].iter().all(|pre| (0.0..1.1).contains(pre)), "{weights:?}");
                assert!(weights[n..].iter().all(|post| (0.0..2.0).contains(post)), "{weights:?}");
                for i in 0..n {
                    let (row, column): (f32, f32) =
                        (matrix[i * n..][..n].iter().sum(), matrix[i..].iter().step_by(n).sum());
                    assert!((row - 1.0).abs() < 1e-3 && (column - 1.0).abs() < 1e-3, "{matrix:?}");
                }
            }
        }
    }
}
