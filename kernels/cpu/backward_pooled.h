// Gradients of the pooled rest: first of the pooled keys, values and variances, then of the tokens they were made from.

// The sum of n numbers; whole vectors are read.
static inline float row_sum(const float* x, int64_t n) {
    V sum{};
    for (int64_t c = 0; c + LANES <= n; c += LANES) sum += load(x + c);
    if (n % LANES) sum += select(LANE < all(int32_t(n % LANES)), load(x + n / LANES * LANES), V{});
    return horizontal_sum(sum);
}

// Query block i: work.a += the gradient through the means, work.b = the one through the variances (to be multiplied by q).
static void pooled_query_gradient(const Geometry& g, const Pool& pool, const Queries& queries, BackwardWorkspace& work, int64_t bh, int64_t i) {
    const Problem& p = g.p;
    Run run = g.query(i);
    const float *q = queries.q.row(i), *dout = queries.dout.row(i), *lse2 = queries.lse2 + i * g.width, *delta = queries.pooled_delta + i * g.width;
    __builtin_memset(work.b, 0, g.rows() * g.padded * 4);
    float* share = queries.pooled_share + i * g.width;
    if (p.slopes) __builtin_memset(share, 0, g.width * 4);
    if (p.variance) square(work.squares, q, g.rows() * g.padded);
    pool.bias(work.bias, bh, i);
    V cap = all(p.cap * LOG2E);
    for (int64_t chunk = 0; chunk < pool.chunks; chunk++)
        for (int64_t r0 = 0; r0 < run.count; r0 += ROWS) {
            if (p.variance) pool.capped_terms(work.terms, work.squares + r0 * g.padded, chunk);
            int64_t n = pool.keys(chunk), first = chunk * POOL;
            auto edit = [&](int64_t r, int64_t c, V x) __attribute__((always_inline)) {
                if (p.variance) x += load(work.terms + r * POOL + c);
                return x + load(work.bias + first + c);
            };
            weights_and_gradients(
                work.probability, work.gradient, work.ld, n, q + r0 * g.padded, pool.mean_t + first * g.channels, dout + r0 * g.padded, pool.value_t + first * g.channels,
                POOL, g.padded, g.channels, KeepAll{}, edit, [&](int64_t r, int64_t) __attribute__((always_inline)) { return all(lse2[std::min(r0 + r, run.count - 1)]); },
                [&](int64_t r, int64_t) __attribute__((always_inline)) { return all(delta[std::min(r0 + r, run.count - 1)]); });
            product(work.a + r0 * g.padded, g.padded, work.gradient, work.ld, pool.mean + first * g.padded, g.padded, n, g.padded, ONES);
            for (int64_t r = 0; p.slopes && r < std::min<int64_t>(ROWS, run.count - r0); r++) share[r0 + r] += row_sum(work.probability + r * work.ld, n);
            if (!p.variance) continue;
            for (int r = 0; r < ROWS; r++)  // past the cap the variance has no part in the logit
                for (int64_t c = 0; c < n; c += LANES) {
                    I below = load(work.terms + r * POOL + c) < cap;
                    store(work.gradient + r * work.ld + c, select(below, load(work.gradient + r * work.ld + c), V{}));
                }
            product(work.b + r0 * g.padded, g.padded, work.gradient, work.ld, pool.var + first * g.padded, g.padded, n, g.padded, ONES);
        }
}

// Queries of block i: the pooled keys' deltas, with the gradient of their share of the softmax.
static void lean_deltas(const Geometry& g, const Queries& queries, BackwardWorkspace& work, int64_t bh, int64_t i) {
    Slopes slopes(g);
    int64_t n = g.query(i).count;
    const float* dout = queries.dout.row(i);
    panel_product(g, work.pack.tiled, work.b, queries.q.row(i), n, slopes.read(work.matrix, bh, i), g.padded, false, false, nullptr);
    for (int64_t r = 0; r < n; r++) {
        const double joined = dot(work.b + r * g.padded, dout + r * g.padded, g.channels) / double(LOG2E);
        queries.pooled_delta[i * g.width + r] = float(queries.exact_delta[i * g.width + r] - joined);
    }
}

// Output gradients of query block i, each times its share of the softmax: `to` [rows, padded].
static void share_of_gradient(const Geometry& g, const Queries& queries, float* to, int64_t i) {
    int64_t n = g.query(i).count;
    const float *dout = queries.dout.row(i), *share = queries.pooled_share + i * g.width;
    __builtin_memset(to, 0, g.rows() * g.padded * 4);
    for (int64_t r = 0; r < n; r++)
        for (int64_t d = 0; d < g.channels; d++) to[r * g.padded + d] = share[r] * dout[r * g.padded + d];
}

