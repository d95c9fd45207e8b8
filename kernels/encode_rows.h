// From a source matrix to its blocks, batch by batch; included once for each instruction set, as lanes.h is.
//
// An encoder is a struct with
//   VALUES, BYTES    of one block
//   BATCH            blocks that run() takes at once
//   static void run(const float* values, const float* importance, uint8_t* out)
// where values [BATCH * VALUES] and importance (as many, or null) are dense, and out takes BATCH blocks.

#include "lanes.h"

#include "affine_fit.h"
#include "symmetric_fit.h"

#include "encode_affine.h"
#include "encode_small.h"
#include "encode_symmetric.h"
#include "encode_table.h"

namespace mixtools::LANES_NAMESPACE {

// `count` values at `from`, of any type and alignment, as floats: exact.
inline void widen(const uint8_t* from, SourceType type, int64_t count, float* to) {
    if (type == F32) {
        std::memcpy(to, from, count * sizeof(float));
        return;
    }
    uint16_t halves[W];
    for (int64_t i = 0; i < count; i += W, from += sizeof halves, to += W) {
        std::memcpy(halves, from, sizeof halves);
        const I half = load_halves(halves);
        store(to, type == BF16 ? from_bits(half << 16) : from_half_bits(half));
    }
}

// Of each row, into lanes beyond the last row too: the mean square of its values.
inline void find_mean_squares(const Source& source, int64_t threads, float* mean_squares) {
    parallel_for((source.rows + W - 1) / W, threads, [&](int64_t chunk) {
        const DefaultFloats floats;
        alignas(64) float values[W * W] = {};
        const int64_t first = chunk * W, count = std::min<int64_t>(W, source.rows - first);
        F sum = zero(), x[W];
        for (int64_t col = 0; col < source.cols; col += W) {
            const uint8_t* from = source.data + first * source.stride + col * source.item_size();
            for (int64_t i = 0; i < count; i++) widen(from + i * source.stride, source.type, W, values + i * W);
            load_transposed<W>(values, W, x);
            for (int k = 0; k < W; k++) sum = sum + x[k] * x[k];
        }
        store(mean_squares + first, sum / splat(float(source.cols)));
    });
}

// The importance of the columns of `count` values, made the values' weights.
INLINE void weigh(const float* values, float mean_square, int64_t count, float* importance) {
    for (int64_t i = 0; i < count; i += W) {
        const F x = load(values + i);
        store(importance + i, load(importance + i) * sqrt(splat(mean_square) + x * x));
    }
}

// Blocks `first` to `first + count` of the matrix, counted through all rows, and the importance of their columns; or,
// where the mean squares of rows are given, weights.
template <class Encoder>
inline void gather(const Source& source, const float* mean_squares, int64_t first, int64_t count, float* values,
                   float* importance) {
    const int64_t across = source.cols / Encoder::VALUES;
    while (count > 0) {
        const int64_t row = first / across, block = first % across, run = std::min(count, across - block);
        const int64_t col = block * Encoder::VALUES, size = run * Encoder::VALUES;
        widen(source.data + row * source.stride + col * source.item_size(), source.type, size, values);
        if (source.importance) std::memcpy(importance, source.importance + col, size * sizeof(float));
        if (mean_squares) weigh(values, mean_squares[row], size, importance);
        values += size;
        importance += size;
        first += run;
        count -= run;
    }
}

// Writes the blocks `first` to `end`. The lanes beyond the last block compute on zeros.
template <class Encoder>
inline void encode_run(const Source& source, const float* mean_squares, int64_t first, int64_t end, uint8_t* out) {
    constexpr int64_t BATCH = Encoder::BATCH, SIZE = BATCH * Encoder::VALUES;
    alignas(64) float values[SIZE], importance[SIZE];
    uint8_t rest[BATCH * Encoder::BYTES];
    for (; first < end; first += BATCH) {
        const int64_t count = std::min(BATCH, end - first), filled = count * Encoder::VALUES;
        gather<Encoder>(source, mean_squares, first, count, values, importance);
        std::fill(values + filled, values + SIZE, 0.f);
        std::fill(importance + filled, importance + SIZE, 0.f);
        uint8_t* to = out + first * Encoder::BYTES;
        Encoder::run(values, source.importance ? importance : nullptr, count == BATCH ? to : rest);
        if (count < BATCH) std::memcpy(to, rest, count * Encoder::BYTES);
    }
}

template <class Encoder>
inline void encode_as(const Source& source, uint8_t* out, int64_t threads, const float* mean_squares = nullptr) {
    constexpr int64_t BATCH_VALUES = Encoder::BATCH * Encoder::VALUES;
    constexpr int64_t CHUNK = std::max<int64_t>(1, ENCODE_CHUNK / BATCH_VALUES) * Encoder::BATCH;
    const int64_t blocks = source.rows * (source.cols / Encoder::VALUES);
    parallel_for((blocks + CHUNK - 1) / CHUNK, threads, [&](int64_t chunk) {
        const DefaultFloats floats;
        encode_run<Encoder>(source, mean_squares, chunk * CHUNK, std::min(blocks, (chunk + 1) * CHUNK), out);
    });
}

// The same for encoders whose run() takes weights instead of importance, which depend on all of a row.
template <class Encoder> inline void encode_weighted(const Source& source, uint8_t* out, int64_t threads) {
    if (!source.importance) return encode_as<Encoder>(source, out, threads);
    std::vector<float> mean_squares(source.rows + W);
    find_mean_squares(source, threads, mean_squares.data());
    encode_as<Encoder>(source, out, threads, mean_squares.data());
}

// False for a type that has no encoder here.
inline bool encode(const Source& source, BlockType type, uint8_t* out, int64_t threads) {
    switch (type) {
        case Q4_K: encode_as<EncodeQ4K>(source, out, threads); return true;
        case Q5_K: encode_as<EncodeQ5K>(source, out, threads); return true;
        case Q2_K: encode_as<EncodeQ2K>(source, out, threads); return true;
        case Q3_K: encode_as<EncodeQ3K>(source, out, threads); return true;
        case Q6_K: encode_as<EncodeQ6K>(source, out, threads); return true;
        case Q8_0: encode_as<EncodeQ80>(source, out, threads); return true;
        case Q4_0: encode_weighted<EncodeQ40>(source, out, threads); return true;
        case Q4_1: encode_weighted<EncodeQ41>(source, out, threads); return true;
        case Q5_0: encode_weighted<EncodeQ50>(source, out, threads); return true;
        case Q5_1: encode_weighted<EncodeQ51>(source, out, threads); return true;
        case IQ4_NL: encode_as<EncodeIQ4NL>(source, out, threads); return true;
        case IQ4_XS: encode_as<EncodeIQ4XS>(source, out, threads); return true;
        case MXFP4: encode_as<EncodeMXFP4>(source, out, threads); return true;
        default: return false;
    }
}

}  // namespace mixtools::LANES_NAMESPACE
