/*
 * Tests of the snapshot device: its registers and commands
 *
 * What a restore puts back is tested in snapshot-state-test.c, which machines
 * can be saved in snapshot-machine-test.c.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/units.h"
#include "hw/pci/pci_regs.h"
#include "qobject/qdict.h"
#include "qobject/qlist.h"
#include "snapshot-utils.h"

#define STATUS_ERROR(e) (SNAPSHOT_STATUS_ERROR | SNAPSHOT_E_##e)

/* Catches: a changed identity, a BAR of another kind or size. */
static void test_identity(const void *machine)
{
    SnapshotVM *vm = snapshot_vm_start("", "-M %s", (const char *)machine);
    QPCIDevice *dev = vm->dev;
    int bar;

    g_assert_cmphex(qpci_config_readw(dev, PCI_VENDOR_ID), ==, 0x1234);
    g_assert_cmphex(qpci_config_readw(dev, PCI_DEVICE_ID), ==, 0xf987);
    g_assert_cmphex(qpci_config_readb(dev, PCI_REVISION_ID), ==, 0x10);
    g_assert_cmphex(qpci_config_readw(dev, PCI_CLASS_DEVICE), ==, 0x00ff);
    g_assert_cmphex(qpci_config_readb(dev, PCI_HEADER_TYPE), ==, 0);
    g_assert_cmphex(qpci_config_readb(dev, PCI_INTERRUPT_PIN), ==, 0);

    for (bar = 0; bar < 6; bar++) {
        unsigned reg = PCI_BASE_ADDRESS_0 + 4 * bar;

        qpci_config_writel(dev, reg, 0xffffffff);
        /* All ones where the size is, and no flag in the low bits */
        g_assert_cmphex(qpci_config_readl(dev, reg), ==, bar ? 0 : 0xfff00000);
    }
    snapshot_vm_end(vm);
}

/* What has to be in the registers of a device that has had no command */
static void assert_untouched(SnapshotVM *vm, uint64_t argument)
{
    g_assert_cmphex(snapshot_readl(vm, SNAPSHOT_REG_STATUS), ==, 0);
    g_assert_cmphex(snapshot_readl(vm, SNAPSHOT_REG_SLOT), ==, 2);
    g_assert_cmphex(snapshot_readl(vm, SNAPSHOT_REG_SLOTS), ==, 3);
    g_assert_cmphex(snapshot_readl(vm, SNAPSHOT_REG_FEATURES), ==,
                    vm->remap ? SNAPSHOT_FEATURE_REMAP
                              : SNAPSHOT_FEATURE_DIRTY);
    g_assert_cmphex(snapshot_readq(vm, SNAPSHOT_REG_ARGUMENT), ==, argument);
    g_assert_cmphex(snapshot_readq(vm, SNAPSHOT_REG_RESTORES), ==, 0);
    g_assert_cmphex(snapshot_readq(vm, SNAPSHOT_REG_PAGES), ==, 0);
    g_assert_cmphex(snapshot_readq(vm, SNAPSHOT_REG_NANOSECONDS), ==, 0);
}

static uint64_t read_any(SnapshotVM *vm, unsigned reg, unsigned size)
{
    switch (size) {
    case 1:
        return qpci_io_readb(vm->dev, vm->bar, reg);
    case 2:
        return qpci_io_readw(vm->dev, vm->bar, reg);
    case 4:
        return snapshot_readl(vm, reg);
    default:
        return snapshot_readq(vm, reg);
    }
}

static void write_any(SnapshotVM *vm, unsigned reg, unsigned size, uint64_t val)
{
    switch (size) {
    case 1:
        qpci_io_writeb(vm->dev, vm->bar, reg, val);
        break;
    case 2:
        qpci_io_writew(vm->dev, vm->bar, reg, val);
        break;
    case 4:
        snapshot_writel(vm, reg, val);
        break;
    default:
        snapshot_writeq(vm, reg, val);
    }
}

/* Reads 0, ignores a write (of what would be a command elsewhere). */
static void assert_nothing_at(SnapshotVM *vm, unsigned reg, unsigned size)
{
    g_test_message("0x%x, %u bytes", reg, size);
    g_assert_cmphex(read_any(vm, reg, size), ==, 0);
    write_any(vm, reg, size, 0x0000010200000101);
    g_assert_cmphex(read_any(vm, reg, size), ==, 0);
    assert_untouched(vm, 0x8877665544332211);
}

