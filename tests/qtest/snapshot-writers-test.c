/*
 * Tests of the snapshot device: whoever writes to RAM, by whichever way, it
 * goes back
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <sys/syscall.h>
#include "qemu/units.h"
#include "libqos/libqos.h"
#include "libqos/pci.h"
#include "qobject/qdict.h"
#include "qobject/qjson.h"
#include "qobject/qlist.h"
#include "snapshot-utils.h"

/* Nothing differs from what slot @slot holds. */
static void assert_exact(SnapshotVM *vm, unsigned slot)
{
    QDict *found = qtest_qmp_assert_success_ref(
        vm->qts, "{ 'execute': 'x-snapshot-device-verify',"
        " 'arguments': { 'slot': %u } }", slot);
    GString *s = qobject_to_json_pretty(QOBJECT(found), false);

    g_test_message("%s", s->str);
    g_string_free(s, true);
    g_assert_cmpuint(qdict_get_int(found, "pages"), ==, 0);
    g_assert_cmpuint(qdict_get_int(found, "fields"), ==, 0);
    qobject_unref(found);
}

/* The machine does not run: nothing changes but what is changed here. */
static SnapshotVM *start(const char *machine, const char *args)
{
    return snapshot_vm_start(",slots=3", "-M %s -m 32 -serial null"
                             " -rtc clock=vm -S %s", machine, args);
}

/* The function at 08.0, with memory, ports and bus mastering enabled */
static QPCIDevice *device_8(SnapshotVM *vm)
{
    QPCIDevice *dev = qpci_device_find(vm->pci, QPCI_DEVFN(8, 0));

    g_assert_nonnull(dev);
    qpci_device_enable(dev);
    return dev;
}

/* A job of QEMU's own snapshots */
static void run_job(SnapshotVM *vm, const char *command)
{
    const char *status;
    QDict *job;

    qtest_qmp_assert_success(vm->qts, "{ 'execute': %s, 'arguments':"
                             " { 'job-id': 'job', 'tag': 'tag', 'vmstate':"
                             " 'state', 'devices': [ 'state' ] } }", command);
    for (;;) {
        QDict *reply = qtest_qmp(vm->qts, "{ 'execute': 'query-jobs' }");

        job = qobject_to(QDict, qlist_pop(qdict_get_qlist(reply, "return")));
        qobject_unref(reply);
        status = qdict_get_str(job, "status");
        if (!strcmp(status, "concluded")) {
            break;
        }
        qobject_unref(job);
        g_usleep(1000);
    }
    g_assert_false(qdict_haskey(job, "error"));
    qobject_unref(job);
    qtest_qmp_assert_success(vm->qts, "{ 'execute': 'job-dismiss',"
                             " 'arguments': { 'id': 'job' } }");
}

#define STATE_NODE "-blockdev driver=qcow2,node-name=state,file.driver=file," \
                   "file.filename=%s"

/*
 * Catches: a restore, or a save, that does not know that all of RAM was
 * replaced by loadvm, and makes a mixture of two machines.
 */
static void test_loadvm(const void *machine)
{
    g_autofree char *path = snapshot_state_file();
    g_autofree char *args = NULL;
    SnapshotVM *vm;
    int i;

    if (!path) {
        return;
    }
    args = g_strdup_printf(STATE_NODE, path);
    vm = start(machine, args);

    snapshot_fill(vm, 1 * MiB, 31 * MiB, 1);
    run_job(vm, "snapshot-save");
    snapshot_fill(vm, 1 * MiB, 31 * MiB, 2);
    snapshot_qmp(vm, "save", 0);
    for (i = 0; i < 2; i++) {
        run_job(vm, "snapshot-load");
        snapshot_check(vm, 1 * MiB, 31 * MiB, 1);
        snapshot_qmp(vm, "restore", 0);
        snapshot_check(vm, 1 * MiB, 31 * MiB, 2);
        assert_exact(vm, 0);
    }

    /* A save after it: of what was loaded, not of what there was before. */
    snapshot_fill(vm, 1 * MiB, 31 * MiB, 3);
    snapshot_qmp(vm, "save", 1);
    run_job(vm, "snapshot-load");
    snapshot_qmp(vm, "save", 2);
    assert_exact(vm, 2);
    snapshot_qmp(vm, "restore", 1);
    snapshot_check(vm, 1 * MiB, 31 * MiB, 3);
    assert_exact(vm, 1);
    snapshot_qmp(vm, "restore", 2);
    snapshot_check(vm, 1 * MiB, 31 * MiB, 1);
    assert_exact(vm, 2);
    snapshot_qmp(vm, "restore", 0);
    snapshot_check(vm, 1 * MiB, 31 * MiB, 2);
    assert_exact(vm, 0);

    snapshot_vm_end(vm);
    unlink(path);
}

