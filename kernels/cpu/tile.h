// The register tile: ROWS rows of A times a strip of B, and the products built from it. All matrices are row-major floats.
// Rows come in groups of ROWS (callers pad), columns in whole vectors.

// What a sum of products begins with: 0, what is in the output, or the output times a factor for each row.
enum Start { ZERO, OUT, SCALED };
template <Start START>
static inline __attribute__((always_inline)) V start(const float* out, const float* factor, int r) {
    if (START == ZERO) return V{};
    return START == OUT ? load(out) : load(out) * factor[r];
}

// out[r, c] = what START says + sum over k of A[r, k] · B[k, c], of N vectors of columns. Entries are floats, or hold BF16_DOTS bfloat16, as many values of k to
// an entry. A function of its own, so that the sums stay in registers: inlined into its callers, GCC 12 keeps them on the stack in some.
template <int N, Start START, class E>
static __attribute__((noinline)) void tile(float* out, int64_t ldo, const E* a, int64_t lda, const E* b, int64_t ldb, int64_t depth, const float* factor = nullptr) {
    V sum[ROWS][N];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int c = 0; c < N; c++) sum[r][c] = start<START>(out + r * ldo + c * LANES, factor, r);
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
        for (int c = 0; c < N; c++) store(out + r * ldo + c * LANES, sum[r][c]);
}

#if BF16_DOTS == 4
// The same of four bfloat16 to an entry: two rows and two columns at a time, whose four sums lie in a vector.
template <int N, Start START>
static __attribute__((noinline)) void tile(float* out, int64_t ldo, const Entry* a, int64_t lda, const Entry* b, int64_t ldb, int64_t depth, const float* factor = nullptr) {
    V sum[ROWS / 2][2 * N];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS / 2; r++)
