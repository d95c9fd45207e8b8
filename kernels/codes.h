// 32 codes at a time, each a signed byte, on each instruction set: cut out of packed bits, scaled, and stored or
// multiplied.
//
// The classes have the same functions, which give the same bytes: sums run in 32 lanes, each by itself, and are added
// up as a tree in the end. Those with vectors take regular blocks only: none of their values is NaN, or a denormal,
// which the hardware's own bf16 takes for zero.
#pragma once

#include "grouped.h"

namespace mixtools::blocks {

// A code q becomes q * scale, q * scale + offset, q * scale - offset, q * scale * offset or NF4_LEVELS[q] * scale.
// EXACT is MINUS of numbers that give exact products and differences, so that it may be one operation.
enum class Offset { NONE, PLUS, MINUS, EXACT, TIMES, LEVEL };

// How far right the bits of the codes of 16 columns, the nth of 8 runs of them, lie in words (grouped.h).
constexpr int shift_of(int run) { return run % 4 * 8 + run / 4 * 4; }

struct PlainCodes {
    static constexpr bool IRREGULAR = true;
    struct Codes {
        int8_t at[32];
    };
    struct Nibbles {  // the codes of 32 columns, the groupth of 4, in words
        const uint8_t* words;
        int group;
    };
    using Factor = float;  // a scale or an offset; with vectors, once for each value of a vector
    struct Factors {       // of the first 16 codes and of the last
        Factor scale[2], offset[2];
    };

    static MIXTOOLS_INLINE Codes load(const uint8_t* from) {
        Codes codes;
        std::memcpy(codes.at, from, 32);
        return codes;
    }
    static MIXTOOLS_INLINE const uint8_t* words(const uint8_t* from) { return from; }
    static MIXTOOLS_INLINE int code(const Codes& codes, int i) { return codes.at[i]; }
    static MIXTOOLS_INLINE int code(Nibbles codes, int i) {
        return word_at(codes.words + i % 16 * 4) >> shift_of(2 * codes.group + i / 16) & 15;
    }
    // The low four bits of 16 bytes, then the high ones.
    static MIXTOOLS_INLINE Codes halves(const uint8_t* from) {
        Codes codes;
        for (int i = 0; i < 16; i++) {
            codes.at[i] = from[i] & 15;
            codes.at[i + 16] = from[i] >> 4;
        }
        return codes;
    }
    // The bits of each code moved right, or left if `shift` is negative; those outside `mask` cleared.
    static MIXTOOLS_INLINE Codes cut(Codes codes, int shift, int mask) {
        for (int8_t& code : codes.at) {
            const int bits = static_cast<uint8_t>(code);
            code = static_cast<int8_t>((shift < 0 ? bits << -shift : bits >> shift) & mask);
        }
        return codes;
    }
    // 16 where a bit is set, else 0.
    static MIXTOOLS_INLINE Codes sixteens(uint32_t bits) {
        Codes codes;
        for (int i = 0; i < 32; i++) codes.at[i] = static_cast<int8_t>((bits >> i & 1) << 4);
        return codes;
    }
    static MIXTOOLS_INLINE Codes either(Codes a, Codes b) {
        for (int i = 0; i < 32; i++) a.at[i] = static_cast<int8_t>(a.at[i] | b.at[i]);
        return a;
    }
    static MIXTOOLS_INLINE Codes minus(Codes codes, int value) {
        for (int8_t& code : codes.at) code = static_cast<int8_t>(code - value);
        return codes;
    }
    static MIXTOOLS_INLINE Codes lookup(Codes codes, const int8_t* values) {
        for (int8_t& code : codes.at) code = values[code];
        return codes;
    }
    static MIXTOOLS_INLINE Factor half(const uint8_t* at) { return half_at(at); }
    static MIXTOOLS_INLINE Factor each(float value) { return value; }
    // 8 bytes times `first`, then 8 times `last`; `out` starts at a line.
    static MIXTOOLS_INLINE void products(Sixteen bytes, Factor first, Factor last, float* out) {
        for (int i = 0; i < 8; i++) out[i] = first * static_cast<int8_t>(bytes.first >> 8 * i & 255);
        for (int i = 0; i < 8; i++) out[8 + i] = last * static_cast<int8_t>(bytes.last >> 8 * i & 255);
    }
    template <int TO, Offset OFFSET, typename Source>
    static MIXTOOLS_INLINE void put(const Source& codes, const Factors& by, uint8_t* out, bool) {
        float values[32];
        for (int i = 0; i < 32; i++) {
            const int bits = code(codes, i);
            const float product = by.scale[i / 16] * (OFFSET == Offset::LEVEL ? NF4_LEVELS[bits] : bits);
            if constexpr (OFFSET == Offset::NONE || OFFSET == Offset::LEVEL) values[i] = one_nan(product);
            if constexpr (OFFSET == Offset::TIMES) values[i] = one_nan(product * by.offset[i / 16]);
            if constexpr (OFFSET == Offset::PLUS) values[i] = one_nan(product + by.offset[i / 16]);
            if constexpr (OFFSET == Offset::MINUS || OFFSET == Offset::EXACT)
                values[i] = one_nan(product - by.offset[i / 16]);
        }
        if constexpr (TO == F32) {
            std::memcpy(out, values, sizeof(values));
        } else {
            uint16_t rounded[32];
            for (int i = 0; i < 32; i++) rounded[i] = TO == BF16 ? to_bf16(values[i]) : to_f16(values[i]);
            std::memcpy(out, rounded, sizeof(rounded));
        }
    }
    static void finish() {}

