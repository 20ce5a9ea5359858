//! Fused attention in its layouts against the same attention computed from rows, and each of its limits from both sides.

use super::{
    attention::FusedInferAttentionScoreV3 as Fused,
    bench::{BF16, BOOL, Bench, F16, F32, I8, I32, I64, inplace, near, numbers, reshaped},
    latent::KvRmsNormRopeCache,
};
use crate::{
    array::{Chip, Fault},
    math::{
        attention::{Heads, Mask, attend},
        matmul::Order,
        norm::rms_norm,
        rope::{Pairs, neighbours_to_halves, rotate},
    },
    op::{Out, Tensor},
};

/// The operator in the layout of tokens with everything optional left out.
fn fused(query: &Tensor, key: &Tensor, value: &Tensor, out: &Out, heads: [i64; 2], lens: [&[i64]; 2]) -> Fused {
    Fused {
        query: query.clone(),
        key: vec![key.clone()],
        value: vec![value.clone()],
        pse_shift: None,
        atten_mask: None,
        actual_seq_lengths: Some(lens[0].to_vec()),
        actual_seq_lengths_kv: Some(lens[1].to_vec()),
        deq_scale1: None,
        quant_scale1: None,
        deq_scale2: None,
        quant_scale2: None,
        quant_offset2: None,
        antiquant_scale: None,
        antiquant_offset: None,
        block_table: None,
        query_padding_size: None,
        kv_padding_size: None,
        key_antiquant_scale: None,
        key_antiquant_offset: None,
        value_antiquant_scale: None,
        value_antiquant_offset: None,
        key_shared_prefix: None,
        value_shared_prefix: None,
        actual_shared_prefix_len: None,
        query_rope: None,
        key_rope: None,
        key_rope_antiquant_scale: None,
        num_heads: heads[0],
        scale_value: 0.25,
        pre_tokens: 2_147_483_647,
        next_tokens: 2_147_483_647,
        input_layout: "TND".to_owned(),
        num_key_value_heads: heads[1],
        sparse_mode: 0,
        inner_precise: 0,
        block_size: 0,
        antiquant_mode: 0,
        softmax_lse_flag: false,
        key_antiquant_mode: 0,
        value_antiquant_mode: 0,
        attention_out: out.clone(),
        softmax_lse: None,
    }
}

fn mask(b: &Bench) -> Tensor {
    let ones: Vec<i64> = (0..2048 * 2048).map(|i| i64::from(i % 2048 > i / 2048)).collect();
    b.ints(&[2048, 2048], I8, &ones)
}

/// Three sequences of 1, 3 and 2 queries over 5, 20 and 2 positions in pages of 16, two of them shared by none.
const Q_ENDS: &[i64] = &[1, 4, 6];
const KV_LENS: &[i64] = &[5, 20, 2];
const TABLE: &[i64] = &[3, 0, 4, 1, 2, 0];

/// Queries, caches, the table and the output of those sequences, with 4 query heads over 2, of width 16.
fn paged(b: &Bench) -> Fused {
    let (query, out) = (b.floats(&[6, 4, 16], F16, &numbers(6 * 64, 1)), b.out(&[6, 4, 16], F16));
    let [key, value] = [2, 3].map(|seed| b.floats(&[5, 16, 32], F16, &numbers(5 * 16 * 32, seed)));
    let table = b.ints(&[3, 2], I32, TABLE);
    Fused { block_table: Some(table), block_size: 16, ..fused(&query, &key, &value, &out, [4, 2], [Q_ENDS, KV_LENS]) }
}

/// What those sequences should give, from rows that are picked here.
fn expected(b: &Bench, op: &Fused, mask: Mask) -> Vec<f32> {
    let heads = Heads { q: 4, kv: 2, qk: 16, v: 16 };
    let (q, k, v) = (b.read(&op.query), b.read(&op.key[0]), b.read(&op.value[0]));
    let mut out = Vec::new();
    for s in 0..3 {
        let rows = |cache: &[f32]| -> Vec<f32> {
            let at = |p: usize| (TABLE[s * 2 + p / 16] as usize * 16 + p % 16) * 32;
            (0..KV_LENS[s] as usize).flat_map(|p| cache[at(p)..at(p) + 32].to_vec()).collect()
        };
        let start = if s == 0 { 0 } else { Q_ENDS[s - 1] as usize };
        let queries = &q[start * 64..Q_ENDS[s] as usize * 64];
        out.extend(attend(queries, &rows(&k), &rows(&v), heads, 0.25, mask, Order::default()).0);
    }
    out
}

