// Products of blocks with vectors of bf16, by the machine's own dot product of bf16 (AVX-512 BF16).
//
// A code below 128 with a byte of 0x43 above it is a bf16: that code plus 128. So 64 codes become values by two
// interleavings, in the order in which `prepare` lays x. What the 128 add to a product is known beforehand, by the sums
// of x:
//
//     sum of scale * (code - zero) * x  =  scale * sum of (code + 128) * x  -  (128 + zero) * scale * sum of x
//
// Products of two bf16 are exact in fp32, and sums are fp32; the 128 cost about seven of its bits, of which fifteen more
// are left than a bf16 of the result has.
#pragma once

#include "ahead.h"
#include "codes.h"

#if MIXTOOLS_AVX512_BF16
namespace mixtools::blocks::narrow {

constexpr int BIAS = 128, BIAS_BYTE = 0x43;

// 256 values of x: in each 64 those of group `first` of 32 and of the group `APART` behind it, the first 8 of each 16,
// then the last. With them the sums of each 16, or of each 32 values: times what is to be taken off, then as they are.
struct X {
    uint16_t values[256];
    float sums[32];
};

// How a type groups: `apart` as above, values with a scale of their own, and what is taken off a code with its 128.
struct Order {
    int apart, scaled, less;
};
constexpr int WORDS = 0;  // as `apart`: 64 values side by side, in words of 16 columns (grouped.h)

// The first group of each 64 values.
inline int first_group(int sixty_four, int apart) {
    return apart == 4 ? sixty_four : sixty_four / 2 * 4 + sixty_four % 2;
}

// Which of 256 values lies there.
inline int column_of(int at, int apart) {
    const int half = at / 32 % 2, lane = at / 8 % 4;  // of 64 values: first or last 8, of which 16
    if (apart == WORDS) return at / 64 * 64 + at % 4 * 16 + 4 * lane + 2 * half + at / 4 % 2;
    const int group = first_group(at / 64, apart) + lane / 2 * apart;
    return 32 * group + 16 * (lane % 2) + 8 * half + at % 8;
}

using Set = Avx512Codes;

// Of one token: the products so far, in lanes, and what is to be taken from them.
struct Sum {
    __m512 products, less;
};

// 64 codes below 128 at their place in x; `scales` of each lane.
template <int TOKENS>
TARGET_AVX512_BF16 static MIXTOOLS_INLINE void add(int sixty_four, __m512i codes, __m512 scales, const X* x,
                                                   int64_t stride, Sum* sums) {
    const __m512i above = _mm512_set1_epi8(BIAS_BYTE);
    const auto low = (__m512bh)_mm512_unpacklo_epi8(codes, above), high = (__m512bh)_mm512_unpackhi_epi8(codes, above);
    MIXTOOLS_UNROLL
    for (int token = 0; token < TOKENS; token++) {
        const uint16_t* at = x[token * stride].values + 64 * sixty_four;
        __m512 products = _mm512_dpbf16_ps(_mm512_setzero_ps(), low, (__m512bh)_mm512_loadu_si512(at));
        products = _mm512_dpbf16_ps(products, high, (__m512bh)_mm512_loadu_si512(at + 32));
        sums[token].products = _mm512_fmadd_ps(scales, products, sums[token].products);
    }
}

// factors[i] times the ith of x's sums from `at` on.
template <int TOKENS>
TARGET_AVX512_BF16 static MIXTOOLS_INLINE void less(__m512 factors, const X* x, int64_t stride, int at, Sum* sums) {
    MIXTOOLS_UNROLL
    for (int token = 0; token < TOKENS; token++)
        sums[token].less = _mm512_fmadd_ps(factors, _mm512_loadu_ps(x[token * stride].sums + at), sums[token].less);
}

// A scale for each group of 32, or of each 16 values, in the lanes of their codes.
TARGET_AVX512 static MIXTOOLS_INLINE __m512 by_32(__m512 scales, int sixty_four, int apart = 2) {
    if (apart == WORDS) {
        const __m512i two = _mm512_set1_epi64(static_cast<int64_t>(2 * sixty_four + 1) << 32 | 2 * sixty_four);
        return _mm512_permutexvar_ps(two, scales);
    }
    const __m512i first = _mm512_set1_epi32(first_group(sixty_four, apart));
    return _mm512_permutexvar_ps(_mm512_mask_add_epi32(first, 0xff00, first, _mm512_set1_epi32(apart)), scales);
}
TARGET_AVX512 static MIXTOOLS_INLINE __m512 by_16(__m512 scales, int sixty_four) {
    const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 8, 8, 8, 8, 9, 9, 9, 9);
    return _mm512_permutexvar_ps(_mm512_add_epi32(lanes, _mm512_set1_epi32(2 * sixty_four)), scales);
}

