// Q3_K and Q6_K: 256 values in sub-blocks of 16, value = scale * level in each; the scales are integers of 6 or 8 bits,
// times a half of the block. The layouts are those of ggml-common.h, the rounding of ggml-quants.c
// (https://github.com/ggml-org/llama.cpp). Included once for each instruction set.

namespace mixtools::LANES_NAMESPACE {

// What W blocks say besides their levels, and the scale of each sub-block as a decoder makes it of that.
struct SymmetricHeads {
    int32_t unit[W];       // a half: what the scales are multiples of
    int32_t packed[4][W];  // the scales themselves
    int32_t empty[W];      // not 0: all of the block's bytes are zeros
    float scale[16][W];
};

// Levels -TOP .. TOP - 1. Without importance they may be SWEPT; the importance may be WIDENED: made a weight that grows
// with the value, and by which the scales are fitted as well.
struct Q3KFormat {
    static constexpr int BYTES = 110, TOP = 4;
    static constexpr bool SWEPT = true, WIDENED = true;

    // Levels of the scales, and the unit that they multiply.
    INLINE static F round_scales(const F* scales, I* level, M& empty) {
        F size;
        const F largest = first_extreme<16>(scales, size), inverse = splat(-32.f) / largest;
        const M none = equal(largest, zero());
        for (int sub = 0; sub < 16; sub++) {
            const I nearest_scale = min(max(nearest(inverse * scales[sub]), splat(-32)), splat(31));
            level[sub] = select(none, splat(-32), nearest_scale);
        }
        empty = M{};
        return select(none, zero(), splat(1.f) / inverse);
    }

    // Raised by 32: 4 bits of the first 8 below those of the others, then the 2 high bits of every fourth in a byte.
    INLINE static void pack_scales(const I* level, I* packed) {
        for (int i = 0; i < 4; i++) packed[i] = splat(0);
        for (int sub = 0; sub < 16; sub++) {
            const I raised = level[sub] + 32;
            const int in_word = 8 * (sub % 4);
            packed[sub / 4 % 2] = packed[sub / 4 % 2] | ((raised & 15) << (in_word + (sub < 8 ? 0 : 4)));
            packed[2] = packed[2] | ((raised >> 4) << (in_word + 2 * (sub / 4)));
        }
    }

    static void pack(const uint8_t* level, int32_t unit, const int32_t* scales, uint8_t* out) {
        for (int i = 0; i < 32; i++) {
            int high = 0;
            for (int k = 0; k < 8; k++) high |= level[32 * k + i] >> 2 << k;
            out[i] = high;
        }
        for (int half = 0; half < 2; half++, level += 128)
            for (int i = 0; i < 32; i++)
                out[32 + 32 * half + i] = (level[i] & 3) | (level[i + 32] & 3) << 2 | (level[i + 64] & 3) << 4 |
                                          (level[i + 96] & 3) << 6;
        std::memcpy(out + 96, scales, 12);
        std::memcpy(out + 108, &unit, 2);
    }
};

struct Q6KFormat {
    static constexpr int BYTES = 210, TOP = 32;
    static constexpr bool SWEPT = false, WIDENED = false;

    INLINE static F round_scales(const F* scales, I* level, M& empty) {
        F size;
        const F inverse = splat(-128.f) / first_extreme<16>(scales, size);
        for (int sub = 0; sub < 16; sub++) level[sub] = min(nearest(inverse * scales[sub]), splat(127));
        empty = less(size, splat(1e-15f));
        return splat(1.f) / inverse;
    }

    INLINE static void pack_scales(const I* level, I* packed) {
        for (int i = 0; i < 4; i++) packed[i] = splat(0);
        for (int sub = 0; sub < 16; sub++)
            packed[sub / 4] = packed[sub / 4] | ((level[sub] & 255) << (8 * (sub % 4)));
    }

