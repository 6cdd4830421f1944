/* The step of the forms that are rounded at random, for step.c: "lean" and, where there are scales, "8bit".
 *
 * Every element goes through the operations of sftorch (_run_lean and _run_eight of step/backends.py, with
 * state/eight.py), in their order and in float32, so the results are equal bit for bit. The codes are those of
 * sfcore/codes.py. A row's exponents are known only when its last element has moved: until then it lies in ROW
 * floats on the stack; a longer one is computed twice, because memory that is fresh costs more than arithmetic.
 */

/* SPAN elements go through all loops before the next ones: more would push their row out of the first-level
 * cache. A tensor has two words for each of two hashes. */
enum { ROW = 4096, SPAN = 256, GAP = 0, V = 1, M = 2, Y = 3, KEYS = 4 };
enum { BROKEN = 127, LEAST_EXPONENT = -120, FIRST_CODE = 1776, SHIFT = 19 };
#define INFINITE 0x7f800000u /* its bits */

/* step_block below, compiled once for each set of instructions: it has eight loops. */
typedef void step_of(const struct job *job, int64_t n, float *y, float *gap, float *v, float *m, const float *g,
                     uint32_t *most);

/* What lies at the first element of a part of a tensor. */
struct leaf {
    step_of *step;
    char *y, *g;
    char *rest, *gap, *v, *m; /* codes or bfloat16; 0 where there is none */
    const uint32_t *keys;
    uint32_t first; /* the part's first element is this one of all of the tensor */
};
struct wide { float y[SPAN], g[SPAN]; };

/* The random bits of n elements (noise in sftorch/step/backends.py). Of 32 the gap has the upper half, v the
 * lower one and y the end of that; m has the upper half of others. */
INLINE void draw(uint32_t *to, uint32_t place, const uint32_t *key, int64_t n) {
    uint32_t walk = place * 0x9E3779B9u + key[0];
    const uint32_t other = key[1];
    ELEMENTWISE
    for (int64_t i = 0; i < n; i++, walk += 0x9E3779B9u) {
        uint32_t bits = ((walk ^ walk >> 16) * 0x7FEB352Du) ^ other;
        bits = (bits ^ bits >> 15) * 0x846CA68Bu;
        to[i] = bits ^ bits >> 16;
    }
}

INLINE float power_of(int exponent) {
    return as_float(exponent == BROKEN ? 0x7fc00000u : (uint32_t)(exponent + 127) << 23);
}
INLINE float inverse_power_of(int exponent) {
    return as_float(exponent == BROKEN ? 0x7fc00000u : (uint32_t)(127 - exponent) << 23);
}
/* The exponent of a row whose largest magnitude has these bits; those of NaN are above all others. */
INLINE int exponent_of(uint32_t most) {
    uint32_t bits = as_bits(as_float(most) * 1.0625f);
    int exponent = (int)(bits >> 23) - 126;
    if (exponent >= BROKEN) return BROKEN;
    return exponent < LEAST_EXPONENT ? LEAST_EXPONENT : exponent;
}

