// A second search, after ggml's: scales and minima of less error, in blocks of the same format and size.
//
// It starts from ggml's answer and keeps the best it has seen of each super-block, so by its measure it is never worse.
// A round moves the scale (and minimum) of each sub-block to the best of its neighbours, then fits the factors d (and
// dmin) that the sub-blocks share by least squares. Levels are always those nearest to the weights.
//
// The measure is importance * sqrt(mean square + x²) * miss², the one ggml itself takes where there is an importance
// matrix; without one all importance is 1. README.md has what other measures gave.

#pragma once

#include "tile.h"

static const int ROUNDS = 4;
static const int RADIUS = 2;  // how far neighbours reach

// Replaces the weights of a tile, which ggml's search has used, by those of the measure.
static inline void weigh_for_refinement(Tile &tile, bool is_weighed) {
    if (is_weighed) return;
    for (int i = 0; i < SUPER; i++) tile.weight[i] = every(1.f);
    weigh_by_importance<16>(tile, 1);
}

// What the formats of affine.h keep of a super-block, but for the levels.
template <int SUB_BLOCKS>
struct AffineFactors {
    Lanes d, dmin;
    Lanes scale[SUB_BLOCKS], minimum[SUB_BLOCKS];  // whole numbers
};

// Errors of a sub-block of N weights at one step and C bases.
template <int N, int C>
LANEWISE void affine_errors(const Lanes *x, const Lanes *weight, float top, Lanes step, const Lanes *base, Lanes *error) {
    const Lanes inverse = step > Lanes{} ? 1.f / step : Lanes{};
    for (int c = 0; c < C; c++) error[c] = Lanes{};
    for (int i = 0; i < N; i++)
        for (int c = 0; c < C; c++) {
            const Lanes above = x[i] + base[c];
            const Lanes miss = above - step * within(rounded(above * inverse), 0.f, top);
            error[c] += weight[i] * (miss * miss);
        }
}

template <int N>
LANEWISE Lanes affine_error(const Lanes *x, const Lanes *weight, float top, Lanes step, Lanes base) {
    Lanes error;
    affine_errors<N, 1>(x, weight, top, step, &base, &error);
    return error;
}

// Moves scale and minimum of a sub-block to the best of their neighbours, and gives its error.
template <int N>
LANEWISE Lanes move_affine(const Lanes *x, const Lanes *weight, float top, float scale_top, Lanes d, Lanes dmin,
                           Lanes &scale, Lanes &minimum) {
    const int width = 2 * RADIUS + 1;
    Lanes near_minimum[width], base[width], best_error = every(MAX_FLOAT);
    for (int c = 0; c < width; c++) {
        near_minimum[c] = within(minimum + (float)(c - RADIUS), 0.f, scale_top);
        base[c] = dmin * near_minimum[c];
    }
    const Lanes middle = scale;
    for (int shift = -RADIUS; shift <= RADIUS; shift++) {
        const Lanes near_scale = within(middle + (float)shift, 0.f, scale_top);
        Lanes error[width];
        affine_errors<N, width>(x, weight, top, d * near_scale, base, error);
        for (int c = 0; c < width; c++) {
            const Ints better = error[c] < best_error;
            best_error = better ? error[c] : best_error;
            scale = better ? near_scale : scale;
            minimum = better ? near_minimum[c] : minimum;
        }
    }
    return best_error;
}

// Sums over a super-block whose least squares give d and dmin: of s²l², sml, m², slx and mx, each times its weight, with
// scale s, minimum m and level l of each x.
struct AffineSums {
    Lanes ss, sm, mm, sx, mx;
};

template <int N>
LANEWISE void add_affine(AffineSums &sums, const Lanes *x, const Lanes *weight, float top, Lanes d, Lanes dmin, Lanes scale,
                         Lanes minimum) {
    const Lanes step = d * scale, base = dmin * minimum, inverse = step > Lanes{} ? 1.f / step : Lanes{};
    Lanes l2 = {}, l = {}, w = {}, xl = {}, wx = {};
    for (int i = 0; i < N; i++) {
        const Lanes level = within(rounded((x[i] + base) * inverse), 0.f, top), weighted = weight[i] * level;
        l2 += weighted * level;
        l += weighted;
        w += weight[i];
        xl += weighted * x[i];
        wx += weight[i] * x[i];
    }
    sums.ss += scale * scale * l2;
    sums.sm += scale * minimum * l;
    sums.mm += minimum * minimum * w;
    sums.sx += scale * xl;
    sums.mx += minimum * wx;
}

// The least of Σ w (x - d s l + dmin m)²: ss d - sm dmin = sx and sm d - mm dmin = mx. Where that gives no two positive
// numbers, dmin stays.
LANEWISE void fit_factors(const AffineSums &sums, Lanes &d, Lanes &dmin) {
    const Lanes zero = {};
    const Lanes determinant = sums.ss * sums.mm - sums.sm * sums.sm;
    const Lanes both_d = (sums.sx * sums.mm - sums.sm * sums.mx) / determinant;
    const Lanes both_dmin = (sums.sm * sums.sx - sums.ss * sums.mx) / determinant;
    const Lanes only_d = (sums.sx + sums.sm * dmin) / sums.ss;
    const Ints both = (determinant > zero) & (both_d > zero) & (both_dmin > zero);
    const Ints only = (sums.ss > zero) & (only_d > zero);
    d = both ? both_d : only ? only_d : d;
    dmin = both ? both_dmin : dmin;
}

