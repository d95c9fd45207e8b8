// Transposition of a matrix that is much larger than the caches.
//
// A tile is one cache line wide and one cache line high (L = 64 / item size), so each line of the source is read
// once and each line of the result written once, whole: row strides that are powers of two, which make all rows of
// a tile fall into one cache set, then do no harm.
//
// Inside a tile, 16-byte lanes are transposed first. R = 16 / item size rows hold an R x R block in each lane, and
// log2(R) rounds of interleaving row i with row i + R/2 transpose it. Four such groups of rows fill a line.
#pragma once

#include <algorithm>
#include <cstring>

#include "common.h"
#include "threads.h"

namespace mixtools {

constexpr int LINE = 64;

// dst[c][r] = src[r][c] for r < rows, c < cols, both at most L; strides in bytes. Through a tile of its own, since
// the rows of the result, like those of the source, may all fall into one cache set.
template <int SIZE>
inline void transpose_small(const uint8_t* src, int64_t src_stride, uint8_t* dst, int64_t dst_stride, int64_t rows,
                            int64_t cols) {
    using Item = typename Unaligned<SIZE>::type;
    constexpr int64_t L = LINE / SIZE;
    Item tile[L * L];
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++) tile[c * L + r] = reinterpret_cast<const Item*>(src + r * src_stride)[c];
    for (int64_t c = 0; c < cols; c++) std::memcpy(dst + c * dst_stride, tile + c * L, rows * SIZE);
}

template <int SIZE> struct PlainTile {
    static void run(const uint8_t* src, int64_t src_stride, uint8_t* dst, int64_t dst_stride, bool) {
        transpose_small<SIZE>(src, src_stride, dst, dst_stride, LINE / SIZE, LINE / SIZE);
    }
    static void finish() {}
};

#if MIXTOOLS_X86

template <int SIZE> struct Avx2Tile {
    TARGET_AVX2 static __m256i low(__m256i a, __m256i b) {
        if constexpr (SIZE == 1) return _mm256_unpacklo_epi8(a, b);
        if constexpr (SIZE == 2) return _mm256_unpacklo_epi16(a, b);
        if constexpr (SIZE == 4) return _mm256_unpacklo_epi32(a, b);
        if constexpr (SIZE == 8) return _mm256_unpacklo_epi64(a, b);
    }
    TARGET_AVX2 static __m256i high(__m256i a, __m256i b) {
        if constexpr (SIZE == 1) return _mm256_unpackhi_epi8(a, b);
        if constexpr (SIZE == 2) return _mm256_unpackhi_epi16(a, b);
        if constexpr (SIZE == 4) return _mm256_unpackhi_epi32(a, b);
        if constexpr (SIZE == 8) return _mm256_unpackhi_epi64(a, b);
    }
    TARGET_AVX2 static void store(uint8_t* dst, __m256i value, bool stream) {
        if (stream)
            _mm256_stream_si256(reinterpret_cast<__m256i*>(dst), value);
        else
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), value);
    }
    TARGET_AVX2 static void run(const uint8_t* src, int64_t src_stride, uint8_t* dst, int64_t dst_stride,
                                bool stream) {
        constexpr int R = 16 / SIZE;
        __m256i lanes[2][4][R];  // [half of the line][group of rows][row]
        for (int half = 0; half < 2; half++)
            for (int group = 0; group < 4; group++) {
                __m256i x[R], y[R];
                for (int r = 0; r < R; r++)
                    x[r] = _mm256_loadu_si256(
                        reinterpret_cast<const __m256i*>(src + (group * R + r) * src_stride + half * 32));
                for (int round = 1; round < R; round *= 2) {
                    for (int i = 0; i < R / 2; i++) {
                        y[2 * i] = low(x[i], x[i + R / 2]);
                        y[2 * i + 1] = high(x[i], x[i + R / 2]);
                    }
                    for (int i = 0; i < R; i++) x[i] = y[i];
                }
                for (int i = 0; i < R; i++) lanes[half][group][i] = x[i];
            }
        for (int half = 0; half < 2; half++)
            for (int i = 0; i < R; i++) {
                const __m256i a = lanes[half][0][i], b = lanes[half][1][i];
                const __m256i c = lanes[half][2][i], d = lanes[half][3][i];
                uint8_t* line = dst + (half * 2 * R + i) * dst_stride;
                store(line, _mm256_permute2x128_si256(a, b, 0x20), stream);
                store(line + 32, _mm256_permute2x128_si256(c, d, 0x20), stream);
                line += R * dst_stride;
                store(line, _mm256_permute2x128_si256(a, b, 0x31), stream);
                store(line + 32, _mm256_permute2x128_si256(c, d, 0x31), stream);
            }
    }
    static void finish() { _mm_sfence(); }
};

