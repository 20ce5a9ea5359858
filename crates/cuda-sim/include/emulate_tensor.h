// The instructions of PTX that kernels reach through assembly on a device: mma, ldmatrix, cp.async. A part of emulate.h.
#pragma once

namespace emulated {

/// Two bytes as a number.
using Widen = float (*)(unsigned short);

inline void multiply(Warp& w, Widen widen) {
    float a[16][16], b[16][8];
    for (unsigned l = 0; l < WARP; l++) {
        unsigned row = l / 4, pair = l % 4 * 2;
        for (unsigned i = 0; i < 4; i++)
            for (unsigned half = 0; half < 2; half++)
                a[row + i % 2 * 8][pair + i / 2 * 8 + half] = widen(static_cast<unsigned short>(w.a[l][i] >> half * 16));
        for (unsigned i = 0; i < 2; i++)
            for (unsigned half = 0; half < 2; half++)
                b[pair + i * 8 + half][row] = widen(static_cast<unsigned short>(w.b[l][i] >> half * 16));
    }
    for (unsigned m = 0; m < 16; m++) {
        float sums[8] = {};
        for (unsigned k = 0; k < 16; k++)
            for (unsigned n = 0; n < 8; n++) sums[n] += a[m][k] * b[k][n];
        memcpy(w.product[m], sums, sizeof sums);
    }
}

/// Rows of 8 elements of 16 bits at the addresses that lanes brought, dealt out to the lanes.
inline void deal(Warp& w, bool transposed) {
    for (unsigned m = 0; m < 4; m++) {
        unsigned short rows[8][8];
        for (unsigned r = 0; r < 8; r++) memcpy(rows[r], reinterpret_cast<const void*>(w.brought[m * 8 + r]), 16);
        for (unsigned l = 0; l < WARP; l++) {
            unsigned r = l / 4, c = l % 4 * 2;
            w.matrices[l][m] =
                transposed ? rows[c][r] | unsigned(rows[c + 1][r]) << 16 : rows[r][c] | unsigned(rows[r][c + 1]) << 16;
        }
    }
}

/// d += a · b, 16 x 16 times 16 x 8, fragments as mma.m16n8k16 lays them out.
inline void mma_16816(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], Widen widen) {
    whole_warp("mma");
    Warp& w = warp();
    unsigned l = lane().index;
    memcpy(w.a[l], a, sizeof a);
    memcpy(w.b[l], b, sizeof b);
    meet(Meeting::Mma, [=](Warp& w) { multiply(w, widen); });
    for (unsigned i = 0; i < 4; i++) d[i] += w.product[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
}

inline void ldmatrix_x4(unsigned (&r)[4], const void* row, bool transposed) {
    whole_warp("ldmatrix");
    if (reinterpret_cast<uintptr_t>(row) % 16) fail_with(MISALIGNED_ADDRESS, "ldmatrix of a row at %p, which is not a multiple of 16", row);
    Warp& w = warp();
    w.brought[lane().index] = reinterpret_cast<uintptr_t>(row);
    meet(Meeting::Ldmatrix, [=](Warp& w) { deal(w, transposed); });
    memcpy(r, w.matrices[lane().index], sizeof r);
}

/// Asks for a copy of 16 bytes. What they hold until somebody has waited for it is undefined.
inline void cp_async_16(void* to, const void* from, bool valid) {
    if ((reinterpret_cast<uintptr_t>(to) | (valid ? reinterpret_cast<uintptr_t>(from) : 0)) % 16)
        fail_with(MISALIGNED_ADDRESS, "cp.async from %p to %p, of which one is not a multiple of 16", from, to);
    Lane& self = lane();
    if (self.copies == self.capacity) {
        self.capacity = self.capacity ? self.capacity * 2 : 64;
        self.copy = static_cast<Copy*>(realloc(self.copy, self.capacity * sizeof(Copy)));
    }
    memset(to, POISON, 16);
    self.copy[self.copies++] = {to, from, valid, self.group};
}

inline void cp_async_commit() { lane().group++; }

/// All groups but the last `pending` arrive.
inline void cp_async_wait(unsigned pending) {
    Lane& self = lane();
    unsigned kept = 0;
    for (unsigned i = 0; i < self.copies; i++) {
        Copy copy = self.copy[i];
        if (copy.group + pending >= self.group) {
            self.copy[kept++] = copy;
        } else if (copy.valid) {
            memcpy(copy.to, copy.from, 16);
        } else {
            memset(copy.to, 0, 16);
        }
    }
    self.copies = kept;
}

} // namespace emulated
