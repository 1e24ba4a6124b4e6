// The exact part's gradients on AMX, from bfloat16 tensors. Queries and keys take turns: `own` tokens lie in the lanes, and blocks of the `other` side visit them.
//   P = exp(x·x' + offsets), dlogit = P·(y·y' - deltas), dx += dlogit·x', dy += P·y'
// Of queries x and y are q and dout, of keys k and v. Weights and their gradients are rounded to bfloat16, as they are where PyTorch computes in it.

// One block of the other side: rows of x and y, and their columns.
struct TiledOther {
    const int32_t *x, *y, *x_columns, *y_columns;
};

// One side's blocks of a head.
struct TiledSide {
    const Geometry& g;
    const TileSizes& sizes;
    Array<int32_t> x, y, x_columns, y_columns;

    TiledSide(const Geometry& g, const TileSizes& sizes, int64_t blocks, bool both)
        : g(g), sizes(sizes), x(blocks * sizes.block), y(blocks * sizes.block), x_columns(blocks * sizes.block), y_columns(both ? blocks * sizes.block : 0) {}

    void fill(int64_t j, const HalfRows& of_x, const HalfRows& of_y, bool both) {
        int64_t at = j * sizes.block;
        sizes.rows(x + at, of_x), sizes.rows(y + at, of_y), sizes.columns(x_columns + at, of_x);
        if (both) sizes.columns(y_columns + at, of_y);
    }
    TiledOther block(int64_t j) const {
        int64_t at = j * sizes.block;
        return {x + at, y + at, x_columns + at, y_columns + at};
    }
};

// One head's operands, shared by the threads.
struct TiledOperands {
    const Geometry& g;
    const TileSizes sizes;
    TiledSide keys, queries;  // columns of values are not read
    Array<float> offset;      // [query_blocks, width], -lse in base 2
    Array<float> zeros;       // for a block that has no offsets or deltas

    explicit TiledOperands(const Geometry& g)
        : g(g), sizes(g), keys(g, sizes, g.first_extra(), false), queries(g, sizes, g.query_blocks, true), offset(g.query_blocks * g.width), zeros(g.rows() + LANES) {}

    HalfRows key(const Rows& rows, int64_t bh, int64_t j) const { return HalfRows(g, rows, bh, g.key(j), g.key_bias(bh, j)); }
    HalfRows query(const Rows& rows, int64_t bh, int64_t i) const { return HalfRows(g, rows, bh, g.query(i), nullptr); }
    void fill_key(int64_t bh, int64_t j) { keys.fill(j, key(g.p.k, bh, j), key(g.p.v, bh, j), false); }
    void fill_query(int64_t bh, int64_t i, const float* lse2) {
        queries.fill(i, query(g.p.q, bh, i), query(g.p.dout, bh, i), true);
        for (int64_t r = 0; r < g.query(i).count; r++) offset[i * g.width + r] = -lse2[i * g.width + r];
    }
};

// What joins the logits and what is taken from dout·v, of each token of a block.
struct Offsets {
    const float *offset, *delta;
};

// One thread's gradients of one block.
struct TiledGradient {
    const Geometry& g;
    TiledOperands& operands;
    const TileSizes& sizes;
    Array<int32_t> x, y;                // the own tokens, as right factors
    Array<float> dx, dy;                // [tiles, channels, tokens of a tile]
    Array<float> logits, products;      // [2, CHUNK, tokens of a tile]
    Array<int32_t> weights, gradients;  // [2, steps of CHUNK], pairs of the other side's tokens
    Array<uint16_t> seen;               // [2, CHUNK]
    int64_t own = 0;                    // tokens

    explicit TiledGradient(TiledOperands& operands)
        : g(operands.g), operands(operands), sizes(operands.sizes), x(g.width / SIDE * sizes.depth * TILE), y(g.width / SIDE * sizes.depth * TILE), dx(g.width * g.padded),
          dy(g.width * g.padded), logits(2 * CHUNK * SIDE), products(2 * CHUNK * SIDE), weights(2 * CHUNK / PAIR * TILE), gradients(2 * CHUNK / PAIR * TILE), seen(2 * CHUNK) {}