template <int SIZE> struct Avx512Tile {
    TARGET_AVX512 static __m512i low(__m512i a, __m512i b) {
        if constexpr (SIZE == 1) return _mm512_unpacklo_epi8(a, b);
        if constexpr (SIZE == 2) return _mm512_unpacklo_epi16(a, b);
        if constexpr (SIZE == 4) return _mm512_unpacklo_epi32(a, b);
        if constexpr (SIZE == 8) return _mm512_unpacklo_epi64(a, b);
    }
    TARGET_AVX512 static __m512i high(__m512i a, __m512i b) {
        if constexpr (SIZE == 1) return _mm512_unpackhi_epi8(a, b);
        if constexpr (SIZE == 2) return _mm512_unpackhi_epi16(a, b);
        if constexpr (SIZE == 4) return _mm512_unpackhi_epi32(a, b);
        if constexpr (SIZE == 8) return _mm512_unpackhi_epi64(a, b);
    }
    TARGET_AVX512 static void store(uint8_t* dst, __m512i value, bool stream) {
        if (stream)
            _mm512_stream_si512(reinterpret_cast<__m512i*>(dst), value);
        else
            _mm512_storeu_si512(dst, value);
    }
    TARGET_AVX512 static void run(const uint8_t* src, int64_t src_stride, uint8_t* dst, int64_t dst_stride,
                                  bool stream) {
        constexpr int R = 16 / SIZE;
        __m512i lanes[4][R];  // [group of rows][row]
        for (int group = 0; group < 4; group++) {
            __m512i x[R], y[R];
            for (int r = 0; r < R; r++) x[r] = _mm512_loadu_si512(src + (group * R + r) * src_stride);
            for (int round = 1; round < R; round *= 2) {
                for (int i = 0; i < R / 2; i++) {
                    y[2 * i] = low(x[i], x[i + R / 2]);
                    y[2 * i + 1] = high(x[i], x[i + R / 2]);
                }
                for (int i = 0; i < R; i++) x[i] = y[i];
            }
            for (int i = 0; i < R; i++) lanes[group][i] = x[i];
        }
        for (int i = 0; i < R; i++) {  // 4 x 4 lanes
            const __m512i ab_low = _mm512_shuffle_i64x2(lanes[0][i], lanes[1][i], 0x44);
            const __m512i cd_low = _mm512_shuffle_i64x2(lanes[2][i], lanes[3][i], 0x44);
            const __m512i ab_high = _mm512_shuffle_i64x2(lanes[0][i], lanes[1][i], 0xee);
            const __m512i cd_high = _mm512_shuffle_i64x2(lanes[2][i], lanes[3][i], 0xee);
            uint8_t* line = dst + i * dst_stride;
            store(line, _mm512_shuffle_i64x2(ab_low, cd_low, 0x88), stream);
            store(line + R * dst_stride, _mm512_shuffle_i64x2(ab_low, cd_low, 0xdd), stream);
            store(line + 2 * R * dst_stride, _mm512_shuffle_i64x2(ab_high, cd_high, 0x88), stream);
            store(line + 3 * R * dst_stride, _mm512_shuffle_i64x2(ab_high, cd_high, 0xdd), stream);
        }
    }
    static void finish() { _mm_sfence(); }
};

#endif

