// What a rest of pooled keys and the choice of blocks take from whole blocks, in one pass over queries, keys and values: the formulas of
// method/parts/content.py and scores.py.

static constexpr int STEPS = 4;          // of the power iteration that finds a block's principal direction
static constexpr int64_t MOST_PARTS = 4;  // of a block

// out[c] = Σ_i weight[i] · rows[i, c], or of its square; of whole vectors. Two sums each, or every one would wait for the one before it. A
// function of its own for the reason that `tile` is one.
template <bool SQUARE, int N>
static __attribute__((noinline)) void weighted_strip(float* out, const float* weight, const float* rows, int64_t ld, int64_t n) {
    V even[N], odd[N];
#pragma GCC unroll 4
    for (int s = 0; s < N; s++) even[s] = odd[s] = V{};
    for (int64_t i = 0; i + 2 <= n; i += 2, rows += 2 * ld) {
        const V first = all(weight[i]), second = all(weight[i + 1]);
#pragma GCC unroll 4
        for (int s = 0; s < N; s++) {
            V x = load(rows + s * LANES), y = load(rows + ld + s * LANES);
            fma(even[s], SQUARE ? first * x : first, x), fma(odd[s], SQUARE ? second * y : second, y);
        }
    }
    const V last = all(n % 2 ? weight[n - 1] : 0.f);
#pragma GCC unroll 4
    for (int s = 0; s < N; s++) {
        if (n % 2) {
            V x = load(rows + s * LANES);
            fma(even[s], SQUARE ? last * x : last, x);
        }
        store(out + s * LANES, even[s] + odd[s]);
    }
}
template <bool SQUARE>
static inline void weighted(float* out, const float* weight, const float* rows, int64_t ld, int64_t n, int64_t columns) {
    for_strips(columns, [&](int64_t c, auto strip) __attribute__((always_inline)) { weighted_strip<SQUARE, strip.value>(out + c, weight, rows + c, ld, n); });
}
static inline void weighted_rows(float* out, const float* weight, const float* rows, int64_t ld, int64_t n, int64_t columns) {
    weighted<false>(out, weight, rows, ld, n, columns);
}

static inline float vector_sum(const float* a, int64_t columns) {
    V sum{};
    for (int64_t c = 0; c < columns; c += LANES) sum += load(a + c);
    return horizontal_sum(sum);
}

static inline float vector_dot(const float* a, const float* b, int64_t columns) {
    V sum{};
    for (int64_t c = 0; c < columns; c += LANES) sum += load(a + c) * load(b + c);
    return horizontal_sum(sum);
}

// out[i] = rows[i, :] · x, of whole vectors.
static inline void row_dots(float* out, const float* rows, int64_t ld, int64_t n, const float* x, int64_t columns) {
    for (int64_t i = 0; i < n; i++) out[i] = vector_dot(rows + i * ld, x, columns);
}

// The same of a panel, whose rows are read as if they were a multiple of LANES, as many sums at once; `out` has room for those too.
template <int STRIPS>
static inline __attribute__((always_inline)) void panel_dots_of(float* out, const float* panel, int64_t n, const float* x, int64_t columns) {
    V factor[STRIPS > 0 ? STRIPS : 1];
    for (int s = 0; s < STRIPS; s++) factor[s] = load(x + s * LANES);
    for (int64_t i = 0; i < n; i += LANES) {
        V sum[LANES];
#pragma GCC unroll 16
        for (int64_t r = 0; r < LANES; r++) {
            const float* row = panel + (i + r) * columns;
            sum[r] = load(row) * (STRIPS ? factor[0] : load(x));
            if constexpr (STRIPS > 0)
                for (int s = 1; s < STRIPS; s++) sum[r] += load(row + s * LANES) * factor[s];
            else
                for (int64_t c = LANES; c < columns; c += LANES) sum[r] += load(row + c) * load(x + c);
        }
        store(out + i, horizontal_sums(sum));
    }
}
static inline void panel_dots(float* out, const float* panel, int64_t n, const float* x, int64_t columns) {
    if (columns == STRIP * LANES)  // the commonest size: in registers
        panel_dots_of<STRIP>(out, panel, n, x, columns);
    else
        panel_dots_of<0>(out, panel, n, x, columns);
}

// Rows of a block: where they lie, or in a panel.
struct Lines {
    const float* data;
    int64_t ld;
    const float* operator[](int64_t i) const { return data + i * ld; }
};

