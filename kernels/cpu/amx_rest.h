// The rests of the forward pass on AMX, from bfloat16 tensors. Pooled keys join the tiled softmax as one more block; their first order, and the states of the
// linear rest with its projection, are products of tiles. What is multiplied is rounded to bfloat16, what is summed is float32. The backward pass has its pooled
// keys from here, too.

static inline void narrow_all(uint16_t* to, const float* from, int64_t n) {  // n: whole vectors
    for (int64_t e = 0; e < n; e += LANES) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + e), __m256i(_mm512_cvtneps_pbh(__m512(load(from + e)))));
}

// The two of each pair.
static inline V even(__m512i pairs) { return V(_mm512_slli_epi32(pairs, 16)); }
static inline V odd(__m512i pairs) { return V(_mm512_and_si512(pairs, _mm512_set1_epi32(int32_t(0xFFFF0000)))); }

static inline void square_pairs(int32_t* to, const int32_t* from, int64_t n) {  // n entries, each a pair
    for (int64_t e = 0; e < n; e += SIDE) {
        __m512i x = _mm512_load_si512(from + e);
        _mm512_store_si512(to + e, paired(even(x) * even(x), odd(x) * odd(x)));
    }
}

// Pooled keys in bfloat16: all of a head's as rows, and those that query blocks see as one block of tiles.
struct TiledPool {
    const Geometry& g;
    const TileSizes sizes;
    Array<uint16_t> mean, value, spread;  // [pools, padded], of all; spread: the variances, with a variance term alone
    Array<int32_t> keys, values, spreads, places;  // values: as columns, for the backward pass as rows
    Array<int32_t> key_columns, spread_columns;    // for the backward pass alone
    int64_t count = 0;            // of the keys in tiles

    TiledPool(const Geometry& g, int64_t most, bool all, bool backward)
        : g(g), sizes(g, most), keys(all && g.listed() ? 0 : sizes.block), values(all && g.listed() ? 0 : sizes.block) {
        if (all) mean.allocate(most * g.padded), value.allocate(most * g.padded), count = most;
        if (all && g.p.variance) spread.allocate(most * g.padded), spreads.allocate(sizes.block);
        if (!all) places.allocate(most);
        if (backward && !(all && g.listed())) key_columns.allocate(sizes.block);
        if (backward && spread) spread_columns.allocate(sizes.block);
    }

    int64_t tasks() const { return sizes.steps; }
    void fill(const Pool& pool, int64_t step) {  // PAIR of all pooled keys
        int64_t first = step * PAIR, n = std::min(PAIR, count - first), at = first * g.padded;
        narrow_all(mean + at, pool.mean + at, n * g.padded), narrow_all(value + at, pool.value + at, n * g.padded);
        if (!g.listed()) tiles(*this, {first, -1, n}, step);
        if (!g.p.variance) return;
        narrow_all(spread + at, pool.var + at, n * g.padded);
        const HalfRows spreads_of(spread, g.padded, g.channels, {first, -1, n});
        sizes.rows(spreads + step * 2 * sizes.depth * TILE, spreads_of);
        if (spread_columns) sizes.columns(spread_columns + step * TILE, spreads_of);
    }
    // Tokens of a run as those from step · PAIR on.
    void tiles(const TiledPool& all, const Run& run, int64_t step) {
        const HalfRows key(all.mean, g.padded, g.channels, run), value_of(all.value, g.padded, g.channels, run);
        sizes.rows(keys + step * 2 * sizes.depth * TILE, key);
        if (!key_columns) return sizes.columns(values + step * TILE, value_of);
        sizes.rows(values + step * 2 * sizes.depth * TILE, value_of), sizes.columns(key_columns + step * TILE, key);
    }
    // The units on the list of query block i.
    void gather(const TiledPool& all, int64_t bh, int64_t i) {
        int64_t list = bh * g.states() + g.state(i), parts = g.parts(), units = g.p.pool_counts[list];
        const int32_t* unit = g.p.pool_lists + list * g.p.pool_width;
        for (int64_t n = 0; n < units; n++)
            for (int64_t part = 0; part < parts; part++) places[n * parts + part] = int32_t(unit[n] * parts + part);
        count = units * parts;
        tiles(all, {0, -1, count, places}, 0);
    }
    TiledBlock block() const { return {keys, values, sizes.steps}; }
};

