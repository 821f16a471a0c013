/* Stands between a process and libc (LD_PRELOAD), for calls that change files.
 *
 * ODDSCAN_SHIM_PART=<part of paths>     which files count for faults and for the log of calls
 * ODDSCAN_SHIM_FAULT="<what> <nth>"     as ODDSCAN_FAULT: kill_before, kill_half, kill_after, enospc, edquot,
 *                                       eio, sync_eio; removals need no space, and only eio fails them
 * ODDSCAN_SHIM_LOG=<file>               a line per call that counts: number, call, path
 * ODDSCAN_SHIM_TRACE=<file>             every call below ODDSCAN_SHIM_ROOT with its data, see replay.rs
 *
 * One lock holds for a call and its lines, so that their order is that of the calls.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define PATHS (PATH_MAX + 512)
#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned long count;
static int log_fd = -1, trace_fd = -1;

static ssize_t raw_write(int fd, const void *bytes, size_t n) {
    REAL(ssize_t, write, int, const void *, size_t);
    return real(fd, bytes, n);
}

static int raw_open(const char *path) {
    REAL(int, open, const char *, int, ...);
    return real(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

/* ---- paths ---- */

static void path_of_fd(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, PATHS - 1);
    path[n > 0 ? n : 0] = 0;
}

static void path_at(int folder, const char *name, char *path) {
    if (name[0] == '/') {
        snprintf(path, PATHS, "%s", name);
        return;
    }
    char above[PATHS];
    if (folder == AT_FDCWD) {
        if (!getcwd(above, sizeof above)) above[0] = 0;
    } else {
        path_of_fd(folder, above);
    }
    snprintf(path, PATHS, "%.4000s/%s", above, name);
}

/* ---- faults ---- */

enum what { NONE, KILL_BEFORE, KILL_HALF, KILL_AFTER, FAIL, FAIL_SYNC };
static enum what what;
static unsigned long nth;
static int error;

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

__attribute__((constructor)) static void begin(void) {
    const char *fault = getenv("ODDSCAN_SHIM_FAULT");
    char word[32] = "";
    if (fault && sscanf(fault, "%31s %lu", word, &nth) == 2) {
        if (!strcmp(word, "kill_before")) what = KILL_BEFORE;
        if (!strcmp(word, "kill_half")) what = KILL_HALF;
        if (!strcmp(word, "kill_after")) what = KILL_AFTER;
        if (!strcmp(word, "enospc")) what = FAIL, error = ENOSPC;
        if (!strcmp(word, "edquot")) what = FAIL, error = EDQUOT;
        if (!strcmp(word, "eio")) what = FAIL, error = EIO;
        if (!strcmp(word, "sync_eio")) what = FAIL_SYNC, error = EIO;
    }
    const char *path = getenv("ODDSCAN_SHIM_LOG");
    if (path) log_fd = raw_open(path);
    path = getenv("ODDSCAN_SHIM_TRACE");
    if (path) trace_fd = raw_open(path);
}

/* The number of this call among those that count, or 0. */
static unsigned long enter(const char *call, const char *path) {
    pthread_mutex_lock(&lock);
    static const char *part;
    if (!part) part = getenv("ODDSCAN_SHIM_PART");
    if (!part || !strstr(path, part)) return 0;
    count++;
    if (log_fd >= 0) {
        char line[PATHS + 64];
        int n = snprintf(line, sizeof line, "%lu %s %s\n", count, call, path);
        raw_write(log_fd, line, n);
    }
    if (what == KILL_BEFORE && count == nth) die();
    return count;
}

static int fails(unsigned long number, int is_sync) {
    int is_on = number && number >= nth && (what == FAIL || (what == FAIL_SYNC && is_sync));
    if (is_on) errno = error;
    return is_on;
}

/* A full disk still takes what needs no space. */
static int fails_to_remove(unsigned long number) { return error == EIO && fails(number, 0); }

static int is_half(unsigned long number) { return what == KILL_HALF && number && number == nth; }

static void leave(unsigned long number) {
    if (what == KILL_AFTER && number && number == nth) die();
    int kept = errno;
    pthread_mutex_unlock(&lock);
    errno = kept;
}

/* ---- the trace ---- */

static int is_traced(const char *path) {
    static const char *root;
    if (trace_fd < 0) return 0;
    if (!root) root = getenv("ODDSCAN_SHIM_ROOT");
    return root && !strncmp(path, root, strlen(root));
}

static void put(char op, uint64_t inode, uint64_t offset, const char *path, const char *other,
                const void *data, uint32_t n_data) {
    int kept = errno;
    struct __attribute__((packed)) {
        char op;
        uint64_t inode, offset;
        uint32_t n_data;
        uint16_t n_path, n_other;
    } head = {op, inode, offset, n_data, strlen(path), strlen(other)};
    struct iovec parts[] = {{&head, sizeof head},
                            {(void *)path, head.n_path},
                            {(void *)other, head.n_other},
                            {(void *)data, n_data}};
    REAL(ssize_t, writev, int, const struct iovec *, int);
    real(trace_fd, parts, 4);
    errno = kept;
}