// One thread's workspace.
struct SummaryWorkspace {
    Array<float> keys, values, spare, by_key, by_value, matrix, turned;  // panels [width, padded]; matrices [padded, padded]
    Array<float> direction, moved, along, one;                           // [padded], [padded], [width], [width]
    Array<float> k_mean, v_mean, squares;                                // [MOST_PARTS, padded] each
    Array<int32_t> order, next, places;                                  // [width] each; `order`: which row each row of the panels was
    int64_t first[MOST_PARTS] = {}, count[MOST_PARTS] = {};              // the rows of each part
#if AMX
    std::unique_ptr<TiledPanels> tiled;                                  // where queries, keys and values are bfloat16
#endif

    SummaryWorkspace(int64_t width, int64_t padded, bool backward)
        : keys(width * padded + 16), values(width * padded + 16), spare(width * padded + 16), direction(padded), moved(padded), along(width), one(width),
          k_mean(MOST_PARTS * padded), v_mean(MOST_PARTS * padded), squares(MOST_PARTS * padded), order(width), next(width), places(width) {
        std::fill_n(static_cast<float*>(one), width, 1.f);
        if (backward)
            by_key.allocate(width * padded), by_value.allocate(width * padded), matrix.allocate(padded * padded), turned.allocate(padded * padded);
    }

    // The rows in their own order, as one part.
    void begin(int64_t n) {
        for (int64_t i = 0; i < n; i++) order[i] = int32_t(i);
        first[0] = 0, count[0] = n;
    }

    // The rows by the parts that they are of, those of a part in their own order.
    void by_part(const uint8_t* part, int64_t n, int64_t parts) {
        int64_t at = 0;
        for (int64_t p = 0; p < parts; p++) {
            first[p] = at;
            for (int64_t i = 0; i < n; i++)
                if (part[i] == p) order[at++] = int32_t(i);
            count[p] = at - first[p];
        }
    }

    // A run of tokens in the order of the panels.
    Run ordered(const Run& run) const {
        for (int64_t i = 0; i < run.count; i++) places[i] = run.places ? run.places[order[i]] : order[i];
        return {run.place, run.image, run.count, places};
    }

    // A part's rows become what they are more than their mean, which joins `mean`; their weight is given back. `weight`: how much each
    // counts, by its number before the order, null: 1; those that do not count become 0.
    float centre(float* panel, float* mean, int64_t part, const float* weight, int64_t padded) {
        float* rows = panel + first[part] * padded;
        const int32_t* mine = order + first[part];
        const int64_t n = count[part];
        float total = weight ? 0.f : float(n);
        for (int64_t i = 0; i < n && weight; i++) total += along[i] = weight[mine[i]];
        const float inverse = 1.f / std::max(total, 1.f);
        weighted_rows(moved, weight ? along : one, rows, padded, n, padded);
        for (int64_t c = 0; c < padded; c += LANES) {
            V middle = load(moved + c) * inverse;
            store(mean + c, load(mean + c) + middle);
            for (int64_t i = 0; i < n; i++) store(rows + i * padded + c, load(rows + i * padded + c) - middle);
        }
        for (int64_t i = 0; i < n && weight; i++)
            if (weight[mine[i]] == 0) __builtin_memset(rows + i * padded, 0, padded * 4);
        return total;
    }

    // The part of each row before the order.
    void write_parts(uint8_t* part, int64_t parts) const {
        for (int64_t p = 0; p < parts; p++)
            for (int64_t i = first[p]; i < first[p] + count[p]; i++) part[order[i]] = uint8_t(p);
    }
};

// Rows of `keys` that are less their mean go to `spare`: those of smaller projections in front, the others, which become part `other`, behind
// them.
static void cut(SummaryWorkspace& work, int64_t part, int64_t other, const float* metric, const float* weight, int64_t d, int64_t padded) {
    const int64_t first = work.first[part], n = work.count[part];
    const float* rows = work.keys + first * padded;
    const int32_t* mine = work.order + first;
    std::fill_n(static_cast<float*>(work.direction), d, 1.f);
    std::fill(work.direction + d, work.direction + padded, 0.f);  // a unit of NaN before this one left NaN
    for (int step = 0; step <= STEPS; step++) {
        panel_dots(work.along, rows, n, work.direction, padded);
        if (step == STEPS) break;
        for (int64_t i = 0; i < n && weight; i++) work.along[i] *= weight[mine[i]];
        weighted_rows(work.moved, work.along, rows, padded, n, padded);
        weighted_rows(work.direction, work.moved, metric, padded, d, padded);
        float norm = std::max(std::sqrt(vector_dot(work.direction, work.direction, padded)), 1.17549435e-38f);
        for (int64_t c = 0; c < padded; c++) work.direction[c] /= norm;
    }
    int64_t ahead = 0, below = 0;
    for (int64_t i = 0; i < n; i++) below += !(work.along[i] > 0);
    for (int64_t i = 0, behind = below; i < n; i++) {
        int64_t to = first + (work.along[i] > 0 ? behind++ : ahead++);
        work.next[to] = mine[i];
        __builtin_memcpy(work.spare + to * padded, rows + i * padded, padded * 4);
    }
    work.count[part] = below, work.first[other] = first + below, work.count[other] = n - below;
}