// The variance term of pooled keys' logits, for one thread.
struct TiledTerms {
    const Geometry& g;
    Array<int32_t> squares;  // of the queries, as TiledSoftmax has those
    Array<float> terms;      // [2, CHUNK, queries of a tile]

    explicit TiledTerms(const TiledSoftmax& s) : g(s.g), squares(g.width / SIDE * s.sizes.depth * TILE), terms(2 * CHUNK * SIDE) {}

    // Add the pooled keys to a softmax.
    void visit(TiledSoftmax& s, int64_t rows, const TiledPool& pool, const float* bias) {
        const int64_t row = s.sizes.depth * TILE;
        square_pairs(squares, s.queries, round_up(rows, SIDE) / SIDE * row);
        const V scale = all(g.p.scale * LOG2E), half = all(g.p.scale * g.p.scale * 0.5f * LOG2E), cap = all(g.p.cap * LOG2E);
        for (int64_t from = 0; from < pool.count; from += CHUNK)
            for (int64_t t = 0; t * SIDE < rows; t += 2) {
                const bool two = (t + 1) * SIDE < rows;
                const int64_t n = std::min(CHUNK, pool.count - from);
                multiply_grid<false>(terms, TILE, CHUNK * SIDE, pool.spreads + from / SIDE * row, row, squares + t * row, row, (n + SIDE - 1) / SIDE, two ? 2 : 1, s.sizes.depth);
                const float* own = terms;
                s.add(t, two, pool.block(), from, 0, n, [=](int64_t i, int64_t k, V x) __attribute__((always_inline)) {
                    return x * scale + min(load(own + (i * CHUNK + k) * SIDE) * half, cap) + bias[from + k];
                });
            }
    }
};

// The first order of the pooled rest, for one thread.
struct TiledSlopes {
    const Geometry& g;
    const TileSizes sizes;  // a matrix' rows are its tokens
    Array<uint16_t> half;
    Array<int32_t> matrix;
    Array<float> product;   // [2, channels, queries of a tile]
    int64_t held = -1;      // whose matrix that is

    explicit TiledSlopes(const Geometry& g) : g(g), sizes(g, g.channels), half(g.channels * g.channels), matrix(sizes.block), product(2 * g.padded * SIDE) {}

    void read(int64_t bh, int64_t i) {
        int64_t state = bh * g.states() + g.state(i);
        if (state == held) return;
        held = state;
        narrow_all(half, Slopes(g).of(bh, i), g.channels * g.channels);
        sizes.columns(matrix, HalfRows(half, g.channels, g.channels, {0, -1, g.channels}));
    }

    // Sums so far get what a query whose softmax were all of pooled keys would get, times the mass that pooled keys have.
    void add(TiledSoftmax& s, int64_t rows, const float* exact_top, const float* exact_mass) {
        const int64_t row = sizes.steps * TILE, tile = SIDE * g.padded;
        for (int64_t t = 0; t * SIDE < rows; t += 2) {
            int64_t two = (t + 1) * SIDE < rows ? 2 : 1;
            multiply_grid<false>(product, TILE, tile, matrix, row, s.queries + t * row, row, sizes.channel_tiles, two, sizes.depth);
            for (int64_t i = 0; i < two; i++) {
                int64_t at = (t + i) * SIDE;
                V share = (load(s.mass + at) - load(exact_mass + at) * exp2(load(exact_top + at) - load(s.top + at))) * g.p.scale;
                float *to = s.out + (t + i) * tile, *from = product + i * tile;
                for (int64_t c = 0; c < tile; c += SIDE) store(to + c, load(to + c) + load(from + c) * share);
            }
        }
    }
};

