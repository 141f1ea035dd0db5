/*
 * Tests of the snapshot device: the hooks of devices, which are called at each
 * save and load (pre_load, post_load, needed and so on)
 *
 * A restore need not follow a reset, comes thousands of times in one process,
 * and must leave the guest exactly as it was saved.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/sockets.h"
#include "qemu/units.h"
#include "hw/pci/pci_regs.h"
#include "libqos/fw_cfg.h"
#include "libqos/sdhci-cmd.h"
#include "qobject/qdict.h"
#include "qobject/qjson.h"
#include "qobject/qlist.h"
#include "snapshot-utils.h"
#include "standard-headers/linux/qemu_fw_cfg.h"

/*
 * The machine is as in slot 0, but for clocks that went on as it was restored
 * before, and runs.
 */
static void assert_exact(SnapshotVM *vm)
{
    QDict *found = qtest_qmp_assert_success_ref(
        vm->qts, "{ 'execute': 'x-snapshot-device-verify',"
        " 'arguments': { 'slot': 0 } }");
    int64_t clocks = 0;
    const QListEntry *e;

    QLIST_FOREACH_ENTRY(qdict_get_qlist(found, "devices"), e) {
        QDict *field = qobject_to(QDict, qlist_entry_obj(e));

        clocks += !strcmp(qdict_get_str(field, "section"), "timer");
    }
    if (qdict_get_int(found, "pages") ||
        qdict_get_int(found, "fields") > clocks) {
        GString *s = qobject_to_json_pretty(QOBJECT(found), false);

        g_error("not as it was saved: %s", s->str);
    }
    qobject_unref(found);
}

/* What a verification at the end of each restore found (verify=on). */
static void assert_never_differed(SnapshotVM *vm)
{
    QDict *info = snapshot_query(vm);

    if (qdict_get_int(info, "mismatched")) {
        GString *s = qobject_to_json_pretty(QOBJECT(info), false);

        g_error("a restore was not exact: %s", s->str);
    }
    g_assert_cmpint(qdict_get_int(info, "verified"), >, 0);
    qobject_unref(info);
}

static void wait_for_state(SnapshotVM *vm, const char *state)
{
    int tries;

    for (tries = 0; tries < 10000; tries++) {
        QDict *status = qtest_qmp_assert_success_ref(
            vm->qts, "{ 'execute': 'query-status' }");
        bool is = !strcmp(qdict_get_str(status, "status"), state);

        qobject_unref(status);
        if (is) {
            return;
        }
        g_usleep(1000);
    }
    g_error("the machine is not '%s'", state);
}

static void stop(SnapshotVM *vm)
{
    qtest_qmp_assert_success(vm->qts, "{ 'execute': 'stop' }");
}

static void cont(SnapshotVM *vm)
{
    qtest_qmp_assert_success(vm->qts, "{ 'execute': 'cont' }");
}

static void system_reset(SnapshotVM *vm)
{
    qtest_system_reset(vm->qts);
    snapshot_map_bar(vm);
}

/* With the BAR where it was at the save */
static void reset_and_restore(SnapshotVM *vm)
{
    QPCIBar bar = vm->bar;

    qtest_system_reset(vm->qts);
    snapshot_qmp(vm, "restore", 0);
    vm->bar = bar;
}

/* A server whose client is here, and reads what and when it likes */
typedef struct Backend {
    char *dir;
    char *path;
    int fd;
} Backend;

static Backend backend_new(void)
{
    Backend b = { .fd = -1 };

    b.dir = g_dir_make_tmp("snapshot-hooks-XXXXXX", NULL);
    g_assert_nonnull(b.dir);
    b.path = g_build_filename(b.dir, "socket", NULL);
    return b;
}

static void backend_connect(Backend *b)
{
    struct sockaddr_un addr = { .sun_family = AF_UNIX };

    b->fd = socket(AF_UNIX, SOCK_STREAM, 0);
    g_assert_cmpint(b->fd, >=, 0);
    g_strlcpy(addr.sun_path, b->path, sizeof(addr.sun_path));
    g_assert_cmpint(connect(b->fd, (struct sockaddr *)&addr, sizeof(addr)), ==,
                    0);
}

static void backend_free(Backend *b)
{
    if (b->fd >= 0) {
        close(b->fd);
    }
    unlink(b->path);
    rmdir(b->dir);
    g_free(b->path);
    g_free(b->dir);
}

/* Read until nothing comes for a while.  Returns: how many bytes came */
static size_t backend_read(Backend *b)
{
    struct timeval wait = { .tv_usec = 200 * 1000 };
    size_t total = 0;
    char buf[4096];
    ssize_t n;

    g_assert_cmpint(setsockopt(b->fd, SOL_SOCKET, SO_RCVTIMEO, &wait,
                               sizeof(wait)), ==, 0);
    while ((n = read(b->fd, buf, sizeof(buf))) > 0) {
        total += n;
    }
    return total;
}

#define COM1 0x3f8
#define UART_THR (COM1 + 0)
#define UART_FCR (COM1 + 2)
#define UART_IIR (COM1 + 2)
#define UART_LSR (COM1 + 5)
#define UART_SCR (COM1 + 7)
#define LSR_THRE 0x20
#define LSR_TEMT 0x40

static SnapshotVM *start_serial(const char *machine, Backend *b)
{
    SnapshotVM *vm = snapshot_vm_start(
        ",verify=on", "-M %s -rtc clock=vm -nodefaults "
        "-chardev socket,id=c,path=%s,server=on,wait=off -serial chardev:c",
        machine, b->path);

    backend_connect(b);
    return vm;
}

/* Send until the backend takes no more.  Returns: how many bytes were sent */
static size_t fill_serial(SnapshotVM *vm)
{
    size_t n;

    for (n = 0; qtest_inb(vm->qts, UART_LSR) & LSR_TEMT; n++) {
        g_assert_cmpuint(n, <, 1000000);
        qtest_outb(vm->qts, UART_THR, n);
    }
    return n;
}

static void wait_for_serial(SnapshotVM *vm)
{
    int tries;

    for (tries = 0; !(qtest_inb(vm->qts, UART_LSR) & LSR_TEMT); tries++) {
        g_assert_cmpint(tries, <, 5000);
        g_usleep(1000);
    }
}

/*
 * Catches: an abort when a UART whose backend takes no more is loaded while it
 * waits; one that does not go on when the backend takes bytes again; one that
 * goes on though it was saved when it had nothing to send.
 */
static void test_serial_stalled(const void *machine)
{
    Backend b = backend_new();
    SnapshotVM *vm = start_serial(machine, &b);
    size_t sent;
    int i;

    snapshot_save(vm, 1);
    qtest_outb(vm->qts, UART_FCR, 1);
    sent = fill_serial(vm);
    snapshot_save(vm, 0);
    for (i = 0; i < 5; i++) {
        qtest_outb(vm->qts, UART_SCR, 1 + i);
        if (i & 1) {
            qtest_outb(vm->qts, UART_THR, 0x55);
        }
        snapshot_restore(vm, 0);
        g_assert_false(qtest_inb(vm->qts, UART_LSR) & LSR_TEMT);
    }
    assert_never_differed(vm);
    g_assert_cmpuint(backend_read(&b), ==, sent);
    wait_for_serial(vm);

    fill_serial(vm);
    for (i = 0; i < 3; i++) {
        snapshot_restore(vm, 1);
        g_assert_cmphex(qtest_inb(vm->qts, UART_LSR), ==, LSR_TEMT | LSR_THRE);
        snapshot_restore(vm, 0);
        g_assert_false(qtest_inb(vm->qts, UART_LSR) & LSR_TEMT);
    }
    snapshot_restore(vm, 1);
    backend_read(&b);
    wait_for_serial(vm);
    assert_never_differed(vm);
    snapshot_vm_end(vm);
    backend_free(&b);
}

/*
 * Catches: a UART that was saved when its backend took no more, and is loaded
 * when there is none: nobody tells it that it may send.
 */
static void test_serial_gone(const void *machine)
{
    Backend b = backend_new();
    SnapshotVM *vm = start_serial(machine, &b);
    int i;

    fill_serial(vm);
    snapshot_save(vm, 0);
    close(b.fd);
    b.fd = -1;
    wait_for_serial(vm);
    for (i = 0; i < 3; i++) {
        snapshot_restore(vm, 0);
        wait_for_serial(vm);
    }
    assert_never_differed(vm);
    snapshot_vm_end(vm);
    backend_free(&b);
}

/*
 * Catches: a UART's IIR that is derived from FCR when it is loaded, which a
 * reset leaves alone.
 */
static void test_serial_iir(const void *machine)
{
    SnapshotVM *vm = snapshot_vm_start(
        ",verify=on", "-M %s -rtc clock=vm -serial null",
        (const char *)machine);
    int i;

    qtest_outb(vm->qts, UART_FCR, 1);
    g_assert_cmphex(qtest_inb(vm->qts, UART_IIR), ==, 0xc1);
    system_reset(vm);
    g_assert_cmphex(qtest_inb(vm->qts, UART_IIR), ==, 0x01);
    snapshot_save(vm, 0);
    for (i = 0; i < 3; i++) {
        qtest_outb(vm->qts, UART_SCR, 1 + i);
        snapshot_restore(vm, 0);
        g_assert_cmphex(qtest_inb(vm->qts, UART_IIR), ==, 0x01);
    }
    assert_exact(vm);
    assert_never_differed(vm);
    snapshot_vm_end(vm);
}

#define FLASH_SIZE (128 * KiB)
#define FLASH (4 * GiB - FLASH_SIZE)

