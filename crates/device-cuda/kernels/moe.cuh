// What the kernels of experts have in common: a pair is a row with one of the experts that it chose, a slot its place among
// pairs sorted by expert, a tile a run of slots of one expert. See moe.cu.
#pragma once

#include "coded.cuh"

/// Slots `first .. first + count` of one expert, numbered among those held; none if that is negative.
struct Tile {
    int expert, first, count;
};

/// One matrix of every expert held: where it lies, and the bytes from one expert and one row to the next.
struct Stack {
    const unsigned char* data;
    long long expert, row;
};

/// Rows of an expert's matrix from `first` on, `count` of which there are: beyond, the last one again.
template <int ROWS>
__device__ __forceinline__ void rows_of(const unsigned char* (&rows)[ROWS], const Stack& stack, int expert, int first, int count) {
    for (int r = 0; r < ROWS; ++r) {
        const int row = first + r < count ? first + r : count - 1;
        rows[r] = stack.data + expert * stack.expert + row * stack.row;
    }
}
