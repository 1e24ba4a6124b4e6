// Pooled scores and their best key blocks, for each query block.

// sum[c] = Σ_i rows[i, c] and, where it is asked for, square[c] = Σ_i (rows[i, c] - from[c])², of whole vectors; from null: 0.
template <bool SQUARE>
static inline void block_sums(float* sum, float* square, const Lines& rows, int64_t n, int64_t columns, const float* from) {
    for_strips(columns, [&](int64_t c, auto strip) __attribute__((always_inline)) {
        V total[strip.value], squares[strip.value], middle[strip.value];
        for (int s = 0; s < strip.value; s++) total[s] = squares[s] = V{}, middle[s] = SQUARE && from ? load(from + c + s * LANES) : V{};
        for (int64_t i = 0; i < n; i++)
            for (int s = 0; s < strip.value; s++) {
                V x = load(rows[i] + c + s * LANES), off = x - middle[s];
                total[s] += x;
                if (SQUARE) fma(squares[s], off, off);
            }
        for (int s = 0; s < strip.value; s++) {
            store(sum + c + s * LANES, total[s]);
            if (SQUARE) store(square + c + s * LANES, squares[s]);
        }
    });
}

// A score and its place as one number that grows with the score and falls with the place; NaN counts as the largest, as in torch.topk.
static inline uint64_t ranked(float score, int64_t place) {
    uint32_t bits;
    score += 0.f;  // the two zeros are one
    __builtin_memcpy(&bits, &score, 4);
    bits = score != score ? ~uint32_t(0) : bits >> 31 ? ~bits : bits | 0x80000000u;
    return uint64_t(bits) << 32 | (~uint32_t(0) - uint32_t(place));
}

// The `top` largest of n scores, ties to the lower index, written in ascending order; `order`: space for n.
static inline void best(int32_t* out, const float* score, uint64_t* order, int64_t n, int64_t top) {
    for (int64_t j = 0; j < n; j++) order[j] = ranked(score[j], j);
    if (top < n / 8)  // a heap of the few best turns most others away at once
        std::partial_sort(order, order + top, order + n, std::greater<uint64_t>());
    else if (top < n)
        std::nth_element(order, order + top, order + n, std::greater<uint64_t>());
    for (int64_t j = 0; j < top; j++) out[j] = int32_t(~uint32_t(0) - uint32_t(order[j]));
    std::sort(out, out + top);
}

// One thread's space for a choice.
struct ChoiceSpace {
    Array<float> panel, sum, square, score;  // [width, padded], [padded] each, [ROWS, columns]
    Array<uint64_t> order;
    ChoiceSpace(int64_t width, int64_t padded, int64_t columns)
        : panel(width * padded), sum(padded), square(padded), score(ROWS * columns), order(columns) {}
};

// One choice, head by head: the means of blocks and, where there are values, what joins the scores of key blocks by the error that a
// pooled key in their place would leave (method/parts/scores.py).
struct Choice {
    static constexpr int64_t GROUPS = 16;  // of query blocks, whose sums of squares are added up in one order whatever the threads
    const Selection& s;
    const int64_t d, padded, columns, rows, group;
    const bool by_error;
    Array<float> q_mean, k_mean_t, bias;  // [rows, padded], [padded, columns], [columns]
    Array<float> sums, second;            // [GROUPS, padded]: Σ q² of a group's queries; [padded]: E[q²]

    explicit Choice(const Selection& s)
        : s(s), d(s.channels), padded(round_up(d, LANES)), columns(round_up(s.k_blocks, LANES)), rows(round_up(s.q_blocks, ROWS)),
          group((s.q_blocks + GROUPS - 1) / GROUPS), by_error(s.v.data), q_mean(rows * padded), k_mean_t(padded * columns), bias(columns),
          sums(GROUPS * padded), second(padded) {}

    // The rows of a block in whole vectors; `panel`: space where they do not lie so.
    Lines read(float* panel, const Rows& x, int64_t bh, const int32_t* starts, const int32_t* places, int64_t i) const {
        int64_t b = bh / s.heads, h = bh % s.heads, first = starts[i], count = starts[i + 1] - first;
        if (!x.bf16 && !places && d == padded) return {static_cast<const float*>(x.data) + b * x.batch + h * x.head + first * x.row, x.row};
        read_rows(panel, padded, x, b, h, places ? Run{0, -1, count, places + first} : Run{first, -1, count}, d, 1.f);
        return {panel, padded};
    }

