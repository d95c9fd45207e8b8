// Entry points of the CPU kernels; encode.cpp, decode.cpp and multiply.cpp have theirs, so that they compile side by side.
// C ABI, called through mixtools/ops/cpu.py, which checks what it passes.
//
// `isa` is a value of mixtools::Isa not above mixtools_best_isa(). A function returns -2 for a value that it does
// not know, so that a mismatch is an error and never a wrong result.

#include "common.h"
#include "feedback.h"
#include "nonfinite.h"
#include "transpose.h"

using namespace mixtools;

namespace {

template <template <int> class Tile>
int transpose_any(const uint8_t* src, int64_t src_stride, uint8_t* dst, int64_t rows, int64_t cols, int item_size,
                  int64_t threads) {
    switch (item_size) {
        case 1: transpose<1, Tile>(src, src_stride, dst, rows, cols, threads); return 0;
        case 2: transpose<2, Tile>(src, src_stride, dst, rows, cols, threads); return 0;
        case 4: transpose<4, Tile>(src, src_stride, dst, rows, cols, threads); return 0;
        case 8: transpose<8, Tile>(src, src_stride, dst, rows, cols, threads); return 0;
    }
    return UNKNOWN;
}

template <template <int> class Scan>
int64_t first_nonfinite_any(const uint8_t* data, int64_t count, int item_size, uint32_t exponent, int64_t threads) {
    switch (item_size) {
        case 2: return first_nonfinite<2, Scan>(data, count, exponent, threads);
        case 4: return first_nonfinite<4, Scan>(data, count, exponent, threads);
    }
    return UNKNOWN;
}

}  // namespace

// Raised with every change to a signature or to a meaning; ops/cpu.py refuses another number.
MIXTOOLS_EXPORT int mixtools_abi_version() { return 3; }

MIXTOOLS_EXPORT int mixtools_best_isa() { return best_isa(); }

// dst[c * rows + r] = src[r][c] for items of 1, 2, 4 or 8 bytes. Rows of src lie src_stride bytes apart.
MIXTOOLS_EXPORT int mixtools_transpose(const uint8_t* src, int64_t src_stride, uint8_t* dst, int64_t rows, int64_t cols,
                                       int item_size, int64_t threads, int isa) {
    switch (isa) {
        case PLAIN: return transpose_any<PlainTile>(src, src_stride, dst, rows, cols, item_size, threads);
#if MIXTOOLS_X86
        case AVX2: return transpose_any<Avx2Tile>(src, src_stride, dst, rows, cols, item_size, threads);
        case AVX512:
        case AVX512_BF16: return transpose_any<Avx512Tile>(src, src_stride, dst, rows, cols, item_size, threads);
#endif
    }
    return UNKNOWN;
}

// Index of the first of `count` values of 2 or 4 bytes whose `exponent` bits are all set, or -1.
MIXTOOLS_EXPORT int64_t mixtools_first_nonfinite(const uint8_t* data, int64_t count, int item_size, uint32_t exponent,
                                                 int64_t threads, int isa) {
    switch (isa) {
        case PLAIN: return first_nonfinite_any<PlainScan>(data, count, item_size, exponent, threads);
#if MIXTOOLS_X86
        case AVX2: return first_nonfinite_any<Avx2Scan>(data, count, item_size, exponent, threads);
        case AVX512:
        case AVX512_BF16: return first_nonfinite_any<Avx512Scan>(data, count, item_size, exponent, threads);
#endif
    }
    return UNKNOWN;
}

// Rounds a block of columns [columns, rows] one after the other, feeding back what each changed in its errors
// (feedback.h). Strides are in items. table [count] and limits [count - 1], or null: the integers from `low` on.
MIXTOOLS_EXPORT int mixtools_round_block(int64_t columns, int64_t rows, float* targets, int64_t target_stride,
                                         const float* weights, int64_t weight_stride, float* errors,
                                         int64_t error_stride, uint8_t* codes, int64_t code_stride,
                                         const float* scales, int64_t scale_stride, const float* mins,
                                         int64_t min_stride, const int32_t* group_of, const float* feedback,
                                         int64_t feedback_stride, const float* table, const float* limits,
                                         int32_t count, int32_t low, int64_t threads, int isa) {
    if (columns > FEEDBACK_COLUMNS || count < 1 || count > 256) return UNKNOWN;
    const FeedbackBlock block{columns, rows, {targets, target_stride}, {weights, weight_stride}, {errors, error_stride},
                              {codes, code_stride}, {scales, scale_stride}, {mins, min_stride}, group_of,
                              {feedback, feedback_stride}, {table, limits, count, low}};
    switch (isa) {
        case PLAIN: lanes4::round_block(block, threads); return 0;
#if MIXTOOLS_X86
        case AVX2: lanes8::round_block(block, threads); return 0;
        case AVX512:
        case AVX512_BF16: lanes16::round_block(block, threads); return 0;
#endif
    }
    return UNKNOWN;
}
