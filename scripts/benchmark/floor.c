/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What scripts/bench compares a restore with: the least that it can cost
 *
 *     floor memcpy PAGES MIB TIMES SECONDS
 *         copy PAGES pages from an image to MIB MiB of memory
 *     floor fork PAGES MIB TIMES SECONDS
 *         fork() a process that has MIB MiB, let the child write to PAGES
 *         pages, wait for its end
 *
 * Does so TIMES times, or for SECONDS, and prints the nanoseconds of each, one
 * a line.
 */

#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE    4096UL
#define MIB     (1UL << 20)

static volatile char *ram;
static const char *image;
static unsigned long pages;

static void check(int ok, const char *what)
{
    if (!ok) {
        perror(what);
        exit(1);
    }
}

static long now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
}

/* What the guest does between two restores */
static void touch(void)
{
    for (unsigned long i = 0; i < pages; i++) {
        ram[i * PAGE]++;
    }
}

/* Page by page: nobody knows beforehand that they lie side by side. */
static long once_memcpy(void)
{
    long start;

    touch();
    start = now();
    for (unsigned long i = 0; i < pages; i++) {
        memcpy((char *)ram + i * PAGE, image + i * PAGE, PAGE);
        /* What the compiler merges, an engine could not */
        asm volatile("" : : : "memory");
    }
    return now() - start;
}

static long once_fork(void)
{
    long start = now();
    pid_t child = fork();
    int status;

    check(child >= 0, "fork");
    if (child == 0) {
        touch();
        _exit(0);
    }
    check(waitpid(child, &status, 0) == child && status == 0, "child");
    return now() - start;
}

int main(int argc, char **argv)
{
    size_t size;
    long times, n, end, *ns;
    int fd;

    if (argc != 6) {
        fprintf(stderr, "usage: floor memcpy|fork PAGES MIB TIMES SECONDS\n");
        return 2;
    }
    pages = strtoul(argv[2], NULL, 10);
    size = strtoul(argv[3], NULL, 10) * MIB;
    times = strtol(argv[4], NULL, 10);
    ns = calloc(times, sizeof(*ns));
    check(ns != NULL, "memory");

    /* As QEMU has them: RAM anonymous, large pages welcome; the image a memfd */
    ram = mmap(NULL, size, PROT_READ | PROT_WRITE,
               MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check(ram != MAP_FAILED, "memory");
    madvise((char *)ram, size, MADV_HUGEPAGE);
    memset((char *)ram, 1, size);
    if (!strcmp(argv[1], "memcpy")) {
        fd = memfd_create("image", 0);
        check(fd >= 0 && ftruncate(fd, size) == 0 &&
              write(fd, (char *)ram, pages * PAGE) >= 0, "image");
        image = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);
        check(image != MAP_FAILED, "image");
    }

    end = now() + (long)(strtod(argv[5], NULL) * 1e9);
    for (n = 0; n < times && now() < end; n++) {
        ns[n] = image ? once_memcpy() : once_fork();
    }
    for (long i = 0; i < n; i++) {
        printf("%ld\n", ns[i]);
    }
    return 0;
}
