/*
 * What the tests of the snapshot device share: a machine with the device, its
 * registers, its QMP commands
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef TESTS_QTEST_SNAPSHOT_UTILS_H
#define TESTS_QTEST_SNAPSHOT_UTILS_H

#include "libqtest.h"
#include "libqos/pci.h"
#include "hw/misc/snapshot-regs.h"

typedef struct SnapshotVM {
    QTestState *qts;
    QPCIBus *pci;
    QPCIDevice *dev;
    QPCIBar bar;
    bool remap;                 /* how RAM is put back; else by dirty pages */
} SnapshotVM;

/**
 * snapshot_vm_start: start a machine with a snapshot device, its BAR mapped
 * @properties: of the device, each after a comma, or ""
 * @fmt: the other arguments of QEMU
 */
SnapshotVM *snapshot_vm_start(const char *properties, const char *fmt, ...)
    G_GNUC_PRINTF(2, 3);

/**
 * snapshot_add_test: add a test for a machine and a way to put RAM back
 * @machine: is given to @test, if there is such a machine
 * @mode: what ram= is in @test's snapshot_vm_start()
 */
void snapshot_add_test(const char *machine, const char *mode, const char *name,
                       GTestDataFunc test);

/** snapshot_add_tests: the same for "pc" and "q35", both ways */
void snapshot_add_tests(const char *name, GTestDataFunc test);

/** snapshot_vm_end: end the machine and forget @vm */
void snapshot_vm_end(SnapshotVM *vm);

/** snapshot_map_bar: what firmware does, after a reset too */
void snapshot_map_bar(SnapshotVM *vm);

uint32_t snapshot_readl(SnapshotVM *vm, unsigned reg);
uint64_t snapshot_readq(SnapshotVM *vm, unsigned reg);
void snapshot_writel(SnapshotVM *vm, unsigned reg, uint32_t val);
void snapshot_writeq(SnapshotVM *vm, unsigned reg, uint64_t val);

/**
 * snapshot_command: run a command as a guest does, and wait for its end
 *
 * Returns: STATUS
 */
uint32_t snapshot_command(SnapshotVM *vm, uint32_t command, uint32_t slot);

/* The same for a command that has to succeed. */
void snapshot_save(SnapshotVM *vm, unsigned slot);
void snapshot_restore(SnapshotVM *vm, unsigned slot);
void snapshot_discard(SnapshotVM *vm, unsigned slot);

/* "save", "restore" or "discard" from the host. */
void snapshot_qmp(SnapshotVM *vm, const char *command, unsigned slot);

/** snapshot_qmp_refused: the error's text has to contain @text */
void snapshot_qmp_refused(SnapshotVM *vm, const char *command, unsigned slot,
                          const char *text);

/** snapshot_query: x-query-snapshot-device; the caller owns the result */
QDict *snapshot_query(SnapshotVM *vm);

/** snapshot_resident: bytes of QEMU's own memory that are resident */
int64_t snapshot_resident(SnapshotVM *vm);

/**
 * snapshot_resident_at_last: the same, when RCU has freed what it has to
 *
 * That is late, and on a busy host later.
 */
int64_t snapshot_resident_at_last(SnapshotVM *vm);

/**
 * snapshot_state_file: a new disk of qcow2, for QEMU's own snapshots
 *
 * Returns: its path, which the caller frees, after the file is removed; %NULL
 *          if the test is skipped, as there is no qemu-img
 */
char *snapshot_state_file(void);

/**
 * snapshot_trace: arguments of a machine that writes an event to a new file
 * @log: its path; the caller frees both strings, after the file is removed
 */
char *snapshot_trace(const char *machine, const char *event, char **log);

/** snapshot_count: how often a text is in a file */
unsigned snapshot_count(const char *file, const char *text);

/** snapshot_assert_state: what query-status has to tell */
void snapshot_assert_state(SnapshotVM *vm, const char *state);

/*
 * Write something to memory that depends on @seed and the address; find it
 * there.  Every 256 KiB, at all offsets in a page.
 */
void snapshot_fill(SnapshotVM *vm, uint64_t base, uint64_t size, unsigned seed);
void snapshot_check(SnapshotVM *vm, uint64_t base, uint64_t size,
                    unsigned seed);

/** snapshot_round_trip: save, spoil and restore memory, three times */
void snapshot_round_trip(SnapshotVM *vm, uint64_t base, uint64_t size);

#endif /* TESTS_QTEST_SNAPSHOT_UTILS_H */