#[test]
fn sequences_read_their_own_pages_under_every_mask() {
    let mut b = Bench::new(Chip::A2);
    let (op, triangle) = (paged(&b), mask(&b));
    for (sparse_mode, pre_tokens, seen) in
        [(0, 0, Mask::All), (3, 0, Mask::Causal), (4, 7, Mask::Band { before: 7, after: 0 })]
    {
        let atten_mask = (sparse_mode != 0).then(|| triangle.clone());
        let op = Fused { sparse_mode, pre_tokens, next_tokens: 0, atten_mask, ..paged(&b) };
        b.run(&op).unwrap();
        let want = expected(&b, &op, seen);
        assert!(near(&b.read(&op.attention_out), &want, 1e-3), "{sparse_mode}");
    }
    b.perturb = true;
    b.run(&op).unwrap();
    let want = expected(&b, &op, Mask::All);
    assert!(near(&b.read(&op.attention_out), &want, 1e-3));
}

#[test]
fn a_block_outside_the_cache_faults_only_where_it_is_read() {
    let b = Bench::new(Chip::A2);
    for (table, faults) in [([3, 99, 4, 1, 2, -1], false), ([3, 0, 4, 5, 2, 0], true), ([-1, 0, 4, 1, 2, 0], true)] {
        let op = Fused { block_table: Some(b.ints(&[3, 2], I32, &table)), ..paged(&b) };
        assert_eq!(matches!(b.run(&op), Err(Fault::OutOfRange(_))), faults, "{table:?}");
    }
}

#[test]
fn a_mask_with_the_polarity_turned_is_a_violation() {
    let b = Bench::new(Chip::A2);
    let ones: Vec<i64> = (0..2048 * 2048).map(|i| i64::from(i % 2048 <= i / 2048)).collect();
    let wrong = b.ints(&[2048, 2048], BOOL, &ones);
    let op = Fused { sparse_mode: 3, atten_mask: Some(wrong), ..paged(&b) };
    assert!(matches!(b.run(&op), Err(Fault::Violation(_))));
}

#[test]
fn lengths_are_cumulative_for_queries_and_single_for_paged_keys() {
    let b = Bench::new(Chip::A2);
    for (q, kv, want) in [
        (vec![1, 4, 6], vec![5, 20, 2], 0),
        (vec![1, 3, 2], vec![5, 20, 2], 161_002),
        (vec![1, 4, 5], vec![5, 20, 2], 161_002),
        (vec![1, 6], vec![5, 20, 2], 161_002),
        (vec![1, 4, 6], vec![5, 33, 2], 161_002),
        (vec![1, 4, 6], vec![5, 32, 2], 0),
        (vec![1, 4, 6], vec![32, 32, 32], 561_002),
    ] {
        let (q, kv) = (Some(q), Some(kv));
        let op = Fused { actual_seq_lengths: q, actual_seq_lengths_kv: kv, ..paged(&b) };
        assert_eq!(b.check(&op), want, "{:?} {:?}", op.actual_seq_lengths, op.actual_seq_lengths_kv);
    }
    let triangle = b.empty(&[2048, 2048], I8);
    for (kv, want) in [(vec![1, 3, 2], 0), (vec![1, 2, 2], 161_002)] {
        let (atten_mask, actual_seq_lengths_kv) = (Some(triangle.clone()), Some(kv));
        assert_eq!(b.check(&Fused { sparse_mode: 3, atten_mask, actual_seq_lengths_kv, ..paged(&b) }), want);
    }
}