/* S6, S7 and S9* of n elements, with w = gap + beta delta; k2 is beta. Raises most to the largest bits. */
INLINE void step_gap(int kind, int at_z, int64_t n, float *y, float *gap, float *v, float *m, const float *g,
                     const struct job *job, uint32_t *most) {
    const float sign = (float)job->sign, down = (float)-job->lr_t;
    const float wd_y = (float)job->wd_y, wd_z = (float)job->wd_z, k1 = (float)job->k1, beta = (float)job->k2;
    const float share2 = (float)(1.0 - job->b2), share1 = (float)(1.0 - job->m1), eps = (float)job->eps;
    const float per2 = (float)(1.0 / job->correction2), per1 = (float)(1.0 / job->correction1);
    const float left = (float)(1.0 - job->k1), direct = (float)(1.0 - job->k2);
    uint32_t most_gap = most[GAP], most_v = most[V], most_m = most[M], most_y = most[Y];
    ELEMENTWISE
    for (int64_t i = 0; i < n; i++) {
        float grad = sign * g[i], direction = grad;
        if (kind != SGD) {
            v[i] = (v[i] - v[i] * share2) + grad * grad * share2;
            uint32_t bits = as_bits(v[i]) & 0x7fffffffu;
            most_v = bits > most_v ? bits : most_v;
        }
        if (kind == ADAMW_MOMENTUM) {
            m[i] = (m[i] - m[i] * share1) + grad * share1;
            direction = m[i] * per1;
            uint32_t bits = as_bits(m[i]) & 0x7fffffffu;
            most_m = bits > most_m ? bits : most_m;
        }
        if (kind == ADAMW || kind == ADAMW_MOMENTUM) direction /= sqrtf(v[i] * per2) + eps;
        direction += wd_y * y[i];
        if (at_z) direction += wd_z * (y[i] + gap[i]);
        float delta = down * direction; /* S6 */
        float w = gap[i] + beta * delta;
        y[i] = y[i] + (k1 * w + direct * delta); /* S9* */
        gap[i] = left * w;                       /* S7 */
        uint32_t bits = as_bits(gap[i]) & 0x7fffffffu, of_y = as_bits(y[i]) & 0x7fffffffu;
        most_gap = bits > most_gap ? bits : most_gap;
        most_y = of_y > most_y ? of_y : most_y;
    }
    most[GAP] = most_gap, most[V] = most_v, most[M] = most_m, most[Y] = most_y;
}

#define STEP_GAP(KIND)                                                           \
    if (job->wd_z != 0) step_gap(KIND, 1, n, y, gap, v, m, g, job, most);        \
    else step_gap(KIND, 0, n, y, gap, v, m, g, job, most)

INLINE void step_block(const struct job *job, int64_t n, float *y, float *gap, float *v, float *m, const float *g,
                       uint32_t *most) {
    switch (job->kind) {
    case SGD: STEP_GAP(SGD); break;
    case YOUNG: STEP_GAP(YOUNG); break;
    case ADAMW: STEP_GAP(ADAMW); break;
    case ADAMW_MOMENTUM: STEP_GAP(ADAMW_MOMENTUM); break;
    }
}

/* Returns the gradients of n elements in float32. */
INLINE const float *gradients_of(const struct job *job, const struct leaf *leaf, int64_t at, int64_t n, float *to) {
    if (job->g_type == AS_Z) return (const float *)leaf->g + at;
    widen(to, (const uint16_t *)leaf->g + at, 0, n);
    return to;
}

INLINE void decode_log(float *to, const uint8_t *code, float power, int64_t n) {
    ELEMENTWISE
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = (code[i] + (uint32_t)FIRST_CODE) << SHIFT;
        to[i] = as_float(code[i] ? bits : 0) * power;
    }
}

INLINE void decode_bytes(float *to, const int8_t *code, float power, int64_t n) {
    ELEMENTWISE
    for (int64_t i = 0; i < n; i++) to[i] = (float)code[i] * 0x1p-7f * power;
}

INLINE void encode_log(uint8_t *to, const float *value, float inverse, const uint32_t *drawn, int64_t n) {
    ELEMENTWISE
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = as_bits(value[i] * inverse) + (drawn[i] & 0xffffu) * 8;
        int32_t code = (int32_t)(bits >> SHIFT) - FIRST_CODE;
        code = code < 1 ? 1 : code > 255 ? 255 : code;
        to[i] = (uint8_t)(value[i] > 0 ? code : 0);
    }
}

/* The integer below a number or above it: parts are the number's 65,536ths. */
INLINE int32_t up_or_down(float parts, uint32_t drawn) {
    return ((int32_t)rintf(parts) + (int32_t)(drawn >> 16)) >> 16;
}

INLINE void encode_bytes(int8_t *to, const float *value, float inverse, const uint32_t *drawn, int64_t n) {
    ELEMENTWISE
    for (int64_t i = 0; i < n; i++) to[i] = (int8_t)up_or_down(value[i] * inverse * 0x1p23f, drawn[i]);
}

