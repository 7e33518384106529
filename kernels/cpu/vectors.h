/* Vectors of float32 for the instruction set that is compiled for, and elementary functions of them. */

#ifndef CFLOW_FAST_VECTORS
#define CFLOW_FAST_VECTORS

#include <immintrin.h>
#include <stdint.h>

#define INTERFACE 3 /* as in cpu_library: counted up whenever the meaning of a call changes */

#if defined(__AVX512F__)
#define VECTOR 16
#else
#define VECTOR 8
#endif

typedef float vec __attribute__((vector_size(4 * VECTOR)));
typedef int32_t ivec __attribute__((vector_size(4 * VECTOR)));
typedef float whole __attribute__((vector_size(4 * VECTOR), may_alias));
typedef float loose __attribute__((vector_size(4 * VECTOR), aligned(4)));
typedef int64_t size;

#define INLINE static inline __attribute__((always_inline))
#define EXPORTED __attribute__((visibility("default")))

INLINE vec load(const float *p) { return (vec) * (const whole *)p; }
INLINE void store(float *p, vec x) { *(whole *)p = (whole)x; }

#if VECTOR == 16
INLINE vec all(float x) { return (vec)_mm512_set1_ps(x); }
INLINE vec pick(vec table, ivec index) { return (vec)_mm512_permutexvar_ps((__m512i)index, (__m512)table); }
INLINE vec gather(const float *table, ivec index) { return (vec)_mm512_i32gather_ps((__m512i)index, table, 4); }
INLINE vec nearest(vec x) { return (vec)_mm512_roundscale_ps((__m512)x, 8); }
INLINE vec at_most(vec x, float bound) { return (vec)_mm512_min_ps((__m512)all(bound), (__m512)x); }
INLINE vec at_least(vec x, float bound) { return (vec)_mm512_max_ps((__m512)all(bound), (__m512)x); }
INLINE vec larger(vec x, vec y) { return (vec)_mm512_max_ps((__m512)x, (__m512)y); }
INLINE vec fused(vec x, vec y, vec z) { return (vec)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z); }
INLINE ivec integer(vec x) { return (ivec)_mm512_cvtps_epi32((__m512)x); }
#else
INLINE vec all(float x) { return (vec)_mm256_set1_ps(x); }
INLINE vec pick(vec table, ivec index) { return (vec)_mm256_permutevar8x32_ps((__m256)table, (__m256i)index); }
INLINE vec gather(const float *table, ivec index) { return (vec)_mm256_i32gather_ps(table, (__m256i)index, 4); }
INLINE vec nearest(vec x) { return (vec)_mm256_round_ps((__m256)x, 8); }
INLINE vec at_most(vec x, float bound) { return (vec)_mm256_min_ps((__m256)all(bound), (__m256)x); }
INLINE vec at_least(vec x, float bound) { return (vec)_mm256_max_ps((__m256)all(bound), (__m256)x); }
INLINE vec larger(vec x, vec y) { return (vec)_mm256_max_ps((__m256)x, (__m256)y); }
INLINE vec fused(vec x, vec y, vec z) { return (vec)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z); }
INLINE ivec integer(vec x) { return (ivec)_mm256_cvtps_epi32((__m256)x); }
#endif

INLINE vec choose(ivec where, vec yes, vec no) { return (vec)((where & (ivec)yes) | (~where & (ivec)no)); }
INLINE vec magnitude(vec x) { return (vec)((ivec)x & 0x7fffffff); }
INLINE vec signed_like(vec x, vec sign) { return (vec)((ivec)x | ((ivec)sign & (ivec)all(-0.0f))); }

/* Elementary functions. NaN stays NaN: `larger` and the bounds give their second operand, which is x for
   a bound, where a comparison is not possible. */

/* A number of about twice float32's digits: `low` is what rounding left of `high`. */
typedef struct { vec high, low; } twofold;

/* e^x to 3e-9 of itself; 0 and infinity beyond float32's range come within a factor of its ends. */
INLINE twofold precise_exponential(twofold x) {
    vec bounded = at_least(at_most(x.high, 88.3f), -87.3f);
    vec n = nearest(bounded * 1.44269504089f);
    vec a = bounded - n * 0.693359375f; /* ln 2 in two parts, the first of few digits: a is exact */
    vec r = fused(n, all(2.12194440055e-4f), a);
    vec rest = x.low + fused(n, all(2.12194440055e-4f), a - r);
    vec p = all(1.0f / 40320);
    p = p * r + 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    vec one = all(1.0f), q = fused(p, r, one), e = fused(q, r, one);
    vec low = fused(q, r, one - e) + (r * fused(p, r, one - q) + e * rest);
    vec power = (vec)((integer(n) + 127) << 23);
    return (twofold){e * power, low * power};
}

/* Two units in the last place; 0 and infinity beyond float32's range come within a factor of its ends. */
INLINE vec exponential(vec x) {
    x = at_least(at_most(x, 88.3f), -87.3f);
    vec n = nearest(x * 1.44269504089f);
    vec r = (x - n * 0.693359375f) + n * 2.12194440055e-4f; /* ln 2 in two parts, the first of few digits */
    vec p = all(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * (vec)((integer(n) + 127) << 23);
}

/* tanh x - x for |x| < 0.63, to 5e-9 tanh x. */
INLINE vec beyond_linear(vec x) {
    vec q = x * x;
    vec p = all(-5.667040311e-3f);
    p = p * q + 2.060623657e-2f;
    p = p * q - 5.373002649e-2f;
    p = p * q + 1.333133124e-1f;
    p = p * q - 3.333327807e-1f;
    return x * q * p;
}

/* Near 0 by its series, so that small arguments keep their digits; else by exp. */
INLINE vec hyperbolic_tangent(vec x) {
    vec far = 1.0f - 2.0f / (exponential(2.0f * at_most(magnitude(x), 20.0f)) + 1.0f);
    return choose(magnitude(x) < 0.625f, x + beyond_linear(x), signed_like(far, x));
}

/* tanh x to 2.1e-8 of itself. */
INLINE twofold precise_hyperbolic_tangent(vec x) {
    twofold e = precise_exponential((twofold){2.0f * at_most(magnitude(x), 20.0f), all(0.0f)});
    vec sum = e.high + 1.0f, left = (1.0f - (sum - e.high)) + e.low;
    vec q = 2.0f / sum, of_q = 0.5f * q * (fused(-q, sum, all(2.0f)) - q * left);
    vec far = 1.0f - q, of_far = ((1.0f - far) - q) - of_q;
    vec more = beyond_linear(x), near = x + more, of_near = more - (near - x);
    ivec is_near = magnitude(x) < 0.625f;
    vec sign = signed_like(all(1.0f), x);
    return (twofold){choose(is_near, near, sign * far), choose(is_near, of_near, sign * of_far)};
}

/* ln(1 + e^x) = max(x, 0) + ln(1 + y), y = e^-|x|, the logarithm by atanh(y / (2 + y)), an argument up to 1/3. */
INLINE vec softplus(vec x) {
    vec y = exponential(-magnitude(x));
    vec z = y / (2.0f + y), q = z * z;
    vec p = all(2.0f / 15);
    p = p * q + 2.0f / 13;
    p = p * q + 2.0f / 11;
    p = p * q + 2.0f / 9;
    p = p * q + 2.0f / 7;
    p = p * q + 2.0f / 5;
    p = p * q + 2.0f / 3;
    p = p * q + 2.0f;
    return at_least(x, 0.0f) + z * p;
}

#endif
