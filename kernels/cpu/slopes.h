// One matrix for each query block: the key blocks' slopes, weighted by the pooled softmax of the block's mean query over what is not kept.
//   S_I = Σ_J ω_IJ · slope_J, one matrix product [q blocks, k blocks] · [k blocks, D²] for each head, row by row of the matrices
//   (`slope` [B, H, D, k blocks, D]).

struct Mixing {
    const Mixture& m;
    const int64_t d, padded, parts, columns, blocks, rows;  // pooled keys, key blocks and query blocks, rounded up
    Array<float> keys_t;                                    // [d, columns] of one head
    Array<float> share;                                     // [rows, columns]: of each pooled key in the softmax, 0 where it is kept
    Array<float> weight;                                    // [rows, blocks]: of each key block

    explicit Mixing(const Mixture& m)
        : m(m), d(m.channels), padded(round_up(d, LANES)), parts(m.pools / m.k_blocks), columns(round_up(m.pools, LANES)), blocks(round_up(m.k_blocks, LANES)),
          rows(round_up(m.q_blocks, ROWS)), keys_t(d * columns), share(rows * columns + 16), weight(rows * blocks + 16) {}

    int64_t groups() const { return rows / ROWS; }
    void begin(int64_t bh) { transpose(keys_t, columns, m.pooled_k + bh * m.pools * d, d, m.pools, d); }

    // Shares and weights of ROWS query blocks; `mean`: space for ROWS rows of d.
    void weights(int64_t bh, int64_t group, float* mean) {
        int64_t first = group * ROWS, count = std::min<int64_t>(ROWS, m.q_blocks - first);
        for (int64_t e = 0; e < count * d; e++) mean[e] = m.q_mean[(bh * m.q_blocks + first) * d + e] * (m.scale * LOG2E);
        product(share + first * columns, columns, mean, d, keys_t, columns, d, columns, nullptr);
        for (int64_t r = first; r < first + count; r++) softmax(bh, r);
    }

    void softmax(int64_t bh, int64_t r) {
        float *x = share + r * columns, *w = weight + r * blocks;
        const float* bias = m.pooled_bias + bh * m.pools;
        for (int64_t t = 0; t < m.pools; t++) x[t] += bias[t] * LOG2E;
        std::fill(x + m.pools, x + columns, -INFINITY);
        int64_t at = bh * m.lists_per_head * m.q_blocks + r;
        for (int64_t n = 0; n < m.counts[at]; n++) std::fill_n(x + m.lists[at * m.list_width + n] * parts, parts, -INFINITY);
        V highest = all(NEVER), sum{};
        for (int64_t t = 0; t < columns; t += LANES) highest = max(load(x + t), highest);
        highest = all(horizontal_max(highest));
        for (int64_t t = 0; t < columns; t += LANES) {
            V e = exp2(load(x + t) - highest);
            sum += e;
            store(x + t, e);
        }
        float mass = horizontal_sum(sum), inverse = mass == 0 ? 0.f : 1.f / mass;
        for (int64_t t = 0; t < columns; t += LANES) store(x + t, load(x + t) * inverse);
        for (int64_t j = 0; j < m.k_blocks; j++) {
            w[j] = 0;
            for (int64_t p = 0; p < parts; p++) w[j] += x[j * parts + p];
        }
    }

    // Rows [n, d] that lie `step` apart as a panel [n, padded]: themselves where they are one.
    const float* panel(float* space, const float* from, int64_t step, int64_t n) const {
        if (step == padded) return from;
        for (int64_t i = 0; i < n; i++) __builtin_memcpy(space + i * padded, from + i * step, d * 4);
        return space;
    }

    // Row c of the matrices of all query blocks; `space`: a panel of k_blocks rows.
    void mix(int64_t bh, int64_t c, float* space) const {
        alignas(64) float out[ROWS * MAX_CHANNELS];
        const float* slope = panel(space, m.slope + (bh * d + c) * m.k_blocks * d, d, m.k_blocks);
        for (int64_t r = 0; r < m.q_blocks; r += ROWS) {
            product(out, padded, weight + r * blocks, blocks, slope, padded, m.k_blocks, padded, nullptr);
            for (int64_t i = r; i < std::min(r + ROWS, m.q_blocks); i++) __builtin_memcpy(m.out + ((bh * m.q_blocks + i) * d + c) * d, out + (i - r) * padded, d * 4);
        }
    }
};

