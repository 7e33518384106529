/* Compiled for CPUs with AMX: products in bfloat16. */
#define FLOW_AMX
#define FLOW_BF16
#include "flow.h"
#include "interface.h"
