// Gradients of what spans of query blocks see of groups, through all but the choices: of parts, and of what is opened.

// As `dots_tile` with N matrices of B at places of their own.
template <int N>
static __attribute__((noinline)) void named_dots(V (&acc)[ROWS][N], const float* a, int64_t lda, int64_t step_a, const float* const (&b)[N], int64_t step_b, int64_t count, int64_t depth) {
    V sum[ROWS][N];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int c = 0; c < N; c++) sum[r][c] = V{};
    for (int64_t n = 0; n < count; n++)
        for (int64_t k = 0; k < depth; k += LANES) {
            V column[N];
#pragma GCC unroll 4
            for (int c = 0; c < N; c++) column[c] = load(b[c] + n * step_b + k);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++) {
                V x = load(a + n * step_a + r * lda + k);
#pragma GCC unroll 4
                for (int c = 0; c < N; c++) fma(sum[r][c], x, column[c]);
            }
        }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int c = 0; c < N; c++) acc[r][c] = sum[r][c];
}

struct GroupGradient : Groups {
    Array<float> dkeys, dvalues, dbias, dspread;   // of all units; the spread's without what comes through the bias
    Array<float> dabove, dseconds, dlogit;                                  // [d, above, padded]; [above, padded]; [spans, wide]
    Array<int32_t> starts, entries;                                  // of each unit: where on the lists it is, span · width + place
    Array<float> by_unit, padded_dslopes;                            // weights of unions of spans; [d, spans, padded] as in `padded_slopes`
    Array<int32_t> by_unit_at;
    std::vector<Union> of_units;

    explicit GroupGradient(const Grouping& g) : Groups(g) {
        dkeys.allocate(units * parts * padded), dvalues.allocate(units * parts * padded), dspread.allocate(units * parts), dbias.allocate(units * parts);
        dabove.allocate(d * above * padded), dseconds.allocate(above * padded);
        if (!g.dslopes) return;
        int64_t most = spans * g.width, groups_of = (units + ROWS - 1) / ROWS;
        dlogit.allocate(spans * wide), starts.allocate(units + 1), entries.allocate(most);
        by_unit.allocate(most * ROWS), by_unit_at.allocate(most), of_units.resize(size_t(groups_of));
        if (d != padded) padded_dslopes.allocate(d * spans * padded);
    }

    void remember(int64_t bh, int64_t chunk) {  // what the forward pass made of all units, and the gradients that are given
        for (int64_t row = chunk * 64; row < std::min(chunk * 64 + 64, units * parts); row++) {
            int64_t from = bh * units * parts + row;
            __builtin_memcpy(keys + row * padded, g.joined_k + from * d, d * 4), __builtin_memcpy(values + row * padded, g.joined_v + from * d, d * 4);
            tokens[row] = g.joined_tokens[from], spread[row] = g.joined_spread[from], bias[row] = g.joined_bias[from];
            __builtin_memset(dkeys + row * padded, 0, padded * 4), __builtin_memset(dvalues + row * padded, 0, padded * 4);
            if (g.djoined_k) __builtin_memcpy(dkeys + row * padded, g.djoined_k + from * d, d * 4);
            if (g.djoined_v) __builtin_memcpy(dvalues + row * padded, g.djoined_v + from * d, d * 4);
            dbias[row] = g.djoined_bias ? g.djoined_bias[from] : 0.f, dspread[row] = 0;
        }
    }
    void count_tokens() {
        for (int64_t unit = 0; unit < units; unit++) {
            total[unit] = 0;
            for (int64_t p = 0; p < parts; p++) total[unit] += tokens[unit * parts + p];
        }
    }

    // The gradients of the logits of the spans of one union, and of their mean queries; `space`: a panel [ROWS, d, padded].
    void spans_of_union(float* space, float* dweight, int64_t bh, int64_t number) const {
        const Union& u = unions[size_t(number)];
        int64_t from = number * ROWS, to = std::min(from + ROWS, spans), together = std::max<int64_t>(1, 512 / padded);
        for (int64_t span = from; span < to; span++)
            for (int64_t c = 0; c < d; c++) __builtin_memcpy(space + ((span - from) * d + c) * padded, g.dslopes + ((bh * spans + span) * d + c) * d, d * 4);
        __builtin_memset(dweight, 0, ROWS * u.space * 4);
        const int64_t above_step = d == padded ? above * d : units * padded, step = d == padded ? slots * d : units * padded;
        const RowOfUnits first_row = row_of_units(bh, 0);
        for (int64_t c = 0; c < d; c += together)
            for (int64_t j = 0; j < u.count;) {
                const bool lowest = j < u.below;
                const int64_t last = lowest ? u.below : u.count, step_b = lowest ? step : above_step;
                const float* matrices[STRIP];
                for (int64_t s = 0; s < STRIP; s++) matrices[s] = (lowest ? first_row.lowest : first_row.above) + u.at[std::min(j + s, last - 1)] * first_row.step + c * step_b;
                V acc[ROWS][STRIP];
                named_dots<STRIP>(acc, space + c * padded, d * padded, padded, matrices, step_b, std::min(together, d - c), padded);
                for (int r = 0; r < ROWS; r++)
                    for (int64_t s = 0; s < STRIP && j + s < last; s++) dweight[r * u.space + j + s] += horizontal_sum(acc[r][s]);
                j = std::min(j + STRIP, last);
            }
    }