/* Beside a bfloat16 parameter: 8 of a gap's 10 bits, and 2 in the lower end of the rest. */
INLINE void open_halves(struct wide *wide, float *gap, const struct leaf *leaf, int64_t at, float power, int64_t n) {
    const uint16_t *p = (const uint16_t *)leaf->y + at;
    const int8_t *rest = (const int8_t *)leaf->rest + at, *code = (const int8_t *)leaf->gap + at;
    ELEMENTWISE
    for (int64_t i = 0; i < n; i++) {
        uint32_t upper = (uint32_t)p[i] << 16, bits = upper + (uint32_t)((rest[i] & ~3) * 256);
        wide->y[i] = as_float(is_nan(bits) ? upper : bits); /* as widen does */
    }
    ELEMENTWISE
    for (int64_t i = 0; i < n; i++) gap[i] = (float)(code[i] * 4 + (rest[i] & 3)) * 0x1p-9f * power;
}

INLINE void put_y(const struct leaf *leaf, const float *y, const uint32_t *drawn, int64_t at, int64_t n,
                  int finite) {
    uint16_t *p = (uint16_t *)leaf->y + at;
    int8_t *rest = (int8_t *)leaf->rest + at;
    ELEMENTWISE
    for (int64_t i = 0; i < n; i++) {
        uint32_t old = as_bits(y[i]), bits = (old + (drawn[i] & 0x3ffu)) & ~0x3ffu;
        if (!finite) bits = is_nan(old) ? 0x7fc00000u : (old & 0x7fffffffu) == INFINITE ? old : bits;
        p[i] = (uint16_t)((bits + 0x8000u) >> 16);
        rest[i] = (int8_t)(((int16_t)bits >> 10) * 4);
    }
}

INLINE void put_gap_halves(const struct leaf *leaf, const float *gap, float inverse, const uint32_t *drawn,
                           int64_t at, int64_t n) {
    int8_t *rest = (int8_t *)leaf->rest + at, *code = (int8_t *)leaf->gap + at;
    ELEMENTWISE
    for (int64_t i = 0; i < n; i++) {
        int32_t whole = up_or_down(gap[i] * inverse * 0x1p25f, drawn[i]);
        code[i] = (int8_t)(whole >> 2);
        rest[i] = (int8_t)(rest[i] | (whole & 3));
    }
}

INLINE void put_gap_words(const struct leaf *leaf, const float *gap, float inverse, const uint32_t *drawn,
                          int64_t at, int64_t n) {
    int16_t *code = (int16_t *)leaf->gap + at;
    ELEMENTWISE
    for (int64_t i = 0; i < n; i++) code[i] = (int16_t)up_or_down(gap[i] * inverse * 0x1p31f, drawn[i]);
}

/* Opens n elements of a row and steps them; y ends in wide, or in the parameter if that is float32 and final. */
INLINE void step_row(const struct job *job, const struct leaf *leaf, const int8_t *scale, int64_t at, int64_t n,
                     struct wide *wide, float *gap, float *v, float *m, uint32_t *drawn, int final,
                     uint32_t *most) {
    const float *g = gradients_of(job, leaf, at, n, wide->g);
    float *y = wide->y, power = power_of(scale[0]);
    if (leaf->rest) open_halves(wide, gap, leaf, at, power, n);
    else {
        const int16_t *code = (const int16_t *)leaf->gap + at;
        ELEMENTWISE
        for (int64_t i = 0; i < n; i++) gap[i] = (float)code[i] * 0x1p-15f * power;
        if (final) y = (float *)leaf->y + at;
        else memcpy(y, (float *)leaf->y + at, (size_t)n * 4);
    }
    if (leaf->v) decode_log(v, (const uint8_t *)leaf->v + at, power_of(scale[V]), n);
    if (leaf->m) decode_bytes(m, (const int8_t *)leaf->m + at, power_of(scale[M]), n);
    leaf->step(job, n, y, gap, v, m, g, most);
    if (!final) return;
    draw(drawn, leaf->first + (uint32_t)at, leaf->keys, n);
    if (!leaf->rest) return;
    if (most[Y] < INFINITE) put_y(leaf, y, drawn, at, n, 1);
    else put_y(leaf, y, drawn, at, n, 0);
}

