/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Files that change at random, and are what they should be
 *
 *     files directory
 *
 * It writes, makes longer and shorter, renames and removes files, and reads
 * them back from the disk, until there is /tmp/stop; then it reads all.  What
 * the files should be it knows from memory, so that it finds a disk that is of
 * another time than memory.  What it does next depends on the device's
 * ARGUMENT, which counts, and does not go back: after each restore it is
 * something else.
 */

#define _GNU_SOURCE     /* POSIX_FADV_DONTNEED */

#include <inttypes.h>
#include <stdbool.h>
#include <stdlib.h>

#include "snapshot.h"

enum { FILES = 60, LONGEST = 80000 };

static struct file {
    uint64_t seed;              /* 0: there is none */
    size_t size;
} files[FILES];

static unsigned char want[LONGEST + sizeof(uint64_t)], got[LONGEST + 1];
static const char *directory;

/* A step of splitmix64 */
static uint64_t mix(uint64_t *state)
{
    uint64_t z = *state += UINT64_C(0x9e3779b97f4a7c15);

    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}

static void __attribute__((noreturn)) fail(const char *what, unsigned n)
{
    printf("files: FAILED: file %u, %zu bytes: %s: %s\n", n, files[n].size,
           what, strerror(errno));
    exit(1);
}

#define CHECK(what, n) \
    do { \
        errno = 0; \
        if (!(what)) { \
            fail(#what, n); \
        } \
    } while (0)

static const char *name_of(unsigned n)
{
    static char names[2][256];
    static int i;

    i = !i;
    snprintf(names[i], sizeof(names[i]), "%s/%u", directory, n);
    return names[i];
}

/* What a file has is the beginning of what its seed stands for. */
static void fill(uint64_t seed, size_t size)
{
    uint64_t word;
    size_t i;

    for (i = 0; i < size; i += sizeof(word)) {
        word = mix(&seed);
        memcpy(want + i, &word, sizeof(word));
    }
}

static void extend(unsigned n, size_t size, int flags)
{
    size_t from = files[n].size;
    int fd = open(name_of(n), O_WRONLY | O_CREAT | flags, 0600);

    CHECK(fd >= 0, n);
    fill(files[n].seed, size);
    CHECK(pwrite(fd, want + from, size - from, from) == (ssize_t)(size - from),
          n);
    files[n].size = size;
    if (files[n].seed % 3 == 0) {
        CHECK(fsync(fd) == 0, n);
    }
    CHECK(close(fd) == 0, n);
}

/* From the disk, not from the kernel's cache */
static void check(unsigned n)
{
    ssize_t size;
    int fd;

    if (!files[n].seed) {
        CHECK(access(name_of(n), F_OK) != 0, n);
        return;
    }
    fd = open(name_of(n), O_RDONLY);
    CHECK(fd >= 0, n);
    CHECK(fdatasync(fd) == 0, n);
    CHECK(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) == 0, n);
    size = pread(fd, got, sizeof(got), 0);
    CHECK(size == (ssize_t)files[n].size, n);
    fill(files[n].seed, size);
    CHECK(memcmp(got, want, size) == 0, n);
    close(fd);
}

static void step(uint64_t seed)
{
    unsigned n = mix(&seed) % FILES, other;
    struct file *f = &files[n];

    switch (mix(&seed) % 8) {
    case 0:
    case 1:
        f->seed = mix(&seed) | 1;
        f->size = 0;
        extend(n, mix(&seed) % LONGEST, O_TRUNC);
        break;
    case 2:
        if (f->seed) {
            extend(n, f->size + mix(&seed) % (LONGEST - f->size), 0);
        }
        break;
    case 3:
        if (f->seed) {
            f->size = mix(&seed) % (f->size + 1);
            CHECK(truncate(name_of(n), f->size) == 0, n);
        }
        break;
    case 4:
        if (f->seed) {
            CHECK(unlink(name_of(n)) == 0, n);
            f->seed = 0;
        }
        break;
    case 5:
        other = mix(&seed) % FILES;
        if (f->seed && other != n) {
            CHECK(rename(name_of(n), name_of(other)) == 0, n);
            files[other] = *f;
            f->seed = 0;
        }
        break;
    default:
        check(n);
        break;
    }
}

int main(int argc, char **argv)
{
    struct snapshot s;
    uint64_t steps = 0, seed;
    unsigned n;
    int err;

    if (argc != 2) {
        puts("usage: files directory");
        return 2;
    }
    directory = argv[1];
    err = snapshot_open(&s);
    if (err) {
        printf("files: %s\n", snapshot_strerror(err));
        return 1;
    }
    while (access("/tmp/stop", F_OK)) {
        seed = snapshot_argument(&s);
        snapshot_set_argument(&s, seed + 1);
        step(mix(&seed));
        steps++;
    }
    for (n = 0; n < FILES; n++) {
        check(n);
    }
    printf("files: right after %" PRIu64 " steps, of %" PRIu64
           " in all times\n", steps, snapshot_argument(&s));
    return 0;
}
