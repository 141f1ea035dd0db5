/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A kernel that a fuzzer's input makes crash
 *
 *     oops
 *
 * The input is put over the functions of /dev/zero's driver: the device finds
 * the kernel's memory in the page tables as it finds a program's (with nopti on
 * the kernel's command line, both are in the same ones). Then a child reads
 * from it. An input of no bytes changes nothing.
 */

#include <inttypes.h>
#include <stdlib.h>
#include <sys/wait.h>

#include "snapshot.h"

/* struct file_operations begins with its owner, a pointer. */
#define FUNCTIONS       8
#define FUNCTIONS_SIZE  64

static uint64_t find(const char *symbol)
{
    FILE *f = fopen("/proc/kallsyms", "re");
    uint64_t address, found = 0;
    char name[256];

    while (f && fscanf(f, "%" SCNx64 " %*c %255s%*[^\n]", &address,
                       name) == 2) {
        if (!strcmp(name, symbol)) {
            found = address;
        }
    }
    if (f) {
        fclose(f);
    }
    return found;
}

int main(void)
{
    void *functions = (void *)(uintptr_t)(find("zero_fops") + FUNCTIONS);
    int fd = open("/dev/zero", O_RDONLY);
    struct snapshot s;
    int64_t n = snapshot_open(&s);
    char c = 1;
    pid_t pid;
    int status;

    if (functions == (void *)FUNCTIONS || fd < 0 || n < 0) {
        fprintf(stderr, "oops: %p, %d, %s\n", functions, fd,
                snapshot_strerror(n));
        return 1;
    }
    n = snapshot_fuzz(&s, functions, FUNCTIONS_SIZE, NULL, 0);
    if (n < 0) {
        fprintf(stderr, "oops: %s\n", snapshot_strerror(n));
        return 1;
    }
    pid = fork();
    if (!pid) {
        _exit(read(fd, &c, 1) != 1 || c);
    }
    /* Where an oops is no panic, this is what is seen of it. */
    n = waitpid(pid, &status, 0) == pid && !status ? SNAPSHOT_RESULT_OK
                                                   : SNAPSHOT_RESULT_INVALID;
    fprintf(stderr, "oops: %s\n", snapshot_strerror(snapshot_done(&s, n)));
    return 1;
}
