// Types whose value is scale * one of 16 numbers that do not lie evenly: IQ4_NL in blocks of 32 with a half for scale,
// IQ4_XS in 8 sub-blocks of 32 whose scales are integers of 6 bits times a half of the block, MXFP4 in blocks of 32
// with a power of two. Numbers and layouts are those of ggml-common.h, search and rounding of quantize_row_iq4_nl_impl
// and quantize_row_mxfp4_ref in ggml-quants.c (https://github.com/ggml-org/llama.cpp). Included once for each
// instruction set.

namespace mixtools::LANES_NAMESPACE {

// The nearest of the numbers, by slots of WIDTH, few enough to be picked from registers: slot s, modulo 32, is of what
// s * WIDTH is nearest to. From one number to the next it is so far that a slot holds at most one limit between two.
struct Table {
    static constexpr int NUMBERS[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    static constexpr float WIDTH = 8.75f, GREATEST = 135.f, INFINITE = __builtin_inff();
    float limit[32] = {};   // what is less belongs to the slot before
    float number[32] = {};  // for the rest of the slot: the nearest number,
    float index[32] = {};   // and which it is

    constexpr Table() {
        for (int slot = -16; slot < 16; slot++) {
            const float end = (slot + .5f) * WIDTH;
            int level = 0;
            limit[slot & 31] = -INFINITE;
            for (int i = 1; i < 16; i++) {
                const float between = .5f * (NUMBERS[i - 1] + NUMBERS[i]);
                if (between > end) break;
                if (between > end - WIDTH) limit[slot & 31] = between;
                level = i;
            }
            number[slot & 31] = NUMBERS[level];
            index[slot & 31] = level;
        }
    }

    // No limit is so near to the end of a slot that rounding could matter, and no two are in one slot.
    constexpr bool sound() const {
        int limits = 0;
        for (int slot = -15; slot < 16; slot++) {
            const float middle = slot * WIDTH, of_this = limit[slot & 31];
            if (of_this == -INFINITE) continue;
            limits++;
            if (of_this < middle - .49f * WIDTH || of_this > middle + .49f * WIDTH) return false;
        }
        return limits == 15 && limit[16] == -INFINITE && GREATEST < 15.49f * WIDTH;
    }
};

alignas(64) constexpr Table TABLE;
static_assert(TABLE.sound());

// The slot of v, which is about WIDTH * narrow and within GREATEST.
INLINE I find_slot(F v, F narrow) {
    const I slot = bits(narrow + splat(12582912.f));
    return less_one(less(v, pick(TABLE.limit, slot)), slot);
}

// The index of the number nearest to v. Of a NaN, which sums that overflow can bring: 15.
INLINE I nearest_index(F v) {
    const F near = max(min(v, splat(Table::GREATEST)), splat(-Table::GREATEST));
    return nearest(pick(TABLE.index, find_slot(near, near * splat(1.f / Table::WIDTH))));
}

// As sum_levels, with the numbers for levels.
template <int K, int N> INLINE void sum_numbers(const Weighed<N>& sub, const F* number_scale, F* sum_xq, F* sum_q2) {
    F narrow[K];
    for (int k = 0; k < K; k++) {
        sum_xq[k] = sum_q2[k] = zero();
        narrow[k] = number_scale[k] * splat(1.f / Table::WIDTH);
    }
    for (int j = 0; j < N; j++)
        for (int k = 0; k < K; k++) {
            const F x = sub.x[j], q = pick(TABLE.number, find_slot(number_scale[k] * x, narrow[k] * x));
            const F wq = sub.weight[j] * q;
            sum_xq[k] = sum_xq[k] + wq * x;
            sum_q2[k] = sum_q2[k] + wq * q;
        }
}

// The best of 16 scales by weighted squares; 0 for sub-blocks of nearly nothing.
template <int N> INLINE F fit_table(const Weighed<N>& sub) {
    F size, candidate[3], sum_xq[3], sum_q2[3];
    const F extreme = first_extreme<N>(sub.x, size);
    candidate[0] = splat(1.f) / (extreme / splat(127.f));
    sum_numbers<1>(sub, candidate, sum_xq, sum_q2);
    F scale = select(less(zero(), sum_q2[0]), sum_xq[0] / sum_q2[0], zero()), best = scale * sum_xq[0];
    for (int first = -7; first <= 7; first += 3) {
        for (int k = 0; k < 3; k++) candidate[k] = splat(float(first + k - 127)) / extreme;
        sum_numbers<3>(sub, candidate, sum_xq, sum_q2);
        for (int k = 0; k < 3; k++) {
            const F new_scale = sum_xq[k] / sum_q2[k];
            const M better = less(zero(), sum_q2[k]) & less(best * sum_q2[k], sum_xq[k] * sum_xq[k]);
            scale = select(better, new_scale, scale);
            best = select(better, new_scale * sum_xq[k], best);
        }
    }
    return select(less(size, splat(1e-15f)), zero(), scale);
}

// By sub-block [W * COUNT], where each COUNT make a group: the scales. The weight of a value is its square, or its
// importance times the root of the sum of its square and twice the group's mean square.
template <int COUNT> INLINE void fit_tables(const float* values, const float* importance, float* scale) {
    constexpr int N = 32;
    alignas(64) float variance[W * COUNT];
    if (importance) {
        alignas(64) float of_group[W];
        store(of_group, sum_squares<COUNT * N>(values) * splat(2.f / (COUNT * N)));
        for (int i = 0; i < W * COUNT; i++) variance[i] = of_group[i / COUNT];
    }
    for (int first = 0; first < W * COUNT; first += W) {
        Weighed<N> sub;
        load_transposed<N>(values + first * N, N, sub.x);
        if (importance) {
            load_transposed<N>(importance + first * N, N, sub.weight);
            for (int j = 0; j < N; j++)
                sub.weight[j] = sub.weight[j] * sqrt(load(variance + first) + sub.x[j] * sub.x[j]);
        } else {
            for (int j = 0; j < N; j++) sub.weight[j] = sub.x[j] * sub.x[j];
        }
        store(scale + first, fit_table(sub));
    }
}

// 32 values times `inverse` as indices, those of the first 16 in the low nibbles.
INLINE void write_indices(const float* values, float inverse, uint8_t* out) {
    for (int j = 0; j < 16; j += W)
        store_bytes(out + j, nearest_index(splat(inverse) * load(values + j)) |
                                 (nearest_index(splat(inverse) * load(values + 16 + j)) << 4));
}

struct EncodeIQ4NL {
    static constexpr int VALUES = 32, BYTES = 18, BATCH = W;

