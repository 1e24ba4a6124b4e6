// Online softmax of one query block over key panels, in base 2.

// Logits as they are.
struct Plain {
    static constexpr bool plain = true;
    inline __attribute__((always_inline)) V operator()(int64_t, int64_t, V x) const { return x; }
};

struct Softmax {
    const Geometry& g;
    const int64_t width;                    // of a row of scores
    // panel of scaled queries; output so far, what each row's weights are relative to, row sum; ROWS rows of scores. `top` may lie below the row's maximum, by
    // SLACK at most
    Array<float> q, acc, top, mass, score;
    Array<float> sums;                      // [rows, LANES], what joins `mass` in `settle`
#if BF16_DOTS
    Array<Entry> q_pairs, weight_pairs;     // queries as they came, and weights, where the keys are bfloat16
#endif
    static constexpr float SLACK = 8;       // what maxima may rise before sums are scaled to them: a weight is at most 2^SLACK

    Softmax(const Geometry& g, bool pairs)
        : g(g), width(std::max<int64_t>(g.width, SPAN * POOL)), q(g.rows() * g.padded), acc(g.rows() * g.padded), top(g.rows() + 16),
          mass(g.rows() + 16), score(ROWS * width), sums(g.rows() * LANES) {
        static_cast<void>(pairs);
#if BF16_DOTS
        if (pairs) q_pairs.allocate(g.rows() * g.channels / BF16_DOTS), weight_pairs.allocate(ROWS * width / BF16_DOTS);
#endif
    }

    void start() {
        __builtin_memset(acc, 0, g.rows() * g.padded * 4);
        __builtin_memset(sums, 0, g.rows() * LANES * 4);
        for (int64_t r = 0; r < g.rows(); r++) top[r] = NEVER, mass[r] = 0;
    }

    // Products of ROWS rows and a strip of keys, to the scores from column `to` on. They are logits once they are multiplied by `unit`.
    template <int N>
    void logits(int64_t r0, const Block<float>& b, int64_t c, int64_t to) {
        tile<N, ZERO>(score + to, width, q + r0 * g.padded, g.padded, b.columns + c, b.columns_ld, g.channels);
    }
    static float unit(const Block<float>&) { return 1.f; }
    static V in_units(const Block<float>&, V x, V) { return x; }

    // Add `keys` keys. edit(row, column, logits) changes logits.
    template <class E, class Edit>
    void visit(int64_t queries, const Block<E>& b, int64_t keys, Edit&& edit) {
        for (int64_t r0 = 0; r0 < queries; r0 += ROWS) visit_rows(r0, b, keys, edit);
    }

    template <class E, class Edit>
    void visit_rows(int64_t r0, const Block<E>& b, int64_t keys, Edit& edit) {
        constexpr bool plain = std::is_same<std::decay_t<Edit>, Plain>::value;
        const V by = all(unit(b));
        const bool as_they_are = plain && keys % LANES == 0;  // scores stay products
        V best[ROWS];
        for (int r = 0; r < ROWS; r++) best[r] = all(NEVER);
        for_strips(round_up(keys, LANES), [&](int64_t c, auto strip) __attribute__((always_inline)) {
            logits<strip.value>(r0, b, c, c);
            for (int r = 0; r < ROWS; r++)
                for (int s = 0; s < strip.value; s++) {
                    int64_t at = c + s * LANES;
                    V logits = edit(r0 + r, at, in_units(b, load(score + r * width + at), by));
                    if (at + LANES > keys) logits = select(LANE < all(int32_t(keys - at)), logits, all(-INFINITY));
                    best[r] = max(best[r], logits);
                    if (!as_they_are) store(score + r * width + at, logits);
                }
        });
        if (as_they_are)
            absorb(r0, b, 0, keys, best, unit(b));
        else
            absorb(r0, b, 0, keys, best, 1.f);
    }

    // The same for keys that a mask decides: vectors of keys that none of the rows keeps cost little.
    template <class E, class Mask>
    void visit_masked(int64_t queries, int64_t keys, const Block<E>& b, const Mask& mask) {
        const V by = all(unit(b));
        for (int64_t r0 = 0; r0 < queries; r0 += ROWS) {
            V best[ROWS];
            for (int r = 0; r < ROWS; r++) best[r] = all(NEVER);
            int64_t first = keys, last = 0;
            for_strips(round_up(keys, LANES), [&](int64_t c, auto strip) __attribute__((always_inline)) {
                I kept[ROWS][strip.value];
                uint32_t live = mask(kept, r0, c);
                if (live) first = std::min(first, c + __builtin_ctz(live) * LANES), last = std::min(c + (32 - __builtin_clz(live)) * LANES, keys);
                auto some = [&](int from, auto count) __attribute__((always_inline)) {
                    logits<count.value>(r0, b, c + from * LANES, c + from * LANES);
                    for (int r = 0; r < ROWS; r++)
                        for (int s = 0; s < count.value; s++) {
                            float* at = score + r * width + c + (from + s) * LANES;
                            V logits = select(kept[r][from + s], in_units(b, load(at), by), all(-INFINITY));
                            best[r] = max(best[r], logits);
                            store(at, logits);
                        }
                };
                auto none = [&](int s) __attribute__((always_inline)) {
                    for (int r = 0; r < ROWS; r++) store(score + r * width + c + s * LANES, all(-INFINITY));
                };
                for_live<strip.value>(live, some, none);
            });
            if (last) absorb(r0, b, first, last, best, 1.f);
        }
    }

