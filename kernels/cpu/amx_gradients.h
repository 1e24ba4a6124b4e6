// The gradients of the softmax on AMX, from bfloat16 tensors: of the exact part, and of pooled keys. Queries and keys take turns: `own` tokens lie in the lanes, and
// blocks of the `other` side visit them.
//   P = exp(x·x' + offsets), dlogit = P·(y·y' - deltas), dx += dlogit·x', dy += P·y'
// Of queries x and y are q and dout, of keys k and v. Weights and their gradients are rounded to bfloat16, as they are where PyTorch computes in it.

// One block of the other side: rows of x and y, and their columns in `steps` pair steps.
struct TiledOther {
    const int32_t *x, *y, *x_columns, *y_columns;
    int64_t steps;
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
        return {x + at, y + at, x_columns + at, y_columns + at, sizes.steps};
    }
};

// One head's operands, shared by the threads.
struct TiledOperands {
    const Geometry& g;
    const TileSizes sizes;
    TiledSide keys, queries;  // columns of values are not read
    Array<float> offset;      // [query_blocks, width], -lse in base 2
    Array<float> zeros;       // for a block that has no offsets or deltas
    Array<int32_t> squares, square_columns;  // of the image's queries, as `queries` has x, for a variance term

    explicit TiledOperands(const Geometry& g)
        : g(g), sizes(g), keys(g, sizes, g.first_extra(), false), queries(g, sizes, g.query_blocks, true), offset(g.query_blocks * g.width), zeros(std::max(g.rows(), g.seen_pools()) + LANES) {
        if (g.p.rest == REST_POOLED && g.p.variance) squares.allocate(g.p.q_blocks * sizes.block), square_columns.allocate(g.p.q_blocks * sizes.block);
    }

    HalfRows key(const Rows& rows, int64_t bh, int64_t j) const { return HalfRows(g, rows, bh, g.key(j), g.key_bias(bh, j)); }
    HalfRows query(const Rows& rows, int64_t bh, int64_t i) const { return HalfRows(g, rows, bh, g.query(i), nullptr); }
    void fill_key(int64_t bh, int64_t j) { keys.fill(j, key(g.p.k, bh, j), key(g.p.v, bh, j), false); }
    void fill_query(int64_t bh, int64_t i, const float* lse2) {
        queries.fill(i, query(g.p.q, bh, i), query(g.p.dout, bh, i), true);
        for (int64_t r = 0; r < g.query(i).count; r++) offset[i * g.width + r] = -lse2[i * g.width + r];
        if (!squares || i >= g.p.q_blocks) return;
        const TiledOther mine = queries.block(i);
        square_pairs(squares + i * sizes.block, mine.x, sizes.block), square_pairs(square_columns + i * sizes.block, mine.x_columns, sizes.block);
    }
};

// What joins the logits and what is taken from dout·v, of each token of a block.
struct Offsets {
    const float *offset, *delta;
};

// What the exact part has in the place of TiledRest: nothing joins its logits, and nothing else comes of its weights and gradients.
struct NoRest {
    template <int N>
    void begin(int64_t, int64_t, int64_t) {}
    V join(int64_t, int64_t, V x) const { return x; }
    template <bool BOTH>
    void take(int64_t, int64_t, int64_t, const V (&)[2], const V (&)[2]) {}
    template <int N>
    void end(int64_t, int64_t, int64_t) {}
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
    template <bool BOTH, class Rest>
    void visit(const TiledOther& other, int64_t count, const Offsets& mine, const Offsets& theirs, Rest&& rest) {
        for (int64_t from = 0; from < count; from += CHUNK)
            for (int64_t t = 0; t * SIDE < own; t += 2)
                add<BOTH, false>(t, (t + 1) * SIDE < own, other, from, 0, std::min(CHUNK, count - from), mine, theirs, rest);
    }

