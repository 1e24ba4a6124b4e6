// The backward pass, head by head. Every gradient row is owned by one task and summed in a fixed order: two runs agree bit for bit.
//   P = exp(logit - lse), delta = Σ out·dout - dlse, dlogit = P·(dout·v - delta)

// One head's queries and output gradients as panels, with each row's lse (base 2) and delta.
struct Queries {
    const Geometry& g;
    Panels q, dout;
    Array<float> lse2, delta;   // [query_blocks, width]
    Array<double> exact_delta;  // the same unrounded
    Array<float> pooled_delta;  // what the pooled keys have in place of delta
    Array<float> pooled_share;  // the share of the softmax that they have

    explicit Queries(const Geometry& g)
        : g(g), q(g, 0, g.query_blocks, true, true), dout(g, 0, g.query_blocks, true, true), lse2(g.query_blocks * g.width), delta(g.query_blocks * g.width), exact_delta(g.query_blocks * g.width), pooled_delta(g.p.q_blocks * g.width), pooled_share(g.p.slopes ? g.p.q_blocks * g.width : 0) {}

    void pack(int64_t bh, int64_t i, float* out) {  // `out`: space for a panel
        const Problem& p = g.p;
        Run run = g.query(i);
        int64_t b = bh / p.heads, h = g.head(bh), at = bh * g.queries();
        read_rows(q.row(i), g.padded, p.q, b, h, run, g.channels, p.scale * LOG2E);
        read_rows(dout.row(i), g.padded, p.dout, b, h, run, g.channels, 1.f);
        read_rows(out, g.padded, p.out, b, h, run, g.channels, 1.f);
        if (!gradients_by_tiles(p) || p.extra) {  // of queries that tiles hold, columns serve the extra keys alone
            transpose(q.column(i), g.width, q.row(i), g.padded, run.count, g.channels);
            transpose(dout.column(i), g.width, dout.row(i), g.padded, run.count, g.channels);
        }
        for (int64_t r = 0; r < run.count; r++) {
            double sum = p.dlse ? -double(p.dlse[at + run.at(r)]) : 0.;
            sum += dot(out + r * g.padded, dout.row(i) + r * g.padded, g.channels);
            exact_delta[i * g.width + r] = sum;
            delta[i * g.width + r] = float(sum);
            if (i < p.q_blocks) pooled_delta[i * g.width + r] = float(sum);
            lse2[i * g.width + r] = p.lse[at + run.at(r)] * LOG2E;
        }
    }
};

// The visits by key block: which image query blocks visit it, and by which mask.
struct Columns {
    const Geometry& g;
    Array<int64_t> start, next;
    Array<int32_t> query, mask;

    explicit Columns(const Geometry& g)
        : g(g), start(g.p.k_blocks + 1), next(g.p.k_blocks), query(g.p.q_blocks * g.p.list_width), mask(g.p.q_blocks * g.p.list_width) {}

    void build(int64_t bh) {
        int64_t blocks = g.p.k_blocks;
        for (int64_t j = 0; j <= blocks; j++) start[j] = 0;
        for (int64_t i = 0; i < g.p.q_blocks; i++) {
            Geometry::List l = g.list(bh, i);
            for (int64_t n = 0; n < l.count; n++) start[l.blocks[n] + 1]++;
        }
        for (int64_t j = 0; j < blocks; j++) start[j + 1] += start[j], next[j] = start[j];
        for (int64_t i = 0; i < g.p.q_blocks; i++) {
            Geometry::List l = g.list(bh, i);
            for (int64_t n = 0; n < l.count; n++) {
                int64_t at = next[l.blocks[n]]++;
                query[at] = int32_t(i);
                mask[at] = int32_t(l.mask(n));
            }
        }
    }
    const int32_t* of(int64_t j) const { return query + start[j]; }
    int64_t count(int64_t j) const { return start[j + 1] - start[j]; }