    struct Sums {  // of each of the 32 places
        float at[32];
    };
    static MIXTOOLS_INLINE Sums no_sums() { return Sums{}; }
    // sums[t] += value * x of token t, in each place, with one rounding.
    template <Offset OFFSET, int TOKENS, typename Source>
    static MIXTOOLS_INLINE void dot(const Source& codes, const Factors& by, const float* x, int64_t x_stride,
                                    Sums* sums) {
        float values[32];
        put<F32, OFFSET>(codes, by, reinterpret_cast<uint8_t*>(values), false);
        for (int token = 0; token < TOKENS; token++)
            for (int i = 0; i < 32; i++)
                sums[token].at[i] = __builtin_fmaf(values[i], x[token * x_stride + i], sums[token].at[i]);
    }
    static MIXTOOLS_INLINE float total(Sums sums) {
        for (int half = 16; half > 0; half /= 2)
            for (int i = 0; i < half; i++) sums.at[i] = sums.at[i] + sums.at[i + half];
        return sums.at[0];
    }
};

#if MIXTOOLS_X86

struct Avx2Codes {
    static constexpr bool IRREGULAR = false;
    static constexpr int NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    using Codes = __m256i;
    struct Words { __m256i first, last; };
    struct Nibbles { Words words; int group; };
    using Factor = __m256;
    struct Factors {
        Factor scale[2], offset[2];
    };

