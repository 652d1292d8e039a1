/* Stands between a process and its disk: preloaded, it counts, logs, refuses or dies at what changes files under one
 * root. SQLite, Python and everybody else above the C library go through here alike.
 *
 * A process is left alone until it calls torture_arm(). From then on every operation under the root is a numbered
 * point: process-wide, one at a time, in the order in which they happen. The plan says which points count (by kind and
 * file name) and what happens at the first..last of them:
 *   COUNT  nothing, they are only counted;
 *   KILL   the process dies as by kill -9, before the operation or, for a write, when half of it is done;
 *   FAIL   the call fails with an errno and does nothing.
 *
 * What was done is appended to a log outside the root, with its data: crash_image.py makes disks of it as a power cut
 * may leave them. Syncing is logged and not done: the log is the disk of these tests. Files whose name matches `unsynced`
 * are not even logged as synced: the missing fsync that the tests of the tests plant.
 *
 * Not seen: stdio's own files (fopen) and io_uring, which nothing here uses. What is seen and not understood is logged as
 * UNSUPPORTED, and the replay refuses it. Shared writable maps are such, but for SQLite's -shm, which is rebuilt.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* The same numbers stand in interposer.py. */
enum kind {
  WRITE = 1,
  TRUNCATE = 2,
  SYNC = 4,
  SYNC_FOLDER = 8,
  OPEN = 16,
  MKDIR = 32,
  RENAME = 64,
  REMOVE = 128,
  NOTE = 256,
  UNSUPPORTED = 512,
};
enum action { COUNT = 0, KILL = 1, FAIL = 2 };

struct record {
  uint32_t kind, path_bytes, to_bytes, reserved;
  uint64_t inode, offset, data_bytes;
};

static struct {
  int armed, action, error, log;
  unsigned kinds;
  long first, last, seen;
  char root[PATH_MAX], pattern[PATH_MAX], unsynced[PATH_MAX];
} plan;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

/* -- where ---------------------------------------------------------------------------------------------------------- */

static int under_root(const char *path) {
  size_t size = strlen(plan.root);
  return strncmp(path, plan.root, size) == 0 && (path[size] == '/' || path[size] == 0);
}

/* Path of an open file into `out`; 0 unless it lies under the root. */
static int path_of(int fd, char *out) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t size = readlink(link, out, PATH_MAX - 1);
  if (size < 0) return 0;
  out[size] = 0;
  return under_root(out);
}

static int file_under_root(int fd, char *out) { return plan.armed && fd >= 0 && path_of(fd, out); }

/* Absolute path of a name relative to an open folder; 0 unless it lies under the root. */
static int resolve(int folder, const char *name, char *out) {
  if (!plan.armed || name == NULL) return 0;
  if (name[0] == '/') return snprintf(out, PATH_MAX, "%s", name) < PATH_MAX && under_root(out);
  char base[PATH_MAX];
  if (folder == AT_FDCWD) {
    if (getcwd(base, sizeof base) == NULL) return 0;
  } else if (!path_of(folder, base)) {
    return 0;
  }
  return snprintf(out, PATH_MAX, "%s/%s", base, name) < PATH_MAX && under_root(out);
}

static int matches(const char *pattern, const char *path) {
  return pattern[0] && fnmatch(pattern, path + strlen(plan.root), 0) == 0;
}

static uint64_t inode_of(int fd) {
  struct stat found;
  return fstat(fd, &found) == 0 ? found.st_ino : 0;
}

/* -- points and the log ----------------------------------------------------------------------------------------------- */

static void die(void) {
  syscall(SYS_kill, getpid(), SIGKILL);
  for (;;) pause();
}

/* Begins an operation: 0 to do it, an errno to refuse it, -1 to die in its middle. Ends with `leave`. */
static int enter(enum kind kind, const char *path) {
  pthread_mutex_lock(&mutex);
  /* Other processes may write to the same log. */
  if (plan.log >= 0) syscall(SYS_flock, plan.log, LOCK_EX);
  if (!(plan.kinds & kind) || !matches(plan.pattern, path)) return 0;
  long number = ++plan.seen;
  if (plan.action == COUNT || number < plan.first || number > plan.last) return 0;
  if (plan.action == FAIL) return plan.error;
  if (kind != WRITE) die();
  return -1;
}