static void flash_byte(SnapshotVM *vm, uint64_t offset, uint8_t value)
{
    qtest_writeb(vm->qts, FLASH + offset, 0x40);
    qtest_writeb(vm->qts, FLASH + offset, value);
    qtest_writeb(vm->qts, FLASH + offset, 0xff);
}

static void assert_flash(SnapshotVM *vm, const char *path, uint64_t offset,
                         uint8_t value)
{
    g_autofree char *file = NULL;
    gsize length;

    g_assert_cmphex(qtest_readb(vm->qts, FLASH + offset), ==, value);
    g_assert_true(g_file_get_contents(path, &file, &length, NULL));
    g_assert_cmpuint(length, ==, FLASH_SIZE);
    g_assert_cmphex((uint8_t)file[offset], ==, value);
}

/*
 * Catches: a handler of the run state that is registered at each load, and
 * removed once: QEMU ends when the machine goes on; a file that does not go
 * back with what the guest sees.
 */
static void test_pflash(const void *machine)
{
    g_autofree char *content = g_malloc(FLASH_SIZE);
    g_autofree char *path = NULL;
    SnapshotVM *vm;
    int fd = g_file_open_tmp("snapshot-hooks-XXXXXX", &path, NULL);
    int i;

    g_assert_cmpint(fd, >=, 0);
    close(fd);
    memset(content, 0xff, FLASH_SIZE);
    g_assert_true(g_file_set_contents(path, content, FLASH_SIZE, NULL));
    vm = snapshot_vm_start(",verify=on,disks=keep",
                           "-M %s -rtc clock=vm "
                           "-drive if=pflash,format=raw,file=%s",
                           (const char *)machine, path);
    flash_byte(vm, 0x1234, 0x5a);
    snapshot_save(vm, 0);
    for (i = 0; i < 3; i++) {
        flash_byte(vm, 0x1234, 0x50 - i);
        flash_byte(vm, 0x1f234, 0x77);
        snapshot_restore(vm, 0);
        assert_flash(vm, path, 0x1234, 0x5a);
        assert_flash(vm, path, 0x1f234, 0xff);
    }

    flash_byte(vm, 0x1234, 0x42);
    stop(vm);
    for (i = 0; i < 3; i++) {
        snapshot_qmp(vm, "restore", 0);
    }
    cont(vm);
    assert_flash(vm, path, 0x1234, 0x5a);

    stop(vm);
    snapshot_qmp(vm, "save", 0);
    snapshot_qmp(vm, "restore", 0);
    snapshot_qmp(vm, "restore", 0);
    cont(vm);
    assert_flash(vm, path, 0x1234, 0x5a);
    assert_never_differed(vm);
    snapshot_vm_end(vm);
    unlink(path);
}

/* Write to a file of fw_cfg, by DMA. */
static void fw_cfg_write(SnapshotVM *vm, const char *name, const void *data,
                         size_t length)
{
    const uint64_t buffer = 0x80000, access = 0x81000;
    QFWCFG *fw_cfg = pc_fw_cfg_init(vm->qts);
    g_autofree struct fw_cfg_file *files = NULL;
    uint32_t count, i;

    qfw_cfg_get(fw_cfg, FW_CFG_FILE_DIR, &count, sizeof(count));
    count = be32_to_cpu(count);
    files = g_malloc(4 + count * sizeof(*files));
    qfw_cfg_get(fw_cfg, FW_CFG_FILE_DIR, files, 4 + count * sizeof(*files));
    for (i = 0; i < count; i++) {
        const struct fw_cfg_file *f =
            (void *)((char *)files + 4 + i * sizeof(*f));

        if (!strcmp(f->name, name)) {
            qtest_memwrite(vm->qts, buffer, data, length);
            qtest_writel(vm->qts, access,
                         cpu_to_be32(be16_to_cpu(f->select) << 16 |
                                     FW_CFG_DMA_CTL_SELECT |
                                     FW_CFG_DMA_CTL_WRITE));
            qtest_writel(vm->qts, access + 4, cpu_to_be32(length));
            qtest_writeq(vm->qts, access + 8, cpu_to_be64(buffer));
            qtest_outl(vm->qts, 0x514, 0);
            qtest_outl(vm->qts, 0x518, cpu_to_be32(access));
            g_assert_cmphex(qtest_readl(vm->qts, access), ==, 0);
            pc_fw_cfg_uninit(fw_cfg);
            return;
        }
    }
    g_error("there is no %s", name);
}

#define VMGENID 0x70000
#define VMCLOCK 0xfeffb000ull
#define GPE0_STATUS_PC 0xafe0

static SnapshotVM *start_generation(const char *machine,
                                    const char *properties)
{
    const uint64_t addr = cpu_to_le64(VMGENID);
    SnapshotVM *vm = snapshot_vm_start(
        properties, "-M %s -rtc clock=vm -device vmclock "
        "-device vmgenid,guid=324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87", machine);

    fw_cfg_write(vm, "etc/vmgenid_addr", &addr, sizeof(addr));
    return vm;
}

/*
 * Catches: a restore that tells the guest of itself: an interrupt, an
 * identifier, a page of the clock.
 */
static void test_no_new_generation(const void *machine)
{
    uint8_t saved[4096], found[4096];
    SnapshotVM *vm = start_generation(machine, ",verify=on");
    int i;

    qtest_memread(vm->qts, VMCLOCK, saved, sizeof(saved));
    qtest_writeq(vm->qts, VMGENID, 0x1122334455667788);
    snapshot_save(vm, 0);
    for (i = 0; i < 3; i++) {
        qtest_writeq(vm->qts, VMGENID, 1);
        if (i == 1) {
            reset_and_restore(vm);
        } else {
            snapshot_restore(vm, 0);
        }
        qtest_memread(vm->qts, VMCLOCK, found, sizeof(found));
        g_assert_cmpmem(found, sizeof(found), saved, sizeof(saved));
        g_assert_cmphex(qtest_readq(vm->qts, VMGENID), ==, 0x1122334455667788);
        if (!strcmp(machine, "pc")) {
            g_assert_cmphex(qtest_inl(vm->qts, GPE0_STATUS_PC), ==, 0);
        }
    }
    assert_exact(vm);
    assert_never_differed(vm);
    snapshot_vm_end(vm);
}

/*
 * Catches: new-generation=on that does not tell the guest, or a vmclock that
 * counts on from what the restore before left.
 */
static void test_new_generation(const void *machine)
{
    static const uint8_t guid[16] = {
        0xaf, 0x6e, 0x4e, 0x32, 0xd1, 0xd1, 0xf6, 0x4b,
        0xbf, 0x41, 0xb9, 0xbb, 0x6c, 0x91, 0xfb, 0x87,
    };
    uint8_t found[16];
    uint64_t marker;
    SnapshotVM *vm = start_generation(machine, ",new-generation=on");
    int i;

    marker = qtest_readq(vm->qts, VMCLOCK + 0x10);
    qtest_memset(vm->qts, VMGENID, 0x11, 16);
    snapshot_save(vm, 0);
    for (i = 0; i < 3; i++) {
        qtest_memset(vm->qts, VMGENID, 0x22, 16);
        snapshot_restore(vm, 0);
        qtest_memread(vm->qts, VMGENID, found, sizeof(found));
        g_assert_cmpmem(found, sizeof(found), guid, sizeof(guid));
        g_assert_cmphex(qtest_readq(vm->qts, VMCLOCK + 0x10), ==, marker + 1);
        if (!strcmp(machine, "pc")) {
            g_assert_cmphex(qtest_inl(vm->qts, GPE0_STATUS_PC) & 0x20, ==,
                            0x20);
        }
    }
    snapshot_vm_end(vm);
}

/* An xHCI with one device that has an address, all in pages from here on */
#define XHCI_MEMORY 0x200000
#define XHCI_DCBAA (XHCI_MEMORY + 0x0000)
#define XHCI_COMMANDS (XHCI_MEMORY + 0x1000)
#define XHCI_EVENTS (XHCI_MEMORY + 0x2000)
#define XHCI_SEGMENTS (XHCI_MEMORY + 0x3000)
#define XHCI_INPUT (XHCI_MEMORY + 0x4000)
#define XHCI_CONTEXT (XHCI_MEMORY + 0x5000)
#define XHCI_TRANSFERS (XHCI_MEMORY + 0x6000)
#define XHCI_OPER 0x40
#define XHCI_RUNTIME 0x1000
#define XHCI_DOORBELL 0x2000

static void xhci_command(SnapshotVM *vm, QPCIDevice *dev, QPCIBar bar,
                         unsigned n, unsigned events, uint64_t parameter,
                         uint32_t control)
{
    uint64_t trb = XHCI_COMMANDS + n * 16;
    uint64_t event = XHCI_EVENTS + (events + n) * 16;

    qtest_writeq(vm->qts, trb, parameter);
    qtest_writel(vm->qts, trb + 8, 0);
    qtest_writel(vm->qts, trb + 12, control | 1);
    qpci_io_writel(dev, bar, XHCI_DOORBELL, 0);
    /* Success */
    g_assert_cmphex(qtest_readl(vm->qts, event + 8) >> 24, ==, 1);
}

/*
 * Catches: an abort when the state is loaded of a controller whose guest has
 * not yet given up the slot of a device that is gone, or has written nonsense
 * to the context of one; a load that frees such a slot.
 */
