/*
 * Test of the snapshot device: what a restore resets
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/units.h"
#include "libqtest.h"
#include "hw/pci/pci_regs.h"
#include "qobject/qdict.h"
#include "snapshot-utils.h"

#define RESTORES        5

/* e1000's registers */
#define RDTR            0x2820
#define TDBAL           0x3800

static void assert_resets(SnapshotVM *vm, unsigned devices, unsigned machine)
{
    QDict *info = snapshot_query(vm);

    if (qdict_haskey(info, "reset-reason")) {
        g_test_message("%s", qdict_get_str(info, "reset-reason"));
    }
    g_assert_cmpuint(qdict_get_int(info, "device-resets"), ==, devices);
    g_assert_cmpuint(qdict_get_int(info, "machine-resets"), ==, machine);
    g_assert_cmpuint(qdict_get_int(info, "mismatched"), ==, 0);
    qobject_unref(info);
}

static void assert_reason(SnapshotVM *vm, const char *section,
                          const char *field)
{
    QDict *info = snapshot_query(vm);
    const char *reason = qdict_get_str(info, "reset-reason");

    g_assert_nonnull(strstr(reason, section));
    g_assert_true(g_str_has_suffix(reason, field));
    qobject_unref(info);
}

/* A machine with a device, its first BAR mapped */
static SnapshotVM *start(const char *machine, const char *device,
                         QPCIDevice **dev, QPCIBar *bar)
{
    SnapshotVM *vm = snapshot_vm_start(",verify=on", "-M %s -nodefaults"
                                       " -rtc clock=vm -device %s,addr=8",
                                       machine, device);

    *dev = qpci_device_find(vm->pci, QPCI_DEVFN(8, 0));
    qpci_device_enable(*dev);
    *bar = qpci_iomap(*dev, 0, NULL);
    return vm;
}

/* The device 1 on bus 1, through the ports that firmware uses */
static void select_behind(SnapshotVM *vm, unsigned offset)
{
    qtest_outl(vm->qts, 0xcf8, 0x80010800 + offset);
}

/* A machine with a device behind a bridge, its interrupt line selected */
static SnapshotVM *start_behind(const char *machine, const char *device,
                                QPCIDevice **bridge)
{
    SnapshotVM *vm = snapshot_vm_start(",verify=on", "-M %s -nodefaults"
                                       " -rtc clock=vm -device"
                                       " pci-bridge,id=b,chassis_nr=1,addr=7"
                                       " -device %s,bus=b,addr=1",
                                       machine, device);

    *bridge = qpci_device_find(vm->pci, QPCI_DEVFN(7, 0));
    qpci_config_writeb(*bridge, PCI_SECONDARY_BUS, 1);
    qpci_config_writeb(*bridge, PCI_SUBORDINATE_BUS, 1);
    select_behind(vm, PCI_INTERRUPT_LINE);
    return vm;
}

/*
 * Catches: a device that every machine has and that makes each restore slow,
 * whatever the guest does.
 */
static void test_default(const void *machine)
{
    SnapshotVM *vm = snapshot_vm_start(",verify=on", "-M %s -rtc clock=vm",
                                       (const char *)machine);
    unsigned i;

    snapshot_save(vm, 0);
    for (i = 0; i < RESTORES; i++) {
        qtest_writel(vm->qts, 0x100000, i);
        snapshot_restore(vm, 0);
        g_assert_cmphex(qtest_readl(vm->qts, 0x100000), ==, 0);
    }
    assert_resets(vm, 0, 0);
    snapshot_vm_end(vm);
}

/*
 * Catches: a device that is not as it was saved and is left so; one that makes
 * the whole machine be reset; one that is reset for ever after; a wrong reason.
 */
