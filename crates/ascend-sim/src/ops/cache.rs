//! Keys and values written to a paged cache, and read from it.
//!
//! A slot is a block's id times its positions plus a position in it. A cache counts positions in its second dimension, or,
//! where heads or groups of columns come before them, in its third.

use super::view::{fix, shaped, store};
use crate::{
    array::{Chip, Fault, Refusal},
    dtype,
    limits::{SCATTER_HEAD_BYTES, SCATTER_ROW_BYTES_BELOW, check, fits, valid},
    math::moves::{row, unique_rows},
    op::{Kernel, Ref, Tensor, operator},
    runtime::Runtime,
};

/// How a cache is laid out.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Layout {
    /// `[blocks, positions, heads, width]`.
    Positions,
    /// `[blocks, heads, positions, width]`.
    Heads,
    /// `[blocks, heads * width / c, positions, c]` where a row of c has 32 bytes.
    Blocked,
}

impl Layout {
    fn of(cache: Option<&str>, scatter: Option<&str>) -> Result<Layout, Refusal> {
        match (cache.unwrap_or("Norm"), scatter.unwrap_or("None")) {
            ("Norm", "None") => Ok(Layout::Positions),
            ("Norm", "NHSD") => Ok(Layout::Heads),
            ("PA_NZ", "None") => Ok(Layout::Blocked),
            (cache, scatter) => {
                Err(fits(false, || format!("cacheMode {cache:?} with {scatter:?} is not simulated")).unwrap_err())
            }
        }
    }

    /// The dimension that counts positions.
    fn position_dim(self) -> usize {
        if self == Layout::Positions { 1 } else { 2 }
    }

    /// Refuses a cache that is not for heads of this width.
    fn check(self, what: &str, cache: &Tensor, heads: i64, width: i64) -> Result<(), Refusal> {
        let d = &cache.dims;
        valid(d.len() == 4, || format!("{what} {d:?}: four dimensions"))?;
        let c = 32 / dtype::bytes(cache.dtype, 1) as i64;
        let want = match self {
            Layout::Positions => vec![d[0], d[1], heads, width],
            Layout::Heads => vec![d[0], heads, d[2], width],
            Layout::Blocked => {
                fits(heads * width % c == 0, || format!("{what}: rows of {} in groups of {c}", heads * width))?;
                vec![d[0], heads * width / c, d[2], c]
            }
        };
        shaped(what, cache, &want)
    }

    /// The row of a position of a block, its elements in the order of heads and then columns.
    fn place(self, cache: &Tensor, slot: usize) -> Tensor {
        let at = self.position_dim();
        let size = cache.dims[at] as usize;
        fix(cache, at..at + 1, slot % size).at((slot / size) as i64)
    }
}

operator! {
    /// Keys and values written to the slots of a paged cache.
    ScatterPaKvCache = aclnnScatterPaKvCache, aclnnScatterPaKvCacheGetWorkspaceSize (
        key: Tensor,
        key_cache: Ref,
        slot_mapping: Tensor,
        value: Tensor,
        value_cache: Ref,
        compress_lens: Option<Tensor>,
        compress_seq_offset: Option<Tensor>,
        seq_lens: Option<Tensor>,
        cache_mode: Option<String>,
        scatter_mode: Option<String>,
        strides: Option<Vec<i64>>,
        offsets: Option<Vec<i64>>,
    )
}

impl ScatterPaKvCache {
    fn layout(&self) -> Result<Layout, Refusal> {
        Layout::of(self.cache_mode.as_deref(), self.scatter_mode.as_deref())
    }

    /// What is written where: only keys if both of the values are empty.
    fn pairs(&self) -> Vec<(&Tensor, &Tensor)> {
        let mut pairs: Vec<(&Tensor, &Tensor)> = vec![(&self.key, &self.key_cache)];
        if self.value.numel() + self.value_cache.numel() > 0 {
            pairs.push((&self.value, &self.value_cache));
        }
        pairs
    }
}

