// The register tile: ROWS rows of A times a strip of B, and the products built from it. All matrices are row-major floats.
// Rows come in groups of ROWS (callers pad), columns in whole vectors.

// acc[r][c] += sum over k of A[r, k] · B[k, c]. Entries are floats, or pairs of bfloat16 as int32_t, two values of k to an entry. A function of its own, so that the sums stay in registers: inlined into its callers, GCC 12
// keeps them on the stack in some.
template <int N, class E>
static __attribute__((noinline)) void tile(V (&acc)[ROWS][N], const E* a, int64_t lda, const E* b, int64_t ldb, int64_t depth) {
    V sum[ROWS][N];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int c = 0; c < N; c++) sum[r][c] = acc[r][c];
    for (int64_t k = 0; k < depth; k++) {
        decltype(load(b)) column[N];
#pragma GCC unroll 4
        for (int c = 0; c < N; c++) column[c] = load(b + k * ldb + c * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
            auto x = all(a[r * lda + k]);
#pragma GCC unroll 4
            for (int c = 0; c < N; c++) fma(sum[r][c], x, column[c]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int c = 0; c < N; c++) acc[r][c] = sum[r][c];
}

// Calls body(c, strip) for each strip of columns: whole strips first, then single vectors. `body` is a generic lambda that takes the
// number of vectors as std::integral_constant.
template <class Body>
static inline __attribute__((always_inline)) void for_strips(int64_t columns, Body&& body) {
    int64_t c = 0;
    for (; c + STRIP * LANES <= columns; c += STRIP * LANES) body(c, std::integral_constant<int, STRIP>{});
    for (; c < columns; c += LANES) body(c, std::integral_constant<int, 1>{});
}

// Strips of columns as in `for_strips`, but the last one as wide as what is left.
template <class Body>
static inline __attribute__((always_inline)) void for_widths(int64_t columns, Body&& body) {
    int64_t c = 0;
    for (; c + STRIP * LANES <= columns; c += STRIP * LANES) body(c, std::integral_constant<int, STRIP>{});
    int64_t left = (columns - c) / LANES;
    if constexpr (STRIP > 3)
        if (left == 3) body(c, std::integral_constant<int, 3>{});
    if constexpr (STRIP > 2)
        if (left == 2) body(c, std::integral_constant<int, 2>{});
    if (left == 1) body(c, std::integral_constant<int, 1>{});
}

// Computes the vectors of a strip of N that a mask keeps anything of (bits of `live`), by a narrower tile where they are few: calls
// body(s, count) for vectors [s, s + count), in which all live ones are, and dead(s) for each of the others.
template <int N, class Body, class Dead>
static inline __attribute__((always_inline)) void for_live(uint32_t live, Body&& body, Dead&& dead) {
    constexpr int HALF = N / 2;
    if (live == 0) {
        for (int s = 0; s < N; s++) dead(s);
        return;
    }
    if constexpr (N > 1) {
        int first = __builtin_ctz(live), width = 32 - __builtin_clz(live) - first;
        if (width <= HALF) {
            first = std::min(first, N - (width == 1 ? 1 : HALF));
            for (int s = 0; s < first; s++) dead(s);
            if (width == 1)
                body(first, std::integral_constant<int, 1>{});
            else
                body(first, std::integral_constant<int, HALF>{});
            for (int s = first + (width == 1 ? 1 : HALF); s < N; s++) dead(s);
            return;
        }
    }
    body(0, std::integral_constant<int, N>{});
}

// out (ROWS × columns) = factor[r] · out + A · B; without factor, A · B alone
template <class E>
static inline void product_of(float* out, int64_t ldo, const E* a, int64_t lda, const E* b, int64_t ldb, int64_t depth, int64_t columns, const float* factor) {
    for_strips(columns, [&](int64_t c, auto strip) __attribute__((always_inline)) {
        V acc[ROWS][strip.value];
        for (int r = 0; r < ROWS; r++)
            for (int s = 0; s < strip.value; s++) acc[r][s] = factor ? load(out + r * ldo + c + s * LANES) * factor[r] : V{};
        tile<strip.value>(acc, a, lda, b + c, ldb, depth);
        for (int r = 0; r < ROWS; r++)
            for (int s = 0; s < strip.value; s++) store(out + r * ldo + c + s * LANES, acc[r][s]);
    });
}

static inline void product(float* out, int64_t ldo, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, int64_t columns, const float* factor) {
    product_of(out, ldo, a, lda, b, ldb, depth, columns, factor);
}

static const float ONES[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

// The same for any number of rows, a multiple of ROWS; `add` keeps what is in out.
static inline void product_rows(float* out, int64_t ldo, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t rows, int64_t depth, int64_t columns, bool add) {
    for (int64_t r = 0; r < rows; r += ROWS) product(out + r * ldo, ldo, a + r * lda, lda, b, ldb, depth, columns, add ? ONES : nullptr);
}

static inline void transpose(float* out, int64_t ldo, const float* in, int64_t ldi, int64_t rows, int64_t columns) {
    for (int64_t c = 0; c < columns; c += 8)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = c; i < c + 8 && i < columns; i++) out[i * ldo + r] = in[r * ldi + i];
}

static inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
