/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Save and restore this machine, from a shell
 *
 * The exit status of a save is that of a setjmp() that cannot return two
 * kinds of success: 0 both times. Its output tells them apart:
 *
 *     case $(snapshotctl save) in
 *     saved*)    try something; snapshotctl restore ;;
 *     restored*) ... ;;
 *     esac
 */

#include <inttypes.h>
#include <termios.h>

#include "snapshot.h"

static int usage(void)
{
    fprintf(stderr,
            "usage: snapshotctl save|restore|discard|info [slot]\n"
            "  save      remember this machine in the slot (default 0)\n"
            "  restore   bring it back to where it was saved\n"
            "  discard   forget the snapshot\n"
            "  info      show the device's registers\n"
            "save prints \"saved\" and, each time that it is restored, "
            "\"restored N\".\n");
    return 2;
}

static int fail(const char *what, unsigned slot, int64_t err)
{
    fprintf(stderr, "snapshotctl: %s slot %u: %s\n", what, slot,
            snapshot_strerror(err));
    return 1;
}

static int save(struct snapshot *s, unsigned slot)
{
    int64_t n;

    /* What a caller printed to the same terminal must not go out again */
    tcdrain(STDOUT_FILENO);
    n = snapshot_save(s, slot);
    if (n < 0) {
        return fail("cannot save", slot, n);
    }
    if (n == 0) {
        printf("saved\n");
    } else {
        printf("restored %" PRId64 "\n", n);
    }
    return 0;
}

static int restore(struct snapshot *s, unsigned slot)
{
    /* Nor must it be lost */
    tcdrain(STDOUT_FILENO);
    return fail("cannot restore", slot, snapshot_restore(s, slot));
}

static int discard(struct snapshot *s, unsigned slot)
{
    int err = snapshot_discard(s, slot);

    return err ? fail("cannot discard", slot, err) : 0;
}

static int info(struct snapshot *s, unsigned slot)
{
    uint32_t features = snapshot_features(s);

    printf("slots        %" PRIu32 "\n", snapshot_slots(s));
    printf("features     0x%" PRIx32 "%s%s%s%s\n", features,
           features & SNAPSHOT_FEATURE_REMAP ? " remap" : "",
           features & SNAPSHOT_FEATURE_DIRTY ? " dirty" : "",
           features & SNAPSHOT_FEATURE_CHANNEL ? " channel" : "",
           features & SNAPSHOT_FEATURE_CONTROL ? " control" : "");
    printf("argument     0x%" PRIx64 "\n", snapshot_argument(s));
    printf("slot         %u\n", slot);
    printf("restores     %" PRIu64 "\n", snapshot_restores(s, slot));
    printf("pages        %" PRIu64 "\n", snapshot_pages(s));
    printf("nanoseconds  %" PRIu64 "\n", snapshot_nanoseconds(s));
    return 0;
}

static const struct command {
    const char *name;
    int (*run)(struct snapshot *s, unsigned slot);
} commands[] = {
    { "save", save },
    { "restore", restore },
    { "discard", discard },
    { "info", info },
};

int main(int argc, char **argv)
{
    const struct command *c = NULL;
    unsigned slot = 0;
    struct snapshot s;
    char rest;
    size_t i;
    int err;

    for (i = 0; argc > 1 && i < sizeof(commands) / sizeof(*commands); i++) {
        if (!strcmp(argv[1], commands[i].name)) {
            c = &commands[i];
        }
    }
    if (!c || argc > 3 ||
        (argc == 3 && sscanf(argv[2], "%u%c", &slot, &rest) != 1)) {
        return usage();
    }

    err = snapshot_open(&s);
    if (err) {
        fprintf(stderr, "snapshotctl: %s\n", snapshot_strerror(err));
        return 1;
    }
    return c->run(&s, slot);
}
