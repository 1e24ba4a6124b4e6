// Pooled scores and their best key blocks, for each query block.

static inline void block_mean(float* out, const Rows& x, int64_t bh, int64_t heads, const Run& run, int64_t channels, float* row) {
    for (int64_t d = 0; d < channels; d++) out[d] = 0;
    for (int64_t i = 0; i < run.count; i++) {
        read_rows(row, channels, x, bh / heads, bh % heads, {run.at(i), -1, 1}, channels, 1.f);
        for (int64_t d = 0; d < channels; d++) out[d] += row[d];
    }
    for (int64_t d = 0; d < channels; d++) out[d] /= float(run.count);
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
    if (top < n) std::nth_element(order, order + top, order + n, std::greater<uint64_t>());
    for (int64_t j = 0; j < top; j++) out[j] = int32_t(~uint32_t(0) - uint32_t(order[j]));
    std::sort(out, out + top);
}

void select_blocks(const Selection& s) {
    const int64_t columns = round_up(s.k_blocks, LANES), rows = round_up(s.q_blocks, ROWS), d = s.channels;
    Array<float> q_mean(rows * d), k_mean_t(d * columns);
    auto run = [](const int32_t* starts, const int32_t* places, int64_t i) -> Run {
        int64_t count = starts[i + 1] - starts[i];
        if (places) return {0, -1, count, places + starts[i]};
        return {starts[i], -1, count};
    };
    Team team(s.threads);
    std::vector<Array<float>> scores, means;
    std::vector<Array<uint64_t>> orders;
    for (int t = 0; t < team.size(); t++) scores.emplace_back(ROWS * columns), means.emplace_back(2 * d), orders.emplace_back(s.k_blocks);
    team.run([&](int thread) {
        float *mean = means[size_t(thread)], *score = scores[size_t(thread)];
        for (int64_t bh = 0; bh < s.batch * s.heads; bh++) {
            team.share(s.k_blocks, [&](int64_t j) {
                block_mean(mean, s.k, bh, s.heads, run(s.k_starts, s.places_k, j), d, mean + d);
                for (int64_t c = 0; c < d; c++) k_mean_t[c * columns + j] = mean[c];
            });
            team.share(s.q_blocks, [&](int64_t i) {
                block_mean(q_mean + i * d, s.q, bh, s.heads, run(s.q_starts, s.places_q, i), d, mean);
            });
            team.share(rows / ROWS, [&](int64_t group) {
                product(score, columns, q_mean + group * ROWS * d, d, k_mean_t, columns, d, columns, nullptr);
                for (int64_t r = 0; r < ROWS && group * ROWS + r < s.q_blocks; r++) {
                    if (s.weight)
                        for (int64_t j = 0; j < s.k_blocks; j++) score[r * columns + j] *= s.weight[j];
                    if (s.bias)
                        for (int64_t j = 0; j < s.k_blocks; j++) score[r * columns + j] += s.bias[bh * s.k_blocks + j];
                    best(s.chosen + (bh * s.q_blocks + group * ROWS + r) * s.top, score + r * columns, orders[size_t(thread)], s.k_blocks, s.top);
                }
            });
        }
    });
}