static void test_xhci_unplugged(const void *machine)
{
    SnapshotVM *vm = snapshot_vm_start(
        ",verify=on", "-M %s -rtc clock=vm -nodefaults "
        "-device qemu-xhci,id=x,addr=7 -device usb-tablet,id=u,bus=x.0,port=1",
        (const char *)machine);
    QPCIDevice *dev = qpci_device_find(vm->pci, QPCI_DEVFN(7, 0));
    QPCIBar bar = qpci_iomap(dev, 0, NULL);
    unsigned port;
    int i;

    qpci_device_enable(dev);
    qtest_memset(vm->qts, XHCI_MEMORY, 0, 0x8000);
    qtest_writeq(vm->qts, XHCI_SEGMENTS, XHCI_EVENTS);
    qtest_writel(vm->qts, XHCI_SEGMENTS + 8, 64);
    qpci_io_writel(dev, bar, XHCI_OPER + 0x38, 8);
    qpci_io_writel(dev, bar, XHCI_OPER + 0x30, XHCI_DCBAA);
    qpci_io_writel(dev, bar, XHCI_OPER + 0x34, 0);
    qpci_io_writel(dev, bar, XHCI_OPER + 0x18, XHCI_COMMANDS | 1);
    qpci_io_writel(dev, bar, XHCI_OPER + 0x1c, 0);
    qpci_io_writel(dev, bar, XHCI_RUNTIME + 0x28, 1);
    qpci_io_writel(dev, bar, XHCI_RUNTIME + 0x38, XHCI_EVENTS);
    qpci_io_writel(dev, bar, XHCI_RUNTIME + 0x3c, 0);
    qpci_io_writel(dev, bar, XHCI_RUNTIME + 0x30, XHCI_SEGMENTS);
    qpci_io_writel(dev, bar, XHCI_RUNTIME + 0x34, 0);
    qpci_io_writel(dev, bar, XHCI_OPER, 1);

    for (port = 1; port <= 8; port++) {
        unsigned reg = XHCI_OPER + 0x400 + (port - 1) * 0x10;

        if (qpci_io_readl(dev, bar, reg) & 1) {
            qpci_io_writel(dev, bar, reg, 0x210);
            break;
        }
    }
    g_assert_cmpuint(port, <=, 8);
    /* The reset of the port was told of by an event. */
    i = 0;
    while (qtest_readl(vm->qts, XHCI_EVENTS + i * 16 + 12) & 1) {
        i++;
    }
    /* Enable Slot, Address Device */
    xhci_command(vm, dev, bar, 0, i, 0, 9 << 10);
    qtest_writeq(vm->qts, XHCI_DCBAA + 8, XHCI_CONTEXT);
    qtest_writel(vm->qts, XHCI_INPUT + 4, 3);
    qtest_writel(vm->qts, XHCI_INPUT + 32, 1 << 27 | 3 << 20);
    qtest_writel(vm->qts, XHCI_INPUT + 36, port << 16);
    qtest_writel(vm->qts, XHCI_INPUT + 68, 64 << 16 | 4 << 3);
    qtest_writeq(vm->qts, XHCI_INPUT + 72, XHCI_TRANSFERS | 1);
    xhci_command(vm, dev, bar, 1, i, XHCI_INPUT, 11 << 10 | 1 << 24);

    /* A port that there is not */
    snapshot_save(vm, 0);
    snapshot_restore(vm, 0);
    qtest_writel(vm->qts, XHCI_CONTEXT + 4, 99 << 16);
    snapshot_save(vm, 0);
    for (i = 0; i < 3; i++) {
        snapshot_restore(vm, 0);
    }
    assert_exact(vm);
    qtest_writel(vm->qts, XHCI_CONTEXT + 4, port << 16);

    qtest_qmp_device_del(vm->qts, "u");
    snapshot_save(vm, 0);
    for (i = 0; i < 3; i++) {
        snapshot_restore(vm, 0);
    }
    assert_exact(vm);
    assert_never_differed(vm);
    g_free(dev);
    snapshot_vm_end(vm);
}

/*
 * Catches: a card's timer that is left running by the load of a card that has
 * powered up: an abort when it fires; and an abort when such a card is loaded
 * into one that has powered up.
 */
static void test_sd_power_up(const void *machine)
{
    SnapshotVM *vm = snapshot_vm_start(
        ",verify=on,disks=keep", "-M %s -rtc clock=vm -nodefaults "
        "-blockdev null-co,node-name=d,size=67108864,read-zeroes=on "
        "-device sdhci-pci,addr=7 -device sd-card,drive=d",
        (const char *)machine);
    QPCIDevice *dev = qpci_device_find(vm->pci, QPCI_DEVFN(7, 0));
    QPCIBar bar = qpci_iomap(dev, 0, NULL);
    int i;

    qpci_device_enable(dev);
    qpci_io_writeb(dev, bar, 0x29, 0x0f);
    qpci_io_writew(dev, bar, 0x2c, 0x0005);
    /* GO_IDLE_STATE, SD_SEND_OP_COND */
    sdhci_cmd_regs(vm->qts, bar.addr, 0, 0, 0, 0, 0 << 8);
    sdhci_cmd_regs(vm->qts, bar.addr, 0, 0, 0, 0, 55 << 8 | 2);
    sdhci_cmd_regs(vm->qts, bar.addr, 0, 0, 0x41200000, 0, 41 << 8 | 2);
    g_assert_cmphex(qpci_io_readl(dev, bar, 0x10) >> 31, ==, 1);
    snapshot_save(vm, 0);
    for (i = 0; i < 3; i++) {
        sdhci_cmd_regs(vm->qts, bar.addr, 0, 0, 0, 0, 0 << 8);
        sdhci_cmd_regs(vm->qts, bar.addr, 0, 0, 0, 0, 55 << 8 | 2);
        sdhci_cmd_regs(vm->qts, bar.addr, 0, 0, 0, 0, 41 << 8 | 2);
        g_assert_cmphex(qpci_io_readl(dev, bar, 0x10) >> 31, ==, 0);
        snapshot_restore(vm, 0);
        qtest_clock_step(vm->qts, 10 * 1000 * 1000);
    }
    assert_never_differed(vm);
    g_free(dev);
    snapshot_vm_end(vm);
}

#define IDE_DATA 0x1f0
#define IDE_STATUS 0x1f7
#define IDE_COMMAND 0x1f7

static SnapshotVM *start_ide(const char *machine, const char *drive,
                             QPCIDevice **dev, QPCIBar *bar)
{
    SnapshotVM *vm = snapshot_vm_start(
        ",verify=on,disks=keep", "-M %s -rtc clock=vm -nodefaults "
        "%s", machine, drive);

    *dev = qpci_device_find(vm->pci, QPCI_DEVFN(1, 1));
    *bar = qpci_iomap(*dev, 4, NULL);
    qpci_device_enable(*dev);
    return vm;
}

/*
 * Catches: a status of the IDE's DMA that is loaded only where it was zero,
 * as after a reset; a command that waited for its DMA, and is executed again
 * after a restore of a machine that had none.
 */
static void test_ide_dma(const void *machine)
{
    QPCIDevice *dev;
    QPCIBar bar;
    SnapshotVM *vm = start_ide(
        machine, "-blockdev null-co,node-name=d,size=67108864,read-zeroes=on "
        "-device ide-hd,drive=d,bus=ide.0", &dev, &bar);
    int i;

    qtest_outb(vm->qts, 0x1f6, 0xe0);
    snapshot_save(vm, 0);
    for (i = 0; i < 4; i++) {
        if (i & 1) {
            /* READ DMA that is not started */
            qtest_outb(vm->qts, 0x1f2, 1);
            qtest_outb(vm->qts, 0x1f3, 9);
            qtest_outb(vm->qts, IDE_COMMAND, 0xc8);
            g_assert_cmphex(qtest_inb(vm->qts, IDE_STATUS) & 0x08, ==, 0x08);
        } else {
            /* Started with no command */
            qpci_io_writeb(dev, bar, 0, 1);
            g_assert_cmphex(qpci_io_readb(dev, bar, 2) & 1, ==, 1);
        }
        snapshot_restore(vm, 0);
        g_assert_cmphex(qpci_io_readb(dev, bar, 2) & 1, ==, 0);
        g_assert_cmphex(qtest_inb(vm->qts, IDE_STATUS), ==, 0x50);
        assert_exact(vm);
    }
    assert_never_differed(vm);
    g_free(dev);
    snapshot_vm_end(vm);
}

/*
 * Catches: a request that failed and stopped the machine, and is tried again
 * in a machine that was restored to before it was made.
 */
static void test_ide_retry(const void *machine)
{
    QPCIDevice *dev;
    QPCIBar bar;
    SnapshotVM *vm = start_ide(
        machine, "-blockdev null-co,node-name=n,size=67108864,read-zeroes=on "
        "-blockdev blkdebug,node-name=d,image=n,inject-error.0.event=none,"
        "inject-error.0.iotype=read,"
        "inject-error.0.errno=5 "
        "-device ide-hd,drive=d,bus=ide.0,rerror=stop", &dev, &bar);
    int i;

    qtest_outb(vm->qts, 0x1f6, 0xe0);
    snapshot_save(vm, 0);
    for (i = 0; i < 3; i++) {
        qtest_outb(vm->qts, 0x1f2, 1);
        qtest_outb(vm->qts, 0x1f3, 9);
        qtest_outb(vm->qts, IDE_COMMAND, 0x20);
        wait_for_state(vm, "io-error");
        snapshot_qmp(vm, "restore", 0);
        assert_exact(vm);
        cont(vm);
        g_usleep(50000);
        snapshot_assert_state(vm, "running");
        g_assert_cmphex(qtest_inb(vm->qts, IDE_STATUS), ==, 0x50);
    }
    assert_never_differed(vm);
    g_free(dev);
    snapshot_vm_end(vm);
}

