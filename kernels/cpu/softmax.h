// Online softmax of one query block over key panels, in base 2.

struct Softmax {
    const Geometry& g;
    const int64_t width;                    // of a row of scores
    Array<float> q, acc, top, mass, score;  // panel of scaled queries; output so far, row maximum, row sum; ROWS rows of scores
#if BF16_DOTS
    Array<Entry> q_pairs, weight_pairs;     // queries as they came, and weights, where the keys are bfloat16
#endif

    Softmax(const Geometry& g, bool pairs)
        : g(g), width(std::max<int64_t>(g.width, SPAN * POOL)), q(g.rows() * g.padded), acc(g.rows() * g.padded), top(g.rows() + 16),
          mass(g.rows() + 16), score(ROWS * width) {
        static_cast<void>(pairs);
#if BF16_DOTS
        if (pairs) q_pairs.allocate(g.rows() * g.channels / BF16_DOTS), weight_pairs.allocate(ROWS * width / BF16_DOTS);
#endif
    }

    void start() {
        __builtin_memset(acc, 0, g.rows() * g.padded * 4);
        for (int64_t r = 0; r < g.rows(); r++) top[r] = NEVER, mass[r] = 0;
    }

    // Logits of ROWS rows against a strip of keys.
    template <int N>
    void logits(V (&x)[ROWS][N], int64_t r0, const Block<float>& b, int64_t c) const {
        for (int r = 0; r < ROWS; r++)
            for (int s = 0; s < N; s++) x[r][s] = V{};
        tile<N>(x, q + r0 * g.padded, g.padded, b.columns + c, b.columns_ld, g.channels);
    }

    // Add `keys` keys. edit(row, column, logits) changes logits.
    template <class E, class Edit>
    void visit(int64_t queries, const Block<E>& b, int64_t keys, Edit&& edit) {
        for (int64_t r0 = 0; r0 < queries; r0 += ROWS) visit_rows(r0, b, keys, edit);
    }

    template <class E, class Edit>
    void visit_rows(int64_t r0, const Block<E>& b, int64_t keys, Edit& edit) {
        V best[ROWS];
        for (int r = 0; r < ROWS; r++) best[r] = all(NEVER);
        for_strips(round_up(keys, LANES), [&](int64_t c, auto strip) __attribute__((always_inline)) {
            V x[ROWS][strip.value];
            logits<strip.value>(x, r0, b, c);
            for (int r = 0; r < ROWS; r++)
                for (int s = 0; s < strip.value; s++) {
                    int64_t at = c + s * LANES;
                    V logits = edit(r0 + r, at, x[r][s]);
                    if (at + LANES > keys) logits = select(LANE < all(int32_t(keys - at)), logits, all(-INFINITY));
                    best[r] = max(best[r], logits);
                    store(score + r * width + at, logits);
                }
        });
        absorb(r0, b, 0, keys, best);
    }

    // The same for keys that a mask decides: vectors of keys that none of the rows keeps cost little.
    template <class E, class Mask>
    void visit_masked(int64_t queries, int64_t keys, const Block<E>& b, const Mask& mask) {
        for (int64_t r0 = 0; r0 < queries; r0 += ROWS) {
            V best[ROWS];
            for (int r = 0; r < ROWS; r++) best[r] = all(NEVER);
            int64_t first = keys, last = 0;
            for_strips(round_up(keys, LANES), [&](int64_t c, auto strip) __attribute__((always_inline)) {
                I kept[ROWS][strip.value];
                uint32_t live = mask(kept, r0, c);
                if (live) first = std::min(first, c + __builtin_ctz(live) * LANES), last = std::min(c + (32 - __builtin_clz(live)) * LANES, keys);
                auto some = [&](int from, auto count) __attribute__((always_inline)) {
                    V x[ROWS][count.value];
                    logits<count.value>(x, r0, b, c + from * LANES);
                    for (int r = 0; r < ROWS; r++)
                        for (int s = 0; s < count.value; s++) {
                            V logits = select(kept[r][from + s], x[r][s], all(-INFINITY));
                            best[r] = max(best[r], logits);
                            store(score + r * width + c + (from + s) * LANES, logits);
                        }
                };
                auto none = [&](int s) __attribute__((always_inline)) {
                    for (int r = 0; r < ROWS; r++) store(score + r * width + c + s * LANES, all(-INFINITY));
                };
                for_live<strip.value>(live, some, none);
            });
            if (last) absorb(r0, b, first, last, best);
        }
    }

    // Scores [first, last) of ROWS rows become weights, and their values join the output.
    template <class E>
    void absorb(int64_t r0, const Block<E>& b, int64_t first, int64_t last, const V (&best)[ROWS]) {
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
                V weight = exp2(load(score + r * width + c) - highest);
                sum += weight;
                keep_weights(b, r * width + c, weight);
            }
            mass[r0 + r] = mass[r0 + r] * factor[r] + horizontal_sum(sum);
        }
        add_values(r0, b, first, last, factor);
    }

    void keep_weights(const Block<float>&, int64_t at, V weight) { store(score + at, weight); }
    void add_values(int64_t r0, const Block<float>& b, int64_t first, int64_t last, const float* factor) {
        product(acc + r0 * g.padded, g.padded, score + first, width, b.rows + first * b.rows_ld, b.rows_ld, last - first, g.padded, factor);
    }

#if BF16_DOTS
    template <int N>
    void logits(V (&x)[ROWS][N], int64_t r0, const Block<Entry>& b, int64_t c) const {
        const int64_t depth = g.channels / BF16_DOTS;
        for (int r = 0; r < ROWS; r++)
            for (int s = 0; s < N; s++) x[r][s] = V{};
        tile<N>(x, q_pairs + r0 * depth, depth, b.columns + c, b.columns_ld, depth);
        V factor = all(g.p.scale * LOG2E);
        for (int r = 0; r < ROWS; r++)
            for (int s = 0; s < N; s++) x[r][s] *= factor;
    }
    void keep_weights(const Block<Entry>&, int64_t at, V weight) { store_narrow(reinterpret_cast<uint16_t*>(static_cast<Entry*>(weight_pairs)) + at, weight); }
    void add_values(int64_t r0, const Block<Entry>& b, int64_t first, int64_t last, const float* factor) {
        const Entry *weights = weight_pairs + first / BF16_DOTS, *rows = b.rows + first / BF16_DOTS * b.rows_ld;
        const int64_t depth = (last - first + BF16_DOTS - 1) / BF16_DOTS;
        product_of(acc + r0 * g.padded, g.padded, weights, width / BF16_DOTS, rows, b.rows_ld, depth, g.padded, factor);
    }
#endif

    // Normalise; `lse2` gets the base-2 logarithm of each row's mass.
    void finish(int64_t queries, double* lse2) {
        for (int64_t r = 0; r < queries; r++) {
            V inverse = all(1.f / mass[r]);
            for (int64_t c = 0; c < g.padded; c += LANES) store(acc + r * g.padded + c, load(acc + r * g.padded + c) * inverse);
            lse2[r] = double(top[r]) + std::log2(double(mass[r]));
        }
    }
};