    // The same of the pairs that a mask keeps, whose rows are the block's tokens and whose columns the own ones.
    template <bool BOTH, class Mask>
    void visit_masked(const TiledOther& other, int64_t count, const Offsets& mine, const Offsets& theirs, const Mask& mask) {
        for (int64_t from = 0; from < count; from += CHUNK)
            for (int64_t t = 0; t * SIDE < own; t += 2) {
                bool two = (t + 1) * SIDE < own;
                Seen kept(seen, mask, t, two, from, std::min(CHUNK, count - from));
                NoRest none;
                if (kept.last) add<BOTH, true>(t, two, other, from, kept.first, kept.last, mine, theirs, none);
            }
    }

    template <bool BOTH, bool SOME, class Rest>
    void add(int64_t t, bool two, const TiledOther& other, int64_t from, int64_t first, int64_t last, const Offsets& mine, const Offsets& theirs, Rest& rest) {
        if (two)
            add_tiles<2, BOTH, SOME>(t, other, from, first, last, mine, theirs, rest);
        else
            add_tiles<1, BOTH, SOME>(t, other, from, first, last, mine, theirs, rest);
    }

    template <int N, bool BOTH, bool SOME, class Rest>
    void add_tiles(int64_t t, const TiledOther& other, int64_t from, int64_t first, int64_t last, const Offsets& mine, const Offsets& theirs, Rest& rest) {
        const int64_t row = sizes.depth * TILE;
        for (int64_t k = first; k < last; k += PAIR)
            for (auto [to, left, right] : {std::tuple(static_cast<float*>(logits), other.x, static_cast<const int32_t*>(x)), std::tuple(static_cast<float*>(products), other.y, static_cast<const int32_t*>(y))}) {
                TileGrid<const int32_t> a{left + (from + k) / SIDE * row, row}, b{right + t * row, row};
                if (k + SIDE < last)
                    multiply<2, N, false>({to + k * SIDE, TILE}, CHUNK * SIDE, a, b, sizes.depth);
                else
                    multiply<1, N, false>({to + k * SIDE, TILE}, CHUNK * SIDE, a, b, sizes.depth);
            }
        rest.template begin<N>(t, from, last);
        for (int i = 0; i < N; i++) differentiate<BOTH, SOME>(t + i, i, from, first, last, mine, theirs, rest);
        sum<N>(dx, t, other.x_columns, other.steps, gradients, from, first, last);
        if (BOTH) sum<N>(dy, t, other.y_columns, other.steps, weights, from, first, last);
        rest.template end<N>(t, from, last);
    }

    // to += columns · right factor, over keys [first, last) of the chunk
    template <int N>
    void sum(float* to, int64_t t, const int32_t* columns, int64_t steps, const int32_t* right, int64_t from, int64_t first, int64_t last) const {
        const int64_t depth = (last - first + PAIR - 1) / PAIR, row = steps * TILE, tile = SIDE * g.padded;
        const TileGrid<const int32_t> b{right + first / PAIR * TILE, CHUNK / PAIR * TILE};
        const int32_t* a = columns + (from + first) / PAIR * TILE;
        float* sums = to + t * tile;
        int64_t c = 0;
        for (; c + 2 <= sizes.channel_tiles; c += 2) multiply<2, N, true>({sums + c * TILE, TILE}, tile, {a + c * row, row}, b, depth);
        if (c < sizes.channel_tiles) multiply<1, N, true>({sums + c * TILE, TILE}, tile, {a + c * row, row}, b, depth);
    }