TARGET_AVX512 static MIXTOOLS_INLINE __m512i shifted(__m512i codes, int right) {
    if (right > 0) return _mm512_srli_epi16(codes, right);
    return right < 0 ? _mm512_slli_epi16(codes, -right) : codes;
}
TARGET_AVX512 static MIXTOOLS_INLINE __m512i masked(__m512i codes, int mask) {
    return _mm512_and_si512(codes, _mm512_set1_epi8(static_cast<char>(mask)));
}
// `codes` and those bits of `more` that the mask has.
TARGET_AVX512 static MIXTOOLS_INLINE __m512i joined(__m512i codes, __m512i more, int mask) {
    constexpr int OR_AND = 0xf8;  // a | b & c
    return _mm512_ternarylogic_epi32(codes, more, _mm512_set1_epi8(static_cast<char>(mask)), OR_AND);
}
TARGET_AVX512 static MIXTOOLS_INLINE __m512i load_two(const uint8_t* first, const uint8_t* last) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(Set::load(first)), Set::load(last), 1);
}

template <typename Block> struct Type;

template <> struct Type<Q2_K> {
    static constexpr Order ORDER{4, 16, BIAS};
    template <int TOKENS>
    TARGET_AVX512_BF16 static MIXTOOLS_INLINE void take(const Q2_K& block, const X* x, int64_t stride, Sum* sums) {
        const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block.scales));
        const __m128i low = _mm_and_si128(packed, _mm_set1_epi8(15));
        const __m128i high = _mm_and_si128(_mm_srli_epi16(packed, 4), _mm_set1_epi8(15));
        const __m512 d = Set::half(block.d), dmin = Set::half(block.dmin);
        const __m512 scales = Set::scaled<Offset::NONE>(low, d, d);
        less<TOKENS>(scales, x, stride, 0, sums);
        less<TOKENS>(Set::scaled<Offset::NONE>(high, dmin, dmin), x, stride, 16, sums);
        const __m512i codes = _mm512_loadu_si512(block.qs);
        MIXTOOLS_UNROLL
        for (int i = 0; i < 4; i++)
            add<TOKENS>(i, masked(shifted(codes, 2 * i), 3), by_16(scales, i), x, stride, sums);
    }
};

template <> struct Type<Q3_K> {
    static constexpr Order ORDER{4, 16, BIAS + 4};
    template <int TOKENS>
    TARGET_AVX512_BF16 static MIXTOOLS_INLINE void take(const Q3_K& block, const X* x, int64_t stride, Sum* sums) {
        const Sixteen packed = scales_of_16(block.scales);
        const __m512 d = Set::half(block.d);
        const __m512 scales = Set::scaled<Offset::NONE>(
            _mm_set_epi64x(static_cast<int64_t>(packed.last), static_cast<int64_t>(packed.first)), d, d);
        less<TOKENS>(scales, x, stride, 0, sums);
        const __m256i mask = Set::load(block.hmask);
        const __m512i codes = _mm512_loadu_si512(block.qs);
        const __m512i high = _mm512_inserti64x4(_mm512_castsi256_si512(mask), _mm256_srli_epi16(mask, 4), 1);
        MIXTOOLS_UNROLL
        for (int i = 0; i < 4; i++)
            add<TOKENS>(i, joined(masked(shifted(codes, 2 * i), 3), shifted(high, i - 2), 4), by_16(scales, i), x,
                        stride, sums);
    }
};

