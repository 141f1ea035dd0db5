/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Runs for a program on the host, each of which writes its input to a file
 *
 *     snapshot-write [-s SIZE] FILE
 *
 * FILE is a device, or one of those in /proc and /sys whose content is for a
 * driver; it is opened, written to once, and closed. SIZE is how long an input
 * can be, in bytes, 4 KiB by default.
 */

#include <stdlib.h>

#include "snapshot.h"

#define TEXT_SIZE       4096

static int fail(const char *what, const char *why)
{
    fprintf(stderr, "snapshot-write: %s: %s\n", what, why);
    return 1;
}

int main(int argc, char **argv)
{
    size_t size = 4096;
    struct snapshot s;
    unsigned char *input;
    int64_t n;
    char *text;
    int c, fd;

    while ((c = getopt(argc, argv, "s:")) != -1) {
        size = c == 's' ? atol(optarg) : 0;
    }
    if (argc != optind + 1 || !size) {
        fprintf(stderr, "usage: snapshot-write [-s SIZE] FILE\n");
        return 2;
    }
    /* What is wrong with the file is told now, not in each run. */
    fd = open(argv[optind], O_WRONLY);
    if (fd < 0) {
        return fail(argv[optind], strerror(errno));
    }
    close(fd);
    input = snapshot_memory(size);
    text = snapshot_memory(TEXT_SIZE);
    if (!input || !text) {
        return fail("memory for the input", strerror(errno));
    }
    n = snapshot_open(&s);
    if (n >= 0) {
        snapshot_region(&s, SNAPSHOT_REGION_TEXT, text, TEXT_SIZE);
        n = snapshot_fuzz(&s, input, size, NULL, 0);
    }
    if (n < 0) {
        return fail("snapshot", snapshot_strerror(n));
    }
    fd = open(argv[optind], O_WRONLY);
    if (fd < 0 || write(fd, input, n) < 0) {
        snprintf(text, TEXT_SIZE, "%s: %s", argv[optind], strerror(errno));
    }
    close(fd);
    /* What the driver does not take, it has processed as well. */
    n = snapshot_done(&s, SNAPSHOT_RESULT_OK);
    return fail("snapshot", snapshot_strerror(n));
}
