//! One function per format, from a block's bytes to its integers.

use super::{BlockFormat, Unpacked};

/// Codes of 16 bytes: the low halves first, then the high ones.
fn nibbles(bytes: &[u8], codes: &mut [i8], code: impl Fn(usize, u8) -> i8) {
    let (low, high) = codes.split_at_mut(16);
    for (i, byte) in bytes.iter().enumerate() {
        low[i] = code(i, byte & 15);
        high[i] = code(i + 16, byte >> 4);
    }
}

pub(super) fn q4_0(b: &[u8; 18], out: &mut Unpacked) {
    nibbles(&b[2..], &mut out.codes[..32], |_, q| q as i8 - 8);
}

pub(super) fn q4_1(b: &[u8; 20], out: &mut Unpacked) {
    nibbles(&b[4..], &mut out.codes[..32], |_, q| q as i8);
}

/// Fifth bits: bit i of a word is element i's.
fn fifth(b: &[u8], offset: usize) -> impl Fn(usize, u8) -> i8 {
    let bits = u32::from_le_bytes([b[offset], b[offset + 1], b[offset + 2], b[offset + 3]]);
    move |i, low| (low | ((bits >> i & 1) << 4) as u8) as i8
}

pub(super) fn q5_0(b: &[u8; 22], out: &mut Unpacked) {
    let code = fifth(b, 2);
    nibbles(&b[6..], &mut out.codes[..32], |i, low| code(i, low) - 16);
}

pub(super) fn q5_1(b: &[u8; 24], out: &mut Unpacked) {
    nibbles(&b[8..], &mut out.codes[..32], fifth(b, 4));
}

pub(super) fn q8_0(b: &[u8; 34], out: &mut Unpacked) {
    for (code, byte) in out.codes.iter_mut().zip(&b[2..]) {
        *code = *byte as i8;
    }
}

pub(super) fn iq4_nl(b: &[u8; 18], out: &mut Unpacked) {
    nibbles(&b[2..], &mut out.codes[..32], |_, q| BlockFormat::IQ4_VALUES[usize::from(q)]);
}

/// Two-bit codes of 64 bytes: each half of the block takes 32 bytes, each quarter of a half two bits of them.
fn crumb(bytes: &[u8], i: usize) -> i8 {
    (bytes[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3) as i8
}

pub(super) fn q2_k(b: &[u8; 84], out: &mut Unpacked) {
    for (j, byte) in b[..16].iter().enumerate() {
        (out.scales[j], out.mins[j]) = ((byte & 15) as i8, (byte >> 4) as i8);
    }
    for (i, code) in out.codes.iter_mut().enumerate() {
        *code = crumb(&b[16..80], i);
    }
}

pub(super) fn q3_k(b: &[u8; 110], out: &mut Unpacked) {
    let scales = &b[96..108];
    for (j, scale) in out.scales.iter_mut().enumerate() {
        // Six bits: four of the first eight bytes, two of the last four.
        let low = scales[j % 8] >> (j / 8 * 4) & 15;
        let high = scales[8 + j % 4] >> (j / 4 * 2) & 3;
        *scale = (low | high << 4) as i8 - 32;
    }
    for (i, code) in out.codes.iter_mut().enumerate() {
        // A third bit that is clear takes 4 off.
        let third = (b[i % 32] >> (i / 32) & 1) as i8;
        *code = crumb(&b[32..96], i) - 4 * (1 - third);
    }
}

/// Six-bit scales and minima of Q4_K and Q5_K.
fn scales_mins(packed: &[u8], out: &mut Unpacked) {
    for j in 0..8 {
        let (scale, min) = if j < 4 {
            (packed[j] & 63, packed[j + 4] & 63)
        } else {
            (packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4)
        };
        (out.scales[j], out.mins[j]) = (scale as i8, min as i8);
    }
}

pub(super) fn q4_k(b: &[u8; 144], out: &mut Unpacked) {
    scales_mins(&b[4..16], out);
    for (j, codes) in out.codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        for (code, byte) in codes.iter_mut().zip(&b[16 + j / 2 * 32..][..32]) {
            *code = (byte >> (j % 2 * 4) & 15) as i8;
        }
    }
}

pub(super) fn q5_k(b: &[u8; 176], out: &mut Unpacked) {
    scales_mins(&b[4..16], out);
    for (j, codes) in out.codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        for ((code, low), high) in codes.iter_mut().zip(&b[48 + j / 2 * 32..]).zip(&b[16..48]) {
            *code = (low >> (j % 2 * 4) & 15 | (high >> j & 1) << 4) as i8;
        }
    }
}

pub(super) fn q6_k(b: &[u8; 210], out: &mut Unpacked) {
    for (scale, byte) in out.scales.iter_mut().zip(&b[192..208]) {
        *scale = *byte as i8;
    }
    for (group, codes) in out.codes.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        // Of each half's four quarters the first two lie in low nibbles, the others in high ones.
        let (half, quarter) = (group / 8, group % 8 / 2);
        let low = &b[half * 64 + quarter % 2 * 32 + group % 2 * 16..][..16];
        let high = &b[128 + half * 32 + group % 2 * 16..][..16];
        for ((code, low), high) in codes.iter_mut().zip(low).zip(high) {
            *code = (low >> (quarter / 2 * 4) & 15 | (high >> (quarter * 2) & 3) << 4) as i8 - 32;
        }
    }
}

pub(super) fn iq4_xs(b: &[u8; 136], out: &mut Unpacked) {
    let high = u16::from_le_bytes([b[2], b[3]]);
    let bytes = b[8..].as_chunks::<16>().0;
    for (j, codes) in out.codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let scale = b[4 + j / 2] >> (j % 2 * 4) & 15 | ((high >> (2 * j) & 3) as u8) << 4;
        out.scales[j] = scale as i8 - 32;
        nibbles(&bytes[j], codes, |_, q| BlockFormat::IQ4_VALUES[usize::from(q)]);
    }
}
