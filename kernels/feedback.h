// Second-order rounding of a block of columns: the error that rounding a column made is fed back into the columns that
// follow it. GPTQ (https://arxiv.org/abs/2210.17323) in the form of LDLQ (https://arxiv.org/abs/2307.13304), where the
// errors are those of the original weights; coordinate descent is the same loop with errors that exist already.
//
// Matrices lie transposed, [columns, rows]: rows do not depend on each other and lie side by side, one a lane. What a
// column gets back is summed when its turn comes, in the order of the columns that give it, each product rounded and
// then each sum: the bits of a loop that feeds each column into all that follow.
//
// feedback_rows.h is compiled once for each instruction set.
#pragma once

#include <vector>

#include "encode.h"  // lanes.h on each instruction set, DefaultFloats

namespace mixtools {

constexpr int64_t FEEDBACK_COLUMNS = 512;  // at most, of a block

// The lines of a matrix, `stride` items apart.
template <class T> struct Lines {
    T* data;
    int64_t stride;

    T* at(int64_t line, int64_t item) const { return data + line * stride + item; }
};

// What a scale is multiplied with: code 0 is the first level.
struct Levels {
    const float* table;   // [count], ascending; or null: the integers from `low` on, none beyond 2^21 either way
    const float* limits;  // [count - 1]: code i + 1 is nearer than code i to what is greater than limits[i]
    int32_t count, low;
};

struct FeedbackBlock {
    int64_t columns, rows;
    Lines<float> targets;         // [columns, rows], in the end what was rounded
    Lines<const float> weights;   // [columns, rows]
    Lines<float> errors;          // [columns, rows], before and after
    Lines<uint8_t> codes;         // [columns, rows]
    Lines<const float> scales;    // [groups, rows]
    Lines<const float> mins;      // [groups, rows]
    const int32_t* group_of;      // [columns]
    Lines<const float> feedback;  // [columns, columns]; only what lies above the diagonal is read
    Levels levels;
};

}  // namespace mixtools

#define LANES_NAMESPACE lanes4
#include "feedback_rows.h"
#undef LANES_NAMESPACE

#if MIXTOOLS_X86
BEGIN_AVX2
#define LANES_NAMESPACE lanes8
#include "feedback_rows.h"
#undef LANES_NAMESPACE
END_TARGET

BEGIN_AVX512
#define LANES_NAMESPACE lanes16
#include "feedback_rows.h"
#undef LANES_NAMESPACE
END_TARGET
#endif