// acc[r][c] = Σ_n A_n[r, :] · B_n[c, :], a vector of partial sums each: matrices of `depth` columns, `step_a` and `step_b` apart.
template <int N>
static __attribute__((noinline)) void dots_tile(V (&acc)[ROWS][N], const float* a, int64_t lda, int64_t step_a, const float* b, int64_t ldb, int64_t step_b, int64_t count, int64_t depth) {
    V sum[ROWS][N];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int c = 0; c < N; c++) sum[r][c] = V{};
    for (int64_t n = 0; n < count; n++, a += step_a, b += step_b)
        for (int64_t k = 0; k < depth; k += LANES) {
            V column[N];
#pragma GCC unroll 4
            for (int c = 0; c < N; c++) column[c] = load(b + c * ldb + k);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++) {
                V x = load(a + r * lda + k);
#pragma GCC unroll 4
                for (int c = 0; c < N; c++) fma(sum[r][c], x, column[c]);
            }
        }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int c = 0; c < N; c++) acc[r][c] = sum[r][c];
}

struct MixingGradient : Mixing {
    static constexpr int64_t GROUP = 4 * ROWS, TOGETHER = 8;  // pooled keys per task; groups of ROWS query blocks per task
    static constexpr int64_t DEPTH = 512;                     // channels of the matrices whose products are summed before they join the others
    const int64_t width;                                      // key blocks, rounded up to a strip's vectors
    const bool in_place;                                      // the matrices are read where they lie
    Array<float> dout, slope;                                 // [rows, d, padded], [d, width, padded]: one head's, as panels
    Array<float> keys, mean;                                  // [pools, padded], [q_blocks, padded]

    explicit MixingGradient(const Mixture& m)
        : Mixing(m), width(round_up(m.k_blocks, STRIP)), in_place(d == padded && width == m.k_blocks), dout(last() * d * padded), slope(in_place ? 0 : d * width * padded),
          keys(m.pools * padded), mean(m.q_blocks * padded) {}

    int64_t last() const { return d == padded ? ROWS : rows; }  // rows of `dout`: all, or the last group's, which may be short
    int64_t tasks() const { return (groups() + TOGETHER - 1) / TOGETHER; }

    void pack(int64_t bh, int64_t c) {  // row c of the matrices
        for (int64_t i = std::max<int64_t>(rows - last(), 0); i < m.q_blocks; i++)
            __builtin_memcpy(dout + ((i - rows + last()) * d + c) * padded, m.dout + ((bh * m.q_blocks + i) * d + c) * d, d * 4);
        for (int64_t j = 0; j < m.k_blocks && !in_place; j++) __builtin_memcpy(slope + (c * width + j) * padded, m.slope + ((bh * d + c) * m.k_blocks + j) * d, d * 4);
    }
    const float* matrices(int64_t bh, int64_t group) const {  // of ROWS query blocks, [ROWS, d, padded]
        int64_t first = group * ROWS;
        return first >= rows - last() ? dout + (first - rows + last()) * d * padded : m.dout + (bh * m.q_blocks + first) * d * d;
    }
    void pack_means(int64_t bh) {
        panel(keys, m.pooled_k + bh * m.pools * d, d, m.pools);
        panel(mean, m.q_mean + bh * m.q_blocks * d, d, m.q_blocks);
        if (d == padded) __builtin_memcpy(keys, m.pooled_k + bh * m.pools * d, m.pools * d * 4), __builtin_memcpy(mean, m.q_mean + bh * m.q_blocks * d, m.q_blocks * d * 4);
    }

    // Query blocks of one task: the gradients of their weights, `dweight` [TOGETHER · ROWS, blocks], then of their logits.
    void task(int64_t bh, int64_t number, float* dweight) {
        int64_t from = number * TOGETHER, to = std::min(from + TOGETHER, groups()), together = std::max<int64_t>(1, DEPTH / padded);
        const float* all_slopes = in_place ? m.slope + bh * d * m.k_blocks * d : static_cast<const float*>(slope);
        for (int64_t group = from; group < to; group++) weights(bh, group, dweight);
        __builtin_memset(dweight, 0, TOGETHER * ROWS * blocks * 4);
        for (int64_t c = 0; c < d; c += together)
            for (int64_t group = from; group < to; group++)
                for (int64_t j = 0; j < width; j += STRIP) {
                    V acc[ROWS][STRIP];
                    dots_tile<STRIP>(acc, matrices(bh, group) + c * padded, d * padded, padded, all_slopes + (c * width + j) * padded, padded, width * padded, std::min(together, d - c), padded);
                    float* out = dweight + (group - from) * ROWS * blocks + j;
                    for (int r = 0; r < ROWS; r++)
                        for (int s = 0; s < STRIP && j + s < m.k_blocks; s++) out[r * blocks + s] += horizontal_sum(acc[r][s]);
                }
        for (int64_t group = from; group < to; group++) logits(bh, group, dweight + (group - from) * ROWS * blocks);
    }