// The states of key blocks, Vᵀ·phi(K) as left factors [channel tiles of v, steps of PAIR channels of k], and Σ phi(k); and what is left of their sums without the
// blocks that a query block leaves out. Matrices lie in slices: all blocks' first SLICE entries, then the next.
struct TiledStates {
    const Geometry& g;
    const TileSizes sizes;
    static constexpr int64_t SLICE = 4 * SIDE;
    const int64_t blocks, readers, size;  // size: entries of a matrix
    Array<int32_t> matrix;       // [slices, blocks, SLICE]
    Array<float> vector;         // [blocks, padded]
    Array<int32_t> rests;        // [readers, size], left factors
    Array<float> rest_vectors;   // [readers, padded]
    Array<float> total;          // in each row of a tile the even channels, then the odd ones
    Array<double> total_vector;
    Array<int32_t> weight;       // the projection as a left factor, or null

    explicit TiledStates(const Geometry& g)
        : g(g), sizes(g), blocks(g.key_states()), readers(g.p.linear_all ? 0 : g.p.q_blocks), size(sizes.channel_tiles * sizes.depth * TILE),
          vector(blocks * g.padded), rest_vectors(readers * g.padded), total(2 * size), total_vector(g.padded) {
        matrix.allocate(blocks * size, false), rests.allocate(readers * size, false);
        if (!g.p.weight) return;
        const TileSizes square(g, g.channels);
        Array<uint16_t> half(g.channels * g.channels);
        weight.allocate(square.block);
        narrow_all(half, g.p.weight, g.channels * g.channels);
        square.rows(weight, HalfRows(half, g.channels, g.channels, {0, -1, g.channels}));
    }

    int32_t* of(int64_t j, int64_t e) const { return matrix + (e / SLICE * blocks + j) * SLICE + e % SLICE; }  // its entry e

    // State j, from features in rows [n, padded] and the tiles of values; `pairs` and `products`: space, as PackWorkspace has it.
    void fill(int64_t j, const float* phi, const TiledBlock& b, int64_t n, int32_t* pairs, float* products) {
        const int64_t tiles = sizes.channel_tiles, depth = (n + PAIR - 1) / PAIR, row = sizes.steps * TILE;
        for (int64_t c = 0; c < tiles; c++) {
            V sum{};
            for (int64_t k = 0; k < depth * PAIR; k += 2) {
                V even = k < n ? load(phi + k * g.padded + c * SIDE) : V{}, odd = k + 1 < n ? load(phi + (k + 1) * g.padded + c * SIDE) : V{};
                sum += even + odd;
                _mm512_store_si512(pairs + c * row + k / 2 * SIDE, paired(even, odd));
            }
            store(vector + j * g.padded + c * SIDE, sum);
        }
        multiply_grid<false>(products, tiles * TILE, TILE, b.values, row, pairs, row, tiles, tiles, depth);
        for (int64_t r = 0; r < tiles; r++)
            for (int64_t s = 0; s < sizes.depth; s++)
                for (int64_t i = 0; i < TILE; i += SIDE) {
                    const float* from = products + (r * tiles + 2 * s) * TILE + i;
                    V low = load(from), high = 2 * s + 1 < tiles ? load(from + TILE) : V{};
                    _mm512_store_si512(of(j, (r * sizes.depth + s) * TILE + i), narrow_two(low, high));
                }
    }

