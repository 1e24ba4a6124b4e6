// The plain C functions that Python calls. Each picks the code for an instruction set and returns 0, or 1 when memory runs out.
#include <cstddef>
#include <new>

#include "problem.h"

#if WITH_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if WITH_BFMMLA
#include <sys/auxv.h>
#endif

#ifndef DIT_ACCEL_SOURCES  // the fingerprint of the sources, from the build
#define DIT_ACCEL_SOURCES "unknown"
#endif

#define TARGET_OF(name)                  \
    namespace name {                     \
    void forward(const Problem&);        \
    void backward(const Problem&);       \
    void select_blocks(const Selection&); \
    void summarize(const Summary&);      \
    void summarize_backward(const Summary&); \
    void mix_slopes(const Mixture&);     \
    void mix_slopes_backward(const Mixture&); \
    void group_units(const Grouping&);   \
    void group_units_backward(const Grouping&); \
    }
TARGET_OF(portable)
#if defined(__x86_64__)
TARGET_OF(avx2)
TARGET_OF(avx512)
TARGET_OF(avx512bf16)
#if WITH_AMX
TARGET_OF(amx)
#endif
#endif
#if WITH_BFMMLA
TARGET_OF(bfmmla)
#endif

enum Target { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AVX512_BF16 = 3, AMX = 4 };
enum ArmTarget { BFMMLA = 1 };  // PORTABLE there, too

template <class Argument>
static int run(void (*function)(const Argument&), const Argument* argument) {
    try {
        function(*argument);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

#if WITH_AMX
#define BY_TILES(function, others) (target == AMX ? amx::function : (others))
#else
#define BY_TILES(function, others) (others)
#endif
#if defined(__x86_64__)
#define CHOOSE(function) BY_TILES(function, target == AVX512_BF16 ? avx512bf16::function : target == AVX512 ? avx512::function : target == AVX2 ? avx2::function : portable::function)
#elif WITH_BFMMLA
#define CHOOSE(function) (target == BFMMLA ? bfmmla::function : portable::function)
#else
#define CHOOSE(function) (static_cast<void>(target), portable::function)
#endif

#if WITH_AMX
// Whether the CPU has AMX and the system lets this process use it: asked once, as a process that has the permission keeps it.
static bool amx_permitted() {
    static const bool permitted = [] {
        const unsigned SAVED = 1u << 27, BF16 = 1u << 22, TILE = 1u << 24;  // OSXSAVE in ecx of leaf 1, the others in edx of leaf 7
        unsigned a, b, c, d;
        if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & SAVED)) return false;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & BF16) || !(d & TILE)) return false;
        unsigned states, upper;
        asm volatile("xgetbv" : "=a"(states), "=d"(upper) : "c"(0));
        const unsigned TILES = 3u << 17;  // the tiles' configuration and data, which the system saves
        const long REQUEST = 0x1023, DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA of Linux' asm/prctl.h
        return (states & TILES) == TILES && syscall(SYS_arch_prctl, REQUEST, DATA) == 0;
    }();
    return permitted;
}
#endif

// The structs as the compiler laid them out, for Python to compare with its own; a null name ends each table.
struct Field {
    const char* name;
    int64_t offset, size;
};
#define FIELD(name) {#name, offsetof(STRUCT, name), sizeof(STRUCT::name)}
#define END {nullptr, 0, sizeof(STRUCT)}

#define STRUCT Rows
static const Field ROWS[] = {FIELD(data), FIELD(batch), FIELD(head), FIELD(row), FIELD(bf16), FIELD(unused), END};
#undef STRUCT

#define STRUCT Problem
static const Field PROBLEM[] = {
    FIELD(batch), FIELD(heads), FIELD(channels), FIELD(image_q), FIELD(image_k), FIELD(q_blocks), FIELD(k_blocks), FIELD(list_width),
    FIELD(lists_per_head), FIELD(extra), FIELD(n_windows), FIELD(pools), FIELD(pool_width), FIELD(q), FIELD(k), FIELD(v), FIELD(lists), FIELD(counts), FIELD(full),
    FIELD(q_starts), FIELD(k_starts), FIELD(coords), FIELD(q_width), FIELD(k_width), FIELD(text), FIELD(text_first),
    FIELD(scale), FIELD(text_q), FIELD(windows), FIELD(residues), FIELD(masks), FIELD(masks_t), FIELD(mask_of), FIELD(places_q),
    FIELD(places_k), FIELD(extra_k), FIELD(extra_v), FIELD(pooled_k), FIELD(pooled_v),
    FIELD(pooled_bias), FIELD(pooled_var), FIELD(slopes), FIELD(pool_lists), FIELD(pool_counts), FIELD(pool_slots), FIELD(far_states), FIELD(offset), FIELD(weight), FIELD(bias), FIELD(text_bias), FIELD(rest),
    FIELD(feature_map), FIELD(log_count), FIELD(variance), FIELD(linear_all), FIELD(residual), FIELD(pool_parts), FIELD(cap), FIELD(out), FIELD(lse),
    FIELD(threads), FIELD(dout), FIELD(dlse), FIELD(dq), FIELD(dk), FIELD(dv), FIELD(dextra_k), FIELD(dextra_v), FIELD(dpooled_k), FIELD(dpooled_v),
    FIELD(dpooled_bias), FIELD(dpooled_var), FIELD(dslopes), FIELD(dfar_states), FIELD(doffset),
    FIELD(dweight), FIELD(dbias), END,
};
#undef STRUCT