    // Calls body(query block, the mask as in Geometry::for_visits) for all that visit key block j.
    template <class Body>
    void for_visits(int64_t j, Body&& body) const {
        if (j < g.p.k_blocks)
            for (int64_t n = start[j]; n < start[j + 1]; n++) body(int64_t(query[n]), int64_t(mask[n]));
        else
            for (int64_t i = 0; i < g.p.q_blocks; i++) body(i, WHOLE);
        if (!g.is_extra(j))
            for (int64_t i = g.p.q_blocks; i < g.query_blocks; i++) body(i, WHOLE);
    }
};

#if AMX
#include "amx_gradients.h"
#endif

// One thread's workspace.
struct BackwardWorkspace {
    const Geometry& g;
    const int64_t ld;
    PackWorkspace pack;
    Array<float> phi, a, b, c, squares, squares_t, bias, terms, probability, gradient, uncapped, matrix, strip, strip_t;
    std::unique_ptr<LinearRows> linear;
    std::unique_ptr<Pool> seen;
#if AMX
    std::unique_ptr<TiledGradient> tiled;
    std::unique_ptr<TiledRest> tiled_rest;
    std::unique_ptr<TiledPool> tiled_seen;
    std::unique_ptr<TiledPanels> panels;
#endif

    explicit BackwardWorkspace(const Geometry& g)
        : g(g), ld(std::max<int64_t>(g.width, POOL)), pack(g), phi(g.rows() * g.padded), a(g.rows() * g.padded),
          b(g.rows() * g.padded), c(g.rows() * g.padded), squares(g.rows() * g.padded), squares_t(g.channels * g.width),
          bias((g.seen_pools() + POOL) / POOL * POOL + POOL), terms(ROWS * POOL), probability(ROWS * ld), gradient(ROWS * ld), uncapped(ROWS * ld),
          matrix(round_up(g.padded, ROWS) * g.padded), strip(ROWS * g.padded), strip_t(ROWS * g.width) {
        if (g.listed()) seen = std::make_unique<Pool>(g, true, true, gradients_by_tiles(g.p) ? Pool::BIASES : Pool::COLUMNS_TOO);
        if (g.p.rest == REST_LINEAR) linear = std::make_unique<LinearRows>(g);
    }
#if AMX
    void by_tiles(TiledOperands& operands) {
        tiled = std::make_unique<TiledGradient>(operands);
        if (g.p.rest == REST_POOLED) tiled_rest = std::make_unique<TiledRest>(*tiled);
        if (g.listed()) tiled_seen = std::make_unique<TiledPool>(g, g.seen_pools(), false, true);
        panels = std::make_unique<TiledPanels>(g.channels, g.width);
        pack.tiled = panels.get();
        if (linear) linear->tiled = panels.get();
    }
#endif
};

// Columns [first, last) outside of which P and dlogit are zero and not written.
struct Live {
    int64_t first, last;
};

// ROWS rows of P and dlogit: `a` times `columns` are logits, `da` times `dcolumns` are dout·v. `lse2` and `delta` by (row, column at).
// masked(kept, c) fills the masks of a strip and says which vectors anything is kept of; edit(row, column, logits) changes logits.
template <class Masked, class Edit, class Lse, class Delta>
static inline __attribute__((always_inline)) Live weights_and_gradients(
    float* probability, float* gradient, int64_t ld_out, int64_t columns_used, const float* a, const float* columns, const float* da,
    const float* dcolumns, int64_t ld_in, int64_t lda, int64_t channels, Masked&& masked, Edit&& edit, Lse&& lse2, Delta&& delta) {
    Live live{columns_used, 0};
    for_strips(round_up(columns_used, LANES), [&](int64_t c, auto strip) __attribute__((always_inline)) {
        I kept[ROWS][strip.value];
        uint32_t any = masked(kept, c);
        if (any) live.first = std::min(live.first, c + __builtin_ctz(any) * LANES), live.last = std::min(c + (32 - __builtin_clz(any)) * LANES, columns_used);
        auto some = [&](int from, auto count) __attribute__((always_inline)) {
            int64_t first = c + from * LANES;
            tile<count.value, ZERO>(probability + first, ld_out, a, lda, columns + first, ld_in, channels);
            for (int r = 0; r < ROWS; r++)
                for (int s = 0; s < count.value; s++) {
                    int64_t at = first + s * LANES;
                    V logits = edit(r, at, load(probability + r * ld_out + at));
                    if (!masked.none) logits = select(kept[r][from + s], logits, all(-INFINITY));
                    store(probability + r * ld_out + at, exp2(logits - lse2(r, at)));
                }
            tile<count.value, ZERO>(gradient + first, ld_out, da, lda, dcolumns + first, ld_in, channels);
            for (int r = 0; r < ROWS; r++)
                for (int s = 0; s < count.value; s++) {
                    int64_t at = r * ld_out + first + s * LANES;
                    store(gradient + at, load(probability + at) * (load(gradient + at) - delta(r, first + s * LANES)));
                }
        };
        auto none = [&](int s) __attribute__((always_inline)) {
            for (int r = 0; r < ROWS; r++) store(probability + r * ld_out + c + s * LANES, V{}), store(gradient + r * ld_out + c + s * LANES, V{});
        };
        for_live<strip.value>(any, some, none);
    });
    return live;
}

