/* A folded decoder on a CPU: all coupling blocks in one call, every epilogue inside its product.

   `flow.run_flow` says what is computed, `weights` what the symbols mean, `cpu_flow` packs the arguments. Rows lie in
   panels: a panel is ROWS = 2 vectors of rows, stored as (features, ROWS), so that a vector holds one feature of
   several rows. A tile is OUTPUTS outputs of one panel, its sums in registers while the inputs pass by; then its
   epilogue works on vectors of rows whatever multiplied them. Weights are packed in groups of OUTPUTS; the last group,
   and every buffer, is filled up with zeros.

   Many rows: every thread takes chunks of panels through all blocks and waits for nobody. Few rows: all threads share
   one chunk, each with its share of the tiles of a phase, and meet between phases.

   One source for every instruction set: the compiler's flags decide, and for bfloat16 FLOW_BF16, by its products of
   pairs, and FLOW_AMX with it. What differs is `operand`, float32 or bfloat16, and
   how operands are multiplied: see "Products". Sums, epilogues and the state are float32, what is added up per row
   float64. Where so many digits are wanted of a soft permutation in bfloat16, its matrices and the state that they meet
   come in two parts, an operand and what rounding to it left. Symbols of OpenMP are those of the library that PyTorch
   has loaded. */

#include <omp.h>
#include <string.h>

#include "vectors.h"

#if defined(FLOW_AMX)
#define OUTPUTS 32
#define INPUTS_TOGETHER 32
#elif defined(FLOW_BF16)
#define OUTPUTS 14
#define INPUTS_TOGETHER 2
#elif defined(__AVX512F__)
#define OUTPUTS 14
#define INPUTS_TOGETHER 1
#else
#define OUTPUTS 6
#define INPUTS_TOGETHER 1
#endif
#define ROWS (2 * VECTOR)
#define LN_2_PI 1.8378770664093454836

#define ALONE static __attribute__((noinline)) /* so that nothing around it takes its registers */
#define EVERY_OUTPUT for (int o = 0; o < OUTPUTS; o++)
#define EVERY_VECTOR for (int r = 0; r < 2; r++)

typedef struct { vec at[OUTPUTS][2]; } tile;

#if defined(FLOW_BF16)
typedef uint16_t operand; /* bfloat16; of a panel, features in pairs: (features / 2, ROWS, 2) */
#else
typedef float operand;
#endif
#define INPUTS(count) (((count) + INPUTS_TOGETHER - 1) / INPUTS_TOGETHER * INPUTS_TOGETHER)

/* Numbers and packed weights of a decoder; `cpu_library.Decoder` has the same fields in the same order.
   A matrix of block b starts b times its own size after its pointer; so does a vector, padded to whole groups. */
typedef struct {
    size blocks, passive, active, hidden, condition, softplus, hard, matrices, parts;
    double clamp, log_scale;
    const operand *w1, *w1_condition, *w2_scale, *w2_shift;
    const float *b1, *b2_scale, *b2_shift;
    /* soft permutations: the first `matrices` blocks by a matrix in four quarters, the others by a rotation; a matrix
       has its `parts`, 1 or 2, one after the other */
    const operand *passive_by_passive, *passive_by_active, *active_by_passive, *active_by_active;
    const float *passive_offset, *active_offset;
    const operand *v, *w, *output, *passive_output;
    const float *v_offset, *w_offset, *cosine, *sine;
    /* hard permutations: active indices of a last, incomplete group point at feature D, which is always 0 */
    const int32_t *passive_index, *active_index, *order;
    const float *gain, *gain_rest, *shift, *output_gain, *output_gain_rest, *output_shift;
} decoder;

/* Where rows come from and go to. Row n is image n / (height width), line and column by the rest; loose rows are images
   of one pixel. Strides are in elements. Tables are (blocks, padded hidden, table_rows or table_columns). */
typedef struct {
    const float *features, *condition;
    size rows, height, width, stride_image, stride_feature, stride_line, stride_column, stride_condition;
    const float *by_row, *by_column;
    size table_rows, table_columns;
    float *log_prob, *log_det, *u;
    char *memory; /* see cflow_fast_flow_memory */
    size threads, chunk_panels;
} task;