/* Send a packet, by PIO, whose data comes in pieces of 2048 bytes. */
static void atapi_packet(SnapshotVM *vm, const uint8_t *packet)
{
    int i;

    qtest_outb(vm->qts, 0x1f1, 0);
    qtest_outb(vm->qts, 0x1f4, 0x00);
    qtest_outb(vm->qts, 0x1f5, 0x08);
    qtest_outb(vm->qts, IDE_COMMAND, 0xa0);
    for (i = 0; i < 12; i += 2) {
        qtest_outw(vm->qts, IDE_DATA, lduw_le_p(packet + i));
    }
}

static void wait_for_drq(SnapshotVM *vm)
{
    int tries;

    for (tries = 0; (qtest_inb(vm->qts, IDE_STATUS) & 0x88) != 8; tries++) {
        g_assert_cmpint(tries, <, 5000);
        g_usleep(1000);
    }
}

static void read_sector(SnapshotVM *vm, uint16_t *sector)
{
    unsigned i;

    wait_for_drq(vm);
    for (i = 0; i < 1024; i++) {
        sector[i] = qtest_inw(vm->qts, IDE_DATA);
    }
}

/*
 * Catches: a CD-ROM that was saved between two sectors of a read by PIO, and
 * does not know where to go on.
 */
static void test_atapi_pio(const void *machine)
{
    static const uint8_t read4[12] = { 0x28, 0, 0, 0, 0, 7, 0, 0, 4 };
    static const uint8_t read1[12] = { 0x28, 0, 0, 0, 0, 1, 0, 0, 1 };
    const size_t size = 64 * 2048;
    g_autofree uint16_t *content = g_malloc(size);
    g_autofree char *path = NULL;
    g_autofree char *drive = NULL;
    uint16_t sector[1024];
    QPCIDevice *dev;
    QPCIBar bar;
    SnapshotVM *vm;
    int fd = g_file_open_tmp("snapshot-hooks-XXXXXX", &path, NULL);
    int i, n;

    g_assert_cmpint(fd, >=, 0);
    close(fd);
    for (i = 0; i < size / 2; i++) {
        content[i] = i / 1024 << 8 | (i & 0xff);
    }
    g_assert_true(g_file_set_contents(path, (char *)content, size, NULL));
    drive = g_strdup_printf(
        "-blockdev file,node-name=d,filename=%s,read-only=on "
        "-device ide-cd,drive=d,bus=ide.0", path);
    vm = start_ide(machine, drive, &dev, &bar);
    qtest_outb(vm->qts, 0x1f6, 0xa0);
    /* Unit attention: the first ones fail. */
    for (i = 0; i < 3; i++) {
        static const uint8_t sense[12] = { 3, 0, 0, 0, 18 };

        atapi_packet(vm, sense);
        wait_for_drq(vm);
        for (n = 0; n < 9; n++) {
            qtest_inw(vm->qts, IDE_DATA);
        }
        atapi_packet(vm, (const uint8_t[12]) { 0 });
        g_usleep(2000);
    }

    atapi_packet(vm, read4);
    read_sector(vm, sector);
    g_assert_cmpmem(sector, 2048, content + 7 * 1024, 2048);
    wait_for_drq(vm);
    snapshot_save(vm, 0);
    for (i = 0; i < 3; i++) {
        for (n = 1; n < 4; n++) {
            read_sector(vm, sector);
            g_assert_cmpmem(sector, 2048, content + (7 + n) * 1024, 2048);
        }
        atapi_packet(vm, read1);
        read_sector(vm, sector);
        g_assert_cmpmem(sector, 2048, content + 1024, 2048);
        if (i == 1) {
            reset_and_restore(vm);
        } else {
            snapshot_restore(vm, 0);
        }
        assert_exact(vm);
    }
    assert_never_differed(vm);
    g_free(dev);
    snapshot_vm_end(vm);
    unlink(path);
}

#define FDC_DATA 0x3f5
#define FDC_DIR 0x3f7

static void fdc_seek(SnapshotVM *vm, uint8_t track)
{
    qtest_outb(vm->qts, FDC_DATA, 0x0f);
    qtest_outb(vm->qts, FDC_DATA, 0);
    qtest_outb(vm->qts, FDC_DATA, track);
    qtest_outb(vm->qts, FDC_DATA, 0x08);
    qtest_inb(vm->qts, FDC_DATA);
    qtest_inb(vm->qts, FDC_DATA);
}

/*
 * Catches: a line that tells of a changed medium, and a mode of the drive, that
 * neither a load nor a reset before it puts back.
 */
static void test_floppy(const void *machine)
{
    SnapshotVM *vm = snapshot_vm_start(
        ",verify=on", "-M %s -rtc clock=vm "
        "-blockdev null-co,node-name=f,size=1474560,read-zeroes=on,"
        "read-only=on -device floppy,drive=f", (const char *)machine);
    int i;

    qtest_outb(vm->qts, 0x3f2, 0x1c);
    g_assert_cmphex(qtest_inb(vm->qts, FDC_DIR), ==, 0x80);
    snapshot_save(vm, 0);
    for (i = 0; i < 3; i++) {
        if (i < 2) {
            fdc_seek(vm, 5);
            g_assert_cmphex(qtest_inb(vm->qts, FDC_DIR), ==, 0);
        }
        if (i > 0) {
            /* PERPENDICULAR MODE of drive 0 */
            qtest_outb(vm->qts, FDC_DATA, 0x12);
            qtest_outb(vm->qts, FDC_DATA, 0x87);
        }
        snapshot_restore(vm, 0);
        g_assert_cmphex(qtest_inb(vm->qts, FDC_DIR), ==, 0x80);
        assert_exact(vm);
    }
    assert_never_differed(vm);
    snapshot_vm_end(vm);
}

/* Catches: lamps, and a prefix, of the keyboard that do not go back. */
static void test_keyboard_leds(const void *machine)
{
    SnapshotVM *vm = snapshot_vm_start(",verify=on", "-M %s -rtc clock=vm",
                                       (const char *)machine);
    int i;

    snapshot_save(vm, 0);
    for (i = 0; i < 3; i++) {
        qtest_outb(vm->qts, 0x60, 0xed);
        qtest_outb(vm->qts, 0x60, 0x02);
        snapshot_restore(vm, 0);
        assert_exact(vm);
    }
    assert_never_differed(vm);
    snapshot_vm_end(vm);
}

/*
 * Catches: a throttled keyboard controller that hands out the next byte when it
 * is loaded, or by a timer of the time after the save.
 */
static void test_keyboard_throttle(const void *machine)
{
    SnapshotVM *vm = snapshot_vm_start(
        ",verify=on", "-M %s -rtc clock=vm -global i8042.kbd-throttle=on",
        (const char *)machine);
    int i;

    /* Three bytes; the second has to wait. */
    qtest_outb(vm->qts, 0x60, 0xf2);
    g_assert_cmphex(qtest_inb(vm->qts, 0x60), ==, 0xfa);
    g_assert_cmphex(qtest_inb(vm->qts, 0x64) & 1, ==, 0);
    snapshot_save(vm, 0);
    for (i = 0; i < 3; i++) {
        qtest_outb(vm->qts, 0x60, 0xf2);
        snapshot_restore(vm, 0);
        g_assert_cmphex(qtest_inb(vm->qts, 0x64) & 1, ==, 0);
        assert_exact(vm);
    }
    assert_never_differed(vm);
    /* qtest's clock does not go back. */
    qtest_clock_step(vm->qts, 900 * 1000);
    g_assert_cmphex(qtest_inb(vm->qts, 0x64) & 1, ==, 0);
    qtest_clock_step(vm->qts, 200 * 1000);
    g_assert_cmphex(qtest_inb(vm->qts, 0x64) & 1, ==, 1);
    g_assert_cmphex(qtest_inb(vm->qts, 0x60), ==, 0xab);
    snapshot_vm_end(vm);
}

static uint8_t cmos_read(SnapshotVM *vm, uint8_t reg)
{
    qtest_outb(vm->qts, 0x70, reg);
    return qtest_inb(vm->qts, 0x71);
}

static void cmos_write(SnapshotVM *vm, uint8_t reg, uint8_t value)
{
    qtest_outb(vm->qts, 0x70, reg);
    qtest_outb(vm->qts, 0x71, value);
}

#define RTC_REG_A 0x0a
#define RTC_REG_B 0x0b
#define RTC_REG_C 0x0c
#define RTC_PF 0x40

/*
 * Catches: ticks of the RTC that nobody took, which are delivered by a timer of
 * the time after the save, or one that a load starts anew.
 */
static void test_rtc_slew(const void *machine)
{
    const int64_t ms = 1000 * 1000;
    SnapshotVM *vm = snapshot_vm_start(
        ",verify=on", "-M %s -rtc clock=vm "
        "-global mc146818rtc.lost_tick_policy=slew", (const char *)machine);
    int i;

    /* Two ticks a second; the lost one is tried again between them. */
    cmos_write(vm, RTC_REG_A, 0x2f);
    cmos_write(vm, RTC_REG_B, 0x42);
    do {
        qtest_clock_step(vm->qts, 1 * ms);
    } while (!(cmos_read(vm, RTC_REG_C) & RTC_PF));
    /* And at once, so often, when the guest takes one. */
    for (i = 0; i < 20; i++) {
        cmos_read(vm, RTC_REG_C);
    }
    qtest_clock_step(vm->qts, 100 * ms);
    snapshot_save(vm, 0);
    for (i = 0; i < 8; i++) {
        if (i & 1) {
            qtest_clock_step(vm->qts, 220 * ms);
        }
        if (i & 2) {
            cmos_write(vm, RTC_REG_B, 0x02);
        }
        if (i & 4) {
            system_reset(vm);
            snapshot_qmp(vm, "restore", 0);
        } else {
            snapshot_restore(vm, 0);
        }
        qtest_clock_step(vm->qts, 140 * ms);
        g_assert_cmphex(cmos_read(vm, RTC_REG_C) & RTC_PF, ==, 0);
        qtest_clock_step(vm->qts, 20 * ms);
        g_assert_cmphex(cmos_read(vm, RTC_REG_C) & RTC_PF, ==, RTC_PF);
        snapshot_qmp(vm, "restore", 0);
    }
    assert_never_differed(vm);
    snapshot_vm_end(vm);
}

