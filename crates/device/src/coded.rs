//! Weights as small codes under the scales of their groups: the one form in which the layouts of quantised checkpoints are given to a
//! device that keeps codes.
//!
//! `value = (number(code) - number(zero)) · scale`, each operation rounded to f32. The columns of a group need not lie together.
//! Invariant: [`widen`] is what a [`CodedSource`] gives as rows, so who keeps codes and who widens them mean the same values.

use std::fmt;
use std::ops::Range;
use std::sync::LazyLock;

use half::f16;

use crate::{DType, RowSource};

/// What a code means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Code {
    /// 0 to 15.
    Int4,
    /// 0 to 255.
    Int8,
    /// A sign, two bits of exponent, one of mantissa.
    E2M1,
    /// A sign, four bits of exponent, three of mantissa; finite but for one code of either sign.
    E4M3,
    /// A sign, five bits of exponent, two of mantissa, as IEEE 754 would have it: the upper half of an f16.
    E5M2,
}

use Code::*;

impl Code {
    /// All of them.
    pub const ALL: [Code; 5] = [Int4, Int8, E2M1, E4M3, E5M2];

    /// As reports show it.
    pub const fn name(self) -> &'static str {
        match self {
            Int4 => "int4",
            Int8 => "int8",
            E2M1 => "fp4-e2m1",
            E4M3 => "fp8-e4m3",
            E5M2 => "fp8-e5m2",
        }
    }

    /// 4 or 8; above them bits of a code are zero.
    pub const fn bits(self) -> usize {
        match self {
            Int4 | E2M1 => 4,
            Int8 | E4M3 | E5M2 => 8,
        }
    }

    /// The code that means zero where groups say no other: the middle of the integers.
    pub const fn zero(self) -> u8 {
        match self {
            Int4 => 8,
            Int8 => 128,
            E2M1 | E4M3 | E5M2 => 0,
        }
    }

    /// The numbers of all codes; of those of four bits over and over.
    pub fn numbers(self) -> &'static [f32; 256] {
        static NUMBERS: LazyLock<[[f32; 256]; 5]> =
            LazyLock::new(|| Code::ALL.map(|code| std::array::from_fn(|i| code.number(i as u8))));
        &NUMBERS[self as usize]
    }

    fn number(self, code: u8) -> f32 {
        match self {
            Int4 => f32::from(code & 15),
            Int8 => f32::from(code),
            E2M1 => float(code & 15, 2, 1),
            E4M3 if code & 0x7f == 0x7f => f32::NAN.copysign(f32::from(code as i8)),
            E4M3 => float(code, 4, 3),
            E5M2 => f16::from_bits(u16::from(code) << 8).to_f32(),
        }
    }
}

/// A sign, bits of exponent and of mantissa, without infinities.
fn float(code: u8, exponent_bits: u32, mantissa_bits: u32) -> f32 {
    let (exponent, mantissa) = (code >> mantissa_bits & ((1 << exponent_bits) - 1), code & ((1 << mantissa_bits) - 1));
    let (bias, fraction) = ((1 << (exponent_bits - 1)) - 1, f32::from(mantissa) / (1 << mantissa_bits) as f32);
    let magnitude = match exponent {
        0 => fraction * 2f32.powi(1 - bias),
        _ => (1.0 + fraction) * 2f32.powi(i32::from(exponent) - bias),
    };
    if code >> (exponent_bits + mantissa_bits) & 1 == 0 { magnitude } else { -magnitude }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How the codes of a matrix lie under scales.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Coding {
    /// What a code means.
    pub code: Code,
    /// A float that holds every scale exactly.
    pub scales: DType,
    /// Whether groups have zeros of their own.
    pub zeros: bool,
    /// Groups of a row.
    pub groups: usize,
    /// The group of each column.
    pub group_of: Vec<u32>,
}

impl Coding {
    /// The groups of `columns` where each takes the next `size` of them, the last what is left.
    pub fn groups_of(columns: usize, size: usize) -> Vec<u32> {
        (0..columns).map(|column| (column / size) as u32).collect()
    }
}

/// Rows of codes.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct CodedRows {
    /// `[rows, columns]`, one in each byte.
    pub codes: Vec<u8>,
    /// `[rows, groups]`.
    pub scales: Vec<f32>,
    /// `[rows, groups]`, the codes that mean zero; empty unless groups have their own.
    pub zeros: Vec<u8>,
}