    // Scores [first, last) of ROWS rows, times `by`, become weights, and their values join the output.
    template <class E>
    void absorb(int64_t r0, const Block<E>& b, int64_t first, int64_t last, const V (&best)[ROWS], float by) {
        alignas(64) float factor[16];
        const bool raised = raise(factor, r0, best);
        const V unit = all(by);
        for (int r = 0; r < ROWS; r++) {
            float* so_far = sums + (r0 + r) * LANES;
            V sum = load(so_far), highest = all(top[r0 + r]);
            if (raised) sum *= factor[r];
            for (int64_t c = first; c < last; c += LANES) {
                V weight = exp2(in_units(b, load(score + r * width + c), unit) - highest);
                sum += weight;
                keep_weights(b, r * width + c, weight);
            }
            store(so_far, sum);
        }
        add_values(r0, b, first, last, raised ? factor : ONES);
    }

    // Raises `top` of those of ROWS rows whose maxima exceed it by more than SLACK. True where there is one: then sums so far are to be multiplied by `factor`,
    // which is 1 for the others, so that no row depends on another.
    bool raise(float* factor, int64_t r0, const V (&best)[ROWS]) {
        V excess{};
        for (int r = 0; r < ROWS; r++) excess = max(best[r] - top[r0 + r], excess);  // in this order a NaN hides no other row's
        if (!(horizontal_max(excess) > SLACK)) return false;
        for (int r = 0; r < ROWS; r++) {
            float highest = horizontal_max(best[r]), higher = highest > top[r0 + r] + SLACK ? highest : top[r0 + r];
            factor[r] = top[r0 + r] - higher;
            top[r0 + r] = higher;
        }
        for (int r = 0; r < ROWS; r += LANES) store(factor + r, exp2(load(factor + r)));
        for (int r = 0; r < ROWS; r++) mass[r0 + r] *= factor[r];
        return true;
    }

    void keep_weights(const Block<float>&, int64_t at, V weight) { store(score + at, weight); }
    void add_values(int64_t r0, const Block<float>& b, int64_t first, int64_t last, const float* factor) {
        product(acc + r0 * g.padded, g.padded, score + first, width, b.rows + first * b.rows_ld, b.rows_ld, last - first, g.padded, factor);
    }

#if BF16_DOTS
    template <int N>
    void logits(int64_t r0, const Block<Entry>& b, int64_t c, int64_t to) {
        const int64_t depth = g.channels / BF16_DOTS;
        tile<N, ZERO>(score + to, width, q_pairs + r0 * depth, depth, b.columns + c, b.columns_ld, depth);
    }
    float unit(const Block<Entry>&) const { return g.p.scale * LOG2E; }
    static V in_units(const Block<Entry>&, V x, V unit) { return x * unit; }
    void keep_weights(const Block<Entry>&, int64_t at, V weight) { store_narrow(reinterpret_cast<uint16_t*>(static_cast<Entry*>(weight_pairs)) + at, weight); }
    void add_values(int64_t r0, const Block<Entry>& b, int64_t first, int64_t last, const float* factor) {
        const Entry *weights = weight_pairs + first / BF16_DOTS, *rows = b.rows + first / BF16_DOTS * b.rows_ld;
        const int64_t depth = (last - first + BF16_DOTS - 1) / BF16_DOTS;
        product_of(acc + r0 * g.padded, g.padded, weights, width / BF16_DOTS, rows, b.rows_ld, depth, g.padded, factor);
    }
#endif

    // `mass` becomes the rows' sums so far.
    void settle(int64_t queries) {
        for (int64_t r = 0; r < queries; r++) mass[r] += horizontal_sum(load(sums + r * LANES));
        std::fill_n(static_cast<float*>(sums), queries * LANES, 0.f);
    }

    // Normalise; `lse2` gets the base-2 logarithm of each row's mass.
    void finish(int64_t queries, double* lse2) {
        settle(queries);
        for (int64_t r = 0; r < queries; r++) {
            V inverse = all(1.f / mass[r]);
            for (int64_t c = 0; c < g.padded; c += LANES) store(acc + r * g.padded + c, load(acc + r * g.padded + c) * inverse);
            lse2[r] = double(top[r]) + std::log2(double(mass[r]));
        }
    }
};
