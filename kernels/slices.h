// Products of blocks with vectors of bf16 where no instruction multiplies those: in bytes, exactly.
//
// The 256 values of x that meet a block become integers of 24 bits, by a power of two that the largest fits, and those
// three signed bytes each; a bf16 loses nothing by it down to 2^-14 of the largest. Codes are unsigned bytes, so that
// the machine multiplies 32 at a time with a slice of x and adds pairs of products, then those times their scales, which
// are small integers, too. In one block all of that is exact:
//
//     sum of scale * (code - zero) * x  =  d * unit * sum over slices of 256^s * sum of scale * code * byte
//                                          -  d * zero * sum of scale * sum of x
//
// What is rounded are the sums of blocks, in fp32.
#pragma once

#include "ahead.h"
#include "codes.h"

#if MIXTOOLS_X86
namespace mixtools::blocks::slices {

constexpr int SLICES = 3, DIGITS = 22;  // of x, and its bits without a sign
// No factor of a block is a denormal then: the smallest d is 2^-24. Values of x below 2^-103 count as zero.
constexpr int LEAST_EXPONENT = -80;

// 256 values of x: their slices, the highest first; the sums of those that share a scale (16 values: of the even groups,
// then of the odd ones), and zeros; and what a one in the lowest slice stands for.
struct X {
    int8_t bytes[SLICES][256];
    float sums[16];
    float unit;
};

using Set = Avx2Codes;

// Of one token, within a block.
struct Parts {
    __m256i at[SLICES];
};

TARGET_AVX2 static MIXTOOLS_INLINE __m256i load(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

// The groupth 32 codes of a block; `scales` int16 of each pair of them.
template <int TOKENS>
TARGET_AVX2 static MIXTOOLS_INLINE void add(int group, __m256i codes, __m256i scales, const X* x, int64_t stride,
                                            Parts* parts) {
    MIXTOOLS_UNROLL
    for (int token = 0; token < TOKENS; token++) {
        MIXTOOLS_UNROLL
        for (int slice = 0; slice < SLICES; slice++) {
            const __m256i bytes = load(x[token * stride].bytes[slice] + 32 * group);
            const __m256i products = _mm256_madd_epi16(_mm256_maddubs_epi16(codes, bytes), scales);
            parts[token].at[slice] = group ? _mm256_add_epi32(parts[token].at[slice], products) : products;
        }
    }
}

// The slices' sums in one.
TARGET_AVX2 static MIXTOOLS_INLINE __m256 joined(const Parts& parts) {
    const __m256 slice = _mm256_set1_ps(256);
    __m256 products = _mm256_cvtepi32_ps(parts.at[0]);
    MIXTOOLS_UNROLL
    for (int i = 1; i < SLICES; i++) products = _mm256_fmadd_ps(products, slice, _mm256_cvtepi32_ps(parts.at[i]));
    return products;
}

// The block's products, and what they have too much: `offsets` times the sums of x, 8 or 16 of both.
template <int TOKENS, int OFFSETS>
TARGET_AVX2 static MIXTOOLS_INLINE void close(float d, const Parts* parts, const __m256* offsets, const X* x,
                                              int64_t stride, __m256* sums) {
    MIXTOOLS_UNROLL
    for (int token = 0; token < TOKENS; token++) {
        const X& own = x[token * stride];
        __m256 sum = sums[token];
        MIXTOOLS_UNROLL
        for (int i = 0; i < OFFSETS / 8; i++)
            sum = _mm256_fnmadd_ps(offsets[i], _mm256_loadu_ps(own.sums + 8 * i), sum);
        sums[token] = _mm256_fmadd_ps(joined(parts[token]), _mm256_set1_ps(d * own.unit), sum);
    }
}

// Of int16 in each half, the ith.
TARGET_AVX2 static MIXTOOLS_INLINE __m256i each(__m256i of, int i) {
    return _mm256_shuffle_epi8(of, _mm256_set1_epi16(static_cast<int16_t>(2 * i | (2 * i + 1) << 8)));
}

// 16 signed bytes as int16: those with even places, then the others.
TARGET_AVX2 static MIXTOOLS_INLINE __m256i even_and_odd(__m128i bytes) {
    const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    return _mm256_cvtepi8_epi16(_mm_shuffle_epi8(bytes, order));
}

// 16 int16 times a factor.
struct SixteenFloats {
    __m256 at[2];
};
TARGET_AVX2 static MIXTOOLS_INLINE SixteenFloats times(__m256i of, float factor) {
    const __m256 by = _mm256_set1_ps(factor);
    return {{_mm256_mul_ps(by, _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(of)))),
             _mm256_mul_ps(by, _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_extracti128_si256(of, 1))))}};
}

