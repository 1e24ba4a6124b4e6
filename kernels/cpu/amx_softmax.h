// Online softmax of one query block over tiled blocks of keys, in base 2, with up to two tiles of queries at a time.

struct TiledSoftmax {
    const Geometry& g;
    const TileSizes sizes;
    float *const top, *const mass;  // of each query, as in Softmax; `top` may lie below the maximum, by SLACK at most
    Array<int32_t> queries;         // [query tiles, depth], pairs of channels
    Array<float> out;               // [query tiles, channels, queries of a tile]
    Array<float> score;             // [2, CHUNK, queries of a tile]
    Array<int32_t> weights;         // [2, steps of CHUNK], pairs of keys
    Array<uint16_t> seen;           // [2, CHUNK]
    static constexpr float SLACK = 8;  // what a maximum may rise before sums are scaled to it: a weight is at most 2^SLACK

    TiledSoftmax(const Geometry& g, float* top, float* mass)
        : g(g), sizes(g), top(top), mass(mass), queries(g.width / SIDE * sizes.depth * TILE), out(g.width * g.padded), score(2 * CHUNK * SIDE),
          weights(2 * CHUNK / PAIR * TILE), seen(2 * CHUNK) {}

    // Start with a query block's rows.
    void start(int64_t bh, const Run& run) {
        sizes.pairs(queries, HalfRows(g, g.p.q, bh, run, nullptr));
        __builtin_memset(out, 0, round_up(run.count, SIDE) * g.padded * 4);
    }

    // Add a block's keys, which join their logits with `bias` where that is not null.
    void visit(int64_t rows, const TiledBlock& b, int64_t keys, const float* bias) {
        V scale = all(g.p.scale * LOG2E);
        if (bias)
            chunks(rows, b, keys, [&](int64_t from) { return [=](int64_t, int64_t k, V x) __attribute__((always_inline)) { return x * scale + bias[from + k]; }; });
        else
            chunks(rows, b, keys, [&](int64_t) { return [=](int64_t, int64_t, V x) __attribute__((always_inline)) { return x * scale; }; });
    }

    template <class Edits>
    void chunks(int64_t rows, const TiledBlock& b, int64_t keys, Edits&& edits) {
        for (int64_t k = 0; k < keys; k += CHUNK)
            for (int64_t t = 0; t * SIDE < rows; t += 2) add(t, (t + 1) * SIDE < rows, b, k, 0, std::min(CHUNK, keys - k), edits(k));
    }

    // The same for keys that a mask decides: pairs of tiles of keys that none of the queries keeps are left out.
    template <class Mask>
    void visit_masked(int64_t rows, const TiledBlock& b, int64_t keys, const Mask& mask) {
        V scale = all(g.p.scale * LOG2E);
        auto edit = [&](int64_t i, int64_t k, V x) __attribute__((always_inline)) {
            return V(_mm512_mask_mul_ps(__m512(all(-INFINITY)), seen[i * CHUNK + k], __m512(x), __m512(scale)));
        };
        for (int64_t from = 0; from < keys; from += CHUNK)
            for (int64_t t = 0; t * SIDE < rows; t += 2) {
                bool two = (t + 1) * SIDE < rows;
                Seen kept(seen, mask, t, two, from, std::min(CHUNK, keys - from));
                if (kept.last) add(t, two, b, from, kept.first, kept.last, edit);
            }
    }

    // Keys [from + first, from + last) of a block for one or two tiles of queries; from and first are multiples of PAIR, and edit(tile of the two, key of the
    // chunk, products) gives logits.
    template <class Edit>
    void add(int64_t t, bool two, const TiledBlock& b, int64_t from, int64_t first, int64_t last, Edit&& edit) {
        if (two)
            add_tiles<2>(t, b, from, first, last, edit);
        else
            add_tiles<1>(t, b, from, first, last, edit);
    }