    void start(const HalfRows& of_x, const HalfRows& of_y) {
        own = of_x.run.count;
        sizes.pairs(x, of_x), sizes.pairs(y, of_y);
        __builtin_memset(dx, 0, round_up(own, SIDE) * g.padded * 4), __builtin_memset(dy, 0, round_up(own, SIDE) * g.padded * 4);
    }

    // Add a block of `count` tokens. BOTH: dy, too.
    template <bool BOTH>
    void visit(const TiledOther& other, int64_t count, const Offsets& mine, const Offsets& theirs) {
        for (int64_t from = 0; from < count; from += CHUNK)
            for (int64_t t = 0; t * SIDE < own; t += 2)
                add<BOTH, false>(t, (t + 1) * SIDE < own, other, from, 0, std::min(CHUNK, count - from), mine, theirs);
    }

    // The same of the pairs that a mask keeps, whose rows are the block's tokens and whose columns the own ones.
    template <bool BOTH, class Mask>
    void visit_masked(const TiledOther& other, int64_t count, const Offsets& mine, const Offsets& theirs, const Mask& mask) {
        for (int64_t from = 0; from < count; from += CHUNK)
            for (int64_t t = 0; t * SIDE < own; t += 2) {
                bool two = (t + 1) * SIDE < own;
                Seen kept(seen, mask, t, two, from, std::min(CHUNK, count - from));
                if (kept.last) add<BOTH, true>(t, two, other, from, kept.first, kept.last, mine, theirs);
            }
    }

    template <bool BOTH, bool SOME>
    void add(int64_t t, bool two, const TiledOther& other, int64_t from, int64_t first, int64_t last, const Offsets& mine, const Offsets& theirs) {
        if (two)
            add_tiles<2, BOTH, SOME>(t, other, from, first, last, mine, theirs);
        else
            add_tiles<1, BOTH, SOME>(t, other, from, first, last, mine, theirs);
    }

    template <int N, bool BOTH, bool SOME>
    void add_tiles(int64_t t, const TiledOther& other, int64_t from, int64_t first, int64_t last, const Offsets& mine, const Offsets& theirs) {
        const int64_t row = sizes.depth * TILE;
        for (int64_t k = first; k < last; k += PAIR)
            for (auto [to, left, right] : {std::tuple(static_cast<float*>(logits), other.x, static_cast<const int32_t*>(x)), std::tuple(static_cast<float*>(products), other.y, static_cast<const int32_t*>(y))}) {
                TileGrid<const int32_t> a{left + (from + k) / SIDE * row, row}, b{right + t * row, row};
                if (k + SIDE < last)
                    multiply<2, N, false>({to + k * SIDE, TILE}, CHUNK * SIDE, a, b, sizes.depth);
                else
                    multiply<1, N, false>({to + k * SIDE, TILE}, CHUNK * SIDE, a, b, sizes.depth);
            }
        for (int i = 0; i < N; i++) differentiate<BOTH, SOME>(t + i, i, from, first, last, mine, theirs);
        sum<N>(dx, t, other.x_columns, gradients, from, first, last);
        if (BOTH) sum<N>(dy, t, other.y_columns, weights, from, first, last);
    }

    // to += columns · right factor, over keys [first, last) of the chunk
    template <int N>
    void sum(float* to, int64_t t, const int32_t* columns, const int32_t* right, int64_t from, int64_t first, int64_t last) const {
        const int64_t depth = (last - first + PAIR - 1) / PAIR, row = sizes.steps * TILE, tile = SIDE * g.padded;
        const TileGrid<const int32_t> b{right + first / PAIR * TILE, CHUNK / PAIR * TILE};
        const int32_t* a = columns + (from + first) / PAIR * TILE;
        float* sums = to + t * tile;
        int64_t c = 0;
        for (; c + 2 <= sizes.channel_tiles; c += 2) multiply<2, N, true>({sums + c * TILE, TILE}, tile, {a + c * row, row}, b, depth);
        if (c < sizes.channel_tiles) multiply<1, N, true>({sums + c * TILE, TILE}, tile, {a + c * row, row}, b, depth);
    }

