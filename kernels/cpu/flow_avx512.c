#include "flow.h" /* compiled for CPUs with AVX-512 */
