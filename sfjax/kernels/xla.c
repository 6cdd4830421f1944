/* A step of a list of leaves as a custom call of XLA: buffers become the tables of job.h, step.c does the rest.
 *
 * Operands: y, z, v and m as far as the kind has them, for MEAN the means alone, and g, of all leaves each; then
 * the numbers, in one array. Results: the new y, z, v and m, each in the buffer of its operand. Python's side is
 * sfjax/kernels/call.py.
 */
#include <stdlib.h>
#include <string.h>

#include "job.h"
#include "xla/ffi/api/c_api.h"

/* As NUMBERS of call.py. With USABLE at 0 RAdam's second moment is young. */
enum number {
    LR_T, WD_Y, WD_Z, K1, K2, SHARE2, EPS, SHARE1, CORRECTION2, CORRECTION1, USABLE, HELD_X, HOLDS_X, COUNT
};

/* step.c is in a library of its own, which the other twin loads as well. */
static int (*run)(const struct job *job, int threads);
void sf_xla_use(int (*of_step)(const struct job *job, int threads)) { run = of_step; }

static XLA_FFI_Error *error(const XLA_FFI_CallFrame *frame, const char *message) {
    XLA_FFI_Error_Create_Args args = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, 0, message,
                                      XLA_FFI_Error_Code_INVALID_ARGUMENT};
    return frame->api->XLA_FFI_Error_Create(&args);
}

static void describe(XLA_FFI_Metadata *metadata) {
    metadata->api_version.major_version = XLA_FFI_API_MAJOR;
    metadata->api_version.minor_version = XLA_FFI_API_MINOR;
    /* No traits; newer versions have more after them, of which zero is none as well. */
    memset(&metadata->traits, 0, sizeof *metadata - offsetof(XLA_FFI_Metadata, traits));
}

static int64_t elements(const XLA_FFI_Buffer *buffer) {
    int64_t count = 1;
    for (int64_t i = 0; i < buffer->rank; i++) count *= buffer->dims[i];
    return count;
}

static int threads_of(const XLA_FFI_CallFrame *frame) {
    int64_t threads = 1;
    XLA_FFI_ThreadPool_NumThreads_Args args = {XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, 0, frame->ctx,
                                               &threads};
    XLA_FFI_Error *failed = frame->api->XLA_FFI_ThreadPool_NumThreads(&args);
    if (failed) {
        XLA_FFI_Error_Destroy_Args destroy = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, 0, failed};
        frame->api->XLA_FFI_Error_Destroy(&destroy);
        return 1;
    }
    return (int)threads;
}

static void exchange(char *one, char *other, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i++) {
        char held = one[i];
        one[i] = other[i];
        other[i] = held;
    }
}

static void exchange_all(const struct job *job, char **ys, char **zs) {
    for (int64_t i = 0; i < job->count; i++) exchange(ys[i], zs[i], job->sizes[i] * (job->is_double ? 8 : 4));
}

/* At beta = 0 the first column holds z, and the second x: what beta = 1 has, with its columns exchanged. */
static void step(struct job *job, char **ys, char **zs, int held_x, int holds_x, int threads) {
    job->y = held_x && holds_x ? zs : ys;
    job->z = held_x && holds_x ? ys : zs;
    if (held_x && !holds_x) exchange_all(job, ys, zs);
    run(job, threads);
    if (holds_x && !held_x) exchange_all(job, ys, zs);
}

static double number(const XLA_FFI_Buffer *numbers, enum number at) {
    return numbers->dtype == XLA_FFI_DataType_F64 ? ((double *)numbers->data)[at] : ((float *)numbers->data)[at];
}

XLA_FFI_Error *sf_xla_step(XLA_FFI_CallFrame *frame) {
    if (frame->extension_start && frame->extension_start->type == XLA_FFI_Extension_Metadata) {
        describe(((XLA_FFI_Metadata_Extension *)frame->extension_start)->metadata);
        return 0;
    }
    if (frame->stage != XLA_FFI_ExecutionStage_EXECUTE) return 0;
    if (frame->attrs.size != 1) return error(frame, "sf_xla_step must have the attribute kind alone");
    int32_t kind = *(int32_t *)((XLA_FFI_Scalar *)frame->attrs.attrs[0])->value;
    int64_t columns = kind == MEAN ? 1 : kind == SGD ? 2 : kind == ADAMW_MOMENTUM ? 4 : 3;
    int64_t leaves = frame->rets.size / columns;
    XLA_FFI_Buffer **in = (XLA_FFI_Buffer **)frame->args.args, **out = (XLA_FFI_Buffer **)frame->rets.rets;
    if (!leaves || frame->rets.size != columns * leaves || frame->args.size != (columns + 1) * leaves + 1)
        return error(frame, "sf_xla_step must have its columns of leaves, gradients and numbers");
    const XLA_FFI_Buffer *numbers = in[(columns + 1) * leaves];
    if (elements(numbers) != COUNT) return error(frame, "sf_xla_step must have all numbers");
    for (int64_t i = 0; i < columns * leaves; i++)
        if (in[i]->data != out[i]->data) return error(frame, "sf_xla_step must have results in its operands");
    for (int64_t i = leaves; i < (columns + 1) * leaves; i++)
        if (elements(in[i]) != elements(in[i - leaves]))
            return error(frame, "sf_xla_step must have columns of the same sizes");

    int64_t *sizes = malloc(leaves * sizeof *sizes);
    char **tables = malloc((columns + 1) * leaves * sizeof *tables);
    if (!sizes || !tables) {
        free(sizes), free(tables);
        return error(frame, "sf_xla_step must have memory for its tables");
    }
    for (int64_t i = 0; i < leaves; i++) sizes[i] = elements(in[i]);
    for (int64_t i = 0; i < (columns + 1) * leaves; i++) tables[i] = in[i]->data;
    char **gradients = tables + columns * leaves;
    struct job job = {
        .count = leaves,
        .sizes = sizes,
        .v = columns > 2 ? tables + 2 * leaves : 0,
        .m = columns > 3 ? tables + 3 * leaves : 0,
        .g = gradients,
        .kind = number(numbers, USABLE) > 0 ? kind : YOUNG,
        .is_double = in[0]->dtype == XLA_FFI_DataType_F64,
        .g_type = in[columns * leaves]->dtype == XLA_FFI_DataType_BF16 ? BFLOAT16 : AS_Z,
        .sign = 1.0,
        .lr_t = number(numbers, LR_T),
        .wd_y = number(numbers, WD_Y),
        .wd_z = number(numbers, WD_Z),
        .k1 = number(numbers, K1),
        .k2 = number(numbers, K2),
        .b2 = 1.0 - number(numbers, SHARE2),
        .eps = number(numbers, EPS),
        .m1 = 1.0 - number(numbers, SHARE1),
        .correction2 = number(numbers, CORRECTION2),
        .correction1 = number(numbers, CORRECTION1),
    };
    char **zs = kind == MEAN ? tables : tables + leaves;
    step(&job, tables, zs, number(numbers, HELD_X) != 0, number(numbers, HOLDS_X) != 0, threads_of(frame));
    free(sizes), free(tables);
    return 0;
}
