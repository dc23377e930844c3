// What misses cost: the measure by which the longer search (refine.h) judges the blocks it could make.
//
// A miss is a weight x less what the block holds for it. A row of weights is multiplied with activations a, and of the
// product's error, E (Σ miss a)², a super-block adds
//
//     Σ var(a) miss² + (Σ mean(a) miss)²
//
// where columns vary independently: misses that agree with the means add up for every token, and can be made to cancel.
// Variance and mean come from an importance matrix; without one variance is 1 and mean is 0.
//
// Columns do not vary independently, though: activations lie along the weights that look for them. So misses along the
// weights themselves count GAIN times more: levels that are too short on the whole weaken what a row is there for, and a
// least-squares fit always makes them so. docs/search.md has what this and other measures gave.

#pragma once

#include "tile.h"

static const float GAIN = 2.f;
static const float LEAST_VARIANCE = 0.1f;  // as a share of the importance, whatever the mean leaves

struct Measure {
    Lanes weight[SUPER];  // of each miss squared
    Lanes mean[SUPER];
    Lanes mean_factor;  // of the square of Σ mean miss: that of the variances in `weight`
    Lanes gain_factor;  // of the square of Σ weight x miss
};

// Sums over the misses of some weights.
struct Misses {
    Lanes error;  // Σ weight miss²
    Lanes mean;   // Σ mean miss
    Lanes gain;   // Σ weight x miss
};

LANEWISE void add(Misses &sums, const Misses &more) {
    sums.error += more.error;
    sums.mean += more.mean;
    sums.gain += more.gain;
}

LANEWISE void count_miss(Misses &sums, const Measure &measure, int i, Lanes x, Lanes miss) {
    const Lanes weighted = measure.weight[i] * miss;
    sums.error += weighted * miss;
    sums.mean += measure.mean[i] * miss;
    sums.gain += weighted * x;
}

LANEWISE Lanes cost(const Measure &measure, const Misses &sums) {
    return sums.error + measure.mean_factor * (sums.mean * sums.mean) + measure.gain_factor * (sums.gain * sums.gain);
}

static inline void measure_of(const Tile &tile, Measure &measure) {
    const Lanes zero = {};
    for (int i = 0; i < SUPER; i++) {
        measure.weight[i] = every(1.f);
        measure.mean[i] = zero;
    }
    if (tile.importance[0]) transpose(tile.importance, measure.weight);
    if (tile.means[0]) transpose(tile.means, measure.mean);
    Lanes sum_weight = zero, sum_x2 = zero;
    for (int i = 0; i < SUPER; i++) {
        const Lanes importance = measure.weight[i], mean = measure.mean[i];
        measure.weight[i] = larger(importance - mean * mean, LEAST_VARIANCE * importance);
        sum_weight += measure.weight[i];
    }
    const Lanes unit = sum_weight > zero ? 1.f / sum_weight : zero;  // costs relative to it, lest their squares overflow
    for (int i = 0; i < SUPER; i++) {
        measure.weight[i] *= unit;
        sum_x2 += measure.weight[i] * tile.x[i] * tile.x[i];
    }
    measure.mean_factor = unit;
    measure.gain_factor = sum_x2 > zero ? GAIN / sum_x2 : zero;
}
