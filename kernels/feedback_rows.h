// The rounding of feedback.h for a chunk of rows at a time; included once for each instruction set, after its lanes.h.

namespace mixtools::LANES_NAMESPACE {

// The sums of TILE columns of VECTORS * W rows are in registers at once: there are 32 with AVX-512, else 16. A number
// of the feedback is spread over the lanes once for all VECTORS.
constexpr int TILE = W == 16 ? 4 : 2, VECTORS = 4, CHUNK_ROWS = VECTORS * W;

inline int64_t tile_width(int64_t col, int64_t columns) { return col + TILE <= columns ? TILE : 1; }

// The tile that starts at `col` finds what column i feeds it at [col * columns + i * width of the tile].
inline std::vector<float> pack_feedback(const FeedbackBlock& block) {
    std::vector<float> panels(block.columns * block.columns);
    for (int64_t col = 0, width; col < block.columns; col += width) {
        width = tile_width(col, block.columns);
        float* to = panels.data() + col * block.columns;
        for (int64_t i = 0; i < col + width; i++, to += width) std::copy_n(block.feedback.at(i, col), width, to);
    }
    return panels;
}

// The nearest of `low`, `low` + 1, ..., half to even.
class EvenLevels {
  public:
    INLINE explicit EvenLevels(const Levels& levels)
        : first(splat(levels.low)), low(to_float(first)), high(to_float(first + (levels.count - 1))) {}

    INLINE void choose(const F* wanted, F* level, I* code) const {
        for (int v = 0; v < VECTORS; v++) {
            const I chosen = nearest(max(min(wanted[v], high), low));
            level[v] = to_float(chosen);
            code[v] = chosen - first;
        }
    }

  private:
    I first;
    F low, high;
};

// The nearest of a table, the lower of two as near.
class TableLevels {
  public:
    INLINE explicit TableLevels(const Levels& levels) : levels(levels) {}

    INLINE void choose(const F* wanted, F* level, I* code) const {
        for (int v = 0; v < VECTORS; v++) {
            level[v] = splat(levels.table[0]);
            code[v] = splat(0);
        }
        for (int32_t i = 1; i < levels.count; i++) {
            const F limit = splat(levels.limits[i - 1]), next = splat(levels.table[i]);
            for (int v = 0; v < VECTORS; v++) {
                const M beyond = less(limit, wanted[v]);
                level[v] = select(beyond, next, level[v]);
                code[v] = less_one(beyond, code[v]);
            }
        }
        for (int v = 0; v < VECTORS; v++) code[v] = splat(0) - code[v];
    }

