/*
 * Tests of the snapshot device: devices that come and go, or are asked to
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <glib/gstdio.h>
#include "qemu/units.h"
#include "libqos/libqos.h"
#include "qobject/qdict.h"
#include "qobject/qjson.h"
#include "qobject/qlist.h"
#include "snapshot-utils.h"

#define STATUS_CHANGED (SNAPSHOT_STATUS_ERROR | SNAPSHOT_E_CHANGED)

/* Refused, to guest and host, with the name of what came or went. */
static void assert_changed(SnapshotVM *vm, unsigned slot, const char *text)
{
    g_assert_cmphex(snapshot_command(vm, SNAPSHOT_CMD_RESTORE, slot), ==,
                    STATUS_CHANGED);
    snapshot_qmp_refused(vm, "restore", slot, text);
    snapshot_assert_state(vm, "running");
}

static bool is_plugged(SnapshotVM *vm, const char *id)
{
    g_autofree char *path = g_strdup_printf("/machine/peripheral/%s", id);
    QDict *response = qtest_qmp(
        vm->qts, "{ 'execute': 'qom-get', 'arguments': {"
        " 'path': %s, 'property': 'realized' } }", path);
    bool plugged = qdict_haskey(response, "return") &&
                   qdict_get_bool(response, "return");

    qobject_unref(response);
    return plugged;
}

static void wait_deleted(SnapshotVM *vm, const char *id)
{
    for (;;) {
        QDict *event = qtest_qmp_eventwait_ref(vm->qts, "DEVICE_DELETED");
        const char *device =
            qdict_get_try_str(qdict_get_qdict(event, "data"), "device");
        bool found = !g_strcmp0(device, id);

        qobject_unref(event);
        if (found) {
            return;
        }
    }
}

/* Stopped, as clocks go on. */
static void restore_exactly(SnapshotVM *vm, unsigned slot)
{
    QDict *found;
    GString *text;

    qtest_qmp_assert_success(vm->qts, "{ 'execute': 'stop' }");
    snapshot_qmp(vm, "restore", slot);
    found = qtest_qmp_assert_success_ref(
        vm->qts, "{ 'execute': 'x-snapshot-device-verify',"
        " 'arguments': { 'slot': %u } }", slot);
    qtest_qmp_assert_success(vm->qts, "{ 'execute': 'cont' }");
    text = qobject_to_json_pretty(QOBJECT(found), false);
    g_test_message("%s", text->str);
    g_string_free(text, true);
    g_assert_cmpint(qdict_get_int(found, "pages"), ==, 0);
    g_assert_cmpint(qdict_get_int(found, "fields"), ==, 0);
    qobject_unref(found);
}

typedef struct RequestCase {
    const char *machine;
    const char *args;
    const char *id;             /* of the device to be unplugged */
    bool acpi;                  /* a PCI device that ACPI ejects */
} RequestCase;

/* What the guest's ACPI code does: eject what it is asked to. */
static bool acpi_answer(SnapshotVM *vm, const char *machine)
{
    const uint16_t base = strcmp(machine, "q35") ? 0xae00 : 0xcc0;
    bool asked = false;
    unsigned bus;

    for (bus = 0; bus < 8; bus++) {
        uint32_t down;

        qtest_outl(vm->qts, base + 0x10, bus);
        down = qtest_inl(vm->qts, base + 0x04);
        if (down) {
            qtest_outl(vm->qts, base + 0x08, down);
            asked = true;
        }
    }
    return asked;
}

#define DIMM "-m 64,slots=2,maxmem=1G -object memory-backend-ram,id=m,size=64M"\
    " -device pc-dimm,memdev=m,id=e"
#define CPU "-smp 1,sockets=2,maxcpus=2" \
    " -device qemu64-x86_64-cpu,id=e,socket-id=1,core-id=0,thread-id=0"
#define NO_ACPI_PC "-global PIIX4_PM.acpi-pci-hotplug-with-bridge-support=off "
#define NO_ACPI_Q35 \
    "-global ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off "