#define KCS_DATA 0xca2
#define KCS_CMD 0xca3

/*
 * Catches: a BMC's interface that is put in order when it is loaded, though a
 * message was merely read to its end.
 */
static void test_ipmi_kcs(const void *machine)
{
    /* Get Device ID */
    static const uint8_t message[] = { 0x18, 0x01 };
    SnapshotVM *vm = snapshot_vm_start(
        ",verify=on", "-M %s -rtc clock=vm -device ipmi-bmc-sim,id=b "
        "-device isa-ipmi-kcs,bmc=b", (const char *)machine);
    int i;

    qtest_outb(vm->qts, KCS_CMD, 0x61);
    qtest_outb(vm->qts, KCS_DATA, message[0]);
    qtest_outb(vm->qts, KCS_CMD, 0x62);
    qtest_outb(vm->qts, KCS_DATA, message[1]);
    /* While it is in the state of READ */
    for (i = 0; (qtest_inb(vm->qts, KCS_CMD) & 0xc0) == 0x40; i++) {
        g_assert_cmpint(i, <, 300);
        qtest_inb(vm->qts, KCS_DATA);
        qtest_outb(vm->qts, KCS_DATA, 0x68);
    }
    g_assert_cmpint(i, >, 3);
    snapshot_save(vm, 0);
    for (i = 0; i < 3; i++) {
        qtest_outb(vm->qts, KCS_CMD, 0x61);
        snapshot_restore(vm, 0);
        assert_exact(vm);
    }
    assert_never_differed(vm);
    snapshot_vm_end(vm);
}

/* Returns: how many bytes the BMC replied */
static unsigned kcs_command(SnapshotVM *vm, const uint8_t *message,
                            unsigned length, uint8_t *reply, unsigned max)
{
    unsigned i;

    qtest_outb(vm->qts, KCS_CMD, 0x61);
    for (i = 0; i < length; i++) {
        if (i == length - 1) {
            qtest_outb(vm->qts, KCS_CMD, 0x62);
        }
        qtest_outb(vm->qts, KCS_DATA, message[i]);
    }
    for (i = 0; (qtest_inb(vm->qts, KCS_CMD) & 0xc0) == 0x40 && i < max; i++) {
        reply[i] = qtest_inb(vm->qts, KCS_DATA);
        qtest_outb(vm->qts, KCS_DATA, 0x68);
    }
    g_assert_cmpuint(i, <, max);
    /* The last is for the protocol only. */
    qtest_inb(vm->qts, KCS_DATA);
    g_assert_cmphex(reply[2], ==, 0);
    return i;
}

/*
 * Catches: what a guest changes in a BMC and no migration takes along: its log
 * of events, a power state, a message that waits.
 */
static void test_ipmi_bmc(const void *machine)
{
    static const uint8_t set_power[] = { 0x18, 0x06, 0x81, 0x82 };
    static const uint8_t other_power[] = { 0x18, 0x06, 0x83, 0x80 };
    static const uint8_t get_power[] = { 0x18, 0x07 };
    static const uint8_t add_event[18] = { 0x28, 0x44, 0, 0, 2 };
    static const uint8_t get_log[] = { 0x28, 0x40 };
    static const uint8_t send[] = { 0x18, 0x34, 0, 0x40, 0x18, 0xa8, 0x20, 0x02,
                                    0x01, 0xdd };
    static const uint8_t receive[] = { 0x18, 0x33 };
    SnapshotVM *vm = snapshot_vm_start(
        ",verify=on", "-M %s -rtc clock=vm -device ipmi-bmc-sim,id=b "
        "-device isa-ipmi-kcs,bmc=b", (const char *)machine);
    uint8_t reply[64];
    unsigned i, n;

    kcs_command(vm, set_power, sizeof(set_power), reply, sizeof(reply));
    kcs_command(vm, add_event, sizeof(add_event), reply, sizeof(reply));
    kcs_command(vm, send, sizeof(send), reply, sizeof(reply));
    snapshot_save(vm, 0);
    for (i = 0; i < 3; i++) {
        kcs_command(vm, other_power, sizeof(other_power), reply,
                    sizeof(reply));
        kcs_command(vm, add_event, sizeof(add_event), reply, sizeof(reply));
        /* That succeeds only if a message waits. */
        kcs_command(vm, receive, sizeof(receive), reply, sizeof(reply));
        snapshot_restore(vm, 0);
        assert_exact(vm);
        n = kcs_command(vm, get_power, sizeof(get_power), reply,
                        sizeof(reply));
        g_assert_cmpuint(n, ==, 5);
        g_assert_cmphex(reply[3], ==, 0x81);
        g_assert_cmphex(reply[4], ==, 0x82);
        kcs_command(vm, get_log, sizeof(get_log), reply, sizeof(reply));
        g_assert_cmpuint(reply[4], ==, 1);
    }
    assert_never_differed(vm);
    snapshot_vm_end(vm);
}

static uint8_t pic_requests(SnapshotVM *vm)
{
    qtest_outb(vm->qts, 0x20, 0x0a);
    return qtest_inb(vm->qts, 0x20);
}

/*
 * Catches: an interrupt that a sound card was told to raise later, in a machine
 * that was restored to before; and one that gets lost.
 */
static void test_sb16_timer(const void *machine)
{
    SnapshotVM *vm = snapshot_vm_start(
        "", "-M %s -rtc clock=vm -audiodev none,id=a "
        "-device sb16,audiodev=a", (const char *)machine);
    const unsigned dsp = 0x22c;
    int i;

    snapshot_save(vm, 0);
    /* Silence for 11025 samples */
    qtest_outb(vm->qts, dsp, 0x80);
    qtest_outb(vm->qts, dsp, 0x10);
    qtest_outb(vm->qts, dsp, 0x2b);
    snapshot_save(vm, 1);
    for (i = 0; i < 3; i++) {
        snapshot_restore(vm, 0);
        qtest_clock_step(vm->qts, 5 * 1000 * 1000 * 1000ll);
        g_assert_cmphex(pic_requests(vm) & 0x20, ==, 0);
        snapshot_restore(vm, 1);
        qtest_clock_step(vm->qts, 5 * 1000 * 1000 * 1000ll);
        g_assert_cmphex(pic_requests(vm) & 0x20, ==, 0x20);
    }
    snapshot_vm_end(vm);
}

static void gr(QPCIDevice *dev, QPCIBar bar, uint8_t index, uint8_t value)
{
    qpci_io_writew(dev, bar, 0, value << 8 | index);
}

/*
 * Catches: a blit that waits for data from the CPU, and swallows what the guest
 * writes to video memory when it was restored to before; one that was saved in
 * the middle and is not at the same place.
 */
static void test_cirrus_blit(const void *machine)
{
    SnapshotVM *vm = snapshot_vm_start(
        ",verify=on", "-M %s -rtc clock=vm -vga none "
        "-device cirrus-vga,addr=7", (const char *)machine);
    QPCIDevice *dev = qpci_device_find(vm->pci, QPCI_DEVFN(7, 0));
    QPCIBar ram = qpci_iomap(dev, 0, NULL);
    QPCIBar regs = qpci_legacy_iomap(dev, 0x3ce);
    int i, n;

    qpci_device_enable(dev);
    qtest_outb(vm->qts, 0x3c2, 0x01);
    qtest_outw(vm->qts, 0x3c4, 0x1206);
    qtest_outw(vm->qts, 0x3c4, 0x0107);
    snapshot_save(vm, 0);

    /* 32 bytes wide, 2 lines, from the CPU, to 0x1000 */
    for (i = 0x20; i <= 0x33; i++) {
        gr(dev, regs, i, 0);
    }
    gr(dev, regs, 0x20, 31);
    gr(dev, regs, 0x22, 1);
    gr(dev, regs, 0x24, 64);
    gr(dev, regs, 0x26, 32);
    gr(dev, regs, 0x29, 0x10);
    gr(dev, regs, 0x30, 0x04);
    gr(dev, regs, 0x32, 0x0d);
    gr(dev, regs, 0x31, 0x02);
    for (n = 0; n < 16; n++) {
        qpci_io_writeb(dev, ram, n, 0x80 + n);
    }
    snapshot_save(vm, 1);
    for (i = 0; i < 3; i++) {
        snapshot_restore(vm, 0);
        assert_exact(vm);
        qpci_io_writel(dev, ram, 0x2000, 0x12345678 + i);
        g_assert_cmphex(qpci_io_readl(dev, ram, 0x2000), ==, 0x12345678 + i);

        snapshot_restore(vm, 1);
        for (n = 16; n < 64; n++) {
            qpci_io_writeb(dev, ram, 0, 0x80 + n);
        }
        for (n = 0; n < 64; n++) {
            g_assert_cmphex(qpci_io_readb(dev, ram,
                                          0x1000 + n / 32 * 64 + n % 32), ==,
                            0x80 + n);
        }
    }
    assert_never_differed(vm);
    g_free(dev);
    snapshot_vm_end(vm);
}

/* Registers of the ESP, as the AMD 53C974 has them */
#define ESP_TCLO 0x00
#define ESP_FIFO 0x08
#define ESP_CMD 0x0c
#define ESP_RSTAT 0x10
#define ESP_WBUSID 0x10
#define ESP_RINTR 0x14
#define ESP_RFLAGS 0x1c

