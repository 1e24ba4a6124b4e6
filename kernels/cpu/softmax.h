// Online softmax of one query block over key panels, in base 2.

struct Softmax {
    const Geometry& g;
    Array<float> q, acc, top, mass, score;  // panel of scaled queries; output so far, row maximum, row sum; ROWS rows of scores

    explicit Softmax(const Geometry& g)
        : g(g), q(g.rows() * g.padded), acc(g.rows() * g.padded), top(g.rows() + 16), mass(g.rows() + 16), score(ROWS * std::max<int64_t>(g.width, POOL)) {}

    void start() {
        __builtin_memset(acc, 0, g.rows() * g.padded * 4);
        for (int64_t r = 0; r < g.rows(); r++) top[r] = NEVER, mass[r] = 0;
    }

    // Add `keys` keys: columns [channels, ld] (transposed keys) and rows [keys, padded] (values). edit(row, column, logits) changes logits.
    template <class Edit>
    void visit(int64_t queries, const float* columns, int64_t ld, const float* rows, int64_t keys, Edit&& edit) {
        for (int64_t r0 = 0; r0 < queries; r0 += ROWS) visit_rows(r0, columns, ld, rows, keys, edit);
    }

    template <class Edit>
    void visit_rows(int64_t r0, const float* columns, int64_t ld, const float* rows, int64_t keys, Edit& edit) {
        V best[ROWS];
        for (int r = 0; r < ROWS; r++) best[r] = all(NEVER);
        for_strips(round_up(keys, LANES), [&](int64_t c, auto strip) __attribute__((always_inline)) {
            V x[ROWS][strip.value];
            for (int r = 0; r < ROWS; r++)
                for (int s = 0; s < strip.value; s++) x[r][s] = V{};
            tile<strip.value>(x, q + r0 * g.padded, g.padded, columns + c, ld, g.channels);
            for (int r = 0; r < ROWS; r++)
                for (int s = 0; s < strip.value; s++) {
                    int64_t at = c + s * LANES;
                    V logits = edit(r0 + r, at, x[r][s]);
                    if (at + LANES > keys) logits = select(LANE < all(int32_t(keys - at)), logits, all(-INFINITY));
                    best[r] = max(best[r], logits);
                    store(score + r * ld + at, logits);
                }
        });
        absorb(r0, ld, rows, 0, keys, best);
    }

    // The same for keys that the mask decides: strips of keys that none of the rows keeps cost nothing.
    void visit_masked(const Run& queries, const Run& keys, const float* columns, int64_t ld, const float* rows, const Mask& mask) {
        for (int64_t r0 = 0; r0 < queries.count; r0 += ROWS) {
            V best[ROWS];
            for (int r = 0; r < ROWS; r++) best[r] = all(NEVER);
            int64_t first = keys.count, last = 0;
            for_strips(round_up(keys.count, LANES), [&](int64_t c, auto strip) __attribute__((always_inline)) {
                I kept[ROWS][strip.value];
                bool live = mask.strip<strip.value>(kept, queries.image + r0, keys.image + c, keys.image + keys.count, true);
                V x[ROWS][strip.value];
                for (int r = 0; r < ROWS; r++)
                    for (int s = 0; s < strip.value; s++) x[r][s] = V{};
                if (live) {
                    tile<strip.value>(x, q + r0 * g.padded, g.padded, columns + c, ld, g.channels);
                    first = std::min(first, c), last = std::min(c + strip.value * LANES, keys.count);
                }
                for (int r = 0; r < ROWS; r++)
                    for (int s = 0; s < strip.value; s++) {
                        V logits = select(kept[r][s], x[r][s], all(-INFINITY));
                        best[r] = max(best[r], logits);
                        store(score + r * ld + c + s * LANES, logits);
                    }
            });
            if (last) absorb(r0, ld, rows, first, last, best);
        }
    }

    // Scores [first, last) of ROWS rows become weights, and their values join the output.
    void absorb(int64_t r0, int64_t ld, const float* rows, int64_t first, int64_t last, const V (&best)[ROWS]) {
        alignas(64) float factor[16];
        for (int r = 0; r < ROWS; r++) {
            float higher = std::max(top[r0 + r], horizontal_max(best[r]));
            factor[r] = top[r0 + r] - higher;
            top[r0 + r] = higher;
        }
        for (int r = 0; r < ROWS; r += LANES) store(factor + r, exp2(load(factor + r)));
        for (int r = 0; r < ROWS; r++) {
            V sum{}, highest = all(top[r0 + r]);
            for (int64_t c = first; c < last; c += LANES) {
                V weight = exp2(load(score + r * ld + c) - highest);
                sum += weight;
                store(score + r * ld + c, weight);
            }
            mass[r0 + r] = mass[r0 + r] * factor[r] + horizontal_sum(sum);
        }
        product(acc + r0 * g.padded, g.padded, score + first, ld, rows + first * g.padded, g.padded, last - first, g.padded, factor);
    }

    // Normalise; `lse2` gets the base-2 logarithm of each row's mass.
    void finish(int64_t queries, double* lse2) {
        for (int64_t r = 0; r < queries; r++) {
            V inverse = all(1.f / mass[r]);
            for (int64_t c = 0; c < g.padded; c += LANES) store(acc + r * g.padded + c, load(acc + r * g.padded + c) * inverse);
            lse2[r] = double(top[r]) + std::log2(double(mass[r]));
        }
    }
};