  private:
    Levels levels;
};

// Rows of the chunk that starts at `row`; unless it is WHOLE, lanes beyond the last row read zeros and write nothing.
template <bool WHOLE> struct ChunkOfRows {
    int64_t row, rows;

    INLINE int64_t count(int v) const { return std::max<int64_t>(0, std::min<int64_t>(W, rows - row - v * W)); }

    INLINE F read(Lines<const float> from, int64_t line, int v) const {
        const float* at = from.at(line, row + v * W);
        if (WHOLE) return load(at);
        alignas(64) float some[W] = {};
        std::copy_n(at, count(v), some);
        return load(some);
    }
    INLINE F read(Lines<float> from, int64_t line, int v) const {
        return read(Lines<const float>{from.data, from.stride}, line, v);
    }
    INLINE void write(Lines<float> to, int64_t line, int v, F value) const {
        float* at = to.at(line, row + v * W);
        if (WHOLE) return store(at, value);
        alignas(64) float all[W];
        store(all, value);
        std::copy_n(all, count(v), at);
    }
    INLINE void write(Lines<uint8_t> to, int64_t line, int v, I value) const {
        uint8_t* at = to.at(line, row + v * W);
        if (WHOLE) return store_bytes(at, value);
        uint8_t all[W];
        store_bytes(all, value);
        std::copy_n(all, count(v), at);
    }
};

// The targets of K columns from `col` on, with what all columns before `col` feed them. `deltas` [columns, CHUNK_ROWS]
// holds what those changed in their errors, and takes the targets in the lines of the K.
template <int K, class Chunk>
inline void feed_tile(const FeedbackBlock& block, Chunk chunk, const float* panel, int64_t col, float* deltas) {
    F sum[K][VECTORS];
    for (int c = 0; c < K; c++)
        for (int v = 0; v < VECTORS; v++) sum[c][v] = chunk.read(block.targets, col + c, v);
    for (int64_t i = 0; i < col; i++, panel += K) {
        F delta[VECTORS];
        for (int v = 0; v < VECTORS; v++) delta[v] = load(deltas + i * CHUNK_ROWS + v * W);
        for (int c = 0; c < K; c++) {
            const F factor = splat(panel[c]);
            for (int v = 0; v < VECTORS; v++) sum[c][v] = sum[c][v] + delta[v] * factor;
        }
    }
    for (int c = 0; c < K; c++)
        for (int v = 0; v < VECTORS; v++) store(deltas + (col + c) * CHUNK_ROWS + v * W, sum[c][v]);
}

// Rounds the targets of a column to the nearest levels, and puts in their place what that changes in the errors. All is
// read before anything is written: lines are often a multiple of 4096 bytes apart, and then a processor may hold a read
// back as if it wanted what was just written.
template <class Chunk, class Rounder>
INLINE void round_column(const FeedbackBlock& block, Chunk chunk, const Rounder& rounder, int64_t col, float* targets) {
    F target[VECTORS], scale[VECTORS], low[VECTORS], weight[VECTORS], before[VECTORS], wanted[VECTORS], level[VECTORS];
    I code[VECTORS];
    const int32_t group = block.group_of[col];
    for (int v = 0; v < VECTORS; v++) {
        target[v] = load(targets + v * W);
        scale[v] = chunk.read(block.scales, group, v);
        low[v] = chunk.read(block.mins, group, v);
        weight[v] = chunk.read(block.weights, col, v);
        before[v] = chunk.read(block.errors, col, v);
        const F quotient = (target[v] - low[v]) / scale[v];
        // a scale of zero, or sums beyond all bounds: the level nearest to zero
        wanted[v] = select(less(zero(), abs(scale[v])) & equal(quotient, quotient), quotient, zero());
    }
    rounder.choose(wanted, level, code);
    for (int v = 0; v < VECTORS; v++) {
        const F error = weight[v] - (scale[v] * level[v] + low[v]);
        store(targets + v * W, error - before[v]);
        chunk.write(block.targets, col, v, target[v]);
        chunk.write(block.errors, col, v, error);
        chunk.write(block.codes, col, v, code[v]);
    }
}

template <int K, class Chunk, class Rounder>
inline void round_tile(const FeedbackBlock& block, Chunk chunk, const Rounder& rounder, const float* panel, int64_t col,
                       float* deltas) {
    feed_tile<K>(block, chunk, panel, col, deltas);
    panel += col * K;
    deltas += col * CHUNK_ROWS;
    for (int c = 0; c < K; c++, panel += K, deltas += CHUNK_ROWS) {
        round_column(block, chunk, rounder, col + c, deltas);
        for (int k = c + 1; k < K; k++) {
            const F factor = splat(panel[k]);
            for (int at = 0; at < CHUNK_ROWS; at += W) {
                float* later = deltas + (k - c) * CHUNK_ROWS + at;
                store(later, load(later) + load(deltas + at) * factor);
            }
        }
    }
}

template <class Chunk, class Rounder>
inline void round_chunk(const FeedbackBlock& block, Chunk chunk, const Rounder& rounder, const float* panels) {
    alignas(64) float deltas[FEEDBACK_COLUMNS * CHUNK_ROWS];
    for (int64_t col = 0, width; col < block.columns; col += width) {
        width = tile_width(col, block.columns);
        const float* panel = panels + col * block.columns;
        if (width == TILE)
            round_tile<TILE>(block, chunk, rounder, panel, col, deltas);
        else
            round_tile<1>(block, chunk, rounder, panel, col, deltas);
    }
}

template <class Rounder> inline void round_rows(const FeedbackBlock& block, const float* panels, int64_t threads) {
    parallel_for((block.rows + CHUNK_ROWS - 1) / CHUNK_ROWS, threads, [&](int64_t number) {
        const DefaultFloats floats;
        const Rounder rounder(block.levels);
        const int64_t row = number * CHUNK_ROWS;
        if (row + CHUNK_ROWS <= block.rows)
            round_chunk(block, ChunkOfRows<true>{row, block.rows}, rounder, panels);
        else
            round_chunk(block, ChunkOfRows<false>{row, block.rows}, rounder, panels);
    });
}

inline void round_block(const FeedbackBlock& block, int64_t threads) {
    const std::vector<float> panels = pack_feedback(block);
    if (block.levels.table)
        round_rows<TableLevels>(block, panels.data(), threads);
    else
        round_rows<EvenLevels>(block, panels.data(), threads);
}

}  // namespace mixtools::LANES_NAMESPACE