    // Through the softmax of a span: `dweight` [units of its union].
    void through_shares(SpanSpace& space, const float* dweight, int64_t bh, int64_t span) const {
        int64_t n = g.pool_counts[bh * spans + span], count = 0;
        const int32_t* list = g.pool_lists + (bh * spans + span) * g.width;
        const float *share = g.shares + (bh * spans + span) * wide;
        float sum = 0, *dmean = space.row, *to = dlogit + span * wide;
        for (int64_t i = 0; i < n; i++)
            for (int64_t p = 0; p < parts; p++) sum += share[i * parts + p] * dweight[space.at[list[i]]];
        __builtin_memset(dmean, 0, padded * 4);
        for (int64_t i = 0; i < n; i++) {
            for (int64_t p = 0; p < parts; p++) to[i * parts + p] = share[i * parts + p] * (dweight[space.at[list[i]]] - sum);
            for (int64_t p = 0; p < parts; p++)
                for (int64_t c = 0; c < padded; c += LANES) {
                    V x = load(dmean + c);
                    fma(x, all(to[i * parts + p] * g.scale), load(keys + (list[i] * parts + p) * padded + c));
                    store(dmean + c, x);
                }
        }
        for (int64_t i = span * SPAN; i < std::min((span + 1) * SPAN, g.q_blocks); i++) count += g.q_starts[i + 1] - g.q_starts[i];
        for (int64_t i = span * SPAN; i < std::min((span + 1) * SPAN, g.q_blocks); i++)
            for (int64_t c = 0; c < d; c++) g.dq_mean[(bh * g.q_blocks + i) * d + c] = dmean[c] * float(g.q_starts[i + 1] - g.q_starts[i]) / float(count);
    }

    void union_of_spans(SpanSpace& space, float* panel, float* dweight, int64_t bh, int64_t number) {
        unite(space, bh, number);
        const Union& u = unions[size_t(number)];
        spans_of_union(panel, dweight, bh, number);
        for (int64_t i = 0; i < u.count; i++) space.at[u.at[i]] = int32_t(i);
        for (int64_t span = number * ROWS; span < std::min((number + 1) * ROWS, spans); span++) through_shares(space, dweight + (span - number * ROWS) * u.space, bh, span);
        for (int64_t i = 0; i < u.count; i++) space.at[u.at[i]] = -1;
    }

    // Where on the lists each unit is.
    void turn_lists(int64_t bh) {
        std::fill_n(static_cast<int32_t*>(starts), units + 1, 0);
        for (int64_t span = 0; span < spans; span++)
            for (int64_t i = 0; i < g.pool_counts[bh * spans + span]; i++) starts[g.pool_lists[(bh * spans + span) * g.width + i] + 1]++;
        for (int64_t unit = 0; unit < units; unit++) starts[unit + 1] += starts[unit];
        for (int64_t span = 0; span < spans; span++)
            for (int64_t i = 0; i < g.pool_counts[bh * spans + span]; i++) entries[starts[g.pool_lists[(bh * spans + span) * g.width + i]]++] = int32_t(span * g.width + i);
        for (int64_t unit = units; unit > 0; unit--) starts[unit] = starts[unit - 1];
        starts[0] = 0;
    }

    // What the logits give to the keys and biases of ROWS units, and the union of the spans that see them.
    void spans_of_units(int64_t bh, int64_t number) {
        int64_t from = number * ROWS, to = std::min(from + ROWS, units), before = starts[from], most = starts[to] - before;
        Union& u = of_units[size_t(number)];
        u = {most, 0, 0, by_unit_at + before, by_unit + before * ROWS};
        for (int64_t e = before; e < before + most; e++) u.at[e - before] = int32_t(entries[e] / g.width);
        std::sort(u.at, u.at + most);
        u.count = u.below = std::unique(u.at, u.at + most) - u.at;
        __builtin_memset(u.weight, 0, ROWS * most * 4);
        for (int64_t unit = from; unit < to; unit++)
            for (int64_t e = starts[unit]; e < starts[unit + 1]; e++) {
                int64_t span = entries[e] / g.width, at = std::lower_bound(u.at, u.at + u.count, int32_t(span)) - u.at;
                const float* share = g.shares + (bh * spans * g.width + entries[e]) * parts;
                float sum = 0;
                for (int64_t p = 0; p < parts; p++) sum += share[p], add_logit(unit * parts + p, span, dlogit[entries[e] * parts + p]);
                u.weight[(unit - from) * u.space + at] = sum;
            }
    }
    void add_logit(int64_t row, int64_t span, float by) {
        dbias[row] += by;
        for (int64_t c = 0; c < padded; c += LANES) {
            V x = load(dkeys + row * padded + c);
            fma(x, all(by * g.scale), load(means + span * padded + c));
            store(dkeys + row * padded + c, x);
        }
    }