static void test_changed(const void *machine)
{
    QPCIDevice *dev;
    QPCIBar bar;
    SnapshotVM *vm = start(machine, "e1000", &dev, &bar);
    unsigned i;

    qpci_io_writel(dev, bar, RDTR, 0x1234);
    snapshot_save(vm, 0);
    for (i = 0; i < RESTORES; i++) {
        qpci_io_writel(dev, bar, RDTR, i);
        qpci_io_writel(dev, bar, TDBAL, i << 4);
        snapshot_restore(vm, 0);
        g_assert_cmphex(qpci_io_readl(dev, bar, RDTR), ==, 0x1234);
        g_assert_cmphex(qpci_io_readl(dev, bar, TDBAL), ==, 0);
        assert_resets(vm, i + 1, 0);
    }
    assert_reason(vm, "e1000", ": e1000/mit_state.mac_reg[RDTR]");

    for (i = 0; i < RESTORES; i++) {
        snapshot_restore(vm, 0);
    }
    assert_resets(vm, RESTORES, 0);
    g_free(dev);
    snapshot_vm_end(vm);
}

#ifdef CONFIG_TRACE_LOG
/*
 * Catches: a device's reset that has address spaces rendered anew, for which a
 * restore takes five times as long, though what is mapped stays.
 */
static void test_mapped(const void *machine)
{
    g_autofree char *log = NULL;
    g_autofree char *args = snapshot_trace(machine, "flatview_new", &log);
    QPCIDevice *dev;
    QPCIBar bar;
    SnapshotVM *vm = start(args, "rtl8139", &dev, &bar);
    unsigned rendered;

    snapshot_save(vm, 0);
    rendered = snapshot_count(log, "flatview_new");
    for (unsigned i = 0; i < RESTORES; i++) {
        qpci_io_writel(dev, bar, 0, i);
        snapshot_restore(vm, 0);
    }
    assert_resets(vm, RESTORES, 0);
    g_assert_cmpuint(snapshot_count(log, "flatview_new"), ==, rendered);
    qpci_config_writew(dev, PCI_COMMAND, 0);
    rendered = snapshot_count(log, "flatview_new");
    snapshot_restore(vm, 0);
    g_assert_cmpuint(snapshot_count(log, "flatview_new"), >, rendered);
    g_free(dev);
    snapshot_vm_end(vm);
    unlink(log);
}
#endif

/*
 * Catches: a device that is reset, and what it has mapped is not where it was
 * at the save: moved, unmapped or mapped in the run.
 */
static void test_remapped(const void *machine)
{
    const unsigned away = 16 * MiB;
    QPCIDevice *dev;
    QPCIBar bar;
    SnapshotVM *vm = start(machine, "e1000", &dev, &bar);

    qpci_io_writel(dev, bar, RDTR, 0x1234);
    snapshot_save(vm, 0);
    for (unsigned i = 1; i <= RESTORES; i++) {
        qpci_io_writel(dev, bar, RDTR, i);
        qpci_config_writel(dev, PCI_BASE_ADDRESS_0, bar.addr + away);
        g_assert_cmphex(qtest_readl(vm->qts, bar.addr + away + RDTR), ==, i);
        snapshot_restore(vm, 0);
        assert_resets(vm, 2 * i - 1, 0);
        g_assert_cmphex(qtest_readl(vm->qts, bar.addr + RDTR), ==, 0x1234);
        g_assert_cmphex(qtest_readl(vm->qts, bar.addr + away + RDTR), ==, 0);

        qpci_io_writel(dev, bar, RDTR, i);
        qpci_config_writew(dev, PCI_COMMAND, 0);
        g_assert_cmphex(qtest_readl(vm->qts, bar.addr + RDTR), ==, 0);
        snapshot_restore(vm, 0);
        assert_resets(vm, 2 * i, 0);
        g_assert_cmphex(qtest_readl(vm->qts, bar.addr + RDTR), ==, 0x1234);
    }

    qpci_config_writew(dev, PCI_COMMAND, 0);
    snapshot_save(vm, 0);
    qpci_config_writew(dev, PCI_COMMAND, PCI_COMMAND_MEMORY);
    qpci_io_writel(dev, bar, RDTR, 1);
    snapshot_restore(vm, 0);
    assert_resets(vm, 2 * RESTORES + 1, 0);
    g_assert_cmphex(qtest_readl(vm->qts, bar.addr + RDTR), ==, 0);
    g_free(dev);
    snapshot_vm_end(vm);
}

/*
 * Catches: a device of which nothing is known and that is not reset though the
 * guest accessed it, or is if it did not; one that does not keep, over its
 * reset, what its bus knows of it.
 */
