//! Which cases there are. Those that are of one kind are listed beside their code.

use super::steps::LONG;
use super::{Case, codes, compressed, fused, indexed, moe};
use crate::{AttentionParams, BlockFormat, Code, GroupScore, KvDtype, RopeLayout, WeightFormat};

/// All cases.
pub fn cases() -> Vec<Case> {
    use WeightFormat::{BF16, F16, F32};
    let mut cases = Vec::new();
    for format in [F32, F16, BF16] {
        for (rows, in_features, out_features) in [
            (1, 1, 1),
            (1, 7, 5),
            (3, 33, 17),
            (2, 64, 16),
            (12, 40, 24),
            (5, 127, 31),
            (17, 192, 65),
            (1, 300, 129),
            (33, 96, 40),
        ] {
            cases.push(Case::Linear { rows, in_features, out_features, format, bias: rows % 2 == 1 });
        }
    }
    let block = WeightFormat::Ggml;
    cases.push(Case::Group { rows: 3, in_features: 33, weights: vec![(17, F32), (5, BF16), (40, F16)] });
    let mixed = vec![(65, block(BlockFormat::Q4_K)), (1, BF16), (16, block(BlockFormat::Q8_0)), (33, F32)];
    cases.push(Case::Group { rows: 1, in_features: 256, weights: mixed.clone() });
    cases.push(Case::Group { rows: 19, in_features: 512, weights: mixed });
    cases.extend(fused::cases());
    cases.extend(indexed::cases());
    cases.extend(compressed::cases());
    cases.extend(moe::bounded_cases());
    cases.extend(codes::cases());
    for block in BlockFormat::ALL {
        let (format, k) = (WeightFormat::Ggml(block), block.elements());
        // Devices take few rows, and more, in tiles of other sizes.
        for (rows, blocks, out_features) in
            [(1, 1, 1), (2, 5, 33), (3, 3, 17), (7, 4, 16), (12, 1, 24), (27, 1, 9), (37, 2, 65)]
        {
            cases.push(Case::Linear { rows, in_features: k * blocks, out_features, format, bias: rows % 2 == 1 });
        }
        for rows in [1, 27, 5] {
            cases.push(Case::Moe { rows, hidden: k, intermediate: k, experts: 4, format, groups: None });
        }
    }
    for block in BlockFormat::ALL.into_iter().filter(|block| block.can_be_made()) {
        for (rows, blocks, out_features) in [(1, 1, 1), (3, 2, 17), (17, 3, 65)] {
            cases.push(Case::Made { rows, in_features: block.elements() * blocks, out_features, block });
        }
    }
    cases.push(Case::Latent {
        heads: 2,
        nope: 7,
        rope: 6,
        v: 5,
        rank: 64,
        format: WeightFormat::Ggml(BlockFormat::Q4_0),
        kv: KvDtype::F32,
        history: 0,
    });
    for (rows, cols, run) in [(1, 1, 1), (3, 37, 37), (5, 96, 32), (2, 128, 16), (17, 192, 192)] {
        cases.push(Case::Norm { rows, cols, run });
    }
    for (rows, cols) in [(1, 1), (3, 7), (5, 33), (17, 64)] {
        cases.push(Case::Elementwise { rows, cols });
    }
    for (cols, ties) in [(1, false), (7, false), (255, true), (1000, false), (1000, true), (129_283, false)] {
        cases.push(Case::Choose { cols, ties });
    }
    for interleaved in [false, true] {
        cases.push(Case::Rope(RopeLayout { heads: 3, head_dim: 10, offset: 0, dim: 10, interleaved }));
        cases.push(Case::Rope(RopeLayout { heads: 5, head_dim: 48, offset: 32, dim: 16, interleaved }));
        cases.push(Case::Rope(RopeLayout { heads: 1, head_dim: 64, offset: 0, dim: 64, interleaved }));
    }
    for (heads, kv_heads, head_dim) in [(1, 1, 5), (4, 2, 32), (6, 2, 33), (7, 1, 64), (8, 8, 16), (12, 2, 80)] {
        let scale = (head_dim as f32).sqrt().recip();
        let full = AttentionParams { heads, kv_heads, head_dim, scale, window: None, softcap: None };
        for kv in KvDtype::ALL {
            cases.push(Case::Attention { params: full, kv, history: 0 });
            // Windows of one token, within a block, across blocks, and longer than any context.
            for (window, softcap) in [(1, None), (7, Some(0.3)), (31, None), (65, Some(2.0)), (1000, Some(50.0))] {
                let params = AttentionParams { window: Some(window), softcap, ..full };
                cases.push(Case::Attention { params, kv, history: 0 });
            }
        }
    }
    cases.extend(KvDtype::ALL.into_iter().flat_map(real_widths));
    for (kv, window) in KvDtype::ALL.into_iter().flat_map(|kv| [None, Some(90)].map(|window| (kv, window))) {
        let params = AttentionParams { heads: 3, kv_heads: 1, head_dim: 16, scale: 0.25, window, softcap: None };
        cases.push(Case::Attention { params, kv, history: LONG });
    }
    cases.push(Case::Latent {
        heads: 3,
        nope: 8,
        rope: 4,
        v: 8,
        rank: 16,
        format: F32,
        kv: KvDtype::F16,
        history: LONG,
    });
    for (format, kv) in [F32, BF16, F16].into_iter().flat_map(|format| KvDtype::ALL.map(|kv| (format, kv))) {
        cases.push(Case::Latent { heads: 3, nope: 7, rope: 6, v: 5, rank: 19, format, kv, history: 0 });
        cases.push(Case::Latent { heads: 6, nope: 32, rope: 16, v: 32, rank: 64, format, kv, history: 0 });
    }
    for format in [F32, BF16, F16] {
        let groups = Some(GroupScore::TwoBest);
        cases.push(Case::Moe { rows: 1, hidden: 64, intermediate: 32, experts: 8, format, groups });
        cases.push(Case::Moe { rows: 19, hidden: 96, intermediate: 64, experts: 16, format, groups });
    }
    for groups in [None, Some(GroupScore::Best), Some(GroupScore::TwoBest)] {
        cases.push(Case::Moe { rows: 5, hidden: 37, intermediate: 23, experts: 8, format: BF16, groups });
    }
    cases.push(Case::Moe { rows: 6, hidden: 33, intermediate: 17, experts: 9, format: F32, groups: None });
    // All rows have few experts to choose from, or one row has many numbers that do not fill a vector.
    for (rows, hidden, intermediate) in [(40, 32, 24), (110, 24, 32), (1, 37, 23)] {
        for format in [F32, BF16, F16] {
            cases.push(Case::Moe { rows, hidden, intermediate, experts: 4, format, groups: None });
        }
    }
    for code in Code::ALL {
        for (rows, hidden, intermediate, experts) in [(1, 64, 128, 8), (45, 72, 64, 4), (19, 136, 200, 8)] {
            let format = WeightFormat::Coded(code);
            cases.push(Case::Moe { rows, hidden, intermediate, experts, format, groups: None });
        }
    }
    cases
}

/// Attention in the widths of models that are served, with few heads: devices have ways of their own for these.
fn real_widths(kv: KvDtype) -> Vec<Case> {
    let full = |heads: usize, kv_heads: usize, head_dim: usize| {
        let scale = (head_dim as f32).sqrt().recip();
        AttentionParams { heads, kv_heads, head_dim, scale, window: None, softcap: None }
    };
    let attention = [
        full(4, 1, 64),
        full(12, 1, 64),
        full(4, 1, 128),
        AttentionParams { window: Some(40), softcap: Some(1.5), ..full(7, 1, 128) },
        full(16, 1, 128),
        full(2, 2, 192),
        AttentionParams { window: Some(40), softcap: Some(50.0), ..full(2, 1, 256) },
    ];
    let attention = attention.map(|params| Case::Attention { params, kv, history: 0 });
    let latent = [(2, 24, 64, 40, 512, WeightFormat::BF16), (3, 24, 16, 40, 128, WeightFormat::F16)];
    let latent = latent.map(|(heads, nope, rope, v, rank, format)| Case::Latent {
        heads,
        nope,
        rope,
        v,
        rank,
        format,
        kv,
        history: 0,
    });
    attention.into_iter().chain(latent).collect()
}
