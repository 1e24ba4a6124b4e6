// The forward pass, head by head: pack keys and values, then query block by query block everything that its outputs need.

// One thread's workspace for packing a block.
struct PackWorkspace {
    Array<float> keys, values, phi;
    Array<uint16_t> halves;
    Array<uint8_t> marks;          // of a linear rest's states
    TiledPanels* tiled = nullptr;  // in the backward pass, where tiles serve it
#if AMX
    Array<int32_t> pairs;    // of features, [channel tiles, pair steps of a block]
    Array<float> products;   // a state in tiles
#endif
    explicit PackWorkspace(const Geometry& g)
        : keys(g.rows() * g.padded), values(g.rows() * g.padded), phi(g.rows() * g.padded),
          halves(g.width * g.channels), marks(std::max(g.key_states(), g.p.q_blocks))
#if AMX
          ,
          pairs(g.padded * round_up(g.width, PAIR) / 2), products(g.padded * g.padded)
#endif
    {
    }
};

// Whether the gradients of the exact part are computed by tiles.
static inline bool gradients_by_tiles(const Problem& p) { return AMX && p.q.bf16 && p.k.bf16 && p.v.bf16 && p.dout.bf16; }

// What one head's keys and values become, shared by the threads; the backward pass makes it again.
struct Keys {
    const Geometry& g;
    const bool backward, paired, direct;  // paired: bfloat16 stays bfloat16; direct: values are read where they lie
    const bool tiled;                     // tiles hold what the exact part's gradients read of all keys but the extra ones
    Panels keys, values;                  // paired, of the extra keys alone; key rows and transposed values for the backward pass alone
#if BF16_DOTS || AMX
    std::unique_ptr<Pairs> pairs;
#endif
#if BF16_DOTS
    std::unique_ptr<PairedPool> paired_pool;  // in place of the pool's rows
#endif
    std::unique_ptr<Pool> pool;
    std::unique_ptr<States> states;
#if AMX
    std::unique_ptr<TiledPool> tiled_pool;      // in place of the pool's rows, where tiles serve
    std::unique_ptr<TiledStates> tiled_states;  // in place of the states, in the forward pass
#endif

    Keys(const Geometry& g, bool backward)
        : g(g), backward(backward), paired((BF16_DOTS || AMX) && !backward && g.p.q.bf16 && g.p.k.bf16 && g.p.v.bf16),
          direct(!backward && g.lies_in_rows(g.p.v) && g.p.v.row == g.channels),
          tiled(backward && gradients_by_tiles(g.p)), keys(g, paired ? g.first_extra() : 0, g.key_blocks, backward, true),
          values(g, paired ? g.first_extra() : direct ? in_place() : 0, g.key_blocks, true, backward) {
#if BF16_DOTS || AMX
        if (paired) pairs = std::make_unique<Pairs>(g);
#endif
        Pool::Holds holds = Pool::COLUMNS_TOO;
#if BF16_DOTS
        if (paired && g.p.rest == REST_POOLED && PairedPool::serves(g)) paired_pool = std::make_unique<PairedPool>(g, false), holds = Pool::BIASES;
#endif
#if AMX
        if (g.p.rest == REST_POOLED && (tiled || (paired && g.p.extra == 0))) tiled_pool = std::make_unique<TiledPool>(g, g.pools(), true, backward), holds = Pool::ROWS_TOO;
#endif
        if (g.p.rest == REST_POOLED) pool = std::make_unique<Pool>(g, backward, false, holds);
#if AMX
        if (paired && g.p.rest == REST_LINEAR) tiled_states = std::make_unique<TiledStates>(g);
        if (tiled_states) return;
#endif
        if (g.p.rest == REST_LINEAR) states = std::make_unique<States>(g, g.key_states(), g.p.linear_all ? 0 : g.p.q_blocks);
    }

    // Key blocks up to this one have their values read where they lie: those that a mask may leave out are not among them.
    int64_t in_place() const { return g.text_bias ? g.p.k_blocks : g.first_extra(); }

    Block<float> block(int64_t bh, int64_t j) const {
        if (!direct || j >= in_place()) return {keys.column(j), g.width, values.row(j), g.padded};
        return {keys.column(j), g.width, g.rows_of(g.p.v, bh, j), g.p.v.row};
    }

