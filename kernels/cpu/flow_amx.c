#include "flow.h" /* compiled for CPUs with AMX: products in bfloat16 */
