/* For libstdc++'s headers, which take this one of glibc 2.32 for granted where they were configured for a later glibc
 * than is built for: reference counts are always counted atomically. */
#ifndef SDIO_GLIBC_2_28_SINGLE_THREADED_H_
#define SDIO_GLIBC_2_28_SINGLE_THREADED_H_

static const char __libc_single_threaded = 0;

#endif
