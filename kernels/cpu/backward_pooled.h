// Gradients of the pooled rest: first of the pooled keys, values and variances, then of the tokens they were made from.

// Query block i: work.a += the gradient through the means, work.b = the one through the variances (to be multiplied by q).
static void pooled_query_gradient(const Geometry& g, const Pool& pool, const Queries& queries, BackwardWorkspace& work, int64_t bh, int64_t i) {
    const Problem& p = g.p;
    Run run = g.query(i);
    const float *q = queries.q.row(i), *dout = queries.dout.row(i), *lse2 = queries.lse2 + i * g.width, *delta = queries.pooled_delta + i * g.width;
    __builtin_memset(work.b, 0, g.rows() * g.padded * 4);
    __builtin_memset(work.share, 0, g.rows() * 4);
    square(work.squares, q, g.rows() * g.padded);
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
            for (int r = 0; r < ROWS && p.slopes; r++)
                for (int64_t c = 0; c < n; c += LANES) work.share[r0 + r] += horizontal_sum(load(work.probability + r * work.ld + c));
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
    slopes.rows(work.b, queries.q.row(i), slopes.read(work.matrix, bh, i), n);
    for (int64_t r = 0; r < n; r++) {
        double sum = queries.exact_delta[i * g.width + r];
        for (int64_t d = 0; d < g.channels; d++) sum -= double(work.b[r * g.padded + d]) * dout[r * g.padded + d];
        queries.pooled_delta[i * g.width + r] = float(sum);
    }
}

// The gradients of a query block's matrix and, through it, of its queries: work.a +=, in the units of pooled_query_gradient, which comes first.
static void slopes_gradient(const Geometry& g, const Queries& queries, BackwardWorkspace& work, int64_t bh, int64_t i) {
    int64_t n = g.query(i).count;
    float* weighted = work.c;
    const float* dout = queries.dout.row(i);
    __builtin_memset(weighted, 0, g.rows() * g.padded * 4);
    for (int64_t r = 0; r < n; r++)
        for (int64_t d = 0; d < g.channels; d++) weighted[r * g.padded + d] = work.share[r] * dout[r * g.padded + d];
    outer(g, work.matrix, queries.q.column(i), g.width, weighted, g.padded, n);
    float* to = g.p.dslopes + (bh * g.p.q_blocks + i) * g.channels * g.channels;
    for (int64_t c = 0; c < g.channels; c++)
        for (int64_t d = 0; d < g.channels; d++) to[c * g.channels + d] = work.matrix[c * g.padded + d] * (1.f / LOG2E);
    transpose(work.matrix, g.padded, Slopes(g).of(bh, i), g.channels, g.channels, g.channels);
    product_rows(work.a, g.padded, weighted, g.padded, work.matrix, g.padded, round_up(n, ROWS), g.channels, g.padded, true);
}

struct PoolGradient {
    static constexpr int64_t GROUP = 4 * ROWS;  // pooled keys per task
    const Geometry& g;
    const Pool& pool;
    Array<float> dmean, dvar, dvalue;  // [pools, padded]
    Array<float> doffset;              // [pools]
    Array<uint8_t> kept;               // [q_blocks, k_blocks]

    PoolGradient(const Geometry& g, const Pool& pool)
        : g(g), pool(pool), dmean((pool.pools + GROUP) * g.padded), dvar((pool.pools + GROUP) * g.padded), dvalue((pool.pools + GROUP) * g.padded),
          doffset(pool.pools + GROUP), kept(g.p.q_blocks * g.p.k_blocks) {}

    int64_t tasks() const { return (pool.pools + GROUP - 1) / GROUP; }

    void mark(int64_t bh, int64_t i) {
        __builtin_memset(kept + i * g.p.k_blocks, 0, g.p.k_blocks);
        Geometry::List l = g.list(bh, i);
        for (int64_t n = 0; n < l.count; n++) kept[i * g.p.k_blocks + l.blocks[n]] = 1;
    }