static void leave(void) {
  if (plan.log >= 0) syscall(SYS_flock, plan.log, LOCK_UN);
  pthread_mutex_unlock(&mutex);
}

static void log_record(enum kind kind, const char *path, const char *to, uint64_t inode, uint64_t offset,
                       const void *data, size_t data_bytes) {
  if (plan.log < 0) return;
  struct record record = {kind, strlen(path), strlen(to), 0, inode, offset, data_bytes};
  struct iovec parts[] = {{&record, sizeof record},
                          {(void *)path, record.path_bytes},
                          {(void *)to, record.to_bytes},
                          {(void *)data, data_bytes}};
  size_t size = sizeof record + record.path_bytes + record.to_bytes + data_bytes;
  /* A log with a hole would prove nothing. */
  if (syscall(SYS_writev, plan.log, parts, 4) != (long)size) die();
}

/* -- what Python calls ------------------------------------------------------------------------------------------------ */

int torture_arm(const char *root, const char *log, unsigned kinds, const char *pattern, int action, long first,
                long last, int error, const char *unsynced) {
  plan.log = -1;
  if (log[0]) {
    plan.log = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (plan.log < 0) return errno;
  }
  snprintf(plan.root, sizeof plan.root, "%s", root);
  snprintf(plan.pattern, sizeof plan.pattern, "%s", pattern);
  snprintf(plan.unsynced, sizeof plan.unsynced, "%s", unsynced);
  plan.kinds = kinds;
  plan.action = action;
  plan.first = first;
  plan.last = last;
  plan.error = error;
  plan.seen = 0;
  plan.armed = 1;
  return 0;
}

/* From now on the disk is sound again; points are counted on. */
void torture_heal(void) {
  pthread_mutex_lock(&mutex);
  plan.action = COUNT;
  pthread_mutex_unlock(&mutex);
}

long torture_seen(void) { return plan.seen; }

/* Whether calls of this process come here, that is, whether the library was preloaded. */
int torture_preloaded(void) {
  const char *preloaded = getenv("LD_PRELOAD");
  return preloaded != NULL && strstr(preloaded, "interposer") != NULL;
}

/* A word of the program between the operations, for example what it acknowledged. */
void torture_note(const void *data, size_t data_bytes) {
  pthread_mutex_lock(&mutex);
  log_record(NOTE, "", "", 0, 0, data, data_bytes);
  pthread_mutex_unlock(&mutex);
}

/* -- files -------------------------------------------------------------------------------------------------------------- */

static int open_file(int folder, const char *name, int flags, mode_t mode) {
  char path[PATH_MAX];
  int for_writing = (flags & O_ACCMODE) != O_RDONLY || (flags & (O_CREAT | O_TRUNC));
  if (!for_writing || !resolve(folder, name, path)) return syscall(SYS_openat, folder, name, flags, mode);
  if ((flags & O_TMPFILE) == O_TMPFILE) log_record(UNSUPPORTED, path, "", 0, 0, "O_TMPFILE", 9);
  int refused = enter(OPEN, path), fd = -1;
  if (refused) {
    errno = refused;
  } else {
    struct stat before;
    int is_new = stat(path, &before) != 0;
    fd = syscall(SYS_openat, folder, name, flags, mode);
    int error = errno;
    if (fd >= 0 && is_new) log_record(OPEN, path, "", inode_of(fd), 0, "", 0);
    if (fd >= 0 && !is_new && (flags & O_TRUNC)) log_record(TRUNCATE, path, "", before.st_ino, 0, "", 0);
    errno = error;
  }
  leave();
  return fd;
}

#define OPEN_MODE(flags)                   \
  mode_t mode = 0;                         \
  if ((flags) & (O_CREAT | O_TMPFILE)) {   \
    va_list arguments;                     \
    va_start(arguments, flags);            \
    mode = va_arg(arguments, mode_t);      \
    va_end(arguments);                     \
  }