static void test_unknown(const void *machine)
{
    QPCIDevice *dev;
    QPCIBar bar;
    SnapshotVM *vm = start(machine, "rtl8139", &dev, &bar);
    unsigned i;

    /* The first byte of its address, when that is unlocked */
    qpci_io_writeb(dev, bar, 0x50, 0xc0);
    qpci_io_writel(dev, bar, 0, 0x12345678);
    snapshot_save(vm, 0);
    for (i = 0; i < RESTORES; i++) {
        if (i & 1) {
            qpci_config_writew(dev, PCI_COMMAND, 0);
        } else {
            qpci_io_writel(dev, bar, 0, i);
        }
        snapshot_restore(vm, 0);
        g_assert_cmphex(qpci_io_readl(dev, bar, 0), ==, 0x12345678);
        assert_resets(vm, i + 1, 0);
    }
    assert_reason(vm, "rtl8139", ": was accessed");
    snapshot_restore(vm, 0);
    assert_resets(vm, RESTORES + 1, 0);
    for (i = 0; i < RESTORES; i++) {
        snapshot_restore(vm, 0);
    }
    assert_resets(vm, RESTORES + 1, 0);

    /* To read may change a device as well. */
    qpci_io_readl(dev, bar, 0);
    snapshot_restore(vm, 0);
    assert_resets(vm, RESTORES + 2, 0);
    qpci_config_readw(dev, PCI_COMMAND);
    snapshot_restore(vm, 0);
    assert_resets(vm, RESTORES + 3, 0);
    g_free(dev);
    snapshot_vm_end(vm);
}

/*
 * Catches: two slots, and a device that is taken to be as one of them has it
 * since it was made what the other has.
 */
static void test_slots(const void *machine)
{
    QPCIDevice *dev;
    QPCIBar bar;
    SnapshotVM *vm = start(machine, "rtl8139", &dev, &bar);
    unsigned i;

    snapshot_save(vm, 0);
    snapshot_save(vm, 1);
    /* Not accessed between the saves */
    for (i = 0; i < RESTORES; i++) {
        snapshot_restore(vm, i & 1);
    }
    assert_resets(vm, 0, 0);
    qpci_io_readl(dev, bar, 0);
    snapshot_save(vm, 1);
    for (i = 0; i < RESTORES; i++) {
        snapshot_restore(vm, i & 1);
        assert_resets(vm, i + 1, 0);
    }
    g_free(dev);
    snapshot_vm_end(vm);
}

/*
 * Catches: a device that is reset by another than the guest's access to it, as
 * by the bridge that it is behind, and is not put back.
 */
static void test_bus_reset(const void *machine)
{
    QPCIDevice *bridge;
    SnapshotVM *vm = start_behind(machine, "rtl8139", &bridge);
    unsigned i;

    for (i = 0; i < RESTORES; i++) {
        qtest_outb(vm->qts, 0xcfc, 0x0a);
        snapshot_save(vm, 0);
        qpci_config_writew(bridge, PCI_BRIDGE_CONTROL,
                           PCI_BRIDGE_CTL_BUS_RESET);
        qpci_config_writew(bridge, PCI_BRIDGE_CONTROL, 0);
        snapshot_restore(vm, 0);
        assert_resets(vm, i + 1, 0);
        assert_reason(vm, "rtl8139", ": was accessed");
        select_behind(vm, PCI_INTERRUPT_LINE);
        g_assert_cmphex(qtest_inb(vm->qts, 0xcfc), ==, 0x0a);
    }
    g_free(bridge);
    snapshot_vm_end(vm);
}

/*
 * Catches: ports of no device, which a guest writes to for the time that it
 * takes, or where nothing is, that count as an access to any device.
 */
static void test_no_device(const void *machine)
{
    SnapshotVM *vm = snapshot_vm_start(",verify=on", "-M %s,usb=on -nodefaults"
                                       " -rtc clock=vm -device qemu-xhci",
                                       (const char *)machine);
    unsigned i;

    snapshot_save(vm, 0);
    for (i = 0; i < RESTORES; i++) {
        qtest_outb(vm->qts, 0x80, i);
        qtest_outb(vm->qts, 0xf0, i);
        qtest_outb(vm->qts, 0x500, i);
        g_assert_cmphex(qtest_inb(vm->qts, 0x500), ==, 0xff);
        g_assert_cmphex(qtest_readl(vm->qts, 0xfd000000), ==, 0);
        snapshot_restore(vm, 0);
    }
    assert_resets(vm, 0, 0);
    snapshot_vm_end(vm);
}