static uint64_t inode_of(int fd) {
    struct stat about;
    int kept = errno;
    uint64_t inode = fstat(fd, &about) ? 0 : about.st_ino;
    errno = kept;
    return inode;
}

static uint64_t inode_at(const char *path) {
    struct stat about;
    int kept = errno;
    uint64_t inode = lstat(path, &about) ? 0 : about.st_ino;
    errno = kept;
    return inode;
}

/* ---- calls ---- */

/* A file that is opened: a step if it is made or emptied. */
static int opened(int (*real)(int, const char *, int, ...), int folder, const char *name, int flags,
                  mode_t mode) {
    int makes = flags & (O_CREAT | O_TRUNC) && (flags & O_TMPFILE) != O_TMPFILE;
    if (!makes) return real(folder, name, flags, mode);
    char path[PATHS];
    path_at(folder, name, path);
    unsigned long number = enter("create", path);
    uint64_t before = inode_at(path);
    int fd = fails(number, 0) ? -1 : real(folder, name, flags, mode);
    if (fd >= 0 && is_traced(path)) {
        if (!before) put('C', inode_of(fd), 0, path, "", "", 0);
        else if (flags & O_TRUNC) put('T', inode_of(fd), 0, path, "", "", 0);
    }
    leave(number);
    return fd;
}

#define OPEN(name, at) \
    int name(const char *path, int flags, ...) { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        REAL(int, at, int, const char *, int, ...); \
        return opened(real, AT_FDCWD, path, flags, mode); \
    } \
    int at(int folder, const char *path, int flags, ...) { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        REAL(int, at, int, const char *, int, ...); \
        return opened(real, folder, path, flags, mode); \
    }
OPEN(open, openat)
OPEN(open64, openat64)

static int is_file(int fd) {
    struct stat about;
    int kept = errno;
    int is = !fstat(fd, &about) && S_ISREG(about.st_mode);
    errno = kept;
    return is;
}

ssize_t write(int fd, const void *bytes, size_t n) {
    REAL(ssize_t, write, int, const void *, size_t);
    if (!is_file(fd)) return real(fd, bytes, n);
    char path[PATHS];
    path_of_fd(fd, path);
    unsigned long number = enter("write", path);
    if (is_half(number)) {
        real(fd, bytes, n / 2);
        die();
    }
    int traced = is_traced(path);
    struct stat about;
    uint64_t offset = 0;
    if (traced) {
        int appends = fcntl(fd, F_GETFL) & O_APPEND;
        offset = appends && !fstat(fd, &about) ? about.st_size : lseek(fd, 0, SEEK_CUR);
    }
    ssize_t done = fails(number, 0) ? -1 : real(fd, bytes, n);
    if (traced && done > 0) put('W', inode_of(fd), offset, path, "", bytes, done);
    leave(number);
    return done;
}

ssize_t writev(int fd, const struct iovec *parts, int n_parts) {
    REAL(ssize_t, writev, int, const struct iovec *, int);
    /* A file gets the first part alone: callers go on with the rest. */
    if (!is_file(fd)) return real(fd, parts, n_parts);
    while (n_parts > 1 && !parts->iov_len) parts++, n_parts--;
    return n_parts ? write(fd, parts->iov_base, parts->iov_len) : 0;
}

static ssize_t written_at(ssize_t (*real)(int, const void *, size_t, off64_t), int fd,
                          const void *bytes, size_t n, off64_t offset) {
    char path[PATHS];
    path_of_fd(fd, path);
    unsigned long number = enter("pwrite", path);
    if (is_half(number)) {
        real(fd, bytes, n / 2, offset);
        die();
    }
    ssize_t done = fails(number, 0) ? -1 : real(fd, bytes, n, offset);
    if (done > 0 && is_traced(path)) put('W', inode_of(fd), offset, path, "", bytes, done);
    leave(number);
    return done;
}

ssize_t pwrite(int fd, const void *bytes, size_t n, off_t offset) {
    REAL(ssize_t, pwrite64, int, const void *, size_t, off64_t);
    return written_at(real, fd, bytes, n, offset);
}

ssize_t pwrite64(int fd, const void *bytes, size_t n, off64_t offset) {
    REAL(ssize_t, pwrite64, int, const void *, size_t, off64_t);
    return written_at(real, fd, bytes, n, offset);
}

static int resized(int (*real)(int, off64_t), int fd, off64_t size) {
    char path[PATHS];
    path_of_fd(fd, path);
    unsigned long number = enter("resize", path);
    int done = fails(number, 0) ? -1 : real(fd, size);
    if (!done && is_traced(path)) put('T', inode_of(fd), size, path, "", "", 0);
    leave(number);
    return done;
}