static void allow_postcopy(QTestState *qts)
{
    qtest_qmp_assert_success(
        qts, "{ 'execute': 'migrate-set-capabilities', 'arguments': {"
        " 'capabilities': [ { 'capability': 'postcopy-ram', 'state': true } ] }"
        " }");
}

static void limit_migration(QTestState *qts, int64_t bytes)
{
    qtest_qmp_assert_success(
        qts, "{ 'execute': 'migrate-set-parameters', 'arguments':"
        " { 'max-bandwidth': %" PRId64 ", 'max-postcopy-bandwidth': %" PRId64
        " } }", bytes, bytes);
}

static void wait_for_migration(QTestState *qts, const char *wanted)
{
    bool done = false;

    while (!done) {
        QDict *info = qtest_qmp_assert_success_ref(
            qts, "{ 'execute': 'query-migrate' }");
        const char *status = qdict_haskey(info, "status") ?
            qdict_get_str(info, "status") : "none";

        g_assert_cmpstr(status, !=, "failed");
        done = !strcmp(status, wanted);
        qobject_unref(info);
        g_usleep(10000);
    }
}

/*
 * Catches: a save while RAM still comes in, behind the vCPUs and the log
 * (postcopy).
 */
static void test_postcopy(const void *machine)
{
    g_autofree char *dir = g_dir_make_tmp("snapshot-writers-XXXXXX", NULL);
    g_autofree char *path = g_strdup_printf("%s/socket", dir);
    g_autofree char *uri = g_strdup_printf("unix:%s", path);
    SnapshotVM *from, *to;

    if (syscall(__NR_userfaultfd, O_CLOEXEC) < 0) {
        g_test_skip("no userfaultfd");
        return;
    }
    from = snapshot_vm_start("", "-M %s -m 32", (const char *)machine);
    to = snapshot_vm_start("", "-M %s -m 32 -incoming defer",
                           (const char *)machine);
    snapshot_fill(from, 1 * MiB, 31 * MiB, 1);
    allow_postcopy(from->qts);
    allow_postcopy(to->qts);
    limit_migration(from->qts, 64 * KiB);
    qtest_qmp_assert_success(to->qts, "{ 'execute': 'migrate-incoming',"
                             " 'arguments': { 'uri': %s } }", uri);
    qtest_qmp_assert_success(from->qts, "{ 'execute': 'migrate',"
                             " 'arguments': { 'uri': %s } }", uri);
    wait_for_migration(from->qts, "active");
    qtest_qmp_assert_success(from->qts,
                             "{ 'execute': 'migrate-start-postcopy' }");
    qtest_qmp_eventwait(to->qts, "RESUME");
    snapshot_qmp_refused(to, "save", 0, "migration");

    limit_migration(from->qts, 1 * GiB);
    wait_for_migration(to->qts, "completed");
    snapshot_map_bar(to);
    snapshot_check(to, 1 * MiB, 31 * MiB, 1);
    snapshot_round_trip(to, 1 * MiB, 31 * MiB);
    snapshot_vm_end(from);
    snapshot_vm_end(to);
    unlink(path);
    rmdir(dir);
}

