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

// The states of key blocks, Vᵀ·phi(K) as left factors [channel tiles of v, steps of PAIR channels of k], and Σ phi(k).
struct TiledStates {
    const Geometry& g;
    const TileSizes sizes;
    const int64_t blocks, size;  // entries of a matrix
    Array<int32_t> matrix;
    Array<float> vector;         // [blocks, padded]
    Array<float> total;          // in each row of a tile the even channels, then the odd ones
    Array<double> total_vector;
    Array<int32_t> weight;       // the projection as a left factor, or null

    explicit TiledStates(const Geometry& g)
        : g(g), sizes(g), blocks(g.key_states()), size(sizes.channel_tiles * sizes.depth * TILE), matrix(blocks * size), vector(blocks * g.padded), total(2 * size),
          total_vector(g.padded) {
        if (!g.p.weight) return;
        const TileSizes square(g, g.channels);
        Array<uint16_t> half(g.channels * g.channels);
        weight.allocate(square.block);
        narrow_all(half, g.p.weight, g.channels * g.channels);
        square.rows(weight, HalfRows(half, g.channels, g.channels, {0, -1, g.channels}));
    }

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
        int32_t* to = matrix + j * size;
        for (int64_t r = 0; r < tiles; r++)
            for (int64_t s = 0; s < sizes.depth; s++)
                for (int64_t i = 0; i < TILE; i += SIDE) {
                    const float* from = products + (r * tiles + 2 * s) * TILE + i;
                    V low = load(from), high = 2 * s + 1 < tiles ? load(from + TILE) : V{};
                    _mm512_store_si512(to + (r * sizes.depth + s) * TILE + i, narrow_two(low, high));
                }
    }

    // State j as it is given, [channels of k, channels of v] and below it the sums of phi(k).
    void put(int64_t j, const float* from) {
        int32_t* to = matrix + j * size;
        auto at = [&](int64_t k, int64_t v) { return k < g.channels && v < g.channels ? from[k * g.channels + v] : 0.f; };
        for (int64_t r = 0; r < sizes.channel_tiles; r++)
            for (int64_t s = 0; s < sizes.depth; s++)
                for (int64_t i = 0; i < SIDE; i++) {
                    alignas(64) float row[2 * SIDE];
                    for (int64_t c = 0; c < 2 * SIDE; c++) row[c] = at(s * 2 * SIDE + c, r * SIDE + i);
                    _mm512_store_si512(to + (r * sizes.depth + s) * TILE + i * SIDE, narrow_two(load(row), load(row + SIDE)));
                }
        for (int64_t c = 0; c < g.padded; c++) vector[j * g.padded + c] = c < g.channels ? from[g.channels * g.channels + c] : 0.f;
    }

    void add_up(int64_t part, int64_t parts) {  // one of `parts` slices of the total
        int64_t rows = size / SIDE;
        for (int64_t e = rows * part / parts * SIDE; e < rows * (part + 1) / parts * SIDE; e += SIDE) {
            V first{}, second{};
            for (int64_t j = 0; j < blocks; j++) {
                __m512i row = _mm512_load_si512(matrix + j * size + e);
                first += even(row), second += odd(row);
            }
            store(total + 2 * e, first), store(total + 2 * e + SIDE, second);
        }
        for (int64_t c = g.padded * part / parts; c < g.padded * (part + 1) / parts; c++) {
            total_vector[c] = 0;
            for (int64_t j = 0; j < blocks; j++) total_vector[c] += double(vector[j * g.padded + c]);
        }
    }

    // The sum over the blocks that are not among `taken`, as a left factor and a vector [padded]. False where nothing is left.
    bool rest(int32_t* to, float* z, const int32_t* taken, int64_t count, uint8_t* is_taken) const {
        if (count == blocks) return false;
        bool few = 2 * count <= blocks;  // subtract what is taken from the total, or add up what is left
        if (!few) {
            __builtin_memset(is_taken, 0, size_t(blocks));
            for (int64_t n = 0; n < count; n++) is_taken[taken[n]] = 1;
        }
        const int64_t STEP = 4;  // rows whose sums stay in registers
        for (int64_t e = 0; e < size; e += STEP * SIDE) {
            V sum[2 * STEP];
            for (int64_t s = 0; s < 2 * STEP; s++) sum[s] = few ? load(total + 2 * e + s * SIDE) : V{};
            for (int64_t n = 0; n < (few ? count : blocks); n++) {
                if (!few && is_taken[n]) continue;
                const int32_t* from = matrix + (few ? taken[n] : n) * size + e;
                for (int64_t s = 0; s < STEP; s++) {
                    __m512i pairs = _mm512_load_si512(from + s * SIDE);
                    if (few)
                        sum[2 * s] -= even(pairs), sum[2 * s + 1] -= odd(pairs);
                    else
                        sum[2 * s] += even(pairs), sum[2 * s + 1] += odd(pairs);
                }
            }
            for (int64_t s = 0; s < STEP; s++) _mm512_store_si512(to + e + s * SIDE, paired(sum[2 * s], sum[2 * s + 1]));
        }
        for (int64_t c = 0; c < g.padded; c++) {
            double sum = few ? total_vector[c] : 0;
            for (int64_t n = 0; n < (few ? count : blocks); n++)
                if (few || !is_taken[n]) sum += (few ? -1 : 1) * double(vector[(few ? taken[n] : n) * g.padded + c]);
            z[c] = std::fabs(sum) < 1e-12 * std::fabs(total_vector[c]) ? 0.f : float(sum);  // what rounding left of a sum of zeros
        }
        return true;
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
    Array<uint8_t> taken;                    // [k_blocks]
    Array<float> phi, z, sums, inverse;      // [width, padded], [padded], [tiles, channels, queries of a tile], [width]
    Array<uint16_t> half;                    // phi in bfloat16
    Array<int32_t> state, factor;            // a left factor; right ones, [query tiles, depth]

    TiledLinear(const Geometry& g, const TiledStates& states)
        : g(g), sizes(g), taken(states.blocks), phi(g.width * g.padded), z(g.padded), sums(g.width * g.padded), inverse(g.width), half(g.width * g.padded), state(states.size),
          factor(g.width / SIDE * sizes.depth * TILE) {}

    void multiply_factor(const int32_t* left, int64_t rows) {
        const int64_t row = sizes.depth * TILE;
        multiply_grid<false>(sums, TILE, SIDE * g.padded, left, row, factor, row, sizes.channel_tiles, (rows + SIDE - 1) / SIDE, sizes.depth);
    }

    // Outputs in `sums` and masses. False where nothing is left.
    bool compute(const TiledStates& states, double* mass, int64_t bh, int64_t i) {
        const Problem& p = g.p;
        Run run = g.query(i);
        Geometry::List l = g.list(bh, i);
        if (p.linear_all)
            states.all(state, z);
        else if (!states.rest(state, z, l.blocks, l.count, taken))
            return false;
        read_rows(phi, g.padded, p.q, bh / p.heads, g.head(bh), run, g.channels, 1.f);
        for (int64_t r = 0; r < run.count; r++) {
            float* row = phi + r * g.padded;
            feature(row, row, g.channels, p.feature_map);
            double sum = (p.linear_all ? 1e-5 : 0.) + dot(row, z, g.channels);  // the released code's guard
            mass[r] = sum;
            inverse[r] = float(sum == 0 ? 0. : 1. / sum);
        }
        narrow_all(half, phi, run.count * g.padded);
        sizes.pairs(factor, HalfRows(half, g.padded, g.channels, {0, -1, run.count}));
        multiply_factor(state, run.count);
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
