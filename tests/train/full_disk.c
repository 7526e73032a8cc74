/* Preloaded by test_full_disk.py: writes below a folder fail as on a full disk, from the `first` to the `last`. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX], failed[PATH_MAX + 32];
static long first_failing, last_failing, count;

void full_disk(const char *below, long first, long last) {
  snprintf(folder, sizeof folder, "%s", below);
  first_failing = first;
  last_failing = last;
  count = 0;
}

long full_disk_count(void) { return count; }
const char *full_disk_failed(void) { return failed; } /* the last call that failed, and its path */

static int fails_at(const char *call, const char *path) {
  if (!folder[0] || strncmp(path, folder, strlen(folder)) != 0) return 0;
  count++;
  if (count < first_failing || count > last_failing) return 0;
  snprintf(failed, sizeof failed, "%s %s", call, path);
  errno = ENOSPC;
  return 1;
}

static int fails(const char *call, int fd) {
  char link[64], path[PATH_MAX];
  if (!folder[0]) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return fails_at(call, path);
}

#define REAL(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *from, size_t bytes) { return fails("write", fd) ? -1 : REAL(write)(fd, from, bytes); }
ssize_t writev(int fd, const struct iovec *parts, int n) { return fails("writev", fd) ? -1 : REAL(writev)(fd, parts, n); }
ssize_t pwrite64(int fd, const void *from, size_t bytes, off64_t at) {
  return fails("pwrite64", fd) ? -1 : REAL(pwrite64)(fd, from, bytes, at);
}
int fsync(int fd) { return fails("fsync", fd) ? -1 : REAL(fsync)(fd); }
int mkdir(const char *path, mode_t mode) {  /* of a folder that is there it says so on any disk */
  return access(path, F_OK) != 0 && fails_at("mkdir", path) ? -1 : REAL(mkdir)(path, mode);
}
int rename(const char *from, const char *to) { return fails_at("rename", to) ? -1 : REAL(rename)(from, to); }

#define OPEN(name)                                            \
  int name(const char *path, int flags, ...) {                \
    va_list rest;                                             \
    va_start(rest, flags);                                    \
    mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0; \
    va_end(rest);                                             \
    if (flags & O_CREAT && fails_at(#name, path)) return -1;         \
    return REAL(name)(path, flags, mode);                     \
  }
OPEN(open)
OPEN(open64)
