// For CPUs with AVX-512 and its bfloat16 dot products; empty elsewhere.
#if defined(__x86_64__)
#include "common.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#endif
#define TARGET avx512bf16
#define LANES 16
#define ROWS 6
#define BF16_DOTS 2
#define AMX 0
#define STRIP 4
#include "target.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
