// One number for each of W independent computations side by side: the same code on every instruction set.
//
// Included once for each instruction set, with LANES set to its W (no #pragma once): everything lands in a namespace of
// its own. F holds W floats, I as many int32, M as many yes or no. The arithmetic operators are the compiler's own:
// + - * / and unary - on F; + - * & | ^ ~ << >> on I; & | ~ on M. Nothing here fuses a multiplication with an addition,
// and nothing assumes that there are no infinities, NaNs or denormals.

namespace mixtools::LANES_NAMESPACE {

#define INLINE __attribute__((always_inline)) inline

constexpr int W = LANES;

#if LANES == 16

typedef __m512 F;
typedef int32_t I __attribute__((vector_size(64)));
typedef __mmask16 M;

INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, F v) { _mm512_storeu_ps(p, v); }
INLINE void store(int32_t* p, I v) { _mm512_storeu_si512(p, (__m512i)v); }
INLINE F splat(float v) { return _mm512_set1_ps(v); }
INLINE I splat(int32_t v) { return (I)_mm512_set1_epi32(v); }
INLINE I bits(F v) { return (I)_mm512_castps_si512(v); }
INLINE F from_bits(I v) { return _mm512_castsi512_ps((__m512i)v); }
INLINE F to_float(I v) { return _mm512_cvtepi32_ps((__m512i)v); }
INLINE M less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
INLINE M less(I a, I b) { return _mm512_cmplt_epi32_mask((__m512i)a, (__m512i)b); }
INLINE M equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
INLINE M equal(I a, I b) { return _mm512_cmpeq_epi32_mask((__m512i)a, (__m512i)b); }
INLINE bool any(M m) { return !_mm512_kortestz(m, m); }
INLINE F select(M m, F yes, F no) { return _mm512_mask_blend_ps(m, no, yes); }
INLINE I select(M m, I yes, I no) { return (I)_mm512_mask_blend_epi32(m, (__m512i)no, (__m512i)yes); }
INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
INLINE I min(I a, I b) { return (I)_mm512_min_epi32((__m512i)a, (__m512i)b); }
INLINE I max(I a, I b) { return (I)_mm512_max_epi32((__m512i)a, (__m512i)b); }
INLINE F sqrt(F v) { return _mm512_sqrt_ps(v); }
INLINE F round_small(F v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE void store_bytes(uint8_t* p, I v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)v));
}
INLINE I load_halves(const uint16_t* p) {
    return (I)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
INLINE I truncate(F v) { return (I)_mm512_cvttps_epi32(v); }
INLINE uint32_t mask_bits(M m) {
    asm("" : "+r"(m));  // out of the mask register: GCC 12 has been seen to spill 2 bytes of one and to load 4 again
    return m;
}
INLINE I less_one(M m, I v) { return (I)_mm512_mask_sub_epi32((__m512i)v, m, (__m512i)v, _mm512_set1_epi32(1)); }
INLINE F pick(const float* table, I index) {
    return _mm512_permutex2var_ps(load(table), (__m512i)index, load(table + 16));
}
INLINE void transpose(F v[W]) {
    F a[W], b[W];
    for (int i = 0; i < W; i += 2) {
        a[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
        a[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < W; i += 4)
        for (int k = 0; k < 2; k++) {
            const __m512d low = _mm512_castps_pd(a[i + k]), high = _mm512_castps_pd(a[i + k + 2]);
            b[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            b[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    for (int k = 0; k < 4; k++) {
        const F p = _mm512_shuffle_f32x4(b[k], b[k + 4], 0x88), q = _mm512_shuffle_f32x4(b[k], b[k + 4], 0xdd);
        const F r = _mm512_shuffle_f32x4(b[k + 8], b[k + 12], 0x88);
        const F s = _mm512_shuffle_f32x4(b[k + 8], b[k + 12], 0xdd);
        v[k] = _mm512_shuffle_f32x4(p, r, 0x88);
        v[k + 8] = _mm512_shuffle_f32x4(p, r, 0xdd);
        v[k + 4] = _mm512_shuffle_f32x4(q, s, 0x88);
        v[k + 12] = _mm512_shuffle_f32x4(q, s, 0xdd);
    }
}

#elif LANES == 8

typedef __m256 F;
typedef int32_t I __attribute__((vector_size(32)));
typedef I M;  // all bits of a lane, or none

INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
INLINE void store(float* p, F v) { _mm256_storeu_ps(p, v); }
INLINE void store(int32_t* p, I v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)v); }
INLINE F splat(float v) { return _mm256_set1_ps(v); }
INLINE I splat(int32_t v) { return (I)_mm256_set1_epi32(v); }
INLINE I bits(F v) { return (I)_mm256_castps_si256(v); }
INLINE F from_bits(I v) { return _mm256_castsi256_ps((__m256i)v); }
INLINE F to_float(I v) { return _mm256_cvtepi32_ps((__m256i)v); }
INLINE M less(F a, F b) { return bits(_mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
INLINE M less(I a, I b) { return (I)_mm256_cmpgt_epi32((__m256i)b, (__m256i)a); }
INLINE M equal(F a, F b) { return bits(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)); }
INLINE M equal(I a, I b) { return (I)_mm256_cmpeq_epi32((__m256i)a, (__m256i)b); }
INLINE bool any(M m) { return _mm256_movemask_ps(from_bits(m)) != 0; }
INLINE F select(M m, F yes, F no) { return _mm256_blendv_ps(no, yes, from_bits(m)); }
INLINE I select(M m, I yes, I no) { return bits(select(m, from_bits(yes), from_bits(no))); }
INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
INLINE I min(I a, I b) { return (I)_mm256_min_epi32((__m256i)a, (__m256i)b); }
INLINE I max(I a, I b) { return (I)_mm256_max_epi32((__m256i)a, (__m256i)b); }
INLINE F sqrt(F v) { return _mm256_sqrt_ps(v); }
INLINE F round_small(F v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE void store_bytes(uint8_t* p, I v) {
    const __m256i lowest = _mm256_and_si256((__m256i)v, _mm256_set1_epi32(255));
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(lowest), _mm256_extracti128_si256(lowest, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}
INLINE I load_halves(const uint16_t* p) {
    return (I)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
INLINE I truncate(F v) { return (I)_mm256_cvttps_epi32(v); }
INLINE uint32_t mask_bits(M m) { return static_cast<uint32_t>(_mm256_movemask_ps(from_bits(m))); }
INLINE I less_one(M m, I v) { return v + m; }
INLINE F pick(const float* table, I index) {
    const __m256i lane = (__m256i)index;
    const F a = _mm256_permutevar8x32_ps(load(table), lane), b = _mm256_permutevar8x32_ps(load(table + 8), lane);
    const F c = _mm256_permutevar8x32_ps(load(table + 16), lane), d = _mm256_permutevar8x32_ps(load(table + 24), lane);
    const F bit3 = from_bits(index << 28), bit4 = from_bits(index << 27);
    return _mm256_blendv_ps(_mm256_blendv_ps(a, b, bit3), _mm256_blendv_ps(c, d, bit3), bit4);
}
INLINE void transpose(F v[W]) {
    F a[W], b[W];
    for (int i = 0; i < W; i += 2) {
        a[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < W; i += 4)
        for (int k = 0; k < 2; k++) {
            b[i + 2 * k] = _mm256_shuffle_ps(a[i + k], a[i + k + 2], 0x44);
            b[i + 2 * k + 1] = _mm256_shuffle_ps(a[i + k], a[i + k + 2], 0xee);
        }
    for (int k = 0; k < 4; k++) {
        v[k] = _mm256_permute2f128_ps(b[k], b[k + 4], 0x20);
        v[k + 4] = _mm256_permute2f128_ps(b[k], b[k + 4], 0x31);
    }
}

#else  // the compiler's own vectors: SSE2, NEON or whatever the machine has for certain

typedef float F __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef I M;  // all bits of a lane, or none

INLINE F load(const float* p) { F v; __builtin_memcpy(&v, p, sizeof v); return v; }
INLINE void store(float* p, F v) { __builtin_memcpy(p, &v, sizeof v); }
INLINE void store(int32_t* p, I v) { __builtin_memcpy(p, &v, sizeof v); }
INLINE F splat(float v) { return F{v, v, v, v}; }
INLINE I splat(int32_t v) { return I{v, v, v, v}; }
INLINE I bits(F v) { return (I)v; }
INLINE F from_bits(I v) { return (F)v; }
INLINE F to_float(I v) { return __builtin_convertvector(v, F); }
INLINE M less(F a, F b) { return a < b; }
INLINE M less(I a, I b) { return a < b; }
INLINE M equal(F a, F b) { return a == b; }
INLINE M equal(I a, I b) { return a == b; }
INLINE bool any(M m) { return (m[0] | m[1] | m[2] | m[3]) != 0; }
INLINE I select(M m, I yes, I no) { return (yes & m) | (no & ~m); }
INLINE F select(M m, F yes, F no) { return (F)select(m, (I)yes, (I)no); }
INLINE F min(F a, F b) { return select(a < b, a, b); }
INLINE F max(F a, F b) { return select(a > b, a, b); }
INLINE I min(I a, I b) { return select(a < b, a, b); }
INLINE I max(I a, I b) { return select(a > b, a, b); }
INLINE F sqrt(F v) {
    for (int i = 0; i < W; i++) v[i] = __builtin_sqrtf(v[i]);
    return v;
}
INLINE F round_small(F v) { return (v + splat(12582912.f)) - splat(12582912.f); }
INLINE void store_bytes(uint8_t* p, I v) {
    for (int i = 0; i < W; i++) p[i] = static_cast<uint8_t>(v[i]);
}
INLINE I load_halves(const uint16_t* p) { return I{p[0], p[1], p[2], p[3]}; }
INLINE I truncate(F v) {  // the conversion alone would be undefined for what does not fit
    const M fits = from_bits(bits(v) & 0x7fffffff) < splat(2147483648.f);
    return select(fits, __builtin_convertvector(select(fits, v, splat(0.f)), I), splat(INT32_MIN));
}
INLINE uint32_t mask_bits(M m) { return (m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8); }
INLINE I less_one(M m, I v) { return v + m; }
INLINE F pick(const float* table, I index) {
    return F{table[index[0] & 31], table[index[1] & 31], table[index[2] & 31], table[index[3] & 31]};
}
INLINE void transpose(F v[W]) {
    for (int i = 0; i < W; i++)
        for (int k = 0; k < i; k++) {
            const float swapped = v[i][k];
            v[i][k] = v[k][i];
            v[k][i] = swapped;
        }
}

#endif

// What the above does not say: less and equal are false for a NaN; min(a, b) is a < b ? a : b and max(a, b) is
// a > b ? a : b, so that b comes back where one of them is NaN or both are zero; round_small rounds half to even and
// wants |v| < 2^22; truncate rounds toward zero and makes INT32_MIN of what does not fit, a NaN too; less_one subtracts
// it where m says yes; bit i of mask_bits is lane i; pick takes table[index modulo 32]; store_bytes keeps the lowest
// byte of each lane; transpose swaps lane i of v[k] with lane k of v[i].

INLINE F zero() { return splat(0.f); }
INLINE F abs(F v) { return from_bits(bits(v) & 0x7fffffff); }

// ggml's nearest_int: rounds half to even, wraps beyond 22 bits (as ggml does), and makes 0 of a NaN.
INLINE I nearest(F v) { return (bits(v + splat(12582912.f)) & 0x007fffff) - 0x00400000; }

// The low 16 bits of each lane hold the nearest IEEE half, ties to even. A NaN becomes ggml's: 0x7e00 and its sign.
INLINE I half_bits(F v) {
    const I positive = bits(v) & 0x7fffffff, sign = (bits(v) >> 16) & 0x8000;
    // between those of the halves' least normal number and of their greatest
    const I exponent = min(max(positive & 0x7f800000, splat(113 << 23)), splat(142 << 23));
    const F shift = from_bits(exponent + (13 << 23));  // adding it rounds away the 13 bits too many
    const I mantissa = bits(from_bits(positive) + shift) - bits(shift);
    I half = ((exponent - (113 << 23)) >> 13) + mantissa;
    half = select(less(positive, splat(143 << 23)), half, splat(0x7c00));
    half = select(less(splat(0x7f800000), positive), splat(0x7e00), half);
    return half | sign;
}

// The value of IEEE halves in the low 16 bits of each lane (the high ones zero).
INLINE F from_half_bits(I half) {
    const I positive = half & 0x7fff, sign = (half & 0x8000) << 16;
    const I finite = bits(from_bits(positive << 13) * from_bits(splat(239 << 23)));  // times 2^112
    return from_bits(select(less(positive, splat(0x7c00)), finite, (positive << 13) | 0x7f800000) | sign);
}

// out[j], lane i = rows[i * stride + j]; j < COUNT.
template <int COUNT> INLINE void load_transposed(const float* rows, int stride, F* out) {
    if constexpr (COUNT % W) {
        alignas(64) float lanes[W];
        for (int j = 0; j < COUNT; j++) {
            for (int i = 0; i < W; i++) lanes[i] = rows[i * stride + j];
            out[j] = load(lanes);
        }
    } else {
        for (int j = 0; j < COUNT; j += W) {
            for (int i = 0; i < W; i++) out[j + i] = load(rows + i * stride + j);
            transpose(out + j);
        }
    }
}

// In lane i, one after the other, the squares of the COUNT values at values + COUNT * i; COUNT is a multiple of W.
template <int COUNT> INLINE F sum_squares(const float* values) {
    F sum = zero(), x[W];
    for (int j = 0; j < COUNT; j += W) {
        load_transposed<W>(values + j, COUNT, x);
        for (int k = 0; k < W; k++) sum = sum + x[k] * x[k];
    }
    return sum;
}

}  // namespace mixtools::LANES_NAMESPACE
