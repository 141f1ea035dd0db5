/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What snapshot/fuzz.c processes, as a native program with AFL++'s fork server:
 * the same source, to compare the speed
 *
 *     native               a process for each input
 *     native persistent    one for all: it stops behind each, until it shall
 *                          go on
 */

#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/shm.h>
#include <sys/wait.h>
#include <unistd.h>

static unsigned char *map;

/* By this string in the program, AFL++ knows that it may stop. */
static const char *volatile signature = "##SIG_AFL_PERSISTENT##";

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

/* The fuzzer does not wait for the first of them to stop. */
static void __attribute__((noreturn)) process(const unsigned char *input,
                                              bool again)
{
    uint32_t size;

    do {
        memcpy(&size, input, 4);
        previous = 0;
        target(input + 4, size);
    } while (again && !raise(SIGSTOP));
    _exit(0);
}

int main(int argc, char **argv)
{
    const bool persistent = argc > 1 && signature &&
        !strcmp(argv[1], "persistent");
    pid_t pid = 0;

    uint32_t word = 0x80000001u | 0x40000000u | (MAP_SIZE - 1) << 1 |
        0x01000000u;
    unsigned char *input;

    map = attach("__AFL_SHM_ID");
    input = attach("__AFL_SHM_FUZZ_ID");
    if (write(199, &word, 4) != 4 || read(198, &word, 4) != 4) {
        return 1;
    }
    while (read(198, &word, 4) == 4) {
        int status;

        if (!pid) {
            pid = fork();
            if (!pid) {
                process(input, persistent);
            }
        } else {
            kill(pid, SIGCONT);
        }
        if (pid < 0 || write(199, &pid, 4) != 4 ||
            waitpid(pid, &status, persistent ? WUNTRACED : 0) != pid ||
            write(199, &status, 4) != 4) {
            return 1;
        }
        if (!WIFSTOPPED(status)) {
            pid = 0;
        }
    }
    return 0;
}
