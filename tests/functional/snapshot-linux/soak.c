/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Restore, and do nothing else, as often as asked for
 *
 *     soak restores
 */

#include <inttypes.h>
#include <stdlib.h>
#include <termios.h>

#include "snapshot.h"

int main(int argc, char **argv)
{
    int64_t restores = argc > 1 ? atoll(argv[1]) : 1000;
    struct snapshot s;
    int64_t n;

    n = snapshot_open(&s);
    if (n == 0) {
        puts("soak: go");
        fflush(stdout);
        tcdrain(STDOUT_FILENO);
        n = snapshot_save(&s, 0);
        if (n >= 0 && n < restores) {
            n = snapshot_restore(&s, 0);
        }
    }
    if (n < 0) {
        printf("soak: %s\n", snapshot_strerror(n));
        return 1;
    }
    printf("soak: %" PRId64 " restores\n", n);
    return 0;
}
