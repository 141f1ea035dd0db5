/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What snapshot/fuzz.c processes, as a native program with AFL++'s fork server:
 * the same source, to compare the speed
 */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/shm.h>
#include <sys/wait.h>
#include <unistd.h>

static unsigned char *map;

#include "fuzz-target.h"

static void *attach(const char *variable)
{
    const char *id = getenv(variable);
    void *p = id ? shmat(atoi(id), NULL, 0) : (void *)-1;

    if (p == (void *)-1) {
        exit(1);
    }
    return p;
}

int main(void)
{
    uint32_t word = 0x80000001u | 0x40000000u | (MAP_SIZE - 1) << 1 |
        0x01000000u;
    unsigned char *input;

    map = attach("__AFL_SHM_ID");
    input = attach("__AFL_SHM_FUZZ_ID");
    if (write(199, &word, 4) != 4 || read(198, &word, 4) != 4) {
        return 1;
    }
    while (read(198, &word, 4) == 4) {
        pid_t pid = fork();
        int status;

        if (!pid) {
            memcpy(&word, input, 4);
            target(input + 4, word);
            _exit(0);
        }
        if (pid < 0 || write(199, &pid, 4) != 4 ||
            waitpid(pid, &status, 0) != pid || write(199, &status, 4) != 4) {
            return 1;
        }
    }
    return 0;
}
