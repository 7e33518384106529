#include "flow.h" /* compiled for CPUs with AVX2 and FMA */
