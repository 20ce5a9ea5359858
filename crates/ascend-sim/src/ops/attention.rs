//! Fused attention: one operator for prefill and decode, over keys in pages or in a row.
//!
//! Phase 1 brings every accepted layout to one [`Plan`]; what runs knows nothing of layouts. Lengths are the host's, frozen in
//! phase 1; ids of blocks are the device's, looked at when it runs.

use std::ops::Range;

use super::{
    latent,
    view::{fix, narrow, shaped, store},
};
use crate::{
    array::{Chip, Fault, Refusal},
    limits::{check, fits, fused, valid},
    math::{
        attention::{Heads, Mask, attend},
        matmul::Order,
        moves::row,
    },
    op::{Kernel, Out, Tensor, operator},
    runtime::Runtime,
};

operator! {
    /// softmax(query key^T * scale) value.
    FusedInferAttentionScoreV3 = aclnnFusedInferAttentionScoreV3, aclnnFusedInferAttentionScoreV3GetWorkspaceSize (
        query: Tensor,
        key: Vec<Tensor>,
        value: Vec<Tensor>,
        pse_shift: Option<Tensor>,
        atten_mask: Option<Tensor>,
        actual_seq_lengths: Option<Vec<i64>>,
        actual_seq_lengths_kv: Option<Vec<i64>>,
        deq_scale1: Option<Tensor>,
        quant_scale1: Option<Tensor>,
        deq_scale2: Option<Tensor>,
        quant_scale2: Option<Tensor>,
        quant_offset2: Option<Tensor>,
        antiquant_scale: Option<Tensor>,
        antiquant_offset: Option<Tensor>,
        block_table: Option<Tensor>,
        query_padding_size: Option<Tensor>,
        kv_padding_size: Option<Tensor>,
        key_antiquant_scale: Option<Tensor>,
        key_antiquant_offset: Option<Tensor>,
        value_antiquant_scale: Option<Tensor>,
        value_antiquant_offset: Option<Tensor>,
        key_shared_prefix: Option<Tensor>,
        value_shared_prefix: Option<Tensor>,
        actual_shared_prefix_len: Option<Vec<i64>>,
        query_rope: Option<Tensor>,
        key_rope: Option<Tensor>,
        key_rope_antiquant_scale: Option<Tensor>,
        num_heads: i64,
        scale_value: f64,
        pre_tokens: i64,
        next_tokens: i64,
        input_layout: String,
        num_key_value_heads: i64,
        sparse_mode: i64,
        inner_precise: i64,
        block_size: i64,
        antiquant_mode: i64,
        softmax_lse_flag: bool,
        key_antiquant_mode: i64,
        value_antiquant_mode: i64,
        attention_out: Out,
        softmax_lse: Option<Out>,
    )
}

/// An attention without its layout.
pub struct Plan {
    pub heads: Heads,
    pub mask: Mask,
    /// Parts of the queries `[tokens, heads, width]`, side by side in a head.
    pub query: Vec<Tensor>,
    /// Parts of the keys, in pages `[blocks, positions, heads, width]` or in a row `[positions, heads, width]`.
    pub key: Vec<Tensor>,
    /// The values, likewise.
    pub value: Tensor,
    /// Each sequence's tokens among the queries.
    pub queries: Vec<Range<usize>>,
    /// Each sequence's positions among the keys; in pages they count from its own first.
    pub keys: Vec<Range<usize>>,
    /// `[tokens, heads, width]`.
    pub out: Tensor,
    /// `[tokens, heads]`.
    pub lse: Option<Tensor>,
}

/// Ranges of which the cumulative `ends` are given.
pub fn ranges(what: &str, ends: &[i64], total: i64) -> Result<Vec<Range<usize>>, Refusal> {
    let rising = ends.first().is_some_and(|&e| e >= 0) && ends.is_sorted();
    valid(rising, || format!("{what} {ends:?} is not cumulative"))?;
    valid(ends.last() == Some(&total), || format!("the last of {what} {ends:?} is not {total}"))?;
    let starts = std::iter::once(&0).chain(ends);
    Ok(starts.zip(ends).map(|(&a, &b)| a as usize..b as usize).collect())
}

impl FusedInferAttentionScoreV3 {
    /// The lists' only tensors.
    pub fn key_value(&self) -> Result<(&Tensor, &Tensor), Refusal> {
        let one = self.key.len() == 1 && self.value.len() == 1;
        valid(one, || format!("{} keys and {} values: one tensor each", self.key.len(), self.value.len()))?;
        Ok((&self.key[0], &self.value[0]))
    }