int open(const char *name, int flags, ...) {
  OPEN_MODE(flags);
  return open_file(AT_FDCWD, name, flags, mode);
}
int open64(const char *name, int flags, ...) {
  OPEN_MODE(flags);
  return open_file(AT_FDCWD, name, flags, mode);
}
int openat(int folder, const char *name, int flags, ...) {
  OPEN_MODE(flags);
  return open_file(folder, name, flags, mode);
}
int openat64(int folder, const char *name, int flags, ...) {
  OPEN_MODE(flags);
  return open_file(folder, name, flags, mode);
}
int creat(const char *name, mode_t mode) { return open_file(AT_FDCWD, name, O_WRONLY | O_CREAT | O_TRUNC, mode); }
int creat64(const char *name, mode_t mode) { return creat(name, mode); }

/* `offset` -1: at the file's position. */
static ssize_t write_at(int fd, const struct iovec *parts, int num_parts, off_t offset) {
  char path[PATH_MAX];
  if (!file_under_root(fd, path)) {
    if (offset < 0) return syscall(SYS_writev, fd, parts, num_parts);
    return syscall(SYS_pwritev, fd, parts, num_parts, (long)offset, 0L);
  }
  size_t size = 0, filled = 0;
  for (int part = 0; part < num_parts; part++) size += parts[part].iov_len;
  char *data = malloc(size + 1);
  if (data == NULL) die();
  for (int part = 0; part < num_parts; filled += parts[part++].iov_len)
    memcpy(data + filled, parts[part].iov_base, parts[part].iov_len);

  int refused = enter(WRITE, path), error;
  ssize_t written = -1;
  if (refused > 0) {
    error = refused;
  } else {
    size_t wanted = refused ? size / 2 : size;
    written = offset < 0 ? syscall(SYS_write, fd, data, wanted) : syscall(SYS_pwrite64, fd, data, wanted, offset);
    error = errno;
    if (refused) die();
    if (written > 0) {
      off_t start = offset < 0 ? lseek(fd, 0, SEEK_CUR) - written : offset;
      log_record(WRITE, path, "", inode_of(fd), start, data, written);
    }
  }
  leave();
  free(data);
  errno = error;
  return written;
}

ssize_t write(int fd, const void *data, size_t size) {
  if (!plan.armed) return syscall(SYS_write, fd, data, size);
  struct iovec part = {(void *)data, size};
  return write_at(fd, &part, 1, -1);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
  if (!plan.armed) return syscall(SYS_pwrite64, fd, data, size, offset);
  struct iovec part = {(void *)data, size};
  return write_at(fd, &part, 1, offset);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) { return pwrite(fd, data, size, offset); }
ssize_t writev(int fd, const struct iovec *parts, int num_parts) { return write_at(fd, parts, num_parts, -1); }
ssize_t pwritev(int fd, const struct iovec *parts, int num_parts, off_t offset) {
  return write_at(fd, parts, num_parts, offset);
}
ssize_t pwritev64(int fd, const struct iovec *parts, int num_parts, off64_t offset) {
  return write_at(fd, parts, num_parts, offset);
}

int ftruncate(int fd, off_t size) {
  char path[PATH_MAX];
  if (!file_under_root(fd, path)) return syscall(SYS_ftruncate, fd, size);
  int refused = enter(TRUNCATE, path), done = -1;
  if (refused) {
    errno = refused;
  } else if ((done = syscall(SYS_ftruncate, fd, size)) == 0) {
    log_record(TRUNCATE, path, "", inode_of(fd), size, "", 0);
  }
  leave();
  return done;
}
int ftruncate64(int fd, off64_t size) { return ftruncate(fd, size); }

static int sync_file(int fd, long number) {
  char path[PATH_MAX];
  if (!file_under_root(fd, path)) return syscall(number, fd);
  struct stat found;
  enum kind kind = fstat(fd, &found) == 0 && S_ISDIR(found.st_mode) ? SYNC_FOLDER : SYNC;
  int refused = enter(kind, path);
  if (!refused && !matches(plan.unsynced, path)) log_record(kind, path, "", found.st_ino, 0, "", 0);
  leave();
  if (refused) errno = refused;
  return refused ? -1 : 0;
}
int fsync(int fd) { return sync_file(fd, SYS_fsync); }
int fdatasync(int fd) { return sync_file(fd, SYS_fdatasync); }

/* -- names -------------------------------------------------------------------------------------------------------------- */