    void pack(int64_t bh, int64_t j, PackWorkspace& work) {
        int64_t n = g.key(j).count;
        const bool pair = paired && !g.is_extra(j), in_tiles = tiled && !g.is_extra(j);
        const bool rest = j < g.p.k_blocks && ((pool && !pool->given) || g.p.rest == REST_LINEAR);
#if BF16_DOTS || AMX
        if (pair) pairs->fill(bh, j, work.halves);
#endif
        if (pair && !rest) return;
        const float* key;
        int64_t ldk = g.padded;
        if (!backward && g.lies_in_rows(g.p.k) && j < in_place()) {
            key = g.rows_of(g.p.k, bh, j), ldk = g.p.k.row;
        } else {
            float* to = backward ? keys.row(j) : work.keys;
            g.read_key(to, g.p.k, g.p.extra_k, bh, j);
            key = to;
        }
        if (!pair && !in_tiles) transpose(keys.column(j), g.width, key, ldk, n, g.channels);
#if AMX
        if (tiled_states) {
            features(work.phi, key, ldk, n, g.channels, g.padded, g.p.feature_map);
            return tiled_states->fill(j, work.phi, pairs->block(j), n, work.pairs, work.products);
        }
#endif
        const float* value;
        int64_t ldv = g.padded;
        if (direct && j < in_place()) {
            Block<float> b = block(bh, j);
            value = b.rows, ldv = b.rows_ld;
        } else {
            float* to = pair ? work.values : values.row(j);
            g.read_key(to, g.p.v, g.p.extra_v, bh, j);
            value = to;
        }
        if (backward && !in_tiles) transpose(values.column(j), g.width, value, ldv, n, g.channels);
        if (!rest) return;
        if (pool && !pool->given) pool->fill(j, key, ldk, value, ldv);
        if (states) {
            features(work.phi, key, ldk, n, g.channels, g.padded, g.p.feature_map);
            states->fill(j, work.tiled, work.phi, value, ldv, n, nullptr);
        }
    }

    Taken taken(int64_t bh, int64_t i) const {
        Geometry::List l = g.list(bh, i);
        return {l.blocks, l.count};
    }

    void put_far(const float* from) {
        if (states) states->put(g.p.k_blocks, from);
#if AMX
        if (tiled_states) tiled_states->put(g.p.k_blocks, from);
#endif
    }

    void prepare(Team& team, int64_t bh, PackWorkspace& work) {
        if (pool && pool->given) team.share(g.units(), [&](int64_t unit) { pool->read(bh, unit); });
#if BF16_DOTS
        if (paired_pool) team.share(g.units(), [&](int64_t unit) { paired_pool->read(bh, unit); });
#endif
        team.share(g.key_blocks, [&](int64_t j) {
            pack(bh, j, work);
            if (j == 0 && g.p.far_states) put_far(g.p.far_states + bh * (g.channels + 1) * g.channels);
        });
        if (states) team.share(g.channels + 1, [&](int64_t row) { states->row(row, work.marks, [&](int64_t i) { return taken(bh, i); }); });
#if AMX
        if (tiled_states) team.share(tiled_states->tasks(), [&](int64_t task) { tiled_states->slice(task, work.marks, [&](int64_t i) { return taken(bh, i); }); });
        if (tiled_pool) team.share(tiled_pool->tasks(), [&](int64_t step) { tiled_pool->fill(*pool, step); });
#endif
    }
};

// The linear rest of one query block: features, state, output rows and masses.
struct LinearRows {
    const Geometry& g;
    Array<float> raw, phi, out;
    const float* state = nullptr;
    Array<double> mass;  // float64 sums: log masses and their gradients are differences of near numbers
    TiledPanels* tiled = nullptr;  // in the backward pass, where tiles serve it
    bool any = false;

    explicit LinearRows(const Geometry& g)
        : g(g), raw(g.rows() * g.padded), phi(g.rows() * g.padded), out(g.rows() * g.padded), mass(g.rows()) {}

    void compute(const Keys& keys, int64_t bh, int64_t i) {
        const Problem& p = g.p;
        Run run = g.query(i);
        read_rows(raw, g.padded, p.q, bh / p.heads, g.head(bh), run, g.channels, 1.f);
        features(phi, raw, g.padded, run.count, g.channels, g.padded, p.feature_map);
        state = keys.states->rest(i);
        any = p.linear_all || keys.taken(bh, i).count < keys.states->blocks;
        if (!any) {
            __builtin_memset(out, 0, run.count * g.padded * 4);
            for (int64_t r = 0; r < run.count; r++) mass[r] = 0;
            return;
        }
        panel_product(g, tiled, out, phi, run.count, state, g.padded, false, false, nullptr);
        const float* z = state + g.channels * g.padded;
        for (int64_t r = 0; r < run.count; r++) {
            double sum = (p.linear_all ? 1e-5 : 0.) + dot(phi + r * g.padded, z, g.channels);  // the released code's guard
            mass[r] = sum;
            float inverse = float(sum == 0 ? 0. : 1. / sum);
            for (int64_t d = 0; d < g.padded; d++) out[r * g.padded + d] *= inverse;
        }
    }
};

