// Vectors of LANES floats by the compiler's vector extension: one source for AVX-512, AVX2, NEON and portable code.
// Included inside a target's namespace, after target.h has set LANES.

typedef float V __attribute__((vector_size(LANES * 4)));
typedef int32_t I __attribute__((vector_size(LANES * 4)));

static inline V load(const float* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
static inline I load(const int32_t* p) {
    I v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
static inline void store(float* p, V v) { __builtin_memcpy(p, &v, sizeof v); }
static inline V all(float x) { return x - V{}; }
static inline I all(int32_t x) { return x - I{}; }
static inline V max(V a, V b) { return a > b ? a : b; }
static inline V min(V a, V b) { return a < b ? a : b; }
static inline V select(I mask, V a, V b) { return mask ? a : b; }
static inline V magnitude(V x) { return V(I(x) & 0x7fffffff); }

// acc += x · y. On x86 the form that overwrites the sum is asked for by name: left to itself, GCC 12 picks the one that overwrites a
// factor and then spills half of a register tile in every turn of the inner loop.
static inline __attribute__((always_inline)) void fma(V& acc, V x, V y) {
#if defined(__x86_64__) && LANES > 4
    asm("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(x), "v"(y));
#else
    acc += x * y;
#endif
}

#if BF16_DOTS == 2
typedef int32_t Entry;  // a pair of bfloat16
// The same for pairs of bfloat16: acc += x₀·y₀ + x₁·y₁ in each lane.
static inline __attribute__((always_inline)) void fma(V& acc, I x, I y) { asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(x), "v"(y)); }

// To bfloat16, nearest even.
static inline void store_narrow(uint16_t* p, V v) {
    typedef int16_t H __attribute__((vector_size(LANES * 2)));
    H halves;
    asm("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(v));
    __builtin_memcpy(p, &halves, sizeof halves);
}
#endif

#if BF16_DOTS == 4
typedef int64_t Entry;  // four bfloat16
// Two rows of four bfloat16 times two columns of four, which lie as rows do: acc[2 · r + c] += Σ row r · column c.
static inline __attribute__((always_inline)) void fma_quads(V& acc, I rows, I columns) {
    asm(".arch_extension bf16\n\tbfmmla %0.4s, %1.8h, %2.8h" : "+w"(acc) : "w"(rows), "w"(columns));
}

// To bfloat16, nearest even.
static inline void store_narrow(uint16_t* p, V v) {
    typedef int16_t H __attribute__((vector_size(LANES * 2)));
    H halves;
    asm(".arch_extension bf16\n\tbfcvtn %0.4h, %1.4s" : "=w"(halves) : "w"(v));
    __builtin_memcpy(p, &halves, sizeof halves);
}
#endif

// Lanes folded in halves: the same order of sums on every machine with as many lanes.
typedef float V4 __attribute__((vector_size(16)));
static inline V4 fold(V v, bool sum) {
    V4 part[LANES / 4];
    __builtin_memcpy(part, &v, sizeof v);
    for (int half = LANES / 8; half; half /= 2)
        for (int i = 0; i < half; i++) part[i] = sum ? part[i] + part[i + half] : part[i] > part[i + half] ? part[i] : part[i + half];
    return part[0];
}
static inline float horizontal_max(V v) {
    V4 x = fold(v, false);
    float a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
    return a > b ? a : b;
}
static inline float horizontal_sum(V v) {
    V4 x = fold(v, true);
    return (x[0] + x[2]) + (x[1] + x[3]);
}

// Lanes of a and b, each in blocks of 2 · HALF: the first or the second half of a's block, then that of b's.
template <int HALF, bool SECOND, size_t... LANE_OF>
static inline __attribute__((always_inline)) V halves(V a, V b, std::index_sequence<LANE_OF...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, (LANE_OF % (2 * HALF) < HALF ? LANE_OF + SECOND * HALF : LANES + LANE_OF - !SECOND * HALF)...);
#else
    return __builtin_shuffle(a, b, I{int32_t(LANE_OF % (2 * HALF) < HALF ? LANE_OF + SECOND * HALF : LANES + LANE_OF - !SECOND * HALF)...});
#endif
}
// The horizontal sums of LANES vectors, or their maxima, each in its lane, in the order of `horizontal_sum`.
template <bool SUM = true, int HALF = LANES / 2>
static inline __attribute__((always_inline)) V horizontal_sums(V* v) {
    if constexpr (HALF == 0) {
        return v[0];
    } else {
        const auto lanes = std::make_index_sequence<LANES>{};
#pragma GCC unroll 8
        for (int i = 0; i < HALF; i++) {
            const V first = halves<HALF, false>(v[i], v[i + HALF], lanes), second = halves<HALF, true>(v[i], v[i + HALF], lanes);
            v[i] = SUM ? first + second : max(first, second);
        }
        return horizontal_sums<SUM, HALF / 2>(v);
    }
}
static inline __attribute__((always_inline)) V horizontal_maxima(V* v) { return horizontal_sums<false>(v); }

// LANES vectors as the rows of a square become its columns.
template <int HALF = LANES / 2>
static inline __attribute__((always_inline)) void turn(V* v) {
    if constexpr (HALF > 0) {
        const auto lanes = std::make_index_sequence<LANES>{};
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            if (i & HALF) continue;
            const V x = v[i], y = v[i + HALF];
            v[i] = halves<HALF, false>(x, y, lanes), v[i + HALF] = halves<HALF, true>(x, y, lanes);
        }
        turn<HALF / 2>(v);
    }
}

// 2^x to 2 ulp; exactly 0 below 2^-126, NaN for NaN.
// The polynomial is the truncated series refitted on [-1/2, 1/2].
static inline V exp2(V x) {
    const float MAGIC = 12582912.f + 127;  // 1.5 · 2^23: adding it rounds to the nearest integer, and its last bits are then the exponent's
    V shifted = x + MAGIC;
    V f = x - (shifted - MAGIC);
    V p = all(1.535336188319500e-4f);
    p = p * f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1.f;
    I bits;
    __builtin_memcpy(&bits, &shifted, sizeof bits);
    bits <<= 23;
    V power;
    __builtin_memcpy(&power, &bits, sizeof power);
    return x < all(-126.f) ? V{} : p * power;  // below, `power` may be anything
}

static const float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
static const float NEVER = -1e30f;  // in place of -inf where a difference of two must not be NaN
