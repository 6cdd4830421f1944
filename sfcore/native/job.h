/* What step.c is told to do, in the order in which Python writes it: sftorch/kernels/call.py, kinds.py. */
#include <stdint.h>

enum { MARKED = 512 }; /* elements that have a mark, of all tensors in a row */
enum kind {
    SGD, YOUNG, ADAMW, ADAMW_MOMENTUM, RECOVER, PUT_ASIDE, HOLDS, PUT_BACK, MEAN,
    FLOOR_SGD, FLOOR_ADAMW, FLOOR_MEAN
};
/* An element type of y, x and g: as z, or 16 bits; REST adds the 16 bits that y lacks to be a float32. */
enum type { AS_Z, BFLOAT16, BFLOAT16_REST };

/* Tables have an address for each tensor. x is where y is to end as x, or where y is put aside. */
struct job {
    int64_t count;
    const int64_t *sizes;
    char *const *y, *const *rest, *const *z, *const *v, *const *m, *const *x, *const *g;
    int32_t kind, is_double, y_type, g_type;
    double sign, lr_t, wd_y, wd_z, k1, k2, b2, eps, m1, correction2, correction1;
    /* Of the forms that are rounded at random, see eight.h; else 0. z is then the gap z - y. */
    char *const *scale;    /* exponents of the rows, of gap, v and m; 0 for "lean" */
    const int64_t *rows;   /* of each tensor */
    const int64_t *places; /* three of each tensor: the place of its first element in the whole of which it is a
                              part, the length of a run of the whole's elements in it, and from one to the next */
    const uint32_t *keys;  /* random words of each tensor's step */
    uint64_t *marks;       /* of MARKED elements of x each: PUT_ASIDE leaves them, PUT_BACK asks them; or 0 */
};

int sf_run(const struct job *job, int threads);
