// Gradients of the linear rest: out = (phi(q)·H) / mass, mass = phi(q)·z.

struct LinearGradient {
    const Geometry& g;
    States states;                // dH and dz by query block
    Array<float> rest;            // [q_blocks, panel] outputs of the rest, for the projection's gradient
    Array<double> offset;         // [q_blocks] sums of dlog_mass
    Array<float> weight;          // the projection as a panel [channels, padded]

    explicit LinearGradient(const Geometry& g) : g(g), states(g, g.p.q_blocks, g.p.linear_all ? 0 : g.p.k_blocks), offset(g.p.q_blocks), weight(g.channels * g.padded) {
        if (!g.p.weight) return;
        rest.allocate(g.p.q_blocks * g.rows() * g.padded);
        for (int64_t d = 0; d < g.channels; d++) __builtin_memcpy(weight + d * g.padded, g.p.weight + d * g.channels, g.channels * 4);
    }

    // Query block i: its dq through the features, its share of dH, and its deltas under a residual merge.
    void rows(const Keys& keys, Queries& queries, BackwardWorkspace& work, int64_t bh, int64_t i) {
        const Problem& p = g.p;
        Run run = g.query(i);
        LinearRows& rest_rows = *work.linear;
        rest_rows.compute(keys, bh, i);
        float *dnum = work.a, *dphi = work.b, *dmass = work.c, *delta = queries.delta + i * g.width;
        const float* dout = queries.dout.row(i);
        __builtin_memset(dnum, 0, g.rows() * g.padded * 4);
        if (p.residual && p.weight) {
            __builtin_memcpy(rest + i * g.rows() * g.padded, rest_rows.out, g.rows() * g.padded * 4);
            panel_product(g, rest_rows.tiled, dnum, dout, run.count, weight, g.padded, false, false, nullptr);
        }
        const double* exact_delta = queries.exact_delta + i * g.width;
        double offset_sum = 0;
        for (int64_t r = 0; r < run.count; r++) {
            float* d_r = dnum + r * g.padded;
            double mass = rest_rows.mass[r], dlog = 0, dot = 0;
            const float *o = rest_rows.out + r * g.padded, *dy = dout + r * g.padded;
            if (p.residual) {
                double others = 0;
                for (int64_t d = 0; d < g.channels; d++) dot += double(o[d]) * d_r[d];
                for (int64_t d = 0; p.bias && d < g.channels; d++) others += double(p.bias[d]) * dy[d];
                delta[r] = float(exact_delta[r] - dot - others);
            } else if (mass > 0) {
                double offset_here = p.offset ? p.offset[g.head(bh)] : 0.f, lse = p.lse[bh * g.queries() + run.at(r)];
                double share = std::exp(std::log(mass) + offset_here - lse), product = 0;
                for (int64_t d = 0; d < g.channels; d++) d_r[d] = float(share) * dy[d], product += double(o[d]) * dy[d];
                dot = share * product;
                dlog = share * (product - exact_delta[r]);
                offset_sum += dlog;
            }
            float inverse = float(mass == 0 ? 0. : 1. / mass);
            for (int64_t d = 0; d < g.channels; d++) d_r[d] *= inverse;
            dmass[r] = float(dlog - dot) * inverse;
        }
        offset[i] = offset_sum;
        if (!rest_rows.any) {
            states.clear(i);
            return;
        }
        panel_product(g, rest_rows.tiled, dphi, dnum, run.count, rest_rows.state, g.padded, true, false, work.matrix);
        const float* z = rest_rows.state + g.channels * g.padded;
        for (int64_t r = 0; r < run.count; r++) {
            float* dq = p.dq + (bh * g.queries() + run.at(r)) * g.channels;
            for (int64_t d = 0; d < g.channels; d++) dphi[r * g.padded + d] += dmass[r] * z[d];
            feature_backward(dq, rest_rows.raw + r * g.padded, rest_rows.phi + r * g.padded, dphi + r * g.padded, g.channels, p.feature_map);
        }
        states.fill(i, rest_rows.tiled, rest_rows.phi, dnum, g.padded, run.count, dmass);
    }

    // Row d of dH and dz, of the total and of what key blocks get.
    void row(const Columns& columns, uint8_t* marks, int64_t d) {
        states.row(d, marks, [&](int64_t j) { return Taken{columns.of(j), columns.count(j)}; });
    }