INLINE void step_and_encode_row(const struct job *job, const struct leaf *leaf, int8_t *scale, int64_t length) {
    struct wide wide;
    float gap[ROW], v[ROW], m[ROW];
    uint32_t drawn[ROW], of_m[SPAN];
    uint32_t most[4] = {0}, unused[4] = {0};
    int8_t old[3] = {scale[GAP], leaf->v ? scale[V] : 0, leaf->m ? scale[M] : 0};
    const int kept = length <= ROW;
    for (int64_t at = 0; at < length; at += SPAN) {
        int64_t n = length - at < SPAN ? length - at : SPAN, in = kept ? at : 0;
        step_row(job, leaf, old, at, n, &wide, gap + in, v + in, m + in, drawn + in, kept, most);
    }
    float inverse[3] = {0};
    for (int i = GAP; i <= M; i++) {
        if ((i == V && !leaf->v) || (i == M && !leaf->m)) continue;
        scale[i] = (int8_t)exponent_of(most[i]);
        inverse[i] = inverse_power_of(scale[i]);
    }
    for (int64_t at = 0; at < length; at += SPAN) {
        int64_t n = length - at < SPAN ? length - at : SPAN, in = kept ? at : 0;
        if (!kept) step_row(job, leaf, old, at, n, &wide, gap, v, m, drawn, 1, unused);
        /* what is not finite has the code 0, which no cast makes of it */
        const int gap_broken = scale[GAP] == BROKEN, m_broken = leaf->m && scale[M] == BROKEN;
        if (gap_broken) memset(gap + in, 0, (size_t)n * 4);
        if (m_broken) memset(m + in, 0, (size_t)n * 4);
        if (leaf->rest) put_gap_halves(leaf, gap + in, gap_broken ? 0 : inverse[GAP], drawn + in, at, n);
        else put_gap_words(leaf, gap + in, gap_broken ? 0 : inverse[GAP], drawn + in, at, n);
        if (leaf->v) encode_log((uint8_t *)leaf->v + at, v + in, inverse[V], drawn + in, n);
        if (!leaf->m) continue;
        draw(of_m, leaf->first + (uint32_t)at, leaf->keys + 2, n);
        encode_bytes((int8_t *)leaf->m + at, m + in, m_broken ? 0 : inverse[M], of_m, n);
    }
}

/* lower: whether it is the lower half that is taken. */
INLINE void put_bfloat16(uint16_t *to, const float *value, const uint32_t *drawn, int lower, int64_t n,
                         uint32_t most) {
    if (most > INFINITE) {
        ELEMENTWISE
        for (int64_t i = 0; i < n; i++) {
            uint32_t bits = as_bits(value[i]), half = lower ? drawn[i] & 0xffffu : drawn[i] >> 16;
            to[i] = (uint16_t)(((is_nan(bits) ? 0x7fc00000u : bits) + half) >> 16);
        }
    } else {
        ELEMENTWISE
        for (int64_t i = 0; i < n; i++)
            to[i] = (uint16_t)((as_bits(value[i]) + (lower ? drawn[i] & 0xffffu : drawn[i] >> 16)) >> 16);
    }
}

