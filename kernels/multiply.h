// Products with matrices that stay in blocks, on threads: the multiplier of a type and instruction set, and one loop over
// all that is multiplied together.
#pragma once

#include <algorithm>
#include <memory>

#include "decode.h"
#include "narrow.h"
#include "slices.h"

namespace mixtools::blocks {

inline Multiplier multiplier(int type, int isa) {
    switch (isa) {
        case PLAIN: return plain::multiplier(type);
#if MIXTOOLS_X86
        case AVX2: return avx2::multiplier(type);
        case AVX512:
        case AVX512_BF16: return avx512::multiplier(type);
#endif
    }
    return {};
}

// The same for x of bf16 that `prepare` has laid out as `X`, strides in 256 values; it may refuse some.
template <typename X> struct PreparedMultiplier {
    using Run = void (*)(const uint8_t* blocks, int64_t row_bytes, int64_t rows, int64_t count, const X* x,
                         int64_t x_stride, float* out, int64_t out_stride);
    Run one = nullptr, together = nullptr;
    bool (*prepare)(const float* x, int64_t blocks, X* out) = nullptr;
};

// make(a block of that type), or what is made of nothing: of the types whose scales are small integers.
template <typename Made, typename Make> Made of_k_quant(int type, const Make& make) {
    switch (type) {
        case Q2_K::TYPE: return make(Q2_K{});
        case Q3_K::TYPE: return make(Q3_K{});
        case Q4_K::TYPE: return make(Q4_K{});
        case Q5_K::TYPE: return make(Q5_K{});
        case Q6_K::TYPE: return make(Q6_K{});
    }
    return {};
}

#if MIXTOOLS_AVX512_BF16
inline PreparedMultiplier<narrow::X> narrow_multiplier(int type, int isa) {
    using Made = PreparedMultiplier<narrow::X>;
    if (isa != AVX512_BF16) return {};
    const auto make = [](auto block) {
        using Block = decltype(block);
        return Made{narrow::multiply<Block, 1>, narrow::multiply<Block, TOGETHER>, narrow::prepare<Block>};
    };
    switch ((type - 256) / 16) {
        case 3: return plain::of_groups<Made, 3>(type, make);
        case 4: return plain::of_groups<Made, 4>(type, make);
    }
    return of_k_quant<Made>(type, make);
}
#endif

#if MIXTOOLS_X86
inline PreparedMultiplier<slices::X> sliced_multiplier(int type, int isa) {
    using Made = PreparedMultiplier<slices::X>;
    if (isa != AVX2 && isa != AVX512) return {};
    const auto make = [](auto block) {
        using Block = decltype(block);
        return Made{slices::multiply<Block, 1>, slices::multiply<Block, TOGETHER>, slices::prepare<Block>};
    };
    switch (type) {
        case Grouped<4, 1>::TYPE: return make(Grouped<4, 1>{});
        case Grouped<4, 2>::TYPE: return make(Grouped<4, 2>{});
        case Grouped<4, 4>::TYPE: return make(Grouped<4, 4>{});
    }
    return of_k_quant<Made>(type, make);
}
#endif

// out [tokens, rows] = x [tokens, blocks * VALUES] times the values of src [rows, blocks] of `type`, transposed. Rows of
// src lie src_stride bytes apart, those of x and of out so many values. The layout is part of the ABI: 8 bytes each.
struct Product {
    const uint8_t* src;
    int64_t src_stride, rows, blocks, type;
    const float* x;
    int64_t x_stride, tokens;
    float* out;
    int64_t out_stride;
};
static_assert(sizeof(Product) == 10 * 8);

constexpr int64_t MULTIPLY_BYTES = 64 << 10;  // of blocks, that a thread takes at a time

// A product as threads take it: pieces of its rows.
class Pieces {
  public:
    int64_t count = 0;

    // `prepare`: x is of bf16, and may be laid out for the machine's products of that. False for an unknown type.
    bool set(const Product& of, bool prepare, int isa) {
        product = of;
        wide = multiplier(static_cast<int>(of.type), isa);
        if (!wide.one) return false;
        step = std::max<int64_t>(1, MULTIPLY_BYTES / std::max<int64_t>(1, of.blocks * wide.block_bytes));
        count = (of.rows + step - 1) / step;
#if MIXTOOLS_AVX512_BF16
        if (prepare) narrow.set(product, isa, narrow_multiplier);
#endif
#if MIXTOOLS_X86
        if (prepare) sliced.set(product, isa, sliced_multiplier);
#endif
        return true;
    }

    void run(int64_t piece) const {
        const int64_t first = piece * step, rows = std::min(product.rows - first, step);
#if MIXTOOLS_AVX512_BF16
        if (narrow.x) return run(narrow.by, narrow.x.get(), product.blocks, first, rows);
#endif
#if MIXTOOLS_X86
        if (sliced.x) return run(sliced.by, sliced.x.get(), product.blocks, first, rows);
#endif
        run(wide, product.x, product.x_stride, first, rows);
    }

  private:
    template <typename Multiplier, typename Value>
    void run(const Multiplier& by, const Value* x, int64_t x_stride, int64_t first, int64_t rows) const {
        for (int64_t token = 0, count; token < product.tokens; token += count) {
            count = product.tokens - token < TOGETHER ? 1 : TOGETHER;
            const auto multiply = count == 1 ? by.one : by.together;
            multiply(product.src + first * product.src_stride, product.src_stride, rows, product.blocks,
                     x + token * x_stride, x_stride, product.out + token * product.out_stride + first,
                     product.out_stride);
        }
    }

    // A way for x that are prepared, and those; none where there is no such way.
    template <typename X> struct Prepared {
        PreparedMultiplier<X> by;
        std::unique_ptr<X[]> x;

        void set(const Product& of, int isa, PreparedMultiplier<X> (*multiplier)(int, int)) {
            by = multiplier(static_cast<int>(of.type), isa);
            if (!by.one) return;
            x.reset(new X[of.tokens * of.blocks]);
            for (int64_t token = 0; token < of.tokens; token++)
                if (!by.prepare(of.x + token * of.x_stride, of.blocks, &x[token * of.blocks])) return x.reset();
        }
    };

    Product product{};
    Multiplier wide;
    int64_t step = 1;
#if MIXTOOLS_AVX512_BF16
    Prepared<narrow::X> narrow;
#endif
#if MIXTOOLS_X86
    Prepared<slices::X> sliced;
#endif
};

// All of them as one loop over threads: a product of one x takes a millisecond, and to wake a thread a tenth of that.
inline bool multiply_all(const Product* products, int64_t count, bool narrow, int64_t threads, int isa) {
    const std::unique_ptr<Pieces[]> pieces(new Pieces[count]);
    int64_t total = 0;
    for (int64_t i = 0; i < count; i++) {
        if (!pieces[i].set(products[i], narrow, isa)) return false;
        total += pieces[i].count;
    }
    parallel_for(total, threads, [&](int64_t piece) {
        int64_t i = 0;
        for (; piece >= pieces[i].count; i++) piece -= pieces[i].count;
        pieces[i].run(piece);
    });
    return true;
}

}  // namespace mixtools::blocks