#define STRUCT Selection
static const Field SELECTION[] = {
    FIELD(batch), FIELD(heads), FIELD(channels), FIELD(q_blocks), FIELD(k_blocks), FIELD(q), FIELD(k), FIELD(q_starts), FIELD(k_starts),
    FIELD(q_width), FIELD(k_width), FIELD(top), FIELD(weight), FIELD(bias), FIELD(places_q), FIELD(places_k), FIELD(v), FIELD(scale), FIELD(score_cap), FIELD(chosen), FIELD(threads), END,
};
#undef STRUCT

#define STRUCT Summary
static const Field SUMMARY[] = {
    FIELD(batch), FIELD(heads), FIELD(channels), FIELD(q_blocks), FIELD(k_blocks), FIELD(q), FIELD(k), FIELD(v), FIELD(q_starts), FIELD(k_starts),
    FIELD(q_width), FIELD(k_width), FIELD(parts), FIELD(text), FIELD(text_q), FIELD(text_first), FIELD(scale), FIELD(cap), FIELD(score_cap),
    FIELD(log_count), FIELD(first_order), FIELD(places_q), FIELD(places_k), FIELD(q_mean), FIELD(k_mean), FIELD(score_bias), FIELD(pooled_k),
    FIELD(pooled_v), FIELD(pooled_bias), FIELD(slope), FIELD(second), FIELD(metric), FIELD(tokens), FIELD(spread), FIELD(v_spread), FIELD(part), FIELD(threads),
    FIELD(dq_mean), FIELD(dpooled_k), FIELD(dpooled_v), FIELD(dpooled_bias), FIELD(dslope), FIELD(dsecond), FIELD(dspread), FIELD(dq), FIELD(dk), FIELD(dv), END,
};
#undef STRUCT

#define STRUCT Mixture
static const Field MIXTURE[] = {
    FIELD(batch), FIELD(heads), FIELD(channels), FIELD(mixtures), FIELD(units), FIELD(weight), FIELD(slope), FIELD(out), FIELD(threads),
    FIELD(dout), FIELD(dweight), FIELD(dslope), END,
};
#undef STRUCT

#define STRUCT Grouping
static const Field GROUPING[] = {
    FIELD(batch), FIELD(heads), FIELD(channels), FIELD(q_blocks), FIELD(k_blocks), FIELD(slots), FIELD(list_width), FIELD(lists_per_head),
    FIELD(width), FIELD(q_mean), FIELD(pooled_k), FIELD(pooled_v), FIELD(slope), FIELD(second), FIELD(metric), FIELD(tokens), FIELD(spread),
    FIELD(v_spread), FIELD(lists), FIELD(counts), FIELD(place), FIELD(q_starts), FIELD(parts), FIELD(roots), FIELD(opened), FIELD(scale),
    FIELD(cap), FIELD(score_cap), FIELD(log_count), FIELD(joined_k), FIELD(joined_v), FIELD(joined_bias), FIELD(slopes), FIELD(pool_lists),
    FIELD(pool_counts), FIELD(above), FIELD(joined_tokens), FIELD(joined_spread), FIELD(shares), FIELD(part), FIELD(threads),
    FIELD(djoined_k), FIELD(djoined_v), FIELD(djoined_bias), FIELD(dslopes), FIELD(dq_mean), FIELD(dpooled_k), FIELD(dpooled_v),
    FIELD(dslope), FIELD(dsecond), FIELD(dspread), END,
};
#undef STRUCT

extern "C" {
const char* dit_accel_sources() { return DIT_ACCEL_SOURCES; }
const Field* dit_accel_rows_fields() { return ROWS; }
const Field* dit_accel_problem_fields() { return PROBLEM; }
const Field* dit_accel_selection_fields() { return SELECTION; }
const Field* dit_accel_summary_fields() { return SUMMARY; }
const Field* dit_accel_mixture_fields() { return MIXTURE; }
const Field* dit_accel_grouping_fields() { return GROUPING; }
// The best target that this CPU runs.
int dit_accel_best_target() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
#if WITH_AMX
        if (__builtin_cpu_supports("avx512bf16") && amx_permitted()) return AMX;
#endif
        return __builtin_cpu_supports("avx512bf16") ? AVX512_BF16 : AVX512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
#if WITH_BFMMLA
    const unsigned long HAS_BF16 = 1ul << 14;  // HWCAP2_BF16, which older headers lack
    if (getauxval(AT_HWCAP2) & HAS_BF16) return BFMMLA;
#endif
    return PORTABLE;
}
int dit_accel_forward(const Problem* problem, int target) { return run(CHOOSE(forward), problem); }
int dit_accel_backward(const Problem* problem, int target) { return run(CHOOSE(backward), problem); }
int dit_accel_select(const Selection* selection, int target) { return run(CHOOSE(select_blocks), selection); }
int dit_accel_summarize(const Summary* summary, int target) { return run(CHOOSE(summarize), summary); }
int dit_accel_summarize_backward(const Summary* summary, int target) { return run(CHOOSE(summarize_backward), summary); }
int dit_accel_mix_slopes(const Mixture* mixture, int target) { return run(CHOOSE(mix_slopes), mixture); }
int dit_accel_mix_slopes_backward(const Mixture* mixture, int target) { return run(CHOOSE(mix_slopes_backward), mixture); }
int dit_accel_group_units(const Grouping* grouping, int target) { return run(CHOOSE(group_units), grouping); }
int dit_accel_group_units_backward(const Grouping* grouping, int target) { return run(CHOOSE(group_units_backward), grouping); }
}