// One thread's workspace for the forward pass.
struct ForwardWorkspace {
    Softmax softmax;
    PackWorkspace pack;
    Array<float> squares, bias, terms, exact_top, exact_mass, matrix;
    Array<double> lse2;
    std::unique_ptr<LinearRows> linear;
    std::unique_ptr<Pool> seen;
#if BF16_DOTS
    std::unique_ptr<PairedPool> paired_seen;
#endif
#if AMX
    std::unique_ptr<TiledSoftmax> tiled;
    std::unique_ptr<TiledPool> tiled_seen;
    std::unique_ptr<TiledSlopes> slopes;
    std::unique_ptr<TiledTerms> tiled_terms;
    std::unique_ptr<TiledLinear> tiled_linear;
#endif

    ForwardWorkspace(const Geometry& g, const Keys& keys)
        : softmax(g, keys.paired && BF16_DOTS), pack(g), squares(g.rows() * g.padded), bias((g.seen_pools() + POOL) / POOL * POOL + POOL), terms(ROWS * POOL), lse2(g.rows()) {
        if (g.listed()) seen = std::make_unique<Pool>(g, false, true, keys.pool->holds == Pool::COLUMNS_TOO ? Pool::COLUMNS_TOO : Pool::BIASES);
#if BF16_DOTS
        if (keys.paired_pool) paired_seen = std::make_unique<PairedPool>(g, true);
#endif
#if AMX
        if (keys.paired) tiled = std::make_unique<TiledSoftmax>(g, softmax.top, softmax.mass);
        if (keys.tiled_pool && g.listed()) tiled_seen = std::make_unique<TiledPool>(g, g.seen_pools(), false, false);
        if (keys.tiled_pool && g.p.variance) tiled_terms = std::make_unique<TiledTerms>(*tiled);
        if (keys.tiled_pool && g.p.slopes) slopes = std::make_unique<TiledSlopes>(g);
        if (keys.tiled_states) tiled_linear = std::make_unique<TiledLinear>(g, *keys.tiled_states);
#endif
        if (g.p.slopes)
            exact_top.allocate(g.rows() + 16), exact_mass.allocate(g.rows() + 16), matrix.allocate(g.channels * g.padded);
        if (g.p.rest == REST_LINEAR) linear = std::make_unique<LinearRows>(g);
    }
};

// Row r of out becomes the softmax over both parts' masses; lse2 becomes the joint one. `lse2` -inf never happens: something is kept.
static inline void merge_mass(float* out, double* lse2, const LinearRows& rest, const Geometry& g, int64_t queries, float offset) {
    for (int64_t r = 0; r < queries; r++) {
        if (rest.mass[r] == 0) continue;
        double other = std::log2(rest.mass[r]) + double(offset) * double(LOG2E), highest = std::max(lse2[r], other);
        double joint = highest + std::log2(std::exp2(lse2[r] - highest) + std::exp2(other - highest));
        float mine = float(std::exp2(lse2[r] - joint)), theirs = float(std::exp2(other - joint));
        for (int64_t d = 0; d < g.channels; d++) out[r * g.padded + d] = mine * out[r * g.padded + d] + theirs * rest.out[r * g.padded + d];
        lse2[r] = joint;
    }
}

// Adds the first order of the pooled rest to rows that are normalised; the exact part's maxima and masses say what share the rest has.
static inline void add_slopes(const Geometry& g, ForwardWorkspace& work, int64_t bh, int64_t i, int64_t queries) {
    Slopes slopes(g);
    Softmax& s = work.softmax;
    for (int64_t r = 0; r < queries; r++) {  // the queries are read no more
        float share = 1.f - work.exact_mass[r] * std::exp2(work.exact_top[r] - s.top[r]) / s.mass[r];
        for (int64_t d = 0; d < g.padded; d++) s.q[r * g.padded + d] *= share * (1.f / LOG2E);
    }
    product_rows(s.acc, g.padded, s.q, g.padded, slopes.read(work.matrix, bh, i), g.padded, round_up(queries, ROWS), g.channels, g.padded, true);
}

