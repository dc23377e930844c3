// A second search, after ggml's: blocks that cost less by the measure of measure.h, in the same format and size.
//
// It starts from ggml's answer and keeps the best it has seen of each super-block. A round moves the scale (and minimum)
// of each sub-block to the best of its neighbours, then fits the factors d (and dmin) that the sub-blocks share by least
// squares; levels are those nearest to the weights. At the end the levels settle: each moves to its other neighbour where
// that makes misses cancel. No step raises the cost, so no block costs more than ggml's.

#pragma once

#include "measure.h"

static const int ROUNDS = 4;
static const int RADIUS = 2;  // how far neighbours of a scale reach
static const int WIDTH = 2 * RADIUS + 1;
static const int PASSES = 2;  // over the levels

// What the formats of affine.h keep of a super-block, but for the levels.
template <int SUB_BLOCKS>
struct AffineFactors {
    Lanes d, dmin;
    Lanes scale[SUB_BLOCKS], minimum[SUB_BLOCKS];  // whole numbers
};

// What x misses at a step and a base, and the level it is nearest to.
LANEWISE Lanes affine_miss(Lanes x, float top, Lanes step, Lanes inverse, Lanes base, Lanes &level) {
    level = within(rounded((x + base) * inverse), 0.f, top);
    return x + base - step * level;
}

LANEWISE Lanes inverse_of(Lanes step) { return step != Lanes{} ? 1.f / step : Lanes{}; }

// The misses of N weights from `first` on.
template <int N>
LANEWISE Misses affine_misses(const Tile &tile, const Measure &measure, int first, float top, Lanes step, Lanes base) {
    const Lanes inverse = inverse_of(step);
    Misses sums = {};
    for (int i = first; i < first + N; i++) {
        Lanes level;
        count_miss(sums, measure, i, tile.x[i], affine_miss(tile.x[i], top, step, inverse, base, level));
    }
    return sums;
}

// Moves scale and minimum of a sub-block to the best of their neighbours, where the others have the gain `beside`.
template <int N>
LANEWISE void move_affine(const Tile &tile, const Measure &measure, int first, float top, float scale_top, Lanes beside,
                          Lanes d, Lanes dmin, Lanes &scale, Lanes &minimum) {
    Lanes near_minimum[WIDTH], base[WIDTH], best_cost = every(MAX_FLOAT);
    for (int c = 0; c < WIDTH; c++) {
        near_minimum[c] = within(minimum + (float)(c - RADIUS), 0.f, scale_top);
        base[c] = dmin * near_minimum[c];
    }
    const Lanes middle = scale;
    for (int shift = -RADIUS; shift <= RADIUS; shift++) {
        const Lanes near_scale = within(middle + (float)shift, 0.f, scale_top);
        const Lanes step = d * near_scale, inverse = inverse_of(step);
        Lanes error[WIDTH], gain[WIDTH];
        for (int c = 0; c < WIDTH; c++) {
            error[c] = Lanes{};
            gain[c] = beside;
        }
        for (int i = first; i < first + N; i++)
            for (int c = 0; c < WIDTH; c++) {
                Lanes level;
                const Lanes miss = affine_miss(tile.x[i], top, step, inverse, base[c], level);
                const Lanes weighted = measure.weight[i] * miss;
                error[c] += weighted * miss;
                gain[c] += weighted * tile.x[i];
            }
        for (int c = 0; c < WIDTH; c++) {
            const Lanes here = error[c] + measure.gain_factor * (gain[c] * gain[c]);
            const Ints better = here < best_cost;
            best_cost = better ? here : best_cost;
            scale = better ? near_scale : scale;
            minimum = better ? near_minimum[c] : minimum;
        }
    }
}

// Sums over a super-block whose least squares give d and dmin: of s²l², sml, m², slx and mx, each times its weight, with
// scale s, minimum m and level l of each x.
struct AffineSums {
    Lanes ss, sm, mm, sx, mx;
};

template <int N>
LANEWISE void add_affine(AffineSums &sums, const Tile &tile, const Measure &measure, int first, float top, Lanes d,
                         Lanes dmin, Lanes scale, Lanes minimum) {
    const Lanes step = d * scale, base = dmin * minimum, inverse = inverse_of(step);
    Lanes l2 = {}, l = {}, w = {}, xl = {}, wx = {};
    for (int i = first; i < first + N; i++) {
        const Lanes x = tile.x[i], weight = measure.weight[i];
        Lanes level;
        affine_miss(x, top, step, inverse, base, level);
        l2 += weight * level * level;
        l += weight * level;
        w += weight;
        xl += weight * level * x;
        wx += weight * x;
    }
    sums.ss += scale * scale * l2;
    sums.sm += scale * minimum * l;
    sums.mm += minimum * minimum * w;
    sums.sx += scale * xl;
    sums.mx += minimum * wx;
}

