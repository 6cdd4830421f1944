/* S6 to S9* of a list of parameters in one pass over memory, with a plain C interface.
 *
 * Every element goes through the operations of the single-tensor path (sftorch/law/iterates.py), in their order
 * and in the dtype of z, so the results are equal bit for bit, with any number of threads. That needs
 * -ffp-contract=off and no -ffast-math. It is called by sftorch/kernels/call.py and sfjax/kernels/xla.c.
 */
#include <fenv.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "job.h"

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define ELEMENTWISE _Pragma("clang loop vectorize(assume_safety)")
#else
#define ELEMENTWISE _Pragma("GCC ivdep")
#endif

enum { CHUNK = 1 << 15, BLOCK = 1024, MAX_THREADS = 256 }; /* a chunk is so many times MARKED */
struct cursor { int64_t tensor, start; };             /* start: of the tensor, among the elements of all */
struct segment { int64_t tensor, offset, length; };

/* Finds what lies at position, up to end; a thread's positions only grow. Returns 0 at the end. */
int sf_next(const int64_t *sizes, struct cursor *at, int64_t position, int64_t end, struct segment *found) {
    if (position >= end) return 0;
    while (position >= at->start + sizes[at->tensor]) at->start += sizes[at->tensor++];
    int64_t stop = at->start + sizes[at->tensor];
    *found = (struct segment){at->tensor, position - at->start, (stop < end ? stop : end) - position};
    return 1;
}