static void esp_inquiry(QPCIDevice *dev, QPCIBar bar)
{
    static const uint8_t cdb[] = { 0x80, 0x12, 0, 0, 0, 36, 0 };
    unsigned i;

    qpci_io_writeb(dev, bar, ESP_CMD, 0x01);
    qpci_io_writeb(dev, bar, ESP_WBUSID, 0);
    for (i = 0; i < sizeof(cdb); i++) {
        qpci_io_writeb(dev, bar, ESP_FIFO, cdb[i]);
    }
    qpci_io_writeb(dev, bar, ESP_CMD, 0x42);
    /* In the data phase */
    g_assert_cmphex(qpci_io_readb(dev, bar, ESP_RSTAT) & 7, ==, 1);
    qpci_io_readb(dev, bar, ESP_RINTR);
}

static uint8_t esp_byte(QPCIDevice *dev, QPCIBar bar)
{
    qpci_io_writeb(dev, bar, ESP_CMD, 0x10);
    qpci_io_readb(dev, bar, ESP_RINTR);
    return qpci_io_readb(dev, bar, ESP_FIFO);
}

/*
 * Catches: a request that was saved while the guest had yet to fetch its data,
 * and is loaded without all that the controller knows of it.
 */
static void test_esp(const void *machine)
{
    SnapshotVM *vm = snapshot_vm_start(
        ",verify=on", "-M %s -rtc clock=vm -nodefaults -device am53c974,addr=7 "
        "-blockdev null-co,node-name=d,size=67108864,read-only=on "
        "-device scsi-cd,drive=d,scsi-id=0,vendor=SNAPSHOT,product=HOOKS",
        (const char *)machine);
    QPCIDevice *dev = qpci_device_find(vm->pci, QPCI_DEVFN(7, 0));
    QPCIBar bar = qpci_iomap(dev, 0, NULL);
    char saved[37] = "", found[37];
    int i, n;

    qpci_device_enable(dev);
    esp_inquiry(dev, bar);
    for (i = 0; i < 9; i++) {
        saved[i] = esp_byte(dev, bar);
    }
    snapshot_save(vm, 0);
    for (; i < 36; i++) {
        saved[i] = esp_byte(dev, bar);
    }
    g_assert_cmpmem(saved + 8, 8, "SNAPSHOT", 8);
    for (n = 0; n < 3; n++) {
        if (n == 1) {
            esp_inquiry(dev, bar);
        }
        snapshot_restore(vm, 0);
        assert_exact(vm);
        memcpy(found, saved, 9);
        for (i = 9; i < 36; i++) {
            found[i] = esp_byte(dev, bar);
        }
        g_assert_cmpmem(found, 36, saved, 36);
        /* The request ends, with its status. */
        g_assert_cmphex(qpci_io_readb(dev, bar, ESP_RSTAT) & 7, ==, 3);
    }
    assert_never_differed(vm);
    g_free(dev);
    snapshot_vm_end(vm);
}

/*
 * Catches: a loader that takes what a guest has written for the beginning of a
 * subsection.  The controller keeps commands where its section has a structure
 * that has none: one that goes on behind the end of the section, and one that
 * nobody has.
 */
static void test_esp_subsection(const void *machine)
{
    static const char cdbs[2][12] = { "\x05\xff", "\x05\x07" "Fifo8/x" };
    SnapshotVM *vm = snapshot_vm_start(
        ",verify=on", "-M %s -rtc clock=vm -nodefaults -device am53c974,addr=7 "
        "-blockdev null-co,node-name=d,size=67108864,read-only=on "
        "-device scsi-cd,drive=d,scsi-id=0", (const char *)machine);
    QPCIDevice *dev = qpci_device_find(vm->pci, QPCI_DEVFN(7, 0));
    QPCIBar bar = qpci_iomap(dev, 0, NULL);
    unsigned i, n;

    qpci_device_enable(dev);
    for (n = 0; n < ARRAY_SIZE(cdbs); n++) {
        qpci_io_writeb(dev, bar, ESP_CMD, 0x01);
        qpci_io_writeb(dev, bar, ESP_WBUSID, 0);
        for (i = 0; i < sizeof(cdbs[n]); i++) {
            qpci_io_writeb(dev, bar, ESP_FIFO, cdbs[n][i]);
        }
        qpci_io_writeb(dev, bar, ESP_CMD, 0x41);
        /* In the status phase */
        g_assert_cmphex(qpci_io_readb(dev, bar, ESP_RSTAT) & 7, ==, 3);
        snapshot_save(vm, 0);
        esp_inquiry(dev, bar);
        snapshot_restore(vm, 0);
        assert_exact(vm);
        g_assert_cmphex(qpci_io_readb(dev, bar, ESP_RSTAT) & 7, ==, 3);
    }
    assert_never_differed(vm);
    g_free(dev);
    snapshot_vm_end(vm);
}

#define LSI_SCRIPT 0x20000
#define LSI_DATA 0x22000

static SnapshotVM *start_lsi(const char *machine, const char *drive,
                             QPCIDevice **dev, QPCIBar *bar)
{
    SnapshotVM *vm = snapshot_vm_start(
        ",verify=on,disks=keep", "-M %s -rtc clock=vm -nodefaults "
        "-device lsi53c895a,addr=7 %s", machine, drive);

    *dev = qpci_device_find(vm->pci, QPCI_DEVFN(7, 0));
    *bar = qpci_iomap(*dev, 1, NULL);
    qpci_device_enable(*dev);
    return vm;
}

static void lsi_run(SnapshotVM *vm, QPCIDevice *dev, QPCIBar bar,
                    const uint32_t *script, unsigned n)
{
    unsigned i;

    for (i = 0; i < n; i++) {
        qtest_writel(vm->qts, LSI_SCRIPT + i * 4, script[i]);
    }
    qpci_io_writel(dev, bar, 0x2c, LSI_SCRIPT);
    g_usleep(20000);
    qpci_io_readb(dev, bar, 0x0c);
}

/* READ (10) of a sector; the first command reports a unit attention. */
static void lsi_read(SnapshotVM *vm, QPCIDevice *dev, QPCIBar bar)
{
    /* SELECT 0; MOVE, when MSG OUT; MOVE, when CMD; INT */
    static const uint32_t script[] = {
        0x41000000, 0,
        0x0e000001, 0x21000,
        0x0a00000a, 0x21010,
        0x98080000, 0x1234,
    };
    static const uint8_t cdb[10] = { 0x28, 0, 0, 0, 0, 3, 0, 0, 1 };

    qtest_writeb(vm->qts, 0x21000, 0xc0);
    qtest_memwrite(vm->qts, 0x21010, cdb, sizeof(cdb));
    lsi_run(vm, dev, bar, script, ARRAY_SIZE(script));
    /* Give up the bus. */
    qpci_io_writeb(dev, bar, 0x01, 0);
    lsi_run(vm, dev, bar, script, ARRAY_SIZE(script));
}

/*
 * Catches: a save that ends QEMU while a SCSI request waits for the guest's
 * script; and one that is accepted, and loses the request or its data.
 */
static void test_lsi(const void *machine)
{
    /*
     * MOVE, when MSG IN; WAIT DISCONNECT; WAIT RESELECT; MOVE, when MSG IN;
     * MOVE, when DATA IN; INT
     */
    static const uint32_t script[] = {
        0x0f000002, 0x21020,
        0x48000000, 0,
        0x50000000, 0,
        0x0f000001, 0x21020,
        0x09000200, LSI_DATA,
        0x98080000, 0x5678,
    };
    QPCIDevice *dev;
    QPCIBar bar;
    SnapshotVM *vm = start_lsi(
        machine, "-blockdev null-co,node-name=d,size=67108864,read-zeroes=on "
        "-device scsi-hd,drive=d,scsi-id=0", &dev, &bar);
    uint8_t found[512];
    unsigned i, n;

    snapshot_save(vm, 1);
    lsi_read(vm, dev, bar);
    qtest_memset(vm->qts, LSI_DATA, 0xaa, sizeof(found));
    snapshot_save(vm, 0);
    for (n = 0; n < 4; n++) {
        lsi_run(vm, dev, bar, script, ARRAY_SIZE(script));
        g_assert_cmphex(qpci_io_readl(dev, bar, 0x30), ==, 0x5678);
        qtest_memread(vm->qts, LSI_DATA, found, sizeof(found));
        for (i = 0; i < sizeof(found); i++) {
            g_assert_cmphex(found[i], ==, 0);
        }
        if (n & 1) {
            snapshot_restore(vm, 1);
        }
        snapshot_restore(vm, 0);
        assert_exact(vm);
    }
    assert_never_differed(vm);
    g_free(dev);
    snapshot_vm_end(vm);
}

/* Catches: the same, where it failed and is to be tried again. */
static void test_lsi_retry(const void *machine)
{
    QPCIDevice *dev;
    QPCIBar bar;
    SnapshotVM *vm = start_lsi(
        machine, "-blockdev null-co,node-name=n,size=67108864,read-zeroes=on "
        "-blockdev blkdebug,node-name=d,image=n,inject-error.0.event=none,"
        "inject-error.0.iotype=read,inject-error.0.errno=5 "
        "-device scsi-hd,drive=d,scsi-id=0,rerror=stop", &dev, &bar);
    int i;

    snapshot_save(vm, 1);
    lsi_read(vm, dev, bar);
    wait_for_state(vm, "io-error");
    snapshot_qmp(vm, "save", 0);
    for (i = 0; i < 3; i++) {
        snapshot_qmp(vm, "restore", 1);
        snapshot_qmp(vm, "restore", 0);
        assert_exact(vm);
        cont(vm);
        wait_for_state(vm, "io-error");
    }
    snapshot_qmp(vm, "restore", 1);
    cont(vm);
    g_usleep(50000);
    snapshot_assert_state(vm, "running");
    assert_never_differed(vm);
    g_free(dev);
    snapshot_vm_end(vm);
}

