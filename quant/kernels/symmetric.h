// Q3_K and Q6_K: x ≈ d * scale * level, with levels and scales of both signs.
//
// Each function makes the blocks of a tile. No number here is too large to be rounded exactly.

#pragma once

#include "refine.h"
#include "searches.h"
#include "tile.h"

// Levels of sub-block j of 16, where a step of 0 leaves those of the search (`fallback`, unbiased).
template <int RANGE>
LANEWISE void store_symmetric(Tile &tile, int j, Lanes step, const Lanes *fallback) {
    const Ints flat = step == Lanes{};
    for (int i = 0; i < 16; i++) {
        const Ints level = within(nearest_int(tile.x[j * 16 + i] / step), -RANGE, RANGE - 1);
        tile.level[j * 16 + i] = (flat ? integers(fallback[i]) : level) + RANGE;
    }
}

// Betters d and the 16 scales of each super-block; gives d, and its halves.
static Lanes refined(const Tile &tile, const Measure &measure, int range, float scale_low, float scale_high, Lanes d,
                     Lanes *scale_level, uint16_t *halves) {
    SymmetricFactors factors = {d, {}};
    for (int j = 0; j < 16; j++) factors.scale[j] = scale_level[j];
    refine_symmetric(tile, measure, range, scale_low, scale_high, factors);
    for (int j = 0; j < 16; j++) scale_level[j] = factors.scale[j];
    return to_halves(factors.d, halves);
}

// Settles levels that are stored from 0 on.
template <int RANGE>
static void settle_symmetric(Tile &tile, const Measure &measure, Lanes d, const Lanes *scale_level) {
    Lanes step[16], base[16];
    for (int j = 0; j < 16; j++) {
        step[j] = d * scale_level[j];
        base[j] = step[j] * (float)RANGE;
    }
    settle_levels<16>(tile, measure, 2 * RANGE - 1, step, base);
}

// quantize_row_q3_K_ref, and q3_K_impl with importance.
static Ints quantize_q3(Tile &tile, bool has_importance) {
    const int K = ABREAST;
    const Lanes zero = {};
    Lanes level[SUPER], scale[16], scale_level[16], d;
    if (has_importance) {
        weigh_by_importance<16>(tile, 2);
        for (int j = 0; j < 16; j += K) {
            Symmetric best[K];
            fit_symmetric<16, K>(4, tile.x + j * 16, tile.weight + j * 16, best);
            for (int k = 0; k < K; k++) {
                scale[j + k] = best[k].scale;
                for (int i = 0; i < 16; i++) {
                    const Lanes found = within(rounded(best[k].inverse * tile.x[(j + k) * 16 + i]), -4.f, 3.f);
                    level[(j + k) * 16 + i] = best[k].zeros ? every(-4.f) : found;
                }
            }
        }
        Symmetric whole;
        fit_symmetric<16, 1>(32, scale, tile.sum_weight, &whole);
        d = whole.scale;
        for (int j = 0; j < 16; j++)
            scale_level[j] = whole.zeros ? every(-32.f) : within(rounded(whole.inverse * scale[j]), -32.f, 31.f);
    } else {
        for (int j = 0; j < 16; j += K) {
            fit_by_coordinate<16, K>(4, tile.x + j * 16, level + j * 16, scale + j);
        }
        Lanes size;
        const Lanes extreme = extreme_of(scale, 16, &size), inverse = -32.f / extreme;
        const Ints present = extreme != zero;
        d = present ? 1.f / inverse : zero;
        for (int j = 0; j < 16; j++)
            scale_level[j] = present ? within(rounded(inverse * scale[j]), -32.f, 31.f) : every(-32.f);
    }
    uint16_t halves[LANES];
    d = to_halves(d, halves);
    Measure measure;
    if (tile.is_refined) {
        measure_of(tile, measure);
        d = refined(tile, measure, 4, -32, 31, d, scale_level, halves);
    }
    for (int j = 0; j < 16; j++) store_symmetric<4>(tile, j, d * scale_level[j], level + j * 16);
    if (tile.is_refined) settle_symmetric<4>(tile, measure, d, scale_level);
    pack_one_bit(tile, 2, 0);
    pack_two_bits(tile, 32);
    const auto six = [&](int j) { return integers(scale_level[j]) + 32; };  // four bits first, then the upper two
    put_bytes(tile, 96, 8, [&](int j) { return (six(j) & 15) | (six(j + 8) & 15) << 4; });
    put_bytes(tile, 104, 4, [&](int j) {
        return six(j) >> 4 | six(j + 4) >> 4 << 2 | six(j + 8) >> 4 << 4 | six(j + 12) >> 4 << 6;
    });
    put_halves(tile, 108, halves);
    return Ints{};
}

// quantize_row_q6_K_ref, and q6_K_impl with importance.
static Ints quantize_q6(Tile &tile, bool has_importance) {
    const int K = ABREAST;
    if (!has_importance)
        for (int i = 0; i < SUPER; i++) tile.weight[i] = tile.x[i] * tile.x[i];
    Lanes scale[16], inverse[16], scale_level[16], size;
    Ints zeros[16];
    for (int j = 0; j < 16; j += K) {
        Symmetric best[K];
        fit_symmetric<16, K>(32, tile.x + j * 16, tile.weight + j * 16, best);
        for (int k = 0; k < K; k++) {
            scale[j + k] = best[k].scale;
            inverse[j + k] = best[k].inverse;
            zeros[j + k] = best[k].zeros;
        }
    }
    const Lanes per_scale = -128.f / extreme_of(scale, 16, &size);
    uint16_t halves[LANES];
    Lanes d = to_halves(1.f / per_scale, halves);
    for (int j = 0; j < 16; j++) scale_level[j] = smaller(rounded(per_scale * scale[j]), every(127.f));
    Measure measure;
    if (tile.is_refined) {
        measure_of(tile, measure);
        d = refined(tile, measure, 32, -128, 127, d, scale_level, halves);
    }
    for (int j = 0; j < 16; j++) {
        Lanes level[16];
        for (int i = 0; i < 16; i++) {
            const Lanes found = within(rounded(inverse[j] * tile.x[j * 16 + i]), -32.f, 31.f);
            level[i] = zeros[j] ? every(-32.f) : found;
        }
        store_symmetric<32>(tile, j, d * scale_level[j], level);
    }
    if (tile.is_refined) settle_symmetric<32>(tile, measure, d, scale_level);
    for (int half = 0; half < 2; half++) {
        const Ints *level = tile.level + half * 128;
        put_bytes(tile, half * 64, 64, [=](int i) { return (level[i] & 15) | (level[i + 64] & 15) << 4; });
        put_bytes(tile, 128 + half * 32, 32, [=](int i) {
            return level[i] >> 4 | level[i + 32] >> 4 << 2 | level[i + 64] >> 4 << 4 | level[i + 96] >> 4 << 6;
        });
    }
    put_bytes(tile, 192, 16, [&](int j) { return integers(scale_level[j]) & 255; });
    put_halves(tile, 208, halves);
    for (int lane = 0; lane < tile.count; lane++)
        if (size[lane] < ALL_ZERO) memset(tile.out + lane * 210, 0, 210);
    return Ints{};
}