    void pad_dslopes(int64_t bh, int64_t c) const {
        for (int64_t span = 0; span < spans && d != padded; span++)
            __builtin_memcpy(padded_dslopes + (c * spans + span) * padded, g.dslopes + ((bh * spans + span) * d + c) * d, d * 4);
    }
    void unmix(int64_t bh, int64_t c) const {  // row c of the gradients of all units' matrices
        alignas(64) float out[ROWS * MAX_CHANNELS];
        pad_dslopes(bh, c);
        const float* row = d == padded ? g.dslopes + (bh * spans * d + c) * d : padded_dslopes + c * spans * padded;
        for (int64_t number = 0; number < int64_t(of_units.size()); number++) {
            sum_named(out, of_units[size_t(number)], {row, row, d == padded ? d * d : padded}, padded);
            for (int64_t unit = number * ROWS; unit < std::min((number + 1) * ROWS, units); unit++) {
                const float* from = out + (unit - number * ROWS) * padded;
                if (unit < slots)
                    __builtin_memcpy(g.dslope + ((bh * d + c) * slots + unit) * d, from, d * 4);
                else
                    __builtin_memcpy(dabove + (c * above + unit - slots) * padded, from, padded * 4);
            }
        }
    }

    // By its members' shares of its tokens a group's matrix is theirs.
    void hand_down(int64_t bh, int64_t level, int64_t unit, int64_t member) const {
        for (int64_t c = 0; c < d; c++)
            for (int64_t m = member; m < member + MEMBERS; m++) {
                const float share = total[m] / std::max(total[unit], 1.f), *from = dabove + (c * above + unit - slots) * padded;
                float* to = level == 1 ? g.dslope + ((bh * d + c) * slots + m) * d : dabove + (c * above + m - slots) * padded;
                for (int64_t x = 0; x < d; x++) to[x] += share * from[x];
            }
    }

    float spread_gradient(int64_t row) const { return dspread[row] + (tokens[row] > 0 && spread[row] / 2 <= g.cap ? dbias[row] / 2 : 0.f); }

    // The elements of a group by its parts, less these parts' means; 0 for those without tokens.
    void distances(SummaryWorkspace& work, int64_t unit, int64_t from) const {
        for (int64_t p = 0; p < parts; p++) {
            const int64_t mean = (unit * parts + p) * padded;
            for (int64_t i = work.first[p]; i < work.first[p] + work.count[p]; i++) {
                const int64_t element = from + work.order[i], at = element * padded;
                for (int64_t c = 0; c < padded; c += LANES) {
                    store(work.keys + i * padded + c, tokens[element] > 0 ? load(keys + at + c) - load(keys + mean + c) : V{});
                    store(work.values + i * padded + c, tokens[element] > 0 ? load(values + at + c) - load(values + mean + c) : V{});
                }
            }
        }
    }

