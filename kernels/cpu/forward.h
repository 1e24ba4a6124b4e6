// The forward pass, head by head: pack keys and values, then query block by query block everything that its outputs need.

// What one head's keys and values become, shared by the threads; the backward pass makes it again.
struct Keys {
    const Geometry& g;
    Panels keys, values;
    std::unique_ptr<Pool> pool;
    std::unique_ptr<States> states;

    // key rows are needed beside the transposed ones for pooling, features and the backward pass; transposed values for the latter
    Keys(const Geometry& g, bool backward)
        : g(g), keys(g, g.key_blocks, true, true), values(g, g.key_blocks, true, backward) {
        if (g.p.rest == REST_POOLED) pool = std::make_unique<Pool>(g, backward);
        if (g.p.rest == REST_LINEAR) states = std::make_unique<States>(g, g.p.k_blocks);
    }

    // `phi`, `phi_t`: one thread's room for the features of a block and their transpose
    void pack(int64_t bh, int64_t j, bool backward, float* phi, float* phi_t) {
        const Problem& p = g.p;
        int64_t n = g.key(j).count;
        g.read_key(keys.row(j), p.k, p.extra_k, bh, j);
        g.read_key(values.row(j), p.v, p.extra_v, bh, j);
        transpose(keys.column(j), g.width, keys.row(j), g.padded, n, g.channels);
        if (backward) transpose(values.column(j), g.width, values.row(j), g.padded, n, g.channels);
        if (j >= p.k_blocks) return;
        if (pool) pool->fill(j, keys.row(j), values.row(j));
        if (states) {
            for (int64_t i = 0; i < n; i++) feature(phi + i * g.padded, keys.row(j) + i * g.padded, g.channels, p.feature_map);
            transpose(phi_t, g.width, phi, g.padded, n, g.channels);
            states->fill(j, phi_t, g.width, values.row(j), n, nullptr);
        }
    }

    void prepare(Team& team, int64_t bh, bool backward, float* phi, float* phi_t) {
        team.share(g.key_blocks, [&](int64_t j) { pack(bh, j, backward, phi, phi_t); });
        if (states) team.share(team.size(), [&](int64_t part) { states->add_up(part, team.size()); });
    }
};

// The linear rest of one query block: features, state, output rows and masses.
struct LinearRows {
    const Geometry& g;
    Array<float> raw, phi, phi_t, state, out;
    Array<double> mass;  // float64 sums: log masses and their gradients are differences of near numbers
    States::Room room;
    bool any = false;

    explicit LinearRows(const Geometry& g)
        : g(g), raw(g.rows() * g.padded), phi(g.rows() * g.padded), phi_t((g.channels + ROWS) * g.width), state((g.channels + 1) * g.padded),
          out(g.rows() * g.padded), mass(g.rows()), room(g, g.p.k_blocks) {}

    void compute(const Keys& keys, int64_t bh, int64_t i) {
        const Problem& p = g.p;
        Run run = g.query(i);
        read_rows(raw, g.padded, p.q, bh / p.heads, g.head(bh), run.place, run.count, g.channels, 1.f);
        for (int64_t r = 0; r < run.count; r++) feature(phi + r * g.padded, raw + r * g.padded, g.channels, p.feature_map);
        if (p.linear_all) {
            for (int64_t e = 0; e < keys.states->size; e++) state[e] = float(keys.states->total[e]);
            any = true;
        } else {
            Geometry::List l = g.list(bh, i);
            any = keys.states->rest(state, l.blocks, l.count, room);
        }
        if (!any) {
            __builtin_memset(out, 0, run.count * g.padded * 4);
            for (int64_t r = 0; r < run.count; r++) mass[r] = 0;
            return;
        }
        product_rows(out, g.padded, phi, g.padded, state, g.padded, round_up(run.count, ROWS), g.channels, g.padded, false);
        const float* z = state + g.channels * g.padded;
        for (int64_t r = 0; r < run.count; r++) {
            double sum = (p.linear_all ? 1e-5 : 0.) + dot(phi + r * g.padded, z, g.channels);  // the released code's guard
            mass[r] = sum;
            float inverse = float(sum == 0 ? 0. : 1. / sum);
            for (int64_t d = 0; d < g.padded; d++) out[r * g.padded + d] *= inverse;
        }
    }
};

