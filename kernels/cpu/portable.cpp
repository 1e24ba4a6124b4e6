// For any CPU: 128-bit vectors, which every compiler maps to what there is.
#include "common.h"
#define TARGET portable
#define LANES 4
#define ROWS 4
#define BF16_DOTS 0
#define AMX 0
#define STRIP 2
#include "target.h"