int ftruncate(int fd, off_t size) {
    REAL(int, ftruncate64, int, off64_t);
    return resized(real, fd, size);
}

int ftruncate64(int fd, off64_t size) {
    REAL(int, ftruncate64, int, off64_t);
    return resized(real, fd, size);
}

static int synced(int (*real)(int), int fd) {
    char path[PATHS];
    path_of_fd(fd, path);
    unsigned long number = enter("sync", path);
    /* The test does not depend on the disk. What a sync promises is in the trace. */
    (void)real;
    int done = fails(number, 1) ? -1 : 0;
    if (!done && is_traced(path)) put('S', inode_of(fd), 0, path, "", "", 0);
    leave(number);
    return done;
}

int fsync(int fd) {
    REAL(int, fsync, int);
    return synced(real, fd);
}

int fdatasync(int fd) {
    REAL(int, fdatasync, int);
    return synced(real, fd);
}

/* Writes data out, but neither the size of the file nor the cache of the disk: no promise. */
int sync_file_range(int fd, off64_t offset, off64_t n, unsigned flags) {
    REAL(int, sync_file_range, int, off64_t, off64_t, unsigned);
    char path[PATHS];
    path_of_fd(fd, path);
    unsigned long number = enter("sync", path);
    int done = fails(number, 1) ? -1 : real(fd, offset, n, flags);
    leave(number);
    return done;
}

static int moved(char op, const char *from, const char *to, int (*call)(void *), void *with) {
    unsigned long number = enter(op == 'R' ? "rename" : "link", to);
    int done = fails(number, 0) ? -1 : call(with);
    if (!done && is_traced(to)) put(op, 0, 0, from, to, "", 0);
    leave(number);
    return done;
}

struct names {
    int folder, other_folder;
    const char *name, *other;
    unsigned flags;
};

static int call_renameat2(void *with) {
    struct names *n = with;
    REAL(int, renameat2, int, const char *, int, const char *, unsigned);
    return real(n->folder, n->name, n->other_folder, n->other, n->flags);
}

static int call_linkat(void *with) {
    struct names *n = with;
    REAL(int, linkat, int, const char *, int, const char *, int);
    return real(n->folder, n->name, n->other_folder, n->other, n->flags);
}

static int named(char op, struct names names) {
    char from[PATHS], to[PATHS];
    path_at(names.folder, names.name, from);
    path_at(names.other_folder, names.other, to);
    return moved(op, from, to, op == 'R' ? call_renameat2 : call_linkat, &names);
}

int rename(const char *from, const char *to) {
    return named('R', (struct names){AT_FDCWD, AT_FDCWD, from, to, 0});
}

int renameat(int folder, const char *from, int other, const char *to) {
    return named('R', (struct names){folder, other, from, to, 0});
}

int renameat2(int folder, const char *from, int other, const char *to, unsigned flags) {
    return named('R', (struct names){folder, other, from, to, flags});
}

int link(const char *from, const char *to) {
    return named('L', (struct names){AT_FDCWD, AT_FDCWD, from, to, 0});
}

int linkat(int folder, const char *from, int other, const char *to, int flags) {
    return named('L', (struct names){folder, other, from, to, flags});
}

int unlinkat(int folder, const char *name, int flags) {
    REAL(int, unlinkat, int, const char *, int);
    char path[PATHS];
    path_at(folder, name, path);
    unsigned long number = enter("remove", path);
    int done = fails_to_remove(number) ? -1 : real(folder, name, flags);
    if (!done && is_traced(path)) put('U', 0, 0, path, "", "", 0);
    leave(number);
    return done;
}

int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }

int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int folder, const char *name, mode_t mode) {
    REAL(int, mkdirat, int, const char *, mode_t);
    char path[PATHS];
    path_at(folder, name, path);
    unsigned long number = enter("folder", path);
    int done = fails(number, 0) ? -1 : real(folder, name, mode);
    if (!done && is_traced(path)) put('M', inode_at(path), 0, path, "", "", 0);
    leave(number);
    return done;
}

int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

/* Copies within the kernel: callers fall back to reads and writes. */
ssize_t copy_file_range(int from, off64_t *at, int to, off64_t *other, size_t n, unsigned flags) {
    (void)from, (void)at, (void)to, (void)other, (void)n, (void)flags;
    errno = ENOSYS;
    return -1;
}

ssize_t sendfile64(int to, int from, off64_t *offset, size_t n) {
    (void)to, (void)from, (void)offset, (void)n;
    errno = EINVAL;
    return -1;
}

ssize_t sendfile(int to, int from, off_t *offset, size_t n) {
    (void)to, (void)from, (void)offset, (void)n;
    errno = EINVAL;
    return -1;
}
