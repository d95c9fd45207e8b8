// Blocks of ggml: how the values of a row are packed, 32 or 256 to a block.
//
// A block holds small integers, the codes, and the scales that make numbers of them. Layouts and values are those of
// dequantize_row_* in https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-quants.c: in fp32, each
// product, sum and difference rounded on its own.
#pragma once

#include <cstring>

#include "common.h"

#define MIXTOOLS_INLINE __attribute__((always_inline)) inline
#if defined(__clang__)
#define MIXTOOLS_UNROLL _Pragma("clang loop unroll(full)")
#else
#define MIXTOOLS_UNROLL _Pragma("GCC unroll 8")
#endif

namespace mixtools::blocks {

MIXTOOLS_INLINE uint32_t word_at(const uint8_t* at) { return *reinterpret_cast<const Unaligned<4>::type*>(at); }

MIXTOOLS_INLINE uint32_t half_word_at(const uint8_t* at) {
    return *reinterpret_cast<const Unaligned<2>::type*>(at);
}

// Whether the f16 there is neither infinite nor NaN.
MIXTOOLS_INLINE bool finite_at(const uint8_t* at) { return (half_word_at(at) & 0x7c00) != 0x7c00; }

// What values are decoded to; the numbers are ggml's own (enum ggml_type), as are the TYPEs below, and part of the ABI.
enum To : int { F32 = 0, F16 = 1, BF16 = 30 };

// Members are bytes, so that a block may lie at any address. In a regular one, scales are finite and values are zero or
// normal numbers of fp32 (of MXFP4 also infinite). Others are rare, and left to plain code.
struct Q4_0 {
    static constexpr int TYPE = 2, VALUES = 32;
    uint8_t d[2], qs[16];
    bool regular() const { return finite_at(d); }
};
struct Q4_1 {
    static constexpr int TYPE = 3, VALUES = 32;
    uint8_t d[2], m[2], qs[16];
    bool regular() const { return finite_at(d) && finite_at(m); }
};
struct Q5_0 {
    static constexpr int TYPE = 6, VALUES = 32;
    uint8_t d[2], qh[4], qs[16];
    bool regular() const { return finite_at(d); }
};
struct Q5_1 {
    static constexpr int TYPE = 7, VALUES = 32;
    uint8_t d[2], m[2], qh[4], qs[16];
    bool regular() const { return finite_at(d) && finite_at(m); }
};
struct Q8_0 {
    static constexpr int TYPE = 8, VALUES = 32;
    uint8_t d[2], qs[32];
    bool regular() const { return finite_at(d); }
};
struct Q2_K {
    static constexpr int TYPE = 10, VALUES = 256;
    uint8_t scales[16], qs[64], d[2], dmin[2];
    bool regular() const { return finite_at(d) && finite_at(dmin); }
};
struct Q3_K {
    static constexpr int TYPE = 11, VALUES = 256;
    uint8_t hmask[32], qs[64], scales[12], d[2];
    bool regular() const { return finite_at(d); }
};
struct Q4_K {
    static constexpr int TYPE = 12, VALUES = 256;
    uint8_t d[2], dmin[2], scales[12], qs[128];
    bool regular() const { return finite_at(d) && finite_at(dmin); }
};
struct Q5_K {
    static constexpr int TYPE = 13, VALUES = 256;
    uint8_t d[2], dmin[2], scales[12], qh[32], qs[128];
    bool regular() const { return finite_at(d) && finite_at(dmin); }
};
struct Q6_K {
    static constexpr int TYPE = 14, VALUES = 256;
    uint8_t ql[128], qh[64], scales[16], d[2];
    bool regular() const { return finite_at(d); }
};
struct IQ4_NL {
    static constexpr int TYPE = 20, VALUES = 32;
    uint8_t d[2], qs[16];
    bool regular() const { return finite_at(d); }
};
struct IQ4_XS {
    static constexpr int TYPE = 23, VALUES = 256;
    uint8_t d[2], scales_h[2], scales_l[4], qs[128];
    bool regular() const { return finite_at(d); }
};
struct MXFP4 {
    static constexpr int TYPE = 39, VALUES = 32;
    uint8_t e, qs[16];
    bool regular() const { return e >= 2; }  // 255, no number elsewhere, is one in ggml
};

static_assert(sizeof(Q4_0) == 18 && sizeof(Q4_1) == 20 && sizeof(Q5_0) == 22 && sizeof(Q5_1) == 24);
static_assert(sizeof(Q8_0) == 34 && sizeof(Q2_K) == 84 && sizeof(Q3_K) == 110 && sizeof(Q4_K) == 144);
static_assert(sizeof(Q5_K) == 176 && sizeof(Q6_K) == 210 && sizeof(IQ4_NL) == 18 && sizeof(IQ4_XS) == 136);
static_assert(sizeof(MXFP4) == 17);

// What the 16 codes of the types without even steps stand for; those of MXFP4 are doubled, and its scale halved.
constexpr int8_t IQ4_VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr int8_t MXFP4_VALUES[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

MIXTOOLS_INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

MIXTOOLS_INLINE float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// The f16 there, exactly. Scales of real weights lie on both sides of the smallest normal f16, 6e-5: no branch takes
// them apart, and no arithmetic sees a denormal, which a thread may be set to take for zero.
MIXTOOLS_INLINE float half_at(const uint8_t* at) {
    const uint32_t half = half_word_at(at), exponent = half >> 10 & 31, normal = exponent != 0;
    const uint32_t sign = (half & 0x8000) << 16, digits = (half & 0x3ff) | normal << 10;
    if (exponent == 31) return float_of(sign | 0x7f800000 | (half & 0x3ff) << 13);
    const float unit = float_of((exponent + !normal + 102) << 23);  // 2^-24 and up
    return float_of(sign | bits_of(static_cast<float>(static_cast<int32_t>(digits)) * unit));
}

// 2^(e - 128): half the scale that the exponent e stands for.
MIXTOOLS_INLINE float half_power(uint32_t e) { return float_of(e < 2 ? 0x00200000u << e : (e - 1) << 23); }

// A NaN's own bits would depend on which operand of a sum a compiler puts first: there is one NaN.
MIXTOOLS_INLINE float one_nan(float value) { return value != value ? float_of(0x7fc00000) : value; }

// To nearest, ties to even.
MIXTOOLS_INLINE uint16_t to_bf16(float value) {
    const uint32_t bits = bits_of(value);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The same, as x86 does it (vcvtps2ph): infinity from 65520 on. Of what is too small to be normal, the bits come to lie
// at their place, rounded, when one half is added.
MIXTOOLS_INLINE uint16_t to_f16(float value) {
    const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    const uint32_t bounded = rest < 0x47800000 ? rest : 0x47800000;  // 65536
    const uint32_t normal = (bounded - (112u << 23) + 0xfff + (bounded >> 13 & 1)) >> 13;
    const uint32_t tiny = bits_of(float_of(bounded) + 0.5f) - bits_of(0.5f);
    return static_cast<uint16_t>(sign | (rest > 0x7f800000 ? 0x7e00 : rest < 0x38800000 ? tiny : normal));
}

// 16 signed bytes, the first in the lowest bits.
struct Sixteen {
    uint64_t first, last;
};

MIXTOOLS_INLINE uint64_t pair(uint32_t low, uint32_t high) { return static_cast<uint64_t>(high) << 32 | low; }

MIXTOOLS_INLINE Sixteen sixteen_at(const uint8_t* at) {
    return {pair(word_at(at), word_at(at + 4)), pair(word_at(at + 8), word_at(at + 12))};
}

// Less 32 in each byte, all of which are below 64: without a borrow from the next.
MIXTOOLS_INLINE uint64_t less_32(uint64_t bytes) {
    constexpr uint64_t EACH = 0x0101010101010101;
    return ((bytes | 128 * EACH) - 32 * EACH) ^ 128 * EACH;
}

// Scales of 6 bits, four at a time: the 8 scales, then the 8 minima, of the groups of Q4_K and Q5_K.
MIXTOOLS_INLINE Sixteen scales_and_minima(const uint8_t* packed) {
    const uint32_t a = word_at(packed), b = word_at(packed + 4), c = word_at(packed + 8);
    return {pair(a & 0x3f3f3f3f, (c & 0x0f0f0f0f) | (a >> 2 & 0x30303030)),
            pair(b & 0x3f3f3f3f, (c >> 4 & 0x0f0f0f0f) | (b >> 2 & 0x30303030))};
}

// The scales of the 16 groups of Q3_K.
MIXTOOLS_INLINE Sixteen scales_of_16(const uint8_t* packed) {
    const uint32_t a = word_at(packed), b = word_at(packed + 4), c = word_at(packed + 8);
    return {less_32(pair((a & 0x0f0f0f0f) | (c << 4 & 0x30303030), (b & 0x0f0f0f0f) | (c << 2 & 0x30303030))),
            less_32(pair((a >> 4 & 0x0f0f0f0f) | (c & 0x30303030), (b >> 4 & 0x0f0f0f0f) | (c >> 2 & 0x30303030)))};
}

// The scales of the 8 groups of IQ4_XS, whose low 4 and high 2 bits are spread over the bytes by halving.
MIXTOOLS_INLINE Sixteen scales_of_8(const uint8_t* packed_low, const uint8_t* packed_high) {
    uint64_t low = word_at(packed_low), high = half_word_at(packed_high);
    low = (low | low << 16) & 0x0000ffff0000ffff;
    low = (low | low << 8) & 0x00ff00ff00ff00ff;
    low = (low | low << 4) & 0x0f0f0f0f0f0f0f0f;
    high = (high | high << 24) & 0x000000ff000000ff;
    high = (high | high << 12) & 0x000f000f000f000f;
    high = (high | high << 6) & 0x0303030303030303;
    return {less_32(low | high << 4), 0};
}

}  // namespace mixtools::blocks
