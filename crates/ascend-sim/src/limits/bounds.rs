//! Bounds of shapes: those that differ between chips in one table, and those that do not.

use crate::array::Chip;

/// Bounds of shapes that differ between chips.
pub struct Numbers {
    /// Modes of `aclnnRotaryPositionEmbedding`: 0 pairs halves, 1 pairs neighbours.
    pub rope_modes: &'static [i64],
    /// Its head width is a multiple of this,
    pub rope_width_step: i64,
    /// and at most this.
    pub rope_width_max: i64,
    /// Bytes that the halves of `aclnnSwiGlu`'s last dimension are a multiple of.
    pub swiglu_bytes: i64,
    /// Fewest bytes of a row of `aclnnRmsNorm`.
    pub rms_row_bytes: i64,
    /// The last dimension of `aclnnDynamicQuant` is a multiple of this.
    pub quant_row_step: i64,
    /// The hidden width of `aclnnMoeFinalizeRoutingV2` is a multiple of this.
    pub finalize_width_step: i64,
    /// Its accepted `dropPadMode`.
    pub finalize_modes: &'static [i64],
    /// Values of `cubeMathType` for f32 operands,
    pub cube_f32: &'static [i8],
    /// and for narrower ones.
    pub cube_narrow: &'static [i8],
    /// Whether weights may have one scale for each group of rows, or one for all.
    pub quant_groups: bool,
}

/// The chip's bounds.
pub fn numbers(chip: Chip) -> &'static Numbers {
    match chip {
        Chip::A2 | Chip::A3 => &Numbers {
            rope_modes: &[0, 1],
            rope_width_step: 2,
            rope_width_max: 894,
            swiglu_bytes: 1,
            rms_row_bytes: 1,
            quant_row_step: 1,
            finalize_width_step: 1,
            finalize_modes: &[0, 2],
            cube_f32: &[0, 1, 2, 3],
            cube_narrow: &[0, 1, 2, 3],
            quant_groups: true,
        },
        Chip::P310 => &Numbers {
            rope_modes: &[0],
            rope_width_step: 32,
            rope_width_max: 128,
            swiglu_bytes: 64,
            rms_row_bytes: 32,
            quant_row_step: 32,
            finalize_width_step: 32,
            finalize_modes: &[2],
            cube_f32: &[1, 2],
            cube_narrow: &[0, 1, 2],
            quant_groups: false,
        },
    }
}

/// Heads of `aclnnRotaryPositionEmbedding` in the layout of tokens, heads, width: fewer than this.
pub const ROPE_HEADS_BELOW: i64 = 1000;
/// Head widths of `aclnnApplyRotaryPosEmbV2`.
pub const APPLY_ROPE_WIDTHS: &[i64] = &[64, 128];
/// Rows and columns of a weight-only quantised matrix.
pub const QUANT_MATRIX_MAX: i64 = 65_535;
/// The group size of such a matrix is a multiple of this.
pub const QUANT_GROUP_STEP: i64 = 32;
/// Last dimensions of a grouped product lie below this.
pub const GROUPED_WIDTH_BELOW: i64 = 65_536;
/// Experts of `aclnnMoeGatingTopK`, also counted with each group padded to [`GATE_GROUP_PAD`].
pub const GATE_EXPERTS_MAX: i64 = 2048;
/// What its groups are padded to a multiple of.
pub const GATE_GROUP_PAD: i64 = 32;
/// Experts per token of `aclnnMoeGatingTopKSoftmaxV2`.
pub const GATE_SOFTMAX_K_MAX: i64 = 1024;
/// Bytes of the keys and values of one token in the layout of heads before positions: below this,
pub const SCATTER_ROW_BYTES_BELOW: i64 = 196_608;
/// in heads of a multiple of these bytes.
pub const SCATTER_HEAD_BYTES: i64 = 32;

/// Bounds of `aclnnFusedInferAttentionScoreV3`.
pub mod fused {
    /// The side of the mask of modes 3 and 4.
    pub const MASK: i64 = 2048;
    /// Query heads.
    pub const HEADS_MAX: i64 = 256;
    /// Equal head widths of queries, keys and values are at most this,
    pub const WIDTH_MAX: i64 = 256;
    /// and a multiple of this.
    pub const WIDTH_STEP: i64 = 16;
    /// Unequal ones: this for queries and keys,
    pub const WIDE_QK: i64 = 192;
    /// one of these for values.
    pub const WIDE_V: &[i64] = &[128, 192];
    /// Width of a page's row of keys.
    pub const PAGE_ROW_MAX: i64 = 65_535;
    /// Positions of a page are a multiple of this,
    pub const PAGE_STEP: i64 = 16;
    /// and at most this.
    pub const PAGE_MAX: i64 = 128;
    /// Sequences of one call.
    pub const SEQUENCES_MAX: usize = 4096;
    /// Width of the latent in the latent form,
    pub const LATENT: i64 = 512;
    /// of its rotated key,
    pub const LATENT_ROPE: i64 = 64;
    /// its query heads,
    pub const LATENT_HEADS: &[i64] = &[1, 2, 4, 8, 16, 32, 64, 128];
    /// positions of its pages,
    pub const LATENT_PAGES: &[i64] = &[16, 128];
    /// and new tokens of each sequence.
    pub const LATENT_TOKENS_MAX: i64 = 16;
    /// Width of the unrotated part of queries and keys that are given in two parts, and of their values.
    pub const SPLIT_WIDTH: i64 = 128;
    /// Sequence batch of the decoding layouts.
    pub const DECODE_BATCH_MAX: i64 = 65_536;
}