static const RequestCase request_cases[] = {
    { "pc", "-device e1000,id=e", "e", true },
    { "pc", "-device virtio-net-pci,id=e", "e", true },
    { "pc", "-device pci-bridge,id=b,chassis_nr=1,addr=10"
            " -device e1000,bus=b,addr=2,id=e", "e", true },
    { "pc", "-device pci-bridge,id=b,chassis_nr=1,addr=10"
            " -device pci-bridge,id=c,bus=b,chassis_nr=2,addr=3"
            " -device rtl8139,bus=c,addr=2,id=e", "e", true },
    { "pc", NO_ACPI_PC "-device pci-bridge,id=b,chassis_nr=1,addr=10,shpc=on"
            " -device e1000,bus=b,addr=2,id=e", "e", false },
    { "pc", DIMM, "e", false },
    { "pc", CPU, "e", false },
    { "q35", "-device pcie-root-port,id=p -device e1000e,bus=p,id=e",
      "e", true },
    { "q35", "-device pcie-root-port,id=p"
             " -device x3130-upstream,id=u,bus=p"
             " -device xio3130-downstream,id=d,bus=u,chassis=5,slot=1"
             " -device e1000e,bus=d,id=e", "e", true },
    { "q35", "-device pcie-root-port,id=p -device pcie-pci-bridge,id=b,bus=p"
             " -device e1000,bus=b,addr=2,id=e", "e", true },
    { "q35", NO_ACPI_Q35
             "-device pcie-root-port,id=p -device e1000e,bus=p,id=e",
      "e", false },
    { "q35", NO_ACPI_Q35 "-device pcie-root-port,id=p"
             " -device virtio-net-pci,bus=p,id=e", "e", false },
    { "q35", NO_ACPI_Q35
             "-device pcie-root-port,id=p -device pcie-pci-bridge,id=b,bus=p"
             " -device e1000,bus=b,addr=2,id=e", "e", false },
    { "q35", DIMM, "e", false },
    { "q35", CPU, "e", false },
};

/* Asked for, not answered: what is asked goes back with the machine. */
static void test_request(const RequestCase *c, bool reset)
{
    SnapshotVM *vm = snapshot_vm_start("", "-M %s -nodefaults -rtc clock=vm %s",
                                       c->machine, c->args);
    int i;

    g_test_message("%s", c->args);
    /* Firmware chooses the way CPUs are unplugged by this. */
    qtest_outl(vm->qts, strcmp(c->machine, "q35") ? 0xaf00 : 0xcd8, 0);
    snapshot_fill(vm, 1 * MiB, 4 * MiB, 1);
    snapshot_save(vm, 0);
    for (i = 0; i < 3; i++) {
        snapshot_fill(vm, 1 * MiB, 4 * MiB, 2);
        qtest_qmp_device_del_send(vm->qts, c->id);
        snapshot_restore(vm, 0);
        snapshot_check(vm, 1 * MiB, 4 * MiB, 1);
        snapshot_assert_state(vm, "running");
        restore_exactly(vm, 0);
        g_assert_true(is_plugged(vm, c->id));
    }
    g_assert_null(qtest_qmp_event_ref(vm->qts, "DEVICE_DELETED"));

    /* The request is part of this one. */
    qtest_qmp_device_del_send(vm->qts, c->id);
    snapshot_save(vm, 1);
    for (i = 0; i < 3; i++) {
        restore_exactly(vm, i % 2);
        g_assert_true(is_plugged(vm, c->id));
        snapshot_restore(vm, 1);
    }
    qtest_qmp_device_del_send(vm->qts, c->id);
    g_assert_null(qtest_qmp_event_ref(vm->qts, "DEVICE_DELETED"));

    if (c->acpi) {
        snapshot_restore(vm, 0);
        g_assert_false(acpi_answer(vm, c->machine));
        snapshot_restore(vm, 1);
        if (reset) {
            qtest_system_reset_nowait(vm->qts);
        } else {
            g_assert_true(acpi_answer(vm, c->machine));
        }
        wait_deleted(vm, c->id);
        g_assert_false(is_plugged(vm, c->id));
        if (reset) {
            snapshot_map_bar(vm);
        }
        assert_changed(vm, 0, "'e' (");
        assert_changed(vm, 1, "was unplugged");
    }
    snapshot_vm_end(vm);
}

/*
 * Catches: a restore whose reset ejects a device that the user wants to have
 * ejected, so that the machine is lost; a request that cannot be repeated
 * after a restore; a device gone without its event, or an event without that.
 */
static void test_requests(const void *machine)
{
    unsigned i;

    for (i = 0; i < ARRAY_SIZE(request_cases); i++) {
        if (!strcmp(request_cases[i].machine, machine)) {
            test_request(&request_cases[i], i % 2);
        }
    }
}