    // State j as it is given, [channels of k, channels of v] and below it the sums of phi(k).
    void put(int64_t j, const float* from) {
        auto at = [&](int64_t k, int64_t v) { return k < g.channels && v < g.channels ? from[k * g.channels + v] : 0.f; };
        for (int64_t r = 0; r < sizes.channel_tiles; r++)
            for (int64_t s = 0; s < sizes.depth; s++)
                for (int64_t i = 0; i < SIDE; i++) {
                    alignas(64) float row[2 * SIDE];
                    for (int64_t c = 0; c < 2 * SIDE; c++) row[c] = at(s * 2 * SIDE + c, r * SIDE + i);
                    _mm512_store_si512(of(j, (r * sizes.depth + s) * TILE + i * SIDE), narrow_two(load(row), load(row + SIDE)));
                }
        for (int64_t c = 0; c < g.padded; c++) vector[j * g.padded + c] = c < g.channels ? from[g.channels * g.channels + c] : 0.f;
    }

    int64_t tasks() const { return size / SLICE + 1; }

    // A slice of the total and of all rests, or as the last task the vectors; taken_by(reader): as Taken. `marks`: space for a byte for each block.
    template <class TakenBy>
    void slice(int64_t task, uint8_t* marks, TakenBy&& taken_by) const {
        const int64_t from = task * SLICE;
        if (from < size)
            add_up(from);
        else
            add_up_vectors();
        for (int64_t reader = 0; reader < readers; reader++) {
            const Taken taken = taken_by(reader);
            const bool few = 2 * taken.count <= blocks;  // subtract what is taken from the total, or add up what is left
            if (!few) {
                __builtin_memset(marks, 0, size_t(blocks));
                for (int64_t n = 0; n < taken.count; n++) marks[taken.blocks[n]] = 1;
            }
            if (from >= size)
                rest_vector(rest_vectors + reader * g.padded, marks, taken, few);
            else if (few)
                subtract(rests + reader * size + from, from, taken);
            else
                add_left(rests + reader * size + from, from, marks);
        }
    }

    void add_up(int64_t from) const {
        for (int64_t e = from; e < from + SLICE; e += SIDE) {
            V first{}, second{};
            for (int64_t j = 0; j < blocks; j++) {
                __m512i row = _mm512_load_si512(of(j, e));
                first += even(row), second += odd(row);
            }
            store(total + 2 * e, first), store(total + 2 * e + SIDE, second);
        }
    }

    void add_up_vectors() const {
        for (int64_t c = 0; c < g.padded; c++) {
            total_vector[c] = 0;
            for (int64_t j = 0; j < blocks; j++) total_vector[c] += double(vector[j * g.padded + c]);
        }
    }

    static constexpr int64_t STEP = SLICE / SIDE;  // rows, whose sums stay in registers

    void subtract(int32_t* to, int64_t from, const Taken& taken) const {
        V sum[2 * STEP];
        for (int64_t s = 0; s < 2 * STEP; s++) sum[s] = load(total + 2 * from + s * SIDE);
        for (int64_t n = 0; n < taken.count; n++) {
            const int32_t* own = of(taken.blocks[n], from);
            for (int64_t s = 0; s < STEP; s++) {
                __m512i pairs = _mm512_load_si512(own + s * SIDE);
                sum[2 * s] -= even(pairs), sum[2 * s + 1] -= odd(pairs);
            }
        }
        for (int64_t s = 0; s < STEP; s++) _mm512_store_si512(to + s * SIDE, paired(sum[2 * s], sum[2 * s + 1]));
    }

    void add_left(int32_t* to, int64_t from, const uint8_t* is_taken) const {
        V sum[2 * STEP] = {};
        for (int64_t j = 0; j < blocks; j++) {
            if (is_taken[j]) continue;
            const int32_t* own = of(j, from);
            for (int64_t s = 0; s < STEP; s++) {
                __m512i pairs = _mm512_load_si512(own + s * SIDE);
                sum[2 * s] += even(pairs), sum[2 * s + 1] += odd(pairs);
            }
        }
        for (int64_t s = 0; s < STEP; s++) _mm512_store_si512(to + s * SIDE, paired(sum[2 * s], sum[2 * s + 1]));
    }

