// A disk with faults, put below a program by LD_PRELOAD: the n-th operation fails or is the last
// one of its process, and all operations are recorded, for a replay of what a power loss leaves.
//
// Only files below DISK_ROOT count. DISK_FAULT is "KINDS FIRST TIMES ERRNO HOW": of the operations
// of these kinds (a sum of the numbers below), number FIRST (from 1) and the TIMES - 1 after it
// fail with this errno. HOW is `whole`, `torn` (half of a write is done before it fails) or
// `kill` (SIGKILL instead of an error). DISK_LOG names the record, one line per operation, with
// the bytes that were written in DISK_LOG.data. A process calls `disk_begin` to read them anew.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN = 1, WRITE = 2, FSYNC = 4, RENAME = 8 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char root[PATH_MAX], how[16] = "whole";
static int started, kinds, number;
static long first, times, seen;
static int record = -1, record_data = -1;
static off_t recorded;

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

static ssize_t put(int fd, const void *data, size_t size) {
    REAL(write);
    return real(fd, data, size);
}

static int create(const char *path) {
    REAL(open);
    return real(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

void disk_begin(void) {
    char name[PATH_MAX];
    const char *value = getenv("DISK_ROOT");
    snprintf(root, sizeof root, "%s", value ? value : "");
    kinds = 0, seen = 0, started = 1, recorded = 0;
    if ((value = getenv("DISK_FAULT")))
        sscanf(value, "%d %ld %ld %d %15s", &kinds, &first, &times, &number, how);
    if (record >= 0) close(record), close(record_data);
    record = record_data = -1;
    if ((value = getenv("DISK_LOG")) && *value) {
        snprintf(name, sizeof name, "%s.data", value);
        record = create(value), record_data = create(name);
    }
}

static int below(const char *path) {
    if (!started) disk_begin();
    size_t length = strlen(root);
    return length && !strncmp(path, root, length);
}

// The path of a descriptor, or of a name relative to one, as text; empty where it has none.
static const char *path_of(int fd, const char *name, char *path) {
    char link[64], base[PATH_MAX] = "";
    int saved = errno;
    path[0] = 0;
    if (name && name[0] == '/') snprintf(path, PATH_MAX, "%s", name);
    else {
        ssize_t size = -1;
        if (fd == AT_FDCWD) size = getcwd(base, sizeof base) ? (ssize_t)strlen(base) : -1;
        else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
            size = readlink(link, base, sizeof base - 1);
        }
        if (size > 0) {
            base[size] = 0;
            if (name) snprintf(path, PATH_MAX, "%.2000s/%.2000s", base, name);
            else snprintf(path, PATH_MAX, "%s", base);
        }
    }
    errno = saved;
    return path;
}

// Counts an operation; 0 to let it pass, else what is to be done about it.
static const char *fault(int kind) {
    if (!(kinds & kind)) return NULL;
    long now = __sync_add_and_fetch(&seen, 1);
    if (now < first || now >= first + times) return NULL;
    if (!strcmp(how, "kill")) kill(getpid(), SIGKILL), pause();
    return how;
}

static void note(const char *what, unsigned long file, long at, long size, const char *one,
                 const char *other, const void *data) {
    if (record < 0) return;
    char line[2 * PATH_MAX + 128];
    int saved = errno;
    pthread_mutex_lock(&lock);
    int length = snprintf(line, sizeof line, "%s\t%lu\t%ld\t%ld\t%ld\t%s\t%s\n", what, file, at,
                          size, (long)recorded, one, other);
    if (data) put(record_data, data, size), recorded += size;
    put(record, line, length);
    pthread_mutex_unlock(&lock);
    errno = saved;
}

static unsigned long inode(int fd) {
    struct stat found;
    return fstat(fd, &found) ? 0 : found.st_ino;
}

static int opened(int fd, const char *path, int flags, int was_there) {
    if (fd >= 0 && (flags & O_CREAT) && !was_there) note("create", inode(fd), 0, 0, path, "", NULL);
    else if (fd >= 0 && (flags & O_TRUNC)) note("truncate", inode(fd), 0, 0, path, "", NULL);
    return fd;
}

#define OPENS(name, arguments, folder, call) \
    int name arguments { \
        REAL(name); \
        char at[PATH_MAX]; \
        mode_t mode = 0; \
        if (flags & (O_CREAT | __O_TMPFILE)) { \
            va_list rest; \
            va_start(rest, flags); \
            mode = va_arg(rest, mode_t); \
            va_end(rest); \
        } \
        if (!(flags & (O_WRONLY | O_RDWR)) || !below(path_of(folder, path, at))) return call; \
        if (fault(OPEN)) return errno = number, -1; \
        int was_there = !access(at, F_OK); \
        return opened(call, at, flags, was_there); \
    }
OPENS(open, (const char *path, int flags, ...), AT_FDCWD, real(path, flags, mode))
OPENS(open64, (const char *path, int flags, ...), AT_FDCWD, real(path, flags, mode))
OPENS(openat, (int dir, const char *path, int flags, ...), dir, real(dir, path, flags, mode))
OPENS(openat64, (int dir, const char *path, int flags, ...), dir, real(dir, path, flags, mode))

static ssize_t wrote(int fd, ssize_t size, long at, const void *data) {
    if (size > 0) note("write", inode(fd), at, size, "", "", data);
    return size;
}

static long place(int fd) {
    if (fcntl(fd, F_GETFL) & O_APPEND) {
        struct stat found;
        return fstat(fd, &found) ? 0 : found.st_size;
    }
    return lseek(fd, 0, SEEK_CUR);
}

ssize_t write(int fd, const void *data, size_t size) {
    char at[PATH_MAX];
    if (fd < 3 || !below(path_of(fd, NULL, at))) return put(fd, data, size);
    const char *todo = fault(WRITE);
    long begin = place(fd);
    if (todo && !strcmp(todo, "torn")) wrote(fd, put(fd, data, size / 2), begin, data);
    if (todo) return errno = number, -1;
    return wrote(fd, put(fd, data, size), begin, data);
}

#define PWRITES(name, type) \
    ssize_t name(int fd, const void *data, size_t size, type begin) { \
        REAL(name); \
        char at[PATH_MAX]; \
        if (!below(path_of(fd, NULL, at))) return real(fd, data, size, begin); \
        if (fault(WRITE)) return errno = number, -1; \
        return wrote(fd, real(fd, data, size, begin), begin, data); \
    }
PWRITES(pwrite, off_t)
PWRITES(pwrite64, off64_t)

ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(writev);
    char at[PATH_MAX];
    if (!below(path_of(fd, NULL, at))) return real(fd, parts, count);
    ssize_t all = 0;
    for (int i = 0; i < count; i++) {
        ssize_t size = write(fd, parts[i].iov_base, parts[i].iov_len);
        if (size < 0) return all ? all : -1;
        all += size;
    }
    return all;
}