// Betters the factors of each lane's super-block, in sub-blocks of N.
template <int N>
static void refine_affine(const Tile &tile, float top, float scale_top, AffineFactors<SUPER / N> &best) {
    const int count = SUPER / N;
    Lanes best_error = {};
    for (int j = 0; j < count; j++)
        best_error += affine_error<N>(tile.x + j * N, tile.weight + j * N, top, best.d * best.scale[j],
                                      best.dmin * best.minimum[j]);
    AffineFactors<count> now = best;
    for (int round = 0; round < ROUNDS; round++) {
        Lanes error = {};
        AffineSums sums = {};
        for (int j = 0; j < count; j++) {
            const Lanes *x = tile.x + j * N, *weight = tile.weight + j * N;
            error += move_affine<N>(x, weight, top, scale_top, now.d, now.dmin, now.scale[j], now.minimum[j]);
            add_affine<N>(sums, x, weight, top, now.d, now.dmin, now.scale[j], now.minimum[j]);
        }
        const Ints better = error < best_error;
        best_error = better ? error : best_error;
        best.d = better ? now.d : best.d;
        best.dmin = better ? now.dmin : best.dmin;
        for (int j = 0; j < count; j++) {
            best.scale[j] = better ? now.scale[j] : best.scale[j];
            best.minimum[j] = better ? now.minimum[j] : best.minimum[j];
        }
        fit_factors(sums, now.d, now.dmin);
        now.d = as_half(now.d);
        now.dmin = as_half(now.dmin);
    }
}

// What the formats of symmetric.h keep of a super-block, but for the levels.
struct SymmetricFactors {
    Lanes d;
    Lanes scale[16];  // whole numbers
};

// Errors of a sub-block of 16 weights at C steps, with levels -range … range - 1.
template <int C>
LANEWISE void symmetric_errors(const Lanes *x, const Lanes *weight, int range, const Lanes *step, Lanes *error) {
    Lanes inverse[C];
    for (int c = 0; c < C; c++) {
        inverse[c] = step[c] != Lanes{} ? 1.f / step[c] : Lanes{};
        error[c] = Lanes{};
    }
    for (int i = 0; i < 16; i++)
        for (int c = 0; c < C; c++) {
            const Lanes miss = x[i] - step[c] * within(rounded(x[i] * inverse[c]), (float)-range, (float)(range - 1));
            error[c] += weight[i] * (miss * miss);
        }
}

// Moves the scale of a sub-block to the best of its neighbours and of those of its negative, for one of the two signs
// reaches a level further. Gives its error.
LANEWISE Lanes move_symmetric(const Lanes *x, const Lanes *weight, int range, float scale_low, float scale_high, Lanes d,
                              Lanes &scale) {
    const int width = 2 * RADIUS + 1;
    Lanes best_error = every(MAX_FLOAT);
    const Lanes middle[2] = {scale, -scale};
    for (int sign = 0; sign < 2; sign++) {
        Lanes near[width], step[width], error[width];
        for (int c = 0; c < width; c++) {
            near[c] = within(middle[sign] + (float)(c - RADIUS), scale_low, scale_high);
            step[c] = d * near[c];
        }
        symmetric_errors<width>(x, weight, range, step, error);
        for (int c = 0; c < width; c++) {
            const Ints better = error[c] < best_error;
            best_error = better ? error[c] : best_error;
            scale = better ? near[c] : scale;
        }
    }
    return best_error;
}

// Betters the factors of each lane's super-block.
static void refine_symmetric(const Tile &tile, int range, float scale_low, float scale_high, SymmetricFactors &best) {
    const Lanes zero = {};
    Lanes best_error = zero;
    for (int j = 0; j < 16; j++) {
        const Lanes step = best.d * best.scale[j];
        Lanes error;
        symmetric_errors<1>(tile.x + j * 16, tile.weight + j * 16, range, &step, &error);
        best_error += error;
    }
    SymmetricFactors now = best;
    for (int round = 0; round < ROUNDS; round++) {
        Lanes error = zero, sum_s2l2 = zero, sum_slx = zero;
        for (int j = 0; j < 16; j++) {
            const Lanes *x = tile.x + j * 16, *weight = tile.weight + j * 16;
            error += move_symmetric(x, weight, range, scale_low, scale_high, now.d, now.scale[j]);
            const Lanes step = now.d * now.scale[j], inverse = step != zero ? 1.f / step : zero;
            Lanes l2 = zero, xl = zero;
            for (int i = 0; i < 16; i++) {
                const Lanes level = within(rounded(x[i] * inverse), (float)-range, (float)(range - 1));
                l2 += weight[i] * level * level;
                xl += weight[i] * level * x[i];
            }
            sum_s2l2 += now.scale[j] * now.scale[j] * l2;
            sum_slx += now.scale[j] * xl;
        }
        const Ints better = error < best_error;
        best_error = better ? error : best_error;
        best.d = better ? now.d : best.d;
        for (int j = 0; j < 16; j++) best.scale[j] = better ? now.scale[j] : best.scale[j];
        now.d = sum_s2l2 > zero ? as_half(sum_slx / sum_s2l2) : now.d;
    }
}