    // Weights and gradients of the logits of tile t, the i-th of two, as right factors.
    template <bool BOTH, bool SOME>
    void differentiate(int64_t t, int64_t i, int64_t from, int64_t first, int64_t last, const Offsets& mine, const Offsets& theirs) {
        const float *logit = logits + i * CHUNK * SIDE, *product = products + i * CHUNK * SIDE;
        const V scale = all(g.p.scale * LOG2E), offset = load(mine.offset + t * SIDE), delta = load(mine.delta + t * SIDE);
        int32_t *to_weights = weights + i * CHUNK / PAIR * TILE, *to_gradients = gradients + i * CHUNK / PAIR * TILE;
        auto weight = [&](int64_t k) __attribute__((always_inline)) {
            V p = rough_exp2(load(logit + k * SIDE) * scale + offset + theirs.offset[from + k]);
            return SOME ? V(_mm512_maskz_mov_ps(seen[i * CHUNK + k], __m512(p))) : p;
        };
        auto gradient = [&](int64_t k, V p) __attribute__((always_inline)) { return p * (load(product + k * SIDE) - delta - theirs.delta[from + k]); };
        for (int64_t k = first; k < round_up(last, PAIR); k += 2) {
            V even = k < last ? weight(k) : V{}, odd = k + 1 < last ? weight(k + 1) : V{};
            if (BOTH) _mm512_store_si512(to_weights + k / 2 * SIDE, paired(even, odd));
            V d_even = k < last ? gradient(k, even) : V{}, d_odd = k + 1 < last ? gradient(k + 1, odd) : V{};
            _mm512_store_si512(to_gradients + k / 2 * SIDE, paired(d_even, d_odd));
        }
    }
};

// The gradients of query block i from all its keys but the extra ones, rows [queries, padded] by logits in natural units and keys.
static void tiled_query_gradient(const Geometry& g, const Queries& queries, TiledGradient& work, float* acc, int64_t bh, int64_t i) {
    TiledOperands& operands = work.operands;
    work.start(operands.query(g.p.q, bh, i), operands.query(g.p.dout, bh, i));
    const Offsets mine{operands.offset + i * g.width, queries.delta + i * g.width};
    g.for_visits(bh, i, [&](int64_t j, int64_t mask) {
        if (g.is_extra(j)) return;
        const float* bias = g.key_bias(bh, j);
        const Offsets theirs{bias ? bias : operands.zeros, operands.zeros};
        const TiledOther other = operands.keys.block(j);
        if (mask == WHOLE) return work.visit<false>(other, g.key(j).count, mine, theirs);
        with_mask(g, mask, g.key(j), g.query(i), false, [&](const auto& keep) { work.visit_masked<false>(other, g.key(j).count, mine, theirs, keep); });
    });
    rows_of_sums(g, acc, work.dx, g.query(i).count, 1.f);
}

// Those of key block j from all its queries: dk as if queries were scaled by s·log2(e), and dv.
static void tiled_key_gradient(const Geometry& g, const Queries& queries, const Columns& columns, TiledGradient& work, float* dk, float* dv, int64_t bh, int64_t j) {
    TiledOperands& operands = work.operands;
    work.start(operands.key(g.p.k, bh, j), operands.key(g.p.v, bh, j));
    const float* bias = g.key_bias(bh, j);
    const Offsets mine{bias ? bias : operands.zeros, operands.zeros};
    columns.for_visits(j, [&](int64_t i, int64_t mask) {
        const Offsets theirs{operands.offset + i * g.width, queries.delta + i * g.width};
        const TiledOther other = operands.queries.block(i);
        if (mask == WHOLE) return work.visit<true>(other, g.query(i).count, mine, theirs);
        with_mask(g, mask, g.query(i), g.key(j), true, [&](const auto& keep) { work.visit_masked<true>(other, g.query(i).count, mine, theirs, keep); });
    });
    rows_of_sums(g, dk, work.dx, g.key(j).count, g.p.scale * LOG2E);
    rows_of_sums(g, dv, work.dy, g.key(j).count, 1.f);
}