    static void run(const float* values, const float* importance, uint8_t* out) {
        alignas(64) float scale[W], inverse[W];
        int32_t half[W];
        fit_tables<1>(values, importance, scale);
        const F scales = load(scale);
        store(half, half_bits(scales));
        store(inverse, select(equal(scales, zero()), zero(), splat(1.f) / scales));
        for (int block = 0; block < W; block++, values += VALUES, out += BYTES) {
            std::memcpy(out, &half[block], 2);
            write_indices(values, inverse[block], out + 2);
        }
    }
};

struct EncodeIQ4XS {
    static constexpr int VALUES = 256, BYTES = 136, BATCH = W, SUBS = 8;

    static void run(const float* values, const float* importance, uint8_t* out) {
        Heads heads;
        alignas(64) float scale[SUBS * W];
        fit_tables<SUBS>(values, importance, scale);
        round_scales(scale, heads);
        for (int block = 0; block < W; block++, values += VALUES, out += BYTES) {
            std::memcpy(out, &heads.half[block], 4);
            std::memcpy(out + 4, &heads.low[block], 4);
            for (int sub = 0; sub < SUBS; sub++)
                write_indices(values + 32 * sub, heads.inverse[sub][block], out + 8 + 16 * sub);
        }
    }

  private:
    struct Heads {
        int32_t half[W], low[W];  // the unit's half below the 2 high bits of all scales; the 4 low ones
        float inverse[SUBS][W];
    };

    static void round_scales(const float* scale, Heads& heads) {
        F scales[SUBS], size;
        load_transposed<SUBS>(scale, SUBS, scales);
        const F unit = -first_extreme<SUBS>(scales, size) / splat(32.f);
        const F inverse = select(equal(unit, zero()), zero(), splat(1.f) / unit);
        I high = splat(0), low = splat(0);
        for (int sub = 0; sub < SUBS; sub++) {
            const I level = min(max(nearest(inverse * scales[sub]), splat(-32)), splat(31)), raised = level + 32;
            const F rounded = unit * to_float(level);
            store(heads.inverse[sub], select(equal(rounded, zero()), zero(), splat(1.f) / rounded));
            low = low | ((raised & 15) << (4 * sub));
            high = high | ((raised >> 4) << (2 * sub));
        }
        store(heads.half, half_bits(unit) | (high << 16));
        store(heads.low, low);
    }
};

// Numbers 0, 1, 2, 3, 4, 6, 8, 12 and the same below zero, times half a power of two whose exponent is the first byte.
struct EncodeMXFP4 {
    static constexpr int VALUES = 32, BYTES = 17, BATCH = W;

    static void run(const float* values, const float*, uint8_t* out) {
        alignas(64) float size[W];
        store(size, find_size(values));
        for (int block = 0; block < W; block++, values += VALUES, out += BYTES) {
            out[0] = size[block] > 0.f ? exponent(size[block]) : 0;
            const float unit = blocks::half_power(out[0]);
            const I last = splat(out[0] < 253 ? 7 : 5);  // 8 units may be infinite, and not near anything
            for (int j = 0; j < 16; j += W)
                store_bytes(out + 1 + j, nearest_index(load(values + j), unit, last) |
                                             (nearest_index(load(values + 16 + j), unit, last) << 4));
        }
    }

  private:
    // By the logarithm, as just below a power of two its rounding decides. Of very small sizes it wraps.
    static uint8_t exponent(float size) {
        return static_cast<uint8_t>(int(std::min(std::floor(std::log2(size)), 128.f)) - 2 + 127);
    }

    INLINE static I nearest_index(F x, float unit, I last) {
        const F size = abs(x);
        I index = splat(0);
        for (const float between : {.5f, 1.5f, 2.5f, 3.5f, 5.f, 7.f, 10.f})
            index = select(less(splat(between * unit), size), index + 1, index);
        index = min(index, last);
        return select(less(x, zero()) & less(splat(0), index), index + 8, index);
    }
};

}  // namespace mixtools::LANES_NAMESPACE
