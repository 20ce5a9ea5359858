//! Attention over latents, where all query heads read one latent that is key and value at once, and the operator that
//! writes latents.

use super::{
    attention::{FusedInferAttentionScoreV3, Plan},
    view::{fix, permuted, shaped, store},
};
use crate::{
    array::{Chip, Fault, Refusal},
    limits::{check, fits, fused, valid},
    math::{
        attention::Heads,
        moves::row,
        norm::rms_norm,
        rope::{Pairs, neighbours_to_halves, rotate},
    },
    op::{Kernel, Out, Ref, Tensor, operator},
    runtime::Runtime,
};

/// The plan of the layouts "BNSD_NBSD", one new token for each sequence, and "TND_NTD", several.
pub fn plan(op: &FusedInferAttentionScoreV3) -> Result<Plan, Refusal> {
    let (key, value) = op.key_value()?;
    let (n, width, rope) = (op.num_heads, fused::LATENT, fused::LATENT_ROPE);
    let heads = fused::LATENT_HEADS;
    fits(heads.contains(&n), || format!("{n} query heads: one of {heads:?}"))?;
    valid(op.kv_heads() == 1, || format!("{} key heads: 1", op.kv_heads()))?;
    let (Some(q_rope), Some(k_rope)) = (&op.query_rope, &op.key_rope) else {
        return Err(valid(false, || "queryRope and keyRope are needed".to_owned()).unwrap_err());
    };
    fits(op.block_table.is_some(), || "latents must be in pages".to_owned())?;
    fits(!op.softmax_lse_flag, || "softmaxLse is not given in this layout".to_owned())?;
    let d = &key.dims;
    let cache = d.len() == 4 && d[1] == 1 && d[3] == width;
    fits(cache, || format!("key {d:?}: [blocks, 1, positions, {width}]"))?;
    let (blocks, positions) = (d[0], d[2]);
    let sizes = fused::LATENT_PAGES;
    fits(sizes.contains(&positions), || format!("blocks of {positions}: one of {sizes:?}"))?;
    shaped("value", value, d)?;
    shaped("keyRope", k_rope, &[blocks, 1, positions, rope])?;

    let single = op.input_layout == "BNSD_NBSD";
    let tokens = op.query.dims[0];
    let dims = |last: i64| if single { vec![tokens, n, 1, last] } else { vec![tokens, n, last] };
    shaped("query", &op.query, &dims(width))?;
    shaped("queryRope", q_rope, &dims(rope))?;
    let token_rows = |x: &Tensor| if single { fix(x, 2..3, 0) } else { x.clone() };
    let out = if single { vec![n, tokens, 1, width] } else { vec![n, tokens, width] };
    shaped("attentionOut", &op.attention_out, &out)?;

    let (queries, keys) = if single {
        let Some(lengths) = &op.actual_seq_lengths_kv else {
            return Err(valid(false, || "actualSeqLengthsKv is needed".to_owned()).unwrap_err());
        };
        let plain = op.sparse_mode == 0 && op.actual_seq_lengths.is_none();
        valid(plain, || "one token each: sparseMode 0 and no actualSeqLengths".to_owned())?;
        fits(tokens <= fused::DECODE_BATCH_MAX, || format!("{tokens} sequences: at most {}", fused::DECODE_BATCH_MAX))?;
        let count = lengths.len() as i64;
        valid(count == tokens, || format!("{count} lengths of keys for {tokens} sequences"))?;
        ((0..tokens as usize).map(|t| t..t + 1).collect(), op.paged(lengths, blocks, positions)?)
    } else {
        valid(op.sparse_mode == 3, || format!("sparseMode {} in this layout: 3", op.sparse_mode))?;
        let (queries, lengths) = op.lengths(tokens)?;
        let long = queries.iter().find(|q| q.len() as i64 > fused::LATENT_TOKENS_MAX);
        fits(long.is_none(), || format!("tokens {long:?} of a sequence: at most {}", fused::LATENT_TOKENS_MAX))?;
        (queries, op.paged(lengths, blocks, positions)?)
    };
    let over = queries.iter().zip(&keys).find(|(q, k)| q.len() > k.len());
    valid(over.is_none(), || format!("a sequence has more queries than keys: {over:?}"))?;
    let pages = |x: &Tensor| permuted(x, &[0, 2, 1, 3]);
    Ok(Plan {
        heads: Heads { q: n as usize, kv: 1, qk: (width + rope) as usize, v: width as usize },
        mask: op.mask(),
        query: vec![token_rows(&op.query), token_rows(q_rope)],
        key: vec![pages(key), pages(k_rope)],
        value: pages(value),
        queries,
        keys,
        out: permuted(&token_rows(&op.attention_out), &[1, 0, 2]),
        lse: None,
    })
}

operator! {
    /// Of each row, the first part normalised and the last part turned, both written to a cache.
    KvRmsNormRopeCache = aclnnKvRmsNormRopeCache, aclnnKvRmsNormRopeCacheGetWorkspaceSize (
        kv: Tensor,
        gamma: Tensor,
        cos: Tensor,
        sin: Tensor,
        index: Tensor,
        k_cache: Ref,
        ckv_cache: Ref,
        k_rope_scale: Option<Tensor>,
        c_kv_scale: Option<Tensor>,
        k_rope_offset: Option<Tensor>,
        c_kv_offset: Option<Tensor>,
        epsilon: f64,
        cache_mode: Option<String>,
        is_output_kv: bool,
        k_rope_out: Option<Out>,
        c_kv_out: Option<Out>,
    )
}