INLINE size groups_of(size outputs) { return (outputs + OUTPUTS - 1) / OUTPUTS; }
INLINE size padded(size outputs) { return groups_of(outputs) * OUTPUTS; }
/* Products. `multiply` adds those of one group of outputs with a panel of `inputs` features to a tile. `next`: memory
   to fetch meanwhile, `step` bytes for every input. `keep` stores two features of a panel as operands. */

#if defined(FLOW_AMX)

/* Weights: (groups, inputs / 32, OUTPUTS, 32). Four tile registers of 16 outputs by 16 rows are the sums. */
ALONE void multiply(tile *sums, const operand *weights, const operand *x, size inputs, const char *next, size step) {
    float *at = (float *)sums;
    const size line = sizeof(vec) * 2, below = ROWS * VECTOR;
    _tile_loadd(0, at, line);
    _tile_loadd(1, at + VECTOR, line);
    _tile_loadd(2, at + below, line);
    _tile_loadd(3, at + below + VECTOR, line);
    for (size k = 0; k < inputs; k += 32) {
        _tile_loadd(4, weights + k * OUTPUTS, 64);
        _tile_loadd(6, x + k * ROWS, line);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, x + k * ROWS + 2 * VECTOR, line);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, weights + k * OUTPUTS + 16 * 32, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        for (size byte = 0; byte < 32 * step; byte += 64) __builtin_prefetch(next + k * step + byte, 0, 2);
    }
    _tile_stored(0, at, line);
    _tile_stored(1, at + VECTOR, line);
    _tile_stored(2, at + below, line);
    _tile_stored(3, at + below + VECTOR, line);
}

typedef struct { uint8_t palette, row, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } tile_config;

static const tile_config eight_whole_tiles = {
    .palette = 1, .bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};

/* Another library may rely on the configuration that a thread has. */
#define PREPARE_UNITS                                                                                         \
    tile_config before;                                                                                       \
    _tile_storeconfig(&before);                                                                               \
    _tile_loadconfig(&eight_whole_tiles);
#define RESTORE_UNITS _tile_loadconfig(&before);

#else

#define UNROLLED _Pragma("GCC unroll 14") /* sums stay in registers only where no index is left */

#define PREPARE_UNITS
#define RESTORE_UNITS

#if defined(FLOW_BF16)
#define INPUTS_AT_ONCE inputs /* what operands lose is far more */

INLINE vec with_product(vec sum, vec weight, vec x) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weight, (__m512bh)x);
}
#else
/* So many products are added up before they join the others: long sums in float32 lose digits. */
#define INPUTS_AT_ONCE 128

INLINE vec with_product(vec sum, vec weight, vec x) { return sum + weight * x; }
#endif

/* Weights: (groups, inputs / INPUTS_TOGETHER, OUTPUTS, INPUTS_TOGETHER). Two vectors of the panel, of one feature or of
   a pair of them, meet one broadcast weight, or pair, per output. */
ALONE void multiply(tile *sums, const operand *weights, const operand *x, size inputs, const char *next, size step) {
    for (size first = 0; first < inputs; first += INPUTS_AT_ONCE) {
        size end = first + INPUTS_AT_ONCE < inputs ? first + INPUTS_AT_ONCE : inputs;
        vec t[OUTPUTS][2];
        UNROLLED EVERY_OUTPUT UNROLLED EVERY_VECTOR t[o][r] = (vec){0};
        for (size k = first; k < end; k += INPUTS_TOGETHER) {
            const float *now = (const void *)(x + k * ROWS), *weight = (const void *)(weights + k * OUTPUTS);
            vec x0 = load(now), x1 = load(now + VECTOR);
            __builtin_prefetch(now + 8 * ROWS);
            __builtin_prefetch(now + 8 * ROWS + VECTOR);
            __builtin_prefetch(next + k * step, 0, 2);
            UNROLLED EVERY_OUTPUT {
                vec all_rows = all(weight[o]);
                t[o][0] = with_product(t[o][0], all_rows, x0);
                t[o][1] = with_product(t[o][1], all_rows, x1);
            }
        }
        UNROLLED EVERY_OUTPUT UNROLLED EVERY_VECTOR sums->at[o][r] += t[o][r];
    }
}

#endif

#if defined(FLOW_BF16)

INLINE __m512i as_bf16(vec x) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)); }