/* A backend that no device uses takes its place among the RAM blocks. */
static void backend(SnapshotVM *vm, const char *command, const char *kind,
                    int i)
{
    g_autofree char *id = g_strdup_printf("%s%d", kind, i);

    if (!strcmp(command, "object-add")) {
        qtest_qmp_assert_success(vm->qts, "{ 'execute': 'object-add',"
                                 " 'arguments': { 'qom-type':"
                                 " 'memory-backend-ram', 'id': %s,"
                                 " 'size': 4096 } }", id);
    } else {
        qtest_qmp_assert_success(vm->qts, "{ 'execute': 'object-del',"
                                 " 'arguments': { 'id': %s } }", id);
    }
}

/*
 * Catches: a log, or a table of pages, that is too short for a RAM block which
 * grows and lies behind all others: pages that do not go back, and memory of
 * QEMU's own that a save overwrites.
 */
static void test_last_block_grows(const void *machine)
{
    enum { GAPS = 5, TABLE = 60000 };
    static const char text[] = "a table";
    g_autofree char *path = snapshot_state_file();
    g_autofree char *table = NULL;
    g_autofree char *args = NULL;
    g_autofree char *big = NULL;
    SnapshotVM *vm, small = { };
    int fd, i;

    if (!path) {
        return;
    }
    fd = g_file_open_tmp("snapshot-writers-XXXXXX", &table, NULL);
    g_assert_cmpint(fd, >=, 0);
    for (i = 0; i < TABLE; i += strlen(text)) {
        g_assert_cmpint(write(fd, text, strlen(text)), ==, strlen(text));
    }
    close(fd);

    /* ACPI's tables make their block grow in this machine. */
    args = g_strdup_printf("-nodefaults " STATE_NODE, path);
    big = g_strdup_printf("%s -acpitable sig=OEM1,data=%s"
                          " -acpitable sig=OEM2,data=%s"
                          " -acpitable sig=OEM3,data=%s", args, table, table,
                          table);
    vm = start(machine, big);
    run_job(vm, "snapshot-save");
    snapshot_vm_end(vm);

    /* Not in this one; all others that are made after RAM lie in gaps. */
    small.qts = qtest_initf("-M %s -m 32 -serial null -rtc clock=vm -S %s"
                            " -device snapshot,ram=dirty,slots=3 --preconfig",
                            (const char *)machine, args);
    for (i = 0; i < GAPS; i++) {
        backend(&small, "object-add", "gap", i);
        backend(&small, "object-add", "wall", i);
    }
    for (i = 0; i < GAPS; i++) {
        backend(&small, "object-del", "gap", i);
    }
    qtest_qmp_assert_success(small.qts, "{ 'execute': 'x-exit-preconfig' }");
    snapshot_qmp(&small, "save", 0);
    run_job(&small, "snapshot-load");
    snapshot_qmp_refused(&small, "restore", 0, "etc/acpi/tables' was resized");
    snapshot_qmp(&small, "save", 1);
    assert_exact(&small, 1);
    for (i = 0; i < 3; i++) {
        run_job(&small, "snapshot-load");
        snapshot_qmp(&small, "restore", 1);
        assert_exact(&small, 1);
    }
    snapshot_qmp(&small, "save", 2);
    snapshot_qmp(&small, "discard", 1);
    snapshot_qmp(&small, "restore", 2);
    assert_exact(&small, 2);
    qtest_quit(small.qts);
    unlink(path);
    unlink(table);
}

/* Where AHCI's parts are in RAM, each in pages of its own */
enum {
    AHCI_LIST = 16 * MiB,
    AHCI_FIS = AHCI_LIST + 4 * KiB,
    AHCI_TABLE = AHCI_FIS + 4 * KiB,
    AHCI_DATA = AHCI_TABLE + 4 * KiB,
};

/* Registers: of the HBA, and of port 0 */
enum {
    AHCI_GHC = 0x04,
    AHCI_PORT = 0x100,
    AHCI_PxCLB = AHCI_PORT,
    AHCI_PxFB = AHCI_PORT + 0x08,
    AHCI_PxCMD = AHCI_PORT + 0x18,
    AHCI_PxCI = AHCI_PORT + 0x38,
};

typedef struct AHCI {
    SnapshotVM *vm;
    QPCIDevice *dev;
    QPCIBar bar;
} AHCI;

