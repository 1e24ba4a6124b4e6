// The pooled rest: means and variances of key blocks, in chunks of POOL pooled keys, and their logits.
//   logit = s·q·k̄ + log n + c + min(s²/2 · Σ_d q_d² Var_d, cap), here times log2(e), with q scaled by s·log2(e)

struct Pool {
    enum Holds { BIASES, ROWS_TOO, COLUMNS_TOO };  // what the others need not is left out
    const Geometry& g;
    const bool given, seen;         // pooled keys come as arguments: `read` in place of `fill`; they are those that a query block sees
    const Holds holds;
    const int64_t parts;
    int64_t pools, chunks;
    Array<float> mean_t, var_t;     // [chunks, channels, POOL]; the variance is scaled to the logit's units
    Array<float> mean, var, value;  // [pools, padded], natural units
    Array<float> value_t;           // [chunks, channels, POOL], for the backward pass alone
    Array<float> log2_count;        // [chunks · POOL], -inf past the last pooled key; or the biases that are given
    Array<int32_t> position;        // [units], of those that are gathered: where a unit is among them, or -1
    Array<float> unit_t, unit_v;    // [units, channels, parts], of all units where query blocks see some alone: what `gather` takes as columns
    int64_t gathered = -1;          // the list

    Pool(const Geometry& g, bool backward, bool seen, Holds holds)
        : g(g), given(g.p.pools > 0), seen(seen), holds(holds), parts(g.parts()), pools(seen ? g.seen_pools() : g.pools()), chunks((pools + POOL - 1) / POOL),
          log2_count(chunks * POOL) {
        for (int64_t j = 0; j < chunks * POOL; j++) {
            int64_t n = !given && j < g.p.k_blocks ? g.p.k_starts[j + 1] - g.p.k_starts[j] : 0;
            log2_count[j] = n == 0 ? -INFINITY : g.p.log_count ? std::log2(float(n)) : 0.f;
        }
        if (holds == BIASES) return;
        mean.allocate((pools + ROWS) * g.padded), value.allocate((pools + ROWS) * g.padded);
        if (!given || g.p.variance) var.allocate((pools + ROWS) * g.padded);
        if (holds == ROWS_TOO) return;
        const bool by_unit = g.listed() && !seen;
        for (Array<float>* each : {by_unit ? &unit_t : &mean_t, backward ? by_unit ? &unit_v : &value_t : nullptr, var ? &var_t : nullptr})
            if (each) each->allocate(chunks * POOL * g.channels);
    }

    // The units on the list of query block i, from all of them. False where they are held already.
    bool gather(const Pool& all, int64_t bh, int64_t i) {
        int64_t list = bh * g.states() + g.state(i);
        if (list == gathered) return false;
        gathered = list;
        if (!position) position.allocate(g.units());
        std::fill_n(static_cast<int32_t*>(position), g.units(), -1);
        const int32_t* units = g.p.pool_lists + list * g.p.pool_width;
        int64_t count = g.p.pool_counts[list];
        pools = count * parts, chunks = (pools + POOL - 1) / POOL;
        for (int64_t n = 0; n < count; n++) {
            int64_t from = units[n] * parts, to = n * parts;
            position[units[n]] = int32_t(n);
            __builtin_memcpy(log2_count + to, all.log2_count + from, parts * 4);
            if (holds == BIASES) continue;
            put_columns<float>(mean_t, to, all.unit_t + from * g.channels, parts, g.channels);
            if (value_t) put_columns<float>(value_t, to, all.unit_v + from * g.channels, parts, g.channels), __builtin_memcpy(mean + to * g.padded, all.mean + from * g.padded, parts * g.padded * 4);
            __builtin_memcpy(value + to * g.padded, all.value + from * g.padded, parts * g.padded * 4);
        }
        std::fill(log2_count + pools, log2_count + chunks * POOL, -INFINITY);
        return true;
    }

    // The columns of a unit [depth, parts] from column t of all chunks on; those of one unit are in one chunk.
    template <class E>
    static void put_columns(E* to, int64_t t, const E* columns, int64_t parts, int64_t depth) {
        to += t / POOL * depth * POOL + t % POOL;
        if (parts == 4)  // a copy of known size: one store for each row
            for (int64_t i = 0; i < depth; i++) __builtin_memcpy(to + i * POOL, columns + i * 4, 4 * sizeof(E));
        else
            for (int64_t i = 0; i < depth; i++) __builtin_memcpy(to + i * POOL, columns + i * parts, parts * sizeof(E));
    }