/* What rounding to an operand leaves. */
INLINE vec beyond_operand(vec x) { return x - (vec)_mm512_slli_epi32(as_bf16(x), 16); }

INLINE void keep(operand *panel, size feature, const vec first[2], const vec second[2]) {
    EVERY_VECTOR {
        __m512i pairs = _mm512_or_si512(as_bf16(first[r]), _mm512_slli_epi32(as_bf16(second[r]), 16));
        _mm512_store_si512(panel + feature * ROWS + r * ROWS, pairs);
    }
}

#else

INLINE vec beyond_operand(vec x) { return 0.0f * x; } /* nobody asks: parts is 1 */

INLINE void keep(operand *panel, size feature, const vec first[2], const vec second[2]) {
    EVERY_VECTOR store(panel + feature * ROWS + r * VECTOR, first[r]);
    EVERY_VECTOR store(panel + (feature + 1) * ROWS + r * VECTOR, second[r]);
}

#endif

/* Tiles. */

INLINE void put(operand *panel, size feature, const tile *t) {
    for (int o = 0; o < OUTPUTS; o += 2) keep(panel, feature + o, t->at[o], t->at[o + 1]);
}

/* In its parts, the second one `half` features after the first. */
INLINE void put_parts(operand *panel, size feature, const tile *t, size parts, size half) {
    put(panel, feature, t);
    if (parts == 1) return;
    tile rest;
    EVERY_OUTPUT EVERY_VECTOR rest.at[o][r] = beyond_operand(t->at[o][r]);
    put(panel, half + feature, &rest);
}

INLINE void put_state(float *to, const tile *t) {
    EVERY_OUTPUT EVERY_VECTOR store(to + o * ROWS + r * VECTOR, t->at[o][r]);
}

INLINE void fill(tile *t, const float *per_output) {
    EVERY_OUTPUT EVERY_VECTOR t->at[o][r] = all(per_output[o]);
}

INLINE void add_to(double *totals, const vec sum[2]) {
    for (int i = 0; i < ROWS; i++) totals[i] += sum[i / VECTOR][i % VECTOR];
}

/* How the rows of one panel find their positional bias. */
typedef enum { ONE_LINE, SMALL_MAP, ANY_MAP } lookup;
typedef struct { ivec line[2], column[2]; } positions;

/* What a team keeps between phases: features of a chunk's panels, each with its features padded to whole groups. */
typedef struct {
    const decoder *d;
    const task *io;
    size first, panels;      /* of the chunk */
    size member, members;    /* of the team */
    size half, width, state; /* padded: of a half, of the hidden layer; of the whole state with hard permutations */
    size kept;               /* of a half in all its parts */
    operand *x1, *next_x1, *hidden, *y2, *mixed, *condition;
    float *passive, *x2, *v; /* x1 before the first block and after the last; x2; or both where they stay */
    double *log_dets, *norms;          /* (members, chunk_panels, ROWS) */
    positions *places;                 /* of every panel */
    lookup how;
} team;

/* Lay out a team's memory, 64 bytes aligned; returns its end. */
static char *lay_out(team *t, char *memory) {
    const decoder *d = t->d;
    size panels = t->io->chunk_panels;
    int soft = !d->hard;
    t->half = padded(d->passive);
    t->width = padded(d->hidden);
    t->kept = d->parts * t->half;
    t->state = d->hard ? padded(d->passive + d->active) + OUTPUTS : 0;
#define TAKE(field, features)                                                                                 \
    t->field = (void *)memory;                                                                                \
    memory += (sizeof(*t->field) * panels * (features) * ROWS + 63) / 64 * 64
    TAKE(x1, t->kept);
    TAKE(next_x1, soft * t->kept);
    TAKE(hidden, t->width);
    TAKE(y2, soft * t->kept);
    TAKE(mixed, soft * t->kept);
    TAKE(condition, padded(d->condition));
    TAKE(passive, soft * t->half);
    TAKE(x2, soft * t->half);
    TAKE(v, t->state);
    TAKE(log_dets, t->members);
    TAKE(norms, t->members);
#undef TAKE
    t->log_dets += t->member * panels * ROWS;
    t->norms += t->member * panels * ROWS;
    t->places = (void *)memory;
    return memory + sizeof(positions) * panels;
}

INLINE void meet(const team *t) {
    if (t->members > 1) {
#pragma omp barrier
    }
}

