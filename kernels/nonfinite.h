// Where the first NaN or infinity stands: a value is one when its exponent bits are all set.
#pragma once

#include <algorithm>
#include <atomic>

#include "common.h"
#include "threads.h"

namespace mixtools {

constexpr int64_t NONFINITE_RUN = 1024;         // values looked at together; the first hit is sought only in a run with one
constexpr int64_t NONFINITE_CHUNK = 256 << 10;  // values that a thread takes at a time

// Plain C++ that each instruction set below compiles for itself. Returns `count` if all are finite.
template <int SIZE>
__attribute__((always_inline)) inline int64_t first_nonfinite_in(const uint8_t* data, int64_t count, uint32_t exponent) {
    using Bits = typename Unaligned<SIZE>::type;
    const Bits* values = reinterpret_cast<const Bits*>(data);
    const Bits mask = static_cast<Bits>(exponent);
    for (int64_t start = 0; start < count; start += NONFINITE_RUN) {
        const int64_t end = std::min(count, start + NONFINITE_RUN);
        Bits hit = 0;
        for (int64_t i = start; i < end; i++) hit |= static_cast<Bits>((values[i] & mask) == mask);
        if (hit)
            for (int64_t i = start; i < end; i++)
                if ((values[i] & mask) == mask) return i;
    }
    return count;
}

template <int SIZE> struct PlainScan {
    static int64_t run(const uint8_t* data, int64_t count, uint32_t exponent) {
        return first_nonfinite_in<SIZE>(data, count, exponent);
    }
};

#if MIXTOOLS_X86
template <int SIZE> struct Avx2Scan {
    TARGET_AVX2 static int64_t run(const uint8_t* data, int64_t count, uint32_t exponent) {
        return first_nonfinite_in<SIZE>(data, count, exponent);
    }
};
template <int SIZE> struct Avx512Scan {
    TARGET_AVX512 static int64_t run(const uint8_t* data, int64_t count, uint32_t exponent) {
        return first_nonfinite_in<SIZE>(data, count, exponent);
    }
};
#endif

// Index of the first value whose bits under `exponent` are all set, or -1.
template <int SIZE, template <int> class Scan>
int64_t first_nonfinite(const uint8_t* data, int64_t count, uint32_t exponent, int64_t threads) {
    std::atomic<int64_t> first{count};
    parallel_for((count + NONFINITE_CHUNK - 1) / NONFINITE_CHUNK, threads, [&](int64_t chunk) {
        const int64_t start = chunk * NONFINITE_CHUNK;
        if (start >= first.load(std::memory_order_relaxed)) return;
        const int64_t size = std::min(NONFINITE_CHUNK, count - start);
        const int64_t found = Scan<SIZE>::run(data + start * SIZE, size, exponent);
        if (found == size) return;
        int64_t seen = first.load(std::memory_order_relaxed);
        while (start + found < seen && !first.compare_exchange_weak(seen, start + found, std::memory_order_relaxed)) {
        }
    });
    return first == count ? -1 : first.load();
}

}  // namespace mixtools