    // From a group to its members.
    void group(SummaryWorkspace& work, int64_t bh, int64_t level, int64_t number) {
        int64_t unit = first[level] + number, member = first[level - 1] + MEMBERS * number, from = member * parts, n = elements();
        float damp[MOST_PARTS], ddamp[MOST_PARTS] = {}, tokens_of = std::max(total[unit], 1.f), *second_of = dseconds + (unit - slots) * padded;
        work.by_part(g.part + (bh * above + unit - slots) * n, n, parts);
        distances(work, unit, from);
        __builtin_memset(second_of, 0, padded * 4);
        for (int64_t p = 0; p < parts; p++) damp[p] = 1.f / (1.f + spread[unit * parts + p]);
        if (g.dslopes) {
            for (int64_t c = 0; c < d; c++) __builtin_memcpy(work.matrix + c * padded, dabove + (c * above + unit - slots) * padded, padded * 4);
            transpose(work.turned, padded, work.matrix, padded, d, d);
            product_rows(work.by_key, padded, work.values, padded, work.turned, padded, round_up(n, ROWS), d, padded, false);
            product_rows(work.by_value, padded, work.keys, padded, work.matrix, padded, round_up(n, ROWS), d, padded, false);
            for (int64_t p = 0; p < parts; p++)
                for (int64_t i = work.first[p]; i < work.first[p] + work.count[p]; i++)
                    ddamp[p] += tokens[from + work.order[i]] / tokens_of * vector_dot(work.keys + i * padded, work.by_key + i * padded, padded);
            hand_down(bh, level, unit, member);
        }
        for (int64_t p = 0; p < parts; p++) {
            float dsigma2 = spread_gradient(unit * parts + p) - damp[p] * damp[p] * ddamp[p];
            const float *dkey = dkeys + (unit * parts + p) * padded, *dvalue = dvalues + (unit * parts + p) * padded;
            for (int64_t i = work.first[p]; i < work.first[p] + work.count[p]; i++) {
                const int64_t element = from + work.order[i];
                const float share = tokens[element] / std::max(tokens[unit * parts + p], 1.f);
                if (share == 0) continue;
                float factor = g.scale * g.scale * dsigma2 * share, apart = g.dslopes ? damp[p] * tokens[element] / tokens_of : 0.f;
                dspread[element] += share * dsigma2;
                for (int64_t c = 0; c < padded; c += LANES) {
                    int64_t at = i * padded + c, to = element * padded + c;
                    V off = load(work.keys + at);
                    store(second_of + c, load(second_of + c) + off * off * factor);
                    V dk = load(dkeys + to) + load(dkey + c) * share + off * load(second + c) * (2 * factor), dv = load(dvalues + to) + load(dvalue + c) * share;
                    if (g.dslopes) dk += load(work.by_key + at) * apart, dv += load(work.by_value + at) * apart;
                    store(dkeys + to, dk), store(dvalues + to, dv);
                }
            }
        }
    }

    void write(int64_t bh, int64_t chunk) const {
        for (int64_t row = chunk * 64; row < std::min(chunk * 64 + 64, slots * parts); row++) {
            int64_t to = bh * slots * parts + row;
            __builtin_memcpy(g.dpooled_k + to * d, dkeys + row * padded, d * 4), __builtin_memcpy(g.dpooled_v + to * d, dvalues + row * padded, d * 4);
            g.dspread[to] = spread_gradient(row);
        }
    }
    void write_second(int64_t bh) const {
        for (int64_t c = 0; c < d; c++) {
            double sum = 0;
            for (int64_t unit = 0; unit < above; unit++) sum += dseconds[unit * padded + c];
            g.dsecond[bh * d + c] = float(sum);
        }
    }
};

void group_units_backward(const Grouping& g) {
    GroupGradient gradient(g);
    Team team(g.threads);
    std::vector<std::unique_ptr<SummaryWorkspace>> workspaces;
    std::vector<std::unique_ptr<SpanSpace>> spaces;
    std::vector<Array<float>> panels, dweights;
    for (int t = 0; t < team.size(); t++) {
        workspaces.push_back(std::make_unique<SummaryWorkspace>(GROUP_WIDTH, gradient.padded, true));
        spaces.push_back(std::make_unique<SpanSpace>(gradient.slots, gradient.units, gradient.wide, gradient.padded));
        panels.emplace_back(g.dslopes ? ROWS * gradient.d * gradient.padded : 0), dweights.emplace_back(g.dslopes ? ROWS * std::min(gradient.units, ROWS * g.width) : 0);
    }
    team.run([&](int thread) {
        SummaryWorkspace& work = *workspaces[size_t(thread)];
        SpanSpace& space = *spaces[size_t(thread)];
        for (int64_t bh = 0; bh < g.batch * g.heads; bh++) {
            team.share(1, [&](int64_t) { gradient.begin(bh); });
            team.share(Groups::chunks(gradient.units * gradient.parts), [&](int64_t chunk) { gradient.remember(bh, chunk); });
            team.share(1, [&](int64_t) { gradient.count_tokens(); });
            if (g.dslopes) {
                team.share(gradient.d, [&](int64_t c) { gradient.pad_slopes(bh, c); });
                team.share(gradient.span_groups, [&](int64_t number) { gradient.union_of_spans(space, panels[size_t(thread)], dweights[size_t(thread)], bh, number); });
                team.share(1, [&](int64_t) { gradient.turn_lists(bh); });
                team.share(int64_t(gradient.of_units.size()), [&](int64_t number) { gradient.spans_of_units(bh, number); });
                team.share(gradient.d, [&](int64_t c) { gradient.unmix(bh, c); });
            }
            for (int64_t level = gradient.levels - 1; level > 0; level--)
                team.share(gradient.first[level + 1] - gradient.first[level], [&](int64_t number) { gradient.group(work, bh, level, number); });
            team.share(Groups::chunks(gradient.slots * gradient.parts), [&](int64_t chunk) { gradient.write(bh, chunk); });
            team.share(1, [&](int64_t) { gradient.write_second(bh); });
        }
    });
}
