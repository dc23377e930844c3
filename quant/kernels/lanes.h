// Lanes: a vector that holds one number of each of several super-blocks, and what can be done to all of them at once.
//
// ggml's searches are chains of float sums over 16 or 32 weights, which no compiler may reorder. Here every lane runs
// the chain of another super-block: the same operations in the same order, so the same bits, several at a time. The
// file is compiled once for each instruction set, with LANES floats to a register, and never with contraction of
// multiply and add (-ffp-contract=off), which would change the bits.
//
// GCC's and Clang's vector extensions, and the processor's own minimum and maximum, which GCC does not see in
// `a < b ? a : b` where one of the two is a constant.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#ifndef LANES
#error "compile with -DLANES=4, 8 or 16: the floats in a register"
#endif

#define INLINE __attribute__((always_inline))
#define LANEWISE static inline INLINE

typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));  // also the result of a comparison: 0 or -1

LANEWISE Lanes every(float value) { return Lanes{} + value; }
LANEWISE Ints every(int32_t value) { return Ints{} + value; }

// b where one is not a number
#if LANES == 16
LANEWISE Lanes smaller(Lanes a, Lanes b) { return _mm512_min_ps(a, b); }
LANEWISE Lanes larger(Lanes a, Lanes b) { return _mm512_max_ps(a, b); }
#elif LANES == 8
LANEWISE Lanes smaller(Lanes a, Lanes b) { return _mm256_min_ps(a, b); }
LANEWISE Lanes larger(Lanes a, Lanes b) { return _mm256_max_ps(a, b); }
#elif defined(__SSE2__)
LANEWISE Lanes smaller(Lanes a, Lanes b) { return _mm_min_ps(a, b); }
LANEWISE Lanes larger(Lanes a, Lanes b) { return _mm_max_ps(a, b); }
#else
LANEWISE Lanes smaller(Lanes a, Lanes b) { return a < b ? a : b; }
LANEWISE Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }
#endif
LANEWISE Ints smaller(Ints a, Ints b) { return a < b ? a : b; }
LANEWISE Ints larger(Ints a, Ints b) { return a > b ? a : b; }
LANEWISE Lanes within(Lanes v, float low, float high) { return smaller(larger(v, every(low)), every(high)); }
LANEWISE Ints within(Ints v, int low, int high) { return smaller(larger(v, every(low)), every(high)); }
LANEWISE Lanes magnitude(Lanes v) { return (Lanes)((Ints)v & 0x7fffffff); }
LANEWISE Lanes floats(Ints v) { return __builtin_convertvector(v, Lanes); }
LANEWISE Ints integers(Lanes v) { return __builtin_convertvector(v, Ints); }

LANEWISE Lanes root(Lanes v) {
    Lanes result;
    for (int lane = 0; lane < LANES; lane++) result[lane] = __builtin_sqrtf(v[lane]);
    return result;
}

// The largest of the lanes.
LANEWISE float largest(Lanes v) {
    float found = v[0];
    for (int lane = 1; lane < LANES; lane++) found = found > v[lane] ? found : v[lane];
    return found;
}

LANEWISE bool any(Ints mask) {
    int32_t found = 0;
    for (int lane = 0; lane < LANES; lane++) found |= mask[lane];
    return found != 0;
}

// 1.5 * 2^23: a float this large has no bits below one, so adding it rounds to the nearest whole number, ties to even.
static const float ROUNDING = 12582912.f;
static const float EXACT_LIMIT = 4194303.f;

// Rounds as ggml's nearest_int, for |v| <= EXACT_LIMIT only.
LANEWISE Lanes rounded(Lanes v) { return (v + ROUNDING) - ROUNDING; }

// nearest_int (ggml-quants.c) of any v: beyond the limit it gives what ggml gives, which is no rounding.
LANEWISE Ints nearest_int(Lanes v) { return ((Ints)(v + ROUNDING) & 0x007fffff) - 0x00400000; }

static const float MAX_FLOAT = 0x1.fffffep127f;

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// float32 → float16, to nearest, ties to even; as GGML_FP32_TO_FP16 for every number that is not NaN.
static inline uint16_t half_of(float value) {
    const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size < 0x38800000) {  // below 2^-14: in steps of 2^-24, which adding 2^23 of them rounds to
        const float steps = float_of(size) * 0x1p24f + 0x1p23f;
        return (uint16_t)(sign | (bits_of(steps) - bits_of(0x1p23f)));
    }
    const uint32_t half = (size + 0x0fff + (size >> 13 & 1)) >> 13;
    const uint32_t biased = half - (112u << 10);
    return (uint16_t)(sign | (biased < 0x7c00 ? biased : 0x7c00));
}

static inline float float_of_half(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, size = half & 0x7fff;
    if (size < 0x0400) return float_of(sign | bits_of((float)size * 0x1p-24f));
    if (size >= 0x7c00) return float_of(sign | 0x7f800000);
    return float_of(sign | ((size << 13) + (112u << 23)));
}