// Scales and minima of Q4_K and Q5_K in one: 8 of each.
template <int TOKENS, typename Block>
TARGET_AVX512_BF16 static MIXTOOLS_INLINE __m512 scales_of(const Block& block, const X* x, int64_t stride, Sum* sums) {
    const Sixteen packed = scales_and_minima(block.scales);
    const __m512 factors = _mm512_mask_blend_ps(0xff00, Set::half(block.d), Set::half(block.dmin));
    const __m512 scales = Set::scaled<Offset::NONE>(
        _mm_set_epi64x(static_cast<int64_t>(packed.last), static_cast<int64_t>(packed.first)), factors, factors);
    less<TOKENS>(scales, x, stride, 0, sums);
    return scales;
}

template <> struct Type<Q4_K> {
    static constexpr Order ORDER{2, 32, BIAS};
    template <int TOKENS>
    TARGET_AVX512_BF16 static MIXTOOLS_INLINE void take(const Q4_K& block, const X* x, int64_t stride, Sum* sums) {
        const __m512 scales = scales_of<TOKENS>(block, x, stride, sums);
        MIXTOOLS_UNROLL
        for (int i = 0; i < 4; i++) {
            const __m512i codes = _mm512_loadu_si512(block.qs + i / 2 * 64);
            add<TOKENS>(i, masked(shifted(codes, i % 2 * 4), 15), by_32(scales, i), x, stride, sums);
        }
    }
};

template <> struct Type<Q5_K> {
    static constexpr Order ORDER{2, 32, BIAS};
    template <int TOKENS>
    TARGET_AVX512_BF16 static MIXTOOLS_INLINE void take(const Q5_K& block, const X* x, int64_t stride, Sum* sums) {
        const __m512 scales = scales_of<TOKENS>(block, x, stride, sums);
        const __m256i bits = Set::load(block.qh);
        const __m512i high = _mm512_inserti64x4(_mm512_castsi256_si512(bits), _mm256_srli_epi16(bits, 2), 1);
        MIXTOOLS_UNROLL
        for (int i = 0; i < 4; i++) {
            const __m512i low = masked(shifted(_mm512_loadu_si512(block.qs + i / 2 * 64), i % 2 * 4), 15);
            add<TOKENS>(i, joined(low, shifted(high, first_group(i, 2) - 4), 16), by_32(scales, i), x, stride, sums);
        }
    }
};

template <> struct Type<Q6_K> {
    static constexpr Order ORDER{4, 16, BIAS + 32};
    template <int TOKENS>
    TARGET_AVX512_BF16 static MIXTOOLS_INLINE void take(const Q6_K& block, const X* x, int64_t stride, Sum* sums) {
        const __m512 d = Set::half(block.d);
        const __m512 scales =
            Set::scaled<Offset::NONE>(_mm_loadu_si128(reinterpret_cast<const __m128i*>(block.scales)), d, d);
        less<TOKENS>(scales, x, stride, 0, sums);
        const __m512i high = _mm512_loadu_si512(block.qh);
        MIXTOOLS_UNROLL
        for (int i = 0; i < 4; i++) {
            const uint8_t* from = block.ql + i % 2 * 32;
            const __m512i low = masked(shifted(load_two(from, from + 64), i / 2 * 4), 15);
            add<TOKENS>(i, joined(low, shifted(high, 2 * i - 4), 48), by_16(scales, i), x, stride, sums);
        }
    }
};

// Four words of 3 bytes, each in the high bytes of 32 bits.
TARGET_AVX512 static MIXTOOLS_INLINE __m128i four_words(const uint8_t* at) {
    const __m128i spread = _mm_setr_epi8(-1, 0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11);
    return _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)), spread);
}

