// Rows of numbers -> ggml's blocks, the same bytes as ggml's own encoders. What is computed for one sub-block of a row
// does not depend on another row: so many sub-blocks are encoded side by side, one a lane, whatever rows they lie in.
//
// encode_rows.h and what it includes are compiled once for each instruction set.
#pragma once

#include <cfenv>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "blocks.h"
#include "common.h"
#include "threads.h"

namespace mixtools {

// ggml's own numbers of its types (enum ggml_type), part of the ABI.
enum BlockType : int {
    Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q2_K = 10, Q3_K = 11, Q4_K = 12, Q5_K = 13, Q6_K = 14,
    IQ4_NL = 20, IQ4_XS = 23, MXFP4 = 39,
};
enum SourceType : int { F32 = 0, F16 = 1, BF16 = 30 };

// A matrix whose rows lie `stride` bytes apart, the items of a row side by side.
struct Source {
    const uint8_t* data;
    int64_t stride;
    SourceType type;
    int64_t rows, cols;
    const float* importance;  // [cols], or null

    int64_t item_size() const { return type == F32 ? 4 : 2; }
};

// While it lives, the thread rounds to nearest and keeps denormals, whatever else in the process has set.
class DefaultFloats {
  public:
    DefaultFloats() {
        std::fegetenv(&before);
        std::fesetenv(FE_DFL_ENV);
    }
    ~DefaultFloats() { std::fesetenv(&before); }
    DefaultFloats(const DefaultFloats&) = delete;
    DefaultFloats& operator=(const DefaultFloats&) = delete;

  private:
    std::fenv_t before;
};

constexpr int64_t ENCODE_CHUNK = 32 << 10;  // values that a thread takes at a time, about

}  // namespace mixtools

#define LANES 4
#define LANES_NAMESPACE lanes4
#include "encode_rows.h"
#undef LANES
#undef LANES_NAMESPACE

#if MIXTOOLS_X86
BEGIN_AVX2
#define LANES 8
#define LANES_NAMESPACE lanes8
#include "encode_rows.h"
#undef LANES
#undef LANES_NAMESPACE
END_TARGET

BEGIN_AVX512
#define LANES 16
#define LANES_NAMESPACE lanes16
#include "encode_rows.h"
#undef LANES
#undef LANES_NAMESPACE
END_TARGET
#endif