// The d and dmin of least Σ w (x - d s l + dmin m)² + gain_factor (Σ w x (x - d s l + dmin m))², where Σ w x² times
// gain_factor is GAIN. Where they are not both positive, dmin stays.
LANEWISE void fit_factors(const Measure &measure, const AffineSums &sums, Lanes &d, Lanes &dmin) {
    const Lanes zero = {};
    const Lanes ss = sums.ss + measure.gain_factor * sums.sx * sums.sx;
    const Lanes sm = sums.sm + measure.gain_factor * sums.sx * sums.mx;
    const Lanes mm = sums.mm + measure.gain_factor * sums.mx * sums.mx;
    const Lanes sx = (1.f + GAIN) * sums.sx, mx = (1.f + GAIN) * sums.mx;
    const Lanes determinant = ss * mm - sm * sm;
    const Lanes both_d = (sx * mm - sm * mx) / determinant, both_dmin = (sm * sx - ss * mx) / determinant;
    const Lanes only_d = (sx + sm * dmin) / ss;
    const Ints both = (determinant > zero) & (both_d > zero) & (both_dmin > zero);
    const Ints only = (ss > zero) & (only_d > zero);
    d = as_half(both ? both_d : only ? only_d : d);
    dmin = as_half(both ? both_dmin : dmin);
}

// Betters the factors of each lane's super-block, in sub-blocks of N.
template <int N>
static void refine_affine(const Tile &tile, const Measure &measure, float top, float scale_top,
                          AffineFactors<SUPER / N> &best) {
    const int count = SUPER / N;
    Lanes best_cost = every(MAX_FLOAT);
    AffineFactors<count> now = best;
    Misses sub_block[count];
    for (int round = 0; round <= ROUNDS; round++) {
        Misses whole = {};
        for (int j = 0; j < count; j++) {
            sub_block[j] = affine_misses<N>(tile, measure, j * N, top, now.d * now.scale[j], now.dmin * now.minimum[j]);
            add(whole, sub_block[j]);
        }
        AffineSums sums = {};
        Misses moved = {};
        for (int j = 0; round > 0 && j < count; j++) {
            const Lanes beside = whole.gain - sub_block[j].gain;
            move_affine<N>(tile, measure, j * N, top, scale_top, beside, now.d, now.dmin, now.scale[j], now.minimum[j]);
            sub_block[j] = affine_misses<N>(tile, measure, j * N, top, now.d * now.scale[j], now.dmin * now.minimum[j]);
            whole.gain = beside + sub_block[j].gain;
            add(moved, sub_block[j]);
            add_affine<N>(sums, tile, measure, j * N, top, now.d, now.dmin, now.scale[j], now.minimum[j]);
        }
        const Lanes now_cost = cost(measure, round > 0 ? moved : whole);
        const Ints better = now_cost < best_cost;
        best_cost = better ? now_cost : best_cost;
        best.d = better ? now.d : best.d;
        best.dmin = better ? now.dmin : best.dmin;
        for (int j = 0; j < count; j++) {
            best.scale[j] = better ? now.scale[j] : best.scale[j];
            best.minimum[j] = better ? now.minimum[j] : best.minimum[j];
        }
        if (round > 0) fit_factors(measure, sums, now.d, now.dmin);
    }
}

// What the formats of symmetric.h keep of a super-block, but for the levels.
struct SymmetricFactors {
    Lanes d;
    Lanes scale[16];  // whole numbers
};

LANEWISE Lanes symmetric_level(Lanes x, int range, Lanes inverse) {
    return within(rounded(x * inverse), (float)-range, (float)(range - 1));
}

// The misses of 16 weights from `first` on.
LANEWISE Misses symmetric_misses(const Tile &tile, const Measure &measure, int first, int range, Lanes step) {
    const Lanes inverse = inverse_of(step);
    Misses sums = {};
    for (int i = first; i < first + 16; i++)
        count_miss(sums, measure, i, tile.x[i], tile.x[i] - step * symmetric_level(tile.x[i], range, inverse));
    return sums;
}

// Moves the scale of a sub-block to the best of its neighbours and of those of its negative, for one of the two signs
// reaches a level further. The other sub-blocks have the gain `beside`.
LANEWISE void move_symmetric(const Tile &tile, const Measure &measure, int first, int range, float scale_low,
                             float scale_high, Lanes beside, Lanes d, Lanes &scale) {
    Lanes best_cost = every(MAX_FLOAT);
    const Lanes middle[2] = {scale, -scale};
    for (int sign = 0; sign < 2; sign++) {
        Lanes near[WIDTH], step[WIDTH], inverse[WIDTH], error[WIDTH], gain[WIDTH];
        for (int c = 0; c < WIDTH; c++) {
            near[c] = within(middle[sign] + (float)(c - RADIUS), scale_low, scale_high);
            step[c] = d * near[c];
            inverse[c] = inverse_of(step[c]);
            error[c] = Lanes{};
            gain[c] = beside;
        }
        for (int i = first; i < first + 16; i++)
            for (int c = 0; c < WIDTH; c++) {
                const Lanes miss = tile.x[i] - step[c] * symmetric_level(tile.x[i], range, inverse[c]);
                const Lanes weighted = measure.weight[i] * miss;
                error[c] += weighted * miss;
                gain[c] += weighted * tile.x[i];
            }
        for (int c = 0; c < WIDTH; c++) {
            const Lanes here = error[c] + measure.gain_factor * (gain[c] * gain[c]);
            const Ints better = here < best_cost;
            best_cost = better ? here : best_cost;
            scale = better ? near[c] : scale;
        }
    }
}

