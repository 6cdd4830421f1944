/* The arithmetic of step.c for one dtype of z, included once for each: REAL, its ROOT, and OF(NAME). */

/* One loop, to be inlined with a constant kind, to_x and at_z, so that no branch is left in it. */
INLINE void OF(move)(int kind, int to_x, int at_z, int64_t n, REAL *y, REAL *z, REAL *v, REAL *m, const REAL *x,
                     const REAL *g, const struct job *job) {
    const REAL sign = (REAL)job->sign, down = (REAL)-job->lr_t;
    const REAL wd_y = (REAL)job->wd_y, wd_z = (REAL)job->wd_z, k1 = (REAL)job->k1, k2 = (REAL)job->k2;
    const REAL share2 = (REAL)(1.0 - job->b2), share1 = (REAL)(1.0 - job->m1), eps = (REAL)job->eps;
    const REAL per2 = (REAL)(1.0 / job->correction2), per1 = (REAL)(1.0 / job->correction1);
    ELEMENTWISE
    for (int64_t i = 0; i < n; i++) {
        REAL grad = sign * g[i], direction = grad;
        if (kind != SGD) v[i] = (v[i] - v[i] * share2) + grad * grad * share2;
        if (kind == ADAMW_MOMENTUM) {
            m[i] = (m[i] - m[i] * share1) + grad * share1;
            direction = m[i] * per1;
        }
        if (kind == ADAMW || kind == ADAMW_MOMENTUM) direction /= ROOT(v[i] * per2) + eps;
        direction += wd_y * y[i];
        if (at_z) direction += wd_z * z[i];
        REAL delta = down * direction; /* S6 */
        if (to_x) {
            z[i] = z[i] + delta;              /* S7 */
            y[i] = x[i] + k1 * (z[i] - x[i]); /* S8 */
        } else {
            y[i] = y[i] + (k1 * (z[i] - y[i]) + k2 * delta); /* S9* */
            z[i] = z[i] + delta;                             /* S7 */
        }
    }
}

/* Does a job to n elements; returns whether HOLDS found a difference. */
INLINE int OF(span)(const struct job *job, int64_t n, REAL *y, REAL *z, REAL *v, REAL *m, REAL *x,
                    const REAL *g) {
    const REAL k1 = (REAL)job->k1;
    int differ = 0;
    switch (job->kind) {
    case SGD: MOVE(SGD); break;
    case YOUNG: MOVE(YOUNG); break;
    case ADAMW: MOVE(ADAMW); break;
    case ADAMW_MOMENTUM: MOVE(ADAMW_MOMENTUM); break;
    case RECOVER:
        ELEMENTWISE
        for (int64_t i = 0; i < n; i++) x[i] = y[i] + k1 * (y[i] - z[i]);
        break;
    case HOLDS: /* whether y still is the x that PUT_ASIDE left there; NaN is not */
        for (int64_t i = 0; i < n; i++) differ |= !(y[i] == x[i] + k1 * (x[i] - z[i]));
        break;
    case MEAN: /* in z, of k1 gradients, of which g is the newest; the first is taken as it is */
        if (k1 == 1) {
            ELEMENTWISE
            for (int64_t i = 0; i < n; i++) z[i] = g[i];
        } else {
            ELEMENTWISE
            for (int64_t i = 0; i < n; i++) z[i] = z[i] + (g[i] - z[i]) / k1;
        }
        break;
    case FLOOR_MEAN:
        ELEMENTWISE
        for (int64_t i = 0; i < n; i++) z[i] += g[i];
        break;
    case FLOOR_SGD: /* the traffic of a step and as good as no arithmetic, for benchmarks */
        ELEMENTWISE
        for (int64_t i = 0; i < n; i++) y[i] += g[i], z[i] += g[i];
        break;
    case FLOOR_ADAMW:
        ELEMENTWISE
        for (int64_t i = 0; i < n; i++) y[i] += g[i], z[i] += g[i], v[i] += g[i];
        break;
    }
    return differ;
}