/* Those of runs: each region has its own two, and there are three regions. */
static void assert_run_registers(SnapshotVM *vm)
{
    unsigned region;

    snapshot_writel(vm, SNAPSHOT_REG_RESULT, 0x11223344);
    g_assert_cmphex(snapshot_readl(vm, SNAPSHOT_REG_RESULT), ==, 0x11223344);
    snapshot_writel(vm, SNAPSHOT_REG_INPUT_LENGTH, 1);
    g_assert_cmphex(snapshot_readl(vm, SNAPSHOT_REG_INPUT_LENGTH), ==, 0);
    for (region = 0; region < SNAPSHOT_REGIONS; region++) {
        snapshot_writel(vm, SNAPSHOT_REG_REGION, region);
        snapshot_writeq(vm, SNAPSHOT_REG_ADDRESS, 0x1122334455667788 + region);
        snapshot_writel(vm, SNAPSHOT_REG_LENGTH, region);
        snapshot_writel(vm, SNAPSHOT_REG_LENGTH + 4, 0xaabbccdd);
    }
    for (region = 0; region < SNAPSHOT_REGIONS; region++) {
        snapshot_writel(vm, SNAPSHOT_REG_REGION, region);
        g_assert_cmphex(snapshot_readl(vm, SNAPSHOT_REG_ADDRESS + 4), ==,
                        0x11223344);
        g_assert_cmphex(snapshot_readl(vm, SNAPSHOT_REG_ADDRESS), ==,
                        0x55667788 + region);
        g_assert_cmphex(snapshot_readq(vm, SNAPSHOT_REG_LENGTH), ==,
                        0xaabbccdd00000000 + region);
    }
    snapshot_writel(vm, SNAPSHOT_REG_REGION, SNAPSHOT_REGIONS);
    g_assert_cmphex(snapshot_readl(vm, SNAPSHOT_REG_REGION), ==,
                    SNAPSHOT_REGIONS);
    assert_nothing_at(vm, SNAPSHOT_REG_ADDRESS, 8);
    assert_nothing_at(vm, SNAPSHOT_REG_LENGTH, 8);
    snapshot_writel(vm, SNAPSHOT_REG_REGION, 0);
}

/*
 * Catches: a register missing or elsewhere, an access of another width or
 * alignment that takes effect, a writable register that should be read only,
 * halves of the 64-bit registers mixed up, unlisted offsets that are not dead.
 */
static void test_registers(const void *machine)
{
    static const unsigned unlisted[] = {
        0x38, 0x58, 0x60, 0x100, 0x7f8, 0x1000, 0x80000, 0xffff8,
    };
    SnapshotVM *vm = snapshot_vm_start(",slots=3", "-M %s",
                                       (const char *)machine);
    unsigned reg, i;

    snapshot_writel(vm, SNAPSHOT_REG_SLOT, 0xfedcba98);
    g_assert_cmphex(snapshot_readl(vm, SNAPSHOT_REG_SLOT), ==, 0xfedcba98);
    snapshot_writel(vm, SNAPSHOT_REG_SLOT, 2);
    assert_untouched(vm, 0);

    snapshot_writeq(vm, SNAPSHOT_REG_ARGUMENT, 0x0123456789abcdef);
    g_assert_cmphex(snapshot_readl(vm, SNAPSHOT_REG_ARGUMENT), ==, 0x89abcdef);
    g_assert_cmphex(snapshot_readl(vm, SNAPSHOT_REG_ARGUMENT + 4), ==,
                    0x01234567);
    snapshot_writel(vm, SNAPSHOT_REG_ARGUMENT, 0x44332211);
    assert_untouched(vm, 0x0123456744332211);
    snapshot_writel(vm, SNAPSHOT_REG_ARGUMENT + 4, 0x88776655);
    assert_untouched(vm, 0x8877665544332211);

    for (reg = 0; reg < 0x30; reg++) {
        assert_nothing_at(vm, reg, 1);
        if (reg < 0x2f) {
            assert_nothing_at(vm, reg, 2);
        }
        if (reg % 4) {
            assert_nothing_at(vm, reg, 4);
        }
    }
    assert_run_registers(vm);
    /* Two 32-bit registers at once are not a 64-bit register. */
    assert_nothing_at(vm, 0x000, 8);
    assert_nothing_at(vm, 0x008, 8);

    for (i = 0; i < ARRAY_SIZE(unlisted); i++) {
        assert_nothing_at(vm, unlisted[i], 4);
        assert_nothing_at(vm, unlisted[i] + 4, 4);
        assert_nothing_at(vm, unlisted[i], 8);
    }

    for (reg = SNAPSHOT_REG_SLOTS; reg < 0x30; reg += 4) {
        if ((reg & ~7) != SNAPSHOT_REG_ARGUMENT) {
            snapshot_writel(vm, reg, 0x102);
            assert_untouched(vm, 0x8877665544332211);
        }
    }
    for (reg = SNAPSHOT_REG_RESTORES; reg < 0x30; reg += 8) {
        snapshot_writeq(vm, reg, 0x102);
        assert_untouched(vm, 0x8877665544332211);
    }
    snapshot_vm_end(vm);
}

