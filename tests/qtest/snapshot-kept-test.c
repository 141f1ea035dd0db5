/*
 * Tests of the snapshot device: pages that are written to in restore after
 * restore stay in the log of RAM, and no write to them, or to those that left
 * it, is lost
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/units.h"
#include "qobject/qdict.h"
#include "snapshot-utils.h"

#define PAGES   48
#define SLOTS   3

/* Half of them are neighbours; each is written to at another offset. */
static uint64_t word_of(unsigned i)
{
    unsigned page = i < PAGES / 2 ? i : i * 3;

    return 1 * MiB + page * 4 * KiB + i * 0x54 % (4 * KiB);
}

/* The machine does not run: nothing changes but what is changed here. */
static SnapshotVM *start(const char *machine)
{
    return snapshot_vm_start(",slots=3", "-M %s -m 32 -nodefaults"
                             " -rtc clock=vm -S", machine);
}

static void assert_exact(SnapshotVM *vm, unsigned slot, const uint32_t *saved)
{
    QDict *found = qtest_qmp_assert_success_ref(
        vm->qts, "{ 'execute': 'x-snapshot-device-verify',"
        " 'arguments': { 'slot': %u } }", slot);
    unsigned i;

    g_assert_cmpuint(qdict_get_int(found, "pages"), ==, 0);
    g_assert_cmpuint(qdict_get_int(found, "fields"), ==, 0);
    qobject_unref(found);
    /* And the image is what was there at the save. */
    for (i = 0; i < PAGES; i++) {
        g_assert_cmphex(qtest_readl(vm->qts, word_of(i)), ==, saved[i]);
    }
}

/*
 * Catches: a page that is in the log and is not put back; one that has left it
 * and whose next write is not logged; one that is in it twice; an image that
 * lacks a page because it was in the log before, or has the one of another
 * slot's. Each page has times when it is written to in all restores, and
 * others; slots are saved and restored in any order meanwhile.
 */
static void test_recurring(const void *machine)
{
    SnapshotVM *vm = start(machine);
    uint32_t saved[SLOTS][PAGES] = {}, now[PAGES] = {}, value = 0;
    bool written[PAGES] = {};
    unsigned slot = 0, i, n;

    for (i = 0; i < SLOTS; i++) {
        snapshot_qmp(vm, "save", i);
    }
    for (n = 0; n < 300; n++) {
        for (i = 0; i < PAGES; i++) {
            if (g_test_rand_int_range(0, 6) == 0) {
                written[i] = !written[i];
            }
            if (written[i]) {
                now[i] = ++value;
                qtest_writel(vm->qts, word_of(i), value);
            }
        }
        if (g_test_rand_int_range(0, 12) == 0) {
            slot = g_test_rand_int_range(0, SLOTS);
        }
        if (g_test_rand_int_range(0, 12) == 0) {
            snapshot_qmp(vm, "save", slot);
            memcpy(saved[slot], now, sizeof(now));
        } else {
            snapshot_qmp(vm, "restore", slot);
            memcpy(now, saved[slot], sizeof(now));
        }
        assert_exact(vm, slot, now);
    }
    snapshot_vm_end(vm);
}

static void restore_and_count(SnapshotVM *vm, uint32_t value, unsigned pages)
{
    unsigned i;

    for (i = 0; i < pages; i++) {
        qtest_writel(vm->qts, word_of(i), value);
    }
    snapshot_qmp(vm, "restore", 0);
    g_assert_cmpuint(snapshot_readq(vm, SNAPSHOT_REG_PAGES), ==,
                     vm->remap ? 0 : pages);
}

/*
 * Catches: PAGES that counts pages which were in the log, but not written to;
 * and the same as above, for each number of restores without a write.
 */
static void test_counted(const void *machine)
{
    SnapshotVM *vm = start(machine);
    const uint32_t saved[PAGES] = {};
    uint32_t value = 0;
    unsigned pause, i;

    snapshot_qmp(vm, "save", 0);
    snapshot_qmp(vm, "restore", 0);
    for (pause = 0; pause < 8; pause++) {
        for (i = 0; i < 4; i++) {
            restore_and_count(vm, ++value, PAGES);
        }
        for (i = 0; i < pause; i++) {
            restore_and_count(vm, 0, 0);
        }
        restore_and_count(vm, ++value, PAGES / 2);
        assert_exact(vm, 0, saved);
    }
    snapshot_vm_end(vm);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    snapshot_add_tests("recurring", test_recurring);
    snapshot_add_tests("counted", test_counted);
    return g_test_run();
}
