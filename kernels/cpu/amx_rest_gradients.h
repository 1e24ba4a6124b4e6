// The gradients of the rest of pooled keys on AMX, from bfloat16 tensors, together with those of the exact part.

// Pooled keys join query block i's gradients; work.b = the one through the variances (to be multiplied by q).
static void tiled_pooled_query_gradient(const Geometry& g, const Keys& keys, const Queries& queries, BackwardWorkspace& work, int64_t bh, int64_t i) {
    TiledGradient& tiled = *work.tiled;
    TiledRest& rest = *work.tiled_rest;
    const int64_t n = g.query(i).count;
    if (work.seen && work.seen->gather(*keys.pool, bh, i)) work.tiled_seen->gather(*keys.tiled_pool, bh, i);
    const TiledPool& pool = work.seen ? *work.tiled_seen : *keys.tiled_pool;
    (work.seen ? *work.seen : *keys.pool).bias(work.bias, bh, i);
    rest.start();
    if (rest.varies) square_pairs(rest.own, tiled.x, round_up(n, SIDE) * tiled.sizes.depth * SIDE), rest.of(pool.spreads, pool.spread_columns, pool.sizes.steps);
    const Offsets mine{tiled.operands.offset + i * g.width, queries.pooled_delta + i * g.width}, theirs{work.bias, tiled.operands.zeros};
    tiled.visit<false>({pool.keys, pool.values, pool.key_columns, nullptr, pool.sizes.steps}, pool.count, mine, theirs, rest);
    if (g.p.slopes) std::copy_n(static_cast<float*>(rest.sums), n, queries.pooled_share + i * g.width);
    __builtin_memset(work.b, 0, g.rows() * g.padded * 4);
    if (rest.varies) rows_of_sums(g, work.b, rest.dterm, n, 1.f);
}

// The gradients of query block i from all its keys but the extra ones: work.a, rows [queries, padded] by logits in natural units and keys; work.b as above.
static void tiled_query_gradient(const Geometry& g, const Keys& keys, const Queries& queries, BackwardWorkspace& work, int64_t bh, int64_t i) {
    TiledGradient& tiled = *work.tiled;
    TiledOperands& operands = tiled.operands;
    tiled.start(operands.query(g.p.q, bh, i), operands.query(g.p.dout, bh, i));
    const Offsets mine{operands.offset + i * g.width, queries.delta + i * g.width};
    g.for_visits(bh, i, [&](int64_t j, int64_t mask) {
        if (g.is_extra(j)) return;
        const float* bias = g.key_bias(bh, j);
        const Offsets theirs{bias ? bias : operands.zeros, operands.zeros};
        const TiledOther other = operands.keys.block(j);
        if (mask == WHOLE) return tiled.visit<false>(other, g.key(j).count, mine, theirs, NoRest());
        with_mask(g, mask, g.key(j), g.query(i), false, [&](const auto& keep) { tiled.visit_masked<false>(other, g.key(j).count, mine, theirs, keep); });
    });
    if (i < g.p.q_blocks && keys.tiled_pool) tiled_pooled_query_gradient(g, keys, queries, work, bh, i);
    rows_of_sums(g, work.a, tiled.dx, g.query(i).count, 1.f);
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
        if (mask == WHOLE) return work.visit<true>(other, g.query(i).count, mine, theirs, NoRest());
        with_mask(g, mask, g.query(i), g.key(j), true, [&](const auto& keep) { work.visit_masked<true>(other, g.query(i).count, mine, theirs, keep); });
    });
    rows_of_sums(g, dk, work.dx, g.key(j).count, g.p.scale * LOG2E);
    rows_of_sums(g, dv, work.dy, g.key(j).count, 1.f);
}

// Those of `count` pooled keys from all image query blocks, no more than one thread's gradients hold.
static void tiled_pooled_key_gradients(const Geometry& g, PoolGradient& to, const Keys& keys, const Queries& queries, BackwardWorkspace& work, int64_t bh, int64_t first, int64_t count) {
    TiledGradient& tiled = *work.tiled;
    TiledRest& rest = *work.tiled_rest;
    const TiledOperands& operands = tiled.operands;
    const TiledPool& pool = *keys.tiled_pool;
    const Run run{first, -1, count};
    tiled.start(HalfRows(pool.mean, g.padded, g.channels, run), HalfRows(pool.value, g.padded, g.channels, run));
    rest.start();
    if (rest.varies) tiled.sizes.pairs(rest.own, HalfRows(pool.spread, g.padded, g.channels, run));
    alignas(64) float bias[PoolGradient::TILED];
    std::fill_n(static_cast<double*>(to.doffset) + first, count, 0.);
    for (int64_t i = 0; i < g.p.q_blocks; i++) {
        if (!to.bias(bias, PoolGradient::TILED, bh, first, i)) continue;
        if (rest.varies) rest.of(operands.squares + i * operands.sizes.block, operands.square_columns + i * operands.sizes.block, operands.sizes.steps);
        const Offsets mine{bias, operands.zeros}, theirs{operands.offset + i * g.width, queries.pooled_delta + i * g.width};
        tiled.visit<true>(operands.queries.block(i), g.query(i).count, mine, theirs, rest);
        for (int64_t n = 0; n < count; n++) to.doffset[first + n] += rest.sums[n], rest.sums[n] = 0;
    }
    const float scale = g.p.scale;
    rows_of_sums(g, to.dmean + first * g.padded, tiled.dx, count, scale), rows_of_sums(g, to.dvalue + first * g.padded, tiled.dy, count, 1.f);
    if (rest.varies) rows_of_sums(g, to.dvar + first * g.padded, rest.dterm, count, 0.5f * scale * scale);
}