// The d of least Σ w (x - d s l)² + gain_factor (Σ w x (x - d s l))²; `ss` and `sx` are Σ w s²l² and Σ w slx.
LANEWISE Lanes fit_factor(const Measure &measure, Lanes ss, Lanes sx, Lanes d) {
    const Lanes fitted = (1.f + GAIN) * sx / (ss + measure.gain_factor * sx * sx);
    return ss > Lanes{} ? as_half(fitted) : d;
}

// Betters the factors of each lane's super-block.
static void refine_symmetric(const Tile &tile, const Measure &measure, int range, float scale_low, float scale_high,
                             SymmetricFactors &best) {
    Lanes best_cost = every(MAX_FLOAT);
    SymmetricFactors now = best;
    Misses sub_block[16];
    for (int round = 0; round <= ROUNDS; round++) {
        Misses whole = {};
        for (int j = 0; j < 16; j++) {
            sub_block[j] = symmetric_misses(tile, measure, j * 16, range, now.d * now.scale[j]);
            add(whole, sub_block[j]);
        }
        Lanes ss = {}, sx = {};
        Misses moved = {};
        for (int j = 0; round > 0 && j < 16; j++) {
            const Lanes beside = whole.gain - sub_block[j].gain;
            move_symmetric(tile, measure, j * 16, range, scale_low, scale_high, beside, now.d, now.scale[j]);
            const Lanes step = now.d * now.scale[j], inverse = inverse_of(step);
            sub_block[j] = symmetric_misses(tile, measure, j * 16, range, step);
            whole.gain = beside + sub_block[j].gain;
            add(moved, sub_block[j]);
            Lanes l2 = {}, xl = {};
            for (int i = j * 16; i < (j + 1) * 16; i++) {
                const Lanes level = symmetric_level(tile.x[i], range, inverse);
                l2 += measure.weight[i] * level * level;
                xl += measure.weight[i] * level * tile.x[i];
            }
            ss += now.scale[j] * now.scale[j] * l2;
            sx += now.scale[j] * xl;
        }
        const Lanes now_cost = cost(measure, round > 0 ? moved : whole);
        const Ints better = now_cost < best_cost;
        best_cost = better ? now_cost : best_cost;
        best.d = better ? now.d : best.d;
        for (int j = 0; j < 16; j++) best.scale[j] = better ? now.scale[j] : best.scale[j];
        if (round > 0) now.d = fit_factor(measure, ss, sx, now.d);
    }
}

// Moves levels 0 … top, of values step * level - base in sub-blocks of N, to the other neighbour of their weight, one
// after the other, wherever that lowers the cost of the super-block.
template <int N>
static void settle_levels(Tile &tile, const Measure &measure, int top, const Lanes *step, const Lanes *base) {
    const Lanes zero = {};
    Misses sums = {};
    for (int i = 0; i < SUPER; i++)
        count_miss(sums, measure, i, tile.x[i], tile.x[i] + base[i / N] - step[i / N] * floats(tile.level[i]));
    for (int pass = 0; pass < PASSES; pass++)
        for (int i = 0; i < SUPER; i++) {
            const Lanes x = tile.x[i], level = floats(tile.level[i]), across = step[i / N];
            const Lanes miss = x + base[i / N] - across * level;
            const Lanes beyond = within(level + ((miss > zero) == (across > zero) ? every(1.f) : every(-1.f)), 0.f, (float)top);
            const Lanes other = x + base[i / N] - across * beyond, change = other - miss;
            const Lanes mean = sums.mean + measure.mean[i] * change, gain = sums.gain + measure.weight[i] * x * change;
            const Lanes more = measure.weight[i] * (other * other - miss * miss) +
                               measure.mean_factor * (mean * mean - sums.mean * sums.mean) +
                               measure.gain_factor * (gain * gain - sums.gain * sums.gain);
            const Ints better = more < zero;
            tile.level[i] = better ? integers(beyond) : tile.level[i];
            sums.mean = better ? mean : sums.mean;
            sums.gain = better ? gain : sums.gain;
        }
}
