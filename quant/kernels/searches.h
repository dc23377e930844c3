// ggml's searches for the scale (and minimum) of a sub-block, each in lockstep over the lanes.
//
// Source: ggml/src/ggml-quants.c of llama.cpp, commit 0c1e57098; each function names the one it equals, bit by bit. K
// sub-blocks of N weights, which lie one after the other, are searched side by side: one chain of additions would leave
// the processor waiting.

#pragma once

#include <type_traits>

#include "lanes.h"

static const int ABREAST = 4;  // sub-blocks side by side; more would not fit into the registers

static const float ALL_ZERO = 1e-15f;  // GROUP_MAX_EPS: what is smaller is taken for zero

// x ≈ scale * level + minimum, with levels 0 … top.
struct Affine {
    Lanes scale;
    Lanes minimum;
    // The levels are nearest_int(inverse * (x - offset)), clamped: those of the best step, from before its fit.
    Lanes inverse;
    Lanes offset;
};

struct AffineSteps {
    float first, width;
    int last;
};

// make_qkx2_quants and make_qkx3_quants, whose weights are always given here. Gives the lanes in which a number was too
// large to be rounded exactly, or all of it lies below the minimum; there the result is not ggml's.
template <int N, int K, bool ABSOLUTE_ERROR>
LANEWISE Ints fit_affine(const Lanes *x, const Lanes *weight, float top, AffineSteps steps, Affine *best) {
    const Lanes zero = {};
    Lanes low[K], high[K], lowest[K], sum_w[K], sum_x[K], best_error[K];
    Ints active[K], inexact = {};
    for (int k = 0; k < K; k++) {
        low[k] = high[k] = x[k * N];
        sum_w[k] = weight[k * N];
        sum_x[k] = weight[k * N] * x[k * N];
    }
    for (int i = 1; i < N; i++)
        for (int k = 0; k < K; k++) {
            low[k] = smaller(x[k * N + i], low[k]);
            high[k] = larger(x[k * N + i], high[k]);
            sum_w[k] += weight[k * N + i];
            sum_x[k] += weight[k * N + i] * x[k * N + i];
        }
    for (int k = 0; k < K; k++) {
        lowest[k] = low[k];
        low[k] = low[k] > zero ? zero : low[k];
        active[k] = high[k] != low[k];
        const Lanes inverse = every(top) / (high[k] - low[k]);
        best[k].inverse = active[k] ? inverse : zero;
        best[k].scale = active[k] ? 1.f / inverse : zero;
        best[k].minimum = best[k].offset = low[k];
        best_error[k] = zero;
    }
    for (int i = 0; i < N; i++)
        for (int k = 0; k < K; k++) {
            const Lanes level = smaller(rounded(best[k].inverse * (x[k * N + i] - low[k])), every(top));
            const Lanes error = best[k].scale * level + low[k] - x[k * N + i];
            best_error[k] += weight[k * N + i] * (ABSOLUTE_ERROR ? magnitude(error) : error * error);
        }
    Lanes level[K * N];
    for (int step = 0; step <= steps.last; step++) {
        const float reach = steps.first + steps.width * step + top;
        Lanes inverse[K], offset[K], sum_l[K], sum_l2[K], sum_xl[K], scale[K], minimum[K], error[K], determinant[K];
        for (int k = 0; k < K; k++) {
            offset[k] = best[k].minimum;  // ggml overwrites its minimum, so later steps start from the best fit
            inverse[k] = reach / (high[k] - offset[k]);
            sum_l[k] = sum_l2[k] = sum_xl[k] = error[k] = zero;
            const Lanes farthest = inverse[k] * magnitude(lowest[k] - offset[k]);
            inexact |= active[k] & ~((inverse[k] > zero) & (farthest < EXACT_LIMIT));
        }
        const auto sum_levels = [&](auto may_exceed) INLINE {  // std::true_type or std::false_type
            for (int i = 0; i < N; i++)
                for (int k = 0; k < K; k++) {
                    Lanes found = larger(rounded(inverse[k] * (x[k * N + i] - offset[k])), zero);
                    if (may_exceed) found = smaller(found, every(top));
                    level[k * N + i] = found;
                    const Lanes weighted = weight[k * N + i] * found;
                    sum_l[k] += weighted;
                    sum_l2[k] += weighted * found;
                    sum_xl[k] += weighted * x[k * N + i];
                }
        };
        if (reach < top + 0.45f)  // `high`, and so every x, is rounded to `top` or less
            sum_levels(std::false_type{});
        else
            sum_levels(std::true_type{});
        for (int k = 0; k < K; k++) {
            determinant[k] = sum_w[k] * sum_l2[k] - sum_l[k] * sum_l[k];
            scale[k] = (sum_w[k] * sum_xl[k] - sum_x[k] * sum_l[k]) / determinant[k];
            minimum[k] = (sum_l2[k] * sum_x[k] - sum_l[k] * sum_xl[k]) / determinant[k];
            const Ints positive = minimum[k] > zero;
            scale[k] = positive ? sum_xl[k] / sum_l2[k] : scale[k];
            minimum[k] = positive ? zero : minimum[k];
        }
        for (int i = 0; i < N; i++)
            for (int k = 0; k < K; k++) {
                const Lanes miss = scale[k] * level[k * N + i] + minimum[k] - x[k * N + i];
                error[k] += weight[k * N + i] * (ABSOLUTE_ERROR ? magnitude(miss) : miss * miss);
            }
        for (int k = 0; k < K; k++) {
            const Ints better = (determinant[k] > zero) & (error[k] < best_error[k]);
            best_error[k] = better ? error[k] : best_error[k];
            best[k].scale = better ? scale[k] : best[k].scale;
            best[k].minimum = better ? minimum[k] : best[k].minimum;
            best[k].inverse = better ? inverse[k] : best[k].inverse;
            best[k].offset = better ? offset[k] : best[k].offset;
        }
    }
    return inexact;
}