/* This member's share of the tiles of a phase with so many groups: those of one group, all panels, follow each other,
   so that its weights are read from memory once. `g` and `p` are a tile's group and panel. */
#define EVERY_TILE(groups)                                                                                    \
    for (size tiles = (groups) * t->panels, now = tiles * t->member / t->members,                             \
              end = tiles * (t->member + 1) / t->members, g, p;                                               \
         now < end && (g = now / t->panels, p = now % t->panels, 1); now++)

#define WEIGHTS(family, block, outputs, inputs) (family) + ((block) * groups_of(outputs) + g) * OUTPUTS * INPUTS(inputs)
#define WEIGHT_BYTES(inputs) ((inputs) * OUTPUTS * (size)sizeof(operand))
/* The weights of the next group, a share with every panel. */
#define NEXT(weights, inputs)                                                                                 \
    (const char *)(weights) + WEIGHT_BYTES(INPUTS(inputs)) + p * WEIGHT_BYTES(inputs) / t->panels, WEIGHT_BYTES(1) / t->panels
#define PANEL(buffer, features) ((buffer) + p * (features) * ROWS)
#define GROUP(buffer, features) (PANEL(buffer, features) + g * OUTPUTS * ROWS)

INLINE void add_positions(tile *a, const team *t, size block, size g, size p) {
    const task *io = t->io;
    const float *rows = io->by_row + (block * t->width + g * OUTPUTS) * io->table_rows;
    const float *columns = io->by_column + (block * t->width + g * OUTPUTS) * io->table_columns;
    const positions *at = t->places + p;
    EVERY_VECTOR {
        ivec line = at->line[r], column = at->column[r];
        size first_line = line[0], first_column = column[0];
        EVERY_OUTPUT {
            const float *row = rows + o * io->table_rows, *col = columns + o * io->table_columns;
            switch (t->how) {
            case ONE_LINE:
                a->at[o][r] = all(row[first_line]) + *(const loose *)(col + first_column);
                break;
            case SMALL_MAP:
                a->at[o][r] = pick(*(const loose *)row, line) + pick(*(const loose *)col, column);
                break;
            default: /* ANY_MAP */
                a->at[o][r] = gather(row, line) + gather(col, column);
            }
        }
    }
}

/* A: hidden = act(w1 x1 + bias). */
static void first_layer(const team *t, size block) {
    const decoder *d = t->d;
    const task *io = t->io;
    EVERY_TILE(groups_of(d->hidden)) {
        tile a;
        const operand *weights = WEIGHTS(d->w1, block, d->hidden, d->passive);
        if (io->by_row)
            add_positions(&a, t, block, g, p);
        else
            fill(&a, d->b1 + block * t->width + g * OUTPUTS);
        if (io->condition)
            multiply(&a, WEIGHTS(d->w1_condition, block, d->hidden, d->condition),
                     PANEL(t->condition, padded(d->condition)), d->condition, (const char *)weights, 0);
        multiply(&a, weights, PANEL(t->x1, t->kept), d->passive, NEXT(weights, d->passive));
        if (d->softplus)
            EVERY_OUTPUT EVERY_VECTOR a.at[o][r] = softplus(a.at[o][r]);
        else
            EVERY_OUTPUT EVERY_VECTOR a.at[o][r] = at_least(a.at[o][r], 0.0f);
        put(PANEL(t->hidden, t->width), g * OUTPUTS, &a);
    }
}

/* x gain + shift; rest is what rounding left of the gain. */
INLINE twofold scaled(vec x, float gain, float rest, float shift) {
    vec sum = fused(x, all(gain), all(shift)), product = sum - shift;
    return (twofold){sum, fused(x, all(gain), -product) + (rest * x - ((sum - product) - shift))};
}

/* x e^j + t. In float32 with one rounding in all: far from what a decoder was trained on every block multiplies by much
   the same e^clamp, and what that loses, as what clamp itself loses, would add up from block to block. */
INLINE vec coupled(twofold x, vec s, double clamp, vec t, vec *j) {
    float rounded = (float)clamp;
    if (sizeof(operand) != sizeof(float)) {
        *j = rounded * hyperbolic_tangent(s);
        return x.high * exponential(*j) + t;
    }
    twofold bounded = precise_hyperbolic_tangent(s);
    *j = rounded * bounded.high;
    vec rest = fused(all(rounded), bounded.high, -*j) + (float)(clamp - rounded) * bounded.high;
    twofold e = precise_exponential((twofold){*j, rest + rounded * bounded.low});
    return fused(x.high, e.high, t + (x.high * e.low + x.low * e.high));
}

