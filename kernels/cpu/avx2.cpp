// For CPUs with AVX2; empty elsewhere.
#if defined(__x86_64__)
#include "common.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define TARGET avx2
#define LANES 8
#define ROWS 6
#define BF16_DOTS 0
#define AMX 0
#define STRIP 2
#include "target.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
