/* SPDX-License-Identifier: MIT */
/*
 * Counts the branches of a program for a fuzzer on the host
 *
 * For programs and libraries that are compiled with
 * -fsanitize-coverage=trace-pc (clang, gcc) or trace-pc-guard (clang), and
 * without AFL++'s compiler: link snapshot-cov.o with a program. A library needs
 * nothing; if the program that loads it has no snapshot-cov.o, snapshot-shim.so
 * contains the same.
 *
 * The map is the SysV segment that __AFL_SHM_ID names, of AFL_MAP_SIZE bytes.
 * This file must not be compiled with that option itself.
 */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/shm.h>

/* Of a program that nobody fuzzes, all counts are one. */
static unsigned char nobody[1];
static unsigned char *map = nobody;
static uint32_t map_size = 1;
static uint32_t guards;
static __thread uint32_t previous;

/* Before the constructors that have branches of their own */
static void __attribute__((constructor(101))) attach(void)
{
    const char *id = getenv("__AFL_SHM_ID"), *size = getenv("AFL_MAP_SIZE");
    long n = size ? atol(size) : 0;
    void *p;

    if (map != nobody || !id || n <= 0 || n > INT32_MAX) {
        return;
    }
    p = shmat(atoi(id), NULL, 0);
    if (p == (void *)-1) {
        perror("snapshot-cov: no coverage map");
        exit(1);
    }
    map = p;
    map_size = n;
}

/* A count that comes to 256 goes on with 1: 0 says that it was not there. */
static inline void count(uint32_t i)
{
    unsigned char n = map[i] + 1;

    map[i] = n + !n;
}

/*
 * Guards are one for each edge between two blocks, so that each can have a
 * count of its own, while there is room.
 */
void __sanitizer_cov_trace_pc_guard_init(uint32_t *start, uint32_t *stop)
{
    attach();
    if (start == stop || *start) {
        return;
    }
    for (; start < stop; start++) {
        *start = guards++ % map_size + 1;
    }
    if (guards > map_size && map_size > 1) {
        fprintf(stderr, "snapshot-cov: %u edges share %u counts: "
                "snapshot-run -m %u\n", guards, map_size, guards);
    }
}

void __sanitizer_cov_trace_pc_guard(uint32_t *guard)
{
    /* 0: in a constructor of a library, before all are numbered */
    if (*guard) {
        count(*guard - 1);
    }
}

/*
 * Here the compiler numbers nothing: a block is known by its address, and an
 * edge by those of two blocks, as AFL does it.
 */
void __sanitizer_cov_trace_pc(void)
{
    uint32_t block = (uintptr_t)__builtin_return_address(0) * 0x9e3779b1u;

    count((uint64_t)(block ^ previous) * map_size >> 32);
    previous = block >> 1;
}