/*
 * Catches: a wrong STATUS, an error that takes effect or stops the machine,
 * counters of a slot that are not its own or survive a save, a page that is
 * not counted or counted without having been written to, registers that a
 * restore puts back, configuration space that it does not put back.
 */
static void test_commands(const void *machine)
{
    static const uint32_t commands[] = {
        SNAPSHOT_CMD_SAVE, SNAPSHOT_CMD_RESTORE, SNAPSHOT_CMD_DISCARD,
    };
    static const uint32_t unknown[] = {
        0, 1, 0x100, 0x104, 0x1010000, 0x80000101, 0xffffffff
    };
    static const uint32_t no_slots[] = { 2, 64, 0x80000000, 0xffffffff };
    SnapshotVM *vm = snapshot_vm_start(",slots=2", "-M %s",
                                       (const char *)machine);
    uint64_t reset;
    unsigned i, j;

    for (i = 0; i < ARRAY_SIZE(no_slots); i++) {
        for (j = 0; j < ARRAY_SIZE(commands); j++) {
            g_assert_cmphex(snapshot_command(vm, commands[j], no_slots[i]),
                            ==, STATUS_ERROR(SLOT));
        }
        g_assert_cmpuint(snapshot_readq(vm, SNAPSHOT_REG_RESTORES), ==, 0);
    }
    for (i = 0; i < 2; i++) {
        g_assert_cmphex(snapshot_command(vm, SNAPSHOT_CMD_RESTORE, i), ==,
                        STATUS_ERROR(EMPTY));
        g_assert_cmphex(snapshot_command(vm, SNAPSHOT_CMD_DISCARD, i), ==,
                        STATUS_ERROR(EMPTY));
    }
    /* An unknown command is unknown whatever the slot. */
    for (i = 0; i < ARRAY_SIZE(unknown); i++) {
        for (j = 0; j < 2; j++) {
            snapshot_command(vm, SNAPSHOT_CMD_DISCARD, j * 99);
            snapshot_writel(vm, SNAPSHOT_REG_COMMAND, unknown[i]);
            g_assert_cmphex(snapshot_readl(vm, SNAPSHOT_REG_STATUS), ==,
                            STATUS_ERROR(COMMAND));
        }
    }
    g_assert_cmphex(snapshot_command(vm, SNAPSHOT_CMD_READY, 0), ==,
                    STATUS_ERROR(CONTROL));
    g_assert_cmphex(snapshot_command(vm, SNAPSHOT_CMD_DONE, 99), ==,
                    STATUS_ERROR(RUN));
    snapshot_assert_state(vm, "running");

    qpci_config_writeb(vm->dev, PCI_INTERRUPT_LINE, 0x5a);
    snapshot_save(vm, 0);
    snapshot_save(vm, 1);
    qpci_config_writeb(vm->dev, PCI_INTERRUPT_LINE, 0xa5);
    snapshot_writeq(vm, SNAPSHOT_REG_ARGUMENT, 0x1122334455667788);
    snapshot_restore(vm, 1);
    reset = snapshot_readq(vm, SNAPSHOT_REG_PAGES);
    for (i = 1; i <= 3; i++) {
        snapshot_fill(vm, 1 * MiB, i * 256 * KiB, 1);       /* i pages */
        snapshot_restore(vm, 1);
        g_assert_cmpuint(snapshot_readq(vm, SNAPSHOT_REG_RESTORES), ==, i + 1);
        g_assert_cmpuint(snapshot_readq(vm, SNAPSHOT_REG_PAGES), ==,
                         vm->remap ? 0 : reset + i);
        g_assert_cmpuint(snapshot_readq(vm, SNAPSHOT_REG_NANOSECONDS), >, 1000);
        g_assert_cmpuint(snapshot_readq(vm, SNAPSHOT_REG_NANOSECONDS), <,
                         60000000000);
        g_assert_cmpuint(snapshot_readl(vm, SNAPSHOT_REG_SLOT), ==, 1);
    }
    g_assert_cmphex(snapshot_readq(vm, SNAPSHOT_REG_ARGUMENT), ==,
                    0x1122334455667788);
    g_assert_cmphex(qpci_config_readb(vm->dev, PCI_INTERRUPT_LINE), ==, 0x5a);

    snapshot_writel(vm, SNAPSHOT_REG_SLOT, 0);
    g_assert_cmpuint(snapshot_readq(vm, SNAPSHOT_REG_RESTORES), ==, 0);
    snapshot_save(vm, 1);
    g_assert_cmpuint(snapshot_readq(vm, SNAPSHOT_REG_RESTORES), ==, 0);

    snapshot_restore(vm, 1);
    g_assert_cmpuint(snapshot_readq(vm, SNAPSHOT_REG_RESTORES), ==, 1);
    snapshot_discard(vm, 1);
    g_assert_cmpuint(snapshot_readq(vm, SNAPSHOT_REG_RESTORES), ==, 0);
    g_assert_cmphex(snapshot_command(vm, SNAPSHOT_CMD_RESTORE, 1), ==,
                    STATUS_ERROR(EMPTY));
    g_assert_cmphex(snapshot_command(vm, SNAPSHOT_CMD_DISCARD, 1), ==,
                    STATUS_ERROR(EMPTY));
    snapshot_restore(vm, 0);
    snapshot_vm_end(vm);
}