static void ahci_write(const AHCI *ahci, unsigned reg, uint32_t val)
{
    qpci_io_writel(ahci->dev, ahci->bar, reg, val);
}

static void ahci_start(const AHCI *ahci)
{
    ahci_write(ahci, AHCI_PxCMD, 0x16);         /* FRE, POD, SUD */
    ahci_write(ahci, AHCI_PxCMD, 0x17);         /* and ST */
}

/* IDENTIFY PACKET DEVICE, which needs no medium */
static void ahci_identify(const AHCI *ahci)
{
    int tries = 10000;

    ahci_write(ahci, AHCI_PxCI, 1);
    while (qpci_io_readl(ahci->dev, ahci->bar, AHCI_PxCI)) {
        g_assert_cmpint(--tries, >, 0);
        g_usleep(1000);
    }
    g_assert_cmphex(qtest_readl(ahci->vm->qts, AHCI_LIST + 4), ==, 512);
    g_assert_cmphex(qtest_readb(ahci->vm->qts, AHCI_FIS + 0x20), ==, 0x5f);
}

static void assert_no_answer(SnapshotVM *vm)
{
    g_assert_cmphex(qtest_readl(vm->qts, AHCI_LIST + 4), ==, 0);
    g_assert_cmphex(qtest_readb(vm->qts, AHCI_FIS + 0x20), ==, 0);
    g_assert_cmphex(qtest_readw(vm->qts, AHCI_DATA), ==, 0);
    assert_exact(vm, 0);
}

/*
 * Catches: RAM that a device maps once, writes to through the mapping, and does
 * not give back (AHCI's command list and received FIS), that does not go back:
 * mapped before the save, and after it.
 */
static void test_mapped(const void *machine)
{
    SnapshotVM *vm = start(machine, "-device ahci,id=hba,addr=8"
                           " -device ide-cd,bus=hba.0");
    AHCI ahci = { .vm = vm, .dev = device_8(vm) };
    bool before;
    int i;

    ahci.bar = qpci_iomap(ahci.dev, 5, NULL);
    ahci_write(&ahci, AHCI_GHC, 1u << 31);
    ahci_write(&ahci, AHCI_PxCLB, AHCI_LIST);
    ahci_write(&ahci, AHCI_PxFB, AHCI_FIS);
    qtest_writel(vm->qts, AHCI_LIST, 1 << 16 | 5);
    qtest_writel(vm->qts, AHCI_LIST + 8, AHCI_TABLE);
    qtest_writel(vm->qts, AHCI_TABLE, 0xa18027);
    qtest_writel(vm->qts, AHCI_TABLE + 0x80, AHCI_DATA);
    qtest_writel(vm->qts, AHCI_TABLE + 0x8c, 511);

    for (before = false;; before = true) {
        snapshot_qmp(vm, "save", 0);
        for (i = 0; i < 3; i++) {
            if (!before) {
                ahci_start(&ahci);
            }
            ahci_identify(&ahci);
            snapshot_qmp(vm, "restore", 0);
            assert_no_answer(vm);
        }
        if (before) {
            break;
        }
        ahci_start(&ahci);
    }
    /* What was mapped at a save, and is written to then, is saved. */
    ahci_identify(&ahci);
    snapshot_qmp(vm, "save", 1);
    assert_exact(vm, 1);
    snapshot_qmp(vm, "restore", 0);
    assert_no_answer(vm);
    snapshot_qmp(vm, "restore", 1);
    g_assert_cmphex(qtest_readb(vm->qts, AHCI_FIS + 0x20), ==, 0x5f);
    assert_exact(vm, 1);

    g_free(ahci.dev);
    snapshot_vm_end(vm);
}

/* Bochs' VBE registers */
static void vbe_write(SnapshotVM *vm, unsigned index, uint16_t val)
{
    qtest_outw(vm->qts, 0x1ce, index);
    qtest_outw(vm->qts, 0x1cf, val);
}

