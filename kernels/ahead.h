// Memory that is asked for before it is needed: the hardware's own guess ends with each page.
#pragma once

#include <cstddef>

#include "codes.h"

#if MIXTOOLS_X86
namespace mixtools::blocks {

constexpr int64_t AHEAD = 4096;  // bytes

// Of a row of blocks that is read in order, as many bytes as this one has, so far ahead.
template <typename Block> MIXTOOLS_INLINE void ask_ahead(const Block& block) {
    for (size_t line = 0; line < sizeof(Block); line += 64)
        _mm_prefetch(reinterpret_cast<const char*>(&block) + AHEAD + line, _MM_HINT_T0);
}

}  // namespace mixtools::blocks
#endif