static bool count_event(QTestState *qts, const char *name, QDict *event,
                        void *opaque)
{
    unsigned *events = opaque;

    g_test_message("event %s", name);
    ++*events;
    return false;
}

static void assert_saved(SnapshotVM *vm, unsigned n, unsigned slot,
                         unsigned restores)
{
    QDict *info = snapshot_query(vm);
    QList *saved = qdict_get_qlist(info, "saved");
    QListEntry *entry;
    bool found = false;

    g_assert_cmpuint(qdict_get_int(info, "slots"), ==, 64);
    g_assert_cmpuint(qlist_size(saved), ==, n);
    QLIST_FOREACH_ENTRY(saved, entry) {
        QDict *item = qobject_to(QDict, qlist_entry_obj(entry));

        g_assert_cmpuint(qdict_get_int(item, "ram-size"), >=, 16 * MiB);
        g_assert_cmpuint(qdict_get_int(item, "device-size"), >, 1 * KiB);
        if (qdict_get_int(item, "slot") == slot) {
            g_assert_cmpuint(qdict_get_int(item, "restores"), ==, restores);
            found = true;
        }
    }
    g_assert_cmpint(found, ==, n > 0);
    qobject_unref(info);
}

static void assert_hmp(SnapshotVM *vm, const char *command, const char *text)
{
    g_autofree char *out = qtest_hmp(vm->qts, "%s", command);

    g_test_message("%s: %s", command, out);
    if (*text) {
        g_assert_nonnull(strstr(out, text));
    } else {
        g_assert_cmpstr(out, ==, "");
    }
}

/*
 * Catches: commands of the host that do something else than the guest's, fail
 * without an error or succeed with one; counters that do not add up; events.
 */