    TARGET_AVX2 static MIXTOOLS_INLINE Words words(const uint8_t* from) { return {load(from), load(from + 32)}; }
    TARGET_AVX2 static MIXTOOLS_INLINE Codes load(const uint8_t* from) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    }
    TARGET_AVX2 static MIXTOOLS_INLINE Codes halves(const uint8_t* from) {
        const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        const __m256i moved = _mm256_srlv_epi32(twice, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
        return _mm256_and_si256(moved, _mm256_set1_epi8(15));
    }
    TARGET_AVX2 static MIXTOOLS_INLINE Codes cut(Codes codes, int shift, int mask) {
        if (shift < 0) codes = _mm256_slli_epi16(codes, -shift);
        if (shift > 0) codes = _mm256_srli_epi16(codes, shift);
        return _mm256_and_si256(codes, _mm256_set1_epi8(static_cast<char>(mask)));
    }
    TARGET_AVX2 static MIXTOOLS_INLINE Codes sixteens(uint32_t bits) {
        const __m256i byte_of_code = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
        const __m256i bit_of_code = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
        const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(bits)), byte_of_code);
        const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit_of_code), bit_of_code);
        return _mm256_and_si256(set, _mm256_set1_epi8(16));
    }
    TARGET_AVX2 static MIXTOOLS_INLINE Codes either(Codes a, Codes b) { return _mm256_or_si256(a, b); }
    TARGET_AVX2 static MIXTOOLS_INLINE Codes minus(Codes codes, int value) {
        return _mm256_sub_epi8(codes, _mm256_set1_epi8(static_cast<char>(value)));
    }
    TARGET_AVX2 static MIXTOOLS_INLINE Codes lookup(Codes codes, const int8_t* values) {
        const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), codes);
    }
    TARGET_AVX2 static MIXTOOLS_INLINE Factor half(const uint8_t* at) {
        return _mm256_cvtph_ps(_mm_set1_epi16(static_cast<int16_t>(half_word_at(at))));
    }
    TARGET_AVX2 static MIXTOOLS_INLINE Factor each(float value) { return _mm256_set1_ps(value); }
    TARGET_AVX2 static MIXTOOLS_INLINE void products(Sixteen bytes, Factor first, Factor last, float* out) {
        const __m128i low = _mm_cvtsi64_si128(static_cast<int64_t>(bytes.first));
        const __m128i high = _mm_cvtsi64_si128(static_cast<int64_t>(bytes.last));
        _mm256_store_ps(out, scaled<Offset::NONE>(low, first, first));
        _mm256_store_ps(out + 8, scaled<Offset::NONE>(high, last, last));
    }
    // Eight of 32 codes; of those of levels the low four bits count.
    template <Offset> TARGET_AVX2 static MIXTOOLS_INLINE __m256i wide(Codes codes, int eight) {
        const __m128i sixteen = eight / 2 ? _mm256_extracti128_si256(codes, 1) : _mm256_castsi256_si128(codes);
        return _mm256_cvtepi8_epi32(eight % 2 ? _mm_srli_si128(sixteen, 8) : sixteen);
    }
    template <Offset OFFSET> TARGET_AVX2 static MIXTOOLS_INLINE __m256i wide(const Nibbles& codes, int eight) {
        const __m256i words = eight % 2 ? codes.words.last : codes.words.first;
        const __m256i moved = _mm256_srli_epi32(words, shift_of(2 * codes.group + eight / 2));
        return OFFSET == Offset::LEVEL ? moved : _mm256_and_si256(moved, _mm256_set1_epi32(15));
    }
    // Of the first 8 of the 16 codes there.
    template <Offset OFFSET>
    TARGET_AVX2 static MIXTOOLS_INLINE __m256 scaled(__m128i codes, Factor scale, Factor offset) {
        return scaled<OFFSET>(_mm256_cvtepi8_epi32(codes), scale, offset);
    }
    template <Offset OFFSET>
    TARGET_AVX2 static MIXTOOLS_INLINE __m256 scaled(__m256i codes, Factor scale, Factor offset) {
        if constexpr (OFFSET == Offset::LEVEL) return _mm256_mul_ps(scale, levels(codes));
        if constexpr (OFFSET == Offset::EXACT) return _mm256_fmsub_ps(scale, _mm256_cvtepi32_ps(codes), offset);
        const __m256 product = _mm256_mul_ps(scale, _mm256_cvtepi32_ps(codes));
        if constexpr (OFFSET == Offset::TIMES) return _mm256_mul_ps(product, offset);
        if constexpr (OFFSET == Offset::PLUS) return _mm256_add_ps(product, offset);
        if constexpr (OFFSET == Offset::MINUS) return _mm256_sub_ps(product, offset);
        return product;
    }
    TARGET_AVX2 static MIXTOOLS_INLINE __m256 levels(__m256i codes) {
        const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(NF4_LEVELS), codes);
        const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(NF4_LEVELS + 8), codes);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
    }
    // to_bf16, in 32 bits each.
    TARGET_AVX2 static MIXTOOLS_INLINE __m256i rounded(__m256 values) {
        const __m256i bits = _mm256_castps_si256(values);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        return _mm256_srli_epi32(sum, 16);
    }
    TARGET_AVX2 static MIXTOOLS_INLINE void store(uint8_t* out, __m256i value, bool stream) {
        if (stream)
            _mm256_stream_si256(reinterpret_cast<__m256i*>(out), value);
        else
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), value);
    }
    template <int TO, Offset OFFSET, typename Source>
    TARGET_AVX2 static MIXTOOLS_INLINE void put(const Source& codes, const Factors& by, uint8_t* out, bool stream) {
        MIXTOOLS_UNROLL
        for (int half = 0; half < 2; half++) {
            const __m256 a = scaled<OFFSET>(wide<OFFSET>(codes, 2 * half), by.scale[half], by.offset[half]);
            const __m256 b = scaled<OFFSET>(wide<OFFSET>(codes, 2 * half + 1), by.scale[half], by.offset[half]);
            if constexpr (TO == F32) {
                store(out + half * 64, _mm256_castps_si256(a), stream);
                store(out + half * 64 + 32, _mm256_castps_si256(b), stream);
            } else if constexpr (TO == BF16) {
                const __m256i words = _mm256_packus_epi32(rounded(a), rounded(b));  // quarters of a, b, a and b
                store(out + half * 32, _mm256_permute4x64_epi64(words, 0xd8), stream);
            } else {
                const __m128i first = _mm256_cvtps_ph(a, NEAREST), last = _mm256_cvtps_ph(b, NEAREST);
                store(out + half * 32, _mm256_set_m128i(last, first), stream);
            }
        }
    }
    static void finish() { _mm_sfence(); }

    struct Sums {
        __m256 at[4];
    };
    TARGET_AVX2 static MIXTOOLS_INLINE Sums no_sums() {
        const __m256 zero = _mm256_setzero_ps();
        return {{zero, zero, zero, zero}};
    }
    template <Offset OFFSET, int TOKENS, typename Source>
    TARGET_AVX2 static MIXTOOLS_INLINE void dot(const Source& codes, const Factors& by, const float* x,
                                                int64_t x_stride, Sums* sums) {
        MIXTOOLS_UNROLL
        for (int eight = 0; eight < 4; eight++) {
            const __m256 values = scaled<OFFSET>(wide<OFFSET>(codes, eight), by.scale[eight / 2], by.offset[eight / 2]);
            MIXTOOLS_UNROLL
            for (int token = 0; token < TOKENS; token++) {
                const __m256 factors = _mm256_loadu_ps(x + token * x_stride + eight * 8);
                sums[token].at[eight] = _mm256_fmadd_ps(values, factors, sums[token].at[eight]);
            }
        }
    }
    TARGET_AVX2 static MIXTOOLS_INLINE float total(const Sums& sums) {
        const __m256 a = _mm256_add_ps(sums.at[0], sums.at[2]), b = _mm256_add_ps(sums.at[1], sums.at[3]);
        return total_of(_mm256_add_ps(a, b));
    }
    TARGET_AVX2 static MIXTOOLS_INLINE float total_of(__m256 eight) {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
    }
};