TARGET_AVX2 static MIXTOOLS_INLINE __m128i eight(uint64_t bytes) {
    return _mm_cvtsi64_si128(static_cast<int64_t>(bytes));
}

// How many values have a scale, and what is taken off a code (of types with minima and zeros: one of those).
template <typename Block> struct Type;

struct InOrder {
    static constexpr int column_of(int at) { return at; }
};

template <> struct Type<Q2_K> : InOrder {
    static constexpr int SCALED = 16, LESS = 1;
    template <int TOKENS>
    TARGET_AVX2 static MIXTOOLS_INLINE void take(const Q2_K& block, const X* x, int64_t stride, __m256* sums) {
        const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block.scales));
        const __m128i low = _mm_set1_epi8(15);
        const __m256i scales = even_and_odd(_mm_and_si128(packed, low));
        const __m256i minima = even_and_odd(_mm_and_si128(_mm_srli_epi16(packed, 4), low));
        Parts parts[TOKENS];
        MIXTOOLS_UNROLL
        for (int group = 0; group < 8; group++) {
            const __m256i codes = Set::cut(Set::load(block.qs + group / 4 * 32), group % 4 * 2, 3);
            add<TOKENS>(group, codes, each(scales, group), x, stride, parts);
        }
        const SixteenFloats offsets = times(minima, half_at(block.dmin));
        close<TOKENS, 16>(half_at(block.d), parts, offsets.at, x, stride, sums);
    }
};

template <> struct Type<Q3_K> : InOrder {
    static constexpr int SCALED = 16, LESS = 4;
    template <int TOKENS>
    TARGET_AVX2 static MIXTOOLS_INLINE void take(const Q3_K& block, const X* x, int64_t stride, __m256* sums) {
        const Sixteen packed = scales_of_16(block.scales);
        const __m256i scales = even_and_odd(_mm_unpacklo_epi64(eight(packed.first), eight(packed.last)));
        const __m256i mask = Set::load(block.hmask);
        Parts parts[TOKENS];
        MIXTOOLS_UNROLL
        for (int group = 0; group < 8; group++) {
            const __m256i codes = Set::cut(Set::load(block.qs + group / 4 * 32), group % 4 * 2, 3);
            const __m256i high = Set::cut(mask, group - 2, 4);
            add<TOKENS>(group, Set::either(codes, high), each(scales, group), x, stride, parts);
        }
        const float d = half_at(block.d);
        close<TOKENS, 16>(d, parts, times(scales, d).at, x, stride, sums);
    }
};

// Q4_K and Q5_K, whose codes differ.
template <int TOKENS, typename Block, typename Codes>
TARGET_AVX2 static MIXTOOLS_INLINE void take_with_minima(const Block& block, const Codes& codes, const X* x,
                                                         int64_t stride, __m256* sums) {
    const Sixteen packed = scales_and_minima(block.scales);
    const __m256i scales = _mm256_broadcastsi128_si256(_mm_cvtepi8_epi16(eight(packed.first)));
    Parts parts[TOKENS];
    MIXTOOLS_UNROLL
    for (int group = 0; group < 8; group++)
        add<TOKENS>(group, codes(group), each(scales, group), x, stride, parts);
    const __m256 minima = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight(packed.last)));
    const __m256 offsets = _mm256_mul_ps(_mm256_set1_ps(half_at(block.dmin)), minima);
    close<TOKENS, 8>(half_at(block.d), parts, &offsets, x, stride, sums);
}