/// A matrix of codes under scales.
pub trait CodedSource: RowSource {
    /// How they lie.
    fn coding(&self) -> &Coding;

    /// Some of its rows.
    fn codes(&self, rows: Range<usize>) -> CodedRows;
}

/// What rows of codes mean.
pub fn widen(source: &dyn CodedSource, rows: Range<usize>) -> Vec<f32> {
    let Coding { code, groups, ref group_of, .. } = *source.coding();
    let (numbers, CodedRows { codes, scales, zeros }) = (code.numbers(), source.codes(rows));
    let runs: Vec<_> = group_of.chunk_by(|a, b| a == b).map(|run| (run[0] as usize, run.len())).collect();
    let mut out = Vec::with_capacity(codes.len());
    for (row, mut rest) in codes.chunks_exact(group_of.len()).enumerate() {
        for &(group, len) in &runs {
            let at = row * groups + group;
            let (scale, zero) = (scales[at], numbers[usize::from(zeros.get(at).copied().unwrap_or(code.zero()))]);
            let (run, tail) = rest.split_at(len);
            out.extend(run.iter().map(|code| (numbers[usize::from(*code)] - zero) * scale));
            rest = tail;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_mean_what_their_formats_say() {
        let e4m3 = E4M3.numbers();
        assert_eq!(
            [e4m3[0x7e], e4m3[0xfe], e4m3[0x08], e4m3[0x01], e4m3[0x38]],
            [448.0, -448.0, 0.015625, 0.001953125, 1.0]
        );
        assert_eq!(e4m3.iter().filter(|v| !v.is_finite()).count(), 2);
        assert!(e4m3[0x7f].is_nan() && e4m3[0xff].is_nan());
        let e5m2 = E5M2.numbers();
        assert_eq!([e5m2[0x7b], e5m2[0x01], e5m2[0x3c]], [57344.0, 2f32.powi(-16), 1.0]);
        assert_eq!(e5m2.iter().filter(|v| !v.is_finite()).count(), 8);
        assert_eq!(E2M1.numbers()[..8], [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]);
        assert!((8..16).all(|code| E2M1.numbers()[code].to_bits() == (-E2M1.numbers()[code - 8]).to_bits()));
        assert_eq!([Int4.numbers()[15], Int8.numbers()[255]], [15.0, 255.0]);
        for code in Code::ALL {
            assert_eq!(code.numbers()[usize::from(code.zero())] - code.numbers()[usize::from(code.zero())], 0.0);
        }
    }

    #[derive(Debug)]
    struct Two(Coding);

    impl RowSource for Two {
        fn rows(&self, rows: Range<usize>) -> Vec<f32> {
            widen(self, rows)
        }
    }

    impl CodedSource for Two {
        fn coding(&self) -> &Coding {
            &self.0
        }

        fn codes(&self, rows: Range<usize>) -> CodedRows {
            let all = [(vec![0, 8, 15], vec![2.0, 0.5], vec![1, 8]), (vec![3, 3, 9], vec![1.0, 4.0], vec![3, 0])];
            let zeros = self.0.zeros;
            rows.map(|row| all[row].clone()).fold(CodedRows::default(), |mut rows, (codes, scales, own)| {
                rows.codes.extend(codes);
                rows.scales.extend(scales);
                rows.zeros.extend(if zeros { own } else { Vec::new() });
                rows
            })
        }
    }

    #[test]
    fn columns_have_the_scale_and_zero_of_their_group_wherever_they_lie() {
        let coding = Coding { code: Int4, scales: DType::F32, zeros: true, groups: 2, group_of: vec![1, 0, 1] };
        let source = Two(coding);
        assert_eq!(source.rows(0..2), [-4.0, 14.0, 3.5, 12.0, 0.0, 36.0]);
        assert_eq!(source.rows(1..2), [12.0, 0.0, 36.0]);
        assert_eq!(Two(Coding { zeros: false, ..source.0 }).rows(0..1), [-4.0, 0.0, 3.5]);
        assert_eq!(Coding::groups_of(5, 2), [0, 0, 1, 1, 2]);
    }
}
