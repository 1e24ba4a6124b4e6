// For CPUs with AMX, Intel's matrix unit, for bfloat16 under Linux; empty elsewhere.
#include "common.h"
#if WITH_AMX
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC warns of values that its own intrinsics leave undefined on purpose
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,fma")
#endif
#define TARGET amx
#define LANES 16
#define ROWS 6
#define BF16_DOTS 0
#define AMX 1
#define STRIP 4
#include "target.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