static void vga_write(SnapshotVM *vm, unsigned port, unsigned index,
                      uint8_t val)
{
    qtest_outb(vm->qts, port, index);
    qtest_outb(vm->qts, port + 1, val);
}

/*
 * Catches: video RAM that VGA itself writes to: the screen that is cleared when
 * a mode is set; a plane of a mode with chained planes, masked.
 */
static void test_vga(const void *machine)
{
    SnapshotVM *vm = start(machine, "-vga none -device VGA,addr=8");
    QPCIDevice *vga = device_8(vm);
    QPCIBar bar = qpci_iomap(vga, 0, NULL);
    int i;

    snapshot_fill(vm, bar.addr, 4 * MiB, 1);
    vbe_write(vm, 1, 1024);                     /* x and y resolution */
    vbe_write(vm, 2, 768);
    vbe_write(vm, 3, 32);                       /* bits per pixel */
    snapshot_qmp(vm, "save", 0);
    for (i = 0; i < 3; i++) {
        vbe_write(vm, 4, 1);                    /* enable */
        g_assert_cmphex(qtest_readq(vm->qts, bar.addr), ==, 0);
        snapshot_qmp(vm, "restore", 0);
        snapshot_check(vm, bar.addr, 4 * MiB, 1);
        assert_exact(vm, 0);
    }

    qtest_outb(vm->qts, 0x3c2, 0x01);           /* CRTC at 0x3d4 */
    vga_write(vm, 0x3ce, 6, 0x05);              /* graphics, at 0xa0000 */
    vga_write(vm, 0x3c4, 4, 0x0e);              /* chain 4 */
    vga_write(vm, 0x3c4, 2, 0x01);              /* only plane 0 */
    vga_write(vm, 0x3d4, 0x11, 0);              /* do not protect CR0 to 7 */
    vga_write(vm, 0x3d4, 0x14, 0x40);           /* double words */
    snapshot_qmp(vm, "save", 0);
    for (i = 0; i < 3; i++) {
        qtest_writeb(vm->qts, 0xa8000, 0x5a + i);
        g_assert_cmphex(qtest_readb(vm->qts, bar.addr + 0x8000), ==, 0x5a + i);
        snapshot_qmp(vm, "restore", 0);
        assert_exact(vm, 0);
    }
    g_free(vga);
    snapshot_vm_end(vm);
}

static void vmsvga_write(QPCIDevice *dev, QPCIBar io, unsigned reg,
                         uint32_t val)
{
    qpci_io_writel(dev, io, 0, reg);
    qpci_io_writel(dev, io, 1, val);
}

/* Put a command into the FIFO, whose BAR is mapped at @fifo. */
static void vmsvga_command(SnapshotVM *vm, uint64_t fifo, const uint32_t *cmd,
                           unsigned n)
{
    unsigned i;

    qtest_writel(vm->qts, fifo, 16);                    /* min */
    qtest_writel(vm->qts, fifo + 4, 64 * KiB);          /* max */
    qtest_writel(vm->qts, fifo + 8, 16 + n * 4);        /* next */
    qtest_writel(vm->qts, fifo + 12, 16);               /* stop */
    for (i = 0; i < n; i++) {
        qtest_writel(vm->qts, fifo + 16 + i * 4, cmd[i]);
    }
}

/*
 * Catches: video RAM that a blitter writes to, and the word of the command
 * queue by which VMware's adapter tells what it has read.
 */
