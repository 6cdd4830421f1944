/* Records what a process does to the files under $POWERCUT_ROOT into $POWERCUT_LOG, in the order in which it
 * takes effect. Preloaded (LD_PRELOAD); Linux. Each record is a struct record, then two paths and the bytes.
 * What it does not see (memory that is mapped, calls inside libc) shows when the log is replayed: the files it
 * leads to must be those on the disk. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN = 1, WRITE, TRUNCATE, SYNC, RENAME, UNLINK, MKDIR, RMDIR, UNKNOWN };

struct record {
    int32_t kind, path_length, other_length;
    int32_t flags;
    int64_t offset, length; /* of the bytes; of TRUNCATE, offset is the new size */
};

static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
static char root[PATH_MAX];
static size_t root_length;
static int log_fd = -1;

__attribute__((constructor)) static void begin(void) {
    const char *where = getenv("POWERCUT_ROOT"), *log = getenv("POWERCUT_LOG");
    if (!where || !log || !realpath(where, root)) return;
    root_length = strlen(root);
    log_fd = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

static int inside(const char *path) {
    return log_fd >= 0 && !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

static int of_fd(int fd, char *path) {
    char link[40];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return inside(path);
}

/* The path of a name below a folder, absolute, its last part as it stands there. */
static int of_name(int folder, const char *name, char *path) {
    char base[PATH_MAX], joined[2 * PATH_MAX];
    if (log_fd < 0) return 0;
    if (name[0] == '/') {
        snprintf(joined, sizeof joined, "%s", name);
    } else {
        if (folder == AT_FDCWD ? !getcwd(base, sizeof base) : !(of_fd(folder, base), 1)) return 0;
        snprintf(joined, sizeof joined, "%s/%s", base, name);
    }
    size_t end = strlen(joined);
    while (end > 1 && joined[end - 1] == '/') joined[--end] = 0;
    char *last = strrchr(joined, '/');
    if (!last) return 0;
    *last = 0;
    if (!realpath(last == joined ? "/" : joined, base)) return 0;
    if (snprintf(path, PATH_MAX, "%s/%s", base[1] ? base : "", last + 1) >= PATH_MAX) return 0;
    return inside(path);
}

static void put(const void *bytes, size_t length) {
    while (length) {
        ssize_t done = syscall(SYS_write, log_fd, bytes, length);
        if (done <= 0) abort();
        bytes = (const char *)bytes + done;
        length -= (size_t)done;
    }
}

static void note(int kind, const char *path, const char *other, int flags, int64_t offset, const void *bytes,
                 int64_t length) {
    struct record head = {kind, (int32_t)strlen(path), (int32_t)strlen(other), flags, offset, length};
    put(&head, sizeof head);
    put(path, (size_t)head.path_length);
    put(other, (size_t)head.other_length);
    if (bytes) put(bytes, (size_t)length);
}

#define REAL(type, name, ...)                                    \
    static type (*real)(__VA_ARGS__);                            \
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, #name)

static int opened(int folder, const char *name, int flags, mode_t mode, int (*real)(int, const char *, int, ...)) {
    char path[PATH_MAX];
    int changes = flags & (O_CREAT | O_TRUNC);
    if (!changes || (flags & O_TMPFILE) == O_TMPFILE || !of_name(folder, name, path))
        return real(folder, name, flags, mode);
    pthread_mutex_lock(&turn);
    int fd = real(folder, name, flags, mode), kept = errno;
    if (fd >= 0) note(OPEN, path, "", flags & O_TRUNC ? 1 : 0, 0, NULL, 0);
    pthread_mutex_unlock(&turn);
    errno = kept;
    return fd;
}

#define MODE                                  \
    mode_t mode = 0;                          \
    if (flags & (O_CREAT | O_TMPFILE)) {      \
        va_list rest;                         \
        va_start(rest, flags);                \
        mode = va_arg(rest, mode_t);          \
        va_end(rest);                         \
    }

int openat(int folder, const char *name, int flags, ...) {
    MODE REAL(int, openat, int, const char *, int, ...);
    return opened(folder, name, flags, mode, real);
}
int openat64(int folder, const char *name, int flags, ...) {
    MODE REAL(int, openat64, int, const char *, int, ...);
    return opened(folder, name, flags, mode, real);
}
int open(const char *name, int flags, ...) {
    MODE return openat(AT_FDCWD, name, flags, mode);
}
int open64(const char *name, int flags, ...) {
    MODE return openat64(AT_FDCWD, name, flags, mode);
}
int creat(const char *name, mode_t mode) { return open(name, O_CREAT | O_WRONLY | O_TRUNC, mode); }

static FILE *file_opened(const char *name, const char *how, FILE *(*real)(const char *, const char *)) {
    char path[PATH_MAX];
    if (how[0] == 'r' || !of_name(AT_FDCWD, name, path)) return real(name, how);
    pthread_mutex_lock(&turn);
    FILE *file = real(name, how);
    if (file) note(OPEN, path, "", how[0] == 'w', 0, NULL, 0);
    pthread_mutex_unlock(&turn);
    return file;
}
FILE *fopen(const char *name, const char *how) {
    REAL(FILE *, fopen, const char *, const char *);
    return file_opened(name, how, real);
}
FILE *fopen64(const char *name, const char *how) {
    REAL(FILE *, fopen64, const char *, const char *);
    return file_opened(name, how, real);
}

/* A write of any kind: where it went is read from the file, whichever call it was. */
#define WRITES(fd, at, call)                                                            \
    char path[PATH_MAX];                                                                \
    struct stat about;                                                                  \
    if (log_fd < 0 || fstat(fd, &about) || !S_ISREG(about.st_mode) || !of_fd(fd, path)) \
        return call;                                                                    \
    pthread_mutex_lock(&turn);                                                          \
    int64_t start = (at);                                                               \
    if (fcntl(fd, F_GETFL) & O_APPEND) start = about.st_size;                           \
    ssize_t done = call;                                                                \
    int kept = errno;                                                                   \
    if (done > 0) written(fd, path, start, done);                                       \
    pthread_mutex_unlock(&turn);                                                        \
    errno = kept;                                                                       \
    return done

static void written(int fd, const char *path, int64_t start, ssize_t length) {
    char *bytes = malloc((size_t)length);
    char link[40];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    int again = (int)syscall(SYS_openat, AT_FDCWD, link, O_RDONLY | O_CLOEXEC, 0);
    int64_t done = 0;
    while (again >= 0 && done < length) {
        ssize_t some = syscall(SYS_pread64, again, bytes + done, (size_t)(length - done), start + done);
        if (some <= 0) break;
        done += some;
    }
    if (again >= 0) syscall(SYS_close, again);
    if (done == length) note(WRITE, path, "", 0, start, bytes, length);
    else note(UNKNOWN, path, "write", 0, 0, NULL, 0);
    free(bytes);
}

ssize_t write(int fd, const void *bytes, size_t count) {
    REAL(ssize_t, write, int, const void *, size_t);
    WRITES(fd, lseek(fd, 0, SEEK_CUR), real(fd, bytes, count));
}
ssize_t pwrite(int fd, const void *bytes, size_t count, off_t at) {
    REAL(ssize_t, pwrite, int, const void *, size_t, off_t);
    WRITES(fd, at, real(fd, bytes, count, at));
}
ssize_t pwrite64(int fd, const void *bytes, size_t count, off64_t at) {
    REAL(ssize_t, pwrite64, int, const void *, size_t, off64_t);
    WRITES(fd, at, real(fd, bytes, count, at));
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(ssize_t, writev, int, const struct iovec *, int);
    WRITES(fd, lseek(fd, 0, SEEK_CUR), real(fd, parts, count));
}
ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t at) {
    REAL(ssize_t, pwritev, int, const struct iovec *, int, off_t);
    WRITES(fd, at, real(fd, parts, count, at));
}
ssize_t sendfile(int fd, int from, off_t *offset, size_t count) {
    REAL(ssize_t, sendfile, int, int, off_t *, size_t);
    WRITES(fd, lseek(fd, 0, SEEK_CUR), real(fd, from, offset, count));
}
ssize_t copy_file_range(int from, off64_t *in, int fd, off64_t *out, size_t count, unsigned flags) {
    REAL(ssize_t, copy_file_range, int, off64_t *, int, off64_t *, size_t, unsigned);
    WRITES(fd, out ? *out : lseek(fd, 0, SEEK_CUR), real(from, in, fd, out, count, flags));
}

/* A call that returns 0, of an open file or of names. */
#define OF_FD(kind, fd, offset, call)            \
    char path[PATH_MAX];                         \
    if (!of_fd(fd, path)) return call;           \
    pthread_mutex_lock(&turn);                   \
    int done = call, kept = errno;               \
    if (!done) note(kind, path, "", 0, offset, NULL, 0); \
    pthread_mutex_unlock(&turn);                 \
    errno = kept;                                \
    return done

int fsync(int fd) {
    REAL(int, fsync, int);
    OF_FD(SYNC, fd, 0, real(fd));
}
int fdatasync(int fd) {
    REAL(int, fdatasync, int);
    OF_FD(SYNC, fd, 0, real(fd));
}
int ftruncate(int fd, off_t size) {
    REAL(int, ftruncate, int, off_t);
    OF_FD(TRUNCATE, fd, size, real(fd, size));
}
int ftruncate64(int fd, off64_t size) {
    REAL(int, ftruncate64, int, off64_t);
    OF_FD(TRUNCATE, fd, size, real(fd, size));
}

#define OF_NAME(kind, folder, name, call)                                 \
    char path[PATH_MAX];                                                  \
    if (!of_name(folder, name, path)) return call;                        \
    pthread_mutex_lock(&turn);                                            \
    int done = call, kept = errno;                                        \
    if (!done) note(kind, path, "", 0, 0, NULL, 0);                       \
    pthread_mutex_unlock(&turn);                                          \
    errno = kept;                                                         \
    return done

int unlink(const char *name) {
    REAL(int, unlink, const char *);
    OF_NAME(UNLINK, AT_FDCWD, name, real(name));
}
int rmdir(const char *name) {
    REAL(int, rmdir, const char *);
    OF_NAME(RMDIR, AT_FDCWD, name, real(name));
}
int unlinkat(int folder, const char *name, int flags) {
    REAL(int, unlinkat, int, const char *, int);
    OF_NAME(flags & AT_REMOVEDIR ? RMDIR : UNLINK, folder, name, real(folder, name, flags));
}
int mkdirat(int folder, const char *name, mode_t mode) {
    REAL(int, mkdirat, int, const char *, mode_t);
    OF_NAME(MKDIR, folder, name, real(folder, name, mode));
}
int mkdir(const char *name, mode_t mode) {
    REAL(int, mkdir, const char *, mode_t);
    OF_NAME(MKDIR, AT_FDCWD, name, real(name, mode));
}
int link(const char *old, const char *name) {
    REAL(int, link, const char *, const char *);
    OF_NAME(UNKNOWN, AT_FDCWD, name, real(old, name));
}
int symlink(const char *old, const char *name) {
    REAL(int, symlink, const char *, const char *);
    OF_NAME(UNKNOWN, AT_FDCWD, name, real(old, name));
}

static int renamed(int from, const char *old, int to, const char *name, unsigned flags,
                   int (*real)(int, const char *, int, const char *, unsigned)) {
    char path[PATH_MAX], other[PATH_MAX];
    int left = of_name(from, old, path), came = of_name(to, name, other);
    if (!left && !came) return real(from, old, to, name, flags);
    pthread_mutex_lock(&turn);
    int done = real(from, old, to, name, flags), kept = errno;
    if (!done) note(left && came ? RENAME : UNKNOWN, path, other, 0, 0, NULL, 0);
    pthread_mutex_unlock(&turn);
    errno = kept;
    return done;
}
static int by_call(int from, const char *old, int to, const char *name, unsigned flags) {
    return (int)syscall(SYS_renameat2, from, old, to, name, flags);
}
int rename(const char *old, const char *name) { return renamed(AT_FDCWD, old, AT_FDCWD, name, 0, by_call); }
int renameat(int from, const char *old, int to, const char *name) {
    return renamed(from, old, to, name, 0, by_call);
}
int renameat2(int from, const char *old, int to, const char *name, unsigned flags) {
    return renamed(from, old, to, name, flags, by_call);
}
