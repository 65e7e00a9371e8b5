// Stands between a process and its file system calls: counts them, records them, and makes chosen ones fail, stop short or kill.
// Loaded with LD_PRELOAD and driven through the exported structures, see preload.py. Nothing happens before `active` is set.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define EXPORTED __attribute__((visibility("default")))
#define ALL_CALLS(X)                                                                                                        \
  X(open) X(openat) X(close) X(read) X(pread) X(write) X(writev) X(pwrite) X(pwritev) X(fsync) X(fdatasync) X(sync)         \
  X(ftruncate) X(fallocate) X(posix_fallocate) X(stat) X(lstat) X(fstat) X(fstatat) X(statx) X(access) X(faccessat)         \
  X(readlink) X(readlinkat) X(rename) X(renameat) X(unlink) X(unlinkat) X(mkdir) X(mkdirat) X(rmdir) X(fchmod) X(fchmodat)  \
  X(fchown) X(fcntl) X(flock) X(lseek) X(opendir) X(fdopendir) X(readdir) X(closedir) X(pthread_create) X(symlink)  \
  X(linkat)

enum {
#define X(name) ID_##name,
  ALL_CALLS(X)
#undef X
      NUM_CALLS
};
EXPORTED const char* sdio_fault_names[] = {
#define X(name) #name,
    ALL_CALLS(X)
#undef X
        NULL};

enum { INSTEAD, AFTERWARDS, SHORT };               // control.how
enum { KILL_BEFORE, KILL_HALFWAY, KILL_AFTER };    // control.kill_when
#define MAX_TRIES 1000
enum { GO, FAIL, FAIL_AFTER, STOP_SHORT, DIE_AFTER, DIE_HALFWAY };

EXPORTED struct {
  int32_t active;      // the others mean nothing without
  int32_t record;      // 1: events; 2: also the data written
  int32_t call;        // the call to fail, -1: none
  int32_t first, last; // which occurrences of it, from 1
  int32_t error;       // its errno; for SHORT the permille of bytes that are written
  int32_t how;
  int32_t kill_at;     // of all calls, from 1; 0: never
  int32_t kill_when;
  int32_t no_sync;     // fsync answers without doing anything: for loops that are about logic
  int32_t alignment;   // what statx says that direct I/O asks for; -1: the truth
  int32_t fired;       // how many calls were made to fail
  int32_t total;
  int32_t count[64];
  int32_t num_events;
  int64_t num_data;
} sdio_fault_control = {.call = -1, .alignment = -1};

#define MAX_EVENTS 4096
#define MAX_DATA (256l << 20)
EXPORTED struct event {
  int32_t call, fd, fd2, error;
  int64_t result, offset, nbytes, data_at;
  char path[256], path2[256];
} sdio_fault_events[MAX_EVENTS];
EXPORTED char* sdio_fault_data;

#define control sdio_fault_control
static pthread_mutex_t event_mutex = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) ({ static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name); real; })

static int verdict_on(int call) {
  if (!control.active) return GO;
  const int total = __atomic_add_fetch(&control.total, 1, __ATOMIC_SEQ_CST);
  const int count = __atomic_add_fetch(&control.count[call], 1, __ATOMIC_SEQ_CST);
  if (control.kill_at == total) {
    if (control.kill_when == KILL_BEFORE) syscall(SYS_kill, getpid(), SIGKILL);
    return control.kill_when == KILL_AFTER ? DIE_AFTER : DIE_HALFWAY;
  }
  if (control.call != call || count < control.first || count > control.last) return GO;
  // Whoever tries that often would try for ever: let the loop end, with an error that says so.
  if (__atomic_add_fetch(&control.fired, 1, __ATOMIC_SEQ_CST) == MAX_TRIES) {
    control.error = ELOOP, control.how = INSTEAD;
  }
  return control.how == SHORT ? STOP_SHORT : control.how == AFTERWARDS ? FAIL_AFTER : FAIL;
}

static struct event* add_event(int call, int fd, const char* path, int fd2, const char* path2, int64_t offset, int64_t nbytes) {
  if (!control.active || !control.record || control.num_events == MAX_EVENTS) return NULL;
  struct event* event = &sdio_fault_events[control.num_events++];
  memset(event, 0, sizeof *event);
  event->call = call, event->fd = fd, event->fd2 = fd2, event->offset = offset, event->nbytes = nbytes, event->data_at = -1;
  if (path) strncpy(event->path, path, sizeof event->path - 1);
  if (path2) strncpy(event->path2, path2, sizeof event->path2 - 1);
  return event;
}

