/* Compiled for CPUs with AVX-512's products of bfloat16 pairs, which some have without AMX. */
#define FLOW_BF16
#include "flow.h"
#include "interface.h"