/*
 * Catches: an AHCI port whose guest has changed the address of a list while its
 * engine runs, to where there is no memory: the save is accepted, and the
 * restore is not carried out.
 */
static void test_ahci_address(const void *machine)
{
    SnapshotVM *vm = snapshot_vm_start(",verify=on", "-M %s -rtc clock=vm "
                                       "-device ich9-ahci,addr=7",
                                       (const char *)machine);
    QPCIDevice *dev = qpci_device_find(vm->pci, QPCI_DEVFN(7, 0));
    QPCIBar bar = qpci_iomap(dev, 5, NULL);
    uint32_t cmd = 0;
    unsigned port;
    int i;

    qpci_device_enable(dev);
    /* All ports: a few bytes are mapped even where there is no memory. */
    for (port = 0x100; port < 0x100 + 6 * 0x80; port += 0x80) {
        qpci_io_writel(dev, bar, port + 0x00, 0x100000);
        qpci_io_writel(dev, bar, port + 0x08, 0x101000);
        cmd = qpci_io_readl(dev, bar, port + 0x18);
        qpci_io_writel(dev, bar, port + 0x18, cmd | 0x10);
        qpci_io_writel(dev, bar, port + 0x18, cmd | 0x11);
        cmd = qpci_io_readl(dev, bar, port + 0x18);
        g_assert_cmphex(cmd & 0xc011, ==, 0xc011);
        qpci_io_writel(dev, bar, port + 0x04, 0xff000000);
        qpci_io_writel(dev, bar, port + 0x0c, 0xff000000);
    }
    port -= 0x80;
    snapshot_save(vm, 0);
    for (i = 0; i < 3; i++) {
        if (i == 1) {
            qpci_io_writel(dev, bar, port + 0x18, cmd & ~0x11);
        }
        snapshot_restore(vm, 0);
        g_assert_cmphex(qpci_io_readl(dev, bar, port + 0x18), ==, cmd);
        assert_exact(vm);
    }
    /* Commands fail, and the engines can be stopped. */
    qpci_io_writel(dev, bar, port + 0x38, 1);
    qpci_io_writel(dev, bar, port + 0x18, cmd & ~0x11);
    g_assert_cmphex(qpci_io_readl(dev, bar, port + 0x18) & 0xc011, ==, 0);
    snapshot_save(vm, 0);
    snapshot_restore(vm, 0);
    assert_exact(vm);
    assert_never_differed(vm);
    g_free(dev);
    snapshot_vm_end(vm);
}

/* Disks that SeaBIOS tries to boot from; what a save says while one waits */
static const struct {
    const char *args;
    const char *refusal;
} retries[] = {
    { "-device lsi53c895a -device scsi-hd,drive=d,rerror=stop" },
    { "-device mptsas1068 -device scsi-hd,drive=d,rerror=stop" },
    { "-device virtio-scsi-pci -device scsi-hd,drive=d,rerror=stop" },
    { "-device megasas -device scsi-hd,drive=d,rerror=stop", "megasas" },
    { "-device pvscsi -device scsi-hd,drive=d,rerror=stop", "pvscsi" },
    { "-device usb-ehci -device usb-storage,drive=d,rerror=stop" },
    { "-device qemu-xhci -device usb-storage,drive=d,rerror=stop" },
    { "-device piix3-usb-uhci -device usb-storage,drive=d,rerror=stop" },
    { "-device pci-ohci -device usb-storage,drive=d,rerror=stop" },
    { "-device ide-hd,bus=ide.0,drive=d,rerror=stop" },
};

/*
 * Catches: a request that failed, stopped the machine and is to be tried again,
 * which ends QEMU when it is saved or loaded, is tried in a machine restored to
 * before it, or never again.
 */
static void test_retry(const void *ram)
{
    unsigned i;
    int n;

    for (i = 0; i < ARRAY_SIZE(retries); i++) {
        SnapshotVM vm = { };

        g_test_message("%s", retries[i].args);
        /* The guest has the PCI bus for itself. */
        vm.qts = qtest_initf(
            "-accel tcg -M pc -m 64 -nodefaults -rtc clock=vm -S "
            "-blockdev null-co,node-name=n,size=67108864,read-zeroes=on "
            "-blockdev blkdebug,node-name=d,image=n,inject-error.0.event=none,"
            "inject-error.0.iotype=read,inject-error.0.errno=5 %s "
            "-device snapshot,ram=%s,verify=on,disks=keep",
            retries[i].args, (const char *)ram);
        snapshot_qmp(&vm, "save", 1);
        cont(&vm);
        wait_for_state(&vm, "io-error");
        if (retries[i].refusal) {
            snapshot_qmp_refused(&vm, "save", 0, retries[i].refusal);
        } else {
            snapshot_qmp(&vm, "save", 0);
            for (n = 0; n < 3; n++) {
                snapshot_qmp(&vm, "restore", 1);
                snapshot_qmp(&vm, "restore", 0);
                assert_exact(&vm);
                cont(&vm);
                wait_for_state(&vm, "io-error");
            }
        }
        snapshot_qmp(&vm, "restore", 1);
        cont(&vm);
        wait_for_state(&vm, "io-error");
        assert_never_differed(&vm);
        qtest_quit(vm.qts);
    }
}

/* The first command is QEMU's own, which asks if this is a TPM. */
static void answer_once(int fd)
{
    static const uint8_t answer[] = { 0x80, 0x01, 0, 0, 0, 10, 0, 0, 1, 1 };
    uint8_t command[64];

    g_assert_cmpint(recv(fd, command, sizeof(command), 0), >, 0);
    g_assert_cmpint(send(fd, answer, sizeof(answer), MSG_NOSIGNAL), ==,
                    sizeof(answer));
}

/* Where commands of the guest's come to be left alone */
static int tpm_data = -1;

/* A TPM's process that answers what controls it, and no command of a guest's */
static void *silent_tpm(void *opaque)
{
    int fd = accept(*(int *)opaque, NULL, NULL);
    uint32_t command;

    while (true) {
        char control[CMSG_SPACE(sizeof(int))];
        struct iovec iov = { &command, sizeof(command) };
        struct msghdr msg = {
            .msg_iov = &iov,
            .msg_iovlen = 1,
            .msg_control = control,
            .msg_controllen = sizeof(control),
        };
        uint8_t request[64], reply[64] = "";
        size_t wanted = 0, length = 4;

        if (recvmsg(fd, &msg, 0) != sizeof(command)) {
            break;
        }
        if (CMSG_FIRSTHDR(&msg)) {
            memcpy(&tpm_data, CMSG_DATA(CMSG_FIRSTHDR(&msg)),
                   sizeof(tpm_data));
        }
        switch (be32_to_cpu(command)) {
        case 1: /* CMD_GET_CAPABILITY */
            stq_be_p(reply, 0xffff);
            length = 8;
            break;
        case 2: /* CMD_INIT */
            wanted = 4;
            break;
        case 4: /* CMD_GET_TPMESTABLISHED */
            length = 8;
            break;
        case 5: /* CMD_SET_LOCALITY */
            wanted = 4;
            break;
        case 12: /* CMD_GET_STATEBLOB */
            wanted = 12;
            length = 16;
            break;
        case 17: /* CMD_SET_BUFFERSIZE */
            wanted = 4;
            stl_be_p(reply + 4, 4096);
            stl_be_p(reply + 8, 4096);
            stl_be_p(reply + 12, 4096);
            length = 16;
            break;
        }
        if (wanted && recv(fd, request, wanted, MSG_WAITALL) != wanted) {
            break;
        }
        if (send(fd, reply, length, MSG_NOSIGNAL) != length) {
            break;
        }
        if (be32_to_cpu(command) == 16) { /* CMD_SET_DATAFD */
            answer_once(tpm_data);
        }
    }
    close(tpm_data);
    close(fd);
    return NULL;
}

#define TIS 0xfed40000ull

/* Catches: a save or a restore that waits for ever, the monitor with it. */
static void test_tpm_silent(const void *machine)
{
    static const uint8_t command[] = {
        0x80, 0x01, 0, 0, 0, 12, 0, 0, 0x01, 0x44, 0, 0,
    };
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    uint8_t found[sizeof(command)];
    Backend b = backend_new();
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    GThread *tpm;
    SnapshotVM *vm;
    unsigned i;

    g_strlcpy(addr.sun_path, b.path, sizeof(addr.sun_path));
    g_assert_cmpint(bind(listener, (struct sockaddr *)&addr, sizeof(addr)), ==,
                    0);
    g_assert_cmpint(listen(listener, 1), ==, 0);
    tpm = g_thread_new("tpm", silent_tpm, &listener);
    vm = snapshot_vm_start(
        "", "-M %s -rtc clock=vm -chardev socket,id=c,path=%s "
        "-tpmdev emulator,id=t,chardev=c -device tpm-tis,tpmdev=t,ppi=off",
        (const char *)machine, b.path);
    snapshot_qmp(vm, "save", 1);
    qtest_writeb(vm->qts, TIS, 0x02);
    qtest_writel(vm->qts, TIS + 0x18, 0x40);
    for (i = 0; i < sizeof(command); i++) {
        qtest_writeb(vm->qts, TIS + 0x24, command[i]);
    }
    qtest_writel(vm->qts, TIS + 0x18, 0x20);
    /* It has the command, and keeps it. */
    g_assert_cmpint(recv(tpm_data, found, sizeof(found), MSG_WAITALL), ==,
                    sizeof(found));
    g_assert_cmpmem(found, sizeof(found), command, sizeof(command));
    snapshot_qmp_refused(vm, "save", 0, "tpm");
    snapshot_qmp_refused(vm, "restore", 1, "tpm");
    snapshot_assert_state(vm, "running");
    g_assert_cmpint(shutdown(tpm_data, SHUT_RDWR), ==, 0);
    snapshot_vm_end(vm);
    g_thread_join(tpm);
    close(listener);
    backend_free(&b);
}