#pragma GCC unroll 4
        for (int c = 0; c < N; c++) {
            const float* at = out + 2 * r * ldo + c * LANES;
            const V x = start<START>(at, factor, 2 * r), y = start<START>(at + ldo, factor, 2 * r + 1);
            sum[r][2 * c] = V{x[0], x[1], y[0], y[1]}, sum[r][2 * c + 1] = V{x[2], x[3], y[2], y[3]};
        }
    for (int64_t k = 0; k < depth; k++) {
        I column[2 * N];
#pragma GCC unroll 4
        for (int c = 0; c < 2 * N; c++) __builtin_memcpy(&column[c], b + k * ldb + c * 2, sizeof(I));
#pragma GCC unroll 16
        for (int r = 0; r < ROWS / 2; r++) {
            typedef Entry Two __attribute__((vector_size(16)));
            const I rows = I(Two{a[2 * r * lda + k], a[(2 * r + 1) * lda + k]});
#pragma GCC unroll 4
            for (int c = 0; c < 2 * N; c++) fma_quads(sum[r][c], rows, column[c]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS / 2; r++)
#pragma GCC unroll 4
        for (int c = 0; c < N; c++) {
            const V x = sum[r][2 * c], y = sum[r][2 * c + 1];
            float* at = out + 2 * r * ldo + c * LANES;
            store(at, V{x[0], x[1], y[0], y[1]}), store(at + ldo, V{x[2], x[3], y[2], y[3]});
        }
}
#endif

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

static const float ONES[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

// out (ROWS × columns) = factor[r] · out + A · B; without factor, A · B alone. With ONES nothing is multiplied by them.
template <class E>
static inline void product_of(float* out, int64_t ldo, const E* a, int64_t lda, const E* b, int64_t ldb, int64_t depth, int64_t columns, const float* factor) {
    for_strips(columns, [&](int64_t c, auto strip) __attribute__((always_inline)) {
        if (!factor)
            tile<strip.value, ZERO>(out + c, ldo, a, lda, b + c, ldb, depth);
        else if (factor == ONES)
            tile<strip.value, OUT>(out + c, ldo, a, lda, b + c, ldb, depth);
        else
            tile<strip.value, SCALED>(out + c, ldo, a, lda, b + c, ldb, depth, factor);
    });
}

static inline void product(float* out, int64_t ldo, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, int64_t columns, const float* factor) {
    product_of(out, ldo, a, lda, b, ldb, depth, columns, factor);
}

// The same for any number of rows, a multiple of ROWS; `add` keeps what is in out.
static inline void product_rows(float* out, int64_t ldo, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t rows, int64_t depth, int64_t columns, bool add) {
    for (int64_t r = 0; r < rows; r += ROWS) product(out + r * ldo, ldo, a + r * lda, lda, b, ldb, depth, columns, add ? ONES : nullptr);
}

// out [columns, ldo] = the columns of `in` [rows, ldi]
static inline void transpose(float* out, int64_t ldo, const float* in, int64_t ldi, int64_t rows, int64_t columns) {
    const int64_t whole_rows = rows / LANES * LANES, whole = columns / LANES * LANES;
    for (int64_t r = 0; r < whole_rows; r += LANES)
        for (int64_t c = 0; c < whole; c += LANES) {
            V square[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) square[i] = load(in + (r + i) * ldi + c);
            turn(square);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) store(out + (c + i) * ldo + r, square[i]);
        }
    for (int64_t c = 0; c < columns; c++)
        for (int64_t r = c < whole ? whole_rows : 0; r < rows; r++) out[c * ldo + r] = in[r * ldi + c];
}

static inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// acc[r][c] += sum over n of A[n, r] · B[n, c], both row-major; or rows [first, most) of that sum alone go to `out`. A function of its own for
// the reason that `tile` is one.
template <int N, bool TO_OUT>
static __attribute__((noinline)) void outer_tile(V (&acc)[ROWS][N], float* out, int64_t ldo, int64_t first, int64_t most, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth) {
    V sum[ROWS][N];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int c = 0; c < N; c++) sum[r][c] = TO_OUT ? V{} : acc[r][c];
    for (int64_t n = 0; n < depth; n++) {
        V column[N];
#pragma GCC unroll 4
        for (int c = 0; c < N; c++) column[c] = load(b + n * ldb + c * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
            V x = all(a[n * lda + r]);
#pragma GCC unroll 4
            for (int c = 0; c < N; c++) fma(sum[r][c], x, column[c]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int c = 0; c < N; c++)
            if (!TO_OUT)
                acc[r][c] = sum[r][c];
            else if (r >= first && r < most)
                store(out + r * ldo + c * LANES, sum[r][c]);
}

// out [rows, columns] = Aᵀ · B, or joins what is there; `columns` need not be whole vectors, those of B are read as if they were. Where A
// has less than ROWS columns, that many are read. `upper`: of the entries below the diagonal some are left out.
static inline void outer_rows(float* out, int64_t ldo, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t rows, int64_t depth, int64_t columns, bool add, bool upper = false) {
    for (int64_t next = 0; next < rows; next += ROWS) {
        int64_t r0 = std::min<int64_t>(next, std::max<int64_t>(rows - ROWS, 0)), from = upper ? r0 / LANES * LANES : 0;
        int64_t first = next - r0, most = std::min<int64_t>(ROWS, rows - r0);  // the last rows once more: nothing past A's end is read
        for_widths(round_up(columns, LANES) - from, [&](int64_t c0, auto strip) __attribute__((always_inline)) {
            V acc[ROWS][strip.value];
            int64_t c = from + c0;
            if (!add && columns % LANES == 0) return outer_tile<strip.value, true>(acc, out + r0 * ldo + c, ldo, first, most, a + r0, lda, b + c, ldb, depth);
            for (int r = 0; r < ROWS; r++)
                for (int s = 0; s < strip.value; s++) {
                    acc[r][s] = V{};
                    int64_t at = c + s * LANES;
                    if (add && r >= first && r < most) __builtin_memcpy(&acc[r][s], out + (r0 + r) * ldo + at, std::min<int64_t>(LANES, columns - at) * 4);
                }
            outer_tile<strip.value, false>(acc, nullptr, 0, 0, 0, a + r0, lda, b + c, ldb, depth);
            for (int64_t r = first; r < most; r++)
                for (int s = 0; s < strip.value; s++) {
                    int64_t at = c + s * LANES;
                    if (at + LANES <= columns)
                        store(out + (r0 + r) * ldo + at, acc[r][s]);
                    else
                        __builtin_memcpy(out + (r0 + r) * ldo + at, &acc[r][s], (columns - at) * 4);
                }
        });
    }
}