#if AMX
// The pooled keys that query block i sees, and their first order.
static void tiled_pool(const Geometry& g, const Keys& keys, ForwardWorkspace& work, int64_t bh, int64_t i) {
    int64_t rows = g.query(i).count, whole = round_up(rows, LANES);
    Softmax& s = work.softmax;
    if (work.seen && work.seen->gather(*keys.pool, bh, i)) work.tiled_seen->gather(*keys.tiled_pool, bh, i);
    (work.seen ? *work.seen : *keys.pool).bias(work.bias, bh, i);
    if (work.slopes) std::copy_n(static_cast<float*>(s.top), whole, static_cast<float*>(work.exact_top)), std::copy_n(static_cast<float*>(s.mass), whole, static_cast<float*>(work.exact_mass));
    const TiledPool& pool = work.tiled_seen ? *work.tiled_seen : *keys.tiled_pool;
    if (work.tiled_terms)
        work.tiled_terms->visit(*work.tiled, rows, pool, work.bias);
    else
        work.tiled->visit(rows, pool.block(), pool.count, work.bias);
    if (!work.slopes) return;
    work.slopes->read(bh, i);
    work.slopes->add(*work.tiled, rows, work.exact_top, work.exact_mass);
}

// The linear rest of query block i, or its projection.
static void tiled_linear(const Geometry& g, const Keys& keys, ForwardWorkspace& work, int64_t bh, int64_t i) {
    const TiledStates& states = *keys.tiled_states;
    LinearRows& rows = *work.linear;
    int64_t count = g.query(i).count;
    rows.any = work.tiled_linear->compute(states, rows.mass, bh, i);
    if (rows.any) {
        if (g.p.residual && states.weight) work.tiled_linear->project(states.weight, count);
        rows_of_sums(g, rows.out, work.tiled_linear->sums, count, 1.f);
        return;
    }
    __builtin_memset(rows.out, 0, count * g.padded * 4);
    std::fill_n(static_cast<double*>(rows.mass), count, 0.);
}

// The keys of bfloat16 that query block i visits, by tiles.
static void tiled_part(const Geometry& g, const Keys& keys, ForwardWorkspace& work, int64_t bh, int64_t i) {
    Run run = g.query(i);
    TiledSoftmax& s = *work.tiled;
    s.start(bh, run);
    g.for_visits(bh, i, [&](int64_t j, int64_t mask) {
        if (g.is_extra(j)) return;
        Run key = g.key(j);
        TiledBlock block = keys.pairs->block(j);
        if (mask == WHOLE)
            s.visit(run.count, block, key.count, g.key_bias(bh, j));
        else
            with_mask(g, mask, key, run, false, [&](const auto& keep) { s.visit_masked(run.count, block, key.count, keep); });
    });
    if (keys.tiled_pool && i < g.p.q_blocks) tiled_pool(g, keys, work, bh, i);
    s.rows(work.softmax.acc, run.count);
}
#endif

// The softmax over all keys that query block i visits, not normalised.
static void exact_part(const Geometry& g, const Keys& keys, ForwardWorkspace& work, int64_t bh, int64_t i) {
    Run run = g.query(i);
    Softmax& s = work.softmax;
    s.start();
#if AMX
    if (keys.paired) tiled_part(g, keys, work, bh, i);
#endif
    g.for_visits(bh, i, [&](int64_t j, int64_t mask) {
        if (AMX && keys.paired && !g.is_extra(j)) return;
        auto visit = [&](const auto& block) {
            Run key = g.key(j);
            const float* bias = g.key_bias(bh, j);
            if (mask != WHOLE)
                with_mask(g, mask, run, key, true, [&](const auto& keep) { s.visit_masked(run.count, key.count, block, keep); });
            else if (bias)
                s.visit(run.count, block, key.count, [&](int64_t, int64_t c, V x) __attribute__((always_inline)) { return x + load(bias + c); });
            else
                s.visit(run.count, block, key.count, Plain{});
        };
#if BF16_DOTS
        if (keys.paired && !g.is_extra(j)) return visit(keys.pairs->block(j));
#endif
        visit(keys.block(bh, j));
    });
}

