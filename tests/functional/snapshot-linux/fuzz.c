/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A Linux program that a fuzzer on the host gives inputs to
 *
 *     fuzz
 *
 * What it processes is snapshot/fuzz.c's, but in a child each time, whose
 * signal, if it dies, makes the run a crash.
 */

#include <stdlib.h>
#include <sys/wait.h>

#include "snapshot.h"

static unsigned char *map;

#include "../snapshot/fuzz-target.h"

static void process(const unsigned char *input, size_t size)
{
    int fd;

    switch (target(input, size)) {
    case 'C':
        abort();
    case 'H':
        for (;;) {
            pause();
        }
    case 'P':
        fd = open("/proc/sysrq-trigger", O_WRONLY);
        if (write(fd, "c", 1) != 1) {
            _exit(1);
        }
    }
    _exit(0);
}

int main(void)
{
    const size_t size = 5000;
    unsigned char *input = snapshot_memory(size);
    char *text = snapshot_memory(4096);
    struct snapshot s;
    int status = 0;
    int64_t n;
    pid_t pid;

    map = snapshot_memory(MAP_SIZE);
    n = snapshot_open(&s);
    if (!input || !text || !map || n < 0) {
        fprintf(stderr, "fuzz: %s\n", snapshot_strerror(n));
        return 1;
    }
    snapshot_region(&s, SNAPSHOT_REGION_TEXT, text, 4096);
    n = snapshot_fuzz(&s, input, size, map, MAP_SIZE);
    if (n < 0) {
        fprintf(stderr, "fuzz: %s\n", snapshot_strerror(n));
        return 1;
    }
    pid = fork();
    if (!pid) {
        process(input, n);
    }
    if (pid < 0 || waitpid(pid, &status, 0) != pid) {
        n = snapshot_done(&s, SNAPSHOT_RESULT_INVALID);
    } else if (WIFSIGNALED(status)) {
        snprintf(text, 4096, "signal %d", WTERMSIG(status));
        n = snapshot_done(&s, SNAPSHOT_RESULT_CRASH);
    } else {
        n = snapshot_done(&s, SNAPSHOT_RESULT_OK);
    }
    fprintf(stderr, "fuzz: %s\n", snapshot_strerror(n));
    return 1;
}
