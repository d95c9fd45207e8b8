// Q4_K, Q5_K and Q2_K: 256 values in sub-blocks of 32 or 16, value = scale * level - min in each; the scales and mins
// are integers of 6 or 4 bits, times two halves of the block. The layouts are those of ggml-common.h, the rounding of
// ggml-quants.c (https://github.com/ggml-org/llama.cpp). Included once for each instruction set.

namespace mixtools::LANES_NAMESPACE {

// What W blocks say besides their levels, and the scale and min of each sub-block as a decoder makes them of that.
template <int SUBS> struct Heads {
    int32_t units[W];      // two halves: what the scales and the mins are multiples of
    int32_t packed[4][W];  // the scales and mins themselves
    float scale[SUBS][W], min[SUBS][W];
};

// In Q4_K and Q5_K 12 bytes hold 8 scales and 8 mins of 6 bits: 4 of each in a byte of their own, the low halves of the
// others in the last 4 bytes, their high halves atop the first 8.
INLINE void pack_scales(const I* scale, const I* min, F unit, F min_unit, Heads<8>& heads) {
    I packed[4] = {splat(0), splat(0), splat(0), splat(0)};
    for (int i = 0; i < 4; i++) {
        const I a = scale[i] | (((scale[i + 4] >> 4) << 6) & 255), b = min[i] | (((min[i + 4] >> 4) << 6) & 255);
        const I c = (scale[i + 4] & 15) | ((min[i + 4] & 15) << 4);
        store(heads.scale[i], unit * to_float(a & 63));
        store(heads.min[i], min_unit * to_float(b & 63));
        store(heads.scale[i + 4], unit * to_float((c & 15) | ((a >> 6) << 4)));
        store(heads.min[i + 4], min_unit * to_float((c >> 4) | ((b >> 6) << 4)));
        packed[0] = packed[0] | (a << (8 * i));
        packed[1] = packed[1] | (b << (8 * i));
        packed[2] = packed[2] | (c << (8 * i));
    }
    for (int i = 0; i < 4; i++) store(heads.packed[i], packed[i]);
}

// In Q2_K a byte holds a scale and a min of 4 bits each.
INLINE void pack_scales(const I* scale, const I* min, F unit, F min_unit, Heads<16>& heads) {
    for (int i = 0; i < 4; i++) {
        I packed = splat(0);
        for (int k = 0; k < 4; k++) {
            const int sub = 4 * i + k;
            const I both = scale[sub] | ((min[sub] << 4) & 255);
            store(heads.scale[sub], unit * to_float(both & 15));
            store(heads.min[sub], min_unit * to_float(both >> 4));
            packed = packed | (both << (8 * k));
        }
        store(heads.packed[i], packed);
    }
}

// Levels of 256 values, a byte each, to nibbles: those of each odd sub-block above those of the one before.
INLINE void pack_nibbles(const uint8_t* level, uint8_t* out) {
    for (int j = 0; j < 256; j += 64, out += 32)
        for (int i = 0; i < 32; i++) out[i] = (level[j + i] & 15) | level[j + i + 32] << 4;
}

// N values in a sub-block, levels 0 .. TOP, scales and mins 0 .. SCALE_TOP; what else `fit` wants of a search; whether
// the weight of a value is its size alone or has the root of the sub-block's MEAN_SQUARE added; and whether scales that
// wrap, as negative ones do, are CLIPPED. All as ggml has it.
struct Q4KFormat {
    static constexpr int BYTES = 144, N = 32, TOP = 15, SCALE_TOP = 63, STEPS = 20;
    static constexpr float FIRST = -1.f, STEP = .1f;
    static constexpr bool ABSOLUTE = false, MEAN_SQUARE = true, CLIPPED = true;
    static void pack(const uint8_t* level, int32_t units, const int32_t* scales, uint8_t* out) {
        std::memcpy(out, &units, 4);
        std::memcpy(out + 4, scales, 12);
        pack_nibbles(level, out + 16);
    }
};

struct Q5KFormat {
    static constexpr int BYTES = 176, N = 32, TOP = 31, SCALE_TOP = 63, STEPS = 15;
    static constexpr float FIRST = -.5f, STEP = .1f;
    static constexpr bool ABSOLUTE = false, MEAN_SQUARE = true, CLIPPED = true;
    static void pack(const uint8_t* level, int32_t units, const int32_t* scales, uint8_t* out) {
        std::memcpy(out, &units, 4);
        std::memcpy(out + 4, scales, 12);
        for (int i = 0; i < 32; i++) {
            int high = 0;
            for (int sub = 0; sub < 8; sub++) high |= level[32 * sub + i] >> 4 << sub;
            out[16 + i] = high;
        }
        pack_nibbles(level, out + 48);
    }
};

struct Q2KFormat {
    static constexpr int BYTES = 84, N = 16, TOP = 3, SCALE_TOP = 15, STEPS = 15;
    static constexpr float FIRST = -.5f, STEP = .1f;
    static constexpr bool ABSOLUTE = true, MEAN_SQUARE = false, CLIPPED = false;
    static void pack(const uint8_t* level, int32_t units, const int32_t* scales, uint8_t* out) {
        std::memcpy(out, scales, 16);
        for (int half = 0; half < 2; half++, level += 128)
            for (int i = 0; i < 32; i++)
                out[16 + 32 * half + i] = level[i] | level[i + 32] << 2 | level[i + 64] << 4 | level[i + 96] << 6;
        std::memcpy(out + 80, &units, 4);
    }
};

// The search by importance, for all three.
template <class Format> struct Weighted : Format {
    static constexpr int STEPS = 36;
    static constexpr float FIRST = -.9f, STEP = .05f;
    static constexpr bool ABSOLUTE = false, CLIPPED = Format::TOP == 31;
};

// Encodes W blocks: a lane for each sub-block while that is fitted, for each block while its scales and mins are
// rounded, and for each value in the end.
template <class Format> struct EncodeAffine {
    static constexpr int VALUES = 256, BYTES = Format::BYTES, BATCH = W;
    static constexpr int N = Format::N, SUBS = VALUES / N, TOP = Format::TOP, G = 4;

    static void run(const float* values, const float* importance, uint8_t* out) {
        SubFits fits;
        Heads<SUBS> heads;
        if (importance)
            fit_all<Weighted<Format>>(values, importance, fits);
        else
            fit_all<Format>(values, importance, fits);
        round_scales(fits, importance != nullptr, heads);
        for (int block = 0; block < W; block++, values += VALUES, out += BYTES) {
            alignas(64) uint8_t level[VALUES];
            for (int sub = 0; sub < SUBS; sub++)
                choose_levels(values + sub * N, heads, fits, block, sub, level + sub * N);
            const int32_t packed[4] = {heads.packed[0][block], heads.packed[1][block], heads.packed[2][block],
                                       heads.packed[3][block]};
            Format::pack(level, heads.units[block], packed, out);
        }
    }

  private:
    // Number block * SUBS + sub is a sub-block's.
    struct SubFits {
        alignas(64) float scale[SUBS * W], min[SUBS * W], weight[SUBS * W], level_scale[SUBS * W], level_low[SUBS * W];
    };

    template <class Search> static void fit_all(const float* values, const float* importance, SubFits& result) {
        alignas(64) float variance[SUBS * W];
        if (importance) find_variances(values, variance);
        for (int first = 0; first < SUBS * W; first += G * W) {
            SubBlocks<N, G> sub;
            Fit fits[G];
            for (int g = 0; g < G; g++) {
                const int at = first + g * W;
                load_transposed<N>(values + at * N, N, sub.x[g]);
                if (importance) {
                    load_transposed<N>(importance + at * N, N, sub.weight[g]);
                    weigh(sub.x[g], load(variance + at), sub.weight[g]);
                } else {
                    weigh(sub.x[g], sub.weight[g]);
                }
            }
            fit<Search>(sub, fits);
            for (int g = 0; g < G; g++) {
                const int at = first + g * W;
                store(result.scale + at, fits[g].scale);
                store(result.min + at, -fits[g].low);
                store(result.weight + at, fits[g].sum_weight);
                store(result.level_scale + at, fits[g].level_scale);
                store(result.level_low + at, fits[g].level_low);
            }
        }
    }

    INLINE static void weigh(const F* x, F* weight) {
        F base = zero();
        if (Format::MEAN_SQUARE) {
            for (int j = 0; j < N; j++) base = base + x[j] * x[j];
            base = sqrt(base / splat(float(N)));
        }
        for (int j = 0; j < N; j++) weight[j] = Format::MEAN_SQUARE ? base + abs(x[j]) : abs(x[j]);
    }

    // `weight` holds the importance at first.
    INLINE static void weigh(const F* x, F variance, F* weight) {
        for (int j = 0; j < N; j++) weight[j] = weight[j] * sqrt(variance + x[j] * x[j]);
    }

    // For each sub-block the mean square of its block, doubled for sub-blocks of 32.
    static void find_variances(const float* values, float* variance) {
        alignas(64) float of_block[W];
        store(of_block, splat(N == 32 ? 2.f : 1.f) * sum_squares<VALUES>(values) / splat(float(VALUES)));
        for (int i = 0; i < SUBS * W; i++) variance[i] = of_block[i / SUBS];
    }

    static void round_scales(const SubFits& fits, bool weighted, Heads<SUBS>& heads) {
        F scales[SUBS], mins[SUBS], weights[SUBS], unit, min_unit;  // a lane for each block
        I scale_level[SUBS], min_level[SUBS];
        load_transposed<SUBS>(fits.scale, SUBS, scales);
        load_transposed<SUBS>(fits.min, SUBS, mins);
        load_transposed<SUBS>(fits.weight, SUBS, weights);
        if (weighted) {
            unit = fit_levels<SUBS, Format::SCALE_TOP>(scales, weights, scale_level);
            min_unit = fit_levels<SUBS, Format::SCALE_TOP>(mins, weights, min_level);
        } else {
            unit = round_levels<SUBS, Format::SCALE_TOP>(scales, scale_level);
            min_unit = round_levels<SUBS, Format::SCALE_TOP>(mins, min_level);
        }
        if (weighted ? Weighted<Format>::CLIPPED : Format::CLIPPED)
            for (int sub = 0; sub < SUBS; sub++) {
                scale_level[sub] = min(scale_level[sub], splat(Format::SCALE_TOP));
                min_level[sub] = min(min_level[sub], splat(Format::SCALE_TOP));
            }
        const I half = half_bits(unit), min_half = half_bits(min_unit);
        store(heads.units, half | (min_half << 16));
        pack_scales(scale_level, min_level, from_half_bits(half), from_half_bits(min_half), heads);
    }

    // The nearest under the rounded scale and min. Where the scale was rounded to zero, the levels of the fit stay.
    INLINE static void choose_levels(const float* x, const Heads<SUBS>& heads, const SubFits& fits, int block, int sub,
                                     uint8_t* level) {
        const float scale = heads.scale[sub][block], min_value = heads.min[sub][block];
        const F level_scale = splat(fits.level_scale[block * SUBS + sub]);
        const F level_low = splat(fits.level_low[block * SUBS + sub]);
        for (int j = 0; j < N; j += W) {
            const F v = load(x + j);
            const F wanted = scale == 0.f ? level_scale * (v - level_low) : (v + splat(min_value)) / splat(scale);
            store_bytes(level + j, min(max(nearest(wanted), splat(0)), splat(TOP)));
        }
    }
};

using EncodeQ2K = EncodeAffine<Q2KFormat>;
using EncodeQ4K = EncodeAffine<Q4KFormat>;
using EncodeQ5K = EncodeAffine<Q5KFormat>;

}  // namespace mixtools::LANES_NAMESPACE
