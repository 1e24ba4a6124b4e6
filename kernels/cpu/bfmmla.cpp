// For arm64 CPUs with products of bfloat16 matrices (bfmmla), under Linux; empty elsewhere.
#include "common.h"
#if WITH_BFMMLA
#define TARGET bfmmla
#define LANES 4
#define ROWS 8
#define BF16_DOTS 4
#define AMX 0
#define STRIP 2
#include "target.h"
#endif
