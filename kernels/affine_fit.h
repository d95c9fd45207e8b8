// Searches for the scale and min of sub-blocks whose values are scale * level + min, level an integer in 0 .. TOP:
// ggml's, from ggml-quants.c of https://github.com/ggml-org/llama.cpp. make_qkx2_quants and make_qkx3_quants are `fit`
// here, make_qp_quants is `fit_levels`.
//
// Each lane does what ggml does for its sub-block, operation by operation: the order of sums, the unequal `<` and `<=`,
// what wraps in a byte. Where ggml branches, a mask takes the result of its branch. Included once for each instruction
// set.

namespace mixtools::LANES_NAMESPACE {

// Value j of W sub-blocks in each of G registers: with one register alone, each addition would wait for the one before.
template <int N, int G> struct SubBlocks {
    F x[G][N], weight[G][N], level[G][N];
};

// What is known of W sub-blocks. The levels of the best fit are nearest(level_scale * (value - level_low)).
struct Fit {
    F scale, low, error;  // value = scale * level + low
    F level_scale, level_low;
    F least, high, sum_weight, sum_x;
    M flat;  // nothing to search: the only level is 0
};

struct LevelSums {
    F l, l2, xl;  // weighted sums of level, level^2 and level * value
};

// The nearest level. SMALL promises |v| < 2^22.
template <int TOP, bool SMALL> INLINE F to_level(F v) {
    if constexpr (!SMALL) return to_float(min(max(nearest(v), splat(0)), splat(TOP)));
    // as integers, the bits of floats keep their order from 0 on; those of negative ones, and of -0, are negative
    return from_bits(min(max(bits(round_small(v)), splat(0)), bits(splat(float(TOP)))));
}

template <class Search, bool SMALL, int G>
INLINE void find_levels(SubBlocks<Search::N, G>& sub, const Fit* fits, const F* level_scale, LevelSums* sums) {
    for (int g = 0; g < G; g++) sums[g] = LevelSums{zero(), zero(), zero()};
    for (int j = 0; j < Search::N; j++)
        for (int g = 0; g < G; g++) {
            const F x = sub.x[g][j], l = to_level<Search::TOP, SMALL>(level_scale[g] * (x - fits[g].low));
            const F wl = sub.weight[g][j] * l;
            sub.level[g][j] = l;
            sums[g].l = sums[g].l + wl;
            sums[g].l2 = sums[g].l2 + wl * l;
            sums[g].xl = sums[g].xl + wl * x;
        }
}

// Spreads the values, from the least that the fit allows to the greatest, over so many levels.
template <class Search, int G>
INLINE void spread(SubBlocks<Search::N, G>& sub, const Fit* fits, float levels, F* level_scale, LevelSums* sums) {
    const F bound = splat(4194303.f);
    M large = M{};
    for (int g = 0; g < G; g++) {
        const Fit& now = fits[g];
        level_scale[g] = select(now.flat, zero(), splat(levels) / (now.high - now.low));
        // the ends tell for all between them, as each rounding keeps the order
        large = large | ~(less(abs(level_scale[g] * (now.least - now.low)), bound) &
                          less(abs(level_scale[g] * (now.high - now.low)), bound));
    }
    if (any(large))
        find_levels<Search, false, G>(sub, fits, level_scale, sums);
    else
        find_levels<Search, true, G>(sub, fits, level_scale, sums);
}

// The weighted error of the levels that were found last.
template <class Search, int G>
INLINE void sum_errors(const SubBlocks<Search::N, G>& sub, const F* scale, const F* low, F* error) {
    for (int g = 0; g < G; g++) error[g] = zero();
    for (int j = 0; j < Search::N; j++)
        for (int g = 0; g < G; g++) {
            const F difference = scale[g] * sub.level[g][j] + low[g] - sub.x[g][j];
            error[g] = error[g] + sub.weight[g][j] * (Search::ABSOLUTE ? abs(difference) : difference * difference);
        }
}

template <int N, int G> INLINE void begin(const SubBlocks<N, G>& sub, Fit* fits) {
    for (int g = 0; g < G; g++) {
        fits[g].least = fits[g].high = sub.x[g][0];
        fits[g].sum_weight = sub.weight[g][0];
        fits[g].sum_x = sub.weight[g][0] * sub.x[g][0];
    }
    for (int j = 1; j < N; j++)
        for (int g = 0; g < G; g++) {
            const F x = sub.x[g][j], w = sub.weight[g][j];
            fits[g].least = min(x, fits[g].least);
            fits[g].high = max(x, fits[g].high);
            fits[g].sum_weight = fits[g].sum_weight + w;
            fits[g].sum_x = fits[g].sum_x + w * x;
        }
    for (int g = 0; g < G; g++) {
        fits[g].low = select(less(zero(), fits[g].least), zero(), fits[g].least);
        fits[g].flat = equal(fits[g].high, fits[g].low);
    }
}

// Least squares for the levels that were found last; kept where the error falls.
template <class Search, int G>
INLINE void improve(const SubBlocks<Search::N, G>& sub, const F* level_scale, const LevelSums* sums, Fit* fits) {
    F scale[G], low[G], error[G];
    M solved[G];
    for (int g = 0; g < G; g++) {
        const F l = sums[g].l, l2 = sums[g].l2, xl = sums[g].xl;
        const F determinant = fits[g].sum_weight * l2 - l * l;
        solved[g] = less(zero(), determinant);
        scale[g] = (fits[g].sum_weight * xl - fits[g].sum_x * l) / determinant;
        low[g] = (l2 * fits[g].sum_x - l * xl) / determinant;
        const M above = less(zero(), low[g]);
        if (!any(above)) continue;
        low[g] = select(above, zero(), low[g]);
        scale[g] = select(above, xl / l2, scale[g]);
    }
    sum_errors<Search, G>(sub, scale, low, error);
    for (int g = 0; g < G; g++) {
        Fit& now = fits[g];
        const M better = solved[g] & less(error[g], now.error);
        now.level_scale = select(better, level_scale[g], now.level_scale);
        now.level_low = select(better, now.low, now.level_low);
        now.error = select(better, error[g], now.error);
        now.scale = select(better, scale[g], now.scale);
        now.low = select(better, low[g], now.low);
    }
}

// Fits sub-blocks whose x and weight are given. Search is a struct: N values in a sub-block, levels 0 .. TOP, whether
// the error is ABSOLUTE or squared, and candidates number 0 .. STEPS that spread the values over
// FIRST + STEP * number + TOP levels. Each starts from the least value that the best one before it found.
template <class Search, int G> INLINE void fit(SubBlocks<Search::N, G>& sub, Fit* fits) {
    F level_scale[G], scale[G], low[G], error[G];
    LevelSums sums[G];
    begin(sub, fits);
    spread<Search, G>(sub, fits, float(Search::TOP), level_scale, sums);
    for (int g = 0; g < G; g++) {
        scale[g] = select(fits[g].flat, zero(), splat(1.f) / level_scale[g]);
        low[g] = fits[g].low;
    }
    sum_errors<Search, G>(sub, scale, low, error);
    for (int g = 0; g < G; g++) {
        fits[g].scale = scale[g];
        fits[g].error = error[g];
        fits[g].level_scale = level_scale[g];
        fits[g].level_low = low[g];
    }
    for (int number = 0; number <= Search::STEPS; number++) {
        const float levels = Search::FIRST + Search::STEP * float(number) + float(Search::TOP);
        spread<Search, G>(sub, fits, levels, level_scale, sums);
        improve<Search, G>(sub, level_scale, sums, fits);
    }
}

// Levels 0 .. TOP of COUNT numbers that are not negative, and the scale that fits them best: by candidates, then by
// moving one level at a time. A level is a byte, and wraps as one.
template <int COUNT, int TOP> INLINE F fit_levels(const F* x, const F* weight, I* level) {
    F most = zero();
    for (int i = 0; i < COUNT; i++) most = max(most, x[i]);
    const M none = less(most, splat(1e-15f));
    F inverse = splat(float(TOP)) / most, best = zero();
    for (int i = 0; i < COUNT; i++) {
        const F difference = x[i] - splat(1.f) / inverse * to_float(nearest(inverse * x[i]) & 255);
        best = best + weight[i] * difference * difference;
    }
    for (int k = -4; k <= 4; k++) {
        if (k == 0) continue;
        const F candidate = splat(0.1f * float(k) + float(TOP)) / most, scale = splat(1.f) / candidate;
        F error = zero();
        for (int i = 0; i < COUNT; i++) {
            const F difference = x[i] - scale * to_float(min(splat(TOP), nearest(candidate * x[i])));
            error = error + weight[i] * difference * difference;
        }
        const M better = less(error, best);
        best = select(better, error, best);
        inverse = select(better, candidate, inverse);
    }
    F sum_lx = zero(), sum_l2 = zero();
    for (int i = 0; i < COUNT; i++) {
        const I l = min(splat(TOP), nearest(inverse * x[i]));
        level[i] = l & 255;
        sum_lx = sum_lx + weight[i] * x[i] * to_float(l);
        sum_l2 = sum_l2 + weight[i] * to_float(l) * to_float(l);
    }
    for (int round = 0; round < 5; round++) {
        M changed = M{};
        for (int i = 0; i < COUNT; i++) {
            const F old = to_float(level[i]), wx = weight[i] * x[i];
            F lx = sum_lx - wx * old, l2 = sum_l2 - weight[i] * old * old;
            const M positive = less(zero(), lx) & less(zero(), l2);
            const I moved = min(splat(TOP), nearest(x[i] * l2 / lx));
            lx = lx + wx * to_float(moved);
            l2 = l2 + weight[i] * to_float(moved) * to_float(moved);
            const M better = positive & ~equal(moved, level[i]) & less(sum_lx * sum_lx * l2, lx * lx * sum_l2);
            level[i] = select(better, moved & 255, level[i]);
            sum_lx = select(better, lx, sum_lx);
            sum_l2 = select(better, l2, sum_l2);
            changed = changed | better;
        }
        if (!any(changed)) break;
    }
    for (int i = 0; i < COUNT; i++) level[i] = select(none, splat(0), level[i]);
    return select(none | ~less(zero(), sum_l2), zero(), sum_lx / sum_l2);
}

// Plainly: the largest becomes TOP. Returns it over TOP.
template <int COUNT, int TOP> INLINE F round_levels(const F* x, I* level) {
    F most = zero();
    for (int i = 0; i < COUNT; i++) most = max(x[i], most);
    const F inverse = select(less(zero(), most), splat(float(TOP)) / most, zero());
    for (int i = 0; i < COUNT; i++) level[i] = nearest(inverse * x[i]) & 255;
    return most / splat(float(TOP));
}

}  // namespace mixtools::LANES_NAMESPACE
