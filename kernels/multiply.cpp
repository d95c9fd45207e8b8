// Entry point of products with blocks; see cpu.cpp.

#include "multiply.h"

using namespace mixtools;

// Each of `count` products (multiply.h), all sums in fp32. `narrow`: all values of each x are bf16's own, for which some
// machines have a faster way.
MIXTOOLS_EXPORT int mixtools_multiply(const blocks::Product* products, int64_t count, int narrow, int64_t threads,
                                      int isa) {
    return blocks::multiply_all(products, count, narrow != 0, threads, isa) ? 0 : UNKNOWN;
}
