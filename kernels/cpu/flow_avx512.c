/* Compiled for CPUs with AVX-512. */
#include "flow.h"
#include "map.h"
#include "interface.h"