#[test]
fn masks_go_with_their_modes() {
    let b = Bench::new(Chip::A2);
    let (whole, small) = (b.empty(&[2048, 2048], I8), b.empty(&[1024, 1024], I8));
    for (sparse_mode, atten_mask, want) in [
        (0, None, 0),
        (0, Some(&whole), 561_002),
        (1, Some(&whole), 561_002),
        (2, Some(&whole), 561_002),
        (3, None, 561_002),
        (3, Some(&small), 161_002),
        (3, Some(&whole), 0),
        (4, Some(&whole), 0),
    ] {
        // Every sequence here has at least as many keys as queries.
        let op = Fused { sparse_mode, atten_mask: atten_mask.cloned(), ..paged(&b) };
        assert_eq!(b.check(&op), want, "{sparse_mode}");
    }
}

#[test]
fn heads_widths_and_pages_are_bounded() {
    let b = Bench::new(Chip::A2);
    let f32s = b.empty(&[1, 2, 16], F32);
    // Query heads, key heads, widths of keys and values, positions of a page.
    for (n, kv, qk, v, page, want) in [
        (2, 1, 16, 16, 16, 0),
        (2, 1, 80, 80, 128, 0),
        (2, 1, 256, 256, 128, 0),
        (2, 1, 272, 272, 128, 561_002),
        (2, 1, 24, 24, 128, 561_002),
        (2, 1, 192, 128, 128, 0),
        (2, 1, 192, 192, 128, 0),
        (2, 1, 192, 64, 128, 561_002),
        (2, 1, 64, 128, 128, 561_002),
        (2, 1, 128, 128, 8, 561_002),
        (2, 1, 128, 128, 144, 561_002),
        (3, 2, 64, 64, 128, 161_002),
        (256, 8, 64, 64, 128, 0),
        (264, 8, 64, 64, 128, 561_002),
        (255, 255, 256, 256, 16, 0),
        (256, 256, 256, 256, 16, 561_002),
    ] {
        let (query, out) = (b.empty(&[1, n, qk], BF16), b.out(&[1, n, v], BF16));
        let (key, value) = (b.empty(&[1, page, kv * qk], BF16), b.empty(&[1, page, kv * v], BF16));
        let table = Some(b.empty(&[1, 1], I32));
        let op =
            Fused { block_table: table, block_size: page, ..fused(&query, &key, &value, &out, [n, kv], [&[1], &[1]]) };
        assert_eq!(b.check(&op), want, "{n} {kv} {qk} {v} {page}");
        assert_eq!(b.check(&Fused { query: f32s.clone(), ..op }), 161_002);
    }
    let op = paged(&b);
    assert_eq!(b.check(&Fused { block_size: 32, ..paged(&b) }), 161_002);
    assert_eq!(b.check(&Fused { inner_precise: 1, ..paged(&b) }), 161_002);
    assert_eq!(b.check(&Fused { input_layout: "BSH".to_owned(), ..paged(&b) }), 561_002);
    assert_eq!(b.check(&Fused { pse_shift: Some(op.query.clone()), ..paged(&b) }), 561_002);
    assert_eq!(Bench::new(Chip::P310).check(&op), 561_003);
}

#[test]
fn at_most_4096_sequences_go_in_one_call() {
    let b = Bench::new(Chip::A2);
    for (count, want) in [(4096, 0), (4097, 561_002)] {
        let (query, out) = (b.empty(&[count, 1, 16], F16), b.out(&[count, 1, 16], F16));
        let (key, table) = (b.empty(&[count, 16, 16], F16), Some(b.empty(&[count, 1], I32)));
        let (ends, ones) = ((1..=count).collect::<Vec<_>>(), vec![1; count as usize]);
        let op = fused(&query, &key, &key, &out, [1, 1], [&ends, &ones]);
        assert_eq!(b.check(&Fused { block_table: table, block_size: 16, ..op }), want);
    }
}

