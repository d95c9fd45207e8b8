// Blocks of our own, 256 values each: what GPTQ, AWQ, compressed-tensors and bitsandbytes store, row after row for
// products on a CPU. mixtools/ops/repack.py makes them.
//
// Members are bytes, as in blocks.h, and what is regular is the same: scales finite, values zero or normal numbers.
#pragma once

#include "blocks.h"

namespace mixtools::blocks {

// Of a scale's fp32 the sign, the exponent and the first ten digits: each f16, and each bf16, exactly.
constexpr uint32_t SCALE_BITS = 0xffffe000;

// Whether a product of codes with the fp32 of those bits stays so: `above` the least exponent and `below` the greatest.
MIXTOOLS_INLINE bool regular_scale(uint32_t bits, uint32_t above, uint32_t below) {
    const uint32_t exponent = bits >> 23 & 255;
    return (bits & 0x7fffffff) == 0 || (exponent > above && exponent < 255 - below);
}

// A value is (code - zero) * scale; GROUPS share a block evenly, and each has a word: its scale, and its zero in the
// lowest bits. Codes of 3 bits lie as those of Q3_K, their highest last.
//
// Codes of 4 bits lie in 16 words of 32 bits for each 128 columns: column 16 * run + i in word i, those of runs 0 to 3
// in the low bits of its bytes, of runs 4 to 7 in the high bits. A shift and a mask make numbers of 16 columns side by
// side.
template <int BITS, int GROUPS> struct Grouped {
    static constexpr int TYPE = 256 + 16 * BITS + GROUPS, VALUES = 256, WORD = 3;
    uint8_t words[WORD * GROUPS], qs[32 * BITS];

    // of one of 8 groups of 32 values; four bytes are read, the last of a code
    uint32_t word(int group) const { return word_at(words + group * GROUPS / 8 * WORD); }
    float scale(int group) const { return float_of(word(group) << 8 & SCALE_BITS); }
    int zero(int group) const { return word(group) & 31; }
    bool regular() const {
        bool all = true;
        for (int group = 0; group < 8; group += 8 / GROUPS)
            all = all && regular_scale(word(group) << 8 & SCALE_BITS, 0, 5);
        return all;
    }
};

// Of 8 bits: codes less 128, and zeros of nine bits.
template <int GROUPS> struct Grouped<8, GROUPS> {
    static constexpr int TYPE = 256 + 16 * 8 + GROUPS, VALUES = 256, WORD = 4;
    uint8_t words[WORD * GROUPS], qs[256];

    uint32_t word(int group) const { return word_at(words + group * GROUPS / 8 * WORD); }
    float scale(int group) const { return float_of(word(group) & SCALE_BITS); }
    int zero(int group) const { return static_cast<int>(word(group) & 511) - 128; }
    bool regular() const {
        bool all = true;
        for (int group = 0; group < 8; group += 8 / GROUPS) all = all && regular_scale(word(group) & SCALE_BITS, 0, 9);
        return all;
    }
};

MIXTOOLS_INLINE float fp32_at(const uint8_t* at) { return float_of(word_at(at)); }

// A value is one of 16 levels times the fp32 of its 64 values. Codes lie as above.
struct Nf4 {
    static constexpr int TYPE = 512, VALUES = 256;
    uint8_t scales[4][4], qs[128];
    bool regular() const {
        bool all = true;
        for (const auto& scale : scales) all = all && regular_scale(word_at(scale), 4, 0);
        return all;
    }
};

// A value is a code times the fp32 of its row, times PER_CODE.
struct Int8Row {
    static constexpr int TYPE = 513, VALUES = 256;
    static constexpr float PER_CODE = 1.f / 127;
    uint8_t scale[4], qs[256];
    bool regular() const { return regular_scale(word_at(scale), 8, 7); }
};

static_assert(sizeof(Grouped<4, 2>) == 134 && sizeof(Grouped<3, 8>) == 120 && sizeof(Grouped<4, 1>) == 131);
static_assert(sizeof(Grouped<8, 4>) == 272 && sizeof(Nf4) == 144 && sizeof(Int8Row) == 260);

// https://arxiv.org/abs/2305.14314
alignas(64) constexpr float NF4_LEVELS[16] = {
    -1.f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.f};

}  // namespace mixtools::blocks