template <> struct Type<Q4_K> : InOrder {
    static constexpr int SCALED = 32, LESS = 1;
    struct Codes {
        const Q4_K& block;
        TARGET_AVX2 MIXTOOLS_INLINE __m256i operator()(int group) const {
            return Set::cut(Set::load(block.qs + group / 2 * 32), group % 2 * 4, 15);
        }
    };
    template <int TOKENS>
    TARGET_AVX2 static MIXTOOLS_INLINE void take(const Q4_K& block, const X* x, int64_t stride, __m256* sums) {
        take_with_minima<TOKENS>(block, Codes{block}, x, stride, sums);
    }
};

template <> struct Type<Q5_K> : InOrder {
    static constexpr int SCALED = 32, LESS = 1;
    struct Codes {
        const Q5_K& block;
        __m256i high;
        TARGET_AVX2 MIXTOOLS_INLINE __m256i operator()(int group) const {
            const __m256i low = Set::cut(Set::load(block.qs + group / 2 * 32), group % 2 * 4, 15);
            return Set::either(low, Set::cut(high, group - 4, 16));
        }
    };
    template <int TOKENS>
    TARGET_AVX2 static MIXTOOLS_INLINE void take(const Q5_K& block, const X* x, int64_t stride, __m256* sums) {
        take_with_minima<TOKENS>(block, Codes{block, Set::load(block.qh)}, x, stride, sums);
    }
};

template <> struct Type<Q6_K> : InOrder {
    static constexpr int SCALED = 16, LESS = 32;
    template <int TOKENS>
    TARGET_AVX2 static MIXTOOLS_INLINE void take(const Q6_K& block, const X* x, int64_t stride, __m256* sums) {
        const __m256i scales = even_and_odd(_mm_loadu_si128(reinterpret_cast<const __m128i*>(block.scales)));
        Parts parts[TOKENS];
        MIXTOOLS_UNROLL
        for (int group = 0; group < 8; group++) {
            const int half = group / 4, quarter = group % 4;
            const __m256i low = Set::cut(Set::load(block.ql + half * 64 + quarter % 2 * 32), quarter / 2 * 4, 15);
            const __m256i high = Set::cut(Set::load(block.qh + half * 32), quarter * 2 - 4, 48);
            add<TOKENS>(group, Set::either(low, high), each(scales, group), x, stride, parts);
        }
        const float d = half_at(block.d);
        close<TOKENS, 16>(d, parts, times(scales, d).at, x, stride, sums);
    }
};

// Of 4 bits in groups of 64 and more. A scale is any number, so each group's sums become floats; pairs of products are
// added as int16 till then, 30720 at most.
template <int GROUPS> struct Type<Grouped<4, GROUPS>> {
    static constexpr int SCALED = 256 / GROUPS, LESS = 1;

    // Which value the byte at a place of a slice is of: codes lie in words (grouped.h).
    static constexpr int column_of(int at) {
        const int thirty_two = at / 32, first = thirty_two / 4 * 128 + thirty_two / 2 % 2 * 64 + thirty_two % 2 * 8;
        return first + at % 4 * 16 + at % 32 / 4;
    }
    TARGET_AVX2 static MIXTOOLS_INLINE __m256i codes(const Grouped<4, GROUPS>& block, int thirty_two) {
        const uint8_t* from = block.qs + thirty_two / 4 * 64 + thirty_two % 2 * 32;
        return Set::cut(Set::load(from), thirty_two / 2 % 2 * 4, 15);
    }
    template <int TOKENS>
    TARGET_AVX2 static MIXTOOLS_INLINE void take(const Grouped<4, GROUPS>& block, const X* x, int64_t stride,
                                                 __m256* sums) {
        constexpr int EACH = 8 / GROUPS;
        const __m256i ones = _mm256_set1_epi16(1);
        alignas(32) float offsets[8] = {};
        MIXTOOLS_UNROLL
        for (int group = 0; group < GROUPS; group++) {
            const float scale = block.scale(EACH * group);
            offsets[group] = scale * static_cast<float>(block.zero(EACH * group));
            Parts parts[TOKENS];
            MIXTOOLS_UNROLL
            for (int i = EACH * group; i < EACH * (group + 1); i++) {
                const __m256i own = codes(block, i);
                MIXTOOLS_UNROLL
                for (int token = 0; token < TOKENS; token++) {
                    MIXTOOLS_UNROLL
                    for (int slice = 0; slice < SLICES; slice++) {
                        __m256i& part = parts[token].at[slice];
                        const __m256i pairs = _mm256_maddubs_epi16(own, load(x[token * stride].bytes[slice] + 32 * i));
                        part = i % EACH ? _mm256_add_epi16(part, pairs) : pairs;
                    }
                }
            }
            MIXTOOLS_UNROLL
            for (int token = 0; token < TOKENS; token++) {
                for (__m256i& part : parts[token].at) part = _mm256_madd_epi16(part, ones);
                // first in x's unit: with the scale alone a factor might be a denormal
                const __m256 products = _mm256_mul_ps(joined(parts[token]), _mm256_set1_ps(x[token * stride].unit));
                sums[token] = _mm256_fmadd_ps(products, _mm256_set1_ps(scale), sums[token]);
            }
        }
        MIXTOOLS_UNROLL
        for (int token = 0; token < TOKENS; token++)
            sums[token] = _mm256_fnmadd_ps(_mm256_load_ps(offsets), _mm256_loadu_ps(x[token * stride].sums), sums[token]);
    }
};

