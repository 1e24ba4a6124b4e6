// The linear rest: feature maps, and the states phi(K)ᵀV that query blocks sum over the key blocks they don't keep.

// One row of features. Both rows are panels: whole vectors, zero past `channels`.
static inline void feature(float* out, const float* x, int64_t channels, int map) {
    V highest = all(-INFINITY), sum{};
    for (int64_t d = 0; d < channels; d += LANES) highest = max(highest, select(LANE < all(int32_t(channels - d)), load(x + d), highest));
    V shift = all(map == PHI_SOFTMAX ? horizontal_max(highest) : 0.f);
    for (int64_t d = 0; d < channels; d += LANES) {
        V value = load(x + d), y;
        if (map == PHI_RELU) y = value <= V{} ? V{} : value;
        else y = exp2((value - shift) * LOG2E);
        if (map == PHI_ELU) y = value > V{} ? value + 1.f : y;
        y = select(LANE < all(int32_t(channels - d)), y, V{});
        sum += y;
        store(out + d, y);
    }
    if (map != PHI_SOFTMAX) return;
    V inverse = all(1.f / horizontal_sum(sum));
    for (int64_t d = 0; d < channels; d += LANES) store(out + d, load(out + d) * inverse);
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

// out [channels, padded] = A · B: `a` [channels rows, ld], `b` [depth, ldb]; channels need not be a multiple of ROWS.
static inline void outer(const Geometry& g, float* out, const float* a, int64_t ld, const float* b, int64_t ldb, int64_t depth) {
    int64_t whole = g.channels / ROWS * ROWS;
    product_rows(out, g.padded, a, ld, b, ldb, whole, depth, g.padded, false);
    if (whole == g.channels) return;
    alignas(64) float last[ROWS * MAX_CHANNELS];  // the last rows, by way of a panel of ROWS
    product(last, g.padded, a + whole * ld, ld, b, ldb, depth, g.padded, nullptr);
    __builtin_memcpy(out + whole * g.padded, last, (g.channels - whole) * g.padded * 4);
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

// States of blocks: matrix [channels, padded] then vector [padded]. Sums run in float64, so that the rest, a difference of sums, is as
// exact as a sum of the rest alone.
struct States {
    const Geometry& g;
    const int64_t blocks, size;
    Array<float> state, ones;
    Array<double> total;

    States(const Geometry& g, int64_t blocks) : g(g), blocks(blocks), size((g.channels + 1) * g.padded), state(blocks * size), ones(g.rows()), total(size) {
        for (int64_t r = 0; r < g.rows(); r++) ones[r] = 1;
    }

    float* of(int64_t i) const { return state + i * size; }

    // state of block i = phiᵀ · b and the sums of phi's rows weighted by w (or 1): `phi` [n, padded], `b` [n, ldb]; `space` [channels + ROWS, width]
    void fill(int64_t i, TiledPanels* tiled, const float* phi, const float* b, int64_t ldb, int64_t n, const float* w, float* space) {
        float* out = of(i);
        transpose(space, g.width, phi, g.padded, n, g.channels);
#if AMX
        if (tiled)
            tiled->outer(out, g.padded, phi, g.padded, b, ldb, n, false);
        else
#endif
            outer(g, out, space, g.width, b, ldb, n);
        static_cast<void>(tiled);
        for (int64_t d = 0; d < g.channels; d++) out[g.channels * g.padded + d] = float(dot(space + d * g.width, w ? w : ones, n));
    }

    // state of block i as it is given, [channels + 1, channels]
    void put(int64_t i, const float* from) {
        float* out = of(i);
        __builtin_memset(out, 0, size_t(size) * 4);
        for (int64_t d = 0; d <= g.channels; d++) __builtin_memcpy(out + d * g.padded, from + d * g.channels, size_t(g.channels) * 4);
    }

    void add_up(int64_t part, int64_t parts) {  // one of `parts` slices of the total
        int64_t first = size * part / parts, last = size * (part + 1) / parts;
        for (int64_t e = first; e < last; e++) total[e] = 0;
        for (int64_t i = 0; i < blocks; i++)
            for (int64_t e = first; e < last; e++) total[e] += double(of(i)[e]);
    }

    // One thread's workspace for `rest`.
    struct Workspace {
        Array<double> sum;
        Array<uint8_t> taken;
        Workspace(const Geometry& g, int64_t blocks) : sum((g.channels + 1) * g.padded), taken(blocks) {}
    };

    // out = sum over the blocks that are not among `taken`. False where nothing is left.
    bool rest(float* out, const int32_t* taken, int64_t count, Workspace& work) const {
        if (count == blocks) return false;
        double* sums = work.sum;
        bool few = 2 * count <= blocks;  // subtract what is taken from the total, or add up what is left
        if (!few) {
            __builtin_memset(work.taken, 0, size_t(blocks));
            for (int64_t n = 0; n < count; n++) work.taken[taken[n]] = 1;
        }
        const int64_t STEP = 32;  // sums that stay in registers
        for (int64_t e = 0; e < size; e += STEP) {
            int64_t width = std::min(STEP, size - e);
            double sum[STEP];
            for (int64_t s = 0; s < width; s++) sum[s] = few ? total[e + s] : 0;
            for (int64_t n = 0; n < (few ? count : blocks); n++) {
                if (!few && work.taken[n]) continue;
                const float* from = of(few ? taken[n] : n) + e;
                double sign = few ? -1 : 1;
                if (width == STEP)
                    for (int64_t s = 0; s < STEP; s++) sum[s] += sign * double(from[s]);
                else
                    for (int64_t s = 0; s < width; s++) sum[s] += sign * double(from[s]);
            }
            __builtin_memcpy(sums + e, sum, size_t(width) * 8);
        }
        for (int64_t e = 0; e < size; e++) out[e] = float(sums[e]);
        for (int64_t e = g.channels * g.padded; e < size; e++)  // what rounding left of a sum of zeros
            if (std::fabs(sums[e]) < 1e-12 * std::fabs(total[e])) out[e] = 0;
        return true;
    }
};