    /// Refuses what no layout here takes.
    fn check_common(&self, chip: Chip) -> Result<(), Refusal> {
        let (key, value) = self.key_value()?;
        check(
            chip,
            "FusedInferAttentionScoreV3",
            &[
                &self.query,
                key,
                value,
                &self.atten_mask,
                &self.block_table,
                &self.query_rope,
                &self.key_rope,
                &self.attention_out,
                &self.softmax_lse,
            ],
        )?;
        let others = [
            &self.pse_shift,
            &self.deq_scale1,
            &self.quant_scale1,
            &self.deq_scale2,
            &self.quant_scale2,
            &self.quant_offset2,
            &self.antiquant_scale,
            &self.antiquant_offset,
            &self.query_padding_size,
            &self.kv_padding_size,
            &self.key_antiquant_scale,
            &self.key_antiquant_offset,
            &self.value_antiquant_scale,
            &self.value_antiquant_offset,
            &self.key_shared_prefix,
            &self.value_shared_prefix,
            &self.key_rope_antiquant_scale,
        ];
        let none = others.iter().all(|o| o.is_none()) && self.actual_shared_prefix_len.is_none();
        fits(none, || "position shifts, padding, prefixes and quantised keys are not taken here".to_owned())?;
        let modes = [self.antiquant_mode, self.key_antiquant_mode, self.value_antiquant_mode];
        valid(modes == [0; 3], || format!("modes of quantised keys {modes:?} without such keys"))?;
        let (n, kv) = (self.num_heads, self.kv_heads());
        valid(n > 0 && kv > 0 && n % kv == 0, || format!("{n} query heads over {kv} key heads"))?;
        fits(n <= fused::HEADS_MAX, || format!("{n} query heads: at most {}", fused::HEADS_MAX))?;
        let precise = [0, 1].contains(&self.inner_precise) && (n == kv || self.inner_precise == 0);
        valid(precise, || {
            format!("innerPrecise {}: 0, or 1 with as many key heads as query heads", self.inner_precise)
        })?;
        let pair = self.query_rope.is_some() == self.key_rope.is_some();
        valid(pair, || "queryRope and keyRope go together".to_owned())?;
        valid(self.softmax_lse_flag == self.softmax_lse.is_some(), || "softmaxLse goes with its flag".to_owned())?;
        self.check_mask()
    }

    fn check_mask(&self) -> Result<(), Refusal> {
        match (self.sparse_mode, &self.atten_mask) {
            (0, None) => Ok(()),
            (3 | 4, Some(mask)) => shaped("attenMask", mask, &[fused::MASK; 2]),
            (mode, mask) => fits(false, || {
                let with = if mask.is_some() { "a" } else { "no" };
                format!("sparseMode {mode} with {with} mask: 0 without, 3 or 4 with the one of {0} x {0}", fused::MASK)
            }),
        }
    }

    /// Key heads; 0 stands for as many as query heads.
    pub fn kv_heads(&self) -> i64 {
        if self.num_key_value_heads == 0 { self.num_heads } else { self.num_key_value_heads }
    }

    pub fn mask(&self) -> Mask {
        match self.sparse_mode {
            3 => Mask::Causal,
            4 => Mask::Band { before: self.pre_tokens, after: self.next_tokens },
            _ => Mask::All,
        }
    }

    /// Cumulative lengths of the queries, and as many lengths of the keys.
    pub fn lengths(&self, tokens: i64) -> Result<(Vec<Range<usize>>, &[i64]), Refusal> {
        let (Some(q), Some(kv)) = (&self.actual_seq_lengths, &self.actual_seq_lengths_kv) else {
            return Err(valid(false, || "actualSeqLengths and actualSeqLengthsKv are needed".to_owned()).unwrap_err());
        };
        valid(q.len() == kv.len(), || format!("{} lengths of queries and {} of keys", q.len(), kv.len()))?;
        fits(q.len() <= fused::SEQUENCES_MAX, || format!("{} sequences: at most {}", q.len(), fused::SEQUENCES_MAX))?;
        Ok((ranges("actualSeqLengths", q, tokens)?, kv))
    }