impl Kernel for ScatterPaKvCache {
    const ACCEPTS_EMPTY: bool = true;

    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        let tensors: [&dyn crate::limits::Seen; 5] =
            [&self.key, &self.key_cache, &self.slot_mapping, &self.value, &self.value_cache];
        check(chip, "ScatterPaKvCache", &tensors)?;
        let compressed = [&self.compress_lens, &self.compress_seq_offset, &self.seq_lens];
        fits(compressed.iter().all(|c| c.is_none()), || "compressed caches are not simulated".to_owned())?;
        // They only count in a mode that is not simulated.
        let steps = [&self.strides, &self.offsets];
        let pairs = steps.iter().all(|s| s.as_ref().is_none_or(|s| s.len() == 2));
        valid(pairs, || format!("strides and offsets {steps:?}: one for keys and one for values"))?;
        let (layout, tokens) = (self.layout()?, self.slot_mapping.numel() as i64);
        valid(self.slot_mapping.rank() == 1 && tokens > 0, || format!("slotMapping {:?}", self.slot_mapping.dims))?;
        let slots = |cache: &Tensor| cache.dims[0] * cache.dims[layout.position_dim()];
        let mut row_bytes = 0;
        for (source, cache) in self.pairs() {
            let d = &source.dims;
            let full = d.len() == 3 && d[0] == tokens && !d.contains(&0) && !cache.dims.contains(&0);
            valid(full, || format!("{d:?} to {:?}: [{tokens}, heads, width]", cache.dims))?;
            layout.check("the cache", cache, d[1], d[2])?;
            let same = slots(cache) == slots(&self.key_cache);
            valid(same, || format!("caches of {} and {} slots", slots(&self.key_cache), slots(cache)))?;
            let head = dtype::bytes(cache.dtype, d[2] as u64) as i64;
            row_bytes += d[1] * head;
            let aligned = layout == Layout::Positions || head % SCATTER_HEAD_BYTES == 0;
            fits(aligned, || format!("heads of {head} bytes: a multiple of {SCATTER_HEAD_BYTES}"))?;
        }
        fits(layout != Layout::Heads || row_bytes < SCATTER_ROW_BYTES_BELOW, || {
            format!("{row_bytes} bytes for each token: below {SCATTER_ROW_BYTES_BELOW}")
        })
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        let layout = self.layout().expect("checked in phase 1");
        let slots = self.key_cache.dims[0] * self.key_cache.dims[layout.position_dim()];
        let rows = unique_rows(&rt.load_ints(&self.slot_mapping)?.data, slots as usize, "slot")?;
        for (source, cache) in self.pairs() {
            let data = rt.load(source)?.data;
            let width = data.len() / rows.len();
            for (token, &slot) in data.chunks_exact(width).zip(&rows) {
                store(rt, &layout.place(cache, slot), token.to_vec())?;
            }
        }
        Ok(())
    }
}

operator! {
    /// Keys and values of sequences, read from the blocks of a paged cache into rows.
    GatherPaKvCache = aclnnGatherPaKvCache, aclnnGatherPaKvCacheGetWorkspaceSize (
        key_cache: Tensor,
        value_cache: Tensor,
        block_tables: Tensor,
        seq_lens: Tensor,
        key: Ref,
        value: Ref,
        seq_offset: Option<Tensor>,
        cache_mode: String,
        is_seq_lens_cumsum: bool,
    )
}

