//! Rotary position embedding.

use super::view::{expanded, shaped, store};
use crate::{
    array::{Chip, Fault, Refusal},
    dtype,
    limits::{APPLY_ROPE_WIDTHS, ROPE_HEADS_BELOW, check, fits, numbers, valid},
    math::rope::{Pairs, rotate},
    op::{Kernel, Out, Ref, Tensor, operator},
    runtime::Runtime,
};

/// Stores `x` turned by angles whose cosines and sines are repeated to its shape.
fn turn(rt: &mut Runtime, x: &Tensor, cos: &Tensor, sin: &Tensor, pairs: Pairs, out: &Tensor) -> Result<(), Fault> {
    let (cos, sin) = (rt.load(&expanded(cos, &x.dims))?, rt.load(&expanded(sin, &x.dims))?);
    let data = rt.load(x)?.data;
    let width = x.dims[x.rank() - 1] as usize;
    let angles = cos.data.chunks_exact(width).zip(sin.data.chunks_exact(width));
    let turned = data.chunks_exact(width).zip(angles).flat_map(|(x, (cos, sin))| rotate(x, cos, sin, pairs)).collect();
    store(rt, out, turned)
}

/// Refuses angles that are not given for the whole width of `x`, or for other positions.
fn check_angles(what: &str, angles: &Tensor, x: &Tensor) -> Result<(), Refusal> {
    let same_rank = angles.rank() == x.rank();
    let inside = same_rank && angles.dims.iter().zip(&x.dims).all(|(&a, &d)| a == d || a == 1);
    let whole = inside && angles.dims.last() == x.dims.last();
    valid(whole, || format!("{what} {:?} for x {:?}: its width, and its length or 1 elsewhere", angles.dims, x.dims))
}

operator! {
    /// y = x * cos + turned(x) * sin.
    RotaryPositionEmbedding = aclnnRotaryPositionEmbedding, aclnnRotaryPositionEmbeddingGetWorkspaceSize
        (x: Tensor, cos: Tensor, sin: Tensor, mode: i64, out: Out)
}

impl Kernel for RotaryPositionEmbedding {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        check(chip, "RotaryPositionEmbedding", &[&self.x, &self.cos, &self.sin, &self.out])?;
        let (dims, limits) = (&self.x.dims, numbers(chip));
        valid([3, 4].contains(&dims.len()), || format!("x {dims:?}: [tokens, heads, width], or four dimensions"))?;
        shaped("out", &self.out, dims)?;
        shaped("sin", &self.sin, &self.cos.dims)?;
        check_angles("cos", &self.cos, &self.x)?;
        let modes = limits.rope_modes;
        valid(modes.contains(&self.mode), || format!("mode {}: one of {modes:?}", self.mode))?;
        let (width, step, max) = (dims[dims.len() - 1], limits.rope_width_step, limits.rope_width_max);
        fits(width % step == 0 && width <= max, || format!("a width of {width}: a multiple of {step} up to {max}"))?;
        match dims[..] {
            [_, heads, _] => fits(heads < ROPE_HEADS_BELOW, || format!("{heads} heads: below {ROPE_HEADS_BELOW}")),
            // Other layouts of four dimensions than batch, heads, positions, width may be bound less tightly.
            [batch, heads, positions, width] if self.mode == 0 => {
                let half = dtype::bytes(self.x.dtype, width as u64 / 2);
                let few = batch * heads <= 8 * positions;
                fits(few && half.is_multiple_of(32), || {
                    format!("x {dims:?}: halves of 32 bytes, batch * heads <= 8 * positions")
                })
            }
            _ => Ok(()),
        }
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        let pairs = if self.mode == 0 { Pairs::Halves } else { Pairs::Neighbours };
        turn(rt, &self.x, &self.cos, &self.sin, pairs, &self.out)
    }
}

operator! {
    /// Queries and keys turned where they lie.
    ApplyRotaryPosEmbV2 = aclnnApplyRotaryPosEmbV2, aclnnApplyRotaryPosEmbV2GetWorkspaceSize
        (query: Ref, key: Ref, cos: Tensor, sin: Tensor, layout: i64, rotary_mode: String)
}

impl Kernel for ApplyRotaryPosEmbV2 {
    fn check(&self, chip: Chip) -> Result<(), Refusal> {
        check(chip, "ApplyRotaryPosEmbV2", &[&self.query, &self.key, &self.cos, &self.sin])?;
        valid(self.rotary_mode == "half", || format!("rotaryMode {:?}: \"half\"", self.rotary_mode))?;
        let rank = match self.layout {
            1 => 4,
            4 => 3,
            other => return valid(false, || format!("layout {other}: 1 (BSND) or 4 (TND)")),
        };
        for x in [&self.query, &self.key] {
            valid(x.rank() == rank, || format!("{:?} in layout {}: {rank} dimensions", x.dims, self.layout))?;
            check_angles("cos", &self.cos, x)?;
            let width = x.dims[rank - 1];
            fits(APPLY_ROPE_WIDTHS.contains(&width), || format!("a width of {width}: one of {APPLY_ROPE_WIDTHS:?}"))?;
        }
        shaped("sin", &self.sin, &self.cos.dims)
    }