#[test]
fn keys_in_a_row_have_cumulative_lengths_and_may_come_in_two_parts() {
    let b = Bench::new(Chip::A2);
    let (n, t, l) = (2, 3, 7);
    let query = b.floats(&[t, n, 128], F16, &numbers((t * n * 128) as usize, 1));
    let q_rope = b.floats(&[t, n, 64], F16, &numbers((t * n * 64) as usize, 2));
    let [key, value] = [3, 4].map(|seed| b.floats(&[l, n, 128], F16, &numbers((l * n * 128) as usize, seed)));
    let k_rope = b.floats(&[l, n, 64], F16, &numbers((l * n * 64) as usize, 5));
    let (out, lse) = (b.out(&[t, n, 128], F16), b.out(&[t, n, 1], F32));
    let two = Fused {
        query_rope: Some(q_rope.clone()),
        key_rope: Some(k_rope.clone()),
        softmax_lse_flag: true,
        softmax_lse: Some(lse.clone()),
        scale_value: 0.01,
        ..fused(&query, &key, &value, &out, [n, n], [&[1, 3], &[2, 7]])
    };
    b.run(&two).unwrap();
    // The same with queries and keys of one part.
    let (whole_q, whole_k) = (b.empty(&[t, n, 192], F16), b.empty(&[l, n, 192], F16));
    for (whole, parts) in [(&whole_q, [&query, &q_rope]), (&whole_k, [&key, &k_rope])] {
        let (a, c) = (b.read(parts[0]), b.read(parts[1]));
        b.fill(whole, &a.chunks(128).zip(c.chunks(64)).flat_map(|(a, c)| [a, c].concat()).collect::<Vec<_>>());
    }
    let again = b.out(&[t, n, 128], F16);
    let one = fused(&whole_q, &whole_k, &value, &again, [n, 0], [&[1, 3], &[2, 7]]);
    b.run(&Fused { scale_value: 0.01, ..one }).unwrap();
    assert_eq!(b.read(&out), b.read(&again));
    assert!(b.read(&lse).iter().all(|l| l.is_finite()));
    for (kv, want) in [(vec![2, 7], 0), (vec![2, 5], 161_002), (vec![2, 6], 161_002), (vec![8, 7], 161_002)] {
        let one = fused(&whole_q, &whole_k, &value, &again, [n, n], [&[1, 3], &kv]);
        assert_eq!(b.check(&one), want, "{kv:?}");
    }
}

#[test]
fn two_parts_of_a_key_go_without_pages_and_with_a_key_head_for_each_query_head() {
    let b = Bench::new(Chip::A2);
    // Query heads, key heads, width, width of the values, width of the second part, the code.
    for (n, kv, width, v, rope, want) in [
        (2, 2, 128, 128, 64, 0),
        (2, 1, 128, 128, 64, 561_002),
        (2, 2, 64, 64, 64, 561_002),
        (2, 2, 128, 64, 64, 561_002),
        (2, 2, 128, 128, 32, 161_002),
    ] {
        let (query, out) = (b.empty(&[3, n, width], F16), b.out(&[3, n, v], F16));
        let (key, value) = (b.empty(&[7, kv, width], F16), b.empty(&[7, kv, v], F16));
        let (query_rope, key_rope) = (Some(b.empty(&[3, n, rope], F16)), Some(b.empty(&[7, kv, rope], F16)));
        let one = fused(&query, &key, &value, &out, [n, kv], [&[1, 3], &[2, 7]]);
        assert_eq!(b.check(&Fused { query_rope: query_rope.clone(), ..one }), 161_002, "half a pair");
        let one = fused(&query, &key, &value, &out, [n, kv], [&[1, 3], &[2, 7]]);
        assert_eq!(b.check(&Fused { query_rope, key_rope, ..one }), want, "{n} {kv} {width} {v} {rope}");
    }
    let (query_rope, key_rope) = (Some(b.empty(&[6, 4, 64], F16)), Some(b.empty(&[5, 4, 64], F16)));
    assert_eq!(b.check(&Fused { query_rope, key_rope, ..paged(&b) }), 561_002);
}