struct Unchanged {
    inline __attribute__((always_inline)) V operator()(int64_t, int64_t, V x) const { return x; }
};

struct KeepAll {
    static constexpr bool none = true;
    template <int N>
    uint32_t operator()(I (&)[ROWS][N], int64_t) const {
        return (uint32_t(1) << N) - 1;
    }
};

// A block's mask, from row r on.
template <class Mask>
struct KeepMasked {
    static constexpr bool none = false;
    const Mask& mask;
    const int64_t r;
    template <int N>
    inline __attribute__((always_inline)) uint32_t operator()(I (&kept)[ROWS][N], int64_t c) const {
        return mask(kept, r, c);
    }
};

#include "backward_linear.h"
#include "backward_pooled.h"
#if AMX
#include "amx_rest_gradients.h"
#endif

static void query_gradient(const Geometry& g, const Keys& keys, const Queries& queries, BackwardWorkspace& work, int64_t bh, int64_t i) {
    const Problem& p = g.p;
    Run run = g.query(i);
    float *acc = work.a, *by_variance = work.b;
    const float *q = queries.q.row(i), *dout = queries.dout.row(i), *lse2 = queries.lse2 + i * g.width, *delta = queries.delta + i * g.width;
    __builtin_memset(acc, 0, g.rows() * g.padded * 4);
#if AMX
    const bool tiled = bool(work.tiled);
    if (tiled) tiled_query_gradient(g, keys, queries, work, bh, i);
#else
    const bool tiled = false;
#endif
    g.for_visits(bh, i, [&](int64_t j, int64_t mask) {
        if (tiled && !g.is_extra(j)) return;
        Run key = g.key(j);
        const float* bias = g.key_bias(bh, j);
        for (int64_t r0 = 0; r0 < run.count; r0 += ROWS) {
            auto gradients = [&](auto&& masked, auto&& edit) __attribute__((always_inline)) {
                return weights_and_gradients(
                    work.probability, work.gradient, work.ld, key.count, q + r0 * g.padded, keys.keys.column(j), dout + r0 * g.padded,
                    keys.values.column(j), g.width, g.padded, g.channels, masked, edit,
                    [&](int64_t r, int64_t) __attribute__((always_inline)) { return all(lse2[std::min(r0 + r, run.count - 1)]); },
                    [&](int64_t r, int64_t) __attribute__((always_inline)) { return all(delta[std::min(r0 + r, run.count - 1)]); });
            };
            auto biased = [&](int64_t, int64_t c, V x) __attribute__((always_inline)) { return x + load(bias + c); };
            auto masked = [&](const auto& keep) { return gradients(KeepMasked<std::decay_t<decltype(keep)>>{keep, r0}, Unchanged{}); };
            Live live = mask != WHOLE ? with_mask(g, mask, run, key, true, masked)
                        : bias        ? gradients(KeepAll{}, biased)
                                      : gradients(KeepAll{}, Unchanged{});
            if (live.last)
                product(acc + r0 * g.padded, g.padded, work.gradient + live.first, work.ld, keys.keys.row(j) + live.first * g.padded, g.padded, live.last - live.first, g.padded, ONES);
        }
    });
    bool pooled = i < p.q_blocks && keys.pool;
    if (pooled && !tiled) {
        if (work.seen) work.seen->gather(*keys.pool, bh, i);
        pooled_query_gradient(g, work.seen ? *work.seen : *keys.pool, queries, work, bh, i);
    }
    if (pooled && p.slopes) lean_query_gradient(g, queries, work, bh, i);
    for (int64_t r = 0; r < run.count; r++) {
        float* dq = p.dq + (bh * g.queries() + run.at(r)) * g.channels;
        for (int64_t d = 0; d < g.channels; d++) {
            int64_t at = r * g.padded + d;
            float second = pooled ? q[at] * by_variance[at] * (1.f / LOG2E) : 0.f;
            dq[d] += p.scale * (acc[at] + second);
        }
    }
}

