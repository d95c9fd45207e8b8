// Q8_0, Q4_0, Q5_0, Q4_1 and Q5_1: blocks of 32 values, value = scale * level, or scale * level + low; scale and low
// are halves. The layouts are those of ggml-common.h, the rounding of ggml-quants.c
// (https://github.com/ggml-org/llama.cpp). Included once for each instruction set.

namespace mixtools::LANES_NAMESPACE {

// Of the 32 values at values + 32 * i the least and the greatest, in lane i. Of some zeros it may be any; of 32 zeros,
// both are the first.
INLINE void find_range(const float* values, F& least, F& greatest) {
    F low[W], high[W];
    for (int i = 0; i < W; i++) {
        low[i] = high[i] = load(values + 32 * i);
        for (int j = W; j < 32; j += W) {
            const F x = load(values + 32 * i + j);
            low[i] = min(x, low[i]);
            high[i] = max(x, high[i]);
        }
    }
    transpose(low);
    transpose(high);
    least = low[0];
    greatest = high[0];
    for (int i = 1; i < W; i++) {
        least = min(low[i], least);
        greatest = max(high[i], greatest);
    }
}

// The greatest size.
INLINE F find_size(const float* values) {
    F high[W];
    for (int i = 0; i < W; i++) {
        high[i] = abs(load(values + 32 * i));
        for (int j = W; j < 32; j += W) high[i] = max(abs(load(values + 32 * i + j)), high[i]);
    }
    transpose(high);
    for (int i = 1; i < W; i++) high[0] = max(high[i], high[0]);
    return high[0];
}

// Of the 32 values at values + 32 * i, in each lane i that `where` names, the first of that lane's size; v elsewhere.
INLINE F find_first(const float* values, M where, F v) {
    alignas(64) float found[W];
    store(found, v);
    const uint32_t wanted = mask_bits(where);
    for (int i = 0; i < W; i++, values += 32) {
        if (!(wanted >> i & 1)) continue;
        const float size = std::fabs(found[i]);
        for (int j = 31; j >= 0; j--)
            if (std::fabs(values[j]) == size) found[i] = values[j];
    }
    return load(found);
}

struct EncodeQ80 {
    static constexpr int VALUES = 32, BYTES = 34, BATCH = W;

    static void run(const float* values, const float*, uint8_t* out) {
        alignas(64) float inverse[W];
        int32_t half[W];
        const F scale = find_size(values) / splat(127.f);
        store(inverse, select(equal(scale, zero()), zero(), splat(1.f) / scale));
        store(half, half_bits(scale));
        for (int block = 0; block < W; block++, values += VALUES, out += BYTES) {
            std::memcpy(out, &half[block], 2);
            for (int j = 0; j < VALUES; j += W)
                store_bytes(out + 2 + j, round_away(load(values + j) * splat(inverse[block])));
        }
    }