    // Weights and gradients of the logits of tile t, the i-th of two, as right factors.
    template <bool BOTH, bool SOME, class Rest>
    void differentiate(int64_t t, int64_t i, int64_t from, int64_t first, int64_t last, const Offsets& mine, const Offsets& theirs, Rest& rest) {
        const float *logit = logits + i * CHUNK * SIDE, *product = products + i * CHUNK * SIDE;
        const V scale = all(g.p.scale * LOG2E), offset = load(mine.offset + t * SIDE), delta = load(mine.delta + t * SIDE);
        int32_t *to_weights = weights + i * CHUNK / PAIR * TILE, *to_gradients = gradients + i * CHUNK / PAIR * TILE;
        auto weight = [&](int64_t k) __attribute__((always_inline)) {
            V p = rough_exp2(rest.join(i, k, load(logit + k * SIDE) * scale) + offset + theirs.offset[from + k]);
            return SOME ? V(_mm512_maskz_mov_ps(seen[i * CHUNK + k], __m512(p))) : p;
        };
        auto gradient = [&](int64_t k, V p) __attribute__((always_inline)) { return p * (load(product + k * SIDE) - delta - theirs.delta[from + k]); };
        for (int64_t k = first; k < round_up(last, PAIR); k += 2) {
            const V p[2] = {k < last ? weight(k) : V{}, k + 1 < last ? weight(k + 1) : V{}};
            if (BOTH) _mm512_store_si512(to_weights + k / 2 * SIDE, paired(p[0], p[1]));
            const V d[2] = {k < last ? gradient(k, p[0]) : V{}, k + 1 < last ? gradient(k + 1, p[1]) : V{}};
            _mm512_store_si512(to_gradients + k / 2 * SIDE, paired(d[0], d[1]));
            rest.template take<BOTH>(t, i, k, p, d);
        }
    }
};

// What pooled keys have in addition: sums over the other side, of weights to a query and of gradients to a pooled key, and where logits have a variance term,
// min(half · own · other, cap), the gradients that it takes below the cap. Own are a query's squares or a pooled key's variances, other those of the other side.
struct TiledRest {
    const TiledGradient& work;
    const bool varies;
    const float half, cap;
    Array<int32_t> own;                                 // right factors
    const int32_t *rows = nullptr, *columns = nullptr;  // of the other side, in `steps` pair steps
    int64_t steps = 0;
    Array<float> terms, dterm, sums;                    // as logits and dx of the gradient; of each own token
    Array<int32_t> below;                               // as gradients

    explicit TiledRest(const TiledGradient& work)
        : work(work), varies(work.g.p.variance), half(work.g.p.scale * work.g.p.scale * 0.5f * LOG2E), cap(work.g.p.cap * LOG2E), sums(work.g.width) {
        if (!varies) return;
        own.allocate(work.g.width / SIDE * work.sizes.depth * TILE), below.allocate(2 * CHUNK / PAIR * TILE);
        terms.allocate(2 * CHUNK * SIDE), dterm.allocate(work.g.width * work.g.padded);
    }

    void start() {
        std::fill_n(static_cast<float*>(sums), work.g.width, 0.f);
        if (varies) __builtin_memset(dterm, 0, work.g.width * work.g.padded * 4);
    }
    void of(const int32_t* other_rows, const int32_t* other_columns, int64_t other_steps) { rows = other_rows, columns = other_columns, steps = other_steps; }

    template <int N>
    void begin(int64_t t, int64_t from, int64_t last) {
        const int64_t row = work.sizes.depth * TILE;
        if (varies) multiply_grid<false>(terms, TILE, CHUNK * SIDE, rows + from / SIDE * row, row, own + t * row, row, (last + SIDE - 1) / SIDE, N, work.sizes.depth);
    }
    V term(int64_t i, int64_t k) const { return load(terms + (i * CHUNK + k) * SIDE) * half; }
    V join(int64_t i, int64_t k, V x) const { return varies ? x + min(term(i, k), all(cap)) : x; }

    // Weights and gradients of two tokens of the other side; those past its end are zero.
    template <bool BOTH>
    void take(int64_t t, int64_t i, int64_t k, const V (&p)[2], const V (&d)[2]) {
        store(sums + t * SIDE, load(sums + t * SIDE) + (BOTH ? d[0] + d[1] : p[0] + p[1]));
        if (!varies) return;
        const V even = select(term(i, k) < all(cap), d[0], V{}), odd = select(term(i, k + 1) < all(cap), d[1], V{});
        _mm512_store_si512(below + i * CHUNK / PAIR * TILE + k / 2 * SIDE, paired(even, odd));
    }
    template <int N>
    void end(int64_t t, int64_t from, int64_t last) {
        if (varies) work.sum<N>(dterm, t, columns, steps, below, from, 0, last);
    }
};
