// Searches for the scale of sub-blocks whose values are scale * level, level an integer in -TOP .. TOP - 1: those of
// ggml-quants.c in https://github.com/ggml-org/llama.cpp. make_qx_quants is `fit_scale` here, make_q3_quants is
// `sweep_levels`.
//
// Each lane does what ggml does for its sub-block, operation by operation: the order of sums, the unequal `<` and `<=`,
// what rounds how. Where ggml branches, a mask takes the result of its branch. Included once for each instruction set.

namespace mixtools::LANES_NAMESPACE {

// Value j of W sub-blocks, its weight, and weight * value.
template <int N> struct Weighed {
    F x[N], weight[N], wx[N];
};

// The squares of the values as their weights.
template <int N> INLINE void weigh_by_square(Weighed<N>& sub) {
    for (int j = 0; j < N; j++) {
        sub.weight[j] = sub.x[j] * sub.x[j];
        sub.wx[j] = sub.weight[j] * sub.x[j];
    }
}

// Of the values with the greatest size the first one.
template <int N> INLINE F first_extreme(const F* x, F& size) {
    F extreme = zero();
    size = zero();
    for (int j = 0; j < N; j++) {
        const F of_this = abs(x[j]);
        extreme = select(less(size, of_this), x[j], extreme);
        size = max(of_this, size);
    }
    return extreme;
}

// The nearest level, as a number. SMALL promises |v| < 2^22; otherwise it wraps and makes 0 of a NaN, as `nearest`.
template <int TOP, bool SMALL> INLINE F nearest_level(F v) {
    if constexpr (SMALL) return min(max(round_small(v), splat(-float(TOP))), splat(float(TOP - 1)));
    const float zero_level = 12582912.f;  // whose last 22 bits are the level's
    const F wrapped = from_bits((bits(v + splat(zero_level)) & 0x007fffff) | 0x4b000000);
    return min(max(wrapped, splat(zero_level - float(TOP))), splat(zero_level + float(TOP - 1))) - splat(zero_level);
}

// Weighted sums of level * value and level^2, where level = nearest(level_scale * value): for K scales at once, so that
// no addition waits for the one before.
template <int N, int TOP, bool SMALL, int K>
INLINE void sum_levels(const Weighed<N>& sub, const F* level_scale, F* sum_xl, F* sum_l2) {
    for (int k = 0; k < K; k++) sum_xl[k] = sum_l2[k] = zero();
    for (int j = 0; j < N; j++)
        for (int k = 0; k < K; k++) {
            const F level = nearest_level<TOP, SMALL>(level_scale[k] * sub.x[j]);
            sum_xl[k] = sum_xl[k] + sub.wx[j] * level;
            sum_l2[k] = sum_l2[k] + sub.weight[j] * level * level;
        }
}

// The levels are nearest(level_scale * value). Sub-blocks of nearly nothing have none, and scales of 0.
struct ScaleFit {
    F scale, level_scale;
    M none;
};

// The best of 19 scales by weighted squares. SMALL promises finite values.
template <int TOP, bool SMALL, int N> INLINE ScaleFit fit_scale(const Weighed<N>& sub) {
    F size, candidate[3], sum_xl[3], sum_l2[3];
    const F extreme = first_extreme<N>(sub.x, size);
    const M none = less(size, splat(1e-15f));
    F level_scale = splat(-float(TOP)) / extreme;
    sum_levels<N, TOP, SMALL, 1>(sub, &level_scale, sum_xl, sum_l2);
    F scale = select(equal(sum_l2[0], zero()), zero(), sum_xl[0] / sum_l2[0]), best = scale * sum_xl[0];
    for (const int first : {-9, -6, -3, 1, 4, 7}) {
        for (int k = 0; k < 3; k++) candidate[k] = splat(-(float(TOP) + 0.1f * float(first + k))) / extreme;
        sum_levels<N, TOP, SMALL, 3>(sub, candidate, sum_xl, sum_l2);
        for (int k = 0; k < 3; k++) {
            const F new_scale = sum_xl[k] / sum_l2[k];
            const M better = less(zero(), sum_l2[k]) & less(best * sum_l2[k], sum_xl[k] * sum_xl[k]);
            scale = select(better, new_scale, scale);
            best = select(better, new_scale * sum_xl[k], best);
            level_scale = select(better, candidate[k], level_scale);
        }
    }
    return ScaleFit{select(none, zero(), scale), select(none, zero(), level_scale), none};
}

// TOP + level, from 0 on; and 0 where there are none.
template <int TOP> INLINE I raised_level(F x, const ScaleFit& fit) {
    const I level = min(max(nearest(fit.level_scale * x), splat(-TOP)), splat(TOP - 1));
    return select(fit.none, splat(0), level + TOP);
}

// Moves one level after the other to where the others want it, until none moves or 5 times. G registers of sub-blocks
// together, as each step waits for the one before. The weights are the squares of the values.
// Finds the scales, and TOP + level of each value; 0 where the sub-block has no levels.
template <int TOP, int N, int G> INLINE void sweep_levels(const Weighed<N>* subs, I (*raised)[N], F* scale) {
    F level[G][N], sum_xl[G], sum_l2[G];
    M none[G];
    for (int g = 0; g < G; g++) {
        F size;
        const F level_scale = splat(-float(TOP)) / first_extreme<N>(subs[g].x, size);
        none[g] = less(size, splat(1e-15f));
        sum_xl[g] = sum_l2[g] = zero();
        for (int j = 0; j < N; j++) {
            level[g][j] = nearest_level<TOP, true>(level_scale * subs[g].x[j]);
            sum_xl[g] = sum_xl[g] + subs[g].wx[j] * level[g][j];
            sum_l2[g] = sum_l2[g] + subs[g].weight[j] * level[g][j] * level[g][j];
        }
    }
    for (int round = 0; round < 5; round++) {
        M moved = M{};
        for (int j = 0; j < N; j++)
            for (int g = 0; g < G; g++) {
                const F x = subs[g].x[j], w = subs[g].weight[j], wx = subs[g].wx[j], old = level[g][j];
                F xl = sum_xl[g] - wx * old, l2 = sum_l2[g] - w * old * old;
                M better = less(zero(), xl);
                const F wanted = nearest_level<TOP, false>(x * l2 / xl);
                xl = xl + wx * wanted;
                l2 = l2 + w * wanted * wanted;
                better = better & ~equal(wanted, old) & less(zero(), l2) &
                         less(sum_xl[g] * sum_xl[g] * l2, xl * xl * sum_l2[g]);
                level[g][j] = select(better, wanted, old);
                sum_xl[g] = select(better, xl, sum_xl[g]);
                sum_l2[g] = select(better, l2, sum_l2[g]);
                moved = moved | better;
            }
        if (!any(moved)) break;
    }
    for (int g = 0; g < G; g++) {
        for (int j = 0; j < N; j++) raised[g][j] = select(none[g], splat(0), nearest(level[g][j]) + TOP);
        scale[g] = select(~none[g] & less(zero(), sum_l2[g]), sum_xl[g] / sum_l2[g], zero());
    }
}

}  // namespace mixtools::LANES_NAMESPACE