// The n rows of `keys` are cut into parts by content: then the rows of a part follow each other and are less its mean, and `k_mean` has the
// means. `tokens`: the weights of parts.
static void split(SummaryWorkspace& work, float* tokens, int64_t n, int64_t parts, const float* metric, const float* weight, int64_t d, int64_t padded) {
    work.begin(n);
    std::fill_n(static_cast<float*>(work.k_mean), padded, 0.f);
    for (int64_t level = 1; level < parts; level *= 2) {
        for (int64_t part = 0; part < level; part++) {
            float* mean = work.k_mean + part * padded;
            work.centre(work.keys, mean, part, weight, padded);
            cut(work, part, part + level, metric, weight, d, padded);
            __builtin_memcpy(mean + level * padded, mean, padded * 4);
        }
        std::swap(work.keys.owner, work.spare.owner), std::swap(work.order.owner, work.next.owner);
    }
    for (int64_t part = 0; part < parts; part++) {
        tokens[part] = work.centre(work.keys, work.k_mean + part * padded, part, weight, padded);
        if (tokens[part] == 0) std::fill_n(work.k_mean + part * padded, padded, 0.f);
    }
}

// The blocks of one call, and what all blocks of a head share.
struct Summaries {
    static constexpr int64_t GROUPS = 16;  // of query blocks, whose sums are added up in one order whatever the threads
    const Summary& s;
    const int64_t d, padded, width, image_q, group;
    Array<float> sums;            // [GROUPS, d or 1, padded]: Σ q qᵀ of a group's queries, or Σ q² alone
    Array<float> metric, second;  // [d, padded] E[q qᵀ]; [padded] E[q²]
    Array<float> dsecond;         // [k_blocks, padded], backward only

    Summaries(const Summary& s, bool backward)
        : s(s), d(s.channels), padded(round_up(d, LANES)), width(round_up(std::max(s.q_width, s.k_width), std::max(ROWS, LANES)) + std::max(ROWS, LANES)),
          image_q(s.q_starts[s.q_blocks]), group((s.q_blocks + GROUPS - 1) / GROUPS), second(padded) {
        if (backward)
            dsecond.allocate(s.k_blocks * padded);
        else
            sums.allocate(GROUPS * rows() * padded), metric.allocate(rows() * padded);
    }
    int64_t rows() const { return s.parts > 1 ? d : 1; }  // of what is summed over queries

    Run run(const int32_t* starts, const int32_t* places, int64_t i, int64_t text) const {
        int64_t first = s.text_first ? text : 0, count = starts[i + 1] - starts[i];
        if (places) return {first, starts[i], count, places + starts[i]};
        return {first + starts[i], starts[i], count};
    }
    Run query(int64_t i) const { return run(s.q_starts, s.places_q, i, s.text_q); }
    Run key(int64_t j) const { return run(s.k_starts, s.places_k, j, s.text); }
    // `space`: a panel.
    Lines read(float* space, const Rows& x, int64_t bh, const Run& run) const {
        int64_t b = bh / s.heads, h = bh % s.heads;
        if (!x.bf16 && !run.places && d == padded) return {static_cast<const float*>(x.data) + b * x.batch + h * x.head + run.place * x.row, x.row};
        read_rows(space, padded, x, b, h, run, d, 1.f);
        return {space, padded};
    }

    // The same in the panel in any case; a NaN of another head may be in the columns past the channels.
    void read_panel(float* panel, const Rows& x, int64_t bh, const Run& run) const {
        read_rows(panel, padded, x, bh / s.heads, bh % s.heads, run, d, 1.f);
        for (int64_t i = 0; i < run.count && d != padded; i++) std::fill(panel + i * padded + d, panel + (i + 1) * padded, 0.f);
    }