/*
 * Catches: a device that is accessed through another only, a disk of SCSI say,
 * and is taken not to be accessed.
 */
static void test_below(const void *machine)
{
    SnapshotVM *vm = snapshot_vm_start(
        ",verify=on", "-M %s -nodefaults -rtc clock=vm"
        " -device lsi53c895a,addr=8"
        " -blockdev null-co,node-name=d,read-only=on,size=1048576"
        " -device scsi-cd,drive=d", (const char *)machine);
    QPCIDevice *dev = qpci_device_find(vm->pci, QPCI_DEVFN(8, 0));

    snapshot_save(vm, 0);
    snapshot_restore(vm, 0);
    assert_resets(vm, 0, 0);
    qpci_config_readw(dev, PCI_COMMAND);
    snapshot_restore(vm, 0);
    assert_resets(vm, 1, 0);
    assert_reason(vm, "scsi-disk", ": was accessed");
    g_free(dev);
    snapshot_vm_end(vm);
}

/*
 * Catches: a bridge that is reset while what is behind it, and so is reset as
 * well, is not loaded.
 */
static void test_bridge(const void *machine)
{
    QPCIDevice *bridge;
    SnapshotVM *vm = start_behind(machine, "e1000", &bridge);
    unsigned i;

    qtest_outb(vm->qts, 0xcfc, 0x0a);
    snapshot_save(vm, 0);
    for (i = 0; i < RESTORES; i++) {
        qpci_config_writeb(bridge, PCI_SUBORDINATE_BUS, 2 + i);
        snapshot_restore(vm, 0);
        g_assert_cmphex(qpci_config_readb(bridge, PCI_SUBORDINATE_BUS), ==, 1);
        select_behind(vm, PCI_INTERRUPT_LINE);
        g_assert_cmphex(qtest_inb(vm->qts, 0xcfc), ==, 0x0a);
        assert_resets(vm, i + 1, 0);
    }
    assert_reason(vm, "pci_bridge", ": parent_obj.config");
    g_free(bridge);
    snapshot_vm_end(vm);
}

/*
 * Catches: virtio whose set-up changed, so that the machine is reset, or that
 * is put back in part, or slow from then on.
 */
static void test_virtio(const void *machine)
{
    QPCIDevice *dev;
    QPCIBar bar;
    SnapshotVM *vm = start(machine, "virtio-rng-pci", &dev, &bar);
    unsigned i;

    /* Its legacy registers: STATUS is at 18, a queue's page at 8 */
    qpci_io_writeb(dev, bar, 18, 3);
    qpci_io_writel(dev, bar, 8, 0x100);
    qpci_io_writeb(dev, bar, 18, 7);
    snapshot_save(vm, 0);
    for (i = 0; i < RESTORES; i++) {
        qpci_io_writeb(dev, bar, 18, 0);
        g_assert_cmphex(qpci_io_readl(dev, bar, 8), ==, 0);
        snapshot_restore(vm, 0);
        g_assert_cmphex(qpci_io_readb(dev, bar, 18), ==, 7);
        g_assert_cmphex(qpci_io_readl(dev, bar, 8), ==, 0x100);
        assert_resets(vm, i + 1, 0);
        snapshot_restore(vm, 0);
        assert_resets(vm, i + 1, 0);
    }
    g_free(dev);
    snapshot_vm_end(vm);
}

/*
 * Catches: packets that waited to be sent at the save, so that the device is
 * reset by each restore from then on.
 */