    /// Positions of each sequence in pages of `positions`, checked against the table and the number of blocks.
    pub fn paged(&self, lengths: &[i64], blocks: i64, positions: i64) -> Result<Vec<Range<usize>>, Refusal> {
        valid(self.block_size == positions, || format!("blockSize {}, and blocks of {positions}", self.block_size))?;
        let rows = lengths.len() as i64;
        let table = self.block_table.as_ref().map(|t| t.dims.clone()).unwrap_or_default();
        valid(table.len() == 2 && table[0] == rows, || format!("blockTable {table:?} for {rows} sequences"))?;
        let needed = |&length: &i64| (length + positions - 1) / positions;
        let long = lengths.iter().find(|&l| *l < 0 || needed(l) > table[1]);
        valid(long.is_none(), || format!("{long:?} positions in {} blocks of {positions}", table[1]))?;
        let all: i64 = lengths.iter().map(needed).sum();
        fits(all <= blocks, || format!("the sequences need {all} blocks of the cache's {blocks}"))?;
        Ok(lengths.iter().map(|&length| 0..length as usize).collect())
    }

    /// Tokens in a row, sequence by sequence.
    fn plan_tokens(&self) -> Result<Plan, Refusal> {
        let (key, value) = self.key_value()?;
        let (n, kv) = (self.num_heads, self.kv_heads());
        let q = &self.query.dims;
        valid(q.len() == 3 && q[1] == n, || format!("query {q:?}: [tokens, {n}, width]"))?;
        let (tokens, width) = (q[0], q[2]);
        let (queries, lengths) = self.lengths(tokens)?;
        let paged = self.block_table.is_some();
        let (key, value) =
            if paged { (pages("key", key, kv)?, pages("value", value, kv)?) } else { (key.clone(), value.clone()) };
        let heads_dim = key.rank().saturating_sub(2);
        let aligned = key.rank() == if paged { 4 } else { 3 }
            && value.rank() == key.rank()
            && key.dims[..=heads_dim] == value.dims[..=heads_dim]
            && key.dims[heads_dim] == kv;
        valid(aligned, || format!("key {:?} and value {:?} for {kv} heads", key.dims, value.dims))?;
        let (qk, v) = (key.dims[heads_dim + 1], value.dims[heads_dim + 1]);
        valid(qk == width, || format!("queries of width {width} and keys of {qk}"))?;
        let keys = if paged {
            let (blocks, positions) = (key.dims[0], key.dims[1]);
            fits(positions % fused::PAGE_STEP == 0 && positions <= fused::PAGE_MAX, || {
                format!("blocks of {positions}: a multiple of {} up to {}", fused::PAGE_STEP, fused::PAGE_MAX)
            })?;
            let row = kv * qk.max(v);
            fits(row <= fused::PAGE_ROW_MAX, || format!("rows of {row} keys: at most {}", fused::PAGE_ROW_MAX))?;
            self.paged(lengths, blocks, positions)?
        } else {
            ranges("actualSeqLengthsKv", lengths, key.dims[0])?
        };
        // UNCONFIRMED that as many queries as keys are taken; the text says fewer, production passes as many.
        let over = queries.iter().zip(&keys).find(|(q, k)| self.sparse_mode != 0 && q.len() > k.len());
        valid(over.is_none(), || format!("a sequence has more queries than keys: {over:?}"))?;
        let (mut query, mut key_parts) = (vec![self.query.clone()], vec![key]);
        let mut whole = width;
        if let (Some(q), Some(k)) = (&self.query_rope, &self.key_rope) {
            let (split, rope) = (fused::SPLIT_WIDTH, fused::LATENT_ROPE);
            fits(!paged && n == kv && width == split && v == split, || {
                format!("two parts of queries and keys: without pages, one key head each, widths of {split}")
            })?;
            shaped("queryRope", q, &[tokens, n, rope])?;
            shaped("keyRope", k, &[key_parts[0].dims[0], kv, rope])?;
            query.push(q.clone());
            key_parts.push(k.clone());
            whole += rope;
        } else {
            let even = qk == v && qk <= fused::WIDTH_MAX && qk % fused::WIDTH_STEP == 0;
            fits(even || qk == fused::WIDE_QK && fused::WIDE_V.contains(&v), || {
                format!(
                    "widths {qk} and {v}: equal, a multiple of {} up to {}; or 192 with 128",
                    fused::WIDTH_STEP,
                    fused::WIDTH_MAX
                )
            })?;
        }
        shaped("attentionOut", &self.attention_out, &[tokens, n, v])?;
        let lse = self.softmax_lse.as_ref().map(|lse| {
            shaped("softmaxLse", lse, &[tokens, n, 1])?;
            Ok(fix(lse, 2..3, 0))
        });
        Ok(Plan {
            heads: Heads { q: n as usize, kv: kv as usize, qk: whole as usize, v: v as usize },
            mask: self.mask(),
            query,
            key: key_parts,
            value,
            queries,
            keys,
            out: self.attention_out.0.clone(),
            lse: lse.transpose()?,
        })
    }