    template <int N, class Edit>
    void add_tiles(int64_t t, const TiledBlock& b, int64_t from, int64_t first, int64_t last, Edit& edit) {
        const TileGrid<const int32_t> q{queries + t * sizes.depth * TILE, sizes.depth * TILE};
        for (int64_t k = first; k < last; k += PAIR) {
            TileGrid<float> scores{score + k * SIDE, TILE};
            TileGrid<const int32_t> keys{b.keys + (from + k) / SIDE * sizes.depth * TILE, sizes.depth * TILE};
            if (k + SIDE < last)
                multiply<2, N, false>(scores, CHUNK * SIDE, keys, q, sizes.depth);
            else
                multiply<1, N, false>(scores, CHUNK * SIDE, keys, q, sizes.depth);
        }
        float* sums = out + t * SIDE * g.padded;
        for (int i = 0; i < N; i++) soften(t + i, i, first, last, sums + i * SIDE * g.padded, edit);
        int64_t depth = (last - first + PAIR - 1) / PAIR, c = 0;
        const TileGrid<const int32_t> w{weights + first / PAIR * TILE, CHUNK / PAIR * TILE};
        const int32_t* values = b.values + (from + first) / PAIR * TILE;
        int64_t row = b.steps * TILE;
        for (; c + 2 <= sizes.channel_tiles; c += 2) multiply<2, N, true>({sums + c * TILE, TILE}, SIDE * g.padded, {values + c * row, row}, w, depth);
        if (c < sizes.channel_tiles) multiply<1, N, true>({sums + c * TILE, TILE}, SIDE * g.padded, {values + c * row, row}, w, depth);
    }

    // Scores [first, last) of tile t, the i-th of two, become weights; `sums` are its outputs so far.
    template <class Edit>
    void soften(int64_t t, int64_t i, int64_t first, int64_t last, float* sums, Edit& edit) {
        const float* scores = score + i * CHUNK * SIDE;
        V best = all(NEVER), other = best, highest = load(top + t * SIDE), sum{}, second{};
        int64_t k = first;
        for (; k + 2 <= last; k += 2) {
            best = max(best, edit(i, k, load(scores + k * SIDE)));
            other = max(other, edit(i, k + 1, load(scores + (k + 1) * SIDE)));
        }
        if (k < last) best = max(best, edit(i, k, load(scores + k * SIDE)));
        highest = raise(t, highest, max(best, other), sums);
        int32_t* to = weights + i * CHUNK / PAIR * TILE;
        auto weight = [&](int64_t n) __attribute__((always_inline)) { return rough_exp2(edit(i, n, load(scores + n * SIDE)) - highest); };
        for (k = first; k + 2 <= last; k += 2) {
            V even = weight(k), odd = weight(k + 1);
            sum += even, second += odd;
            _mm512_store_si512(to + k / 2 * SIDE, paired(even, odd));
        }
        if (k < last) {
            V even = weight(k);
            sum += even;
            _mm512_store_si512(to + k / 2 * SIDE, paired(even, V{}));
            k += 2;
        }
        for (; k < round_up(last, PAIR); k += 2) _mm512_store_si512(to + k / 2 * SIDE, _mm512_setzero_si512());
        store(mass + t * SIDE, load(mass + t * SIDE) + (sum + second));
    }

    // The maxima that tile t's weights are taken from: those so far, raised where the new ones exceed them by more than SLACK.
    V raise(int64_t t, V highest, V best, float* sums) {
        __mmask16 up = _mm512_cmp_ps_mask(__m512(best), __m512(highest + SLACK), _CMP_GT_OQ);
        if (!up) return highest;
        V next = V(_mm512_mask_mov_ps(__m512(highest), up, __m512(best))), factor = rough_exp2(highest - next);
        store(top + t * SIDE, next), store(mass + t * SIDE, load(mass + t * SIDE) * factor);
        for (int64_t c = 0; c < g.padded; c++) store(sums + c * SIDE, load(sums + c * SIDE) * factor);
        return next;
    }

    // Outputs so far as rows [queries, padded].
    void rows(float* to, int64_t count) const { rows_of_sums(g, to, out, count, 1.f); }
};