// The gradient of query block i through its matrix: work.a +=, in the units of pooled_query_gradient, which comes first.
static void lean_query_gradient(const Geometry& g, const Queries& queries, BackwardWorkspace& work, int64_t bh, int64_t i) {
    share_of_gradient(g, queries, work.c, i);
    panel_product(g, work.pack.tiled, work.a, work.c, g.query(i).count, Slopes(g).of(bh, i), g.channels, true, true, work.matrix);
}

// The gradient of a matrix, from the query blocks that read it.
static void slopes_gradient(const Geometry& g, const Queries& queries, BackwardWorkspace& work, int64_t bh, int64_t state) {
    float* to = g.p.dslopes + (bh * g.states() + state) * g.channels * g.channels;
    __builtin_memset(to, 0, g.channels * g.channels * 4);
    int64_t first = g.listed() ? state * SPAN : state, end = g.listed() ? std::min(first + SPAN, g.p.q_blocks) : first + 1;
    for (int64_t i = first; i < end; i++) {
        share_of_gradient(g, queries, work.c, i);
#if AMX
        if (work.pack.tiled)
            work.pack.tiled->outer(work.matrix, g.padded, queries.q.row(i), g.padded, work.c, g.padded, g.query(i).count, false);
        else
#endif
            outer_rows(work.matrix, g.padded, queries.q.row(i), g.padded, work.c, g.padded, g.channels, g.query(i).count, g.padded, false);
        for (int64_t c = 0; c < g.channels; c++)
            for (int64_t d = 0; d < g.channels; d++) to[c * g.channels + d] += work.matrix[c * g.padded + d] * (1.f / LOG2E);
    }
}

struct PoolGradient {
    static constexpr int64_t GROUP = 4 * ROWS, TILED = 32;  // pooled keys per task; the most of them by tiles
    const Geometry& g;
    const Pool& pool;
    const int64_t group;               // pooled keys per task
    Array<float> dmean, dvar, dvalue;  // [pools, padded]
    Array<double> doffset;             // [pools]; sums of gradients that nearly cancel
    Array<uint8_t> seen;               // [q_blocks, units]

    PoolGradient(const Geometry& g, const Pool& pool)
        : g(g), pool(pool), group(gradients_by_tiles(g.p) ? std::min(TILED, g.width) : GROUP), dmean((pool.pools + GROUP) * g.padded), dvar((pool.pools + GROUP) * g.padded), dvalue((pool.pools + GROUP) * g.padded),
          doffset(pool.pools + GROUP), seen(g.p.q_blocks * g.units()) {}

    int64_t tasks() const { return (pool.pools + group - 1) / group; }

    void mark(int64_t bh, int64_t i) {
        uint8_t* mine = seen + i * g.units();
        __builtin_memset(mine, !g.listed(), g.units());
        if (g.listed()) {
            int64_t list = bh * g.states() + g.state(i);
            for (int64_t n = 0; n < g.p.pool_counts[list]; n++) mine[g.p.pool_lists[list * g.p.pool_width + n]] = 1;
        }
        Geometry::List l = g.list(bh, i);
        for (int64_t n = 0; n < l.count; n++) mine[g.unit(l.blocks[n])] = 0;
    }

    // What joins the logits of query block i's `n` pooled keys from `first` on, -inf for those that it does not see. False where it sees none.
    bool bias(float* out, int64_t n, int64_t bh, int64_t first, int64_t i) const {
        const float offset = g.p.offset ? g.p.offset[g.head(bh)] * LOG2E : 0.f;
        const uint8_t* mine = seen + i * g.units();
        bool any = false;
        for (int64_t r = 0; r < n; r++) {
            bool sees = first + r < pool.pools && mine[(first + r) / pool.parts];
            out[r] = sees ? pool.log2_count[first + r] + offset : -INFINITY;
            any |= sees;
        }
        return any;
    }

    // The gradients of GROUP pooled keys, from all image query blocks.
    void keys(const Queries& queries, BackwardWorkspace& work, int64_t bh, int64_t first, int64_t count) {
        const Problem& p = g.p;
        __builtin_memset(dmean + first * g.padded, 0, GROUP * g.padded * 4);
        __builtin_memset(dvar + first * g.padded, 0, GROUP * g.padded * 4);
        __builtin_memset(dvalue + first * g.padded, 0, GROUP * g.padded * 4);
        std::fill_n(doffset + first, GROUP, 0.);
        for (int64_t i = 0; i < p.q_blocks; i++) {
            if (p.variance) {
                square(work.squares, queries.q.row(i), g.rows() * g.padded);
                square(work.squares_t, queries.q.column(i), g.channels * g.width);
            }
            for (int64_t j = first; j < first + count; j += ROWS) keys_from_block(queries, work, bh, j, i);
        }
        for (int64_t e = first * g.padded; e < (first + count) * g.padded; e++) dmean[e] *= 1.f / LOG2E, dvar[e] *= 0.5f / (LOG2E * LOG2E);
    }