static void key_gradient(const Geometry& g, const Keys& keys, const Queries& queries, const Columns& columns, const PoolGradient* pool, const States* dstates, BackwardWorkspace& work, int64_t bh, int64_t j) {
    const Problem& p = g.p;
    Run run = g.key(j);
    float *dk = work.a, *dv = work.b;
    __builtin_memset(dk, 0, g.rows() * g.padded * 4);
    __builtin_memset(dv, 0, g.rows() * g.padded * 4);
    const float *key = keys.keys.row(j), *value = keys.values.row(j), *bias = g.key_bias(bh, j);
#if AMX
    const bool tiled = work.tiled && !g.is_extra(j);
    if (tiled) tiled_key_gradient(g, queries, columns, *work.tiled, dk, dv, bh, j);
#else
    const bool tiled = false;
#endif
    if (!tiled) columns.for_visits(j, [&](int64_t i, int64_t mask) {
        Run query = g.query(i);
        const float *lse2 = queries.lse2 + i * g.width, *delta = queries.delta + i * g.width;
        for (int64_t r0 = 0; r0 < run.count; r0 += ROWS) {
            auto gradients = [&](auto&& masked, auto&& edit) __attribute__((always_inline)) {
                return weights_and_gradients(
                    work.probability, work.gradient, work.ld, query.count, key + r0 * g.padded, queries.q.column(i), value + r0 * g.padded,
                    queries.dout.column(i), g.width, g.padded, g.channels, masked, edit,
                    [&](int64_t, int64_t c) __attribute__((always_inline)) { return load(lse2 + c); },
                    [&](int64_t, int64_t c) __attribute__((always_inline)) { return load(delta + c); });
            };
            auto biased = [&](int64_t r, int64_t, V x) __attribute__((always_inline)) { return x + bias[r0 + r]; };
            auto masked = [&](const auto& keep) { return gradients(KeepMasked<std::decay_t<decltype(keep)>>{keep, r0}, Unchanged{}); };
            Live live = mask != WHOLE ? with_mask(g, mask, run, query, false, masked)
                        : bias        ? gradients(KeepAll{}, biased)
                                      : gradients(KeepAll{}, Unchanged{});
            if (!live.last) continue;
            int64_t from = live.first * g.padded, depth = live.last - live.first;
            product(dk + r0 * g.padded, g.padded, work.gradient + live.first, work.ld, queries.q.row(i) + from, g.padded, depth, g.padded, ONES);
            product(dv + r0 * g.padded, g.padded, work.probability + live.first, work.ld, queries.dout.row(i) + from, g.padded, depth, g.padded, ONES);
        }
    });
    for (int64_t e = 0; e < run.count * g.padded; e++) dk[e] *= 1.f / LOG2E;
    if (j < p.k_blocks && pool && !p.pools) pool->distribute(dk, dv, key, j);
    if (j < p.k_blocks && dstates) linear_key_gradient(g, keys, *dstates, columns, work, dk, dv, j);
    int64_t tokens = g.is_extra(j) ? p.extra : g.keys();
    float *to_k = g.is_extra(j) ? p.dextra_k : p.dk, *to_v = g.is_extra(j) ? p.dextra_v : p.dv;
    for (int64_t r = 0; r < run.count; r++) {
        int64_t at = (bh * tokens + run.at(r)) * g.channels;
        __builtin_memcpy(to_k + at, dk + r * g.padded, g.channels * 4);
        __builtin_memcpy(to_v + at, dv + r * g.padded, g.channels * 4);
    }
}