struct Avx512Codes : Avx2Codes {
    using Words = __m512i;
    struct Nibbles {
        Words words;
        int group;
    };
    using Factor = __m512;
    struct Factors {
        Factor scale[2], offset[2];
    };

    TARGET_AVX512 static MIXTOOLS_INLINE Words words(const uint8_t* from) { return _mm512_loadu_si512(from); }
    TARGET_AVX512 static MIXTOOLS_INLINE Codes sixteens(uint32_t bits) {
        return _mm512_castsi512_si256(_mm512_maskz_mov_epi8(bits, _mm512_set1_epi8(16)));
    }
    TARGET_AVX512 static MIXTOOLS_INLINE Factor half(const uint8_t* at) {
        return _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<int16_t>(half_word_at(at))));
    }
    TARGET_AVX512 static MIXTOOLS_INLINE Factor each(float value) { return _mm512_set1_ps(value); }
    TARGET_AVX512 static MIXTOOLS_INLINE void products(Sixteen bytes, Factor first, Factor last, float* out) {
        const __m128i sixteen = _mm_set_epi64x(static_cast<int64_t>(bytes.last), static_cast<int64_t>(bytes.first));
        const __m512 factors = _mm512_mask_blend_ps(0xff00, first, last);
        _mm512_store_ps(out, scaled<Offset::NONE>(sixteen, factors, factors));
    }
    // 16 of 32 codes; of those of levels the low four bits count.
    template <Offset> TARGET_AVX512 static MIXTOOLS_INLINE __m512i wide(Codes codes, int half) {
        return _mm512_cvtepi8_epi32(half ? _mm256_extracti128_si256(codes, 1) : _mm256_castsi256_si128(codes));
    }
    template <Offset OFFSET> TARGET_AVX512 static MIXTOOLS_INLINE __m512i wide(const Nibbles& codes, int half) {
        const __m512i moved = _mm512_srli_epi32(codes.words, shift_of(2 * codes.group + half));
        return OFFSET == Offset::LEVEL ? moved : _mm512_and_si512(moved, _mm512_set1_epi32(15));
    }
    template <Offset OFFSET>
    TARGET_AVX512 static MIXTOOLS_INLINE __m512 scaled(__m128i codes, Factor scale, Factor offset) {
        return scaled<OFFSET>(_mm512_cvtepi8_epi32(codes), scale, offset);
    }
    template <Offset OFFSET>
    TARGET_AVX512 static MIXTOOLS_INLINE __m512 scaled(__m512i codes, Factor scale, Factor offset) {
        if constexpr (OFFSET == Offset::LEVEL)
            return _mm512_mul_ps(scale, _mm512_permutexvar_ps(codes, _mm512_load_ps(NF4_LEVELS)));
        if constexpr (OFFSET == Offset::EXACT) return _mm512_fmsub_ps(scale, _mm512_cvtepi32_ps(codes), offset);
        const __m512 product = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(codes));
        if constexpr (OFFSET == Offset::TIMES) return _mm512_mul_ps(product, offset);
        if constexpr (OFFSET == Offset::PLUS) return _mm512_add_ps(product, offset);
        if constexpr (OFFSET == Offset::MINUS) return _mm512_sub_ps(product, offset);
        return product;
    }
    // to_bf16: the high halves, and one more where adding 0x7fff, or 0x8000 to an odd one, carries out of the low
    // halves. An average keeps that carry: (x + y + 1) / 2.
    TARGET_AVX512 static MIXTOOLS_INLINE __m512i rounded(__m512 first, __m512 last) {
        alignas(64) static constexpr uint16_t LOW[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20,
                                                         22, 24, 26, 28, 30, 32, 34, 36, 38, 40, 42,
                                                         44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
        const __m512i a = _mm512_castps_si512(first), b = _mm512_castps_si512(last);
        const __m512i even = _mm512_load_si512(LOW), one = _mm512_set1_epi16(1);
        const __m512i low = _mm512_permutex2var_epi16(a, even, b);
        const __m512i high = _mm512_permutex2var_epi16(a, _mm512_or_si512(even, one), b);
        constexpr int AND_OR = 0xea;  // high & one | 0x7ffe
        const __m512i added = _mm512_ternarylogic_epi32(high, one, _mm512_set1_epi16(0x7ffe), AND_OR);
        return _mm512_add_epi16(high, _mm512_srli_epi16(_mm512_avg_epu16(low, added), 15));
    }
    TARGET_AVX512 static MIXTOOLS_INLINE void store(uint8_t* out, __m512i value, bool stream) {
        if (stream)
            _mm512_stream_si512(reinterpret_cast<__m512i*>(out), value);
        else
            _mm512_storeu_si512(out, value);
    }
    template <int TO, Offset OFFSET, typename Source>
    TARGET_AVX512 static MIXTOOLS_INLINE void put(const Source& codes, const Factors& by, uint8_t* out, bool stream) {
        const __m512 a = scaled<OFFSET>(wide<OFFSET>(codes, 0), by.scale[0], by.offset[0]);
        const __m512 b = scaled<OFFSET>(wide<OFFSET>(codes, 1), by.scale[1], by.offset[1]);
        if constexpr (TO == F32) {
            store(out, _mm512_castps_si512(a), stream);
            store(out + 64, _mm512_castps_si512(b), stream);
        } else if constexpr (TO == BF16) {
            store(out, rounded(a, b), stream);
        } else {
            const __m512i first = _mm512_castsi256_si512(_mm512_cvtps_ph(a, NEAREST));
            store(out, _mm512_inserti64x4(first, _mm512_cvtps_ph(b, NEAREST), 1), stream);
        }
    }

    struct Sums {
        __m512 at[2];
    };
    TARGET_AVX512 static MIXTOOLS_INLINE Sums no_sums() { return {{_mm512_setzero_ps(), _mm512_setzero_ps()}}; }
    template <Offset OFFSET, int TOKENS, typename Source>
    TARGET_AVX512 static MIXTOOLS_INLINE void dot(const Source& codes, const Factors& by, const float* x,
                                                  int64_t x_stride, Sums* sums) {
        const __m512 a = scaled<OFFSET>(wide<OFFSET>(codes, 0), by.scale[0], by.offset[0]);
        const __m512 b = scaled<OFFSET>(wide<OFFSET>(codes, 1), by.scale[1], by.offset[1]);
        MIXTOOLS_UNROLL
        for (int token = 0; token < TOKENS; token++) {
            const float* at = x + token * x_stride;
            sums[token].at[0] = _mm512_fmadd_ps(a, _mm512_loadu_ps(at), sums[token].at[0]);
            sums[token].at[1] = _mm512_fmadd_ps(b, _mm512_loadu_ps(at + 16), sums[token].at[1]);
        }
    }
    TARGET_AVX512 static MIXTOOLS_INLINE float total(const Sums& sums) {
        const __m512 sixteen = _mm512_add_ps(sums.at[0], sums.at[1]);
        const __m256d high = _mm512_extractf64x4_pd(_mm512_castps_pd(sixteen), 1);
        return total_of(_mm256_add_ps(_mm512_castps512_ps256(sixteen), _mm256_castpd_ps(high)));
    }
};

#if MIXTOOLS_AVX512_BF16
struct Avx512Bf16Codes : Avx512Codes {
    template <int TO, Offset OFFSET, typename Source>
    TARGET_AVX512_BF16 static MIXTOOLS_INLINE void put(const Source& codes, const Factors& by, uint8_t* out,
                                                       bool stream) {
        if constexpr (TO == BF16) {
            const __m512 a = scaled<OFFSET>(wide<OFFSET>(codes, 0), by.scale[0], by.offset[0]);
            const __m512 b = scaled<OFFSET>(wide<OFFSET>(codes, 1), by.scale[1], by.offset[1]);
            store(out, (__m512i)_mm512_cvtne2ps_pbh(b, a), stream);
        } else {
            Avx512Codes::put<TO, OFFSET>(codes, by, out, stream);
        }
    }
};
#endif

#endif

}  // namespace mixtools::blocks