static void test_monitor(const void *machine)
{
    SnapshotVM *vm = snapshot_vm_start(",slots=64", "-M %s -m 16",
                                       (const char *)machine);
    unsigned events = 0, i;
    QDict *info;

    assert_saved(vm, 0, 0, 0);
    snapshot_qmp_refused(vm, "save", 64, "no slot 64");
    snapshot_qmp_refused(vm, "restore", 64, "no slot 64");
    snapshot_qmp_refused(vm, "discard", 4294967295u, "no slot 4294967295");
    snapshot_qmp_refused(vm, "restore", 0, "no snapshot in slot 0");
    snapshot_qmp_refused(vm, "discard", 63, "no snapshot in slot 63");
    assert_hmp(vm, "x_snapshot_device_save 64", "no slot 64");
    assert_hmp(vm, "x_snapshot_device_save -1", "32-bit");
    assert_hmp(vm, "x_snapshot_device_restore", "no snapshot in slot 0");
    assert_hmp(vm, "x_snapshot_device_discard 3", "no snapshot in slot 3");
    assert_hmp(vm, "info snapshot-device", "slots: 64");
    g_assert_cmphex(snapshot_readl(vm, SNAPSHOT_REG_STATUS), ==, 0);

    qtest_writel(vm->qts, 1 * MiB, 1);
    snapshot_qmp(vm, "save", 63);
    g_assert_cmphex(snapshot_readl(vm, SNAPSHOT_REG_STATUS), ==,
                    SNAPSHOT_STATUS_SAVED);
    assert_saved(vm, 1, 63, 0);
    assert_hmp(vm, "x_snapshot_device_save", "");
    assert_saved(vm, 2, 0, 0);

    qtest_qmp_set_event_callback(vm->qts, count_event, &events);
    for (i = 1; i <= 20; i++) {
        qtest_writel(vm->qts, 1 * MiB, 2);
        snapshot_qmp(vm, "restore", 63);
        g_assert_cmpuint(qtest_readl(vm->qts, 1 * MiB), ==, 1);
        g_assert_cmphex(snapshot_readl(vm, SNAPSHOT_REG_STATUS), ==,
                        SNAPSHOT_STATUS_RESTORED);
        assert_saved(vm, 2, 63, i);
    }
    assert_hmp(vm, "x_snapshot_device_restore", "");
    assert_hmp(vm, "info snapshot-device", "slot 63: RAM");
    assert_hmp(vm, "info snapshot-device", "restores: 21,");
    g_assert_cmpuint(events, ==, 0);

    info = snapshot_query(vm);
    g_assert_cmpuint(qdict_get_int(info, "restores"), ==, 21);
    g_assert_cmpint(qdict_get_int(info, "last-pages"), ==,
                    snapshot_readq(vm, SNAPSHOT_REG_PAGES));
    g_assert_cmpuint(qdict_get_int(info, "last-ns"), ==,
                     snapshot_readq(vm, SNAPSHOT_REG_NANOSECONDS));
    g_assert_cmpuint(qdict_get_int(info, "p50-ns"), >, 1000);
    g_assert_cmpuint(qdict_get_int(info, "p50-ns"), <=,
                     qdict_get_int(info, "p99-ns"));
    qobject_unref(info);

    snapshot_qmp(vm, "discard", 63);
    g_assert_cmphex(snapshot_readl(vm, SNAPSHOT_REG_STATUS), ==,
                    SNAPSHOT_STATUS_DISCARDED);
    assert_saved(vm, 1, 0, 1);
    assert_hmp(vm, "x_snapshot_device_discard", "");
    snapshot_qmp_refused(vm, "restore", 63, "no snapshot in slot 63");
    assert_saved(vm, 0, 0, 0);
    snapshot_vm_end(vm);
}

/*
 * Catches: a stopped machine that a command lets run, or a running one that it
 * stops; state that a save in one and a restore in the other mixes up.
 */