static void test_vmware_vga(const void *machine)
{
    static const struct {
        uint32_t cmd[7];
        unsigned len;
        uint64_t changes;       /* an address in video RAM */
    } cases[] = {
        /* colour, x, y, width, height */
        { { 2, 0x112233, 8, 200, 16, 32 }, 6, (220 * 640 + 16) * 4 },
        /* from x, y, to x, y, width, height */
        { { 3, 0, 0, 16, 300, 16, 16 }, 7, (304 * 640 + 20) * 4 },
    };
    SnapshotVM *vm = start(machine, "-vga none -device vmware-svga,addr=8");
    QPCIDevice *dev = device_8(vm);
    QPCIBar io = qpci_iomap(dev, 0, NULL);
    QPCIBar vram = qpci_iomap(dev, 1, NULL);
    QPCIBar fifo = qpci_iomap(dev, 2, NULL);
    unsigned i, j;

    qtest_memset(vm->qts, vram.addr, 0x5a, 64 * 640 * 4);
    vmsvga_write(dev, io, 1, 1);                /* enable */
    vmsvga_write(dev, io, 20, 1);               /* configured */
    for (i = 0; i < ARRAY_SIZE(cases); i++) {
        uint64_t pixel = vram.addr + cases[i].changes;

        vmsvga_command(vm, fifo.addr, cases[i].cmd, cases[i].len);
        snapshot_qmp(vm, "save", 0);
        for (j = 0; j < 3; j++) {
            vmsvga_write(dev, io, 21, 1);       /* synchronise */
            g_assert_cmphex(qtest_readl(vm->qts, pixel), !=, 0);
            g_assert_cmphex(qtest_readl(vm->qts, fifo.addr + 12), !=, 16);
            snapshot_qmp(vm, "restore", 0);
            g_assert_cmphex(qtest_readl(vm->qts, pixel), ==, 0);
            g_assert_cmphex(qtest_readl(vm->qts, fifo.addr + 12), ==, 16);
            assert_exact(vm, 0);
        }
    }
    g_free(dev);
    snapshot_vm_end(vm);
}

/*
 * A device that does not migrate its configuration space: it has no BARs after
 * a reset.
 */
typedef struct Amnesiac {
    QPCIDevice *dev;
    QPCIBar bar[3];
} Amnesiac;

static void amnesiac_restore(SnapshotVM *vm, Amnesiac *a)
{
    unsigned i;

    snapshot_qmp(vm, "restore", 0);
    assert_exact(vm, 0);
    qpci_device_enable(a->dev);
    for (i = 0; i < ARRAY_SIZE(a->bar); i++) {
        if (a->bar[i].addr) {
            a->bar[i] = qpci_iomap(a->dev, i, NULL);
        }
    }
}

/* Catches: the same of ATI's, and a write by its index and data registers. */
static void test_ati_vga(const void *machine)
{
    enum {
        MM_INDEX = 0x0, MM_DATA = 0x4,
        DST_OFFSET = 0x1404, DST_PITCH = 0x1408, DP_GUI_MASTER_CNTL = 0x146c,
        DP_BRUSH_FRGD_CLR = 0x147c, SRC_X_Y = 0x1590, DST_X_Y = 0x1594,
        DST_WIDTH_HEIGHT = 0x1598,
        SRC_OFFSET = 0x15ac, SRC_PITCH = 0x15b0, DP_CNTL = 0x16c0,
    };
    static const uint8_t rops[] = { 0xcc, 0xf0 };       /* copy, pattern */
    const uint64_t far = 5 * MiB;
    SnapshotVM *vm = start(machine, "-vga none -device ati-vga,addr=8");
    Amnesiac ati = { .dev = device_8(vm) };
    unsigned i, j;

    ati.bar[0] = qpci_iomap(ati.dev, 0, NULL);
    ati.bar[2] = qpci_iomap(ati.dev, 2, NULL);
    qtest_memset(vm->qts, ati.bar[0].addr, 0x5a, 64 * KiB);
    snapshot_qmp(vm, "save", 0);
    amnesiac_restore(vm, &ati);
    for (i = 0; i < 3; i++) {
        qpci_io_writel(ati.dev, ati.bar[2], MM_INDEX, 1u << 31 | far);
        qpci_io_writel(ati.dev, ati.bar[2], MM_DATA, 0x12345678);
        g_assert_cmphex(qtest_readl(vm->qts, ati.bar[0].addr + far), ==,
                        0x12345678);
        amnesiac_restore(vm, &ati);
        g_assert_cmphex(qtest_readl(vm->qts, ati.bar[0].addr + far), ==, 0);
    }

    for (j = 0; j < ARRAY_SIZE(rops); j++) {
        for (i = 0; i < 3; i++) {
            /* With the pitches and offsets that follow; 32 bits per pixel */
            qpci_io_writel(ati.dev, ati.bar[2], DP_GUI_MASTER_CNTL,
                           rops[j] << 16 | 6 << 8 | 3);
            qpci_io_writel(ati.dev, ati.bar[2], DP_CNTL, 3);
            qpci_io_writel(ati.dev, ati.bar[2], SRC_OFFSET, 0);
            qpci_io_writel(ati.dev, ati.bar[2], SRC_PITCH, 4096);
            qpci_io_writel(ati.dev, ati.bar[2], DST_OFFSET, far);
            qpci_io_writel(ati.dev, ati.bar[2], DST_PITCH, 4096);
            qpci_io_writel(ati.dev, ati.bar[2], DP_BRUSH_FRGD_CLR, 0x11223344);
            qpci_io_writel(ati.dev, ati.bar[2], SRC_X_Y, 0);
            qpci_io_writel(ati.dev, ati.bar[2], DST_X_Y, 0);
            qpci_io_writel(ati.dev, ati.bar[2], DST_WIDTH_HEIGHT,
                           16 << 16 | 16);
            g_assert_cmphex(qtest_readl(vm->qts, ati.bar[0].addr + far), ==,
                            j ? 0x11223344 : 0x5a5a5a5a);
            amnesiac_restore(vm, &ati);
            g_assert_cmphex(qtest_readl(vm->qts, ati.bar[0].addr + far), ==, 0);
        }
    }
    g_free(ati.dev);
    snapshot_vm_end(vm);
}

