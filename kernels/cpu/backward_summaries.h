// Gradients of the summaries of blocks, through all but the choice of parts.

struct SummaryGradient : Summaries {
    explicit SummaryGradient(const Summary& s) : Summaries(s, true) {}

    void begin(int64_t bh) { __builtin_memcpy(second, s.second + bh * d, d * 4); }

    // The tokens by their parts, as they were, less their part's mean.
    void remember(SummaryWorkspace& work, int64_t bh, int64_t j, float (&sigma2)[MOST_PARTS]) const {
        int64_t block = bh * s.k_blocks + j, pool = block * s.parts;
        work.by_part(s.part + block * s.k_width, key(j).count, s.parts);
        const Run run = work.ordered(key(j));
        read_panel(work.keys, s.k, bh, run), read_panel(work.values, s.v, bh, run);
        for (int64_t p = 0; p < s.parts; p++) less_mean(work, work.keys, p, s.pooled_k + (pool + p) * d), less_mean(work, work.values, p, s.pooled_v + (pool + p) * d);
        square_parts(work, work.keys);
        for (int64_t p = 0; p < s.parts; p++) sigma2[p] = spread(work.squares + p * padded, float(work.count[p]));
    }
    void less_mean(SummaryWorkspace& work, float* rows, int64_t p, const float* mean) const {
        __builtin_memcpy(work.moved, mean, d * 4);
        std::fill(work.moved + d, work.moved + padded, 0.f);
        for (int64_t i = work.first[p]; i < work.first[p] + work.count[p]; i++)
            for (int64_t c = 0; c < padded; c += LANES) store(rows + i * padded + c, load(rows + i * padded + c) - load(work.moved + c));
    }

    // by_key = what the matrix's gradient makes of the values, by_value = of the keys.
    void through_matrix(SummaryWorkspace& work, int64_t bh, int64_t j, int64_t n) const {
        for (int64_t c = 0; c < d; c++) __builtin_memcpy(work.matrix + c * padded, s.dslope + ((bh * d + c) * s.k_blocks + j) * d, d * 4);
#if AMX
        if (work.tiled) {
            work.tiled->rows(work.by_key, work.values, n, work.matrix, padded, true, false);
            return work.tiled->rows(work.by_value, work.keys, n, work.matrix, padded, false, false);
        }
#endif
        transpose(work.turned, padded, work.matrix, padded, d, d);
        product_rows(work.by_key, padded, work.values, padded, work.turned, padded, round_up(n, ROWS), d, padded, false);
        product_rows(work.by_value, padded, work.keys, padded, work.matrix, padded, round_up(n, ROWS), d, padded, false);
    }

    void key_block(SummaryWorkspace& work, int64_t bh, int64_t j) {
        Run run = key(j);
        int64_t n = run.count, pool = (bh * s.k_blocks + j) * s.parts;
        float sigma2[MOST_PARTS], weight[MOST_PARTS] = {}, dweight[MOST_PARTS] = {}, dsigma2[MOST_PARTS];
        float* to = dsecond + j * padded;
        __builtin_memset(to, 0, padded * 4);
        if (n == 0) return;
        remember(work, bh, j, sigma2);
        if (s.dslope) {
            through_matrix(work, bh, j, n);
            for (int64_t p = 0; p < s.parts; p++) weight[p] = 1.f / (1.f + sigma2[p]) / float(n);
            for (int64_t p = 0; p < s.parts; p++) dweight[p] = vector_dot(work.keys + work.first[p] * padded, work.by_key + work.first[p] * padded, work.count[p] * padded);
        }
        for (int64_t p = 0; p < s.parts; p++) {
            dsigma2[p] = s.dpooled_bias && sigma2[p] / 2 <= s.cap ? s.dpooled_bias[pool + p] / 2 : 0.f;
            if (s.dspread) dsigma2[p] += s.dspread[pool + p];
            dsigma2[p] -= dweight[p] * weight[p] / (1.f + sigma2[p]);
            const float share = 1.f / float(std::max<int64_t>(work.count[p], 1)), factor = s.scale * s.scale * dsigma2[p] * share;
            for (int64_t c = 0; c < padded && work.count[p]; c++) {
                to[c] += factor * work.squares[p * padded + c];
                work.squares[p * padded + c] = 2 * factor * second[c];  // from here on: what a key's distance from the mean is times
            }
            for (auto& [mean, from] : {std::tuple(&work.k_mean, s.dpooled_k), std::tuple(&work.v_mean, s.dpooled_v)})
                for (int64_t c = 0; c < d; c++) (*mean)[p * padded + c] = from ? from[(pool + p) * d + c] * share : 0.f;
        }
        for (int64_t p = 0; p < s.parts; p++)
            for (int64_t i = work.first[p]; i < work.first[p] + work.count[p]; i++)
                for (int64_t c = 0; c < padded; c += LANES) {
                    int64_t at = i * padded + c, mine = p * padded + c;
                    V dk = load(work.k_mean + mine) + load(work.keys + at) * load(work.squares + mine), dv = load(work.v_mean + mine);
                    if (s.dslope) dk += load(work.by_key + at) * weight[p], dv += load(work.by_value + at) * weight[p];
                    store(work.keys + at, dk), store(work.values + at, dv);
                }
        run = work.ordered(run);
        write_rows(s.dk, bh / s.heads, bh % s.heads, run, d, work.keys, padded);
        write_rows(s.dv, bh / s.heads, bh % s.heads, run, d, work.values, padded);
    }

    void add_up_second(float* out, int64_t bh) const {
        for (int64_t c = 0; c < padded; c++) out[c] = s.dsecond && c < d ? s.dsecond[bh * d + c] : 0.f;
        for (int64_t j = 0; j < s.k_blocks; j++)
            for (int64_t c = 0; c < padded; c++) out[c] += dsecond[j * padded + c];
    }

    void query_block(SummaryWorkspace& work, const float* total, int64_t bh, int64_t i) const {
        Run run = query(i);
        const float* dmean = s.dq_mean ? s.dq_mean + (bh * s.q_blocks + i) * d : nullptr;
        for (int64_t c = 0; c < d; c++) work.moved[c] = dmean ? dmean[c] / float(run.count) : 0.f, work.direction[c] = total[c] * (2.f / float(image_q));
        Lines q = read(work.keys, s.q, bh, run);
        for (int64_t n = 0; n < run.count; n++)
            for (int64_t c = 0; c < padded; c += LANES) store(work.keys + n * padded + c, load(q[n] + c) * load(work.direction + c) + load(work.moved + c));
        write_rows(s.dq, bh / s.heads, bh % s.heads, run, d, work.keys, padded);
    }
};

void summarize_backward(const Summary& s) {
    SummaryGradient gradient(s);
    Array<float> total(gradient.padded);
    Team team(s.threads);
    auto workspaces = workspaces_of(gradient, team, true);
    team.run([&](int thread) {
        SummaryWorkspace& work = *workspaces[size_t(thread)];
#if AMX
        TileRegisters registers;
#endif
        for (int64_t bh = 0; bh < s.batch * s.heads; bh++) {
            team.share(1, [&](int64_t) { gradient.begin(bh); });
            team.share(s.k_blocks, [&](int64_t j) { gradient.key_block(work, bh, j); });
            team.share(1, [&](int64_t) { gradient.add_up_second(total, bh); });
            team.share(s.q_blocks, [&](int64_t i) { gradient.query_block(work, total, bh, i); });
        }
    });
}
