/* AMX's tile registers and their product of bfloat16, in C: for CPUs without them. One configuration, all tiles whole. */

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_loadconfig
#undef _tile_storeconfig
#define _tile_loadd emulated_load
#define _tile_stored emulated_store
#define _tile_dpbf16ps emulated_product
#define _tile_loadconfig(from) ((void)(from))
#define _tile_storeconfig(to) memset(to, 0, 64)

static __thread char emulated_tiles[8][16][64];

static void emulated_load(int tile, const void *from, int64_t line) {
    for (int row = 0; row < 16; row++) memcpy(emulated_tiles[tile][row], (const char *)from + row * line, 64);
}

static void emulated_store(int tile, void *to, int64_t line) {
    for (int row = 0; row < 16; row++) memcpy((char *)to + row * line, emulated_tiles[tile][row], 64);
}

/* Rows of bfloat16, widened. */
static void emulated_numbers(int tile, float numbers[16][32]) {
    for (int row = 0; row < 16; row++)
        for (int place = 0; place < 32; place++) {
            uint16_t high;
            memcpy(&high, &emulated_tiles[tile][row][2 * place], 2);
            uint32_t bits = (uint32_t)high << 16;
            memcpy(&numbers[row][place], &bits, 4);
        }
}

static void __attribute__((no_sanitize("address", "undefined"))) emulated_product(int sums, int left, int right) {
    float a[16][32], b[16][32], sum[16][16];
    emulated_numbers(left, a);
    emulated_numbers(right, b);
    memcpy(sum, emulated_tiles[sums], sizeof(sum));
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 32; k++)
            for (int column = 0; column < 16; column++) sum[row][column] += a[row][k] * b[k / 2][2 * column + k % 2];
    memcpy(emulated_tiles[sums], sum, sizeof(sum));
}