// One thread's room for the forward pass.
struct ForwardRoom {
    Softmax softmax;
    Array<float> phi, phi_t, squares, bias, terms;
    Array<double> lse2;
    std::unique_ptr<LinearRows> linear;

    explicit ForwardRoom(const Geometry& g)
        : softmax(g), phi(g.rows() * g.padded), phi_t((g.channels + ROWS) * g.width), squares(g.rows() * g.padded),
          bias((g.p.k_blocks + POOL) / POOL * POOL + POOL), terms(ROWS * POOL), lse2(g.rows()) {
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

static void forward_block(const Geometry& g, const Keys& keys, ForwardRoom& room, const float* weight_t, int64_t bh, int64_t i) {
    const Problem& p = g.p;
    Run run = g.query(i);
    Softmax& s = room.softmax;
    read_rows(s.q, g.padded, p.q, bh / p.heads, g.head(bh), run.place, run.count, g.channels, p.scale * LOG2E);
    s.start();
    Mask mask(g);
    g.for_visits(bh, i, [&](int64_t j, bool partial) {
        Run key = g.key(j);
        if (partial)
            s.visit_masked(run, key, keys.keys.column(j), g.width, keys.values.row(j), mask);
        else
            s.visit(run.count, keys.keys.column(j), g.width, keys.values.row(j), key.count, [](int64_t, int64_t, V x) __attribute__((always_inline)) { return x; });
    });
    bool image = i < p.q_blocks;
    if (image && keys.pool) {
        square(room.squares, s.q, g.rows() * g.padded);
        keys.pool->bias(room.bias, bh, i);
        keys.pool->visit(s, run.count, room.squares, room.bias, room.terms);
    }
    s.finish(run.count, room.lse2);
    if (image && room.linear) {
        room.linear->compute(keys, bh, i);
        if (!p.residual)
            merge_mass(s.acc, room.lse2, *room.linear, g, run.count, p.offset ? p.offset[g.head(bh)] : 0.f);
        else if (weight_t) {
            product_rows(s.acc, g.padded, room.linear->out, g.padded, weight_t, g.padded, round_up(run.count, ROWS), g.channels, g.padded, true);
            for (int64_t r = 0; r < run.count; r++)
                for (int64_t d = 0; d < g.channels; d++) s.acc[r * g.padded + d] += p.bias[d];
        }
    }
    write_rows(p.out, bh / p.heads, g.head(bh), run.place, run.count, g.channels, s.acc, g.padded);
    float* lse = p.lse + bh * g.tokens() + run.place;
    // the scaled queries carry the rounding of scale·log2(e), so that is what to divide by
    double natural = double(p.scale) / double(p.scale * LOG2E);
    for (int64_t r = 0; r < run.count; r++) lse[r] = float(room.lse2[r] * (p.scale == 0 ? double(LN2) : natural));
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
    std::vector<std::unique_ptr<ForwardRoom>> rooms;
    for (int t = 0; t < team.size(); t++) rooms.push_back(std::make_unique<ForwardRoom>(g));
    team.run([&](int thread) {
        ForwardRoom& room = *rooms[size_t(thread)];
        for (int64_t bh = 0; bh < p.batch * p.heads; bh++) {
            keys.prepare(team, bh, false, room.phi, room.phi_t);
            // text rows see every key: the longest tasks come first
            team.share(g.query_blocks, [&](int64_t t) { forward_block(g, keys, room, p.weight ? static_cast<float*>(weight_t) : nullptr, bh, g.query_blocks - 1 - t); });
        }
    });
}