// make_qp_quants: scales (or minima, none negative) of N sub-blocks as levels 0 … top times one scale; for each of K such
// rows of numbers, which have the same weights.
template <int N, int K>
LANEWISE void fit_scales(int top, const Lanes *const (&x)[K], const Lanes *weight, Lanes *const (&level)[K],
                         Lanes *scale) {
    const Lanes zero = {}, highest = every((float)top);
    Lanes high[K], inverse[K], best_error[K], sum_xl[K], sum_l2[K];
    Ints present[K];
    for (int k = 0; k < K; k++) {
        high[k] = best_error[k] = sum_xl[k] = sum_l2[k] = zero;
        for (int i = 0; i < N; i++) high[k] = larger(high[k], x[k][i]);
        present[k] = ~(high[k] < ALL_ZERO);
        inverse[k] = present[k] ? highest / high[k] : zero;
        scale[k] = present[k] ? 1.f / inverse[k] : zero;
    }
    for (int i = 0; i < N; i++)
        for (int k = 0; k < K; k++) {
            const Lanes miss = x[k][i] - scale[k] * rounded(inverse[k] * x[k][i]);
            best_error[k] += weight[i] * miss * miss;
        }
    for (int step = -4; step <= 4; step++) {
        if (step == 0) continue;
        Lanes other[K], other_scale[K], error[K];
        for (int k = 0; k < K; k++) {
            other[k] = (0.1f * step + top) / high[k];
            other_scale[k] = 1.f / other[k];
            error[k] = zero;
        }
        for (int i = 0; i < N; i++)
            for (int k = 0; k < K; k++) {
                const Lanes miss = x[k][i] - other_scale[k] * smaller(rounded(other[k] * x[k][i]), highest);
                error[k] += weight[i] * miss * miss;
            }
        for (int k = 0; k < K; k++) {
            const Ints better = error[k] < best_error[k];
            best_error[k] = better ? error[k] : best_error[k];
            inverse[k] = better ? other[k] : inverse[k];
        }
    }
    for (int i = 0; i < N; i++)
        for (int k = 0; k < K; k++) {
            level[k][i] = smaller(rounded(inverse[k] * x[k][i]), highest);
            sum_xl[k] += weight[i] * x[k][i] * level[k][i];
            sum_l2[k] += weight[i] * level[k][i] * level[k][i];
        }
    for (int round = 0; round < 5; round++) {
        Ints changed = {};
        for (int i = 0; i < N; i++)
            for (int k = 0; k < K; k++) {
                Lanes xl = sum_xl[k] - weight[i] * x[k][i] * level[k][i];
                Lanes l2 = sum_l2[k] - weight[i] * level[k][i] * level[k][i];
                const Ints usable = (xl > zero) & (l2 > zero);
                const Lanes other = floats(smaller(nearest_int(x[k][i] * l2 / xl), every(top)));
                xl += weight[i] * x[k][i] * other;
                l2 += weight[i] * other * other;
                const Ints better =
                    usable & (other != level[k][i]) & (xl * xl * sum_l2[k] > sum_xl[k] * sum_xl[k] * l2);
                level[k][i] = better ? other : level[k][i];
                sum_xl[k] = better ? xl : sum_xl[k];
                sum_l2[k] = better ? l2 : sum_l2[k];
                changed |= better;
            }
        if (!any(changed)) break;
    }
    for (int k = 0; k < K; k++) {
        for (int i = 0; i < N; i++) level[k][i] = present[k] ? level[k][i] : zero;
        scale[k] = (present[k] & (sum_l2[k] > zero)) ? sum_xl[k] / sum_l2[k] : zero;
    }
}

// x ≈ scale * level, with levels -range … range - 1.
struct Symmetric {
    Lanes scale;
    Lanes inverse;  // the levels are nearest_int(inverse * x), clamped
    Ints zeros;     // all x are taken for zero: ggml then leaves the level at -range
};

