/*
 * Inputs for any device: accesses, a save, accesses, a restore, and so on
 *
 * The qtest program runs them from outside QEMU, the fuzzer from inside.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef TESTS_QTEST_SNAPSHOT_ANY_H
#define TESTS_QTEST_SNAPSHOT_ANY_H

#include "libqtest.h"

/* The machine as it was before the first input */
#define SNAPSHOT_ANY_BASE       1

/* What is tortured has this for its id; what it is attached to, one with it. */
#define SNAPSHOT_ANY_ID         "dut"

typedef struct SnapshotAny SnapshotAny;

/* How it is reached that there is a QEMU outside or inside; none is NULL. */
typedef struct SnapshotAnyOps {
    /* Run a command of the human monitor; the caller frees what it says. */
    char *(*hmp)(SnapshotAny *a, const char *command);

    /* Reset the machine, and return when that is done. */
    void (*reset)(SnapshotAny *a);

    /* Let bottom halves run after an access. */
    void (*settle)(SnapshotAny *a);

    /* Something is as it must not be; does not return. */
    G_NORETURN void (*fail)(SnapshotAny *a, const char *text);

    /* A restore was refused: is that right, as a device went? */
    bool (*is_gone)(SnapshotAny *a);
} SnapshotAnyOps;

struct SnapshotAny {
    QTestState *qts;
    const SnapshotAnyOps *ops;
    bool whole_machine;         /* and not what has the id */
    bool has_ports;             /* to access PCI configuration space by */
    bool snapshots;             /* else resets and the same accesses anew */
    bool has_unplug;            /* ask for it, too */
    bool has_changed_medium;    /* since the machine was started */
    bool has_no_state;          /* A save warned that it is left as it is. */

    /* Tells who waits that it does not hang, and where it is */
    unsigned *beats;
    char *step;
    size_t step_size;

    /* Of this file */
    GArray *regions, *functions, *config;
    uint64_t memory, io;
    unsigned buses;
    bool is_reset_first;
    const uint8_t *data;
    size_t size, next;
    size_t record, used;
    uint64_t random;
    uint64_t seen;              /* a hash of what accesses have read */
};

/**
 * snapshot_any_set_up: set up PCI as firmware does, find what to access, and
 * save the machine as SNAPSHOT_ANY_BASE
 *
 * Returns: NULL, or why it cannot be saved; the caller frees it
 */
char *snapshot_any_set_up(SnapshotAny *a);

/**
 * snapshot_any_input: run one input, beginning with the machine as it was
 * @data: any bytes; each SNAPSHOT_ANY_RECORD of them is a step
 *
 * Returns: false if a device went for good, so that this machine is of no use
 */
bool snapshot_any_input(SnapshotAny *a, const uint8_t *data, size_t size);

#define SNAPSHOT_ANY_RECORD     16

/**
 * snapshot_any_behaviour: does the machine do the same after each restore?
 *
 * That tells what its sections do not.  Accesses after a restore have to read
 * what they read after an earlier one, whatever was done between.  A machine
 * that does not do so even if nothing was done is left out: it has something to
 * do with the host.
 */
void snapshot_any_behaviour(SnapshotAny *a, const uint8_t *data, size_t size);

/**
 * snapshot_any_restores: restore a machine that @data made @n times
 * @before: is called before each
 */
void snapshot_any_restores(SnapshotAny *a, const uint8_t *data, size_t size,
                           unsigned n, void (*before)(SnapshotAny *a));

#endif
