// The plain C functions that Python calls. Each picks the code for an instruction set and returns 0, or 1 when memory runs out.
#include <new>

#include "problem.h"

#define TARGET_OF(name)                  \
    namespace name {                     \
    void forward(const Problem&);        \
    void backward(const Problem&);       \
    void select_blocks(const Selection&); \
    }
TARGET_OF(portable)
#if defined(__x86_64__)
TARGET_OF(avx2)
TARGET_OF(avx512)
TARGET_OF(avx512bf16)
#endif

enum Target { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AVX512_BF16 = 3 };

template <class Argument>
static int run(void (*function)(const Argument&), const Argument* argument) {
    try {
        function(*argument);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

#if defined(__x86_64__)
#define CHOOSE(function) (target == AVX512_BF16 ? avx512bf16::function : target == AVX512 ? avx512::function : target == AVX2 ? avx2::function : portable::function)
#else
#define CHOOSE(function) (static_cast<void>(target), portable::function)
#endif

extern "C" {
// The best target that this CPU runs.
int dit_accel_best_target() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return __builtin_cpu_supports("avx512bf16") ? AVX512_BF16 : AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
    return PORTABLE;
}
int dit_accel_forward(const Problem* problem, int target) { return run(CHOOSE(forward), problem); }
int dit_accel_backward(const Problem* problem, int target) { return run(CHOOSE(backward), problem); }
int dit_accel_select(const Selection* selection, int target) { return run(CHOOSE(select_blocks), selection); }
int64_t dit_accel_problem_size() { return sizeof(Problem); }
int64_t dit_accel_selection_size() { return sizeof(Selection); }
}