/// Two sequences over latents in pages of 16: queries, their rotated part, the cache, and the table.
fn latent(b: &Bench, tokens: i64, n: i64, single: bool) -> Fused {
    let dims = |d: i64| if single { vec![tokens, n, 1, d] } else { vec![tokens, n, d] };
    let query = b.floats(&dims(512), F16, &numbers((tokens * n * 512) as usize, 1));
    let q_rope = b.floats(&dims(64), F16, &numbers((tokens * n * 64) as usize, 2));
    let cache = b.floats(&[4, 1, 16, 512], F16, &numbers(4 * 16 * 512, 3));
    let k_rope = b.floats(&[4, 1, 16, 64], F16, &numbers(4 * 16 * 64, 4));
    let out = b.out(&if single { vec![n, tokens, 1, 512] } else { vec![n, tokens, 512] }, F16);
    Fused {
        input_layout: if single { "BNSD_NBSD" } else { "TND_NTD" }.to_owned(),
        query_rope: Some(q_rope),
        key_rope: Some(k_rope),
        block_table: Some(b.ints(&[2, 2], I32, &[2, 0, 3, 1])),
        block_size: 16,
        scale_value: 0.002,
        ..fused(&query, &cache, &cache, &out, [n, 1], [&[1, tokens], &[18, 7]])
    }
}

#[test]
fn latents_are_key_and_value_at_once_and_heads_come_first_in_the_output() {
    let b = Bench::new(Chip::A2);
    let triangle = mask(&b);
    for (single, tokens) in [(true, 2), (false, 5)] {
        let mut op = latent(&b, tokens, 4, single);
        match single {
            true => op.actual_seq_lengths = None,
            false => (op.sparse_mode, op.atten_mask) = (3, Some(triangle.clone())),
        }
        b.run(&op).unwrap();
        let (q, qr) = (b.read(&op.query), b.read(op.query_rope.as_ref().unwrap()));
        let (c, cr) = (b.read(&op.key[0]), b.read(op.key_rope.as_ref().unwrap()));
        let out = b.read(&op.attention_out);
        for (s, (pages, len)) in [([2, 0], 18), ([3, 1], 7)].into_iter().enumerate() {
            let slot = |p: usize| pages[p / 16] * 16 + p % 16;
            let k: Vec<f32> =
                (0..len).flat_map(|p| [&c[slot(p) * 512..][..512], &cr[slot(p) * 64..][..64]].concat()).collect();
            let v: Vec<f32> = (0..len).flat_map(|p| c[slot(p) * 512..][..512].to_vec()).collect();
            let rows = if s == 0 { 0..1 } else { 1..tokens as usize };
            let heads = rows.start * 4..rows.end * 4;
            let q: Vec<f32> = heads.flat_map(|h| [&q[h * 512..][..512], &qr[h * 64..][..64]].concat()).collect();
            let heads = Heads { q: 4, kv: 1, qk: 576, v: 512 };
            let seen = if single { Mask::All } else { Mask::Causal };
            let (want, _) = attend(&q, &k, &v, heads, 0.002, seen, Order::default());
            for (i, t) in rows.enumerate() {
                for h in 0..4 {
                    let got = &out[(h * tokens as usize + t) * 512..][..512];
                    assert!(near(got, &want[(i * 4 + h) * 512..][..512], 1e-3), "{single} {s} {t} {h}");
                }
            }
        }
    }
}

#[test]
fn latents_have_their_own_bounds() {
    let b = Bench::new(Chip::A2);
    let single = |b: &Bench, n| Fused { actual_seq_lengths: None, ..latent(b, 2, n, true) };
    for (n, want) in [(1, 0), (2, 0), (3, 561_002), (6, 561_002), (128, 0)] {
        let op = single(&b, n);
        assert_eq!(b.check(&op), want, "{n}");
    }
    let op = single(&b, 4);
    assert_eq!(b.check(&Fused { block_table: None, ..single(&b, 4) }), 561_002);
    assert_eq!(b.check(&Fused { query_rope: None, key_rope: None, ..single(&b, 4) }), 161_002);
    assert_eq!(b.check(&Fused { num_key_value_heads: 4, ..single(&b, 4) }), 161_002);
    assert_eq!(b.check(&Fused { actual_seq_lengths: Some(vec![1, 2]), ..single(&b, 4) }), 161_002);
    let narrow = reshaped(&op.key[0], &[4, 1, 16, 256]);
    assert_eq!(b.check(&Fused { key: vec![narrow.clone()], value: vec![narrow], ..single(&b, 4) }), 561_002);
    let pages = |x: &Tensor| vec![reshaped(x, &[2, 1, 32, 512])];
    let wide = Fused { key: pages(&op.key[0]), value: pages(&op.key[0]), block_size: 32, ..single(&b, 4) };
    assert_eq!(b.check(&wide), 561_002);

    let triangle = Some(b.empty(&[2048, 2048], I8));
    for (tokens, lens, want) in [(17, vec![18, 16], 0), (18, vec![18, 17], 561_002), (9, vec![18, 7], 161_002)] {
        let op = latent(&b, tokens, 4, false);
        let (sparse_mode, atten_mask, actual_seq_lengths_kv) = (3, triangle.clone(), Some(lens));
        assert_eq!(b.check(&Fused { sparse_mode, atten_mask, actual_seq_lengths_kv, ..op }), want, "{tokens}");
    }
    let plain = latent(&b, 5, 4, false);
    assert_eq!(b.check(&plain), 161_002);
}

