// Rows of float32 → K-quant and Q8_0 blocks, several super-blocks at a time: byte for byte those of ggml, or, if asked to,
// with the refinement of refine.h.
//
// Compiled once for each instruction set (lanes.h); Python takes the best that the processor has. A tile (tile.h) goes
// through weights of the error, search (searches.h), scales, refinement, levels and packing (affine.h, symmetric.h). Where a number
// is too large to be rounded in floats as ggml does in integers, the block is made by ggml itself. Weights must be
// finite, importance finite and not negative. Knows nothing of files or threads.
//
// Source: ggml/src/ggml-quants.c of llama.cpp, commit 0c1e57098.

#include <cstddef>

#include "affine.h"
#include "symmetric.h"

namespace {

const int Q8_0 = 8;  // enum ggml_type, and so below

// ggml_quantize_chunk
typedef size_t (*Reference)(int type, const float *rows, void *out, int64_t start, int64_t n_rows, int64_t row_length,
                            const float *importance);

// quantize_row_q8_0_ref, x ≈ d * level in blocks of 32: halves are rounded away from zero.
void quantize_q8(const float *rows, int64_t n_blocks, uint8_t *out) {
    for (int64_t block = 0; block < n_blocks; block++, rows += 32, out += 34) {
        Lanes sizes = {};
        for (int i = 0; i < 32; i += LANES) {
            Lanes x;
            memcpy(&x, rows + i, sizeof x);
            sizes = larger(magnitude(x), sizes);
        }
        const float d = largest(sizes) / 127;
        float inverse = d != 0 ? 1.f / d : 0.f;
        if (inverse > MAX_FLOAT) inverse = 0;  // of denormal weights: ggml casts infinities to bytes, which gives 0
        const uint16_t half = half_of(d);
        memcpy(out, &half, sizeof half);
        for (int i = 0; i < 32; i++) {
            const float exact = rows[i] * inverse;
            const int whole = (int)exact;
            const float rest = exact - (float)whole;
            out[2 + i] = (uint8_t)(int8_t)(whole + (rest >= 0.5f) - (rest <= -0.5f));
        }
    }
}

struct Format {
    int type;  // enum ggml_type
    int block_bytes;
    Ints (*quantize)(Tile &, bool has_importance);
};

const Format FORMATS[] = {
    {10, 84, quantize_q2}, {11, 110, quantize_q3}, {12, 144, quantize_q4_q5<4>}, {13, 176, quantize_q4_q5<5>},
    {14, 210, quantize_q6},
};

}  // namespace

extern "C" {

// Rises with every change of what is called here: a library that an older source left behind is not called.
int bise_kernels_interface(void) { return 3; }

// The most lanes that this processor has instructions for: 16 with AVX-512, 8 with AVX2, else 4.
int bise_kernels_best_lanes(void) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return 16;
    if (__builtin_cpu_supports("avx2")) return 8;
#endif
    return 4;
}

// Rows (n_rows, row_length) → blocks of `type`. `importance` and `means` are (row_length,) or null; only a refinement
// looks at the means. Gives the super-blocks that
// `reference` made, or -1 for a type that is not made here.
int64_t bise_kernels_quantize(int type, bool is_refined, const float *rows, int64_t n_rows, int64_t row_length,
                              const float *importance, const float *means, uint8_t *out, Reference reference) {
    if (type == Q8_0) {
        quantize_q8(rows, n_rows * row_length / 32, out);
        return 0;
    }
    for (const Format &format : FORMATS) {
        if (format.type != type) continue;
        const int64_t per_row = row_length / SUPER, total = n_rows * per_row;
        int64_t referred = 0;
        alignas(64) Tile tile;
        tile.is_refined = is_refined;
        for (int64_t first = 0; first < total; first += LANES) {
            tile.count = (int)(total - first < LANES ? total - first : LANES);
            tile.block_bytes = format.block_bytes;
            tile.out = out + first * format.block_bytes;
            const float *weights[LANES];
            for (int lane = 0; lane < LANES; lane++) {
                const int64_t block = first + (lane < tile.count ? lane : 0);
                weights[lane] = rows + block * SUPER;
                tile.importance[lane] = importance ? importance + block % per_row * SUPER : nullptr;
                tile.means[lane] = means ? means + block % per_row * SUPER : nullptr;
            }
            transpose(weights, tile.x);
            if (importance) transpose(tile.importance, tile.weight);
            const Ints inexact = format.quantize(tile, importance != nullptr);
            if (!any(inexact)) continue;
            for (int lane = 0; lane < tile.count; lane++) {
                if (!inexact[lane]) continue;
                const int64_t block = first + lane;
                const float *stretch = importance ? importance + block % per_row * SUPER : nullptr;
                reference(type, rows + block * SUPER, out + block * format.block_bytes, 0, 1, SUPER, stretch);
                referred++;
            }
        }
        return referred;
    }
    return -1;
}
}