static void add_data(struct event* event, const struct iovec* pieces, int count, int64_t nbytes) {
  if (control.record < 2 || control.num_data + nbytes > MAX_DATA) return;
  if (!sdio_fault_data) {
    sdio_fault_data = mmap(NULL, MAX_DATA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  event->data_at = control.num_data;
  for (int i = 0; i < count && nbytes > 0; ++i) {
    const int64_t part = (int64_t)pieces[i].iov_len < nbytes ? (int64_t)pieces[i].iov_len : nbytes;
    memcpy(sdio_fault_data + control.num_data, pieces[i].iov_base, part);
    control.num_data += part, nbytes -= part;
  }
}

static void record(int call, int fd, const char* path, int fd2, const char* path2, int64_t offset, int64_t nbytes, int64_t result) {
  if (!control.active) return;
  const int error = errno;
  pthread_mutex_lock(&event_mutex);
  struct event* event = add_event(call, fd, path, fd2, path2, offset, nbytes);
  if (event) event->result = result, event->error = result < 0 ? error : 0;
  pthread_mutex_unlock(&event_mutex);
  errno = error;
}

static void die(void) { syscall(SYS_kill, getpid(), SIGKILL); }

// One call: fails as told, or is made; then recorded.
#define PASS(name, type, invoke, fd, path, fd2, path2, offset, nbytes)                        \
  const int verdict = verdict_on(ID_##name);                                                  \
  type result = (type)-1;                                                                     \
  if (verdict == FAIL) errno = control.error;                                                 \
  else if (verdict != DIE_HALFWAY) result = (type)(invoke);                                   \
  if (verdict == DIE_AFTER || verdict == DIE_HALFWAY) die();                                  \
  if (verdict == FAIL_AFTER) {                                                                \
    if (ID_##name == ID_open || ID_##name == ID_openat) syscall(SYS_close, (int)(intptr_t)result); \
    result = (type)-1, errno = control.error;                                                 \
  }                                                                                           \
  record(ID_##name, fd, path, fd2, path2, (int64_t)(offset), (int64_t)(nbytes), (int64_t)result); \
  return result

#define MODE_ARGUMENT                                       \
  mode_t mode = 0;                                          \
  if ((flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE) { \
    va_list list;                                           \
    va_start(list, flags);                                  \
    mode = va_arg(list, mode_t);                            \
    va_end(list);                                           \
  }
#define OPEN(name)                                                            \
  EXPORTED int name(const char* path, int flags, ...) {                       \
    MODE_ARGUMENT                                                             \
    PASS(open, int, REAL(name)(path, flags, mode), -1, path, -1, NULL, flags, mode); \
  }
#define OPENAT(name)                                                                 \
  EXPORTED int name(int fd, const char* path, int flags, ...) {                      \
    MODE_ARGUMENT                                                                    \
    PASS(openat, int, REAL(name)(fd, path, flags, mode), fd, path, -1, NULL, flags, mode); \
  }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)

#define FCNTL(name)                                                        \
  EXPORTED int name(int fd, int command, ...) {                            \
    va_list list;                                                          \
    va_start(list, command);                                               \
    void* argument = va_arg(list, void*);                                  \
    va_end(list);                                                          \
    PASS(fcntl, int, REAL(name)(fd, command, argument), fd, NULL, -1, NULL, command, (intptr_t)argument); \
  }
FCNTL(fcntl) FCNTL(fcntl64)
EXPORTED int flock(int fd, int operation) { PASS(flock, int, REAL(flock)(fd, operation), fd, NULL, -1, NULL, operation, 0); }

// The descriptor is gone whatever close says, as on Linux.
EXPORTED int close(int fd) {
  int verdict = verdict_on(ID_close);
  record(ID_close, fd, NULL, -1, NULL, 0, 0, 0);  // before: the number may be another thread's at once
  const int result = REAL(close)(fd);
  if (verdict == DIE_AFTER || verdict == DIE_HALFWAY) die();
  if (verdict == GO) return result;
  errno = control.error;
  return -1;
}

// Writes the whole range, but only so many bytes of what was given; the rest is rubbish that nobody may rely on.
static ssize_t write_short(int fd, const struct iovec* pieces, int count, off_t offset) {
  size_t nbytes = 0, done = 0;
  for (int i = 0; i < count; ++i) nbytes += pieces[i].iov_len;
  size_t kept = control.how == SHORT ? nbytes * (size_t)control.error / 1000 : nbytes / 2;
  if (kept == 0 && control.error != 0) kept = 1;
  void* copy;
  if (posix_memalign(&copy, 1 << 16, nbytes + 1) != 0) abort();
  memset(copy, 0xEE, nbytes);
  for (int i = 0; i < count && done < kept; ++i) {
    const size_t part = pieces[i].iov_len < kept - done ? pieces[i].iov_len : kept - done;
    memcpy((char*)copy + done, pieces[i].iov_base, part);
    done += part;
  }
  const ssize_t written = syscall(SYS_pwrite64, fd, copy, nbytes, offset);
  free(copy);
  return written < 0 ? written : (ssize_t)kept;
}

static ssize_t positional_write(int call, int fd, const struct iovec* pieces, int count, off_t offset) {
  const int verdict = verdict_on(call);
  ssize_t result = -1;
  if (verdict == FAIL) errno = control.error;
  else if (verdict == STOP_SHORT || verdict == DIE_HALFWAY) result = write_short(fd, pieces, count, offset);
  else result = syscall(SYS_pwritev, fd, pieces, count, offset, 0);
  if (verdict == DIE_AFTER || verdict == DIE_HALFWAY) die();
  if (verdict == FAIL_AFTER) result = -1, errno = control.error;
  const int error = errno;
  pthread_mutex_lock(&event_mutex);
  struct event* event = add_event(call, fd, NULL, -1, NULL, offset, result);
  if (event) {
    event->result = result, event->error = result < 0 ? error : 0;
    if (result > 0) add_data(event, pieces, count, result);
  }
  pthread_mutex_unlock(&event_mutex);
  errno = error;
  return result;
}
EXPORTED ssize_t pwrite(int fd, const void* data, size_t nbytes, off_t offset) {
  const struct iovec piece = {(void*)data, nbytes};
  return positional_write(ID_pwrite, fd, &piece, 1, offset);
}
EXPORTED ssize_t pwrite64(int fd, const void* data, size_t nbytes, off_t offset) { return pwrite(fd, data, nbytes, offset); }
EXPORTED ssize_t pwritev(int fd, const struct iovec* pieces, int count, off_t offset) {
  return positional_write(ID_pwritev, fd, pieces, count, offset);
}
EXPORTED ssize_t pwritev64(int fd, const struct iovec* pieces, int count, off_t offset) {
  return positional_write(ID_pwritev, fd, pieces, count, offset);
}

// write and writev become positional ones in the record: what a replay needs is where the bytes went.
static ssize_t streaming_write(int call, int fd, const struct iovec* pieces, int count) {
  const int verdict = verdict_on(call);
  const off_t offset = control.active && control.record ? syscall(SYS_lseek, fd, 0, SEEK_CUR) : 0;
  ssize_t result = -1;
  struct iovec part = pieces[0];
  if (verdict == STOP_SHORT || verdict == DIE_HALFWAY) part.iov_len = (part.iov_len + 1) / 2, pieces = &part, count = 1;
  if (verdict == FAIL) errno = control.error;
  else result = syscall(SYS_writev, fd, pieces, count);
  if (verdict == DIE_AFTER || verdict == DIE_HALFWAY) die();
  if (verdict == FAIL_AFTER) result = -1, errno = control.error;
  const int error = errno;
  pthread_mutex_lock(&event_mutex);
  struct event* event = add_event(call, fd, NULL, -1, NULL, offset, result);
  if (event) {
    event->result = result, event->error = result < 0 ? error : 0;
    if (result > 0) add_data(event, pieces, count, result);
  }
  pthread_mutex_unlock(&event_mutex);
  errno = error;
  return result;
}
EXPORTED ssize_t write(int fd, const void* data, size_t nbytes) {
  const struct iovec piece = {(void*)data, nbytes};
  return streaming_write(ID_write, fd, &piece, 1);
}
EXPORTED ssize_t writev(int fd, const struct iovec* pieces, int count) { return streaming_write(ID_writev, fd, pieces, count); }

// fsync covers what was written before it began; recorded when it ends, which is the same once the writers have been joined.
#define SYNC(name) \
  EXPORTED int name(int fd) { PASS(name, int, control.active && control.no_sync ? 0 : REAL(name)(fd), fd, NULL, -1, NULL, 0, 0); }
SYNC(fsync) SYNC(fdatasync)
EXPORTED void sync(void) {
  if (verdict_on(ID_sync) == DIE_AFTER) die();
  record(ID_sync, -1, NULL, -1, NULL, 0, 0, 0);
  if (!control.active || !control.no_sync) REAL(sync)();
}

// Unlike all others these return the error.
#define POSIX_FALLOCATE(name, off)                                                        \
  EXPORTED int name(int fd, off offset, off nbytes) {                                     \
    const int verdict = verdict_on(ID_posix_fallocate);                                   \
    const int result = verdict == FAIL ? control.error : REAL(name)(fd, offset, nbytes);  \
    if (verdict == DIE_AFTER || verdict == DIE_HALFWAY) die();                            \
    record(ID_posix_fallocate, fd, NULL, -1, NULL, offset, nbytes, -result);              \
    return verdict == FAIL_AFTER ? control.error : result;                                \
  }
POSIX_FALLOCATE(posix_fallocate, off_t) POSIX_FALLOCATE(posix_fallocate64, off64_t)

#define F0 const char* path
#define DEFINE(symbol, name, type, parameters, arguments, ...) \
  EXPORTED type symbol parameters { PASS(name, type, REAL(symbol) arguments, __VA_ARGS__); }
DEFINE(read, read, ssize_t, (int fd, void* data, size_t n), (fd, data, n), fd, NULL, -1, NULL, 0, n)
DEFINE(pread, pread, ssize_t, (int fd, void* data, size_t n, off_t o), (fd, data, n, o), fd, NULL, -1, NULL, o, n)
DEFINE(pread64, pread, ssize_t, (int fd, void* data, size_t n, off64_t o), (fd, data, n, o), fd, NULL, -1, NULL, o, n)
DEFINE(ftruncate, ftruncate, int, (int fd, off_t n), (fd, n), fd, NULL, -1, NULL, 0, n)
DEFINE(ftruncate64, ftruncate, int, (int fd, off64_t n), (fd, n), fd, NULL, -1, NULL, 0, n)
DEFINE(fallocate, fallocate, int, (int fd, int m, off_t o, off_t n), (fd, m, o, n), fd, NULL, -1, NULL, o, n)
DEFINE(fallocate64, fallocate, int, (int fd, int m, off64_t o, off64_t n), (fd, m, o, n), fd, NULL, -1, NULL, o, n)
DEFINE(lseek, lseek, off_t, (int fd, off_t o, int w), (fd, o, w), fd, NULL, -1, NULL, o, w)
DEFINE(lseek64, lseek, off64_t, (int fd, off64_t o, int w), (fd, o, w), fd, NULL, -1, NULL, o, w)
DEFINE(fchmod, fchmod, int, (int fd, mode_t m), (fd, m), fd, NULL, -1, NULL, m, 0)
DEFINE(fchmodat, fchmodat, int, (int fd, F0, mode_t m, int f), (fd, path, m, f), fd, path, -1, NULL, m, f)
DEFINE(fchown, fchown, int, (int fd, uid_t u, gid_t g), (fd, u, g), fd, NULL, -1, NULL, u, g)
DEFINE(stat, stat, int, (F0, struct stat* s), (path, s), -1, path, -1, NULL, 0, 0)
DEFINE(stat64, stat, int, (F0, struct stat64* s), (path, s), -1, path, -1, NULL, 0, 0)
DEFINE(lstat, lstat, int, (F0, struct stat* s), (path, s), -1, path, -1, NULL, 0, 0)
DEFINE(lstat64, lstat, int, (F0, struct stat64* s), (path, s), -1, path, -1, NULL, 0, 0)
DEFINE(fstat, fstat, int, (int fd, struct stat* s), (fd, s), fd, NULL, -1, NULL, 0, 0)
DEFINE(fstat64, fstat, int, (int fd, struct stat64* s), (fd, s), fd, NULL, -1, NULL, 0, 0)
DEFINE(fstatat, fstatat, int, (int fd, F0, struct stat* s, int f), (fd, path, s, f), fd, path, -1, NULL, 0, f)
DEFINE(fstatat64, fstatat, int, (int fd, F0, struct stat64* s, int f), (fd, path, s, f), fd, path, -1, NULL, 0, f)
DEFINE(access, access, int, (F0, int m), (path, m), -1, path, -1, NULL, 0, m)
DEFINE(faccessat, faccessat, int, (int fd, F0, int m, int f), (fd, path, m, f), fd, path, -1, NULL, 0, m)
DEFINE(readlink, readlink, ssize_t, (F0, char* b, size_t n), (path, b, n), -1, path, -1, NULL, 0, n)
DEFINE(readlinkat, readlinkat, ssize_t, (int fd, F0, char* b, size_t n), (fd, path, b, n), fd, path, -1, NULL, 0, n)
DEFINE(rename, rename, int, (F0, const char* to), (path, to), -1, path, -1, to, 0, 0)
DEFINE(renameat, renameat, int, (int fd, F0, int fd2, const char* to), (fd, path, fd2, to), fd, path, fd2, to, 0, 0)
DEFINE(linkat, linkat, int, (int fd, F0, int fd2, const char* to, int f), (fd, path, fd2, to, f), fd, path, fd2, to, 0, f)
DEFINE(unlink, unlink, int, (F0), (path), -1, path, -1, NULL, 0, 0)
DEFINE(unlinkat, unlinkat, int, (int fd, F0, int f), (fd, path, f), fd, path, -1, NULL, 0, f)
// Not the library's: a sanitizer's runtime makes a directory before it can look up a symbol.
EXPORTED int mkdir(F0, mode_t m) { PASS(mkdir, int, syscall(SYS_mkdirat, AT_FDCWD, path, m), -1, path, -1, NULL, 0, m); }
DEFINE(mkdirat, mkdirat, int, (int fd, F0, mode_t m), (fd, path, m), fd, path, -1, NULL, 0, m)
DEFINE(symlink, symlink, int, (F0, const char* at), (path, at), -1, at, -1, path, 0, 0)
DEFINE(rmdir, rmdir, int, (F0), (path), -1, path, -1, NULL, 0, 0)

static int real_statx(int fd, const char* path, int flags, unsigned mask, struct statx* facts) {
  const int result = REAL(statx)(fd, path, flags, mask, facts);
#ifdef STATX_DIOALIGN
  if (result == 0 && control.active && control.alignment >= 0) {
    facts->stx_mask |= STATX_DIOALIGN;
    facts->stx_dio_mem_align = facts->stx_dio_offset_align = (uint32_t)control.alignment;
  }
#endif
  return result;
}
EXPORTED int statx(int fd, F0, int flags, unsigned mask, struct statx* facts) {
  PASS(statx, int, real_statx(fd, path, flags, mask, facts), fd, path, -1, NULL, 0, flags);
}

#define DIRECTORY(symbol, name, type, failed, parameters, arguments, fd, path)   \
  EXPORTED type symbol parameters {                                              \
    const int verdict = verdict_on(ID_##name);                                   \
    if (verdict == FAIL) return errno = control.error, (type)(intptr_t)(failed); \
    record(ID_##name, fd, path, -1, NULL, 0, 0, 0);                              \
    if (verdict == DIE_HALFWAY || verdict == DIE_AFTER) die();                   \
    return REAL(symbol) arguments;                                               \
  }
DIRECTORY(opendir, opendir, DIR*, 0, (F0), (path), -1, path)
DIRECTORY(fdopendir, fdopendir, DIR*, 0, (int fd), (fd), fd, NULL)
DIRECTORY(readdir, readdir, struct dirent*, 0, (DIR * d), (d), dirfd(d), NULL)
DIRECTORY(readdir64, readdir, struct dirent64*, 0, (DIR * d), (d), dirfd(d), NULL)
EXPORTED int closedir(DIR* directory) {
  const int verdict = verdict_on(ID_closedir);
  record(ID_closedir, dirfd(directory), NULL, -1, NULL, 0, 0, 0);
  const int result = REAL(closedir)(directory);
  if (verdict == DIE_AFTER || verdict == DIE_HALFWAY) die();
  return verdict == GO ? result : (errno = control.error, -1);
}

EXPORTED int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*), void* argument) {
  const int verdict = verdict_on(ID_pthread_create);
  if (verdict == FAIL) return control.error;
  record(ID_pthread_create, -1, NULL, -1, NULL, 0, 0, 0);
  const int result = REAL(pthread_create)(thread, attributes, start, argument);
  if (verdict == DIE_AFTER) die();
  return result;
}