    // Has the rows of a run on their way to the cache: they lie far apart, and the processor does not see where.
    void expect(const Rows& x, int64_t bh, const Run& run) const {
        const int64_t size = x.bf16 ? 2 : 4;
        const char* head = static_cast<const char*>(x.data) + (bh / s.heads * x.batch + bh % s.heads * x.head) * size;
        for (int64_t i = 0; i < run.count; i++)
            for (int64_t byte = 0; byte < d * size; byte += 64) __builtin_prefetch(head + run.at(i) * x.row * size + byte);
    }

    void add_queries(SummaryWorkspace& work, int64_t bh, int64_t number) {
        float* sum = sums + number * rows() * padded;
        __builtin_memset(sum, 0, rows() * padded * 4);
        for (int64_t i = number * group; i < std::min((number + 1) * group, s.q_blocks); i++) {
            Run run = query(i);
            Lines q = read(work.keys, s.q, bh, run);
            weighted_rows(work.moved, work.one, q.data, q.ld, run.count, padded);
            float* mean = s.q_mean + (bh * s.q_blocks + i) * d;
            for (int64_t c = 0; c < d; c++) mean[c] = work.moved[c] * (1.f / float(run.count));
#if AMX
            if (s.parts > 1 && work.tiled) {
                work.tiled->outer(sum, padded, q.data, q.ld, q.data, q.ld, run.count, true);
                continue;
            }
#endif
            if (s.parts > 1)
                outer_rows(sum, padded, q.data, q.ld, q.data, q.ld, d, run.count, padded, true, true);
            else
                for (int64_t n = 0; n < run.count; n++)
                    for (int64_t c = 0; c < padded; c++) sum[c] += q[n][c] * q[n][c];
        }
    }

    void add_up(int64_t part, int64_t parts) {  // one of `parts` slices of the metric
        int64_t first = rows() * part / parts * padded, last = rows() * (part + 1) / parts * padded;
        for (int64_t e = first; e < last; e++) {
            float sum = 0;
            for (int64_t g = 0; g < GROUPS; g++) sum += sums[g * rows() * padded + e];
            metric[e] = sum / float(image_q);
        }
    }
    void finish_queries(int64_t bh) {
        for (int64_t r = 0; r < rows(); r++)
            for (int64_t c = 0; c < r; c++) metric[r * padded + c] = metric[c * padded + r];
        for (int64_t r = 0; r < d && s.parts > 1; r++) __builtin_memcpy(s.metric + (bh * d + r) * d, metric + r * padded, d * 4);
        for (int64_t c = 0; c < d; c++) second[c] = s.second[bh * d + c] = metric[s.parts > 1 ? c * padded + c : c];
    }

    float spread(const float* squares, float tokens) const {  // s² Σ_d E[q_d²] Var(k_d)
        return s.scale * s.scale * vector_dot(squares, second, padded) / std::max(tokens, 1.f);
    }

    // The squares of each part's rows, which are less their mean.
    void square_parts(SummaryWorkspace& work, const float* rows) const {
        for (int64_t p = 0; p < s.parts; p++) weighted<true>(work.squares + p * padded, work.one, rows + work.first[p] * padded, padded, work.count[p], padded);
    }

    // Squares around the mean of all tokens [padded], from those around the means of parts; `mean` gets that mean.
    void whole(float* squares, float* mean, const SummaryWorkspace& work, const float* means, const float* tokens, int64_t n) const {
        for (int64_t c = 0; c < padded; c += LANES) {
            V sum{}, square{};
            for (int64_t p = 0; p < s.parts; p++) sum += tokens[p] * load(means + p * padded + c);
            sum *= 1.f / float(n);
            for (int64_t p = 0; p < s.parts; p++) {
                V off = load(means + p * padded + c) - sum;
                square += load(work.squares + p * padded + c) + tokens[p] * off * off;
            }
            store(mean + c, sum), store(squares + c, square);
        }
    }

    void empty_block(int64_t bh, int64_t j) const {
        int64_t block = bh * s.k_blocks + j, pool = block * s.parts;
        __builtin_memset(s.part + block * s.k_width, 0, s.k_width);
        __builtin_memset(s.k_mean + block * d, 0, d * 4);
        __builtin_memset(s.pooled_k + pool * d, 0, s.parts * d * 4), __builtin_memset(s.pooled_v + pool * d, 0, s.parts * d * 4);
        std::fill_n(s.pooled_bias + pool, s.parts, -INFINITY);
        for (float* each : {s.tokens, s.spread, s.v_spread}) std::fill_n(each + pool, s.parts, 0.f);
        s.score_bias[block] = -INFINITY;
        for (int64_t c = 0; c < d && s.first_order; c++) __builtin_memset(s.slope + ((bh * d + c) * s.k_blocks + j) * d, 0, d * 4);
    }