    // In place of the shares the gradients of the logits of ROWS query blocks, and those of their means.
    void logits(int64_t bh, int64_t group, const float* dweight) {
        int64_t first = group * ROWS;
        for (int64_t r = first; r < std::min(first + ROWS, m.q_blocks); r++) {
            const float *w = weight + r * blocks, *dw = dweight + (r - first) * blocks;
            float *x = share + r * columns, sum = 0;
            for (int64_t j = 0; j < m.k_blocks; j++) sum += w[j] * dw[j];
            for (int64_t j = 0; j < m.k_blocks; j++)
                for (int64_t p = 0; p < parts; p++) x[j * parts + p] *= dw[j] - sum;
        }
        alignas(64) float out[ROWS * MAX_CHANNELS];
        product(out, padded, share + first * columns, columns, keys, padded, m.pools, padded, nullptr);
        for (int64_t r = first; r < std::min(first + ROWS, m.q_blocks); r++)
            for (int64_t c = 0; c < d; c++) m.dq_mean[(bh * m.q_blocks + r) * d + c] = m.scale * out[(r - first) * padded + c];
    }

    void pooled(int64_t bh, int64_t task) {  // the gradients of GROUP pooled keys
        int64_t first = task * GROUP, count = std::min(GROUP, m.pools - first);
        float* to = m.dpooled_k + (bh * m.pools + first) * d;
        outer_rows(to, d, share + first, columns, mean, padded, count, m.q_blocks, d, false);
        for (int64_t e = 0; e < count * d; e++) to[e] *= m.scale;
        float* bias = m.dpooled_bias + bh * m.pools + first;
        std::fill_n(bias, count, 0.f);
        for (int64_t i = 0; i < m.q_blocks; i++)
            for (int64_t t = 0; t < count; t++) bias[t] += share[i * columns + first + t];
    }

    void slopes(int64_t bh, int64_t c, float* space) const {  // row c of the gradients of all slopes
        const float* from = panel(space, m.dout + (bh * m.q_blocks * d + c) * d, d * d, m.q_blocks);
        outer_rows(m.dslope + (bh * d + c) * m.k_blocks * d, d, weight, blocks, from, padded, m.k_blocks, m.q_blocks, d, false);
    }
};

static std::vector<Array<float>> spaces(const Team& team, int64_t size) {
    std::vector<Array<float>> found;
    for (int t = 0; t < team.size(); t++) found.emplace_back(size);
    return found;
}

void mix_slopes(const Mixture& m) {
    Mixing mixing(m);
    Team team(m.threads);
    auto space = spaces(team, std::max(m.k_blocks * mixing.padded, ROWS * mixing.d) + 16);
    team.run([&](int thread) {
        float* mine = space[size_t(thread)];
        for (int64_t bh = 0; bh < m.batch * m.heads; bh++) {
            team.share(1, [&](int64_t) { mixing.begin(bh); });
            team.share(mixing.groups(), [&](int64_t group) { mixing.weights(bh, group, mine); });
            team.share(mixing.d, [&](int64_t c) { mixing.mix(bh, c, mine); });
        }
    });
}

void mix_slopes_backward(const Mixture& m) {
    MixingGradient gradient(m);
    Team team(m.threads);
    auto space = spaces(team, std::max({m.q_blocks * gradient.padded, MixingGradient::TOGETHER * ROWS * gradient.blocks, ROWS * gradient.d}) + 16);
    team.run([&](int thread) {
        float* mine = space[size_t(thread)];
        for (int64_t bh = 0; bh < m.batch * m.heads; bh++) {
            team.share(1, [&](int64_t) { gradient.begin(bh), gradient.pack_means(bh); });
            team.share(gradient.d, [&](int64_t c) { gradient.pack(bh, c); });
            team.share(gradient.tasks(), [&](int64_t task) { gradient.task(bh, task, mine); });
            team.share((m.pools + MixingGradient::GROUP - 1) / MixingGradient::GROUP, [&](int64_t task) { gradient.pooled(bh, task); });
            team.share(gradient.d, [&](int64_t c) { gradient.slopes(bh, c, mine); });
        }
    });
}