/* B: j = clamp tanh(s); y2 = x2 e^j + t; log_det += sum of j. */
static void coupling(const team *t, size block) {
    const decoder *d = t->d;
    const float *gain = d->gain + block * t->half, *shift = d->shift + block * t->half;
    const float *rest = d->gain_rest + block * t->half;
    const int32_t *index = d->active_index + block * t->half;
    EVERY_TILE(groups_of(d->active)) {
        tile y, s;
        size at = (block * groups_of(d->active) + g) * OUTPUTS;
        const operand *hidden = PANEL(t->hidden, t->width);
        const operand *to_shift = WEIGHTS(d->w2_shift, block, d->active, d->hidden);
        const operand *to_scale = WEIGHTS(d->w2_scale, block, d->active, d->hidden);
        float *v = PANEL(t->v, t->state), *x2 = GROUP(t->x2, t->half);
        fill(&y, d->b2_shift + at);
        multiply(&y, to_shift, hidden, d->hidden, NEXT(to_shift, d->hidden));
        fill(&s, d->b2_scale + at);
        multiply(&s, to_scale, hidden, d->hidden, NEXT(to_scale, d->hidden));
        vec sum[2] = {{0}, {0}};
        for (int o = 0; o < OUTPUTS; o++) {
            size f = g * OUTPUTS + o;
            EVERY_VECTOR {
                vec j;
                twofold x = d->hard ? scaled(load(v + index[f] * ROWS + r * VECTOR), gain[f], rest[f], shift[f])
                                    : (twofold){load(x2 + o * ROWS + r * VECTOR), all(0.0f)};
                y.at[o][r] = coupled(x, s.at[o][r], d->clamp, y.at[o][r], &j);
                sum[r] += j;
            }
        }
        add_to(PANEL(t->log_dets, 1), sum);
        if (d->hard)
            for (int o = 0; o < OUTPUTS; o++)
                EVERY_VECTOR store(v + index[g * OUTPUTS + o] * ROWS + r * VECTOR, y.at[o][r]);
        else
            put_parts(PANEL(t->y2, t->kept), g * OUTPUTS, &y, d->parts, t->half);
    }
}

/* Squares of a tile, added to the norms of its panel. */
INLINE void add_squares(const team *t, size p, const tile *a) {
    vec sum[2] = {{0}, {0}};
    EVERY_OUTPUT EVERY_VECTOR sum[r] += a->at[o][r] * a->at[o][r];
    add_to(PANEL(t->norms, 1), sum);
}

/* A product of a soft permutation, added to a tile: of both parts all but the smallest of four products. */
INLINE void multiply_parts(tile *sums, const team *t, size block, size outputs, size inputs, const operand *family,
                           const operand *from, size g, size p) {
    size parts = t->d->parts;
    const operand *x = PANEL(from, t->kept), *weights = WEIGHTS(family, block * parts, outputs, inputs);
    multiply(sums, weights, x, inputs, NEXT(weights, inputs));
    if (parts == 1) return;
    const operand *rest = WEIGHTS(family, block * parts + 1, outputs, inputs);
    multiply(sums, rest, x, inputs, NEXT(rest, inputs));
    multiply(sums, weights, x + t->half * ROWS, inputs, (const char *)weights, 0);
}

/* The rows of a matrix that give one half, by its columns for x1 and for y2: to operands, or to a half of the state. */
INLINE void half_of_matrix(const team *t, size block, size outputs, const operand *by_passive,
                           const operand *by_active, const float *offset, operand *kept, float *state, int last) {
    const decoder *d = t->d;
    EVERY_TILE(groups_of(outputs)) {
        tile a;
        fill(&a, offset + (block * groups_of(outputs) + g) * OUTPUTS);
        multiply_parts(&a, t, block, outputs, d->passive, by_passive, t->x1, g, p);
        multiply_parts(&a, t, block, outputs, d->active, by_active, t->y2, g, p);
        if (kept) put_parts(PANEL(kept, t->kept), g * OUTPUTS, &a, d->parts, t->half);
        if (state) put_state(GROUP(state, t->half), &a);
        if (last) add_squares(t, p, &a);
    }
}