    static void pack(const uint8_t* level, int32_t unit, const int32_t* scales, uint8_t* out) {
        for (int half = 0; half < 2; half++, level += 128)
            for (int i = 0; i < 32; i++) {
                const uint8_t a = level[i], b = level[i + 32], c = level[i + 64], d = level[i + 96];
                out[64 * half + i] = (a & 15) | c << 4;
                out[64 * half + 32 + i] = (b & 15) | d << 4;
                out[128 + 32 * half + i] = a >> 4 | b >> 4 << 2 | c >> 4 << 4 | d >> 4 << 6;
            }
        std::memcpy(out + 192, scales, 16);
        std::memcpy(out + 208, &unit, 2);
    }
};

// Encodes W blocks: a lane for each sub-block while that is fitted, for each block while its scales are rounded, and
// for each value in the end.
template <class Format> struct EncodeSymmetric {
    static constexpr int VALUES = 256, BYTES = Format::BYTES, BATCH = W;
    static constexpr int N = 16, SUBS = 16, TOP = Format::TOP, G = 4;

    static void run(const float* values, const float* importance, uint8_t* out) {
        SubFits fits;
        SymmetricHeads heads;
        if (Format::SWEPT && !importance)
            sweep_all(values, fits);
        else
            search_all(values, importance, fits);
        round_scales(fits, Format::WIDENED && importance, heads);
        for (int block = 0; block < W; block++, values += VALUES, out += BYTES) {
            if (heads.empty[block]) {
                std::memset(out, 0, BYTES);
                continue;
            }
            alignas(64) uint8_t level[VALUES];
            for (int sub = 0; sub < SUBS; sub++)
                choose_levels(values + sub * N, heads.scale[sub][block], fits, block * SUBS + sub, level + sub * N);
            const int32_t packed[4] = {heads.packed[0][block], heads.packed[1][block], heads.packed[2][block],
                                       heads.packed[3][block]};
            Format::pack(level, heads.unit[block], packed, out);
        }
    }

  private:
    // Number block * SUBS + sub is a sub-block's. Value j of sub-block i has level [i / W][j][i % W], raised by TOP.
    struct SubFits {
        alignas(64) float scale[SUBS * W], weight[SUBS * W];
        alignas(64) uint8_t level[SUBS][N][W];
    };

    static void search_all(const float* values, const float* importance, SubFits& result) {
        alignas(64) float variance[SUBS * W];
        if (Format::WIDENED) find_variances(values, variance);
        for (int group = 0; group < SUBS; group++) {
            Weighed<N> sub;
            load_transposed<N>(values + group * W * N, N, sub.x);
            if (importance) {
                load_transposed<N>(importance + group * W * N, N, sub.weight);
                if (Format::WIDENED)
                    for (int j = 0; j < N; j++)
                        sub.weight[j] = sub.weight[j] * sqrt(load(variance + group * W) + sub.x[j] * sub.x[j]);
                F sum = zero();
                for (int j = 0; j < N; j++) {
                    sub.wx[j] = sub.weight[j] * sub.x[j];
                    sum = sum + sub.weight[j];
                }
                store(result.weight + group * W, sum);
            } else {
                weigh_by_square(sub);
            }
            const ScaleFit fit = fit_scale<TOP, true>(sub);
            store(result.scale + group * W, fit.scale);
            for (int j = 0; j < N; j++) store_bytes(result.level[group][j], raised_level<TOP>(sub.x[j], fit));
        }
    }

    static void sweep_all(const float* values, SubFits& result) {
        for (int group = 0; group < SUBS; group += G) {
            Weighed<N> subs[G];
            I level[G][N];
            F scale[G];
            for (int g = 0; g < G; g++) {
                load_transposed<N>(values + (group + g) * W * N, N, subs[g].x);
                weigh_by_square(subs[g]);
            }
            sweep_levels<TOP, N, G>(subs, level, scale);
            for (int g = 0; g < G; g++) {
                store(result.scale + (group + g) * W, scale[g]);
                for (int j = 0; j < N; j++) store_bytes(result.level[group + g][j], level[g][j]);
            }
        }
    }

    // For each sub-block twice the mean square of its block.
    static void find_variances(const float* values, float* variance) {
        alignas(64) float of_block[W];
        store(of_block, splat(2.f) * sum_squares<VALUES>(values) / splat(float(VALUES)));
        for (int i = 0; i < SUBS * W; i++) variance[i] = of_block[i / SUBS];
    }

    static void round_scales(const SubFits& fits, bool weighted, SymmetricHeads& heads) {
        Weighed<SUBS> scales;
        I level[SUBS], packed[4];
        F unit;
        M empty = M{};
        load_transposed<SUBS>(fits.scale, SUBS, scales.x);
        if (weighted) {
            load_transposed<SUBS>(fits.weight, SUBS, scales.weight);
            for (int sub = 0; sub < SUBS; sub++) scales.wx[sub] = scales.weight[sub] * scales.x[sub];
            const ScaleFit fit = fit_scale<32, false>(scales);
            unit = fit.scale;
            for (int sub = 0; sub < SUBS; sub++) level[sub] = raised_level<32>(scales.x[sub], fit) - 32;
        } else {
            unit = Format::round_scales(scales.x, level, empty);
        }
        const I half = half_bits(unit);
        Format::pack_scales(level, packed);
        store(heads.unit, half);
        store(heads.empty, select(empty, splat(1), splat(0)));
        for (int i = 0; i < 4; i++) store(heads.packed[i], packed[i]);
        for (int sub = 0; sub < SUBS; sub++) store(heads.scale[sub], from_half_bits(half) * to_float(level[sub]));
    }

    // The nearest under the rounded scale. Where that was rounded to zero, the levels of the fit stay.
    INLINE static void choose_levels(const float* x, float scale, const SubFits& fits, int sub, uint8_t* level) {
        if (scale == 0.f) {
            for (int j = 0; j < N; j++) level[j] = fits.level[sub / W][j][sub % W];
        } else {
            for (int j = 0; j < N; j += W) {
                const I wanted = nearest(load(x + j) / splat(scale));
                store_bytes(level + j, min(max(wanted, splat(-TOP)), splat(TOP - 1)) + TOP);
            }
        }
    }
};

using EncodeQ3K = EncodeSymmetric<Q3KFormat>;
using EncodeQ6K = EncodeSymmetric<Q6KFormat>;

}  // namespace mixtools::LANES_NAMESPACE