impl Kernel for GatherPaKvCache {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        let tensors: [&dyn crate::limits::Seen; 7] = [
            &self.key_cache,
            &self.value_cache,
            &self.block_tables,
            &self.seq_lens,
            &self.key,
            &self.value,
            &self.seq_offset,
        ];
        check(chip, "GatherPaKvCache", &tensors)?;
        let layout = Layout::of(Some(&self.cache_mode), None)?;
        let table = &self.block_tables.dims;
        valid(table.len() == 2, || format!("blockTables {table:?}: [sequences, blocks]"))?;
        // Cumulative lengths begin with a zero. UNCONFIRMED.
        shaped("seqLens", &self.seq_lens, &[table[0] + i64::from(self.is_seq_lens_cumsum)])?;
        if let Some(offset) = &self.seq_offset {
            shaped("seqOffset", offset, &table[..1])?;
        }
        for (rows, cache) in [(&self.key, &self.key_cache), (&self.value, &self.value_cache)] {
            let d = &rows.dims;
            let (rank, heads) =
                if layout == Layout::Blocked { (2, 1) } else { (3, d.get(1).copied().unwrap_or_default()) };
            valid(d.len() == rank && d[0] == self.key.dims[0], || format!("rows {d:?}: {rank} dimensions"))?;
            layout.check("the cache", cache, heads, d[rank - 1])?;
        }
        Ok(())
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        let layout = Layout::of(Some(&self.cache_mode), None).expect("checked in phase 1");
        let size = self.key_cache.dims[layout.position_dim()] as usize;
        let blocks = self.key_cache.dims[0] as usize;
        let (table, mut lens) = (rt.load_ints(&self.block_tables)?, rt.load_ints(&self.seq_lens)?.data);
        if self.is_seq_lens_cumsum {
            lens = lens.windows(2).map(|w| w[1] - w[0]).collect();
        }
        let offsets = match &self.seq_offset {
            Some(offset) => rt.load_ints(offset)?.data,
            None => vec![0; lens.len()],
        };
        let mut out = 0;
        for ((blocks_of, len), offset) in table.data.chunks_exact(table.dims[1]).zip(lens).zip(offsets) {
            for position in offset..offset + len {
                let entry = row(position / size as i64, blocks_of.len(), "block of the table")?;
                let slot = row(blocks_of[entry], blocks, "block")? * size + position as usize % size;
                let to = row(out, self.key.dims[0] as usize, "row")?;
                for (rows, cache) in [(&self.key, &self.key_cache), (&self.value, &self.value_cache)] {
                    let found = rt.load(&layout.place(cache, slot))?;
                    store(rt, &rows.at(to as i64), found.data)?;
                }
                out += 1;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::bench::{BF16, Bench, F16, F32, I32, I64, inplace, numbers};

    fn scatter(
        key: &Tensor,
        key_cache: &Tensor,
        value: &Tensor,
        value_cache: &Tensor,
        slots: &Tensor,
    ) -> ScatterPaKvCache {
        ScatterPaKvCache {
            key: key.clone(),
            key_cache: inplace(key_cache),
            slot_mapping: slots.clone(),
            value: value.clone(),
            value_cache: inplace(value_cache),
            compress_lens: None,
            compress_seq_offset: None,
            seq_lens: None,
            cache_mode: None,
            scatter_mode: Some("None".to_owned()),
            strides: Some(vec![1, 1]),
            offsets: Some(vec![0, 0]),
        }
    }

    #[test]
    fn rows_lie_where_their_slots_say_in_every_layout() {
        let b = Bench::new(Chip::A2);
        let (heads, width, v_width) = (2, 32, 16);
        let key = b.floats(&[3, heads, width], F16, &numbers(3 * 64, 1));
        let value = b.floats(&[3, heads, v_width], F16, &numbers(3 * 32, 2));
        let slots = b.ints(&[3], I32, &[9, 0, 6]);
        for (cache_mode, scatter_mode) in [("Norm", "None"), ("Norm", "NHSD"), ("PA_NZ", "None")] {
            let dims = |w: i64| match (cache_mode, scatter_mode) {
                ("PA_NZ", _) => [3, heads * w / 16, 4, 16],
                (_, "NHSD") => [3, heads, 4, w],
                _ => [3, 4, heads, w],
            };
            let k = b.floats(&dims(width), F16, &[0.0; 3 * 4 * 64]);
            let v = b.floats(&dims(v_width), F16, &[0.0; 3 * 4 * 32]);
            let (cache_mode, scatter_mode) = (Some(cache_mode.to_owned()), Some(scatter_mode.to_owned()));
            b.run(&ScatterPaKvCache { cache_mode, scatter_mode, ..scatter(&key, &k, &value, &v, &slots) }).unwrap();
            let (k_read, v_read, rows) = (b.read(&k), b.read(&v), b.read(&key));
            for (t, slot) in [9, 0, 6].into_iter().enumerate() {
                let (block, offset) = (slot / 4, slot % 4);
                for (i, &x) in rows[t * 64..][..64].iter().enumerate() {
                    let at = match dims(width) {
                        [_, groups, 4, w] => {
                            ((block * groups as usize + i / w as usize) * 4 + offset) * w as usize + i % w as usize
                        }
                        _ => slot * 64 + i,
                    };
                    assert_eq!(k_read[at], x, "{:?} {slot} {i}", k.dims);
                }
            }
            let written = |data: &[f32]| data.iter().filter(|x| **x != 0.0).count();
            assert_eq!(written(&k_read), written(&rows));
            assert_eq!(written(&v_read), written(&b.read(&value)));
        }
    }

    #[test]
    fn keys_alone_are_written_when_values_are_empty() {
        let b = Bench::new(Chip::A2);
        let (key, cache) = (b.floats(&[1, 1, 16], F16, &numbers(16, 1)), b.floats(&[1, 2, 1, 16], F16, &[0.0; 32]));
        let (slots, none) = (b.ints(&[1], I64, &[1]), b.empty(&[0], F16));
        b.run(&scatter(&key, &cache, &none, &none, &slots)).unwrap();
        assert_eq!(b.read(&cache)[16..], b.read(&key));
        let half = scatter(&key, &cache, &key, &none, &slots);
        assert_eq!(b.check(&half), 161_002);
    }

    #[test]
    fn slots_are_unique_and_inside_the_cache() {
        let b = Bench::new(Chip::A2);
        let (key, cache) = (b.floats(&[2, 1, 16], F16, &numbers(32, 1)), b.floats(&[1, 4, 1, 16], F16, &[0.0; 64]));
        for (slots, fault) in [([3, 0], 0), ([3, 4], 1), ([-1, 0], 1), ([2, 2], 2)] {
            let slots = b.ints(&[2], I64, &slots);
            let result = b.run(&scatter(&key, &cache, &key, &cache.clone(), &slots));
            let got = match result {
                Ok(()) => 0,
                Err(Fault::OutOfRange(_)) => 1,
                Err(_) => 2,
            };
            assert_eq!(got, fault, "{slots:?}");
        }
    }

    #[test]
    fn caches_are_narrow_and_shaped_for_their_rows() {
        let b = Bench::new(Chip::A2);
        let slots = b.empty(&[2], I32);
        // Dtype, heads, width, the cache, the mode of scattering, the code.
        for (dtype, heads, width, cache, mode, want) in [
            (F16, 2, 16, [4, 8, 2, 16], "None", 0),
            (BF16, 2, 16, [4, 8, 2, 16], "None", 0),
            (F32, 2, 16, [4, 8, 2, 16], "None", 161_002),
            (F16, 2, 16, [4, 2, 8, 16], "None", 161_002),
            (F16, 2, 16, [4, 2, 8, 16], "NHSD", 0),
            (F16, 2, 8, [4, 2, 8, 8], "NHSD", 561_002),
            (F16, 2, 8, [4, 8, 2, 8], "None", 0),
            (F16, 383, 128, [1, 383, 16, 128], "NHSD", 0),
            (F16, 384, 128, [1, 384, 16, 128], "NHSD", 561_002),
            (F16, 2, 16, [4, 8, 2, 16], "Nct", 561_002),
        ] {
            let (row, cache) = (b.empty(&[2, heads, width], dtype), b.empty(&cache, dtype));
            let op = scatter(&row, &cache, &row, &cache, &slots);
            assert_eq!(
                b.check(&ScatterPaKvCache { scatter_mode: Some(mode.to_owned()), ..op }),
                want,
                "{heads} {width} {mode}"
            );
        }
        assert_eq!(Bench::new(Chip::P310).check(&scatter(&slots, &slots, &slots, &slots, &slots)), 561_003);
    }

    #[test]
    fn gathering_gives_back_what_was_scattered() {
        let b = Bench::new(Chip::A2);
        let (k, v) = (b.floats(&[3, 4, 1, 8], F16, &numbers(96, 1)), b.floats(&[3, 4, 1, 16], F16, &numbers(192, 2)));
        let table = b.ints(&[2, 2], I32, &[2, 0, 1, 99]);
        let (key, value) = (b.empty(&[8, 1, 8], F16), b.empty(&[8, 1, 16], F16));
        let op = |lens: &Tensor, offset: Option<Tensor>, cumsum| GatherPaKvCache {
            key_cache: k.clone(),
            value_cache: v.clone(),
            block_tables: table.clone(),
            seq_lens: lens.clone(),
            key: inplace(&key),
            value: inplace(&value),
            seq_offset: offset,
            cache_mode: "Norm".to_owned(),
            is_seq_lens_cumsum: cumsum,
        };
        let keys = b.read(&k);
        let want = |slots: [usize; 8]| slots.into_iter().flat_map(|s| keys[s * 8..][..8].to_vec()).collect::<Vec<_>>();
        let (lens, ends) = (b.ints(&[2], I32, &[5, 3]), b.ints(&[3], I32, &[0, 5, 8]));
        for (lens, cumsum) in [(&lens, false), (&ends, true)] {
            b.run(&op(lens, None, cumsum)).unwrap();
            assert_eq!(b.read(&key), want([8, 9, 10, 11, 0, 4, 5, 6]));
            assert_eq!(b.check(&op(lens, None, !cumsum)), 161_002);
        }
        let (offset, lens) = (b.ints(&[2], I32, &[1, 3]), b.ints(&[2], I32, &[7, 1]));
        b.run(&op(&lens, Some(offset), false)).unwrap();
        assert_eq!(b.read(&key), want([9, 10, 11, 0, 1, 2, 3, 7]));
        let long = b.ints(&[2], I32, &[3, 5]);
        assert!(matches!(b.run(&op(&long, None, false)), Err(Fault::OutOfRange(_))));
    }
}