/* C by a matrix: x1, x2 = matrix [x1; y2] + offset. */
static void mix_by_matrix(team *t, size block, int last) {
    const decoder *d = t->d;
    half_of_matrix(t, block, d->passive, d->passive_by_passive, d->passive_by_active, d->passive_offset,
                   last ? 0 : t->next_x1, last ? t->passive : 0, last);
    half_of_matrix(t, block, d->active, d->active_by_passive, d->active_by_active, d->active_offset, 0, t->x2, last);
    meet(t);
    operand *used = t->x1;
    t->x1 = t->next_x1;
    t->next_x1 = used;
}

INLINE void product(const team *t, size block, size outputs, size inputs, const operand *family, const operand *from,
                    float *to) {
    EVERY_TILE(groups_of(outputs)) {
        tile a = {{{{0}}}};
        multiply_parts(&a, t, block, outputs, inputs, family, from, g, p);
        put_state(GROUP(to, t->half), &a);
    }
}

/* C by a rotation: v = V1 q, w = V2 y2; q' = C v - S w, x2' = U2 (S v + C w). The norm of v and w is that of u. */
static void mix_by_rotation(team *t, size block, int last) {
    const decoder *d = t->d;
    size rotation = block - d->matrices;
    EVERY_TILE(groups_of(d->passive)) {
        tile a, b;
        size at = rotation * t->half + g * OUTPUTS;
        fill(&a, d->v_offset + at);
        multiply_parts(&a, t, rotation, d->passive, d->passive, d->v, t->x1, g, p);
        fill(&b, d->w_offset + at);
        multiply_parts(&b, t, rotation, d->passive, d->active, d->w, t->y2, g, p);
        if (last) {
            add_squares(t, p, &a);
            add_squares(t, p, &b);
            if (!t->io->u) continue;
        }
        for (int o = 0; o < OUTPUTS; o++) {
            float cosine = d->cosine[at + o], sine = d->sine[at + o];
            EVERY_VECTOR {
                vec rotated = a.at[o][r] * sine + b.at[o][r] * cosine;
                a.at[o][r] = a.at[o][r] * cosine - b.at[o][r] * sine;
                b.at[o][r] = rotated;
            }
        }
        put_parts(PANEL(t->next_x1, t->kept), g * OUTPUTS, &a, d->parts, t->half);
        put_parts(PANEL(t->mixed, t->kept), g * OUTPUTS, &b, d->parts, t->half);
    }
    if (last && !t->io->u) return;
    meet(t);
    product(t, rotation, d->active, d->active, d->output, t->mixed, t->x2);
    if (last) product(t, 0, d->passive, d->passive, d->passive_output, t->next_x1, t->passive);
    meet(t);
    operand *used = t->x1;
    t->x1 = t->next_x1;
    t->next_x1 = used;
}

/* The passive features of a block as operands, next to each other wherever they are in the state; index: or where. */
static void read_passive(const team *t, const float *state, size features, const int32_t *index) {
    const decoder *d = t->d;
    EVERY_TILE(groups_of(d->passive)) {
        tile a = {{{{0}}}};
        for (int o = 0; o < OUTPUTS && g * OUTPUTS + o < d->passive; o++) {
            size f = index ? index[g * OUTPUTS + o] : g * OUTPUTS + o;
            EVERY_VECTOR a.at[o][r] = load(PANEL(state, features) + f * ROWS + r * VECTOR);
        }
        put_parts(PANEL(t->x1, t->kept), g * OUTPUTS, &a, d->parts, t->half);
    }
    meet(t);
}

static void norm_of_hard(const team *t) {
    const decoder *d = t->d;
    EVERY_TILE(groups_of(d->passive + d->active)) {
        tile a;
        const float *v = GROUP(t->v, t->state);
        EVERY_OUTPUT {
            size f = g * OUTPUTS + o;
            EVERY_VECTOR {
                vec x = load(v + o * ROWS + r * VECTOR);
                a.at[o][r] = x * d->output_gain[f] + (x * d->output_gain_rest[f] + d->output_shift[f]);
            }
        }
        add_squares(t, p, &a);
    }
}

