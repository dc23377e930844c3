// Q2_K, Q4_K and Q5_K: x ≈ d * scale * level - dmin * minimum, with levels from 0 up.
//
// Each function makes the blocks of a tile and gives the lanes that ggml must make itself.

#pragma once

#include "refine.h"
#include "searches.h"
#include "tile.h"

template <int SUB_BLOCKS>
struct AffineScales {
    Lanes scale[SUB_BLOCKS];  // whole numbers
    Lanes minimum[SUB_BLOCKS];
    uint16_t d[LANES], dmin[LANES];
};

// quantize_row_q2_K_ref, q4_K_ref, q5_K_ref, and their _impl with importance, up to the packing. Gives inexact lanes.
template <int N, bool ABSOLUTE_ERROR>
static Ints quantize_affine(Tile &tile, bool has_importance, int top, int scale_top, AffineSteps steps,
                     AffineScales<SUPER / N> &scales) {
    const int count = SUPER / N, K = ABREAST;
    const Lanes zero = {};
    Lanes scale[SUPER / N], minimum[SUPER / N], inverse[SUPER / N], offset[SUPER / N];
    Ints inexact = {};
    for (int j = 0; j < count; j += K) {
        Affine best[K];
        inexact |= fit_affine<N, K, ABSOLUTE_ERROR>(tile.x + j * N, tile.weight + j * N, (float)top, steps, best);
        for (int k = 0; k < K; k++) {
            inexact |= best[k].scale < zero;  // ggml keeps levels in bytes, where a negative one becomes a large one
            scale[j + k] = best[k].scale;
            minimum[j + k] = -best[k].minimum;
            inverse[j + k] = best[k].inverse;
            offset[j + k] = best[k].offset;
        }
    }
    Lanes d, dmin;
    if (has_importance) {
        Lanes found[2];
        fit_scales<SUPER / N, 2>(scale_top, {scale, minimum}, tile.sum_weight, {scales.scale, scales.minimum}, found);
        d = found[0];
        dmin = found[1];
    } else {
        const Lanes highest = every((float)scale_top);
        Lanes high = zero, deep = zero;
        for (int j = 0; j < count; j++) {
            high = larger(scale[j], high);
            deep = larger(minimum[j], deep);
        }
        const Lanes per_scale = high > zero ? highest / high : zero, per_minimum = deep > zero ? highest / deep : zero;
        for (int j = 0; j < count; j++) {
            scales.scale[j] = smaller(rounded(per_scale * scale[j]), highest);
            scales.minimum[j] = smaller(rounded(per_minimum * minimum[j]), highest);
        }
        d = high / highest;
        dmin = deep / highest;
    }
    d = to_halves(d, scales.d);
    dmin = to_halves(dmin, scales.dmin);
    Measure measure;
    if (tile.is_refined) {
        measure_of(tile, measure);
        AffineFactors<count> factors = {d, dmin, {}, {}};
        for (int j = 0; j < count; j++) {
            factors.scale[j] = scales.scale[j];
            factors.minimum[j] = scales.minimum[j];
        }
        refine_affine<N>(tile, measure, (float)top, (float)scale_top, factors);
        d = to_halves(factors.d, scales.d);
        dmin = to_halves(factors.dmin, scales.dmin);
        for (int j = 0; j < count; j++) {
            scales.scale[j] = factors.scale[j];
            scales.minimum[j] = factors.minimum[j];
        }
    }
    Lanes step_of[count], base_of[count];
    for (int j = 0; j < count; j++) {
        const Lanes step = step_of[j] = d * scales.scale[j], base = base_of[j] = dmin * scales.minimum[j];
        const Ints flat = step == zero;  // ggml then leaves the levels of the search
        for (int i = j * N; i < (j + 1) * N; i++) {
            const Lanes found = flat ? inverse[j] * (tile.x[i] - offset[j]) : (tile.x[i] + base) / step;
            tile.level[i] = within(nearest_int(found), 0, top);
        }
    }
    if (tile.is_refined) settle_levels<N>(tile, measure, top, step_of, base_of);
    return inexact;
}

static Ints quantize_q2(Tile &tile, bool has_importance) {
    AffineScales<16> scales;
    Ints inexact;
    if (has_importance) {
        weigh_by_importance<16>(tile, 1);
        inexact = quantize_affine<16, false>(tile, true, 3, 15, {-0.9f, 0.05f, 36}, scales);
    } else {
        for (int i = 0; i < SUPER; i++) tile.weight[i] = magnitude(tile.x[i]);
        inexact = quantize_affine<16, true>(tile, false, 3, 15, {-0.5f, 0.1f, 15}, scales);
    }
    put_bytes(tile, 0, 16, [&](int j) { return integers(scales.scale[j]) | integers(scales.minimum[j]) << 4; });
    pack_two_bits(tile, 16);
    put_halves(tile, 80, scales.d);
    put_halves(tile, 82, scales.dmin);
    return inexact;
}

// Eight scales and eight minima of six bits in twelve bytes, as get_scale_min_k4 reads them.
static inline void pack_six_bit_scales(Tile &tile, const AffineScales<8> &scales, int offset) {
    const auto scale = [&](int j) { return integers(scales.scale[j]); };
    const auto minimum = [&](int j) { return integers(scales.minimum[j]); };
    put_bytes(tile, offset, 4, [&](int j) { return scale(j) | scale(j + 4) >> 4 << 6; });
    put_bytes(tile, offset + 4, 4, [&](int j) { return minimum(j) | minimum(j + 4) >> 4 << 6; });
    put_bytes(tile, offset + 8, 4, [&](int j) { return (scale(j + 4) & 15) | (minimum(j + 4) & 15) << 4; });
}

template <int BITS>
static Ints quantize_q4_q5(Tile &tile, bool has_importance) {
    const int top = (1 << BITS) - 1;
    AffineScales<8> scales;
    Ints inexact;
    if (has_importance) {
        weigh_by_importance<32>(tile, 2);
        inexact = quantize_affine<32, false>(tile, true, top, 63, {-0.9f, 0.05f, 36}, scales);
    } else {
        for (int j = 0; j < 8; j++) {
            Lanes squares = {};
            for (int i = j * 32; i < (j + 1) * 32; i++) squares += tile.x[i] * tile.x[i];
            const Lanes mean = root(squares / 32.f);
            for (int i = j * 32; i < (j + 1) * 32; i++) tile.weight[i] = mean + magnitude(tile.x[i]);
        }
        const AffineSteps steps = BITS == 4 ? AffineSteps{-1.f, 0.1f, 20} : AffineSteps{-0.5f, 0.1f, 15};
        inexact = quantize_affine<32, false>(tile, false, top, 63, steps, scales);
    }
    put_halves(tile, 0, scales.d);
    put_halves(tile, 2, scales.dmin);
    pack_six_bit_scales(tile, scales, 4);
    if (BITS == 5) pack_one_bit(tile, 4, 16);
    pack_four_bits(tile, BITS == 5 ? 48 : 16);
    return inexact;
}