static void erst_action(SnapshotVM *vm, const Amnesiac *erst, unsigned action,
                        uint64_t value)
{
    qtest_writeq(vm->qts, erst->bar[0].addr + 8, value);
    qtest_writel(vm->qts, erst->bar[0].addr, action);
}

static void erst_execute(SnapshotVM *vm, const Amnesiac *erst,
                         unsigned operation)
{
    erst_action(vm, erst, operation, 0);
    erst_action(vm, erst, 5, 0x9c);
    erst_action(vm, erst, 7, 0);
    g_assert_cmphex(qtest_readq(vm->qts, erst->bar[0].addr + 8), ==, 0);
}

/*
 * Catches: the storage of error records, and the buffer that they are exchanged
 * through, to which the device writes.
 */
static void test_erst(const void *machine)
{
    enum { WRITE, READ, CLEAR, SET_OFFSET = 4, SET_ID = 9 };
    const uint64_t id = 0x1122334455667788;
    SnapshotVM *vm = start(machine, "-object memory-backend-ram,id=m,size=64K"
                           " -device acpi-erst,memdev=m,addr=8");
    Amnesiac erst = { .dev = device_8(vm) };
    uint64_t exchange;
    int i;

    erst.bar[0] = qpci_iomap(erst.dev, 0, NULL);
    erst.bar[1] = qpci_iomap(erst.dev, 1, NULL);
    exchange = erst.bar[1].addr;
    qtest_memset(vm->qts, exchange, 0x11, 8 * KiB);
    qtest_writel(vm->qts, exchange + 20, 6 * KiB);      /* length */
    qtest_writeq(vm->qts, exchange + 96, id);
    erst_action(vm, &erst, SET_OFFSET, 0);
    snapshot_qmp(vm, "save", 0);
    for (i = 0; i < 3; i++) {
        erst_execute(vm, &erst, WRITE);
        amnesiac_restore(vm, &erst);
    }

    erst_execute(vm, &erst, WRITE);
    exchange = erst.bar[1].addr;
    qtest_memset(vm->qts, exchange, 0x22, 8 * KiB);
    erst_action(vm, &erst, SET_ID, id);
    snapshot_qmp(vm, "save", 0);
    for (i = 0; i < 3; i++) {
        exchange = erst.bar[1].addr;
        erst_execute(vm, &erst, READ);
        g_assert_cmphex(qtest_readb(vm->qts, exchange + 5000), ==, 0x11);
        erst_execute(vm, &erst, CLEAR);
        amnesiac_restore(vm, &erst);
    }
    g_free(erst.dev);
    snapshot_vm_end(vm);
}

