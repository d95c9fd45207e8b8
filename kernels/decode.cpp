// Entry point of the decoders; see cpu.cpp.

#include "decode.h"

using namespace mixtools;

// dst [rows, values of row_blocks blocks] = src [rows, row_blocks] decoded and rounded to the type `to`. Rows lie
// src_stride and dst_stride bytes apart; the types are ggml's numbers (blocks.h), and those of our own (grouped.h).
MIXTOOLS_EXPORT int mixtools_decode(const uint8_t* src, int64_t src_stride, uint8_t* dst, int64_t dst_stride,
                                    int64_t rows, int64_t row_blocks, int type, int to, int64_t threads, int isa) {
    const blocks::Decoder decoder = blocks::decoder(type, to, isa);
    if (!decoder.run) return UNKNOWN;
    blocks::decode_rows(decoder, src, src_stride, dst, dst_stride, rows, row_blocks, threads);
    return 0;
}