    // The pooled keys of unit j, as they are given.
    void read(int64_t bh, int64_t j) {
        for (int64_t t = j * parts; t < (j + 1) * parts; t++) {
            int64_t at = bh * pools + t;
            log2_count[t] = g.p.pooled_bias[at] * LOG2E;
            if (holds == BIASES) continue;
            __builtin_memcpy(mean + t * g.padded, g.p.pooled_k + at * g.channels, g.channels * 4);
            __builtin_memcpy(value + t * g.padded, g.p.pooled_v + at * g.channels, g.channels * 4);
            if (var) __builtin_memcpy(var + t * g.padded, g.p.pooled_var + at * g.channels, g.channels * 4);
            if (holds == ROWS_TOO) continue;
            scatter(unit_t ? unit_t : mean_t, mean, t);
            if (unit_v || value_t) scatter(unit_v ? unit_v : value_t, value, t);
            for (int64_t c = 0; c < g.channels && var_t; c++) var_t[(t / POOL * g.channels + c) * POOL + t % POOL] = var[t * g.padded + c] * (0.5f / LOG2E);
        }
    }

    void scatter(float* columns, const float* rows, int64_t t) const {
        const int64_t wide = unit_t ? parts : POOL;
        for (int64_t c = 0; c < g.channels; c++) columns[(t / wide * g.channels + c) * wide + t % wide] = rows[t * g.padded + c];
    }

    void fill(int64_t j, const float* keys, int64_t ldk, const float* vals, int64_t ldv) {
        int64_t n = g.key(j).count, d = g.padded, chunk = j / POOL, at = j % POOL;
        float *m = mean + j * d, *s = var + j * d, *o = value + j * d;
        for (int64_t c = 0; c < d; c += LANES) {
            V sum{}, sum_v{}, square{};
            for (int64_t i = 0; i < n; i++) sum += load(keys + i * ldk + c), sum_v += load(vals + i * ldv + c);
            V centre = sum * (1.f / n);
            for (int64_t i = 0; i < n; i++) {
                V x = load(keys + i * ldk + c) - centre;
                square += x * x;
            }
            store(m + c, centre), store(o + c, sum_v * (1.f / n)), store(s + c, square * (1.f / n));
        }
        for (int64_t c = 0; c < g.channels && holds == COLUMNS_TOO; c++) {
            mean_t[(chunk * g.channels + c) * POOL + at] = m[c];
            var_t[(chunk * g.channels + c) * POOL + at] = s[c] * (0.5f / LOG2E);
            if (value_t) value_t[(chunk * g.channels + c) * POOL + at] = o[c];
        }
    }

    int64_t keys(int64_t chunk) const { return std::min<int64_t>(POOL, pools - chunk * POOL); }

    // log2 n + offset for each pooled key of query block i, -inf for those it keeps
    void bias(float* out, int64_t bh, int64_t i) const {
        float offset = g.p.offset ? g.p.offset[g.head(bh)] * LOG2E : 0.f;
        for (int64_t j = 0; j < chunks * POOL; j++) out[j] = log2_count[j] + offset;
        Geometry::List l = g.list(bh, i);
        for (int64_t n = 0; n < l.count; n++) {
            int64_t unit = g.unit(l.blocks[n]), at = position ? position[unit] : unit;
            if (at >= 0) std::fill_n(out + at * parts, parts, -INFINITY);
        }
    }

    // Add all pooled keys to a softmax, SPAN chunks at a time; `squares` [rows, padded]: its scaled queries squared; `terms`: space for
    // ROWS × POOL.
    void visit(Softmax& softmax, int64_t queries, const float* squares, const float* bias, float* terms) const {
        for (int64_t first = 0; first < chunks; first += SPAN) {
            int64_t end = std::min(first + SPAN, chunks);
            Block<float> block{nullptr, POOL, value + first * POOL * g.padded, g.padded};
            for (int64_t r0 = 0; r0 < queries; r0 += ROWS) {
                V best[ROWS];
                for (int r = 0; r < ROWS; r++) best[r] = all(NEVER);
                for (int64_t chunk = first; chunk < end; chunk++) {
                    if (g.p.variance) capped_terms(terms, squares + r0 * g.padded, chunk);
                    logits(softmax, best, r0, chunk, (chunk - first) * POOL, bias, terms);
                }
                softmax.absorb(r0, block, 0, std::min(pools - first * POOL, (end - first) * POOL), best, 1.f);
            }
        }
    }

    // ROWS rows of logits of a chunk, from column `at` of the scores on.
    void logits(Softmax& softmax, V (&best)[ROWS], int64_t r0, int64_t chunk, int64_t at, const float* bias, const float* terms) const {
        const Block<float> block{mean_t + chunk * POOL * g.channels, POOL, nullptr, 0};
        const int64_t n = keys(chunk);
        for_widths(round_up(n, LANES), [&](int64_t c, auto strip) __attribute__((always_inline)) {
            softmax.logits<strip.value>(r0, block, c, at + c);
            for (int r = 0; r < ROWS; r++)
                for (int s = 0; s < strip.value; s++) {
                    int64_t column = c + s * LANES;
                    float* score = softmax.score + r * softmax.width + at + column;
                    V logits = load(score);
                    if (g.p.variance) logits += load(terms + r * POOL + column);
                    logits += load(bias + chunk * POOL + column);
                    // past the last one lies what a longer list left: a bias of -inf would not take a NaN out
                    if (column + LANES > n) logits = select(LANE < all(int32_t(n - column)), logits, all(-INFINITY));
                    best[r] = max(best[r], logits);
                    store(score, logits);
                }
        });
    }