    void add_queries(ChoiceSpace& space, int64_t bh, int64_t number) {
        float* sum = sums + number * padded;
        std::fill_n(sum, padded, 0.f);
        for (int64_t i = number * group; i < std::min((number + 1) * group, s.q_blocks); i++) {
            int64_t n = s.q_starts[i + 1] - s.q_starts[i];
            const Lines q = read(space.panel, s.q, bh, s.q_starts, s.places_q, i);
            if (by_error)
                block_sums<true>(space.sum, space.square, q, n, padded, nullptr);
            else
                block_sums<false>(space.sum, nullptr, q, n, padded, nullptr);
            for (int64_t c = 0; c < padded; c++) q_mean[i * padded + c] = space.sum[c] / float(n), sum[c] += space.square[c];
        }
    }

    void finish_queries() {
        const float tokens = float(s.q_starts[s.q_blocks]);
        for (int64_t c = 0; c < padded; c++) {
            float sum = 0;
            for (int64_t g = 0; g < GROUPS; g++) sum += sums[g * padded + c];
            second[c] = sum / tokens;
        }
    }

    // The sum of weight[c] times the variance of the rows, whose sum and squares around `from` the space holds; null: 1.
    float spread(const ChoiceSpace& space, const float* from, int64_t n, const float* weight) const {
        V sum{};
        for (int64_t c = 0; c < padded; c += LANES) {
            V off = load(space.sum + c) / float(n) - load(from + c), variance = max(load(space.square + c) / float(n) - off * off, V{});
            sum += weight ? load(weight + c) * variance : variance;
        }
        return horizontal_sum(sum);
    }

    void key_block(ChoiceSpace& space, int64_t bh, int64_t j) {
        const float tiny = 1.17549435e-38f;
        int64_t n = s.k_starts[j + 1] - s.k_starts[j];
        const Lines k = read(space.panel, s.k, bh, s.k_starts, s.places_k, j);
        if (by_error)
            block_sums<true>(space.sum, space.square, k, n, padded, k[0]);
        else
            block_sums<false>(space.sum, nullptr, k, n, padded, nullptr);
        for (int64_t c = 0; c < d; c++) k_mean_t[c * columns + j] = space.sum[c] / float(n);
        if (!by_error) return;
        float sigma2 = s.scale * s.scale * spread(space, k[0], n, second);
        const Lines v = read(space.panel, s.v, bh, s.k_starts, s.places_k, j);
        block_sums<true>(space.sum, space.square, v, n, padded, v[0]);
        float flat = spread(space, v[0], n, nullptr);
        bias[j] = (std::log(float(n)) + std::min(sigma2 / 2, s.score_cap) + std::log(std::max(sigma2, tiny)) + std::log(std::max(flat, tiny)) / 2) / s.scale;
    }

    void choose(ChoiceSpace& space, int64_t bh, int64_t number) const {  // of ROWS query blocks
        product(space.score, columns, q_mean + number * ROWS * padded, padded, k_mean_t, columns, d, columns, nullptr);
        const float* given = by_error ? static_cast<const float*>(bias) : s.bias ? s.bias + bh * s.k_blocks : nullptr;
        for (int64_t r = 0; r < ROWS && number * ROWS + r < s.q_blocks; r++) {
            float* score = space.score + r * columns;
            for (int64_t j = 0; j < s.k_blocks && s.weight; j++) score[j] *= s.weight[j];
            for (int64_t j = 0; j < s.k_blocks && given; j++) score[j] += given[j];
            best(s.chosen + (bh * s.q_blocks + number * ROWS + r) * s.top, score, space.order, s.k_blocks, s.top);
        }
    }
};

void select_blocks(const Selection& s) {
    Choice choice(s);
    Team team(s.threads);
    std::vector<std::unique_ptr<ChoiceSpace>> spaces;
    for (int t = 0; t < team.size(); t++) spaces.push_back(std::make_unique<ChoiceSpace>(std::max(s.q_width, s.k_width), choice.padded, choice.columns));
    team.run([&](int thread) {
        ChoiceSpace& space = *spaces[size_t(thread)];
        for (int64_t bh = 0; bh < s.batch * s.heads; bh++) {
            team.share(Choice::GROUPS, [&](int64_t number) { choice.add_queries(space, bh, number); });
            if (choice.by_error) team.share(1, [&](int64_t) { choice.finish_queries(); });
            team.share(s.k_blocks, [&](int64_t j) { choice.key_block(space, bh, j); });
            team.share(choice.rows / ROWS, [&](int64_t number) { choice.choose(space, bh, number); });
        }
    });
}
