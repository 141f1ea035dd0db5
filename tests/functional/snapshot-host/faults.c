/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A host that is short of something, for LD_PRELOAD: system calls that QEMU
 * makes for RAM and its image fail when a test wants it.
 *
 * SNAPSHOT_FAULTS names the file through which the test says so.
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

struct plan {
    char call[24];              /* its name */
    int32_t countdown;          /* the nth from now fails; 0: none does */
    int32_t half;               /* it writes half, instead of failing */
};

static struct plan nothing, *plan = &nothing;

static void __attribute__((constructor)) open_plan(void)
{
    const char *path = getenv("SNAPSHOT_FAULTS");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    void *p = MAP_FAILED;

    if (fd >= 0) {
        p = (void *)syscall(SYS_mmap, NULL, sizeof(*plan),
                            PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        close(fd);
    }
    if (p == MAP_FAILED) {
        abort();
    }
    plan = p;
}

static bool fails(const char *call, int error)
{
    if (strcmp(plan->call, call) || !plan->countdown || --plan->countdown) {
        return false;
    }
    errno = error;
    return true;
}

/* What the name stands for without this file */
#define NEXT(name) ((__typeof__(name) *)dlsym(RTLD_NEXT, #name))

int memfd_create(const char *name, unsigned flags)
{
    return fails("memfd_create", EMFILE) ? -1 : NEXT(memfd_create)(name, flags);
}

void *mmap64(void *addr, size_t len, int prot, int flags, int fd, off64_t off)
{
    return fails("mmap", ENOMEM) ? MAP_FAILED :
           NEXT(mmap64)(addr, len, prot, flags, fd, off);
}

void *mremap(void *old, size_t old_len, size_t len, int flags, ...)
{
    va_list ap;
    void *addr = NULL;

    if (flags & MREMAP_FIXED) {
        va_start(ap, flags);
        addr = va_arg(ap, void *);
        va_end(ap);
    }
    return fails(flags & MREMAP_FIXED ? "mremap, fixed" : "mremap", ENOMEM)
           ? MAP_FAILED : NEXT(mremap)(old, old_len, len, flags, addr);
}

int madvise(void *addr, size_t len, int advice)
{
    return fails("madvise", EAGAIN) ? -1 : NEXT(madvise)(addr, len, advice);
}

int ftruncate64(int fd, off64_t len)
{
    return fails("ftruncate", ENOSPC) ? -1 : NEXT(ftruncate64)(fd, len);
}

int fallocate64(int fd, int mode, off64_t off, off64_t len)
{
    return fails(mode & FALLOC_FL_PUNCH_HOLE ? "fallocate, punch" : "fallocate",
                 ENOSPC) ? -1 : NEXT(fallocate64)(fd, mode, off, len);
}

ssize_t pwrite64(int fd, const void *buf, size_t len, off64_t off)
{
    if (fails("pwrite", ENOSPC)) {
        if (!plan->half) {
            return -1;
        }
        len /= 2;
    }
    return NEXT(pwrite64)(fd, buf, len, off);
}