    void capped_terms(float* out, const float* squares, int64_t chunk) const {
        V cap = all(g.p.cap * LOG2E);
        for_strips(POOL, [&](int64_t c, auto strip) __attribute__((always_inline)) {
            tile<strip.value, ZERO>(out + c, POOL, squares, g.padded, var_t + chunk * POOL * g.channels + c, POOL, g.channels);
            for (int r = 0; r < ROWS; r++)
                for (int s = 0; s < strip.value; s++) store(out + r * POOL + c + s * LANES, min(load(out + r * POOL + c + s * LANES), cap));
        });
    }
};

#if BF16_DOTS
// Pooled keys and values that are given, as entries of bfloat16: of all units, or of those that a query block sees.
struct PairedPool {
    const Geometry& g;
    const int64_t parts, depth;
    Array<Entry> columns, rows;    // of all: [units, depth, parts]; of those that are seen: [chunks, depth, POOL]. [pools / BF16_DOTS, padded]
    int64_t gathered = -1;         // the list

    // Where query blocks see some of the units, and the keys of an entry are of one unit.
    static bool serves(const Geometry& g) { return g.listed() && g.p.pool_parts % BF16_DOTS == 0; }

    PairedPool(const Geometry& g, bool seen)
        : g(g), parts(g.parts()), depth(g.channels / BF16_DOTS), columns((seen ? round_up(g.seen_pools(), POOL) : g.pools()) * depth),
          rows((seen ? round_up(g.seen_pools(), POOL) : g.pools()) / BF16_DOTS * g.padded) {}

    void narrow_row(uint16_t* out, const float* in) const {
        int64_t c = 0;
        for (; c + LANES <= g.channels; c += LANES) store_narrow(out + c, load(in + c));
        for (; c < g.channels; c++) out[c] = narrow(in[c]);
    }

    void read(int64_t bh, int64_t unit) {
        alignas(64) uint16_t row[BF16_DOTS][MAX_CHANNELS];
        for (int64_t t = unit * parts; t < (unit + 1) * parts; t++) {
            narrow_row(row[0], g.p.pooled_k + (bh * g.pools() + t) * g.channels);
            for (int64_t c = 0; c < depth; c++) __builtin_memcpy(columns + (unit * depth + c) * parts + t % parts, row[0] + BF16_DOTS * c, sizeof(Entry));
        }
        for (int64_t t = unit * parts; t < (unit + 1) * parts; t += BF16_DOTS) {
            for (int64_t n = 0; n < BF16_DOTS; n++) narrow_row(row[n], g.p.pooled_v + (bh * g.pools() + t + n) * g.channels);
            Pairs::join_rows(rows + t / BF16_DOTS * g.padded, row[0], MAX_CHANNELS, BF16_DOTS, g.channels);
        }
    }

    void gather(const PairedPool& all, int64_t bh, int64_t i) {
        int64_t list = bh * g.states() + g.state(i);
        if (list == gathered) return;
        gathered = list;
        const int32_t* units = g.p.pool_lists + list * g.p.pool_width;
        for (int64_t n = 0; n < g.p.pool_counts[list]; n++) {
            Pool::put_columns<Entry>(columns, n * parts, all.columns + units[n] * depth * parts, parts, depth);
            const int64_t count = parts / BF16_DOTS * g.padded;
            __builtin_memcpy(rows + n * count, all.rows + units[n] * count, count * sizeof(Entry));
        }
    }

    // Add those of `pool`'s list to a softmax; `bias` as in Pool::visit.
    void visit(Softmax& softmax, int64_t queries, const Pool& pool, const float* bias) const {
        for (int64_t chunk = 0; chunk < pool.chunks; chunk++) {
            const Block<Entry> block{columns + chunk * depth * POOL, POOL, rows + chunk * POOL / BF16_DOTS * g.padded, g.padded};
            const float* mine = bias + chunk * POOL;
            softmax.visit(queries, block, pool.keys(chunk), [&](int64_t, int64_t c, V x) __attribute__((always_inline)) { return x + load(mine + c); });
        }
    }
};
#endif

// The first order of a pooled rest: one matrix for each query block, or for each span of them.
struct Slopes {
    const Geometry& g;
    explicit Slopes(const Geometry& g) : g(g) {}

    const float* of(int64_t bh, int64_t i) const { return g.p.slopes + (bh * g.states() + g.state(i)) * g.channels * g.channels; }

    // The matrix [D of q, padded] of query block i: where it lies, or in `space`.
    const float* read(float* space, int64_t bh, int64_t i) const {
        if (g.channels == g.padded) return of(bh, i);
        for (int64_t c = 0; c < g.channels; c++) __builtin_memcpy(space + c * g.padded, of(bh, i) + c * g.channels, g.channels * 4);
        return space;
    }
};

static inline void square(float* out, const float* in, int64_t n) {
    for (int64_t i = 0; i < n; i++) out[i] = in[i] * in[i];
}