/* Catches: the same by loadvm. */
static void test_loadvm(const void *machine)
{
    g_autofree char *path = snapshot_state_file();
    const bool q35 = !strcmp(machine, "q35");
    SnapshotVM *vm;
    int i;

    if (!path) {
        return;
    }
    vm = snapshot_vm_start("", "-M %s -nodefaults"
                           " -drive if=none,id=d,file=%s,format=qcow2"
                           " -device virtio-blk-pci,drive=d %s",
                           (const char *)machine, path, q35 ?
                           "-device pcie-root-port,id=p"
                           " -device e1000e,bus=p,id=e" :
                           "-device e1000,id=e");
    snapshot_fill(vm, 1 * MiB, 4 * MiB, 1);
    g_free(qtest_hmp(vm->qts, "savevm x"));
    for (i = 0; i < 2; i++) {
        g_autofree char *out = NULL;

        snapshot_fill(vm, 1 * MiB, 4 * MiB, 2);
        qtest_qmp_device_del_send(vm->qts, "e");
        out = qtest_hmp(vm->qts, "loadvm x");
        g_assert_cmpstr(out, ==, "");
        snapshot_check(vm, 1 * MiB, 4 * MiB, 1);
        g_assert_true(is_plugged(vm, "e"));
    }
    snapshot_vm_end(vm);
    g_unlink(path);
}

typedef struct NoSection {
    const char *driver;         /* a device that has no section */
    const char *args;
    const char *bus;
} NoSection;

static const NoSection no_sections[] = {
    { "virtserialport", "-device virtio-serial-pci,id=s",
      "s.0" },
    { "virtconsole", "-device virtio-serial-pci,id=s",
      "s.0" },
};

static void plug(SnapshotVM *vm, const NoSection *d, const char *id)
{
    qtest_qmp_device_add(vm->qts, d->driver, id, "{ 'bus': %s }", d->bus);
}

static void unplug(SnapshotVM *vm, const char *id)
{
    qtest_qmp_device_del_send(vm->qts, id);
    wait_deleted(vm, id);
}

/* With the BAR where it was. */
static void restore_with_bar(SnapshotVM *vm, unsigned slot, QPCIBar bar)
{
    snapshot_qmp(vm, "restore", slot);
    vm->bar = bar;
}

/*
 * Catches: a device without a section of its own that comes or goes unseen: a
 * machine lost half way through a restore, memory of a device that is no more
 * read or written; a device that came and went, of which nothing remains, but
 * which forbids a restore; a message that does not say which device, and
 * whether it came or went.
 */
static void test_no_section(const void *machine)
{
    unsigned i;

    for (i = 0; i < ARRAY_SIZE(no_sections); i++) {
        const NoSection *d = &no_sections[i];
        SnapshotVM *vm;
        QPCIBar bar;
        int n;

        g_test_message("%s", d->driver);
        vm = snapshot_vm_start("", "-M %s -nodefaults %s",
                               (const char *)machine, d->args);
        snapshot_fill(vm, 1 * MiB, 4 * MiB, 1);
        snapshot_save(vm, 0);
        bar = vm->bar;
        for (n = 0; n < 3; n++) {
            plug(vm, d, "new");
            snapshot_fill(vm, 1 * MiB, 4 * MiB, 2);
            assert_changed(vm, 0, "'new'");
            assert_changed(vm, 0, "was plugged");
            snapshot_check(vm, 1 * MiB, 4 * MiB, 2);

            snapshot_save(vm, 1);
            snapshot_fill(vm, 1 * MiB, 4 * MiB, 3);
            snapshot_restore(vm, 1);
            snapshot_check(vm, 1 * MiB, 4 * MiB, 2);

            unplug(vm, "new");
            assert_changed(vm, 1, "'new'");
            assert_changed(vm, 1, "was unplugged");
            snapshot_fill(vm, 1 * MiB, 4 * MiB, 4);
            restore_with_bar(vm, 0, bar);
            snapshot_check(vm, 1 * MiB, 4 * MiB, 1);

            /* Another one of the same name is another one. */
            plug(vm, d, "new");
            assert_changed(vm, 1, "plugged");
            unplug(vm, "new");
            restore_with_bar(vm, 0, bar);
        }
        snapshot_vm_end(vm);
    }
}

