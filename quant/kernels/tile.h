// A tile: as many super-blocks of 256 weights as there are lanes, transposed so that each lane holds one.
//
// Takes rows of float32, gives vectors over super-blocks; takes levels, gives the bytes of the formats. Layouts are those
// of ggml/src/ggml-common.h, sums in the order of ggml/src/ggml-quants.c (llama.cpp 0c1e57098).

#pragma once

#include "lanes.h"

static const int SUPER = 256;

struct Tile {
    Lanes x[SUPER];
    Lanes weight[SUPER];  // of the error of each x
    Lanes sum_weight[16];  // of each sub-block; only where there is an importance matrix
    Ints level[SUPER];
    int count;  // super-blocks; the lanes behind them repeat the first
    int block_bytes;
    bool is_refined;  // by refine.h
    const float *importance[LANES], *means[LANES];  // of the columns of each super-block; null where there are none
    uint8_t *out;
};

// SUPER numbers of each lane → vectors over the lanes.
static inline void transpose(const float *const (&rows)[LANES], Lanes *columns) {
    for (int first = 0; first < SUPER; first += 16) {
        float block[LANES][16];
        for (int lane = 0; lane < LANES; lane++) memcpy(block[lane], rows[lane] + first, sizeof block[lane]);
        for (int i = 0; i < 16; i++)
            for (int lane = 0; lane < LANES; lane++) columns[first + i][lane] = block[lane][i];
    }
}

// weight = importance * sqrt(sigma² + x²), where sigma² is `factor` times the mean square of the super-block.
template <int N>
static inline void weigh_by_importance(Tile &tile, float factor) {
    Lanes squares = {};
    for (int i = 0; i < SUPER; i++) squares += tile.x[i] * tile.x[i];
    const Lanes sigma2 = factor * squares / (float)SUPER;
    for (int j = 0; j < SUPER / N; j++) {
        Lanes sum = {};
        for (int i = j * N; i < (j + 1) * N; i++) {
            tile.weight[i] = tile.weight[i] * root(sigma2 + tile.x[i] * tile.x[i]);
            sum += tile.weight[i];
        }
        tile.sum_weight[j] = sum;
    }
}

// The scale with the largest magnitude, with its sign; the first of equals.
LANEWISE Lanes extreme_of(const Lanes *scale, int count, Lanes *size) {
    Lanes extreme = {};
    *size = Lanes{};
    for (int j = 0; j < count; j++) {
        const Ints further = magnitude(scale[j]) > *size;
        *size = further ? magnitude(scale[j]) : *size;
        extreme = further ? scale[j] : extreme;
    }
    return extreme;
}

LANEWISE Lanes to_halves(Lanes values, uint16_t *halves) {
    Lanes back;
    for (int lane = 0; lane < LANES; lane++) {
        halves[lane] = half_of(values[lane]);
        back[lane] = float_of_half(halves[lane]);
    }
    return back;
}

LANEWISE Lanes as_half(Lanes values) {
    uint16_t halves[LANES];
    return to_halves(values, halves);
}

// Bytes `offset` to `offset + 4` of every block, the lowest first.
LANEWISE void put_words(Tile &tile, int offset, Ints words) {
    for (int lane = 0; lane < tile.count; lane++) {
        const int32_t word = words[lane];
        memcpy(tile.out + lane * tile.block_bytes + offset, &word, sizeof word);
    }
}

LANEWISE void put_halves(Tile &tile, int offset, const uint16_t *halves) {
    for (int lane = 0; lane < tile.count; lane++)
        memcpy(tile.out + lane * tile.block_bytes + offset, &halves[lane], sizeof *halves);
}

// `count` bytes of every block: `byte(i)` gives byte i of each, as numbers from 0 to 255.
template <typename Byte>
LANEWISE void put_bytes(Tile &tile, int offset, int count, Byte byte) {
    for (int i = 0; i < count; i += 4)
        put_words(tile, offset + i, byte(i) | byte(i + 1) << 8 | byte(i + 2) << 16 | byte(i + 3) << 24);
}

// The lower two bits of four weights that lie 32 apart to a byte, for 128 weights after 128.
static inline void pack_two_bits(Tile &tile, int offset) {
    for (int half = 0; half < 2; half++) {
        const Ints *level = tile.level + half * 128;
        put_bytes(tile, offset + half * 32, 32, [=](int i) {
            return (level[i] & 3) | (level[i + 32] & 3) << 2 | (level[i + 64] & 3) << 4 | (level[i + 96] & 3) << 6;
        });
    }
}

// The lower four bits of two weights that lie 32 apart to a byte, for 64 weights after 64.
static inline void pack_four_bits(Tile &tile, int offset) {
    for (int part = 0; part < 4; part++) {
        const Ints *level = tile.level + part * 64;
        put_bytes(tile, offset + part * 32, 32, [=](int i) { return (level[i] & 15) | (level[i + 32] & 15) << 4; });
    }
}

// Bit `bit` of eight weights that lie 32 apart to a byte.
static inline void pack_one_bit(Tile &tile, int bit, int offset) {
    const Ints *level = tile.level;
    put_bytes(tile, offset, 32, [=](int i) {
        Ints byte = {};
        for (int part = 0; part < 8; part++) byte |= (level[part * 32 + i] >> bit & 1) << part;
        return byte;
    });
}