    // The gradients of GROUP pooled keys, from all image query blocks.
    void keys(const Queries& queries, BackwardWorkspace& work, int64_t bh, int64_t task) {
        const Problem& p = g.p;
        int64_t first = task * GROUP, count = std::min(GROUP, pool.pools - first);
        __builtin_memset(dmean + first * g.padded, 0, GROUP * g.padded * 4);
        __builtin_memset(dvar + first * g.padded, 0, GROUP * g.padded * 4);
        __builtin_memset(dvalue + first * g.padded, 0, GROUP * g.padded * 4);
        __builtin_memset(doffset + first, 0, GROUP * 4);
        for (int64_t i = 0; i < p.q_blocks; i++) {
            if (p.variance) {
                square(work.squares, queries.q.row(i), g.rows() * g.padded);
                square(work.squares_t, queries.q.column(i), g.channels * g.width);
            }
            for (int64_t j = first; j < first + count; j += ROWS) keys_from_block(queries, work, bh, j, i);
        }
        for (int64_t e = first * g.padded; e < (first + count) * g.padded; e++) dmean[e] *= 1.f / LOG2E, dvar[e] *= 0.5f / (LOG2E * LOG2E);
        for (int64_t j = first; p.pools && j < first + count; j++) {
            int64_t at = bh * pool.pools + j;
            __builtin_memcpy(p.dpooled_k + at * g.channels, dmean + j * g.padded, g.channels * 4);
            __builtin_memcpy(p.dpooled_v + at * g.channels, dvalue + j * g.padded, g.channels * 4);
            p.dpooled_bias[at] = doffset[j];
        }
    }

    void keys_from_block(const Queries& queries, BackwardWorkspace& work, int64_t bh, int64_t j, int64_t i) {
        const Problem& p = g.p;
        int64_t n = g.query(i).count;
        float bias[ROWS], offset = p.offset ? p.offset[g.head(bh)] * LOG2E : 0.f;
        for (int64_t r = 0; r < ROWS; r++)
            bias[r] = j + r < pool.pools && !kept[i * p.k_blocks + (j + r) / pool.parts] ? pool.log2_count[j + r] + offset : -INFINITY;
        V cap = all(p.cap * LOG2E);
        float* terms = work.uncapped;
        if (p.variance)
            for_strips(round_up(n, LANES), [&](int64_t c, auto strip) __attribute__((always_inline)) {
                V x[ROWS][strip.value];
                for (int r = 0; r < ROWS; r++)
                    for (int s = 0; s < strip.value; s++) x[r][s] = V{};
                tile<strip.value>(x, pool.var + j * g.padded, g.padded, work.squares_t + c, g.width, g.channels);
                for (int r = 0; r < ROWS; r++)
                    for (int s = 0; s < strip.value; s++) store(terms + r * work.ld + c + s * LANES, min(x[r][s] * (0.5f / LOG2E), cap));
            });
        const float *lse2 = queries.lse2 + i * g.width, *delta = queries.pooled_delta + i * g.width;
        auto edit = [&](int64_t r, int64_t c, V x) __attribute__((always_inline)) {
            if (p.variance) x += load(terms + r * work.ld + c);
            return x + bias[r];
        };
        weights_and_gradients(
            work.probability, work.gradient, work.ld, n, pool.mean + j * g.padded, queries.q.column(i), pool.value + j * g.padded, queries.dout.column(i), g.width,
            g.padded, g.channels, KeepAll{}, edit, [&](int64_t, int64_t c) __attribute__((always_inline)) { return load(lse2 + c); },
            [&](int64_t, int64_t c) __attribute__((always_inline)) { return load(delta + c); });
        product(dvalue + j * g.padded, g.padded, work.probability, work.ld, queries.dout.row(i), g.padded, n, g.padded, ONES);
        product(dmean + j * g.padded, g.padded, work.gradient, work.ld, queries.q.row(i), g.padded, n, g.padded, ONES);
        for (int64_t r = 0; r < ROWS; r++)
            for (int64_t c = 0; c < n; c++) doffset[j + r] += work.gradient[r * work.ld + c];
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
        float sum = 0;
        for (int64_t j = 0; j < pool.pools; j++) sum += doffset[j];
        return sum;
    }
};
