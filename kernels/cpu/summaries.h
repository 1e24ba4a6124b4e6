// What a rest of pooled keys and the choice of blocks take from whole blocks, in one pass over queries, keys and values: the formulas of
// method/parts/content.py and scores.py.

static constexpr int STEPS = 4;          // of the power iteration that finds a block's principal direction
static constexpr int64_t MOST_PARTS = 4;  // of a block

// acc[r][c] += sum over n of A[n, r] · B[n, c], both row-major. A function of its own for the reason that `tile` is one.
template <int N>
static __attribute__((noinline)) void outer_tile(V (&acc)[ROWS][N], const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth) {
    V sum[ROWS][N];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int c = 0; c < N; c++) sum[r][c] = acc[r][c];
    for (int64_t n = 0; n < depth; n++) {
        V column[N];
#pragma GCC unroll 4
        for (int c = 0; c < N; c++) column[c] = load(b + n * ldb + c * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
            V x = all(a[n * lda + r]);
#pragma GCC unroll 4
            for (int c = 0; c < N; c++) fma(sum[r][c], x, column[c]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int c = 0; c < N; c++) acc[r][c] = sum[r][c];
}

// Strips of columns as in `for_strips`, but the last one as wide as what is left.
template <class Body>
static inline __attribute__((always_inline)) void for_widths(int64_t columns, Body&& body) {
    int64_t c = 0;
    for (; c + STRIP * LANES <= columns; c += STRIP * LANES) body(c, std::integral_constant<int, STRIP>{});
    int64_t left = (columns - c) / LANES;
    if constexpr (STRIP > 3)
        if (left == 3) body(c, std::integral_constant<int, 3>{});
    if constexpr (STRIP > 2)
        if (left == 2) body(c, std::integral_constant<int, 2>{});
    if (left == 1) body(c, std::integral_constant<int, 1>{});
}

// out [rows, columns] = Aᵀ · B, or joins what is there; `columns` need not be whole vectors, those of B are read as if they were. Where A
// has less than ROWS columns, that many are read. `upper`: of the entries below the diagonal some are left out.
static inline void outer_rows(float* out, int64_t ldo, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t rows, int64_t depth, int64_t columns, bool add, bool upper = false) {
    for (int64_t next = 0; next < rows; next += ROWS) {
        int64_t r0 = std::min<int64_t>(next, std::max<int64_t>(rows - ROWS, 0)), from = upper ? r0 / LANES * LANES : 0;
        int64_t first = next - r0, most = std::min<int64_t>(ROWS, rows - r0);  // the last rows once more: nothing past A's end is read
        for_widths(round_up(columns, LANES) - from, [&](int64_t c0, auto strip) __attribute__((always_inline)) {
            V acc[ROWS][strip.value];
            int64_t c = from + c0;
            for (int r = 0; r < ROWS; r++)
                for (int s = 0; s < strip.value; s++) {
                    acc[r][s] = V{};
                    int64_t at = c + s * LANES;
                    if (add && r >= first && r < most) __builtin_memcpy(&acc[r][s], out + (r0 + r) * ldo + at, std::min<int64_t>(LANES, columns - at) * 4);
                }
            outer_tile<strip.value>(acc, a + r0, lda, b + c, ldb, depth);
            for (int64_t r = first; r < most; r++)
                for (int s = 0; s < strip.value; s++) {
                    int64_t at = c + s * LANES;
                    if (at + LANES <= columns)
                        store(out + (r0 + r) * ldo + at, acc[r][s]);
                    else
                        __builtin_memcpy(out + (r0 + r) * ldo + at, &acc[r][s], (columns - at) * 4);
                }
        });
    }
}

// out[c] = Σ_i weight[i] · rows[i, c], or of its square; of whole vectors. Two sums each, or every one would wait for the one before it.
template <bool SQUARE>
static inline void weighted(float* out, const float* weight, const float* rows, int64_t ld, int64_t n, int64_t columns) {
    for_strips(columns, [&](int64_t c, auto strip) __attribute__((always_inline)) {
        V sum[2][strip.value];
        for (int s = 0; s < strip.value; s++) sum[0][s] = sum[1][s] = V{};
        auto add = [&](V(&to)[strip.value], int64_t i) __attribute__((always_inline)) {
            V w = all(weight[i]);
            for (int s = 0; s < strip.value; s++) {
                V x = load(rows + i * ld + c + s * LANES);
                fma(to[s], SQUARE ? w * x : w, x);
            }
        };
        int64_t i = 0;
        for (; i + 2 <= n; i += 2) add(sum[0], i), add(sum[1], i + 1);
        if (i < n) add(sum[0], i);
        for (int s = 0; s < strip.value; s++) store(out + c + s * LANES, sum[0][s] + sum[1][s]);
    });
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
    Array<float> keys, values, centred, by_key, by_value, matrix, turned;  // panels [width, padded]; matrices [padded, padded]
    Array<float> direction, moved, along, one;                             // [padded], [padded], [width], [width]
    Array<float> member, k_mean, v_mean, squares;                          // [MOST_PARTS, width], [MOST_PARTS, padded] each
    Array<uint8_t> part;
    std::vector<int32_t> mine;

    SummaryWorkspace(int64_t width, int64_t padded, bool backward)
        : keys(width * padded + 16), values(width * padded + 16), centred(width * padded), direction(padded), moved(padded), along(width), one(width),
          member(MOST_PARTS * width), k_mean(MOST_PARTS * padded), v_mean(MOST_PARTS * padded), squares(MOST_PARTS * padded), part(width), mine(size_t(width)) {
        std::fill_n(static_cast<float*>(one), width, 1.f);
        if (backward)
            by_key.allocate(width * padded), by_value.allocate(width * padded), matrix.allocate(padded * padded), turned.allocate(padded * padded);
    }
};

// The keys of `part` number `number` on the side of larger projections go to part number + level; `weight`: how much each counts, null: 1.
static void cut(SummaryWorkspace& work, const Lines& keys, int64_t n, int64_t number, int64_t level, const float* metric, const float* weight, int64_t d, int64_t padded) {
    int64_t count = 0;
    float total = 0;
    auto mine = [&](int64_t i) { return work.part[i] == number && !(weight && weight[i] == 0); };
    for (int64_t i = 0; i < n; i++)
        if (mine(i)) work.mine[size_t(count++)] = int32_t(i), total += weight ? weight[i] : 1.f;
    if (count == 0) return;
    for (int64_t i = 0; i < n; i++) work.along[i] = mine(i) ? (weight ? weight[i] : 1.f) / total : 0.f;
    weighted_rows(work.moved, work.along, keys.data, keys.ld, n, padded);
    for (int64_t i = 0; i < count; i++)
        for (int64_t c = 0; c < padded; c += LANES) store(work.centred + i * padded + c, load(keys[work.mine[size_t(i)]] + c) - load(work.moved + c));
    std::fill_n(static_cast<float*>(work.direction), d, 1.f);
    std::fill(work.direction + d, work.direction + padded, 0.f);  // a unit of NaN before this one left NaN
    for (int step = 0; step <= STEPS; step++) {
        panel_dots(work.along, work.centred, count, work.direction, padded);
        if (step == STEPS) break;
        for (int64_t i = 0; i < count && weight; i++) work.along[i] *= weight[work.mine[size_t(i)]];
        weighted_rows(work.moved, work.along, work.centred, padded, count, padded);
        weighted_rows(work.direction, work.moved, metric, padded, d, padded);
        float norm = std::max(std::sqrt(vector_dot(work.direction, work.direction, padded)), 1.17549435e-38f);
        for (int64_t c = 0; c < padded; c++) work.direction[c] /= norm;
    }
    for (int64_t i = 0; i < count; i++)
        if (work.along[i] > 0) work.part[work.mine[size_t(i)]] = uint8_t(number + level);
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
        : s(s), d(s.channels), padded(round_up(d, LANES)), width(round_up(std::max(s.q_width, s.k_width), std::max(ROWS, LANES)) + ROWS),
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

    void add_queries(SummaryWorkspace& work, int64_t bh, int64_t number) {
        float* sum = sums + number * rows() * padded;
        __builtin_memset(sum, 0, rows() * padded * 4);
        for (int64_t i = number * group; i < std::min((number + 1) * group, s.q_blocks); i++) {
            Run run = query(i);
            Lines q = read(work.keys, s.q, bh, run);
            weighted_rows(work.moved, work.one, q.data, q.ld, run.count, padded);
            float* mean = s.q_mean + (bh * s.q_blocks + i) * d;
            for (int64_t c = 0; c < d; c++) mean[c] = work.moved[c] * (1.f / float(run.count));
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

    // Numbers of tokens of the parts, and 1 or 0 for each token and part.
    void count(SummaryWorkspace& work, int64_t n, int64_t (&tokens)[MOST_PARTS]) const {
        for (int64_t p = 0; p < s.parts; p++) {
            tokens[p] = 0;
            for (int64_t i = 0; i < n; i++) {
                bool mine = work.part[i] == p;
                tokens[p] += mine;
                work.member[p * width + i] = mine;
            }
        }
    }

    // Rows less the means of their parts, and for each part the sum of their squares.
    void centre(SummaryWorkspace& work, float* rows, const Lines& from, const float* mean, int64_t n) const {
        for (int64_t i = 0; i < n; i++)
            for (int64_t c = 0; c < padded; c += LANES) store(rows + i * padded + c, load(from[i] + c) - load(mean + work.part[i] * padded + c));
        for (int64_t p = 0; p < s.parts; p++) weighted<true>(work.squares + p * padded, work.member + p * width, rows, padded, n, padded);
    }

    float spread(const float* squares, int64_t tokens) const {  // s² Σ_d E[q_d²] Var(k_d)
        return s.scale * s.scale * vector_dot(squares, second, padded) / float(std::max<int64_t>(tokens, 1));
    }

    // Squares around the mean of all tokens [padded], from those around the means of parts; `mean` gets that mean.
    void whole(float* squares, float* mean, const SummaryWorkspace& work, const float* means, const int64_t (&tokens)[MOST_PARTS], int64_t n) const {
        for (int64_t c = 0; c < padded; c++) {
            float sum = 0, square = 0;
            for (int64_t p = 0; p < s.parts; p++) sum += float(tokens[p]) * means[p * padded + c];
            mean[c] = sum / float(n);
            for (int64_t p = 0; p < s.parts; p++) {
                float off = means[p * padded + c] - mean[c];
                square += work.squares[p * padded + c] + float(tokens[p]) * off * off;
            }
            squares[c] = square;
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

    void key_block(SummaryWorkspace& work, int64_t bh, int64_t j) const {
        int64_t n = key(j).count, block = bh * s.k_blocks + j, pool = block * s.parts, tokens[MOST_PARTS];
        const float tiny = 1.17549435e-38f;
        if (n == 0) return empty_block(bh, j);
        const Lines keys = read(work.keys, s.k, bh, key(j)), values = read(work.values, s.v, bh, key(j));
        __builtin_memset(work.part, 0, n);
        for (int64_t level = 1; level < s.parts; level *= 2)
            for (int64_t number = 0; number < level; number++) cut(work, keys, n, number, level, metric, nullptr, d, padded);
        __builtin_memset(s.part + block * s.k_width, 0, s.k_width);
        __builtin_memcpy(s.part + block * s.k_width, work.part, n);
        count(work, n, tokens);
        for (int64_t p = 0; p < s.parts; p++) {
            float share = 1.f / float(std::max<int64_t>(tokens[p], 1));
            for (auto& [to, rows, out] : {std::tuple(&work.k_mean, keys, s.pooled_k), std::tuple(&work.v_mean, values, s.pooled_v)}) {
                float* mean = *to + p * padded;
                weighted_rows(mean, work.member + p * width, rows.data, rows.ld, n, padded);
                for (int64_t c = 0; c < padded; c++) mean[c] *= share;
                __builtin_memcpy(out + (pool + p) * d, mean, d * 4);
            }
        }
        centre(work, work.keys, keys, work.k_mean, n);
        float weight[MOST_PARTS];
        for (int64_t p = 0; p < s.parts; p++) {
            float sigma2 = spread(work.squares + p * padded, tokens[p]);
            s.tokens[pool + p] = float(tokens[p]), s.spread[pool + p] = sigma2;
            s.pooled_bias[pool + p] = std::min(sigma2 / 2, s.cap) + (s.log_count ? std::log(float(tokens[p])) : tokens[p] ? 0.f : -INFINITY);
            weight[p] = 1.f / (1.f + sigma2) / float(n);
        }
        whole(work.moved, work.direction, work, work.k_mean, tokens, n);
        __builtin_memcpy(s.k_mean + block * d, work.direction, d * 4);
        float sigma2 = spread(work.moved, n);
        centre(work, work.values, values, work.v_mean, n);
        for (int64_t p = 0; p < s.parts; p++)
            s.v_spread[pool + p] = vector_sum(work.squares + p * padded, padded) / float(std::max<int64_t>(tokens[p], 1));
        whole(work.moved, work.direction, work, work.v_mean, tokens, n);
        float flat = vector_sum(work.moved, padded);
        s.score_bias[block] = std::log(float(n)) + std::min(sigma2 / 2, s.score_cap) + std::log(std::max(sigma2, tiny)) + std::log(std::max(flat / float(n), tiny)) / 2;
        if (!s.first_order) return;
        for (int64_t i = 0; i < n; i++)
            for (int64_t c = 0; c < padded; c += LANES) store(work.values + i * padded + c, load(work.values + i * padded + c) * weight[work.part[i]]);
        outer_rows(s.slope + (bh * d * s.k_blocks + j) * d, s.k_blocks * d, work.keys, padded, work.values, padded, d, n, d, false);
    }
};

void summarize(const Summary& s) {
    Summaries summaries(s, false);
    Team team(s.threads);
    std::vector<std::unique_ptr<SummaryWorkspace>> workspaces;
    for (int t = 0; t < team.size(); t++) workspaces.push_back(std::make_unique<SummaryWorkspace>(summaries.width, summaries.padded, false));
    team.run([&](int thread) {
        SummaryWorkspace& work = *workspaces[size_t(thread)];
        for (int64_t bh = 0; bh < s.batch * s.heads; bh++) {
            team.share(Summaries::GROUPS, [&](int64_t number) { summaries.add_queries(work, bh, number); });
            team.share(team.size(), [&](int64_t part) { summaries.add_up(part, team.size()); });
            team.share(1, [&](int64_t) { summaries.finish_queries(bh); });
            team.share(s.k_blocks, [&](int64_t j) { summaries.key_block(work, bh, j); });
        }
    });
}