    void rest_vector(float* z, const uint8_t* is_taken, const Taken& taken, bool few) const {
        for (int64_t c = 0; c < g.padded; c++) {
            double sum = few ? total_vector[c] : 0;
            for (int64_t n = 0; n < (few ? taken.count : blocks); n++)
                if (few || !is_taken[n]) sum += (few ? -1 : 1) * double(vector[(few ? taken.blocks[n] : n) * g.padded + c]);
            z[c] = std::fabs(sum) < 1e-12 * std::fabs(total_vector[c]) ? 0.f : float(sum);  // what rounding left of a sum of zeros
        }
    }

    void all(int32_t* to, float* z) const {
        for (int64_t e = 0; e < size; e += SIDE) _mm512_store_si512(to + e, paired(load(total + 2 * e), load(total + 2 * e + SIDE)));
        for (int64_t c = 0; c < g.padded; c++) z[c] = float(total_vector[c]);
    }
};

// The linear rest of one query block.
struct TiledLinear {
    const Geometry& g;
    const TileSizes sizes;
    Array<float> phi, z, sums, inverse;      // [width, padded], [padded], [tiles, channels, queries of a tile], [width]
    Array<uint16_t> half;                    // phi in bfloat16
    Array<int32_t> state, factor;            // a left factor; right ones, [query tiles, depth]

    TiledLinear(const Geometry& g, const TiledStates& states)
        : g(g), sizes(g), phi(g.width * g.padded), z(g.padded), sums(g.width * g.padded), inverse(g.width), half(g.width * g.padded), state(states.size),
          factor(g.width / SIDE * sizes.depth * TILE) {}

    void multiply_factor(const int32_t* left, int64_t rows) {
        const int64_t row = sizes.depth * TILE;
        multiply_grid<false>(sums, TILE, SIDE * g.padded, left, row, factor, row, sizes.channel_tiles, (rows + SIDE - 1) / SIDE, sizes.depth);
    }

    // Outputs in `sums` and masses. False where nothing is left.
    bool compute(const TiledStates& states, double* mass, int64_t bh, int64_t i) {
        const Problem& p = g.p;
        Run run = g.query(i);
        const int32_t* left = state;
        const float* vector = z;
        if (p.linear_all)
            states.all(state, z);
        else if (g.list(bh, i).count == states.blocks)
            return false;
        else
            left = states.rests + i * states.size, vector = states.rest_vectors + i * g.padded;
        read_rows(phi, g.padded, p.q, bh / p.heads, g.head(bh), run, g.channels, 1.f);
        features(phi, phi, g.padded, run.count, g.channels, g.padded, p.feature_map);
        for (int64_t r = 0; r < run.count; r++) {
            float* row = phi + r * g.padded;
            double sum = (p.linear_all ? 1e-5 : 0.) + dot(row, vector, g.channels);  // the released code's guard
            mass[r] = sum;
            inverse[r] = float(sum == 0 ? 0. : 1. / sum);
        }
        narrow_all(half, phi, run.count * g.padded);
        sizes.pairs(factor, HalfRows(half, g.padded, g.channels, {0, -1, run.count}));
        multiply_factor(left, run.count);
        for (int64_t t = 0; t * SIDE < run.count; t++) {
            V scale = load(inverse + t * SIDE);
            float* to = sums + t * SIDE * g.padded;
            for (int64_t c = 0; c < g.padded; c++) store(to + c * SIDE, load(to + c * SIDE) * scale);
        }
        return true;
    }

    // The outputs times the projection, a left factor.
    void project(const int32_t* weight, int64_t rows) {
        for (int64_t t = 0; t * SIDE < rows; t++)
            for (int64_t c = 0; c < g.padded; c += 2) {
                const float* from = sums + (t * g.padded + c) * SIDE;
                _mm512_store_si512(factor + t * sizes.depth * TILE + c / 2 * SIDE, paired(load(from), load(from + SIDE)));
            }
        multiply_factor(weight, rows);
    }
};