#define UEFI_VARS 0xfef10000ull

/*
 * Catches: a transfer buffer that is lost with each load, and a file of
 * variables that is written and synced though it is the same.
 */
static void test_uefi_vars(const void *machine)
{
    g_autofree char *dir = g_dir_make_tmp("snapshot-hooks-XXXXXX", NULL);
    g_autofree char *path = g_build_filename(dir, "vars.json", NULL);
    SnapshotVM *vm = snapshot_vm_start(
        ",verify=on", "-M %s -m 32 -rtc clock=vm "
        "-device uefi-vars-x64,jsonfile=%s", (const char *)machine, path);
    struct stat saved, found;
    int64_t before;
    int i;

    g_assert_cmphex(qtest_readw(vm->qts, UEFI_VARS), ==, 0xef1);
    qtest_writel(vm->qts, UEFI_VARS + 0x04, 64 * KiB);
    snapshot_save(vm, 0);
    for (i = 0; i < 50; i++) {
        snapshot_qmp(vm, "restore", 0);
    }
    g_assert_cmpint(stat(path, &saved), ==, 0);
    before = snapshot_resident(vm);
    for (i = 0; i < 300; i++) {
        snapshot_qmp(vm, "restore", 0);
    }
    g_assert_cmpint(snapshot_resident(vm) - before, <, 8 * MiB);
    g_assert_cmpint(stat(path, &found), ==, 0);
    g_assert_cmpint(found.st_mtim.tv_sec, ==, saved.st_mtim.tv_sec);
    g_assert_cmpint(found.st_mtim.tv_nsec, ==, saved.st_mtim.tv_nsec);
    assert_never_differed(vm);
    snapshot_vm_end(vm);
    unlink(path);
    rmdir(dir);
}

/*
 * All devices that can be had without a guest, in machines with room for them:
 * none of them differs, and no memory is lost.
 */
static const char *const crowds[] = {
    /* Display, character devices, watchdogs */
    "-vga none -device VGA,addr=4 -device cirrus-vga,addr=5 "
    "-device bochs-display,addr=6 -device virtio-gpu-pci,addr=7 "
    "-device pci-serial,addr=8,chardev=c -device pci-serial-4x,addr=9 "
    "-chardev null,id=c -parallel null -device tpci200,addr=10 "
    "-device ipoctal232 -device i6300esb,addr=11 -device ib700 "
    "-device pvpanic-pci,addr=12 -device secondary-vga,addr=13 "
    "-device ramfb -device vmcoreinfo",
    /* Audio */
    "-audiodev none,id=a -device AC97,addr=4,audiodev=a "
    "-device ES1370,addr=5,audiodev=a -device sb16,audiodev=a "
    "-device gus,audiodev=a -device cs4231a,audiodev=a,dma=0 "
    "-device intel-hda,addr=6 -device hda-duplex,audiodev=a",
    /* USB */
    "-device qemu-xhci,id=x,addr=4 -device usb-tablet,bus=x.0 "
    "-device usb-kbd,bus=x.0 -device usb-hub,bus=x.0 "
    "-device usb-ehci,id=e,addr=5 -device usb-mouse,bus=e.0 "
    "-device pci-ohci,id=o,addr=6 -device usb-kbd,bus=o.0 "
    "-device usb-ccid,bus=o.0 -device piix3-usb-uhci,id=u,addr=7 "
    "-device usb-mouse,bus=u.0",
    /* Disks */
    "-blockdev null-co,node-name=d0,size=67108864,read-only=on "
    "-blockdev null-co,node-name=d1,size=67108864,read-only=on "
    "-blockdev null-co,node-name=d2,size=67108864,read-only=on "
    "-blockdev null-co,node-name=d3,size=67108864,read-only=on "
    "-blockdev null-co,node-name=d4,size=67108864,read-only=on "
    "-blockdev null-co,node-name=d5,size=67108864,read-only=on "
    "-blockdev null-co,node-name=d6,size=67108864,read-only=on "
    "-device lsi53c895a,id=l,addr=4 -device scsi-cd,bus=l.0,drive=d0 "
    "-device megasas,id=m,addr=5 -device scsi-cd,bus=m.0,drive=d1 "
    "-device mptsas1068,id=n,addr=6 -device scsi-cd,bus=n.0,drive=d2 "
    "-device pvscsi,id=p,addr=7 -device scsi-cd,bus=p.0,drive=d3 "
    "-device am53c974,id=q,addr=8 -device scsi-cd,bus=q.0,drive=d4 "
    "-device usb-ehci,id=e,addr=9 -device usb-storage,bus=e.0,drive=d5 "
    "-device sdhci-pci,addr=10 -device virtio-scsi-pci,id=v,addr=11 "
    "-device scsi-cd,bus=v.0,drive=d6",
    /* What remains */
    "-device ipmi-bmc-sim,id=b -device pci-ipmi-bt,bmc=b,addr=4 "
    "-device virtio-keyboard-pci,addr=5 -device virtio-mouse-pci,addr=6 "
    "-device vmware-svga,addr=7 -vga none -device vmclock "
    "-device vmgenid -device virtio-serial-pci,addr=8",
};

/*
 * Catches: state that a hook derives anew, at once or after a reset of the
 * guest's; memory or handlers that each load takes and does not give back.
 */
static void test_crowd(const void *machine, unsigned n)
{
    SnapshotVM *vm = snapshot_vm_start(",verify=on", "-M %s -m 32 "
                                       "-rtc clock=vm %s",
                                       (const char *)machine, crowds[n]);
    int64_t least = INT64_MAX, before;
    int i, round;

    for (i = 0; i < 2; i++) {
        snapshot_save(vm, 0);
        assert_exact(vm);
        snapshot_restore(vm, 0);
        assert_exact(vm);
        system_reset(vm);
    }
    assert_never_differed(vm);
    stop(vm);
    for (i = 0; i < 50; i++) {
        snapshot_qmp(vm, "restore", 0);
    }
    cont(vm);
    /*
     * The allocator takes memory at first, and what RCU frees is freed late; a
     * leak takes it in each round.
     */
    for (round = 0; least >= 64 * KiB && round < 20; round++) {
        before = snapshot_resident(vm);
        for (i = 0; i < 100; i++) {
            snapshot_qmp(vm, "restore", 0);
        }
        least = MIN(least, snapshot_resident(vm) - before);
    }
    g_assert_cmpint(least, <, 64 * KiB);
    assert_never_differed(vm);
    snapshot_vm_end(vm);
}

#define CROWD(n) \
static void test_crowd##n(const void *machine) \
{ \
    test_crowd(machine, n); \
}

CROWD(0)
CROWD(1)
CROWD(2)
CROWD(3)
CROWD(4)

static void add_pc_tests(const char *name, GTestDataFunc test)
{
    snapshot_add_test("pc", "remap", name, test);
    snapshot_add_test("pc", "dirty", name, test);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    if (!qtest_has_device("snapshot")) {
        return 0;
    }

    snapshot_add_tests("serial-stalled", test_serial_stalled);
    snapshot_add_tests("serial-gone", test_serial_gone);
    snapshot_add_tests("serial-iir", test_serial_iir);
    snapshot_add_tests("pflash", test_pflash);
    snapshot_add_tests("no-new-generation", test_no_new_generation);
    snapshot_add_tests("new-generation", test_new_generation);
    snapshot_add_tests("xhci-unplugged", test_xhci_unplugged);
    snapshot_add_tests("sd-power-up", test_sd_power_up);
    add_pc_tests("ide-dma", test_ide_dma);
    add_pc_tests("ide-retry", test_ide_retry);
    add_pc_tests("atapi-pio", test_atapi_pio);
    add_pc_tests("floppy", test_floppy);
    snapshot_add_tests("keyboard-leds", test_keyboard_leds);
    snapshot_add_tests("keyboard-throttle", test_keyboard_throttle);
    snapshot_add_tests("rtc-slew", test_rtc_slew);
    snapshot_add_tests("ipmi-kcs", test_ipmi_kcs);
    snapshot_add_tests("ipmi-bmc", test_ipmi_bmc);
    add_pc_tests("sb16-timer", test_sb16_timer);
    snapshot_add_tests("cirrus-blit", test_cirrus_blit);
    snapshot_add_tests("esp", test_esp);
    snapshot_add_tests("esp-subsection", test_esp_subsection);
    snapshot_add_tests("lsi", test_lsi);
    snapshot_add_tests("lsi-retry", test_lsi_retry);
    snapshot_add_tests("ahci-address", test_ahci_address);
    snapshot_add_tests("uefi-vars", test_uefi_vars);
    if (qtest_has_device("tpm-tis")) {
        snapshot_add_test("q35", "dirty", "tpm-silent", test_tpm_silent);
    }
    if (qtest_has_accel("tcg")) {
        qtest_add_data_func("snapshot/pc/remap/retry", "remap", test_retry);
        qtest_add_data_func("snapshot/pc/dirty/retry", "dirty", test_retry);
    }
    add_pc_tests("display", test_crowd0);
    add_pc_tests("audio", test_crowd1);
    add_pc_tests("usb", test_crowd2);
    add_pc_tests("disks", test_crowd3);
    add_pc_tests("others", test_crowd4);
    return g_test_run();
}
