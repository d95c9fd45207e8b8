// Rows of blocks decoded, on threads: decoders.inc for each instruction set, and the one way to run over a matrix.
#pragma once

#include <algorithm>

#include "codes.h"
#include "threads.h"

namespace mixtools::blocks {

struct Decoder {
    // Decodes `count` blocks side by side. With `stream`, `out` starts at a line and is written past the caches.
    void (*run)(const uint8_t* blocks, uint8_t* out, int64_t count, bool stream) = nullptr;
    int64_t block_bytes = 0, out_bytes = 0;  // of one block
};

constexpr int TOGETHER = 4;  // x that share the decoding of a row

// Of rows of `count` blocks, row_bytes apart: with one x, and with TOGETHER of them, x_stride values apart, whose results
// come to lie out_stride values apart.
struct Multiplier {
    using Run = void (*)(const uint8_t* blocks, int64_t row_bytes, int64_t rows, int64_t count, const float* x,
                         int64_t x_stride, float* out, int64_t out_stride);
    Run one = nullptr, together = nullptr;
    int64_t block_bytes = 0, values = 0;  // of one block
};

namespace plain {
#define CODES PlainCodes
#define TARGET
#include "decoders.inc"
#undef CODES
#undef TARGET
}  // namespace plain

#if MIXTOOLS_X86
namespace avx2 {
#define CODES Avx2Codes
#define TARGET TARGET_AVX2
#include "decoders.inc"
#undef CODES
#undef TARGET
}  // namespace avx2

namespace avx512 {
#define CODES Avx512Codes
#define TARGET TARGET_AVX512
#include "decoders.inc"
#undef CODES
#undef TARGET
}  // namespace avx512

#if MIXTOOLS_AVX512_BF16
namespace avx512_bf16 {
#define CODES Avx512Bf16Codes
#define TARGET TARGET_AVX512_BF16
#include "decoders.inc"
#undef CODES
#undef TARGET
}  // namespace avx512_bf16
#endif
#endif

// One that decodes nothing if a type, or the instruction set, is unknown.
inline Decoder decoder(int type, int to, int isa) {
    switch (isa) {
        case PLAIN: return plain::decoder(type, to);
#if MIXTOOLS_X86
        case AVX2: return avx2::decoder(type, to);
        case AVX512: return avx512::decoder(type, to);
#if MIXTOOLS_AVX512_BF16
        case AVX512_BF16: return avx512_bf16::decoder(type, to);
#endif
#endif
    }
    return {};
}

constexpr int64_t DECODE_BYTES = 128 << 10;  // of the result, that a thread writes at a time
// From here on, stores that bypass the caches spare reading each line of the result before it is overwritten.
constexpr int64_t DECODE_STREAM_BYTES = 1 << 20;

// dst [rows, blocks * VALUES] = the values of src [rows, blocks], whose rows lie so many bytes apart.
inline void decode_rows(const Decoder& decoder, const uint8_t* src, int64_t src_stride, uint8_t* dst,
                        int64_t dst_stride, int64_t rows, int64_t blocks, int64_t threads) {
    const int64_t total = rows * blocks, step = DECODE_BYTES / decoder.out_bytes;
    const bool whole_lines = reinterpret_cast<uintptr_t>(dst) % 64 == 0 && (rows == 1 || dst_stride % 64 == 0);
    const bool stream = whole_lines && total * decoder.out_bytes >= DECODE_STREAM_BYTES;
    parallel_for((total + step - 1) / step, threads, [=](int64_t piece) {
        const int64_t end = std::min(total, (piece + 1) * step);
        for (int64_t block = piece * step, count; block < end; block += count) {
            const int64_t row = block / blocks, first = block % blocks;
            count = std::min(blocks - first, end - block);
            decoder.run(src + row * src_stride + first * decoder.block_bytes,
                        dst + row * dst_stride + first * decoder.out_bytes, count, stream);
        }
    });
}

}  // namespace mixtools::blocks
