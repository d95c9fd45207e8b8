// What every kernel shares: exports, instruction sets, and integers that may lie at any address.
#pragma once

#include <cstdint>

#define MIXTOOLS_EXPORT extern "C" __attribute__((visibility("default")))

#if defined(__x86_64__)
#define MIXTOOLS_X86 1
// GCC's AVX-512 header sets a register from itself to say that it may hold anything.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#define TARGET_AVX2 __attribute__((target("avx2")))
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw")))
#endif

namespace mixtools {

// The numbers are part of the ABI (mixtools/ops/cpu.py).
enum Isa : int { PLAIN = 0, AVX2 = 1, AVX512 = 2 };

inline int best_isa() {
#if MIXTOOLS_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) return AVX512;
    if (__builtin_cpu_supports("avx2")) return AVX2;
#endif
    return PLAIN;
}

// Tensors in a file start where its header ends, which may be an odd address.
template <int SIZE> struct Unaligned;
template <> struct Unaligned<1> { typedef uint8_t type __attribute__((may_alias)); };
template <> struct Unaligned<2> { typedef uint16_t type __attribute__((aligned(1), may_alias)); };
template <> struct Unaligned<4> { typedef uint32_t type __attribute__((aligned(1), may_alias)); };
template <> struct Unaligned<8> { typedef uint64_t type __attribute__((aligned(1), may_alias)); };

}  // namespace mixtools
