/* Makes a file operation of this process fail; faults.py builds it and preloads it.

   Operations on paths below a folder are counted. At the nth, the process is killed, told to end,
   or a bit of a file is flipped on the disk; or the nth read fails with EIO; or all writes from the
   nth on fail with ENOSPC. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum action { COUNT, KILL, TERM, BAD_READ, FULL_DISK, FLIP };
enum what { READ, WRITE, OTHER };

static int armed = 0;
static enum action action;
static long nth, seen[3];
static char folder[4096], flipped[4096];
static long flip_at;

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

void fault_arm(int act, long n, const char *below, const char *flip, long at) {
  action = act;
  nth = n;
  flip_at = at;
  memset(seen, 0, sizeof seen);
  snprintf(folder, sizeof folder, "%s", below);
  snprintf(flipped, sizeof flipped, "%s", flip);
  armed = 1;
}

long fault_count(int kind) { return kind < 3 ? seen[kind] : seen[0] + seen[1] + seen[2]; }

static void flip_bit(void) {
  char byte;
  armed = 0;
  int fd = open(flipped, O_RDWR);
  if (fd >= 0) {
    if (pread(fd, &byte, 1, flip_at) == 1) {
      byte ^= 0x40;
      if (pwrite(fd, &byte, 1, flip_at) != 1) byte = 0;
    }
    close(fd);
  }
}

/* Returns whether the operation is to fail; errno says how. */
static int strikes(const char *path, enum what kind) {
  if (!armed || !path || strncmp(path, folder, strlen(folder))) return 0;
  seen[kind]++;
  long all = seen[0] + seen[1] + seen[2];
  if (action == KILL && all == nth) kill(getpid(), SIGKILL);
  if (action == TERM && all == nth) kill(getpid(), SIGTERM);
  if (action == FLIP && all == nth) flip_bit();
  if (action == BAD_READ && kind == READ && seen[READ] == nth) return errno = EIO, 1;
  if (action == FULL_DISK && kind == WRITE && seen[WRITE] >= nth) return errno = ENOSPC, 1;
  return 0;
}

static int fd_strikes(int fd, enum what kind) {
  char link[64], path[4096];
  if (!armed) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length <= 0) return 0;
  path[length] = 0;
  return strikes(path, kind);
}

static int at_strikes(int dir, const char *path, enum what kind) {
  char full[8192], link[64], base[4096];
  if (!armed || !path) return 0;
  if (path[0] == '/' || dir == AT_FDCWD) return strikes(path, kind);
  snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
  ssize_t length = readlink(link, base, sizeof base - 1);
  if (length <= 0) return 0;
  base[length] = 0;
  snprintf(full, sizeof full, "%s/%s", base, path);
  return strikes(full, kind);
}

static enum what opening(int flags) { return flags & (O_WRONLY | O_RDWR | O_CREAT) ? WRITE : READ; }

#define OPEN(name)                                          \
  int name(const char *path, int flags, ...) {              \
    va_list more;                                           \
    va_start(more, flags);                                  \
    mode_t mode = va_arg(more, mode_t);                     \
    va_end(more);                                           \
    REAL(name);                                             \
    if (strikes(path, opening(flags))) return -1;           \
    return real(path, flags, mode);                         \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                        \
  int name(int dir, const char *path, int flags, ...) {     \
    va_list more;                                           \
    va_start(more, flags);                                  \
    mode_t mode = va_arg(more, mode_t);                     \
    va_end(more);                                           \
    REAL(name);                                             \
    if (at_strikes(dir, path, opening(flags))) return -1;   \
    return real(dir, path, flags, mode);                    \
  }
OPENAT(openat)
OPENAT(openat64)

#define ON_FD(result, name, kind, parameters, arguments)    \
  result name parameters {                                  \
    REAL(name);                                             \
    if (fd_strikes(fd, kind)) return -1;                    \
    return real arguments;                                  \
  }
ON_FD(ssize_t, read, READ, (int fd, void *data, size_t size), (fd, data, size))
ON_FD(ssize_t, pread, READ, (int fd, void *data, size_t size, off_t at), (fd, data, size, at))
ON_FD(ssize_t, pread64, READ, (int fd, void *data, size_t size, off64_t at), (fd, data, size, at))
ON_FD(ssize_t, preadv, READ, (int fd, const struct iovec *v, int n, off_t at), (fd, v, n, at))
ON_FD(ssize_t, preadv64, READ, (int fd, const struct iovec *v, int n, off64_t at), (fd, v, n, at))
ON_FD(ssize_t, preadv64v2, READ, (int fd, const struct iovec *v, int n, off64_t at, int flags),
      (fd, v, n, at, flags))
ON_FD(ssize_t, write, WRITE, (int fd, const void *data, size_t size), (fd, data, size))
ON_FD(ssize_t, pwrite, WRITE, (int fd, const void *data, size_t size, off_t at),
      (fd, data, size, at))
ON_FD(ssize_t, pwrite64, WRITE, (int fd, const void *data, size_t size, off64_t at),
      (fd, data, size, at))
ON_FD(ssize_t, writev, WRITE, (int fd, const struct iovec *v, int n), (fd, v, n))
ON_FD(int, ftruncate64, WRITE, (int fd, off64_t size), (fd, size))
ON_FD(int, fsync, WRITE, (int fd), (fd))

#define ON_PATH(name, kind, parameters, arguments)          \
  int name parameters {                                     \
    REAL(name);                                             \
    if (strikes(path, kind)) return -1;                     \
    return real arguments;                                  \
  }
ON_PATH(rename, OTHER, (const char *path, const char *to), (path, to))
ON_PATH(mkdir, WRITE, (const char *path, mode_t mode), (path, mode))
ON_PATH(unlink, OTHER, (const char *path), (path))
ON_PATH(rmdir, OTHER, (const char *path), (path))

int unlinkat(int dir, const char *path, int flags) {
  REAL(unlinkat);
  if (at_strikes(dir, path, OTHER)) return -1;
  return real(dir, path, flags);
}
