// Entry point of the encoders; see cpu.cpp.

#include "encode.h"

using namespace mixtools;

// The blocks of ggml's `type` that `rows` rows of `cols` values of `source_type` make, at `out`, dense. Both types are
// ggml's numbers. `cols` is a multiple of the type's block, importance [cols] or null.
MIXTOOLS_EXPORT int mixtools_encode(const uint8_t* data, int64_t stride, int source_type, int64_t rows, int64_t cols,
                                    const float* importance, int type, uint8_t* out, int64_t threads, int isa) {
    if (source_type != F32 && source_type != F16 && source_type != BF16) return UNKNOWN;
    const Source source{data, stride, static_cast<SourceType>(source_type), rows, cols, importance};
    const BlockType block = static_cast<BlockType>(type);
    switch (isa) {
        case PLAIN: return lanes4::encode(source, block, out, threads) ? 0 : UNKNOWN;
#if MIXTOOLS_X86
        case AVX2: return lanes8::encode(source, block, out, threads) ? 0 : UNKNOWN;
        case AVX512:
        case AVX512_BF16: return lanes16::encode(source, block, out, threads) ? 0 : UNKNOWN;
#endif
    }
    return UNKNOWN;
}
