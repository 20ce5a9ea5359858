//! Names of cases, by which they are chosen, listed and reported. Invariant: a name says everything of its case, so no two
//! of the list have one.

use std::fmt;

use super::{Case, Layout, Pooled};
use crate::{AttentionParams, GroupScore, PoolKv, RopeLayout};

impl Case {
    /// The operation that it judges, of which there are several cases.
    pub fn operation(&self) -> &'static str {
        match self {
            Case::Linear { .. } => "linear",
            Case::Group { .. } => "linear-group",
            Case::Made { .. } => "linear-made",
            Case::Coded { .. } => "linear-coded",
            Case::Gated { .. } => "linear-gated",
            Case::Norm { .. } => "norm",
            Case::Elementwise { .. } => "elementwise",
            Case::Choose { .. } => "choose",
            Case::Rope(_) => "rope",
            Case::Attention { .. } => "attention",
            Case::Latent { .. } => "latent",
            Case::Indexed { .. } => "latent-indexed",
            Case::Rotary { .. } => "attention-rotary",
            Case::RotaryLatent { .. } => "latent-rotary",
            Case::Windowed { .. } => "windowed",
            Case::Grouped { .. } => "linear-grouped",
            Case::Streams { .. } => "streams",
            Case::Moe { .. } => "moe",
            Case::BoundedMoe { .. } => "moe-bounded",
        }
    }
}

/// The operation, and its formats and sizes: no spaces, rows before columns, inputs before outputs.
impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.operation())?;
        let history = match *self {
            Case::Linear { rows, in_features, out_features, format, bias } => {
                write!(f, "-{format}-{rows}x{in_features}x{out_features}{}", if bias { "-bias" } else { "" })?;
                0
            }
            Case::Group { rows, in_features, ref weights } => {
                write!(f, "-{rows}x{in_features}")?;
                weights.iter().try_for_each(|(out_features, format)| write!(f, "-{format}x{out_features}"))?;
                0
            }
            Case::Made { rows, in_features, out_features, block } => {
                write!(f, "-{block}-{rows}x{in_features}x{out_features}")?;
                0
            }
            Case::Coded { rows, in_features, out_features, layout, bias } => {
                let Layout { code, block: [block_rows, columns], scales, zeros, shuffled } = layout;
                write!(f, "-{code}-{block_rows}by{columns}-{scales}")?;
                f.write_str(if zeros { "-zeros" } else { "" })?;
                f.write_str(if shuffled { "-shuffled" } else { "" })?;
                write!(f, "-{rows}x{in_features}x{out_features}{}", if bias { "-bias" } else { "" })?;
                0
            }
            Case::Gated { rows, in_features, out_features, formats: [gate, up], activation, bias } => {
                let bias = if bias { "-bias" } else { "" };
                write!(f, "-{activation:?}-{gate}-{up}-{rows}x{in_features}x{out_features}{bias}")?;
                0
            }
            Case::Rotary { params, offset, dim, interleaved, normed, kv } => {
                let AttentionParams { heads, kv_heads, head_dim, .. } = params;
                let (pairs, norms) =
                    (if interleaved { "-interleaved" } else { "" }, if normed { "-normed" } else { "" });
                write!(f, "-{kv}-{heads}over{kv_heads}x{head_dim}-at{offset}-{dim}{pairs}{norms}")?;
                0
            }
            Case::RotaryLatent { interleaved, kv } => {
                write!(f, "-{kv}{}", if interleaved { "-interleaved" } else { "" })?;
                0
            }
            Case::Norm { rows, cols, run } => {
                write!(f, "-{rows}x{cols}-by{run}")?;
                0
            }
            Case::Elementwise { rows, cols } => {
                write!(f, "-{rows}x{cols}")?;
                0
            }
            Case::Choose { cols, ties } => {
                write!(f, "-{cols}{}", if ties { "-ties" } else { "" })?;
                0
            }
            Case::Rope(RopeLayout { heads, head_dim, offset, dim, interleaved }) => {
                write!(f, "-{heads}x{head_dim}-at{offset}-{dim}{}", if interleaved { "-interleaved" } else { "" })?;
                0
            }
            Case::Attention { params, kv, history } => {
                let AttentionParams { heads, kv_heads, head_dim, scale: _, window, softcap } = params;
                write!(f, "-{kv}-{heads}over{kv_heads}x{head_dim}")?;
                window.iter().try_for_each(|window| write!(f, "-window{window}"))?;
                softcap.iter().try_for_each(|softcap| write!(f, "-cap{softcap}"))?;
                history
            }
            Case::Indexed { heads, width, top_k, kv, history } => {
                write!(f, "-{kv}-{heads}x{width}-top{top_k}")?;
                history
            }
            Case::Windowed { heads, width, window, pooled, kv, history } => {
                write!(f, "-{kv}-{heads}x{width}-window{window}")?;
                if let Some(PoolKv { rate, overlaps, index: _ }) = pooled.pool() {
                    write!(f, "-rate{rate}{}", if overlaps { "-overlaps" } else { "" })?;
                }
                if let Pooled::Chosen { pool: PoolKv { index: Some(index), .. }, heads, top_k } = pooled {
                    write!(f, "-{heads}x{index}-top{top_k}")?;
                }
                history
            }
            Case::Grouped { rows, groups, in_features, out_features, format } => {
                write!(f, "-{format}-{rows}x{groups}x{in_features}x{out_features}")?;
                0
            }
            Case::Streams { rows, streams, hidden } => {
                write!(f, "-{rows}x{streams}x{hidden}")?;
                0
            }
            Case::BoundedMoe { rows, hidden, intermediate, experts, format, by_token } => {
                let by_token = if by_token { "-by-token" } else { "" };
                write!(f, "-{format}-{rows}x{hidden}x{intermediate}-{experts}experts{by_token}")?;
                0
            }
            Case::Latent { heads, nope, rope, v, rank, format, kv, history } => {
                write!(f, "-{format}-{kv}-{heads}x{nope}+{rope}x{v}-rank{rank}")?;
                history
            }
            Case::Moe { rows, hidden, intermediate, experts, format, groups } => {
                write!(f, "-{format}-{rows}x{hidden}x{intermediate}-{experts}experts")?;
                f.write_str(match groups {
                    None => "",
                    Some(GroupScore::Best) => "-best",
                    Some(GroupScore::TwoBest) => "-two-best",
                })?;
                0
            }
        };
        if history > 0 { write!(f, "-after{history}") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::cases;

    #[test]
    fn every_case_has_a_name_of_its_own_in_one_word() {
        let cases = cases();
        let names: BTreeSet<String> = cases.iter().map(ToString::to_string).collect();
        assert_eq!(names.len(), cases.len());
        assert!(names.iter().all(|name| !name.contains(char::is_whitespace)));
    }
}