    fn plan(&self) -> Result<Plan, Refusal> {
        match self.input_layout.as_str() {
            "TND" => self.plan_tokens(),
            "BNSD_NBSD" | "TND_NTD" => latent::plan(self),
            other => Err(fits(false, || format!("the layout {other:?} is not simulated")).unwrap_err()),
        }
    }

    /// Where the mask is looked at, it must be what the modes mean: ones above the diagonal. All of it would be too much.
    fn probe_mask(&self, rt: &Runtime) -> Result<(), Fault> {
        let Some(mask) = &self.atten_mask else { return Ok(()) };
        for r in [0, 1, 127, 128, 1023, fused::MASK as usize - 1] {
            let ones = rt.load_ints(&mask.at(r as i64))?.data;
            if let Some(c) = (0..ones.len()).find(|&c| (ones[c] != 0) != (c > r)) {
                let text =
                    format!("attenMask at row {r}, column {c} is {}: 1 above the diagonal, 0 elsewhere", ones[c]);
                return Err(Fault::Violation(text));
            }
        }
        Ok(())
    }
}

/// A cache `[blocks, positions, heads * width]` as pages.
fn pages(what: &str, cache: &Tensor, heads: i64) -> Result<Tensor, Refusal> {
    let (d, s) = (&cache.dims, &cache.strides);
    valid(d.len() == 3 && d[2] % heads == 0, || format!("{what} {d:?}: [blocks, positions, {heads} * width]"))?;
    let width = d[2] / heads;
    Ok(cache.view(vec![d[0], d[1], heads, width], vec![s[0], s[1], width * s[2], s[2]], cache.offset))
}

impl Kernel for FusedInferAttentionScoreV3 {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        self.check_common(chip)?;
        self.plan().map(drop)
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        self.probe_mask(rt)?;
        let plan = self.plan().expect("checked in phase 1");
        let table = self.block_table.as_ref().map(|table| rt.load_ints(table)).transpose()?;
        let order = Order::of(rt.perturb, plan.out.dims[0] as usize);
        let (mut out, mut lse) = (Vec::with_capacity(plan.out.numel()), Vec::new());
        for (n, (queries, keys)) in plan.queries.iter().zip(&plan.keys).enumerate() {
            let row = table.as_ref().map(|t| &t.data[n * t.dims[1]..][..t.dims[1]]);
            let q = rows(rt, &plan.query, queries, None)?;
            let k = rows(rt, &plan.key, keys, row)?;
            let v = rows(rt, std::slice::from_ref(&plan.value), keys, row)?;
            let (sums, denominators) = attend(&q, &k, &v, plan.heads, self.scale_value, plan.mask, order);
            out.extend(sums);
            lse.extend(denominators);
        }
        store(rt, &plan.out, out)?;
        plan.lse.map_or(Ok(()), |to| store(rt, &to, lse))
    }
}

/// Rows of a sequence, heads after one another, the parts of a head side by side; through a row of a block table if there
/// is one.
fn rows(rt: &Runtime, parts: &[Tensor], range: &Range<usize>, table: Option<&[i64]>) -> Result<Vec<f32>, Fault> {
    let mut loaded = Vec::with_capacity(parts.len());
    for part in parts {
        let Some(table) = table else {
            loaded.push(rt.load(&narrow(part, 0, range.start, range.len()))?.data);
            continue;
        };
        let (blocks, positions) = (part.dims[0] as usize, part.dims[1] as usize);
        let mut data = Vec::new();
        for (n, &block) in table.iter().enumerate().take(range.len().div_ceil(positions)) {
            let page = part.at(row(block, blocks, "block")? as i64);
            data.extend(rt.load(&narrow(&page, 0, 0, positions.min(range.len() - n * positions)))?.data);
        }
        loaded.push(data);
    }
    if let [_] = parts {
        return Ok(loaded.swap_remove(0));
    }
    let width = |part: &Tensor| part.dims[part.rank() - 1] as usize;
    let mut joined = Vec::with_capacity(loaded.iter().map(Vec::len).sum());
    for i in 0..loaded[0].len() / width(&parts[0]) {
        parts.iter().zip(&loaded).for_each(|(p, data)| joined.extend(&data[i * width(p)..][..width(p)]));
    }
    Ok(joined)
}
