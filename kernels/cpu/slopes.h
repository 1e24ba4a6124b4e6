// Mixtures of slopes: out_i = Σ_J weight_iJ · slope_J, one matrix product [mixtures, units] · [units, D²] for each head, row by row of the
// matrices (`slope` [B, H, D, units, D]).

struct Mixing {
    const Mixture& m;
    const int64_t d, padded, blocks, rows;  // units and mixtures, rounded up
    Array<float> weight;                    // [rows, blocks] of one head

    explicit Mixing(const Mixture& m)
        : m(m), d(m.channels), padded(round_up(d, LANES)), blocks(round_up(m.units, LANES)), rows(round_up(m.mixtures, ROWS)), weight(rows * blocks + 16) {}

    int64_t groups() const { return rows / ROWS; }
    void begin(int64_t bh) {
        for (int64_t i = 0; i < m.mixtures; i++) __builtin_memcpy(weight + i * blocks, m.weight + (bh * m.mixtures + i) * m.units, m.units * 4);
    }

    // Rows [n, d] that lie `step` apart as a panel [n, padded]: themselves where they are one.
    const float* panel(float* space, const float* from, int64_t step, int64_t n) const {
        if (step == padded) return from;
        for (int64_t i = 0; i < n; i++) __builtin_memcpy(space + i * padded, from + i * step, d * 4);
        return space;
    }

    // Row c of all mixtures; `space`: a panel of as many rows as there are units.
    void mix(int64_t bh, int64_t c, float* space) const {
        alignas(64) float out[ROWS * MAX_CHANNELS];
        const float* slope = panel(space, m.slope + (bh * d + c) * m.units * d, d, m.units);
        for (int64_t r = 0; r < m.mixtures; r += ROWS) {
            product(out, padded, weight + r * blocks, blocks, slope, padded, m.units, padded, nullptr);
            for (int64_t i = r; i < std::min(r + ROWS, m.mixtures); i++) __builtin_memcpy(m.out + ((bh * m.mixtures + i) * d + c) * d, out + (i - r) * padded, d * 4);
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
    static constexpr int64_t TOGETHER = 8;  // groups of ROWS mixtures per task
    static constexpr int64_t DEPTH = 512;   // channels of the matrices whose products are summed before they join the others
    const int64_t width;                    // units, rounded up to a strip's vectors
    const bool in_place;                    // the matrices are read where they lie
    Array<float> dout, slope;               // [rows, d, padded], [d, width, padded]: one head's, as panels

    explicit MixingGradient(const Mixture& m)
        : Mixing(m), width(round_up(m.units, STRIP)), in_place(d == padded && width == m.units), dout(last() * d * padded), slope(in_place ? 0 : d * width * padded) {}

    int64_t last() const { return d == padded ? ROWS : rows; }  // rows of `dout`: all, or the last group's, which may be short
    int64_t tasks() const { return (groups() + TOGETHER - 1) / TOGETHER; }

    void pack(int64_t bh, int64_t c) {  // row c of the matrices
        for (int64_t i = std::max<int64_t>(rows - last(), 0); i < m.mixtures; i++)
            __builtin_memcpy(dout + ((i - rows + last()) * d + c) * padded, m.dout + ((bh * m.mixtures + i) * d + c) * d, d * 4);
        for (int64_t j = 0; j < m.units && !in_place; j++) __builtin_memcpy(slope + (c * width + j) * padded, m.slope + ((bh * d + c) * m.units + j) * d, d * 4);
    }
    const float* matrices(int64_t bh, int64_t group) const {  // of ROWS mixtures, [ROWS, d, padded]
        int64_t first = group * ROWS;
        return first >= rows - last() ? dout + (first - rows + last()) * d * padded : m.dout + (bh * m.mixtures + first) * d * d;
    }

    // The gradients of the weights of one task's mixtures; `dweight`: space for [TOGETHER · ROWS, blocks].
    void task(int64_t bh, int64_t number, float* dweight) const {
        int64_t from = number * TOGETHER, to = std::min(from + TOGETHER, groups()), together = std::max<int64_t>(1, DEPTH / padded);
        const float* all_slopes = in_place ? m.slope + bh * d * m.units * d : static_cast<const float*>(slope);
        __builtin_memset(dweight, 0, TOGETHER * ROWS * blocks * 4);
        for (int64_t c = 0; c < d; c += together)
            for (int64_t group = from; group < to; group++)
                for (int64_t j = 0; j < width; j += STRIP) {
                    V acc[ROWS][STRIP];
                    dots_tile<STRIP>(acc, matrices(bh, group) + c * padded, d * padded, padded, all_slopes + (c * width + j) * padded, padded, width * padded, std::min(together, d - c), padded);
                    float* out = dweight + (group - from) * ROWS * blocks + j;
                    for (int r = 0; r < ROWS; r++)
                        for (int s = 0; s < STRIP && j + s < m.units; s++) out[r * blocks + s] += horizontal_sum(acc[r][s]);
                }
        for (int64_t i = from * ROWS; i < std::min(to * ROWS, m.mixtures); i++)
            __builtin_memcpy(m.dweight + (bh * m.mixtures + i) * m.units, dweight + (i - from * ROWS) * blocks, m.units * 4);
    }

    void slopes(int64_t bh, int64_t c, float* space) const {  // row c of the gradients of all slopes
        const float* from = panel(space, m.dout + (bh * m.mixtures * d + c) * d, d * d, m.mixtures);
        outer_rows(m.dslope + (bh * d + c) * m.units * d, d, weight, blocks, from, padded, m.units, m.mixtures, d, false);
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
    auto space = spaces(team, m.units * mixing.padded + 16);
    team.run([&](int thread) {
        float* mine = space[size_t(thread)];
        for (int64_t bh = 0; bh < m.batch * m.heads; bh++) {
            team.share(1, [&](int64_t) { mixing.begin(bh); });
            team.share(mixing.d, [&](int64_t c) { mixing.mix(bh, c, mine); });
        }
    });
}

void mix_slopes_backward(const Mixture& m) {
    MixingGradient gradient(m);
    Team team(m.threads);
    auto space = spaces(team, std::max(m.mixtures * gradient.padded, MixingGradient::TOGETHER * ROWS * gradient.blocks) + 16);
    team.run([&](int thread) {
        float* mine = space[size_t(thread)];
        for (int64_t bh = 0; bh < m.batch * m.heads; bh++) {
            team.share(1, [&](int64_t) { gradient.begin(bh); });
            team.share(gradient.d, [&](int64_t c) { gradient.pack(bh, c); });
            team.share(gradient.tasks(), [&](int64_t task) { gradient.task(bh, task, mine); });
            team.share(gradient.d, [&](int64_t c) { gradient.slopes(bh, c, mine); });
        }
    });
}