void backward(const Problem& p) {
    Geometry g(p);
    Keys keys(g, true);
    Queries queries(g);
    Columns columns(g);
    std::unique_ptr<PoolGradient> pool;
    std::unique_ptr<LinearGradient> linear;
    if (keys.pool) pool = std::make_unique<PoolGradient>(g, *keys.pool);
    if (keys.states) linear = std::make_unique<LinearGradient>(g);
    Team team(p.threads);
    std::vector<std::unique_ptr<BackwardWorkspace>> workspaces;
    for (int t = 0; t < team.size(); t++) workspaces.push_back(std::make_unique<BackwardWorkspace>(g));
#if AMX
    std::unique_ptr<TiledOperands> operands;
    if (gradients_by_tiles(p)) {
        operands = std::make_unique<TiledOperands>(g);
        for (auto& work : workspaces) work->by_tiles(*operands);
    }
#endif
    team.run([&](int thread) {
        BackwardWorkspace& work = *workspaces[size_t(thread)];
#if AMX
        TileRegisters registers;
#endif
        for (int64_t bh = 0; bh < p.batch * p.heads; bh++) {
            if (thread == 0 && (bh == 0 || p.lists_per_head)) columns.build(bh);
            keys.prepare(team, bh, work.pack);
#if AMX
            if (operands) team.share(g.first_extra(), [&](int64_t j) { operands->fill_key(bh, j); });
#endif
            team.share(g.query_blocks, [&](int64_t i) {
                queries.pack(bh, i, work.a);
#if AMX
                if (operands) operands->fill_query(bh, i, queries.lse2);
#endif
                if (linear && i < p.q_blocks) linear->rows(keys, queries, work, bh, i);
                if (p.slopes && i < p.q_blocks) lean_deltas(g, queries, work, bh, i);
            });
            if (linear) team.share(g.channels + 1, [&](int64_t row) { linear->row(columns, work.pack.marks, row); });
            if (linear) team.share(team.size(), [&](int64_t part) { linear->reduce(queries, work, bh, part, team.size()); });
            if (pool) {
                team.share(p.q_blocks, [&](int64_t i) { pool->mark(bh, i); });
                team.share(pool->tasks(), [&](int64_t task) {
                    const int64_t first = task * pool->group, count = std::min(pool->group, keys.pool->pools - first);
#if AMX
                    if (operands) tiled_pooled_key_gradients(g, *pool, keys, queries, work, bh, first, count);
                    else
#endif
                        pool->keys(queries, work, bh, first, count);
                    pool->write(bh, first, count);
                });
            }
            team.share(g.key_blocks + g.query_blocks, [&](int64_t task) {  // text and extra keys, the longest tasks, come first
                if (task < g.key_blocks)
                    key_gradient(g, keys, queries, columns, pool.get(), linear ? &linear->states : nullptr, work, bh, g.key_blocks - 1 - task);
                else
                    query_gradient(g, keys, queries, work, bh, g.key_blocks + g.query_blocks - 1 - task);
            });
            if (p.slopes) team.share(g.states(), [&](int64_t state) { slopes_gradient(g, queries, work, bh, state); });
            if (thread == 0 && p.doffset) p.doffset[bh] = pool ? pool->offset_sum() : linear ? linear->offset_sum() : 0.f;
        }
    });
}