static void test_stop(const void *machine)
{
    SnapshotVM *vm = snapshot_vm_start("", "-M %s -S", (const char *)machine);
    QTestState *qts = vm->qts;
    unsigned events = 0;

    qtest_qmp_set_event_callback(qts, count_event, &events);
    snapshot_assert_state(vm, "prelaunch");
    snapshot_round_trip(vm, 1 * MiB, 1 * MiB);
    snapshot_qmp(vm, "restore", 0);
    snapshot_assert_state(vm, "prelaunch");
    g_assert_cmpuint(events, ==, 0);

    qtest_qmp_assert_success(qts, "{ 'execute': 'cont' }");
    qtest_qmp_eventwait(qts, "RESUME");
    snapshot_assert_state(vm, "running");
    events = 0;
    snapshot_restore(vm, 0);
    snapshot_assert_state(vm, "running");
    snapshot_save(vm, 1);
    g_assert_cmpuint(events, ==, 0);

    qtest_qmp_assert_success(qts, "{ 'execute': 'stop' }");
    qtest_qmp_eventwait(qts, "STOP");
    snapshot_assert_state(vm, "paused");
    events = 0;
    snapshot_restore(vm, 1);
    snapshot_assert_state(vm, "paused");
    snapshot_round_trip(vm, 1 * MiB, 1 * MiB);
    g_assert_cmphex(snapshot_command(vm, SNAPSHOT_CMD_RESTORE, 5), ==,
                    STATUS_ERROR(EMPTY));
    snapshot_qmp(vm, "save", 1);
    snapshot_qmp(vm, "restore", 1);
    snapshot_qmp(vm, "discard", 0);
    snapshot_assert_state(vm, "paused");
    g_assert_cmpuint(events, ==, 0);

    qtest_qmp_assert_success(qts, "{ 'execute': 'cont' }");
    qtest_qmp_eventwait(qts, "RESUME");
    snapshot_restore(vm, 1);
    snapshot_assert_state(vm, "running");
    snapshot_vm_end(vm);
}

/*
 * Catches: registers that a reset leaves, slots that it empties, a snapshot
 * that does not restore across it, registers that a restore puts back.
 */
static void test_reset(const void *machine)
{
    SnapshotVM *vm = snapshot_vm_start("", "-M %s", (const char *)machine);
    QPCIBar bar = vm->bar;
    int i;

    snapshot_fill(vm, 1 * MiB, 1 * MiB, 1);
    snapshot_save(vm, 3);
    for (i = 1; i <= 3; i++) {
        snapshot_fill(vm, 1 * MiB, 1 * MiB, 2);
        snapshot_writeq(vm, SNAPSHOT_REG_ARGUMENT, 0x1122334455667788);
        qtest_system_reset(vm->qts);

        /* Firmware maps it anew, and elsewhere. */
        snapshot_map_bar(vm);
        g_assert_cmphex(vm->bar.addr, !=, bar.addr);
        g_assert_cmphex(snapshot_readl(vm, SNAPSHOT_REG_STATUS), ==, 0);
        g_assert_cmphex(snapshot_readl(vm, SNAPSHOT_REG_SLOT), ==, 0);
        g_assert_cmphex(snapshot_readq(vm, SNAPSHOT_REG_ARGUMENT), ==, 0);
        snapshot_writel(vm, SNAPSHOT_REG_SLOT, 3);
        g_assert_cmpuint(snapshot_readq(vm, SNAPSHOT_REG_RESTORES), ==, i - 1);
        snapshot_writeq(vm, SNAPSHOT_REG_ARGUMENT, 42);

        if (i & 1) {
            snapshot_writel(vm, SNAPSHOT_REG_COMMAND, SNAPSHOT_CMD_RESTORE);
            qobject_unref(snapshot_query(vm));  /* time for it to run */
        } else {
            snapshot_qmp(vm, "restore", 3);
        }

        g_assert_cmphex(snapshot_readl(vm, SNAPSHOT_REG_SLOTS), ==, 0);
        vm->bar = bar;
        g_assert_cmphex(snapshot_readl(vm, SNAPSHOT_REG_STATUS), ==,
                        SNAPSHOT_STATUS_RESTORED);
        g_assert_cmphex(snapshot_readl(vm, SNAPSHOT_REG_SLOT), ==, 3);
        g_assert_cmphex(snapshot_readq(vm, SNAPSHOT_REG_ARGUMENT), ==, 42);
        g_assert_cmpuint(snapshot_readq(vm, SNAPSHOT_REG_RESTORES), ==, i);
        snapshot_check(vm, 1 * MiB, 1 * MiB, 1);
    }
    snapshot_vm_end(vm);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    if (!qtest_has_device("snapshot")) {
        g_test_skip("there is no snapshot device");
        return g_test_run();
    }

    snapshot_add_tests("identity", test_identity);
    snapshot_add_tests("registers", test_registers);
    snapshot_add_tests("commands", test_commands);
    snapshot_add_tests("monitor", test_monitor);
    snapshot_add_tests("stop", test_stop);
    snapshot_add_tests("reset", test_reset);
    return g_test_run();
}
