//! One function per format, from a block's bytes to its values.

use half::f16;

/// The values that 4-bit codes stand for in the IQ4 formats (`kvalues_iq4nl`).
const IQ4: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

fn scale(block: &[u8], offset: usize) -> f32 {
    f16::from_le_bytes([block[offset], block[offset + 1]]).to_f32()
}

/// Codes of 16 bytes: the low halves first, then the high ones.
fn nibbles(bytes: &[u8; 16], out: &mut [f32; 32], value: impl Fn(usize, u8) -> f32) {
    for (i, byte) in bytes.iter().enumerate() {
        out[i] = value(i, byte & 15);
        out[i + 16] = value(i + 16, byte >> 4);
    }
}

fn last16<const N: usize>(block: &[u8; N]) -> &[u8; 16] {
    block.last_chunk().expect("a block of at least 16 bytes")
}

pub(super) fn q4_0(b: &[u8; 18], out: &mut [f32; 32]) {
    let d = scale(b, 0);
    nibbles(last16(b), out, |_, q| d * (f32::from(q) - 8.0));
}

pub(super) fn q4_1(b: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (scale(b, 0), scale(b, 2));
    nibbles(last16(b), out, |_, q| d * f32::from(q) + m);
}

/// Fifth bits: bit i of a word is element i's.
fn fifth(b: &[u8], offset: usize) -> impl Fn(usize, u8) -> f32 {
    let bits = u32::from_le_bytes([b[offset], b[offset + 1], b[offset + 2], b[offset + 3]]);
    move |i, low| f32::from(low | ((bits >> i & 1) << 4) as u8)
}

pub(super) fn q5_0(b: &[u8; 22], out: &mut [f32; 32]) {
    let (d, q) = (scale(b, 0), fifth(b, 2));
    nibbles(last16(b), out, |i, low| d * (q(i, low) - 16.0));
}

pub(super) fn q5_1(b: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m, q) = (scale(b, 0), scale(b, 2), fifth(b, 4));
    nibbles(last16(b), out, |i, low| d * q(i, low) + m);
}

pub(super) fn q8_0(b: &[u8; 34], out: &mut [f32; 32]) {
    let d = scale(b, 0);
    for (out, q) in out.iter_mut().zip(&b[2..]) {
        *out = f32::from(*q as i8) * d;
    }
}

pub(super) fn iq4_nl(b: &[u8; 18], out: &mut [f32; 32]) {
    let d = scale(b, 0);
    nibbles(last16(b), out, |_, q| d * f32::from(IQ4[usize::from(q)]));
}

/// Two-bit codes of 64 bytes: each half of the block takes 32 bytes, each quarter of a half two bits of them.
fn crumb(bytes: &[u8], i: usize) -> u8 {
    bytes[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3
}

pub(super) fn q2_k(b: &[u8; 84], out: &mut [f32; 256]) {
    let (d, m) = (scale(b, 80), scale(b, 82));
    for (group, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let (d, m) = (d * f32::from(b[group] & 15), m * f32::from(b[group] >> 4));
        for (i, out) in out.iter_mut().enumerate() {
            *out = d * f32::from(crumb(&b[16..80], group * 16 + i)) - m;
        }
    }
}

pub(super) fn q3_k(b: &[u8; 110], out: &mut [f32; 256]) {
    let d = scale(b, 108);
    let scales = &b[96..108];
    for (group, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        // Six bits: four of the first eight bytes, two of the last four.
        let low = scales[group % 8] >> (group / 8 * 4) & 15;
        let high = scales[8 + group % 4] >> (group / 4 * 2) & 3;
        let d = d * (f32::from(low | high << 4) - 32.0);
        for (i, out) in out.iter_mut().enumerate() {
            let i = group * 16 + i;
            // A third bit that is clear takes 4 off.
            let third = b[i % 32] >> (i / 32) & 1;
            *out = d * f32::from(crumb(&b[32..96], i) as i8 - 4 * (1 - third as i8));
        }
    }
}

/// Six-bit scale and minimum of sub-block `j` of Q4_K and Q5_K.
fn scale_min(packed: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4)
    };
    (f32::from(scale), f32::from(min))
}

pub(super) fn q4_k(b: &[u8; 144], out: &mut [f32; 256]) {
    let (d, m) = (scale(b, 0), scale(b, 2));
    for (j, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, min) = scale_min(&b[4..16], j);
        let (d, m) = (d * scale, m * min);
        for (out, byte) in out.iter_mut().zip(&b[16 + j / 2 * 32..][..32]) {
            *out = d * f32::from(byte >> (j % 2 * 4) & 15) - m;
        }
    }
}

pub(super) fn q5_k(b: &[u8; 176], out: &mut [f32; 256]) {
    let (d, m) = (scale(b, 0), scale(b, 2));
    for (j, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, min) = scale_min(&b[4..16], j);
        let (d, m) = (d * scale, m * min);
        let (low, high) = (&b[48 + j / 2 * 32..][..32], &b[16..48]);
        for ((out, low), high) in out.iter_mut().zip(low).zip(high) {
            *out = d * f32::from(low >> (j % 2 * 4) & 15 | (high >> j & 1) << 4) - m;
        }
    }
}

pub(super) fn q6_k(b: &[u8; 210], out: &mut [f32; 256]) {
    let d = scale(b, 208);
    for (group, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let d = d * f32::from(b[192 + group] as i8);
        // Of each half's four quarters the first two lie in low nibbles, the others in high ones.
        let (half, quarter) = (group / 8, group % 8 / 2);
        let low = &b[half * 64 + quarter % 2 * 32 + group % 2 * 16..][..16];
        let high = &b[128 + half * 32 + group % 2 * 16..][..16];
        for ((out, low), high) in out.iter_mut().zip(low).zip(high) {
            let q = low >> (quarter / 2 * 4) & 15 | (high >> (quarter * 2) & 3) << 4;
            *out = d * (f32::from(q) - 32.0);
        }
    }
}

pub(super) fn iq4_xs(b: &[u8; 136], out: &mut [f32; 256]) {
    let d = scale(b, 0);
    let high = u16::from_le_bytes([b[2], b[3]]);
    let codes = b[8..].as_chunks::<16>().0;
    for (j, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let scale = b[4 + j / 2] >> (j % 2 * 4) & 15 | ((high >> (2 * j) & 3) as u8) << 4;
        let d = d * (f32::from(scale) - 32.0);
        nibbles(&codes[j], out, |_, q| d * f32::from(IQ4[usize::from(q)]));
    }
}
