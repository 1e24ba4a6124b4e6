// The linear rest: feature maps, and the states phi(K)ᵀV that query blocks sum over the key blocks they don't keep.

// Rows of features: `out` [n, padded] of `x` [n, ldx], whole vectors; zero past `channels`. `out` may be `x`.
static inline void features(float* out, const float* x, int64_t ldx, int64_t n, int64_t channels, int64_t padded, int map) {
    for (int64_t first = 0; first < n; first += LANES) {
        const int64_t rows = std::min<int64_t>(LANES, n - first);
        V each[LANES] = {};
        alignas(64) float shift[LANES] = {};
        for (int64_t r = 0; r < rows && map == PHI_SOFTMAX; r++) {
            const float* row = x + (first + r) * ldx;
            V highest = all(-INFINITY);
            for (int64_t d = 0; d < channels; d += LANES) highest = max(highest, d + LANES <= channels ? load(row + d) : select(LANE < all(int32_t(channels - d)), load(row + d), highest));
            each[r] = highest;
        }
        if (map == PHI_SOFTMAX) store(shift, horizontal_maxima(each));
        for (int64_t r = 0; r < rows; r++) {
            const float* row = x + (first + r) * ldx;
            float* to = out + (first + r) * padded;
            V sum{};
            for (int64_t d = 0; d < channels; d += LANES) {
                V value = load(row + d), y;
                if (map == PHI_RELU) y = value <= V{} ? V{} : value;
                else y = exp2((value - shift[r]) * LOG2E);  // the difference of near numbers is exact, that of their products is not
                if (map == PHI_ELU) y = value > V{} ? value + 1.f : y;
                if (d + LANES > channels) y = select(LANE < all(int32_t(channels - d)), y, V{});
                sum += y;
                store(to + d, y);
            }
            each[r] = sum;
        }
        if (map != PHI_SOFTMAX) continue;
        for (int64_t r = rows; r < LANES; r++) each[r] = V{};
        alignas(64) float inverse[LANES];
        store(inverse, 1.f / horizontal_sums(each));
        for (int64_t r = 0; r < rows; r++)
            for (float *to = out + (first + r) * padded, *end = to + channels; to < end; to += LANES) store(to, load(to) * inverse[r]);
    }
}

// Σ a·b in float64, in LANES sums of their own.
static inline double dot(const float* a, const float* b, int64_t n) {
    double sum[LANES] = {}, whole = 0;
    for (int64_t i = 0; i + LANES <= n; i += LANES)
        for (int64_t l = 0; l < LANES; l++) sum[l] += double(a[i + l]) * b[i + l];
    for (int64_t i = n / LANES * LANES; i < n; i++) whole += double(a[i]) * b[i];
    for (int64_t l = 0; l < LANES; l++) whole += sum[l];
    return whole;
}

// dx += phi'(x)ᵀ dphi, for one row; `phi` are the features of x
static inline void feature_backward(float* dx, const float* x, const float* phi, const float* dphi, int64_t channels, int map) {
    float dot = 0;
    if (map == PHI_SOFTMAX)
        for (int64_t d = 0; d < channels; d++) dot += phi[d] * dphi[d];
    for (int64_t d = 0; d < channels; d++) {
        if (map == PHI_SOFTMAX) dx[d] += phi[d] * (dphi[d] - dot);
        else if (map == PHI_ELU) dx[d] += dphi[d] * (x[d] > 0 ? 1.f : phi[d]);
        else dx[d] += x[d] > 0 ? dphi[d] : 0.f;
    }
}

#if !AMX
struct TiledPanels;  // there are none
#endif

// out [n, padded] = (or +=) a · m, or a · mᵀ where it is turned; `a` and `out` are panels, m [channels, ldm]. Not turned, m is a panel too; turned, `space` [padded, padded].
// By tiles where there are some.
static inline void panel_product(
    const Geometry& g, TiledPanels* tiled, float* out, const float* a, int64_t n, const float* m, int64_t ldm, bool turned, bool add, float* space) {
#if AMX
    if (tiled) return tiled->rows(out, a, n, m, ldm, turned, add);
#endif
    static_cast<void>(tiled);
    if (turned) transpose(space, g.padded, m, ldm, g.channels, g.channels), m = space, ldm = g.padded;
    product_rows(out, g.padded, a, g.padded, m, ldm, round_up(n, ROWS), g.channels, g.padded, add);
}

// The blocks whose states a block leaves out, and how many they are.
struct Taken {
    const int32_t* blocks;
    int64_t count;
};

// States of `blocks` blocks, and the rests of `readers`: what is left of their sum without the blocks that a reader leaves out. Each is a matrix
// [channels, padded] of size `size` with a vector [padded] as its last row. States lie row by row: all blocks' first rows, then their second. The vector's
// sums run in float64, so that its rest, a difference of sums, is as exact as a sum of the rest alone; so do those of other entries where a float32 sum of
// what is left out would err by more than a sum of the rest.
struct States {
    const Geometry& g;
    const int64_t blocks, readers, size;
    Array<float> state, rests;  // [channels + 1, blocks, padded], [readers, channels + 1, padded]; without readers, `rests` is the sum of all
    Array<double> total;

    States(const Geometry& g, int64_t blocks, int64_t readers)
        : g(g), blocks(blocks), readers(readers), size((g.channels + 1) * g.padded), total(size) {
        state.allocate(blocks * size, g.channels != g.padded), rests.allocate(std::max<int64_t>(readers, 1) * size, false);
    }

    float* of(int64_t row, int64_t i) const { return state + (row * blocks + i) * g.padded; }
    const float* rest(int64_t reader) const { return rests + (readers ? reader * size : 0); }