// Of a block's words the scales of each 32 values, 8 of them, then the same times their zeros.
template <int GROUPS> TARGET_AVX512 static MIXTOOLS_INLINE __m512 scales_and_offsets(const uint8_t* words) {
    const __m128i low = four_words(words), high = GROUPS > 4 ? four_words(words + 12) : low;
    const __m512i all = _mm512_castsi256_si512(_mm256_set_m128i(high, low));
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7);
    constexpr int SHARE = GROUPS == 8 ? 0 : GROUPS == 4 ? 1 : GROUPS == 2 ? 2 : 3;  // log2 of the lanes of a group
    const __m512i each = _mm512_permutexvar_epi32(_mm512_srli_epi32(lane, SHARE), all);
    const __m512 scales = _mm512_castsi512_ps(_mm512_and_si512(each, _mm512_set1_epi32(static_cast<int>(SCALE_BITS))));
    const __m512i zeros = _mm512_and_si512(_mm512_srli_epi32(each, 8), _mm512_set1_epi32(31));
    return _mm512_mask_mul_ps(scales, 0xff00, scales, _mm512_cvtepi32_ps(zeros));
}

template <int BITS, int GROUPS> struct Type<Grouped<BITS, GROUPS>> {
    static constexpr Order ORDER{BITS == 4 ? WORDS : 4, 32, BIAS};
    TARGET_AVX512_BF16 static MIXTOOLS_INLINE __m512i codes(const Grouped<BITS, GROUPS>& block, int i) {
        if constexpr (BITS == 4) return masked(shifted(_mm512_loadu_si512(block.qs + i / 2 * 64), i % 2 * 4), 15);
        const __m512i low = masked(shifted(_mm512_loadu_si512(block.qs), 2 * i), 3);
        const __m256i bits = Set::load(block.qs + 64);
        const __m512i high = _mm512_inserti64x4(_mm512_castsi256_si512(bits), _mm256_srli_epi16(bits, 4), 1);
        return joined(low, shifted(high, i - 2), 4);
    }
    template <int TOKENS>
    TARGET_AVX512_BF16 static MIXTOOLS_INLINE void take(const Grouped<BITS, GROUPS>& block, const X* x, int64_t stride,
                                                        Sum* sums) {
        const __m512 scales = scales_and_offsets<GROUPS>(block.words);
        less<TOKENS>(scales, x, stride, 0, sums);
        MIXTOOLS_UNROLL
        for (int i = 0; i < 4; i++)
            add<TOKENS>(i, codes(block, i), by_32(scales, i, ORDER.apart), x, stride, sums);
    }
};

template <typename Block> bool prepare(const float* x, int64_t blocks, X* out) {
    constexpr Order order = Type<Block>::ORDER;
    for (int64_t block = 0; block < blocks; block++, x += 256, out++) {
        const int groups = 256 / order.scaled;
        for (int group = 0; group < groups; group++) {
            float sum = 0;
            for (int i = 0; i < order.scaled; i++) sum += x[order.scaled * group + i];
            out->sums[group] = static_cast<float>(order.less) * sum;
            out->sums[groups + group] = sum;
        }
        for (int at = 0; at < 256; at++) out->values[at] = to_bf16(x[column_of(at, order.apart)]);
    }
    return true;
}

// A row after the other, so that memory is read in the order that the processor foresees: several rows in turns, or a run
// of columns after the other, read x less often from the second cache, and were measured to be slower.
template <typename Block, int TOKENS>
TARGET_AVX512_BF16 void multiply(const uint8_t* blocks, int64_t row_bytes, int64_t rows, int64_t count, const X* x,
                                 int64_t stride, float* out, int64_t out_stride) {
    for (int64_t row = 0; row < rows; row++, blocks += row_bytes) {
        Sum sums[TOKENS];
        for (int token = 0; token < TOKENS; token++) sums[token] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t i = 0; i < count; i++) {
            const Block& block = reinterpret_cast<const Block*>(blocks)[i];
            ask_ahead(block);
            Type<Block>::template take<TOKENS>(block, x + i, stride, sums);
        }
        for (int token = 0; token < TOKENS; token++)
            out[token * out_stride + row] =
                _mm512_reduce_add_ps(_mm512_sub_ps(sums[token].products, sums[token].less));
    }
}

}  // namespace mixtools::blocks::narrow
#endif