INLINE float as_float(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
INLINE uint32_t as_bits(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }
INLINE int is_nan(uint32_t bits) { return (bits & 0x7fffffffu) > 0x7f800000u; }

INLINE void widen(float *to, const uint16_t *from, const int16_t *rest, int64_t n) {
    if (rest) {
        ELEMENTWISE
        for (int64_t i = 0; i < n; i++) {
            uint32_t upper = (uint32_t)from[i] << 16, bits = upper + (uint32_t)(int32_t)rest[i];
            to[i] = as_float(is_nan(bits) ? upper : bits); /* zero or infinity, and a rest that leads beyond */
        }
    } else {
        ELEMENTWISE
        for (int64_t i = 0; i < n; i++) to[i] = as_float((uint32_t)from[i] << 16);
    }
}

INLINE void narrow(uint16_t *to, int16_t *rest, const float *from, int64_t n) {
    if (rest) {
        ELEMENTWISE
        for (int64_t i = 0; i < n; i++) {
            uint32_t bits = is_nan(as_bits(from[i])) ? 0x7fc00000u : as_bits(from[i]);
            uint32_t upper = (bits + 0x8000u) >> 16;
            to[i] = (uint16_t)upper;
            rest[i] = (int16_t)(bits - (upper << 16));
        }
    } else { /* round half to even */
        ELEMENTWISE
        for (int64_t i = 0; i < n; i++) {
            uint32_t bits = as_bits(from[i]);
            to[i] = (uint16_t)(is_nan(bits) ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
        }
    }
}

/* The loop of a kind, in OF(span); what is 0 for a whole step costs no operation. */
#define MOVE(KIND)                                                                \
    if (job->wd_z != 0)                                                           \
        x ? OF(move)(KIND, 1, 1, n, y, z, v, m, x, g, job)                        \
          : OF(move)(KIND, 0, 1, n, y, z, v, m, x, g, job);                       \
    else                                                                          \
        x ? OF(move)(KIND, 1, 0, n, y, z, v, m, x, g, job)                        \
          : OF(move)(KIND, 0, 0, n, y, z, v, m, x, g, job)

#define REAL float
#define OF(NAME) NAME##_float
#define ROOT sqrtf
#include "arithmetic.h"
#undef REAL
#undef OF
#undef ROOT
#define REAL double
#define OF(NAME) NAME##_double
#define ROOT sqrt
#include "arithmetic.h"

typedef int run_of(const struct job *job, const struct segment *s);
#if defined(ROUNDS_AT_RANDOM) /* a library of its own, see build.py */
#include "eight.h"
#endif

#define AT(TABLE, TYPE) (job->TABLE ? (TYPE *)job->TABLE[s->tensor] + s->offset : 0)

/* 16-bit elements pass through blocks on the stack, which stay in the first-level cache. */
INLINE int mixed(const struct job *job, const struct segment *s) {
    float *z = AT(z, float), *v = AT(v, float), *m = AT(m, float);
    char *y = job->y[s->tensor], *x = job->x ? job->x[s->tensor] : 0, *g = job->g ? job->g[s->tensor] : 0;
    int16_t *rest = AT(rest, int16_t);
    float wide_y[BLOCK], wide_x[BLOCK], wide_g[BLOCK];
    int differ = 0;
    for (int64_t done = 0; done < s->length; done += BLOCK) {
        int64_t n = s->length - done < BLOCK ? s->length - done : BLOCK, at = s->offset + done;
        uint16_t *narrow_y = (uint16_t *)y + at;
        int is_wide = job->y_type == AS_Z;
        float *of_y = is_wide ? (float *)y + at : wide_y, *of_x = 0, *of_g = wide_g;
        if (!is_wide) widen(wide_y, narrow_y, rest ? rest + done : 0, n);
        if (x && is_wide) of_x = (float *)x + at;
        else if (x) widen(of_x = wide_x, (uint16_t *)x + at, 0, n);
        if (g && job->g_type == AS_Z) of_g = (float *)g + at;
        else if (g) widen(wide_g, (uint16_t *)g + at, 0, n);
        differ |= span_float(job, n, of_y, z + done, v ? v + done : 0, m ? m + done : 0, of_x, of_g);
        if (!is_wide) narrow(narrow_y, rest ? rest + done : 0, wide_y, n);
    }
    return differ;
}

INLINE int run_segment(const struct job *job, const struct segment *s) {
    if (job->y_type != AS_Z || job->g_type != AS_Z) return mixed(job, s);
    if (job->is_double)
        return span_double(job, s->length, AT(y, double), AT(z, double), AT(v, double), AT(m, double),
                           AT(x, double), AT(g, double));
    return span_float(job, s->length, AT(y, float), AT(z, float), AT(v, float), AT(m, float), AT(x, float),
                      AT(g, float));
}

static int run_plain(const struct job *job, const struct segment *s) { return run_segment(job, s); }
#if defined(__x86_64__)
__attribute__((target("avx2"))) static int run_avx2(const struct job *job, const struct segment *s) {
    return run_segment(job, s);
}
static int has_avx2(void) { __builtin_cpu_init(); return __builtin_cpu_supports("avx2"); }
#else
#define run_avx2 run_plain
static int has_avx2(void) { return 0; }
#endif

/* A mark of some words is NH (of UMAC, 1999), the sum of products of pairs of words and keys of their places: of
 * all 2^32 keys, about one lets a change of several words go unseen, be they negated, exchanged or scaled. And the
 * sum of the pairs, with which a change of one word is always seen: (A - A')(B + 1) and (B - B')(A + 2^32) are
 * not 0 modulo 2^64. With narrower vectors than AVX2's, marks would cost more than reading z does. */
typedef uint32_t __attribute__((may_alias)) word;
#if defined(__x86_64__)
static uint32_t keys[2 * MARKED + 1];

__attribute__((constructor)) static void draw_keys(void) {
    uint64_t state = 1; /* Knuth's generator; the upper bits are good */
    for (int i = 0; i < 2 * MARKED + 1; i++)
        keys[i] = (uint32_t)((state = state * 6364136223846793005u + 1442695040888963407u) >> 32);
}

__attribute__((target("avx2"))) static uint64_t mark_words(const word *words, int64_t n, int64_t at) {
    const uint32_t *key = keys + at;
    typedef uint64_t lanes __attribute__((vector_size(32)));
    lanes products[2] = {{0}}, sums[2] = {{0}};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j += 8) {
            __m256i pairs = _mm256_add_epi32(_mm256_loadu_si256((const __m256i *)(words + i + j)),
                                             _mm256_loadu_si256((const __m256i *)(key + i + j)));
            products[j / 8] += (lanes)_mm256_mul_epu32(pairs, _mm256_srli_epi64(pairs, 32));
            sums[j / 8] += (lanes)pairs;
        }
    lanes all = products[0] + products[1] + sums[0] + sums[1];
    uint64_t sum = all[0] + all[1] + all[2] + all[3];
    for (; i < n; i += 2) { /* the last one alone has a 0 beside it */
        uint32_t a = words[i] + key[i], b = (i + 1 < n ? words[i + 1] : 0) + key[i + 1];
        sum += (uint64_t)a * b + a + ((uint64_t)b << 32);
    }
    return sum;
}
#else
static uint64_t mark_words(const word *words, int64_t n, int64_t at) { return (void)words, (void)n, (void)at, 0; }
#endif

struct team {
    const struct job *job;
    int64_t total;
    run_of *run;
    uint64_t *marks; /* of the job, where the machine makes them for little */
    atomic_llong next; /* chunk that nobody has taken yet: a thread that the machine holds up takes fewer */
    atomic_int differs;
    char *back; /* for PUT_BACK: whether a chunk holds y again */
    fenv_t rounding; /* denormals are flushed in all threads or in none */
};

INLINE int64_t size_of(const struct job *job) { return job->is_double ? sizeof(double) : sizeof(float); }

/* Does a job from a position to an end; returns whether HOLDS found a difference. */
static int run_from(const struct team *team, const struct job *job, struct cursor *at, int64_t position,
                    int64_t end) {
    struct segment s;
    int differ = 0;
    for (; sf_next(job->sizes, at, position, end, &s); position += s.length) differ |= team->run(job, &s);
    return differ;
}

/* Asks for memory while this thread is busy with other: parts are too short for the machine to see by itself
 * what comes, and without this train() took half as long again. */
INLINE void fetch(const char *from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}

/* Returns what a segment of y, at a position among all elements, adds to the mark of its part. */
INLINE uint64_t mark(const struct team *team, const struct segment *s, int64_t position) {
    const int64_t item = size_of(team->job), words = item / sizeof(word);
    return mark_words((const word *)(team->job->y[s->tensor] + s->offset * item), s->length * words,
                      position % MARKED * words);
}

/* Makes x of a chunk that holds y again, from the y that lies aside. */
static void undo(const struct team *team, struct cursor at, int64_t position, int64_t end) {
    struct job again = *team->job;
    again.kind = RECOVER, again.y = team->job->x, again.x = team->job->y;
    run_from(team, &again, &at, position, end);
}

/* Copies past the caches: it is read again only after an evaluation, and a write to them would first fetch what
 * it is going to overwrite. By lines of 64 bytes, so that none is sent in parts. */
static void stream(char *to, const char *from, int64_t bytes) {
    int64_t done = 0;
#if defined(__SSE2__)
    const int64_t before = (int64_t)(-(uintptr_t)to % 64);
    memcpy(to, from, done = before < bytes ? before : bytes);
    for (; done + 64 <= bytes; done += 64)
        for (int64_t i = done; i < done + 64; i += 16)
            _mm_stream_si128((__m128i *)(to + i), _mm_loadu_si128((const __m128i *)(from + i)));
#endif
    memcpy(to + done, from + done, bytes - done);
}

/* Puts y of a chunk aside and makes x of it, by parts that stay in the nearest cache, and leaves their marks. */
static void put_aside(const struct team *team, struct cursor *at, int64_t begin, int64_t end) {
    const struct job *job = team->job;
    const int64_t item = size_of(job);
    struct job in_place = *job;
    in_place.kind = RECOVER, in_place.x = job->y;
    struct segment s;
    for (int64_t position = begin; position < end;) {
        const int64_t part = position / MARKED, stop = position + MARKED < end ? position + MARKED : end;
        uint64_t sum = 0;
        for (; sf_next(job->sizes, at, position, stop, &s); position += s.length) {
            fetch(job->z[s.tensor] + s.offset * item, s.length * item);
            stream(job->x[s.tensor] + s.offset * item, job->y[s.tensor] + s.offset * item, s.length * item);
            team->run(&in_place, &s);
            if (team->marks) sum += mark(team, &s, position);
        }
        if (team->marks) team->marks[part] = sum;
    }
#if defined(__SSE2__)
    _mm_sfence(); /* before whatever this thread does next */
#endif
}

/* Puts back y in a chunk, by parts that stay in the nearest cache from the look to the copy. One that has not its
 * mark may yet hold x: 0 is -0. Returns whether the chunk does not hold x; then it is as it was. */
static int put_back(const struct team *team, struct cursor *at, int64_t begin, int64_t end) {
    const struct job *job = team->job;
    const struct cursor first = *at;
    const int64_t item = size_of(job);
    struct job look = *job;
    look.kind = HOLDS;
    struct segment s;
    for (int64_t position = begin; position < end;) {
        const int64_t stop = position + MARKED < end ? position + MARKED : end;
        struct cursor here = *at;
        uint64_t sum = 0;
        for (int64_t i = position; team->marks && sf_next(job->sizes, &here, i, stop, &s); i += s.length) {
            fetch(job->x[s.tensor] + s.offset * item, s.length * item);
            sum += mark(team, &s, i);
        }
        here = *at;
        int is_x = team->marks && sum == team->marks[position / MARKED];
        if (!is_x && run_from(team, &look, &here, position, stop)) {
            undo(team, first, begin, position);
            return 1;
        }
        for (; sf_next(job->sizes, at, position, stop, &s); position += s.length)
            memcpy(job->y[s.tensor] + s.offset * item, job->x[s.tensor] + s.offset * item, s.length * item);
    }
    return 0;
}

static void *work(void *arg) {
    struct team *team = arg;
    const struct job *job = team->job;
    struct cursor at = {0, 0};
    for (;;) {
        int64_t chunk = (int64_t)atomic_fetch_add(&team->next, 1), position = chunk * CHUNK;
        if (position >= team->total) return 0;
        int64_t end = team->total - position < CHUNK ? team->total : position + CHUNK;
        int differ = 0;
        if (job->kind == PUT_BACK) {
            differ = put_back(team, &at, position, end);
            team->back[chunk] = !differ;
        } else if (job->kind == PUT_ASIDE) {
            put_aside(team, &at, position, end);
        } else {
            differ = run_from(team, job, &at, position, end);
        }
        if (differ) atomic_store(&team->differs, 1);
    }
}

static void *help(void *arg) {
    fesetenv(&((struct team *)arg)->rounding);
    return work(arg);
}

/* Runs a job with up to that many threads. Returns 1 if HOLDS found a difference, or PUT_BACK, which then has
 * changed nothing; else 0.
 * Threads live for one call, so that a fork finds none. Making one took 19 us where waking one of a pool took
 * 7 us; each is given four chunks at least, some 80 us of work. */
int sf_run(const struct job *job, int threads) {
#if defined(ROUNDS_AT_RANDOM)
    run_of *run = drawn_here();
#else
    run_of *run = has_avx2() ? run_avx2 : run_plain;
#endif
    struct team team = {.job = job, .total = 0, .run = run, .marks = has_avx2() ? job->marks : 0};
    for (int64_t i = 0; i < job->count; i++) team.total += job->sizes[i];
    if (job->kind == PUT_BACK && !(team.back = calloc(team.total / CHUNK + 1, 1))) return 1;
    fegetenv(&team.rounding);
    int64_t useful = team.total / (4 * CHUNK) + 1;
    if (threads > useful) threads = (int)useful;
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    pthread_t helpers[MAX_THREADS];
    int started = 0;
    while (started < threads - 1 && !pthread_create(&helpers[started], 0, help, &team)) started++;
    work(&team);
    while (started > 0) pthread_join(helpers[--started], 0);
    int differs = atomic_load(&team.differs);
    for (int64_t chunk = 0, begin = 0; team.back && differs && begin < team.total; chunk++, begin += CHUNK)
        if (team.back[chunk])
            undo(&team, (struct cursor){0, 0}, begin, team.total - begin < CHUNK ? team.total : begin + CHUNK);
    free(team.back);
    return differs;
}