/* Memory in and out. */

typedef struct { size at[ROWS], line[ROWS], column[ROWS]; int valid, in_a_row; } lanes;

/* Where the rows of a panel lie; those after the last one are found at the first row of the panel. */
static lanes find(const task *io, size panel) {
    lanes l;
    size area = io->height * io->width, left = io->rows - panel * ROWS;
    l.valid = left < ROWS ? (int)left : ROWS;
    l.in_a_row = l.valid == ROWS;
    for (int i = 0; i < ROWS; i++) {
        size n = panel * ROWS + (i < l.valid ? i : 0), rest = n % area;
        l.line[i] = rest / io->width;
        l.column[i] = rest % io->width;
        l.at[i] = n / area * io->stride_image + l.line[i] * io->stride_line + l.column[i] * io->stride_column;
        l.in_a_row &= l.at[i] == l.at[0] + i;
    }
    return l;
}

#define FEATURES_AT_ONCE 16

static void read_features(const team *t, const lanes *l, size p, size from, size to) {
    const decoder *d = t->d;
    const task *io = t->io;
    for (size f = from; f < to; f++) {
        float *x = d->hard          ? PANEL(t->v, t->state) + f * ROWS
                   : f < d->passive ? PANEL(t->passive, t->half) + f * ROWS
                                    : PANEL(t->x2, t->half) + (f - d->passive) * ROWS;
        const float *source = io->features + f * io->stride_feature;
        if (l->in_a_row)
            memcpy(x, source + l->at[0], sizeof(float) * ROWS);
        else
            for (int i = 0; i < ROWS; i++) x[i] = i < l->valid ? source[l->at[i]] : 0.0f;
    }
}

static void read_condition(const team *t, const lanes *l, size p) {
    const task *io = t->io;
    size channels = t->d->condition, from = (t->first + p) * ROWS;
    for (size c = 0; c < padded(channels); c += 2) {
        vec two[2][2] = {{{0}}};
        for (int i = 0; i < l->valid; i++)
            for (int o = 0; o < 2 && c + o < channels; o++)
                two[o][i / VECTOR][i % VECTOR] = io->condition[(from + i) * io->stride_condition + c + o];
        keep(PANEL(t->condition, padded(channels)), c, two[0], two[1]);
    }
}

static void begin(const team *t) {
    const decoder *d = t->d;
    const task *io = t->io;
    size features = d->passive + d->active, blocks = (features + FEATURES_AT_ONCE - 1) / FEATURES_AT_ONCE;
    for (size p = 0; p < t->panels; p++) {
        lanes l = find(io, t->first + p);
        size first = blocks * t->member / t->members * FEATURES_AT_ONCE;
        size end = blocks * (t->member + 1) / t->members * FEATURES_AT_ONCE;
        for (size f = first; f < end; f += FEATURES_AT_ONCE)
            read_features(t, &l, p, f, f + FEATURES_AT_ONCE < features ? f + FEATURES_AT_ONCE : features);
        memset(PANEL(t->log_dets, 1), 0, sizeof(double) * ROWS);
        memset(PANEL(t->norms, 1), 0, sizeof(double) * ROWS);
        if (t->member) continue;
        if (d->hard)
            memset(PANEL(t->v, t->state) + features * ROWS, 0, sizeof(float) * (t->state - features) * ROWS);
        else
            memset(PANEL(t->x2, t->half) + d->active * ROWS, 0, sizeof(float) * (t->half - d->active) * ROWS);
        for (int i = 0; i < ROWS; i++) {
            t->places[p].line[i / VECTOR][i % VECTOR] = (int32_t)l.line[i];
            t->places[p].column[i / VECTOR][i % VECTOR] = (int32_t)l.column[i];
        }
        if (io->condition) read_condition(t, &l, p);
    }
    meet(t);
    if (!d->hard) read_passive(t, t->passive, t->half, 0);
}

static void write_u(const team *t, size p, int valid) {
    const decoder *d = t->d;
    size features = d->passive + d->active;
    for (int i = 0; i < valid; i++) {
        float *u = t->io->u + ((t->first + p) * ROWS + i) * features;
        for (size f = 0; f < features; f++)
            if (d->hard) {
                size from = d->order[f];
                float x = PANEL(t->v, t->state)[from * ROWS + i];
                u[f] = x * d->output_gain[from] + (x * d->output_gain_rest[from] + d->output_shift[from]);
            } else
                u[f] = f < d->passive ? PANEL(t->passive, t->half)[f * ROWS + i]
                                      : PANEL(t->x2, t->half)[(f - d->passive) * ROWS + i];
    }
}

