/* Compiled for CPUs with AMX: products in bfloat16. */
#include "flow.h"
#include "interface.h"
