/* The anomaly map on a CPU: from log-likelihoods per dimension to the map and the score, every pixel written once.

   `anomaly_map.anomaly_map` says what is computed, with the maxima given; `cpu_map` has the arguments. A row of the map
   blends two rows of every scale, as wide as that scale, and then spreads them over the columns; a vector holds
   neighbouring columns. */

#include <math.h>
#include <omp.h>
#include <string.h>

#include "vectors.h"

/* One scale's log-likelihoods (batch, height, width), contiguous; `cpu_map._Scale` has the same fields. */
typedef struct {
    const float *log_prob;
    size height, width;
    float maximum;
} map_scale;

/* `cpu_map._Map` has the same fields. result: (batch, height, width); score: (batch). */
typedef struct {
    const map_scale *scales;
    size count, batch, height, width;
    float *result, *score;
    char *memory; /* see cflow_fast_map_memory */
    size threads;
} map_task;

#define PADDED(length) (((length) + VECTOR - 1) / VECTOR * VECTOR)

/* What is made once: probabilities, of every column its left source and the weight of the right one, rows' maxima; and
   every thread's blended rows. Of each array there is one per scale, one after the other. */
typedef struct {
    float *probabilities, *weights, *blended, *peaks;
    int32_t *left;
    size wide; /* of a blended row: one more than the widest scale has, the last twice */
} map_memory;

static char *lay_out_map(const map_task *m, map_memory *at, char *memory) {
    size positions = 0, widest = 0;
    for (size k = 0; k < m->count; k++) {
        positions += PADDED(m->batch * m->scales[k].height * m->scales[k].width);
        widest = m->scales[k].width > widest ? m->scales[k].width : widest;
    }
    at->wide = PADDED(widest + 1);
#define TAKE(field, elements)                                                                                 \
    at->field = (void *)memory;                                                                               \
    memory += (sizeof(*at->field) * (elements) + 63) / 64 * 64
    TAKE(probabilities, positions);
    TAKE(weights, m->count * PADDED(m->width));
    TAKE(left, m->count * PADDED(m->width));
    TAKE(blended, m->threads * m->count * at->wide);
    TAKE(peaks, m->batch * m->height);
#undef TAKE
    return memory;
}

/* Where output i of `outputs` lies among `inputs`, corners aligned: its left or upper neighbour and the other's weight. */
INLINE int32_t neighbour(size i, size inputs, size outputs, float *weight) {
    float step = outputs > 1 ? (float)(inputs - 1) / (float)(outputs - 1) : 0.0f, source = step * (float)i;
    int32_t left = (int32_t)source;
    left = left < inputs - 1 ? left : (int32_t)inputs - 1;
    *weight = left < inputs - 1 ? source - (float)left : 0.0f;
    return left;
}

/* p = min(1, exp(l - m)); what is not finite becomes NaN. */
static void find_probabilities(const map_scale *s, size count, float *probabilities, size member, size members) {
    size vectors = PADDED(count) / VECTOR;
    for (size i = vectors * member / members; i < vectors * (member + 1) / members; i++) {
        vec x = {0};
        size left = count - i * VECTOR;
        memcpy(&x, s->log_prob + i * VECTOR, sizeof(float) * (left < VECTOR ? left : VECTOR));
        vec p = at_most(exponential(x - s->maximum), 1.0f), nothing = x - x; /* 0, or NaN */
        store(probabilities + i * VECTOR, p + nothing);
    }
}

/* One row of one image; returns its largest finite value. */
static float map_row(const map_task *m, const map_memory *at, size image, size row, float *blended) {
    const float *probabilities = at->probabilities;
    for (size k = 0; k < m->count; k++) {
        const map_scale *s = m->scales + k;
        float weight, *to = blended + k * at->wide;
        size upper = neighbour(row, s->height, m->height, &weight), lower = upper + (upper < s->height - 1);
        const float *one = probabilities + (image * s->height + upper) * s->width;
        const float *two = probabilities + (image * s->height + lower) * s->width;
        for (size i = 0; i < s->width; i++) to[i] = one[i] * (1.0f - weight) + two[i] * weight;
        to[s->width] = to[s->width - 1];
        probabilities += PADDED(m->batch * s->height * s->width);
    }
    float *result = m->result + (image * m->height + row) * m->width;
    vec peak = all(-INFINITY);
    for (size x = 0; x < m->width; x += VECTOR) {
        vec total = {0};
        for (size k = 0; k < m->count; k++) {
            const float *from = blended + k * at->wide;
            ivec left = *(const ivec *)(at->left + k * PADDED(m->width) + x);
            vec weight = load(at->weights + k * PADDED(m->width) + x);
            total += gather(from, left) * (1.0f - weight) + gather(from + 1, left) * weight;
        }
        vec value = at_least((float)m->count - total, 0.0f); /* weights may add up to more than 1 */
        size left = m->width - x;
        if (left < VECTOR)
            for (size i = left; i < VECTOR; i++) value[i] = -INFINITY;
        peak = larger(value, peak);
        memcpy(result + x, &value, sizeof(float) * (left < VECTOR ? left : VECTOR));
    }
    float largest = peak[0];
    for (int i = 1; i < VECTOR; i++) largest = peak[i] > largest ? peak[i] : largest;
    return largest;
}

EXPORTED size cflow_fast_map_memory(const map_task *m) {
    map_memory at;
    return (size)(uintptr_t)lay_out_map(m, &at, 0);
}

EXPORTED void cflow_fast_map(const map_task *m) {
    map_memory at;
    lay_out_map(m, &at, m->memory);
    for (size k = 0; k < m->count; k++)
        for (size x = 0; x < PADDED(m->width); x++) {
            size place = k * PADDED(m->width) + x, column = x < m->width ? x : m->width - 1;
            at.left[place] = neighbour(column, m->scales[k].width, m->width, at.weights + place);
        }
    size rows = m->batch * m->height;
#pragma omp parallel num_threads(m->threads)
    {
        size me = omp_get_thread_num(), threads = omp_get_num_threads();
        float *probabilities = at.probabilities;
        for (size k = 0; k < m->count; k++) {
            size count = m->batch * m->scales[k].height * m->scales[k].width;
            find_probabilities(m->scales + k, count, probabilities, me, threads);
            probabilities += PADDED(count);
        }
#pragma omp barrier
        for (size row = rows * me / threads; row < rows * (me + 1) / threads; row++)
            at.peaks[row] = map_row(m, &at, row / m->height, row % m->height, at.blended + me * m->count * at.wide);
    }
    for (size image = 0; image < m->batch; image++) {
        float largest = -INFINITY;
        for (size row = 0; row < m->height; row++) largest = fmaxf(largest, at.peaks[image * m->height + row]);
        m->score[image] = largest == -INFINITY ? NAN : largest;
    }
}