/* log p = log_det - (norm + D ln 2 pi) / 2; the members' sums in their order. */
static void finish(const team *t) {
    const decoder *d = t->d;
    size features = d->passive + d->active, stride = t->io->chunk_panels * ROWS;
    meet(t);
    for (size p = t->member; p < t->panels; p += t->members) {
        size n = (t->first + p) * ROWS;
        int valid = t->io->rows - n < ROWS ? (int)(t->io->rows - n) : ROWS;
        for (int i = 0; i < valid; i++) {
            double log_det = d->log_scale, norm = 0.0;
            for (size m = 0; m < t->members; m++) {
                size at = (m - t->member) * stride + p * ROWS + i;
                log_det += t->log_dets[at];
                norm += t->norms[at];
            }
            t->io->log_det[n + i] = (float)log_det;
            t->io->log_prob[n + i] = (float)(log_det - 0.5 * (norm + (double)features * LN_2_PI));
        }
        if (t->io->u) write_u(t, p, valid);
    }
    meet(t);
}

static void run_chunk(team *t) {
    const decoder *d = t->d;
    begin(t);
    for (size block = 0; block < d->blocks; block++) {
        int last = block == d->blocks - 1;
        if (d->hard) read_passive(t, t->v, t->state, d->passive_index + block * d->passive);
        first_layer(t, block);
        meet(t);
        coupling(t, block);
        meet(t);
        if (d->hard) {
            if (last) norm_of_hard(t);
        } else if (block < d->matrices)
            mix_by_matrix(t, block, last);
        else
            mix_by_rotation(t, block, last);
    }
    finish(t);
}

/* A team of `members` threads; whether teams have one thread each. */
static team form(const decoder *d, const task *io, size member, size members) {
    lookup how = io->width % VECTOR == 0                         ? ONE_LINE
                 : io->width <= VECTOR && io->height <= VECTOR ? SMALL_MAP
                                                               : ANY_MAP;
    return (team){.d = d, .io = io, .member = member, .members = members, .how = how};
}

static int work_alone(const task *io, size panels) { return panels >= 4 * io->threads || io->threads == 1; }

static size memory_of(const decoder *d, const task *io, size members) {
    team t = form(d, io, 0, members);
    return (size)(uintptr_t)lay_out(&t, 0);
}

/* Bytes of memory that `cflow_fast_flow` wants at task.memory, at an address that 64 divides. */
EXPORTED size cflow_fast_flow_memory(const decoder *d, const task *io) {
    int alone = work_alone(io, (io->rows + ROWS - 1) / ROWS);
    return alone ? io->threads * memory_of(d, io, 1) : memory_of(d, io, io->threads);
}

EXPORTED void cflow_fast_flow(const decoder *d, const task *io) {
    size panels = (io->rows + ROWS - 1) / ROWS;
    int alone = work_alone(io, panels);
#pragma omp parallel num_threads(io->threads)
    {
        size me = omp_get_thread_num(), threads = omp_get_num_threads(); /* perhaps fewer than were asked for */
        size teams = alone ? threads : 1, rounds = (panels + teams * io->chunk_panels - 1) / (teams * io->chunk_panels);
        size chunk = (panels + rounds * teams - 1) / (rounds * teams); /* all of about one size */
        char *memory = io->memory + (alone ? me * memory_of(d, io, 1) : 0);
        PREPARE_UNITS
        for (size first = (alone ? me : 0) * chunk; first < panels; first += teams * chunk) {
            team t = form(d, io, alone ? 0 : me, alone ? 1 : threads);
            lay_out(&t, memory);
            t.first = first;
            t.panels = panels - first < chunk ? panels - first : chunk;
            run_chunk(&t);
        }
        RESTORE_UNITS
    }
}

EXPORTED int cflow_fast_vector(void) { return VECTOR; }
EXPORTED int cflow_fast_outputs(void) { return OUTPUTS; }
EXPORTED int cflow_fast_inputs_together(void) { return INPUTS_TOGETHER; }
