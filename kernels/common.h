// What every kernel shares: exports, instruction sets, and integers that may lie at any address.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

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
#define TARGET_AVX2 __attribute__((target("avx2,f16c,fma")))
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,f16c,fma")))
// The same for all functions between BEGIN and END.
#if defined(__clang__)
#define BEGIN_AVX2 _Pragma("clang attribute push(__attribute__((target(\"avx2\"))), apply_to = function)")
#define BEGIN_AVX512 _Pragma("clang attribute push(__attribute__((target(\"avx512f,avx512bw\"))), apply_to = function)")
#define END_TARGET _Pragma("clang attribute pop")
#else
#define BEGIN_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2\")")
#define BEGIN_AVX512 _Pragma("GCC push_options") _Pragma("GCC target(\"avx512f,avx512bw\")")
#define END_TARGET _Pragma("GCC pop_options")
#endif
#if defined(__has_include) && __has_include(<avx512bf16intrin.h>)  // compilers since GCC 10
#define MIXTOOLS_AVX512_BF16 1
#define TARGET_AVX512_BF16 __attribute__((target("avx512f,avx512bw,f16c,fma,avx512bf16")))
#endif
#endif

namespace mixtools {

constexpr int UNKNOWN = -2;  // what an entry point answers to a number that it does not know

// The numbers are part of the ABI (mixtools/ops/cpu.py).
enum Isa : int { PLAIN = 0, AVX2 = 1, AVX512 = 2, AVX512_BF16 = 3 };

#if MIXTOOLS_X86
// Conversion of f16 and fused products, which each processor with AVX2 has, unless a virtual machine hides them.
inline bool has_f16c_and_fma() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) && (c & bit_FMA);
}
#endif

inline int best_isa() {
#if MIXTOOLS_X86
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !has_f16c_and_fma()) return PLAIN;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw")) return AVX2;
#if MIXTOOLS_AVX512_BF16
    if (__builtin_cpu_supports("avx512bf16")) return AVX512_BF16;
#endif
    return AVX512;
#else
    return PLAIN;
#endif
}

// Tensors in a file start where its header ends, which may be an odd address.
template <int SIZE> struct Unaligned;
template <> struct Unaligned<1> { typedef uint8_t type __attribute__((may_alias)); };
template <> struct Unaligned<2> { typedef uint16_t type __attribute__((aligned(1), may_alias)); };
template <> struct Unaligned<4> { typedef uint32_t type __attribute__((aligned(1), may_alias)); };
template <> struct Unaligned<8> { typedef uint64_t type __attribute__((aligned(1), may_alias)); };

}  // namespace mixtools