// False for x that are not all finite.
template <typename Block> TARGET_AVX2 bool prepare(const float* x, int64_t blocks, X* out) {
    constexpr int SCALED = Type<Block>::SCALED;
    for (int64_t block = 0; block < blocks; block++, x += 256, out++) {
        uint32_t largest = 0;
        for (int i = 0; i < 256; i++) largest = std::max(largest, bits_of(x[i]) & 0x7fffffff);
        if (largest >= 0x7f800000) return false;
        const int exponent = std::max(static_cast<int>(largest >> 23) - 126, LEAST_EXPONENT);
        const float scale = float_of(static_cast<uint32_t>(127 + DIGITS - exponent) << 23);
        out->unit = float_of(static_cast<uint32_t>(127 + exponent - DIGITS) << 23);
        int32_t whole[256];
        constexpr float NEAREST = 12582912.f;  // 1.5 * 2^23: a sum with it has no digits behind the point
        for (int i = 0; i < 256; i++)
            whole[i] = static_cast<int32_t>(bits_of(x[i] * scale + NEAREST) - bits_of(NEAREST));
        for (int i = 0; i < 256; i++) {
            const int32_t own = whole[Type<Block>::column_of(i)];
            const int32_t low = static_cast<int8_t>(own), above = (own - low) >> 8;
            const int32_t middle = static_cast<int8_t>(above);
            out->bytes[0][i] = static_cast<int8_t>((above - middle) >> 8);
            out->bytes[1][i] = static_cast<int8_t>(middle);
            out->bytes[2][i] = static_cast<int8_t>(low);
        }
        for (float& sum : out->sums) sum = 0;
        for (int group = 0; group < 256 / SCALED; group++) {
            int32_t sum = 0;
            for (int i = 0; i < SCALED; i++) sum += whole[SCALED * group + i];
            const int at = SCALED > 16 ? group : group / 2 + group % 2 * 8;
            out->sums[at] = static_cast<float>(sum) * (out->unit * static_cast<float>(Type<Block>::LESS));
        }
    }
    return true;
}

template <typename Block, int TOKENS>
TARGET_AVX2 void multiply(const uint8_t* blocks, int64_t row_bytes, int64_t rows, int64_t count, const X* x,
                          int64_t stride, float* out, int64_t out_stride) {
    for (int64_t row = 0; row < rows; row++, blocks += row_bytes) {
        __m256 sums[TOKENS];
        for (int token = 0; token < TOKENS; token++) sums[token] = _mm256_setzero_ps();
        for (int64_t i = 0; i < count; i++) {
            const Block& block = reinterpret_cast<const Block*>(blocks)[i];
            ask_ahead(block);
            Type<Block>::template take<TOKENS>(block, x + i, stride, sums);
        }
        for (int token = 0; token < TOKENS; token++) out[token * out_stride + row] = Set::total_of(sums[token]);
    }
}

}  // namespace mixtools::blocks::slices
#endif