static void test_virtio_net(const void *machine)
{
    QPCIDevice *dev;
    QPCIBar bar;
    SnapshotVM *vm = start(machine, "virtio-net-pci", &dev, &bar);
    unsigned i;

    /* As above; a queue is selected at 14, and notified at 16. */
    qpci_io_writeb(dev, bar, 18, 3);
    qpci_io_writew(dev, bar, 14, 1);
    qpci_io_writel(dev, bar, 8, 0x100);
    qpci_io_writeb(dev, bar, 18, 7);
    qtest_qmp_assert_success(vm->qts, "{ 'execute': 'stop' }");
    /* Sent when the machine goes on */
    qpci_io_writew(dev, bar, 16, 1);
    snapshot_qmp(vm, "save", 0);
    qtest_qmp_assert_success(vm->qts, "{ 'execute': 'cont' }");
    for (i = 0; i < RESTORES; i++) {
        snapshot_qmp(vm, "restore", 0);
    }
    assert_resets(vm, 0, 0);
    g_free(dev);
    snapshot_vm_end(vm);
}

/*
 * Catches: queues that are looked at as the machine goes on, taken for accesses
 * of the guest's: the next restore resets the device, and so on for ever.
 */
static void test_virtio_scsi(const void *machine)
{
    QPCIDevice *dev;
    QPCIBar bar;
    SnapshotVM *vm = snapshot_vm_start(
        ",verify=on", "-M %s -nodefaults -rtc clock=vm "
        "-device virtio-scsi-pci,addr=8 -device scsi-cd",
        (const char *)machine);
    unsigned i;

    dev = qpci_device_find(vm->pci, QPCI_DEVFN(8, 0));
    qpci_device_enable(dev);
    bar = qpci_iomap(dev, 0, NULL);
    /* Queues for commands of two kinds, and one for events, with buffers */
    qpci_io_writeb(dev, bar, 18, 3);
    for (i = 0; i < 3; i++) {
        qpci_io_writew(dev, bar, 14, i);
        qpci_io_writel(dev, bar, 8, 0x100 + 0x10 * i);
    }
    qtest_writew(vm->qts, 0x110000 + 16 * 128 + 2, 2);
    qpci_io_writeb(dev, bar, 18, 7);
    snapshot_qmp(vm, "save", 0);
    for (i = 0; i < RESTORES; i++) {
        snapshot_qmp(vm, "restore", 0);
    }
    assert_resets(vm, 0, 0);
    /* Something new in the queue, be it nonsense */
    qtest_writew(vm->qts, 0x110000 + 16 * 128 + 2, 3);
    qpci_io_writew(dev, bar, 16, 1);
    snapshot_qmp(vm, "restore", 0);
    assert_resets(vm, 1, 0);
    g_free(dev);
    snapshot_vm_end(vm);
}

static void one_access(const void *machine, const char *device, uint16_t port)
{
    SnapshotVM *vm = snapshot_vm_start("", "-M %s -nodefaults -rtc clock=vm"
                                       " -audiodev none,id=a"
                                       " -device ipmi-bmc-sim,id=b -device %s",
                                       (const char *)machine, device);

    snapshot_save(vm, 0);
    snapshot_restore(vm, 0);
    assert_resets(vm, 0, 0);
    qtest_inb(vm->qts, port);
    snapshot_restore(vm, 0);
    assert_resets(vm, 1, 0);
    snapshot_restore(vm, 0);
    assert_resets(vm, 1, 0);
    snapshot_vm_end(vm);
}

/*
 * Catches: an access that is not seen since it is to a list of ports, or to
 * memory that does not tell whose it is.
 */
static void test_ports(const void *machine)
{
    one_access(machine, "sb16,audiodev=a", 0x226);
    one_access(machine, "isa-ipmi-kcs,bmc=b", 0xca3);
}

static void add_tests(const char *name, GTestDataFunc test)
{
    /* With remap, each restore resets the machine. */
    snapshot_add_test("pc", "dirty", name, test);
    snapshot_add_test("q35", "dirty", name, test);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);

    add_tests("default", test_default);
    add_tests("changed", test_changed);
#ifdef CONFIG_TRACE_LOG
    add_tests("mapped", test_mapped);
#endif
    add_tests("remapped", test_remapped);
    add_tests("unknown", test_unknown);
    add_tests("slots", test_slots);
    add_tests("bus-reset", test_bus_reset);
    add_tests("no-device", test_no_device);
    add_tests("below", test_below);
    add_tests("ports", test_ports);
    add_tests("bridge", test_bridge);
    add_tests("virtio", test_virtio);
    add_tests("virtio-net", test_virtio_net);
    add_tests("virtio-scsi", test_virtio_scsi);

    return g_test_run();
}