static void forward_block(const Geometry& g, const Keys& keys, ForwardWorkspace& work, const float* weight_t, int64_t bh, int64_t i) {
    const Problem& p = g.p;
    Run run = g.query(i);
    Softmax& s = work.softmax;
#if AMX
    const bool by_tiles = bool(keys.tiled_pool), linear_by_tiles = bool(keys.tiled_states);
#else
    const bool by_tiles = false, linear_by_tiles = false;
#endif
    if (!AMX || !keys.paired || p.extra || (keys.pool && !by_tiles)) read_rows(s.q, g.padded, p.q, bh / p.heads, g.head(bh), run, g.channels, p.scale * LOG2E);
#if BF16_DOTS
    if (keys.paired) copy_rows(reinterpret_cast<uint16_t*>(static_cast<Entry*>(s.q_pairs)), g.channels, p.q, bh / p.heads, g.head(bh), run, g.channels);
#endif
    exact_part(g, keys, work, bh, i);
    bool image = i < p.q_blocks;
    if (image && keys.pool && !by_tiles) {
        if (p.variance) square(work.squares, s.q, g.rows() * g.padded);
        if (work.seen) work.seen->gather(*keys.pool, bh, i);
        const Pool& pool = work.seen ? *work.seen : *keys.pool;
        pool.bias(work.bias, bh, i);
        s.settle(run.count);
        if (p.slopes) std::copy_n(static_cast<float*>(s.top), run.count, static_cast<float*>(work.exact_top)), std::copy_n(static_cast<float*>(s.mass), run.count, static_cast<float*>(work.exact_mass));
#if BF16_DOTS
        if (work.paired_seen) work.paired_seen->gather(*keys.paired_pool, bh, i), work.paired_seen->visit(s, run.count, pool, work.bias);
        else
#endif
            pool.visit(s, run.count, work.squares, work.bias, work.terms);
    }
    s.finish(run.count, work.lse2);
    if (image && p.slopes && !by_tiles) add_slopes(g, work, bh, i, run.count);
    if (image && work.linear) {
#if AMX
        if (linear_by_tiles) tiled_linear(g, keys, work, bh, i);
#endif
        if (!linear_by_tiles) work.linear->compute(keys, bh, i);
        if (!p.residual)
            merge_mass(s.acc, work.lse2, *work.linear, g, run.count, p.offset ? p.offset[g.head(bh)] : 0.f);
        else if (weight_t) {
            if (!linear_by_tiles) product_rows(s.acc, g.padded, work.linear->out, g.padded, weight_t, g.padded, round_up(run.count, ROWS), g.channels, g.padded, true);
            for (int64_t r = 0; r < run.count; r++)
                for (int64_t d = 0; d < g.channels; d++) s.acc[r * g.padded + d] += p.bias[d] + (linear_by_tiles ? work.linear->out[r * g.padded + d] : 0.f);
        }
    }
    write_rows(p.out, bh / p.heads, g.head(bh), run, g.channels, s.acc, g.padded);
    float* lse = p.lse + bh * g.queries();
    // the scaled queries carry the rounding of scale·log2(e), so that is what to divide by
    double natural = double(p.scale) / double(p.scale * LOG2E);
    for (int64_t r = 0; r < run.count; r++) lse[run.at(r)] = float(work.lse2[r] * (p.scale == 0 ? double(LN2) : natural));
}

static Array<float> transposed_weight(const Geometry& g) {
    Array<float> out(g.channels * g.padded);
    if (g.p.weight) transpose(out, g.padded, g.p.weight, g.channels, g.channels, g.channels);
    return out;
}

void forward(const Problem& p) {
    Geometry g(p);
    Keys keys(g, false);
    Array<float> weight_t = transposed_weight(g);
    Team team(p.threads);
    std::vector<std::unique_ptr<ForwardWorkspace>> workspaces;
    for (int t = 0; t < team.size(); t++) workspaces.push_back(std::make_unique<ForwardWorkspace>(g, keys));
    team.run([&](int thread) {
        ForwardWorkspace& work = *workspaces[size_t(thread)];
#if AMX
        TileRegisters registers;
#endif
        for (int64_t bh = 0; bh < p.batch * p.heads; bh++) {
            keys.prepare(team, bh, work.pack);
            // text rows see every key: the longest tasks come first
            team.share(g.query_blocks, [&](int64_t t) { forward_block(g, keys, work, p.weight ? static_cast<float*>(weight_t) : nullptr, bh, g.query_blocks - 1 - t); });
        }
    });
}