// make_qx_quants with rmse_type 1.
template <int N, int K>
LANEWISE void fit_symmetric(int range, const Lanes *x, const Lanes *weight, Symmetric *best) {
    const Lanes zero = {};
    const float low = (float)-range, high = (float)(range - 1);
    Lanes extreme[K], size[K], best_value[K], weighted[K * N];
    for (int k = 0; k < K; k++) {
        extreme[k] = size[k] = best_value[k] = zero;
        best[k] = {zero, zero, Ints{}};
    }
    for (int i = 0; i < N; i++)
        for (int k = 0; k < K; k++) {
            const Lanes here = magnitude(x[k * N + i]);
            const Ints further = here > size[k];
            size[k] = further ? here : size[k];
            extreme[k] = further ? x[k * N + i] : extreme[k];
            weighted[k * N + i] = weight[k * N + i] * x[k * N + i];
        }
    for (int step = -10; step <= 9; step++) {
        if (step == 0) continue;
        const bool is_first = step == -10;  // at step 0
        const float reach = -(range + 0.1f * (is_first ? 0 : step));
        Lanes inverse[K], sum_xl[K], sum_l2[K];
        for (int k = 0; k < K; k++) {
            inverse[k] = reach / extreme[k];
            sum_xl[k] = sum_l2[k] = zero;
        }
        const auto sum_levels = [&](auto may_exceed) INLINE {
            for (int i = 0; i < N; i++)
                for (int k = 0; k < K; k++) {
                    Lanes level = smaller(rounded(inverse[k] * x[k * N + i]), every(high));
                    if (may_exceed) level = larger(level, every(low));
                    sum_xl[k] += weighted[k * N + i] * level;
                    sum_l2[k] += weight[k * N + i] * level * level;
                }
        };
        if (step <= 4)  // `extreme`, and so every x, is rounded to -range or more
            sum_levels(std::false_type{});
        else
            sum_levels(std::true_type{});
        for (int k = 0; k < K; k++) {
            Lanes scale = sum_xl[k] / sum_l2[k];
            if (is_first) {
                scale = sum_l2[k] != zero ? scale : zero;
                best[k].scale = scale;
                best[k].inverse = inverse[k];
                best_value[k] = scale * sum_xl[k];
            } else {
                const Ints better = (sum_l2[k] > zero) & (sum_xl[k] * sum_xl[k] > best_value[k] * sum_l2[k]);
                best[k].scale = better ? scale : best[k].scale;
                best[k].inverse = better ? inverse[k] : best[k].inverse;
                best_value[k] = better ? scale * sum_xl[k] : best_value[k];
            }
        }
    }
    for (int k = 0; k < K; k++) {
        best[k].zeros = size[k] < ALL_ZERO;
        best[k].scale = best[k].zeros ? zero : best[k].scale;
    }
}

// make_q3_quants with do_rmse: x are weighted by their squares. `levels` has room for as many as there are x.
template <int N, int K>
LANEWISE void fit_by_coordinate(int range, const Lanes *x, Lanes *levels, Lanes *scale) {
    const Lanes zero = {};
    const float low = (float)-range, high = (float)(range - 1);
    Lanes extreme[K], size[K], sum_xl[K], sum_l2[K], level[K * N], weight[K * N];
    for (int k = 0; k < K; k++) extreme[k] = size[k] = sum_xl[k] = sum_l2[k] = zero;
    for (int i = 0; i < N; i++)
        for (int k = 0; k < K; k++) {
            const Lanes here = magnitude(x[k * N + i]);
            const Ints further = here > size[k];
            size[k] = further ? here : size[k];
            extreme[k] = further ? x[k * N + i] : extreme[k];
        }
    for (int i = 0; i < N; i++)
        for (int k = 0; k < K; k++) {
            level[k * N + i] = within(rounded(low / extreme[k] * x[k * N + i]), low, high);
            weight[k * N + i] = x[k * N + i] * x[k * N + i];
            sum_xl[k] += weight[k * N + i] * x[k * N + i] * level[k * N + i];
            sum_l2[k] += weight[k * N + i] * level[k * N + i] * level[k * N + i];
        }
    for (int round = 0; round < 5; round++) {
        Ints changed = {};
        for (int i = 0; i < N; i++)
            for (int k = 0; k < K; k++) {
                Lanes xl = sum_xl[k] - weight[k * N + i] * x[k * N + i] * level[k * N + i];
                Lanes l2 = sum_l2[k] - weight[k * N + i] * level[k * N + i] * level[k * N + i];
                const Ints usable = xl > zero;
                const Lanes other = floats(within(nearest_int(x[k * N + i] * l2 / xl), -range, range - 1));
                xl += weight[k * N + i] * x[k * N + i] * other;
                l2 += weight[k * N + i] * other * other;
                const Ints better = usable & (other != level[k * N + i]) & (l2 > zero) &
                                    (xl * xl * sum_l2[k] > sum_xl[k] * sum_xl[k] * l2);
                level[k * N + i] = better ? other : level[k * N + i];
                sum_xl[k] = better ? xl : sum_xl[k];
                sum_l2[k] = better ? l2 : sum_l2[k];
                changed |= better;
            }
        if (!any(changed)) break;
    }
    for (int k = 0; k < K; k++) {
        const Ints zeros = size[k] < ALL_ZERO;
        scale[k] = (zeros | ~(sum_l2[k] > zero)) ? zero : sum_xl[k] / sum_l2[k];
        for (int i = 0; i < N; i++) levels[k * N + i] = zeros ? every(low) : level[k * N + i];
    }
}