impl KvRmsNormRopeCache {
    /// Batch, new positions, widths of the normalised and of the turned part.
    fn sizes(&self) -> [i64; 4] {
        let d = &self.kv.dims;
        [d[0], d[2], self.gamma.dims[0], d[3] - self.gamma.dims[0]]
    }

    /// The dimension of a cache that counts positions within a block.
    fn position_dim(&self) -> Result<usize, Refusal> {
        match self.cache_mode.as_deref() {
            Some("PA") => Ok(1),
            Some("PA_BNSD") => Ok(2),
            other => {
                Err(fits(false, || format!("cacheMode {other:?} is not simulated: \"PA\" or \"PA_BNSD\"")).unwrap_err())
            }
        }
    }
}

impl Kernel for KvRmsNormRopeCache {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        check(
            chip,
            "KvRmsNormRopeCache",
            &[
                &self.kv,
                &self.gamma,
                &self.cos,
                &self.sin,
                &self.index,
                &self.k_cache,
                &self.ckv_cache,
                &self.k_rope_out,
                &self.c_kv_out,
            ],
        )?;
        let scales = [&self.k_rope_scale, &self.c_kv_scale, &self.k_rope_offset, &self.c_kv_offset];
        fits(scales.iter().all(|s| s.is_none()), || "quantised caches are not simulated".to_owned())?;
        let d = &self.kv.dims;
        let whole = d.len() == 4 && d[1] == 1 && self.gamma.rank() == 1 && self.gamma.dims[0] < d[3];
        valid(whole, || format!("kv {d:?}: [batch, 1, positions, gamma {:?} + turned width]", self.gamma.dims))?;
        let [batch, positions, latent, rope] = self.sizes();
        valid(rope % 2 == 0, || format!("a turned width of {rope} is odd"))?;
        shaped("cos", &self.cos, &[batch, 1, positions, rope])?;
        shaped("sin", &self.sin, &[batch, 1, positions, rope])?;
        shaped("index", &self.index, &[batch * positions])?;
        let at = self.position_dim()?;
        let c = &self.k_cache.dims;
        valid(c.len() == 4 && c[3 - at] == 1, || format!("kCache {c:?}: one head in four dimensions"))?;
        let (blocks, size) = (c[0], c[at]);
        fits(size % fused::PAGE_STEP == 0, || format!("blocks of {size}: a multiple of {}", fused::PAGE_STEP))?;
        let dims = |width| if at == 1 { [blocks, size, 1, width] } else { [blocks, 1, size, width] };
        shaped("kCache", &self.k_cache, &dims(rope))?;
        shaped("ckvCache", &self.ckv_cache, &dims(latent))?;
        let outputs = self.k_rope_out.is_some() && self.c_kv_out.is_some();
        valid(!self.is_output_kv || outputs, || "isOutputKv without kRopeOut and cKvOut".to_owned())?;
        let out = |out: &Option<Out>, width| match out {
            Some(out) if self.is_output_kv => shaped("an output", out, &[batch, 1, positions, width]),
            _ => Ok(()),
        };
        out(&self.k_rope_out, rope)?;
        out(&self.c_kv_out, latent)
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        let [_, _, latent, rope] = self.sizes().map(|s| s as usize);
        let (kv, gamma) = (rt.load(&self.kv)?.data, rt.load(&self.gamma)?.data);
        let (cos, sin) = (rt.load(&self.cos)?.data, rt.load(&self.sin)?.data);
        let at = self.position_dim().expect("checked in phase 1");
        let (blocks, size) = (self.k_cache.dims[0] as usize, self.k_cache.dims[at] as usize);
        let (mut latents, mut ropes) = (Vec::new(), Vec::new());
        for (n, token) in kv.chunks_exact(latent + rope).enumerate() {
            latents.extend(rms_norm(&token[..latent], &gamma, self.epsilon, 0.0).0);
            // Neighbouring pairs are read, and halves written. UNCONFIRMED.
            let halves = neighbours_to_halves(&token[latent..]);
            ropes.extend(rotate(&halves, &cos[n * rope..][..rope], &sin[n * rope..][..rope], Pairs::Halves));
        }
        for (n, slot) in rt.load_ints(&self.index)?.data.into_iter().enumerate().filter(|(_, slot)| *slot != -1) {
            let slot = row(slot, blocks * size, "slot")?;
            let place = |cache: &Tensor| fix(cache, at..at + 1, slot % size).at((slot / size) as i64);
            store(rt, &place(&self.ckv_cache), latents[n * latent..][..latent].to_vec())?;
            store(rt, &place(&self.k_cache), ropes[n * rope..][..rope].to_vec())?;
        }
        if let (true, Some(k), Some(c)) = (self.is_output_kv, &self.k_rope_out, &self.c_kv_out) {
            store(rt, k, ropes)?;
            store(rt, c, latents)?;
        }
        Ok(())
    }
}