/*
 * Catches: a checksum that QEMU writes into the packet that a guest sends, in
 * the guest's own RAM.
 */
static void test_checksum(const void *machine)
{
    enum {
        RING = 16 * MiB, PACKET = RING + 4 * KiB, CHECKSUM = PACKET + 40,
        TCTL = 0x400, TDBAL = 0x3800, TDLEN = 0x3808, TDT = 0x3818,
    };
    /* UDP over IP with four bytes of payload */
    static const uint8_t packet[46] = {
        [12] = 0x08, 0x00, 0x45, 0x00, 0x00, 32, [22] = 64, 17,
        [26] = 10, 0, 2, 15, 10, 0, 2, 2, 0x12, 0x34, 0x00, 0x07, 0x00, 12,
        0x5a, 0x5a, 1, 2, 3, 4,
    };
    static const uint32_t ring[] = {
        0, 46 << 16 | 40 << 8 | 34, 0x20000000, 0,      /* where it goes */
        PACKET, 0, 0x2b100000 | sizeof(packet), 0x200,  /* insert UDP's */
    };
    SnapshotVM *vm = start(machine, "-netdev hubport,hubid=0,id=n"
                           " -device e1000e,netdev=n,addr=8");
    QPCIDevice *dev = device_8(vm);
    QPCIBar bar = qpci_iomap(dev, 0, NULL);
    int i;

    qtest_memwrite(vm->qts, PACKET, packet, sizeof(packet));
    qtest_memwrite(vm->qts, RING, ring, sizeof(ring));
    qpci_io_writel(dev, bar, TDBAL, RING);
    qpci_io_writel(dev, bar, TDLEN, 128);
    qpci_io_writel(dev, bar, TCTL, 2);          /* enable */
    snapshot_qmp(vm, "save", 0);
    for (i = 0; i < 3; i++) {
        qpci_io_writel(dev, bar, TDT, 2);
        g_assert_cmphex(qtest_readw(vm->qts, CHECKSUM), !=, 0x5a5a);
        snapshot_qmp(vm, "restore", 0);
        g_assert_cmphex(qtest_readw(vm->qts, CHECKSUM), ==, 0x5a5a);
        assert_exact(vm, 0);
    }
    g_free(dev);
    snapshot_vm_end(vm);
}

/* Catches: an answer that is written into the request, mapped to be read. */
static void test_answer(const void *machine)
{
    enum { FRAME = 16 * MiB, STATUS = FRAME + 2, INBOUND = 0x40 };
    SnapshotVM *vm = start(machine, "-device megasas,addr=8");
    QPCIDevice *dev = device_8(vm);
    QPCIBar bar = qpci_iomap(dev, 0, NULL);
    int i;

    qtest_writel(vm->qts, FRAME, 0x7f);         /* no such command */
    snapshot_qmp(vm, "save", 0);
    for (i = 0; i < 3; i++) {
        qpci_io_writel(dev, bar, INBOUND, FRAME);
        g_assert_cmphex(qtest_readb(vm->qts, STATUS), !=, 0);
        snapshot_qmp(vm, "restore", 0);
        g_assert_cmphex(qtest_readb(vm->qts, STATUS), ==, 0);
        assert_exact(vm, 0);
    }
    g_free(dev);
    snapshot_vm_end(vm);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    snapshot_add_tests("loadvm", test_loadvm);
    snapshot_add_tests("postcopy", test_postcopy);
    snapshot_add_test("pc", "dirty", "last-block-grows",
                      test_last_block_grows);
    snapshot_add_test("q35", "dirty", "last-block-grows",
                      test_last_block_grows);
    snapshot_add_tests("mapped", test_mapped);
    snapshot_add_tests("vga", test_vga);
    snapshot_add_tests("vmware-vga", test_vmware_vga);
    snapshot_add_tests("ati-vga", test_ati_vga);
    snapshot_add_tests("erst", test_erst);
    snapshot_add_tests("checksum", test_checksum);
    snapshot_add_tests("answer", test_answer);
    return g_test_run();
}