    fn run(&self, rt: &mut Runtime) -> Result<(), Fault> {
        turn(rt, &self.query, &self.cos, &self.sin, Pairs::Halves, &self.query)?;
        turn(rt, &self.key, &self.cos, &self.sin, Pairs::Halves, &self.key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::bench::{Bench, F16, F32, inplace, near, numbers, reshaped};
    use crate::ops::view::narrow;

    /// Cosines and sines of `[tokens, 1, width]`, the two halves equal.
    fn angles(b: &Bench, tokens: i64, width: i64, dtype: i64) -> (Tensor, Tensor) {
        let half = width / 2;
        let angle = |i: i64| (i / width) as f32 * 0.7 + (i % half) as f32 * 0.3 + 0.1;
        let [cos, sin] = [f32::cos, f32::sin].map(|f| (0..tokens * width).map(|i| f(angle(i))).collect::<Vec<_>>());
        (b.floats(&[tokens, 1, width], dtype, &cos), b.floats(&[tokens, 1, width], dtype, &sin))
    }

    #[test]
    fn every_head_of_a_token_turns_by_its_angles_and_keeps_its_length() {
        let b = Bench::new(Chip::A2);
        let (t, n, d) = (3, 2, 8);
        let wide = b.floats(&[t, n, d + 4], F32, &numbers((t * n * (d + 4)) as usize, 1));
        let x = narrow(&wide, 2, 4, d as usize);
        let (cos, sin) = angles(&b, t, d, F32);
        let out = b.out(&[t, n, d], F32);
        b.run(&RotaryPositionEmbedding { x: x.clone(), cos: cos.clone(), sin: sin.clone(), mode: 0, out: out.clone() })
            .unwrap();
        let (x_read, y, cos, sin) = (b.read(&x), b.read(&out), b.read(&cos), b.read(&sin));
        for (row, (x, y)) in x_read.chunks(8).zip(y.chunks(8)).enumerate() {
            let at = row / n as usize * 8;
            let want: Vec<f32> =
                (0..8).map(|i| x[i] * cos[at + i] + sin[at + i] * if i < 4 { -x[i + 4] } else { x[i - 4] }).collect();
            assert!(near(y, &want, 1e-6));
            let norm = |v: &[f32]| v.iter().map(|v| v * v).sum::<f32>();
            assert!((norm(x) - norm(y)).abs() < 1e-4 * norm(x));
        }
    }

    #[test]
    fn widths_modes_and_heads_are_bounded_by_the_chip() {
        for (chip, dims, mode, want) in [
            (Chip::A2, vec![2, 4, 894], 0, 0),
            (Chip::A2, vec![2, 4, 896], 0, 561_002),
            (Chip::A2, vec![2, 4, 7], 0, 561_002),
            (Chip::A2, vec![2, 4, 16], 1, 0),
            (Chip::A2, vec![2, 4, 16], 2, 161_002),
            (Chip::A2, vec![2, 999, 16], 0, 0),
            (Chip::A2, vec![2, 1000, 16], 0, 561_002),
            (Chip::A2, vec![2, 16], 0, 161_002),
            (Chip::A2, vec![2, 4, 1, 32], 0, 0),
            (Chip::A2, vec![3, 3, 1, 32], 0, 561_002),
            (Chip::A2, vec![2, 4, 1, 16], 0, 561_002),
            (Chip::P310, vec![2, 4, 128], 0, 0),
            (Chip::P310, vec![2, 4, 160], 0, 561_002),
            (Chip::P310, vec![2, 4, 48], 0, 561_002),
            (Chip::P310, vec![2, 4, 32], 1, 161_002),
        ] {
            let b = Bench::new(chip);
            let x = b.empty(&dims, F16);
            let (cos, out) = (x.clone(), Out(x.clone()));
            let rope = RotaryPositionEmbedding { x, sin: cos.clone(), cos, mode, out };
            assert_eq!(b.check(&rope), want, "{chip:?} {dims:?} {mode}");
        }
    }

    #[test]
    fn angles_cover_the_whole_width() {
        let b = Bench::new(Chip::A2);
        let (x, out) = (b.empty(&[2, 4, 16], F16), b.out(&[2, 4, 16], F16));
        for (dims, want) in [([2, 1, 16], 0), ([1, 1, 16], 0), ([2, 1, 8], 161_002), ([4, 1, 16], 161_002)] {
            let cos = b.empty(&dims, F16);
            let rope = RotaryPositionEmbedding { x: x.clone(), sin: cos.clone(), cos, mode: 0, out: out.clone() };
            assert_eq!(b.check(&rope), want, "{dims:?}");
        }
    }

    #[test]
    fn queries_and_keys_turn_in_place_as_apart() {
        let b = Bench::new(Chip::A2);
        let (q, k) = (b.floats(&[2, 4, 64], F16, &numbers(512, 1)), b.floats(&[2, 1, 64], F16, &numbers(128, 2)));
        let (cos, sin) = angles(&b, 2, 64, F16);
        let out = b.out(&[2, 4, 64], F16);
        b.run(&RotaryPositionEmbedding { x: q.clone(), cos: cos.clone(), sin: sin.clone(), mode: 0, out: out.clone() })
            .unwrap();
        let both = |layout, mode: &str| ApplyRotaryPosEmbV2 {
            query: inplace(&q),
            key: inplace(&k),
            cos: cos.clone(),
            sin: sin.clone(),
            layout,
            rotary_mode: mode.to_owned(),
        };
        b.run(&both(4, "half")).unwrap();
        assert_eq!(b.read(&q), b.read(&out));
        for (layout, mode) in [(1, "half"), (2, "half"), (4, "interleave")] {
            assert_eq!(b.check(&both(layout, mode)), 161_002);
        }
        let narrow = ApplyRotaryPosEmbV2 {
            query: inplace(&reshaped(&q, &[2, 8, 32])),
            key: inplace(&reshaped(&k, &[2, 2, 32])),
            cos: reshaped(&cos, &[2, 1, 32]),
            sin: reshaped(&sin, &[2, 1, 32]),
            ..both(4, "half")
        };
        assert_eq!(b.check(&narrow), 561_002);
    }
}