#[test]
fn a_latent_is_normalised_its_key_turned_and_both_written_unless_the_slot_is_minus_one() {
    let b = Bench::new(Chip::A2);
    let (latent, rope) = (32, 16);
    let kv = b.floats(&[3, 1, 1, latent + rope], F16, &numbers(3 * 48, 1));
    let gamma = b.floats(&[latent], F16, &numbers(32, 2));
    let [cos, sin] = [3, 4].map(|seed| b.floats(&[3, 1, 1, rope], F16, &numbers(48, seed)));
    let index = b.ints(&[3], I64, &[17, -1, 5]);
    for (mode, heads_first) in [("PA", false), ("PA_BNSD", true)] {
        let dims = |d: i64| if heads_first { [2, 1, 16, d] } else { [2, 16, 1, d] };
        let k_cache = b.floats(&dims(rope), F16, &[0.0; 32 * 16]);
        let ckv_cache = b.floats(&dims(latent), F16, &[0.0; 32 * 32]);
        let (k_rope_out, c_kv_out) = (b.out(&[3, 1, 1, rope], F16), b.out(&[3, 1, 1, latent], F16));
        let op = |index: &Tensor, cache_mode: &str| KvRmsNormRopeCache {
            kv: kv.clone(),
            gamma: gamma.clone(),
            cos: cos.clone(),
            sin: sin.clone(),
            index: index.clone(),
            k_cache: inplace(&k_cache),
            ckv_cache: inplace(&ckv_cache),
            k_rope_scale: None,
            c_kv_scale: None,
            k_rope_offset: None,
            c_kv_offset: None,
            epsilon: 1e-5,
            cache_mode: Some(cache_mode.to_owned()),
            is_output_kv: true,
            k_rope_out: Some(k_rope_out.clone()),
            c_kv_out: Some(c_kv_out.clone()),
        };
        b.run(&op(&index, mode)).unwrap();
        let (x, g, c, s) = (b.read(&kv), b.read(&gamma), b.read(&cos), b.read(&sin));
        let (k, l) = (b.read(&k_cache), b.read(&ckv_cache));
        for (t, slot) in [(0, 17), (2, 5)] {
            let row = &x[t * 48..][..48];
            let want = rms_norm(&row[..32], &g, 1e-5, 0.0).0;
            assert!(near(&l[slot * 32..][..32], &want, 1e-3));
            let turned =
                rotate(&neighbours_to_halves(&row[32..]), &c[t * 16..][..16], &s[t * 16..][..16], Pairs::Halves);
            assert!(near(&k[slot * 16..][..16], &turned, 1e-3));
            assert!(near(&b.read(&k_rope_out.at(t as i64)), &turned, 1e-3));
        }
        let written = |slot: &usize| l[slot * 32..][..32].iter().any(|v| *v != 0.0);
        assert_eq!((0..32).filter(written).collect::<Vec<_>>(), [5, 17]);
        let far = b.ints(&[3], I64, &[0, 1, 32]);
        assert!(matches!(b.run(&op(&far, mode)), Err(Fault::OutOfRange(_))));
        assert_eq!(b.check(&op(&index, "Norm")), 561_002);
    }
}
