/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Connections that are opened anew after each restore
 *
 *     net restores target...
 *
 * A target is t10.0.2.2:80 for TCP, u10.0.2.2:80 for UDP; k10.0.2.2:80 is
 * opened once, before the save, and used only after the last restore. Whoever
 * is there has to send back what is sent. None is closed before a restore.
 * For l0.0.0.0:80, what comes is sent back, after the last restore.
 *
 * Prints the longest time that a round of them took, in microseconds, and how
 * many took so long that a packet must have been lost, and was sent again.
 * ARGUMENT, which no restore reverts, holds both.
 */

#include <arpa/inet.h>
#include <inttypes.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>

#include "snapshot.h"

#define TARGETS 8
#define SLOW    900000          /* us; TCP waits for a second */

static int64_t now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000) + t.tv_nsec / 1000;
}

static int fail(const char *what, const char *target, int64_t n)
{
    printf("net: after restore %" PRId64 ": %s %s: %m\n", n, target, what);
    return 1;
}

static int open_target(const char *target)
{
    struct timeval patience = { .tv_sec = 60 };
    struct sockaddr_in to = { .sin_family = AF_INET };
    char host[64];
    unsigned port;
    int s;

    if (sscanf(target + 1, "%63[0-9.]:%u", host, &port) != 2 ||
        !inet_aton(host, &to.sin_addr)) {
        return -1;
    }
    to.sin_port = htons(port);
    s = socket(AF_INET, *target == 'u' ? SOCK_DGRAM : SOCK_STREAM, 0);
    setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
    setsockopt(s, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
    if (*target == 'l') {
        return bind(s, (struct sockaddr *)&to, sizeof(to)) || listen(s, 8) ?
            -1 : s;
    }
    return connect(s, (struct sockaddr *)&to, sizeof(to)) ? -1 : s;
}

/* Send something back, once. */
static int serve(const char *target)
{
    int listening = open_target(target), s, length;
    char got[32];

    do {
        s = accept(listening, NULL, NULL);
        if (s < 0) {
            return 0;
        }
        length = recv(s, got, sizeof(got), 0);
        length = length > 0 ? send(s, got, length, 0) : 0;
        /* The answer is on its way before the machine ends. */
        shutdown(s, SHUT_WR);
        recv(s, got, sizeof(got), 0);
        close(s);
    } while (length <= 0);
    return 1;
}

/* Is what is sent sent back? */
static int use(int s, int64_t n)
{
    char sent[32], got[sizeof(sent)];
    int length = snprintf(sent, sizeof(sent), "restore %" PRId64 "\n", n);

    return send(s, sent, length, 0) == length &&
        recv(s, got, length, MSG_WAITALL) == length &&
        !memcmp(sent, got, length);
}

int main(int argc, char **argv)
{
    int64_t restores = argc > 1 ? atoll(argv[1]) : 1, n, start, longest;
    int kept[TARGETS], i, s;
    uint64_t slow;
    struct snapshot snapshot;

    if (argc > TARGETS ||
        system("ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up")) {
        return fail("no network", "", 0);
    }
    n = snapshot_open(&snapshot);
    if (n < 0) {
        printf("net: %s\n", snapshot_strerror(n));
        return 1;
    }
    snapshot_set_argument(&snapshot, 0);
    for (i = 2; i < argc; i++) {
        if (*argv[i] == 'l') {
            continue;
        }
        /* The host's address is known from now on. */
        kept[i] = open_target(argv[i]);
        if (kept[i] < 0 || !use(kept[i], 0)) {
            return fail("cannot be had", argv[i], 0);
        }
        if (*argv[i] != 'k') {
            close(kept[i]);
        }
    }
    /* Closed connections are closed on both sides. */
    sleep(1);

    n = snapshot_save(&snapshot, 0);
    if (n < 0) {
        printf("net: %s\n", snapshot_strerror(n));
        return 1;
    }
    start = now();
    for (i = 2; i < argc; i++) {
        if (*argv[i] == 'k' || *argv[i] == 'l') {
            if (n == restores &&
                !(*argv[i] == 'k' ? use(kept[i], n) : serve(argv[i]))) {
                return fail("did not go on", argv[i], n);
            }
            continue;
        }
        s = open_target(argv[i]);
        if (s < 0) {
            return fail("did not come up", argv[i], n);
        }
        if (!use(s, n)) {
            return fail("does not answer", argv[i], n);
        }
    }
    start = now() - start;
    slow = (snapshot_argument(&snapshot) >> 32) + (start >= SLOW);
    longest = snapshot_argument(&snapshot) & UINT32_MAX;
    if (start > longest) {
        longest = start;
    }
    snapshot_set_argument(&snapshot, slow << 32 | longest);
    if (n < restores) {
        n = snapshot_restore(&snapshot, 0);
        printf("net: %s\n", snapshot_strerror(n));
        return 1;
    }
    printf("net: restored %" PRId64 " times, at most %" PRId64 " us, %" PRIu64
           " slow\n", n, longest, slow);
    return 0;
}