    // One of `parts` slices of the gradient of what is far and of the projection's gradients.
    void reduce(const Queries& queries, BackwardWorkspace& work, int64_t bh, int64_t part, int64_t parts) {
        const Problem& p = g.p;
        if (p.dfar_states) {  // which every query reads
            float* to = p.dfar_states + bh * (g.channels + 1) * g.channels;
            for (int64_t e = states.size * part / parts; e < states.size * (part + 1) / parts; e++)
                if (e % g.padded < g.channels) to[e / g.padded * g.channels + e % g.padded] = float(states.total[e]);
        }
        if (!p.dweight) return;
#if AMX
        if (work.pack.tiled) return reduce_by_tiles(queries, *work.pack.tiled, bh, part, parts);
#endif
        int64_t groups = (g.channels + ROWS - 1) / ROWS;
        float *panel = work.strip, *columns = work.strip_t;
        for (int64_t group = groups * part / parts; group < groups * (part + 1) / parts; group++) {
            int64_t first = group * ROWS, rows = std::min<int64_t>(ROWS, g.channels - first);
            __builtin_memset(panel, 0, ROWS * g.padded * 4);
            float sums[ROWS] = {};
            for (int64_t i = 0; i < p.q_blocks; i++) {
                int64_t n = g.query(i).count;
                __builtin_memcpy(columns, queries.dout.column(i) + first * g.width, rows * g.width * 4);
                product(panel, g.padded, columns, g.width, rest + i * g.rows() * g.padded, g.padded, n, g.padded, ONES);
                for (int64_t r = 0; r < rows; r++)
                    for (int64_t k = 0; k < n; k++) sums[r] += columns[r * g.width + k];
            }
            for (int64_t r = 0; r < rows; r++) {
                __builtin_memcpy(p.dweight + (bh * g.channels + first + r) * g.channels, panel + r * g.padded, g.channels * 4);
                p.dbias[bh * g.channels + first + r] = sums[r];
            }
        }
    }

#if AMX
    void reduce_by_tiles(const Queries& queries, TiledPanels& tiled, int64_t bh, int64_t part, int64_t parts) const {
        const int64_t from = tiled.tiles * part / parts, to = tiled.tiles * (part + 1) / parts, first = from * LANES, end = std::min(to * LANES, g.channels);
        for (int64_t i = 0; i < g.p.q_blocks && from < to; i++) {
            const int64_t n = g.query(i).count;
            const float* dout = queries.dout.row(i);
            tiled.outer(g.p.dweight + bh * g.channels * g.channels, g.channels, dout, g.padded, rest + i * g.rows() * g.padded, g.padded, n, i > 0, from, to);
            for (int64_t c = first; c < end; c++) {
                float& sum = g.p.dbias[bh * g.channels + c];
                if (i == 0) sum = 0;
                for (int64_t r = 0; r < n; r++) sum += dout[r * g.padded + c];
            }
        }
    }
#endif

    float offset_sum() const {
        double sum = 0;
        for (int64_t i = 0; i < g.p.q_blocks; i++) sum += offset[i];
        return float(sum);
    }
};

// Add key block j's gradients through the states of all query blocks that don't keep it.
static void linear_key_gradient(const Geometry& g, const Keys& keys, const States& dstates, const Columns& columns, BackwardWorkspace& work, float* dk, float* dv, int64_t j) {
    int64_t n = g.key(j).count;
    if (!g.p.linear_all && columns.count(j) == dstates.blocks) return;
    const float *key = keys.keys.row(j), *state = dstates.rest(j), *dz = state + g.channels * g.padded;
    features(work.phi, key, g.padded, n, g.channels, g.padded, g.p.feature_map);
    panel_product(g, work.pack.tiled, dv, work.phi, n, state, g.padded, false, true, nullptr);
    panel_product(g, work.pack.tiled, work.c, keys.values.row(j), n, state, g.padded, true, false, work.matrix);
    for (int64_t r = 0; r < n; r++) {
        float* dphi = work.c + r * g.padded;
        for (int64_t d = 0; d < g.channels; d++) dphi[d] += dz[d];
        feature_backward(dk + r * g.padded, key + r * g.padded, work.phi + r * g.padded, dphi, g.channels, g.p.feature_map);
    }
}