INLINE void step_lean(const struct job *job, const struct leaf *leaf, int64_t length) {
    float y[SPAN], gap[SPAN], v[SPAN], m[SPAN], wide_g[SPAN];
    uint32_t most[4] = {0}, drawn[SPAN];
    for (int64_t at = 0; at < length; at += SPAN) {
        int64_t n = length - at < SPAN ? length - at : SPAN;
        uint16_t *of_v = leaf->v ? (uint16_t *)leaf->v + at : 0, *of_m = leaf->m ? (uint16_t *)leaf->m + at : 0;
        uint16_t *of_gap = (uint16_t *)leaf->gap + at, *p = (uint16_t *)leaf->y + at;
        int16_t *rest = (int16_t *)leaf->rest + at;
        const float *g = gradients_of(job, leaf, at, n, wide_g);
        if (leaf->rest) widen(y, p, rest, n);
        widen(gap, of_gap, 0, n);
        if (of_v) widen(v, of_v, 0, n);
        if (of_m) widen(m, of_m, 0, n);
        leaf->step(job, n, leaf->rest ? y : (float *)leaf->y + at, gap, v, m, g, most);
        const uint32_t first = leaf->first + (uint32_t)at;
        if (leaf->rest) narrow(p, rest, y, n);
        draw(drawn, first, leaf->keys, n);
        put_bfloat16(of_gap, gap, drawn, 0, n, most[GAP]);
        if (of_v) put_bfloat16(of_v, v, drawn, 1, n, most[V]);
        if (!of_m) continue;
        draw(drawn, first, leaf->keys + 2, n);
        put_bfloat16(of_m, m, drawn, 0, n, most[M]);
    }
}

INLINE struct leaf leaf_of(const struct job *job, step_of *step, int64_t tensor, int64_t at) {
    int64_t of_y = job->y_type == AS_Z ? 4 : 2, of_g = job->g_type == AS_Z ? 4 : 2;
    int64_t of_code = job->scale ? 1 : 2, of_gap = job->scale && job->y_type == AS_Z ? 2 : of_code;
    return (struct leaf){
        .step = step,
        .y = job->y[tensor] + at * of_y,
        .g = job->g[tensor] + at * of_g,
        .rest = job->rest ? job->rest[tensor] + at * of_code : 0,
        .gap = job->z[tensor] + at * of_gap,
        .v = job->v ? job->v[tensor] + at * of_code : 0,
        .m = job->m ? job->m[tensor] + at * of_code : 0,
        .keys = job->keys + KEYS * tensor,
        .first = (uint32_t)(job->places[3 * tensor] + at),
    };
}

/* A row belongs to the segment in which it begins. */
INLINE int run_drawn(const struct job *job, const struct segment *s, step_of *step) {
    if (!job->scale) {
        const int64_t *place = job->places + 3 * s->tensor;
        for (int64_t at = s->offset, end = at + s->length, n; at < end; at += n) {
            const int64_t in_run = at % place[1], left = place[1] - in_run;
            n = left < end - at ? left : end - at;
            struct leaf leaf = leaf_of(job, step, s->tensor, at);
            leaf.first = (uint32_t)(place[0] + at / place[1] * place[2] + in_run);
            step_lean(job, &leaf, n);
        }
        return 0;
    }
    const int64_t rows = job->rows[s->tensor], length = job->sizes[s->tensor] / rows;
    const int64_t columns = 1 + (job->v != 0) + (job->m != 0);
    for (int64_t row = (s->offset + length - 1) / length; row * length < s->offset + s->length; row++) {
        struct leaf leaf = leaf_of(job, step, s->tensor, row * length);
        step_and_encode_row(job, &leaf, (int8_t *)job->scale[s->tensor] + row * columns, length);
    }
    return 0;
}

#define DRAWN(NAME, TARGET)                                                                               \
    TARGET static void step_##NAME(const struct job *job, int64_t n, float *y, float *gap, float *v,      \
                                   float *m, const float *g, uint32_t *most) {                            \
        step_block(job, n, y, gap, v, m, g, most);                                                        \
    }                                                                                                     \
    TARGET static int drawn_##NAME(const struct job *job, const struct segment *s) {                      \
        return run_drawn(job, s, step_##NAME);                                                            \
    }
DRAWN(plain, )
#if defined(__x86_64__)
DRAWN(avx2, __attribute__((target("avx2"))))
DRAWN(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))))
static run_of *drawn_here(void) {
    __builtin_cpu_init();
    int is_wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return is_wide ? drawn_avx512 : __builtin_cpu_supports("avx2") ? drawn_avx2 : drawn_plain;
}
#else
static run_of *drawn_here(void) { return drawn_plain; }
#endif