// A block is what one thread does at a time: tall enough that a line of the result is followed by its neighbours
// while their page is in the TLB, wide enough for long runs through the source. Found by trying; flat around here.
constexpr int64_t BLOCK_TILE_ROWS = 24;
constexpr int64_t BLOCK_TILE_COLS = 64;
constexpr int64_t TILES_AHEAD = 2;
// Past the caches, a store that bypasses them spares reading each line of the result before it is overwritten.
constexpr int64_t STREAM_BYTES = 8 << 20;

// Cuts [0, count) into pieces that start at the lines of memory: `shift` items of the first line lie before item 0.
struct Cut {
    int64_t count, shift, step;
    int64_t pieces() const { return (count + shift + step - 1) / step; }
    int64_t begin(int64_t piece) const { return std::max<int64_t>(0, piece * step - shift); }
    int64_t end(int64_t piece) const { return std::min(count, (piece + 1) * step - shift); }
};

// Items of the line at `data` that lie before it, if that is so for every row; else 0, as no cut meets the lines.
template <int SIZE> int64_t items_before(const uint8_t* data, int64_t stride) {
    const int64_t bytes = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) % LINE);
    return stride % LINE == 0 && bytes % SIZE == 0 ? bytes / SIZE : 0;
}

template <int SIZE, template <int> class Tile>
void transpose_block(const uint8_t* src, int64_t src_stride, uint8_t* dst, int64_t dst_stride, Cut down, Cut across,
                     bool stream) {
    constexpr int64_t L = LINE / SIZE;
    for (int64_t j = 0; j < across.pieces(); j++)
        for (int64_t i = 0; i < down.pieces(); i++) {
            const int64_t r = down.begin(i), high = down.end(i) - r;
            const int64_t c = across.begin(j), wide = across.end(j) - c;
            const uint8_t* from = src + r * src_stride + c * SIZE;
            uint8_t* to = dst + c * dst_stride + r * SIZE;
            if (high < L || wide < L) {
                transpose_small<SIZE>(from, src_stride, to, dst_stride, high, wide);
                continue;
            }
            if (r + (TILES_AHEAD + 1) * L <= down.count)
                for (int64_t k = TILES_AHEAD * L; k < (TILES_AHEAD + 1) * L; k++)
                    __builtin_prefetch(from + k * src_stride, 0, 2);
            Tile<SIZE>::run(from, src_stride, to, dst_stride, stream);
        }
    Tile<SIZE>::finish();
}

// dst [cols, rows] dense = src [rows, cols], whose rows lie src_stride bytes apart.
template <int SIZE, template <int> class Tile>
void transpose(const uint8_t* src, int64_t src_stride, uint8_t* dst, int64_t rows, int64_t cols, int64_t threads) {
    constexpr int64_t L = LINE / SIZE;
    const int64_t dst_stride = rows * SIZE;
    const int64_t above = items_before<SIZE>(dst, dst_stride), before = items_before<SIZE>(src, src_stride);
    const bool whole_lines = (reinterpret_cast<uintptr_t>(dst) - above * SIZE) % LINE == 0 && dst_stride % LINE == 0;
    const bool stream = whole_lines && cols * dst_stride >= STREAM_BYTES;
    const Cut down{rows, above, BLOCK_TILE_ROWS * L}, across{cols, before, BLOCK_TILE_COLS * L};
    parallel_for(down.pieces() * across.pieces(), threads, [=](int64_t block) {
        const int64_t i = block % down.pieces(), j = block / down.pieces();
        const int64_t r = down.begin(i), c = across.begin(j);
        // only the first block of a row or column starts inside a line
        const Cut rows_cut{down.end(i) - r, i == 0 ? above : 0, L}, cols_cut{across.end(j) - c, j == 0 ? before : 0, L};
        transpose_block<SIZE, Tile>(src + r * src_stride + c * SIZE, src_stride, dst + c * dst_stride + r * SIZE,
                                    dst_stride, rows_cut, cols_cut, stream);
    });
}

}  // namespace mixtools
