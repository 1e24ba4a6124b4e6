// Key blocks in groups of four, these in larger groups: their moments, what spans of query blocks see of them, and the slopes that come of
// it: the formulas of method/parts/groups.py. Units are counted by their slots, level after level; the slots 4s to 4s + 3 of a level belong
// to slot s of the next one.

static constexpr int64_t MEMBERS = 4, MOST_LEVELS = 24, MOST_ELEMENTS = MEMBERS * MOST_PARTS;

// acc[r][c] += Σ_k A[r, k] · B[at[k], c]: as `tile`, of the rows of B that are named.
template <int N>
static __attribute__((noinline)) void named_tile(V (&acc)[ROWS][N], const float* a, int64_t lda, const float* b, int64_t ldb, const int32_t* at, int64_t depth) {
    V sum[ROWS][N];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int c = 0; c < N; c++) sum[r][c] = acc[r][c];
    for (int64_t k = 0; k < depth; k++) {
        V column[N];
        const float* row = b + at[k] * ldb;
#pragma GCC unroll 4
        for (int c = 0; c < N; c++) column[c] = load(row + c * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
            V x = all(a[r * lda + k]);
#pragma GCC unroll 4
            for (int c = 0; c < N; c++) fma(sum[r][c], x, column[c]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int c = 0; c < N; c++) acc[r][c] = sum[r][c];
}

// ROWS rows that are each a weighted sum of few of many rows: those that any of them takes, ascending, and the weights [ROWS, space].
struct Union {
    int64_t space, count, below;  // entries before `below` are units of level 0
    int32_t* at;
    float* weight;
};

// One row of every unit's matrix: of level 0, and of the groups.
struct RowOfUnits {
    const float *lowest, *above;
    int64_t step;  // from unit to unit
};

// out [ROWS, padded] = the sums of a union.
static inline void sum_named(float* out, const Union& u, const RowOfUnits& from, int64_t padded) {
    for_strips(padded, [&](int64_t c, auto strip) __attribute__((always_inline)) {
        V acc[ROWS][strip.value];
        for (int r = 0; r < ROWS; r++)
            for (int s = 0; s < strip.value; s++) acc[r][s] = V{};
        named_tile<strip.value>(acc, u.weight, u.space, from.lowest + c, from.step, u.at, u.below);
        named_tile<strip.value>(acc, u.weight + u.below, u.space, from.above + c, from.step, u.at + u.below, u.count - u.below);
        for (int r = 0; r < ROWS; r++)
            for (int s = 0; s < strip.value; s++) store(out + r * padded + c + s * LANES, acc[r][s]);
    });
}

// One thread's space for what a span sees.
struct SpanSpace {
    Array<int32_t> candidates, next, chosen, seen, at;
    Array<float> score, logit, row;  // `row`: one of the head's channels
    Array<uint64_t> order;
    Array<uint8_t> kept, held;
    SpanSpace(int64_t slots, int64_t units, int64_t wide, int64_t padded)
        : candidates(slots), next(slots), chosen(slots), seen(units), at(units), score(slots), logit(wide + LANES), row(padded),
          order(slots), kept(slots), held(units) {
        std::fill_n(static_cast<int32_t*>(at), units, -1);
    }
};

// One head at a time.
struct Groups {
    const Grouping& g;
    const int64_t d, padded, parts, slots;
    int64_t levels = 0, first[MOST_LEVELS + 1] = {};  // of each level, and the number of all units
    int64_t units, above, spans, span_groups, wide;   // `wide`: parts of a span's list; `above`: units of the levels of groups
    Array<float> keys, values, tokens, spread, v_spread, bias;  // [units · parts, padded], [units · parts]
    Array<float> total, middle, score_bias;                     // [units] tokens; of groups: mean keys [units, padded], [units]
    Array<float> metric, second, means;                         // [d, padded], [padded], [spans, padded]
    Array<int32_t> blocks;                                      // [spans]: query blocks
    Array<float> weights, padded_slopes;                        // of unions; [d, units, padded] where channels are no whole vectors
    Array<int32_t> places;
    std::vector<Union> unions;

    explicit Groups(const Grouping& g) : g(g), d(g.channels), padded(round_up(d, LANES)), parts(g.parts), slots(g.slots) {
        for (int64_t n = slots;; n /= MEMBERS) {
            first[levels + 1] = first[levels] + n;
            levels++;
            if (n <= g.roots) break;
        }
        units = first[levels], above = units - slots, spans = (g.q_blocks + SPAN - 1) / SPAN, span_groups = (spans + ROWS - 1) / ROWS, wide = g.width * parts;
        keys.allocate(units * parts * padded), values.allocate(units * parts * padded);
        for (Array<float>* each : {&tokens, &spread, &v_spread, &bias}) each->allocate(units * parts);
        total.allocate(units), middle.allocate(units * padded), score_bias.allocate(units);
        metric.allocate(d * padded), second.allocate(padded), means.allocate(spans * padded), blocks.allocate(spans);
        if (!g.slope) return;
        int64_t most = std::min(units, ROWS * g.width);
        weights.allocate(span_groups * ROWS * most), places.allocate(span_groups * most), unions.resize(size_t(span_groups));
        for (int64_t i = 0; i < span_groups; i++) unions[size_t(i)] = {most, 0, 0, places + i * most, weights + i * ROWS * most};
        if (d != padded) padded_slopes.allocate(d * units * padded);
    }

    static int64_t chunks(int64_t n) { return (n + 63) / 64; }
    int64_t elements() const { return MEMBERS * parts; }
    float* slope_of(int64_t bh, int64_t c, int64_t unit) const { return g.above + ((bh * d + c) * above + unit - slots) * d; }  // row c, of a group
    const float* lowest_slope(int64_t bh, int64_t c, int64_t unit) const { return g.slope + ((bh * d + c) * slots + unit) * d; }
    float bias_of(int64_t row) const {
        float half = std::min(spread[row] / 2, g.cap);
        return tokens[row] == 0 ? -INFINITY : g.log_count ? half + std::log(tokens[row]) : half;
    }

    void begin(int64_t bh) {
        for (int64_t c = 0; c < d && parts > 1; c++) __builtin_memcpy(metric + c * padded, g.metric + (bh * d + c) * d, d * 4);
        __builtin_memcpy(second, g.second + bh * d, d * 4);
        for (int64_t span = 0; span < spans; span++) {
            int64_t from = span * SPAN, to = std::min(from + SPAN, g.q_blocks), count = g.q_starts[to] - g.q_starts[from];
            float* mean = means + span * padded;
            blocks[span] = int32_t(to - from);
            std::fill_n(mean, d, 0.f);
            for (int64_t i = from; i < to; i++)
                for (int64_t c = 0; c < d; c++) mean[c] += float(g.q_starts[i + 1] - g.q_starts[i]) * g.q_mean[(bh * g.q_blocks + i) * d + c];
            for (int64_t c = 0; c < d; c++) mean[c] /= float(count);
        }
    }

    void lowest(int64_t bh, int64_t chunk) {
        for (int64_t unit = chunk * 64; unit < std::min(chunk * 64 + 64, slots); unit++) {
            total[unit] = 0;
            for (int64_t row = unit * parts; row < (unit + 1) * parts; row++) {
                int64_t from = bh * slots * parts + row;
                __builtin_memcpy(keys + row * padded, g.pooled_k + from * d, d * 4), __builtin_memcpy(values + row * padded, g.pooled_v + from * d, d * 4);
                tokens[row] = g.tokens[from], spread[row] = g.spread[from], v_spread[row] = g.v_spread[from], bias[row] = bias_of(row);
                total[unit] += tokens[row];
            }
        }
    }

    // The moments of slot `number` of a level above the key blocks.
    void group(SummaryWorkspace& work, int64_t bh, int64_t level, int64_t number) {
        int64_t unit = first[level] + number, member = first[level - 1] + MEMBERS * number, from = member * parts, n = elements();
        float* sum = tokens + unit * parts;
        __builtin_memcpy(work.keys, keys + from * padded, n * padded * 4);
        split(work, sum, n, parts, metric, tokens + from, d, padded);
        work.write_parts(g.part + (bh * above + unit - slots) * n, parts);
        total[unit] = 0;
        for (int64_t p = 0; p < parts; p++) total[unit] += sum[p];
        by_part(work, work.keys, keys, unit, from), by_part(work, work.values, values, unit, from);
        for (int64_t p = 0; p < parts; p++) spread_part(work, unit * parts + p, p, from);
        whole(work, unit);
        if (g.slope) slope(work, bh, level, unit, member);
    }

    // A group's elements of `rows` in the order of its parts, less the means of these, which join `rows`: a mean of one is itself to the bit.
    void by_part(SummaryWorkspace& work, float* panel, float* rows, int64_t unit, int64_t from) const {
        for (int64_t p = 0; p < parts; p++) {
            float *part = panel + work.first[p] * padded, *mean = rows + (unit * parts + p) * padded;
            const int32_t* mine = work.order + work.first[p];
            for (int64_t i = 0; i < work.count[p]; i++) {
                __builtin_memcpy(part + i * padded, rows + (from + mine[i]) * padded, padded * 4);
                work.along[i] = tokens[from + mine[i]] / std::max(tokens[unit * parts + p], 1.f);
            }
            weighted_rows(mean, work.along, part, padded, work.count[p], padded);
            for (int64_t i = 0; i < work.count[p]; i++)
                for (int64_t c = 0; c < padded; c += LANES) store(part + i * padded + c, work.along[i] > 0 ? load(part + i * padded + c) - load(mean + c) : V{});
        }
    }

    // The variances of part p, of those of its elements and of what lies between them.
    void spread_part(SummaryWorkspace& work, int64_t row, int64_t p, int64_t from) {
        const int64_t at = work.first[p], n = work.count[p];
        const int32_t* mine = work.order + at;
        float within = 0, v_within = 0;
        for (int64_t i = 0; i < n; i++) {
            work.along[i] = tokens[from + mine[i]] / std::max(tokens[row], 1.f);
            within += work.along[i] * spread[from + mine[i]], v_within += work.along[i] * v_spread[from + mine[i]];
        }
        weighted<true>(work.squares, work.along, work.keys + at * padded, padded, n, padded);
        spread[row] = within + g.scale * g.scale * vector_dot(work.squares, second, padded);
        weighted<true>(work.squares, work.along, work.values + at * padded, padded, n, padded);
        v_spread[row] = v_within + vector_sum(work.squares, padded);
        bias[row] = bias_of(row);
    }

    // Mean key and score of all parts together.
    void whole(SummaryWorkspace& work, int64_t unit) {
        const float tiny = 1.17549435e-38f;
        float sigma2 = 0, flat = 0, *mean = middle + unit * padded;
        for (int64_t p = 0; p < parts; p++) work.along[p] = tokens[unit * parts + p] / std::max(total[unit], 1.f);
        weighted_rows(mean, work.along, keys + unit * parts * padded, padded, parts, padded);
        weighted_rows(work.moved, work.along, values + unit * parts * padded, padded, parts, padded);
        for (int64_t row = unit * parts, p = 0; p < parts; p++, row++) {
            float off = 0, v_off = 0;
            for (int64_t c = 0; c < d; c++) {
                float x = keys[row * padded + c] - mean[c], y = values[row * padded + c] - work.moved[c];
                off += x * x * second[c], v_off += y * y;
            }
            sigma2 += work.along[p] * (spread[row] + g.scale * g.scale * off), flat += work.along[p] * (v_spread[row] + v_off);
        }
        score_bias[unit] = std::log(total[unit]) + std::min(sigma2 / 2, g.score_cap) + std::log(std::max(sigma2, tiny)) + std::log(std::max(flat, tiny)) / 2;
    }

    // The slope of a group: what lies between its members, and by their shares of its tokens their own.
    void slope(SummaryWorkspace& work, int64_t bh, int64_t level, int64_t unit, int64_t member) const {
        float share[MEMBERS], tokens_of = std::max(total[unit], 1.f);
        for (int64_t m = 0; m < MEMBERS; m++) share[m] = total[member + m] / tokens_of;
        for (int64_t c = 0; c < d; c++) {
            const float* own = level == 1 ? lowest_slope(bh, c, member) : slope_of(bh, c, member);
            float* out = slope_of(bh, c, unit);
            for (int64_t x = 0; x < d; x++) out[x] = share[0] * own[x] + share[1] * own[d + x] + share[2] * own[2 * d + x] + share[3] * own[3 * d + x];
        }
        for (int64_t p = 0; p < parts; p++)
            for (int64_t i = work.first[p]; i < work.first[p] + work.count[p]; i++) {
                float damped = tokens[member * parts + work.order[i]] / tokens_of / (1.f + spread[unit * parts + p]);
                for (int64_t c = 0; c < padded; c += LANES) store(work.values + i * padded + c, load(work.values + i * padded + c) * damped);
            }
        outer_rows(slope_of(bh, 0, unit), above * d, work.keys, padded, work.values, padded, d, elements(), d, true);
    }

    // Marks what the query blocks of a span keep, or takes the marks back.
    void mark(SpanSpace& space, int64_t bh, int64_t span, bool set) const {
        for (int64_t i = 0; i < blocks[span]; i++) {
            int64_t block = (g.lists_per_head ? bh * g.q_blocks : 0) + span * SPAN + i;
            for (int64_t e = 0; e < g.counts[block]; e++) {
                int64_t slot = g.place[g.lists[block * g.list_width + e]];
                space.kept[slot] = set ? uint8_t(space.kept[slot] | 1 << i) : uint8_t(0);
                for (int64_t level = 0, unit = slot; level < levels; level++, unit /= MEMBERS) space.held[first[level] + unit] = set;
            }
        }
    }

    // What a span sees, ascending, into its list: from the last level down a unit is opened if it holds a kept block or its score is among
    // the `opened` largest.
    void see(SpanSpace& space, int64_t bh, int64_t span) const {
        int64_t n = 0, seen[MOST_LEVELS] = {};
        const float* mean = means + span * padded;
        for (int64_t unit = first[levels - 1]; unit < units; unit++)
            if (total[unit] > 0) space.candidates[n++] = int32_t(unit);
        for (int64_t level = levels - 1; level > 0; level--) {
            for (int64_t i = 0; i < n; i++) {
                int64_t unit = space.candidates[i];
                space.score[i] = vector_dot(middle + unit * padded, mean, padded) + score_bias[unit] / g.scale;
            }
            int64_t top = std::min(g.opened, n), at = 0, below = 0;
            best(space.chosen, space.score, space.order, n, top);
            for (int64_t i = 0; i < n; i++) {
                int64_t unit = space.candidates[i], member = first[level - 1] + MEMBERS * (unit - first[level]);
                bool open = at < top && space.chosen[at] == i;
                at += open;
                if (!open && !space.held[unit]) {
                    space.seen[first[level] + seen[level]++] = int32_t(unit);
                    continue;
                }
                for (int64_t m = member; m < member + MEMBERS; m++)
                    if (total[m] > 0) space.next[below++] = int32_t(m);
            }
            std::swap(space.candidates.owner, space.next.owner);
            n = below;
        }
        int32_t *list = g.pool_lists + (bh * spans + span) * g.width, *to = std::copy_n(static_cast<int32_t*>(space.candidates), n, list);
        for (int64_t level = 1; level < levels; level++) to = std::copy_n(space.seen + first[level], seen[level], to);
        g.pool_counts[bh * spans + span] = int32_t(to - list);
        std::fill(to, list + g.width, 0);
    }

    // The shares of the parts that a span sees in the softmax of its mean query; a key block counts by how many of the query blocks do not
    // keep it.
    void shares(SpanSpace& space, int64_t bh, int64_t span) const {
        const int32_t* list = g.pool_lists + (bh * spans + span) * g.width;
        int64_t n = g.pool_counts[bh * spans + span], whole = round_up(n * parts, LANES);
        float top = -INFINITY, *logit = space.logit, *out = g.shares + (bh * spans + span) * wide;
        for (int64_t i = 0; i < n; i++) {
            int64_t unit = list[i];
            float kept = unit < slots ? float(__builtin_popcount(space.kept[unit])) / float(blocks[span]) : 0.f, seen = kept ? std::log(1.f - kept) : 0.f;
            row_dots(logit + i * parts, keys + unit * parts * padded, padded, parts, means + span * padded, padded);
            for (int64_t p = 0; p < parts; p++) logit[i * parts + p] = g.scale * logit[i * parts + p] + std::max(bias[unit * parts + p], NEVER) + seen;
        }
        std::fill(logit + n * parts, logit + whole, -INFINITY);
        for (int64_t i = 0; i < n * parts; i++) top = logit[i] > top || logit[i] != logit[i] ? logit[i] : top;
        if (top == -INFINITY) top = 0;
        V sum{};
        for (int64_t i = 0; i < whole; i += LANES) {
            V x = exp2((load(logit + i) - top) * LOG2E);
            store(logit + i, x);
            sum += x;
        }
        float inverse = 1.f / std::max(1.17549435e-38f, horizontal_sum(sum));
        for (int64_t i = 0; i < n * parts; i++) out[i] = logit[i] * inverse;
        std::fill(out + n * parts, out + wide, 0.f);
    }

    // The union of what ROWS spans see.
    void unite(SpanSpace& space, int64_t bh, int64_t number) {
        Union& u = unions[size_t(number)];
        int64_t from = number * ROWS, to = std::min(from + ROWS, spans);
        u.count = u.below = 0;
        for (int64_t span = bh * spans + from; span < bh * spans + to; span++)
            for (int64_t i = 0; i < g.pool_counts[span]; i++) {
                int32_t unit = g.pool_lists[span * g.width + i];
                if (space.at[unit] < 0) u.at[u.count++] = unit, space.at[unit] = 0;
            }
        std::sort(u.at, u.at + u.count);
        for (int64_t i = 0; i < u.count; i++) space.at[u.at[i]] = int32_t(i), u.below += u.at[i] < slots;
        __builtin_memset(u.weight, 0, ROWS * u.space * 4);
        for (int64_t span = from; span < to; span++)
            for (int64_t i = 0; i < g.pool_counts[bh * spans + span]; i++) {
                const float* share = g.shares + (bh * spans + span) * wide + i * parts;
                float sum = 0;
                for (int64_t p = 0; p < parts; p++) sum += share[p];
                u.weight[(span - from) * u.space + space.at[g.pool_lists[(bh * spans + span) * g.width + i]]] = sum;
            }
        for (int64_t i = 0; i < u.count; i++) space.at[u.at[i]] = -1;
    }

    // Row c of all units' matrices, in whole vectors.
    RowOfUnits row_of_units(int64_t bh, int64_t c) const {
        if (d == padded) return {lowest_slope(bh, c, 0), above ? slope_of(bh, c, 0) : lowest_slope(bh, c, 0), padded};
        float* row = padded_slopes + c * units * padded;
        return {row, row, padded};
    }
    void pad_slopes(int64_t bh, int64_t c) const {
        for (int64_t unit = 0; unit < units && d != padded; unit++)
            __builtin_memcpy(padded_slopes + (c * units + unit) * padded, unit < slots ? lowest_slope(bh, c, unit) : slope_of(bh, c, unit), d * 4);
    }

    void mix(int64_t bh, int64_t c) const {  // row c of the matrices of all spans
        alignas(64) float out[ROWS * MAX_CHANNELS];
        pad_slopes(bh, c);
        for (int64_t number = 0; number < span_groups; number++) {
            sum_named(out, unions[size_t(number)], row_of_units(bh, c), padded);
            for (int64_t span = number * ROWS; span < std::min((number + 1) * ROWS, spans); span++)
                __builtin_memcpy(g.slopes + ((bh * spans + span) * d + c) * d, out + (span - number * ROWS) * padded, d * 4);
        }
    }

    void write(int64_t bh, int64_t chunk) const {  // the pooled keys of all units
        for (int64_t row = chunk * 64; row < std::min(chunk * 64 + 64, units * parts); row++) {
            int64_t to = bh * units * parts + row;
            __builtin_memcpy(g.joined_k + to * d, keys + row * padded, d * 4), __builtin_memcpy(g.joined_v + to * d, values + row * padded, d * 4);
            g.joined_bias[to] = bias[row];
            g.joined_tokens[to] = tokens[row], g.joined_spread[to] = spread[row];
        }
    }
};

static constexpr int64_t GROUP_WIDTH = (MOST_ELEMENTS + 15) / 16 * 16 + 2 * std::max(ROWS, LANES);  // of a workspace for a group's elements

void group_units(const Grouping& g) {
    Groups groups(g);
    Team team(g.threads);
    std::vector<std::unique_ptr<SummaryWorkspace>> workspaces;
    std::vector<std::unique_ptr<SpanSpace>> spaces;
    for (int t = 0; t < team.size(); t++) {
        workspaces.push_back(std::make_unique<SummaryWorkspace>(GROUP_WIDTH, groups.padded, false));
        spaces.push_back(std::make_unique<SpanSpace>(groups.slots, groups.units, groups.wide, groups.padded));
    }
    team.run([&](int thread) {
        SummaryWorkspace& work = *workspaces[size_t(thread)];
        SpanSpace& space = *spaces[size_t(thread)];
        for (int64_t bh = 0; bh < g.batch * g.heads; bh++) {
            team.share(1, [&](int64_t) { groups.begin(bh); });
            team.share(Groups::chunks(groups.slots), [&](int64_t chunk) { groups.lowest(bh, chunk); });
            for (int64_t level = 1; level < groups.levels; level++)
                team.share(groups.first[level + 1] - groups.first[level], [&](int64_t number) { groups.group(work, bh, level, number); });
            team.share(Groups::chunks(groups.units * groups.parts), [&](int64_t chunk) { groups.write(bh, chunk); });
            team.share(groups.span_groups, [&](int64_t number) {
                for (int64_t span = number * ROWS; span < std::min((number + 1) * ROWS, groups.spans); span++) {
                    groups.mark(space, bh, span, true);
                    groups.see(space, bh, span);
                    if (g.slope) groups.shares(space, bh, span);
                    groups.mark(space, bh, span, false);
                }
                if (g.slope) groups.unite(space, bh, number);
            });
            if (g.slope) team.share(groups.d, [&](int64_t c) { groups.mix(bh, c); });
        }
    });
}
