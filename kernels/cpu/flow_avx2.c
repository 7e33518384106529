/* Compiled for CPUs with AVX2 and FMA. */
#include "flow.h"
#include "map.h"
#include "interface.h"