    // Those of pooled keys that were given are results.
    void write(int64_t bh, int64_t first, int64_t count) const {
        const Problem& p = g.p;
        for (int64_t j = first; p.pools && j < first + count; j++) {
            int64_t at = bh * pool.pools + j;
            __builtin_memcpy(p.dpooled_k + at * g.channels, dmean + j * g.padded, g.channels * 4);
            __builtin_memcpy(p.dpooled_v + at * g.channels, dvalue + j * g.padded, g.channels * 4);
            p.dpooled_bias[at] = float(doffset[j]);
            if (p.variance) __builtin_memcpy(p.dpooled_var + at * g.channels, dvar + j * g.padded, g.channels * 4);
        }
    }

    void keys_from_block(const Queries& queries, BackwardWorkspace& work, int64_t bh, int64_t j, int64_t i) {
        const Problem& p = g.p;
        int64_t n = g.query(i).count;
        float joined[ROWS];
        if (!bias(joined, ROWS, bh, j, i)) return;
        V cap = all(p.cap * LOG2E);
        float* terms = work.uncapped;
        if (p.variance)
            for_strips(round_up(n, LANES), [&](int64_t c, auto strip) __attribute__((always_inline)) {
                tile<strip.value, ZERO>(terms + c, work.ld, pool.var + j * g.padded, g.padded, work.squares_t + c, g.width, g.channels);
                for (int r = 0; r < ROWS; r++)
                    for (int s = 0; s < strip.value; s++) {
                        float* at = terms + r * work.ld + c + s * LANES;
                        store(at, min(load(at) * (0.5f / LOG2E), cap));
                    }
            });
        const float *lse2 = queries.lse2 + i * g.width, *delta = queries.pooled_delta + i * g.width;
        auto edit = [&](int64_t r, int64_t c, V x) __attribute__((always_inline)) {
            if (p.variance) x += load(terms + r * work.ld + c);
            return x + joined[r];
        };
        weights_and_gradients(
            work.probability, work.gradient, work.ld, n, pool.mean + j * g.padded, queries.q.column(i), pool.value + j * g.padded, queries.dout.column(i), g.width,
            g.padded, g.channels, KeepAll{}, edit, [&](int64_t, int64_t c) __attribute__((always_inline)) { return load(lse2 + c); },
            [&](int64_t, int64_t c) __attribute__((always_inline)) { return load(delta + c); });
        product(dvalue + j * g.padded, g.padded, work.probability, work.ld, queries.dout.row(i), g.padded, n, g.padded, ONES);
        product(dmean + j * g.padded, g.padded, work.gradient, work.ld, queries.q.row(i), g.padded, n, g.padded, ONES);
        for (int64_t r = 0; r < ROWS; r++) doffset[j + r] += row_sum(work.gradient + r * work.ld, n);
        if (!p.variance) return;
        for (int r = 0; r < ROWS; r++)
            for (int64_t c = 0; c < n; c += LANES) {
                I below = load(terms + r * work.ld + c) < cap;
                store(work.gradient + r * work.ld + c, select(below, load(work.gradient + r * work.ld + c), V{}));
            }
        product(dvar + j * g.padded, g.padded, work.gradient, work.ld, work.squares, g.padded, n, g.padded, ONES);
    }

    // Add block j's share to the gradients of its tokens.
    void distribute(float* dk, float* dv, const float* key, int64_t j) const {
        int64_t n = g.key(j).count;
        const float *m = pool.mean + j * g.padded, *dm = dmean + j * g.padded, *ds = dvar + j * g.padded, *dx = dvalue + j * g.padded;
        for (int64_t r = 0; r < n; r++)
            for (int64_t d = 0; d < g.channels; d++) {
                int64_t at = r * g.padded + d;
                dk[at] += (dm[d] + 2 * (key[at] - m[d]) * ds[d]) / float(n);
                dv[at] += dx[d] / float(n);
            }
    }

    float offset_sum() const {
        double sum = 0;
        for (int64_t j = 0; j < pool.pools; j++) sum += doffset[j];
        return float(sum);
    }
};