  private:
    // To the nearest, halves away from zero: what rounds so is to add the greatest float below 1/2, and to truncate.
    INLINE static I round_away(F v) {
        const I sign = bits(v) & INT32_MIN;
        return truncate(v + from_bits(bits(splat(0.49999997f)) | sign));
    }
};

template <int LEVELS> struct AffineSearch {
    static constexpr int N = 32, TOP = LEVELS - 1, STEPS = 36;
    static constexpr float FIRST = -.9f, STEP = .05f;
    static constexpr bool ABSOLUTE = false;
};

// Levels of 4 or 5 bits, from 0 on. With LOW they count from the least value of the block, which is stored; otherwise
// the value of greatest size has level 0. What importance run() gets has been made weights.
template <int BITS, bool LOW> struct EncodeSmall {
    static constexpr int VALUES = 32, BYTES = (LOW ? 4 : 2) + (BITS == 5 ? 4 : 0) + 16, G = 4, BATCH = G * W;
    static constexpr int LEVELS = 1 << BITS, TOP = LOW ? 0 : LEVELS / 2;

    static void run(const float* values, const float* weights, uint8_t* out) {
        if (weights) return search(values, weights, out);
        for (int first = 0; first < BATCH; first += W, values += W * VALUES, out += W * BYTES) {
            Heads heads;
            round(values, heads);
            for (int block = 0; block < W; block++)
                write<false>(values + block * VALUES, heads, block, out + block * BYTES);
        }
    }

  private:
    // A level is inverse * (value - low), rounded, and raised.
    struct Heads {
        alignas(64) float inverse[W], low[W];
        int32_t raised[W], halves[W];
    };

    static void round(const float* values, Heads& heads) {
        F least, greatest, range;
        find_range(values, least, greatest);
        if (LOW) {
            const M empty = equal(least, zero());  // of which sign is the first?
            if (any(empty)) least = find_first(values, empty, least);
            range = (greatest - least) / splat(float(LEVELS - 1));
        } else {
            const M even = equal(-least, greatest);
            F extreme = select(less(-least, greatest), greatest, least);
            if (any(even)) extreme = find_first(values, even, extreme);
            range = select(equal(extreme, zero()), zero(), extreme) / splat(-float(TOP));
        }
        store(heads.inverse, select(equal(range, zero()), zero(), splat(1.f) / range));
        store(heads.low, least);
        store(heads.halves, pair_of_halves(range, least));
    }

    INLINE static I pair_of_halves(F scale, F low) { return half_bits(scale) | (half_bits(low) << 16); }

    static void search(const float* values, const float* weights, uint8_t* out) {
        Heads heads[G];
        if constexpr (LOW)
            search_low(values, weights, heads);
        else
            for (int g = 0; g < G; g++) search_even(values + g * W * VALUES, weights + g * W * VALUES, heads[g]);
        for (int block = 0; block < BATCH; block++)
            write<true>(values + block * VALUES, heads[block / W], block % W, out + block * BYTES);
    }

    static void search_low(const float* values, const float* weights, Heads* heads) {
        SubBlocks<VALUES, G> sub;
        Fit fits[G];
        for (int g = 0; g < G; g++) {
            load_transposed<VALUES>(values + g * W * VALUES, VALUES, sub.x[g]);
            load_transposed<VALUES>(weights + g * W * VALUES, VALUES, sub.weight[g]);
        }
        fit<AffineSearch<LEVELS>>(sub, fits);
        for (int g = 0; g < G; g++) {
            store(heads[g].inverse, fits[g].level_scale);
            store(heads[g].low, fits[g].level_low);
            store(heads[g].raised, splat(0));
            store(heads[g].halves, pair_of_halves(fits[g].scale, fits[g].low));
        }
    }

    static void search_even(const float* values, const float* weights, Heads& heads) {
        Weighed<VALUES> sub;
        load_transposed<VALUES>(values, VALUES, sub.x);
        load_transposed<VALUES>(weights, VALUES, sub.weight);
        for (int j = 0; j < VALUES; j++) sub.wx[j] = sub.weight[j] * sub.x[j];
        const ScaleFit fit = fit_scale<TOP, true>(sub);
        store(heads.inverse, fit.level_scale);
        store(heads.low, zero());
        store(heads.raised, select(fit.none, splat(0), splat(TOP)));
        store(heads.halves, half_bits(fit.scale));
    }

    // The first 16 values are the low nibbles; of 5 bits the highest lie before. Where 1 / scale is infinite, truncate
    // finds nothing that fits, and the lowest byte of what it says then is 0, as in ggml.
    template <bool SEARCHED>
    INLINE static void write(const float* values, const Heads& heads, int block, uint8_t* out) {
        const F inverse = splat(heads.inverse[block]), low = splat(heads.low[block]);
        const I raised = splat(SEARCHED ? heads.raised[block] : 0);
        uint32_t high = 0;
        uint8_t* nibbles = out + BYTES - 16;
        for (int j = 0; j < 16; j += W) {
            I level[2];
            for (int half = 0; half < 2; half++) {
                const F x = load(values + j + 16 * half), v = inverse * (LOW ? x - low : x);
                if (SEARCHED)
                    level[half] = min(max(nearest(v), splat(-TOP)), splat(LEVELS - 1 - TOP)) + raised;
                else
                    level[half] = min(truncate(v + splat(float(TOP) + .5f)), splat(LEVELS - 1));
                if (BITS == 5) {
                    high |= mask_bits(less(splat(15), level[half])) << (j + 16 * half);
                    level[half] = level[half] & 15;
                }
            }
            store_bytes(nibbles + j, level[0] | (level[1] << 4));
        }
        std::memcpy(out, &heads.halves[block], LOW ? 4 : 2);
        if (BITS == 5) std::memcpy(nibbles - 4, &high, 4);
    }
};

using EncodeQ40 = EncodeSmall<4, false>;
using EncodeQ41 = EncodeSmall<4, true>;
using EncodeQ50 = EncodeSmall<5, false>;
using EncodeQ51 = EncodeSmall<5, true>;

}  // namespace mixtools::LANES_NAMESPACE