    // The rows of a block's values in the order of its parts, less their mean.
    void read_values(SummaryWorkspace& work, int64_t bh, int64_t j) const {
        read_panel(work.values, s.v, bh, work.ordered(key(j)));
        std::fill_n(static_cast<float*>(work.v_mean), s.parts * padded, 0.f);
        for (int64_t p = 0; p < s.parts; p++) work.centre(work.values, work.v_mean + p * padded, p, nullptr, padded);
    }

    void key_block(SummaryWorkspace& work, int64_t bh, int64_t j) const {
        int64_t n = key(j).count, block = bh * s.k_blocks + j, pool = block * s.parts;
        const float tiny = 1.17549435e-38f;
        float *tokens = s.tokens + pool, weight[MOST_PARTS];
        if (n == 0) return empty_block(bh, j);
        read_panel(work.keys, s.k, bh, key(j));
        expect(s.v, bh, key(j));
        split(work, tokens, n, s.parts, metric, nullptr, d, padded);
        __builtin_memset(s.part + block * s.k_width, 0, s.k_width);
        work.write_parts(s.part + block * s.k_width, s.parts);
        square_parts(work, work.keys);
        for (int64_t p = 0; p < s.parts; p++) {
            float sigma2 = s.spread[pool + p] = spread(work.squares + p * padded, tokens[p]);
            s.pooled_bias[pool + p] = std::min(sigma2 / 2, s.cap) + (s.log_count ? std::log(tokens[p]) : tokens[p] ? 0.f : -INFINITY);
            weight[p] = 1.f / (1.f + sigma2) / float(n);
        }
        whole(work.moved, work.direction, work, work.k_mean, tokens, n);
        __builtin_memcpy(s.k_mean + block * d, work.direction, d * 4);
        float sigma2 = spread(work.moved, float(n));
        read_values(work, bh, j);
        square_parts(work, work.values);
        for (int64_t p = 0; p < s.parts; p++) {
            s.v_spread[pool + p] = vector_sum(work.squares + p * padded, padded) / std::max(tokens[p], 1.f);
            __builtin_memcpy(s.pooled_k + (pool + p) * d, work.k_mean + p * padded, d * 4), __builtin_memcpy(s.pooled_v + (pool + p) * d, work.v_mean + p * padded, d * 4);
        }
        whole(work.moved, work.direction, work, work.v_mean, tokens, n);
        float flat = vector_sum(work.moved, padded);
        s.score_bias[block] = std::log(float(n)) + std::min(sigma2 / 2, s.score_cap) + std::log(std::max(sigma2, tiny)) + std::log(std::max(flat / float(n), tiny)) / 2;
        if (j + 1 < s.k_blocks) expect(s.k, bh, key(j + 1));
        if (!s.first_order) return;
        for (int64_t p = 0; p < s.parts; p++)
            for (float *row = work.values + work.first[p] * padded, *end = row + work.count[p] * padded; row < end; row += LANES) store(row, load(row) * weight[p]);
        outer_rows(s.slope + (bh * d * s.k_blocks + j) * d, s.k_blocks * d, work.keys, padded, work.values, padded, d, n, d, false);
    }
};

// A workspace for each thread.
static std::vector<std::unique_ptr<SummaryWorkspace>> workspaces_of(const Summaries& all, const Team& team, bool backward) {
    std::vector<std::unique_ptr<SummaryWorkspace>> made;
    for (int t = 0; t < team.size(); t++) {
        made.push_back(std::make_unique<SummaryWorkspace>(all.width, all.padded, backward));
#if AMX
        if (all.s.q.bf16 && all.s.k.bf16 && all.s.v.bf16) made.back()->tiled = std::make_unique<TiledPanels>(all.d, all.width);
#endif
    }
    return made;
}

void summarize(const Summary& s) {
    Summaries summaries(s, false);
    Team team(s.threads);
    auto workspaces = workspaces_of(summaries, team, false);
    team.run([&](int thread) {
        SummaryWorkspace& work = *workspaces[size_t(thread)];
#if AMX
        TileRegisters registers;
#endif
        for (int64_t bh = 0; bh < s.batch * s.heads; bh++) {
            team.share(Summaries::GROUPS, [&](int64_t number) { summaries.add_queries(work, bh, number); });
            team.share(team.size(), [&](int64_t part) { summaries.add_up(part, team.size()); });
            team.share(1, [&](int64_t) { summaries.finish_queries(bh); });
            team.share(s.k_blocks, [&](int64_t j) { summaries.key_block(work, bh, j); });
        }
    });
}