int mkdirat(int folder, const char *name, mode_t mode) {
  char path[PATH_MAX];
  if (!resolve(folder, name, path)) return syscall(SYS_mkdirat, folder, name, mode);
  int refused = enter(MKDIR, path), done = -1;
  if (refused) {
    errno = refused;
  } else if ((done = syscall(SYS_mkdirat, folder, name, mode)) == 0) {
    log_record(MKDIR, path, "", 0, 0, "", 0);
  }
  leave();
  return done;
}
int mkdir(const char *name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }

int renameat2(int from_folder, const char *from, int to_folder, const char *to, unsigned flags) {
  char path[PATH_MAX], target[PATH_MAX];
  int leaves = resolve(from_folder, from, path), arrives = resolve(to_folder, to, target);
  if (!leaves && !arrives) return syscall(SYS_renameat2, from_folder, from, to_folder, to, flags);
  int refused = enter(RENAME, arrives ? target : path), done = -1;
  if (refused) {
    errno = refused;
  } else if ((done = syscall(SYS_renameat2, from_folder, from, to_folder, to, flags)) == 0) {
    log_record(leaves && arrives && flags == 0 ? RENAME : UNSUPPORTED, path, target, 0, 0, "", 0);
  }
  leave();
  return done;
}
int renameat(int from_folder, const char *from, int to_folder, const char *to) {
  return renameat2(from_folder, from, to_folder, to, 0);
}
int rename(const char *from, const char *to) { return renameat2(AT_FDCWD, from, AT_FDCWD, to, 0); }

int unlinkat(int folder, const char *name, int flags) {
  char path[PATH_MAX];
  if (!resolve(folder, name, path)) return syscall(SYS_unlinkat, folder, name, flags);
  int refused = enter(REMOVE, path), done = -1;
  if (refused) {
    errno = refused;
  } else if ((done = syscall(SYS_unlinkat, folder, name, flags)) == 0) {
    log_record(REMOVE, path, "", 0, 0, "", 0);
  }
  leave();
  return done;
}
int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }
int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }

/* -- what the replay cannot do, so that it says so instead of missing it ------------------------------------------------ */

static void unsupported(const char *what, const char *path) {
  pthread_mutex_lock(&mutex);
  log_record(UNSUPPORTED, path, "", 0, 0, what, strlen(what));
  pthread_mutex_unlock(&mutex);
}

void *mmap(void *address, size_t size, int protection, int flags, int fd, off_t offset) {
  char path[PATH_MAX];
  if ((protection & PROT_WRITE) && (flags & MAP_SHARED) && file_under_root(fd, path) && fnmatch("*-shm", path, 0))
    unsupported("mmap", path);
  return (void *)syscall(SYS_mmap, address, size, protection, flags, fd, offset);
}
void *mmap64(void *address, size_t size, int protection, int flags, int fd, off64_t offset) {
  return mmap(address, size, protection, flags, fd, offset);
}

int linkat(int from_folder, const char *from, int to_folder, const char *to, int flags) {
  char path[PATH_MAX];
  if (resolve(to_folder, to, path)) unsupported("link", path);
  return syscall(SYS_linkat, from_folder, from, to_folder, to, flags);
}
int link(const char *from, const char *to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }

int symlinkat(const char *target, int folder, const char *name) {
  char path[PATH_MAX];
  if (resolve(folder, name, path)) unsupported("symlink", path);
  return syscall(SYS_symlinkat, target, folder, name);
}
int symlink(const char *target, const char *name) { return symlinkat(target, AT_FDCWD, name); }

int fallocate(int fd, int mode, off_t offset, off_t size) {
  char path[PATH_MAX];
  if (file_under_root(fd, path)) unsupported("fallocate", path);
  return syscall(SYS_fallocate, fd, mode, offset, size);
}
int fallocate64(int fd, int mode, off64_t offset, off64_t size) { return fallocate(fd, mode, offset, size); }
int posix_fallocate(int fd, off_t offset, off_t size) { return fallocate(fd, 0, offset, size) == 0 ? 0 : errno; }
int posix_fallocate64(int fd, off64_t offset, off64_t size) { return posix_fallocate(fd, offset, size); }