/*
 * Catches: something that went, reported as something else that came: what is
 * left stands in its place in the lists that are compared.  And memory that
 * nothing uses, taken for a part of the machine.
 */
static void test_message(const void *machine)
{
    static const char *const memory[] = { "big", "small" };
    SnapshotVM *vm = snapshot_vm_start("", "-M %s -nodefaults"
                                       " -device qemu-xhci"
                                       " -device usb-tablet,id=t"
                                       " -device usb-mouse,id=m"
                                       " -netdev user,id=n0",
                                       (const char *)machine);
    int i;

    snapshot_save(vm, 0);
    for (i = 0; i < 2; i++) {
        qtest_qmp_assert_success(
            vm->qts, "{ 'execute': 'object-add', 'arguments': {"
            " 'qom-type': 'memory-backend-ram', 'id': %s, 'size': %u } }",
            memory[i], (unsigned)(i ? 8 * KiB : 96 * MiB));
    }
    /* Memory that nothing uses is no part of the machine. */
    snapshot_restore(vm, 0);
    for (i = 0; i < 2; i++) {
        qtest_qmp_assert_success(
            vm->qts, "{ 'execute': 'object-del', 'arguments': { 'id': %s } }",
            memory[i]);
        snapshot_restore(vm, 0);
    }
    snapshot_save(vm, 0);
    qtest_qmp_device_del(vm->qts, "t");
    assert_changed(vm, 0, "Device 't' (usb-tablet) was unplugged");
    snapshot_save(vm, 0);
    qtest_qmp_device_add(vm->qts, "usb-kbd", "k", "{}");
    assert_changed(vm, 0, "Device 'k' (usb-kbd) was plugged");
    qtest_qmp_device_del(vm->qts, "k");
    snapshot_restore(vm, 0);

    qtest_qmp_assert_success(
        vm->qts, "{ 'execute': 'netdev_add', 'arguments': {"
        " 'type': 'user', 'id': 'n1' } }");
    assert_changed(vm, 0, "'slirp' was plugged");
    snapshot_save(vm, 1);
    qtest_qmp_assert_success(
        vm->qts, "{ 'execute': 'netdev_del', 'arguments': { 'id': 'n0' } }");
    assert_changed(vm, 0, "'slirp' was unplugged");
    assert_changed(vm, 1, "'slirp' was unplugged");
    snapshot_vm_end(vm);
}

/*
 * Catches: a device that a reset of the machine still reaches after it was
 * unplugged: what is in its memory by now is written to; one that the reset
 * itself ejects, and that cannot go in the middle of it.
 */
static void test_reset_unplugged(const void *machine)
{
    static const char *const nics[] = {
        "e1000", "i82557a", "ne2k_pci", "pcnet", "rtl8139", "tulip",
        "virtio-net-pci", "vmxnet3",
    };
    SnapshotVM *vm;
    unsigned i, n;

    /* What is freed is overwritten, so that QEMU ends if it goes by it. */
    g_setenv("MALLOC_PERTURB_", "85", true);
    vm = snapshot_vm_start("", "-M %s -nodefaults %s", (const char *)machine,
                           strcmp(machine, "q35") ? "-device pci-bridge,id=b,"
                           "chassis_nr=1,addr=10" :
                           "-device pcie-root-port,id=p "
                           "-device pcie-pci-bridge,id=b,bus=p");
    for (i = 0; i < ARRAY_SIZE(nics); i++) {
        g_test_message("%s", nics[i]);
        for (n = 0; n < 2; n++) {
            qtest_qmp_device_add(vm->qts, nics[i], "e",
                                 "{ 'bus': 'b', 'addr': '2' }");
            qtest_qmp_device_del_send(vm->qts, "e");
            if (n) {
                g_assert_true(acpi_answer(vm, machine));
            } else {
                qtest_system_reset_nowait(vm->qts);
            }
            wait_deleted(vm, "e");
        }
        /* It is freed by another thread, after a while. */
        for (n = 0; n < 10; n++) {
            g_usleep(10 * 1000);
            qtest_system_reset(vm->qts);
        }
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

    snapshot_add_tests("requests", test_requests);
    snapshot_add_tests("loadvm", test_loadvm);
    snapshot_add_tests("no-section", test_no_section);
    snapshot_add_tests("message", test_message);
    snapshot_add_tests("reset-unplugged", test_reset_unplugged);
    return g_test_run();
}