    // state of block i = phiᵀ · b and the sums of phi's rows weighted by w (or 1): `phi` [n, padded], `b` [n, ldb]
    void fill(int64_t i, TiledPanels* tiled, const float* phi, const float* b, int64_t ldb, int64_t n, const float* w) {
        float* out = of(0, i);
        const int64_t step = blocks * g.padded;
#if AMX
        if (tiled)
            tiled->outer(out, step, phi, g.padded, b, ldb, n, false);
        else
#endif
            outer_rows(out, step, phi, g.padded, b, ldb, g.channels, n, g.padded, false);
        static_cast<void>(tiled);
        float* sums = of(g.channels, i);
        for (int64_t c = 0; c < g.padded; c += LANES) {
            double sum[LANES] = {};
            for (int64_t r = 0; r < n; r++)
                for (int l = 0; l < LANES; l++) sum[l] += w ? double(phi[r * g.padded + c + l]) * w[r] : double(phi[r * g.padded + c + l]);
            for (int l = 0; l < LANES; l++) sums[c + l] = float(sum[l]);
        }
    }

    // state of block i as it is given, [channels + 1, channels]
    void put(int64_t i, const float* from) {
        for (int64_t d = 0; d <= g.channels; d++) {
            std::fill_n(of(d, i), g.padded, 0.f);
            __builtin_memcpy(of(d, i), from + d * g.channels, size_t(g.channels) * 4);
        }
    }
    void clear(int64_t i) {
        for (int64_t d = 0; d <= g.channels; d++) std::fill_n(of(d, i), g.padded, 0.f);
    }

    // Row d of the total and of all rests; taken_by(reader): as Taken. `marks`: space for a byte for each block.
    template <class TakenBy>
    void row(int64_t d, uint8_t* marks, TakenBy&& taken_by) const {
        double* sum = total + d * g.padded;
        Split split;
        for (int64_t c = 0; c < g.padded; c += LANES) {
            double whole[LANES] = {};
            V sizes{};
            for (int64_t i = 0; i < blocks; i++) {
                const float* from = of(d, i) + c;
                for (int l = 0; l < LANES; l++) whole[l] += double(from[l]);
                sizes += magnitude(load(from));
            }
            __builtin_memcpy(sum + c, whole, sizeof whole);
            store(split.half + c, sizes * 0.5f);
        }
        if (!readers)
            for (int64_t c = 0; c < g.padded; c++) rests[d * g.padded + c] = float(sum[c]);
        for (int64_t c = 0; c < g.padded; c++) {
            split.high[c] = float(sum[c]), split.low[c] = float(sum[c] - double(split.high[c]));
            if (!std::isfinite(split.high[c])) split.half[c] = -1;  // what is left may be finite all the same
        }
        for (int64_t reader = 0; reader < readers; reader++) rest_row(rests + reader * size + d * g.padded, d, marks, taken_by(reader), split);
    }

    // A row of the total as the sum of two, and half the sum of its terms' sizes.
    struct Split {
        alignas(64) float high[MAX_CHANNELS], low[MAX_CHANNELS], half[MAX_CHANNELS];
    };

    void rest_row(float* out, int64_t d, uint8_t* marks, const Taken& taken, const Split& split) const {
        const bool few = 2 * taken.count <= blocks;  // subtract what is taken from the total, or add up what is left
        if (!few) {
            __builtin_memset(marks, 0, size_t(blocks));
            for (int64_t n = 0; n < taken.count; n++) marks[taken.blocks[n]] = 1;
        }
        for_strips(g.padded, [&](int64_t c, auto strip) __attribute__((always_inline)) {
            if (d < g.channels && few && subtract<strip.value>(out + c, d, c, taken, split)) return;
            for (int s = 0; s < strip.value; s++) exact(out + c + s * LANES, d, c + s * LANES, marks, taken, few);
        });
    }

    // From column c on. False where the size of what is left out of an entry exceeds that of what is left: channels of very different sizes share a row.
    template <int N>
    bool subtract(float* out, int64_t d, int64_t c, const Taken& taken, const Split& split) const {
        V sum[N] = {}, sizes[N] = {}, excess{};
        for (int64_t n = 0; n < taken.count; n++)
            for (int s = 0; s < N; s++) {
                const V x = load(of(d, taken.blocks[n]) + c + s * LANES);
                sum[s] += x, sizes[s] += magnitude(x);
            }
        for (int s = 0; s < N; s++) {
            const int64_t at = c + s * LANES;
            store(out + s * LANES, (load(split.high + at) - sum[s]) + load(split.low + at));
            excess = max(sizes[s] - load(split.half + at), excess);
        }
        return !(horizontal_max(excess) > 0);
    }

    void exact(float* out, int64_t d, int64_t c, const uint8_t* marks, const Taken& taken, bool few) const {
        const double* whole = total + d * g.padded + c;
        double sum[LANES];
        for (int l = 0; l < LANES; l++) sum[l] = few ? whole[l] : 0;
        for (int64_t n = 0; n < (few ? taken.count : blocks); n++) {
            if (!few && marks[n]) continue;
            const float* from = of(d, few ? taken.blocks[n] : n) + c;
            if (few)
                for (int l = 0; l < LANES; l++) sum[l] -= double(from[l]);
            else
                for (int l = 0; l < LANES; l++) sum[l] += double(from[l]);
        }
        for (int l = 0; l < LANES; l++) out[l] = d == g.channels && std::fabs(sum[l]) < 1e-12 * std::fabs(whole[l]) ? 0.f : float(sum[l]);  // what rounding left of a sum of zeros
    }
};