#define SYNCS(name) \
    int name(int fd) { \
        REAL(name); \
        char at[PATH_MAX]; \
        if (!below(path_of(fd, NULL, at))) return real(fd); \
        if (fault(FSYNC)) return errno = number, -1; \
        int result = real(fd); \
        if (!result) note("fsync", inode(fd), 0, 0, at, "", NULL); \
        return result; \
    }
SYNCS(fsync)
SYNCS(fdatasync)

#define TRUNCATES(name, type, handle, where, file) \
    int name(type handle, off_t size) { \
        REAL(name); \
        char at[PATH_MAX]; \
        struct stat found; \
        if (!below(where)) return real(handle, size); \
        if (fault(WRITE)) return errno = number, -1; \
        int result = real(handle, size); \
        if (!result && !file(handle, &found)) \
            note("truncate", found.st_ino, size, 0, at, "", NULL); \
        return result; \
    }
TRUNCATES(ftruncate, int, fd, path_of(fd, NULL, at), fstat)
TRUNCATES(ftruncate64, int, fd, path_of(fd, NULL, at), fstat)
TRUNCATES(truncate, const char *, path, path_of(AT_FDCWD, path, at), stat)
TRUNCATES(truncate64, const char *, path, path_of(AT_FDCWD, path, at), stat)

// Changes of names. `text` is the contents of a symbolic link, which is no path to resolve.
#define NAMES(name, arguments, call, what, dir_one, one, dir_other, other, text) \
    int name arguments { \
        REAL(name); \
        char from[PATH_MAX], to[PATH_MAX]; \
        path_of(dir_one, one, from); \
        if (text) snprintf(to, sizeof to, "%s", text); \
        else path_of(dir_other, other, to); \
        if (!below(from)) return call; \
        if (fault(RENAME)) return errno = number, -1; \
        int result = call; \
        if (!result) note(what, 0, 0, 0, from, to, NULL); \
        return result; \
    }
#define NONE ((const char *)NULL)
NAMES(rename, (const char *a, const char *b), real(a, b), "rename", AT_FDCWD, a, AT_FDCWD, b, NONE)
NAMES(renameat, (int p, const char *a, int q, const char *b), real(p, a, q, b), "rename", p, a, q,
      b, NONE)
NAMES(link, (const char *a, const char *b), real(a, b), "link", AT_FDCWD, a, AT_FDCWD, b, NONE)
NAMES(linkat, (int p, const char *a, int q, const char *b, int f), real(p, a, q, b, f), "link", p,
      a, q, b, NONE)
NAMES(symlink, (const char *a, const char *b), real(a, b), "symlink", AT_FDCWD, b, AT_FDCWD, b, a)
NAMES(symlinkat, (const char *a, int q, const char *b), real(a, q, b), "symlink", q, b, q, b, a)
NAMES(unlink, (const char *a), real(a), "unlink", AT_FDCWD, a, AT_FDCWD, "/", NONE)
NAMES(unlinkat, (int p, const char *a, int f), real(p, a, f), "unlink", p, a, AT_FDCWD, "/", NONE)
NAMES(mkdir, (const char *a, mode_t m), real(a, m), "mkdir", AT_FDCWD, a, AT_FDCWD, "/", NONE)
