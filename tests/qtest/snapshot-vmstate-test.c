/*
 * Tests of the snapshot device: devices that QEMU could not save
 *
 * Each is saved in a state that is not that after a reset, does something else,
 * and is restored, with and without a reset before: then its registers, and
 * what it does next, are those of the save.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/sockets.h"
#include "qemu/units.h"
#include "libqos/libqos-malloc.h"
#include "libqos/malloc-pc.h"
#include "libqos/virtio.h"
#include "libqos/virtio-pci.h"
#include "qobject/qdict.h"
#include "qobject/qjson.h"
#include "snapshot-utils.h"
#include "standard-headers/linux/virtio_crypto.h"
#include "standard-headers/linux/virtio_ring.h"
#include "standard-headers/linux/pci_regs.h"
#include "standard-headers/linux/virtio_snd.h"

#define MS 1000000ll            /* of the virtual clock */

/* What a verification at the end of each restore found (verify=on). */
static void assert_never_differed(SnapshotVM *vm)
{
    QDict *info = snapshot_query(vm);

    if (qdict_get_int(info, "mismatched")) {
        g_autoptr(GString) s = qobject_to_json_pretty(QOBJECT(info), false);

        g_error("a restore was not exact: %s", s->str);
    }
    g_assert_cmpint(qdict_get_int(info, "verified"), >, 0);
    qobject_unref(info);
}

/* Restore slot 0 once more, each second time into a machine that was reset. */
static void restore(SnapshotVM *vm, int round)
{
    QPCIBar bar = vm->bar;

    if (round & 1) {
        qtest_system_reset(vm->qts);
    }
    snapshot_qmp(vm, "restore", 0);
    vm->bar = bar;
}

static QPCIDevice *find(SnapshotVM *vm, uint8_t slot)
{
    QPCIDevice *dev = qpci_device_find(vm->pci, QPCI_DEVFN(slot, 0));

    g_assert_nonnull(dev);
    qpci_device_enable(dev);
    return dev;
}

#define EDU_INVERTED    0x04
#define EDU_FACTORIAL   0x08
#define EDU_STATUS      0x20
#define EDU_COMPUTING   0x01
#define EDU_IRQFACT     0x80
#define EDU_IRQ         0x24
#define EDU_RAISE       0x60
#define EDU_LOWER       0x64
#define EDU_DMA_SRC     0x80
#define EDU_DMA_DST     0x88
#define EDU_DMA_CNT     0x90
#define EDU_DMA_CMD     0x98
#define EDU_RUN         1
#define EDU_TO_RAM      2
#define EDU_BUFFER      0x40000
#define EDU_FACT_IRQ    1
#define EDU_DMA_IRQ     0x100

typedef struct Edu {
    SnapshotVM *vm;
    QPCIDevice *dev;
    QPCIBar bar;
} Edu;

static Edu edu_start(const void *machine)
{
    Edu e;

    e.vm = snapshot_vm_start(",verify=on", "-M %s -nodefaults -m 16 "
                             "-device edu,addr=10", (const char *)machine);
    e.dev = find(e.vm, 0x10);
    e.bar = qpci_iomap(e.dev, 0, NULL);
    return e;
}

static void edu_end(Edu *e)
{
    assert_never_differed(e->vm);
    g_free(e->dev);
    snapshot_vm_end(e->vm);
}

static uint32_t edu_read(Edu *e, unsigned reg)
{
    return qpci_io_readl(e->dev, e->bar, reg);
}

static void edu_write(Edu *e, unsigned reg, uint32_t val)
{
    qpci_io_writel(e->dev, e->bar, reg, val);
}

static void edu_dma(Edu *e, uint32_t src, uint32_t dst, uint32_t cnt,
                    uint32_t cmd)
{
    edu_write(e, EDU_DMA_SRC, src);
    edu_write(e, EDU_DMA_DST, dst);
    edu_write(e, EDU_DMA_CNT, cnt);
    edu_write(e, EDU_DMA_CMD, cmd);
}

static void edu_wait(Edu *e)
{
    int tries;

    for (tries = 0; edu_read(e, EDU_STATUS) & EDU_COMPUTING; tries++) {
        g_assert_cmpint(tries, <, 30000);
        g_usleep(1000);
    }
}

/*
 * Catches: registers, the buffer or a pending transfer of edu that do not go
 * back.
 */
static void test_edu(const void *machine)
{
    Edu e = edu_start(machine);
    SnapshotVM *vm = e.vm;
    int i;

    edu_write(&e, EDU_INVERTED, 0x12345678);
    edu_write(&e, EDU_FACTORIAL, 10);
    edu_wait(&e);
    edu_write(&e, EDU_RAISE, 0x40);
    qtest_memset(vm->qts, 1 * MiB, 0x5a, 64);
    edu_dma(&e, 1 * MiB, EDU_BUFFER, 64, EDU_RUN);
    qtest_clock_step(vm->qts, 110 * MS);
    g_assert_cmphex(edu_read(&e, EDU_DMA_CMD), ==, 0);
    edu_dma(&e, EDU_BUFFER, 2 * MiB, 64, EDU_RUN | EDU_TO_RAM | 4);
    qtest_clock_step(vm->qts, 60 * MS);
    snapshot_save(vm, 0);

    for (i = 0; i < 4; i++) {
        edu_write(&e, EDU_INVERTED, i);
        edu_write(&e, EDU_LOWER, 0x40);
        edu_write(&e, EDU_RAISE, 0x80);
        edu_write(&e, EDU_FACTORIAL, i);
        edu_wait(&e);
        qtest_clock_step(vm->qts, 60 * MS);
        g_assert_cmphex(qtest_readq(vm->qts, 2 * MiB), ==,
                        0x5a5a5a5a5a5a5a5aull);
        edu_dma(&e, 3 * MiB, EDU_BUFFER, 32, EDU_RUN);
        if (i & 2) {
            qtest_clock_step(vm->qts, 110 * MS);
        }

        restore(vm, i);
        g_assert_cmphex(edu_read(&e, EDU_INVERTED), ==, ~0x12345678u);
        g_assert_cmpuint(edu_read(&e, EDU_FACTORIAL), ==, 3628800);
        g_assert_cmphex(edu_read(&e, EDU_IRQ), ==, 0x40);
        g_assert_cmphex(edu_read(&e, EDU_DMA_SRC), ==, EDU_BUFFER);
        g_assert_cmphex(edu_read(&e, EDU_DMA_DST), ==, 2 * MiB);
        g_assert_cmphex(edu_read(&e, EDU_DMA_CNT), ==, 64);
        g_assert_cmphex(edu_read(&e, EDU_DMA_CMD), ==,
                        EDU_RUN | EDU_TO_RAM | 4);
        g_assert_cmphex(qtest_readq(vm->qts, 2 * MiB), ==, 0);
        qtest_clock_step(vm->qts, 30 * MS);
        g_assert_cmphex(edu_read(&e, EDU_DMA_CMD) & EDU_RUN, ==, EDU_RUN);
        qtest_clock_step(vm->qts, 20 * MS);
        g_assert_cmphex(edu_read(&e, EDU_DMA_CMD) & EDU_RUN, ==, 0);
        g_assert_cmphex(edu_read(&e, EDU_IRQ), ==, EDU_DMA_IRQ | 0x40);
        g_assert_cmphex(qtest_readq(vm->qts, 2 * MiB), ==,
                        0x5a5a5a5a5a5a5a5aull);
        restore(vm, i);
    }
    edu_end(&e);
}

/*
 * Catches: a factorial that is lost, or is not begun again; the result of one
 * that was begun after the save, in a machine that never asked for it. Its
 * thread may end it at any time: only what it ends with is looked at.
 */
static void test_edu_factorial(const void *machine)
{
    const uint32_t slow = 100 * 1000 * 1000;
    Edu e = edu_start(machine);
    SnapshotVM *vm = e.vm;
    int i;

    edu_write(&e, EDU_STATUS, EDU_IRQFACT);
    edu_write(&e, EDU_FACTORIAL, slow);
    snapshot_save(vm, 0);
    for (i = 0; i < 4; i++) {
        edu_wait(&e);
        g_assert_cmphex(edu_read(&e, EDU_STATUS), ==, EDU_IRQFACT);
        g_assert_cmpuint(edu_read(&e, EDU_FACTORIAL), ==, 0);
        g_assert_cmphex(edu_read(&e, EDU_IRQ), ==, EDU_FACT_IRQ);
        edu_write(&e, EDU_LOWER, EDU_FACT_IRQ);
        edu_write(&e, EDU_STATUS, 0);
        edu_write(&e, EDU_FACTORIAL, 3);
        if (i & 2) {
            edu_wait(&e);
        }
        restore(vm, i);
    }
    edu_wait(&e);
    g_assert_cmpuint(edu_read(&e, EDU_FACTORIAL), ==, 0);

    edu_write(&e, EDU_LOWER, EDU_FACT_IRQ);
    edu_write(&e, EDU_FACTORIAL, 5);
    edu_wait(&e);
    edu_write(&e, EDU_LOWER, EDU_FACT_IRQ);
    snapshot_save(vm, 0);
    for (i = 0; i < 4; i++) {
        edu_write(&e, EDU_FACTORIAL, slow);
        restore(vm, i);
        g_usleep(200 * 1000);
        g_assert_cmphex(edu_read(&e, EDU_STATUS), ==, EDU_IRQFACT);
        g_assert_cmpuint(edu_read(&e, EDU_FACTORIAL), ==, 120);
        g_assert_cmphex(edu_read(&e, EDU_IRQ), ==, 0);
    }
    edu_end(&e);
}

#define TEST_OFFSET     4
#define TEST_DATA       8
#define TEST_COUNT      12
#define TEST_NAME       16

/*
 * Catches: pci-testdev's test or count that do not go back; an eventfd that is
 * registered twice, or never again, which takes what should be counted.
 */
static void test_testdev(const void *machine)
{
    SnapshotVM *vm = snapshot_vm_start(",verify=on", "-M %s -nodefaults -m 16 "
                                       "-device pci-testdev,addr=10",
                                       (const char *)machine);
    QPCIDevice *dev = find(vm, 0x10);
    QPCIBar bar = qpci_iomap(dev, 0, NULL);
    uint32_t offset;
    uint8_t data;
    int i, n;

    /* Without an eventfd, with one for any data, with one for this data */
    for (n = 0; n < 3; n++) {
        qpci_io_writeb(dev, bar, 0, 0);
        qpci_io_writeb(dev, bar, 0, n);
        offset = qpci_io_readl(dev, bar, TEST_OFFSET);
        data = qpci_io_readb(dev, bar, TEST_DATA);
        for (i = 0; i < 3; i++) {
            qpci_io_writeb(dev, bar, offset, data);
        }
        snapshot_save(vm, 0);
        for (i = 0; i < 6; i++) {
            if (i & 2) {
                qpci_io_writeb(dev, bar, 0, (n + i) % 3);
            }
            qpci_io_writeb(dev, bar, offset, data);
            restore(vm, i);
            g_assert_cmpuint(qpci_io_readl(dev, bar, TEST_COUNT), ==,
                             n ? 0 : 3);
            g_assert_cmphex(qpci_io_readl(dev, bar, TEST_OFFSET), ==, offset);
            g_assert_cmphex(qpci_io_readb(dev, bar, TEST_NAME), ==, 'm');
            qpci_io_writeb(dev, bar, offset, data);
            g_assert_cmpuint(qpci_io_readl(dev, bar, TEST_COUNT), ==,
                             n ? 0 : 4);
        }
    }
    assert_never_differed(vm);
    g_free(dev);
    snapshot_vm_end(vm);
}

/*
 * A UHCI controller with one device at its first port, and the structures that
 * it reads.  Packets are handed over one by one.
 */
#define UHCI_LIST       (1 * MiB)
#define UHCI_QH         (UHCI_LIST + 4 * KiB)
#define UHCI_TD         (UHCI_QH + 16)
#define UHCI_DATA       (UHCI_LIST + 8 * KiB)
#define UHCI_CMD        0x00
#define UHCI_FLBASE     0x08
#define UHCI_PORT       0x10
#define PORT_CONNECTED  0x01
#define PORT_ENABLE     0x04
#define PORT_RESET      0x200
#define TD_ACTIVE       (1u << 23)
#define TD_STALLED      (1u << 22)
#define PID_IN          0x69
#define PID_OUT         0xe1
#define PID_SETUP       0x2d

enum { NAK = -1, STALL = -2 };

typedef struct USB {
    SnapshotVM *vm;
    QPCIDevice *dev;
    QPCIBar bar;
} USB;

static void usb_enable_port(USB *u)
{
    qpci_io_writew(u->dev, u->bar, UHCI_PORT, PORT_RESET);
    qpci_io_writew(u->dev, u->bar, UHCI_PORT, PORT_ENABLE);
}

static USB usb_start(const void *machine, const char *device, const char *args)
{
    uint32_t list[1024];
    unsigned i;
    USB u;

    u.vm = snapshot_vm_start(",verify=on", "-M %s -nodefaults -m 16 %s "
                             "-device piix3-usb-uhci,id=usb,addr=10 "
                             "-device %s,bus=usb.0,port=1",
                             (const char *)machine, args, device);
    u.dev = find(u.vm, 0x10);
    u.bar = qpci_iomap(u.dev, 4, NULL);
    for (i = 0; i < ARRAY_SIZE(list); i++) {
        list[i] = cpu_to_le32(UHCI_QH | 2);
    }
    qtest_memwrite(u.vm->qts, UHCI_LIST, list, sizeof(list));
    qtest_writel(u.vm->qts, UHCI_QH, 1);
    qtest_writel(u.vm->qts, UHCI_QH + 4, 1);
    qpci_io_writel(u.dev, u.bar, UHCI_FLBASE, UHCI_LIST);
    qpci_io_writew(u.dev, u.bar, UHCI_CMD, 1);
    usb_enable_port(&u);
    return u;
}

static void usb_end(USB *u)
{
    assert_never_differed(u->vm);
    g_free(u->dev);
    snapshot_vm_end(u->vm);
}

/* Returns: the number of bytes, NAK or STALL */
static int usb_packet(USB *u, uint8_t pid, unsigned ep, void *data, size_t len)
{
    QTestState *qts = u->vm->qts;
    uint32_t status;

    if (pid != PID_IN && len) {
        qtest_memwrite(qts, UHCI_DATA, data, len);
    }
    qtest_writel(qts, UHCI_TD, 1);
    qtest_writel(qts, UHCI_TD + 4, TD_ACTIVE);
    qtest_writel(qts, UHCI_TD + 8, pid | ep << 15 |
                 (uint32_t)((len - 1) & 0x7ff) << 21);
    qtest_writel(qts, UHCI_TD + 12, UHCI_DATA);
    qtest_writel(qts, UHCI_QH + 4, UHCI_TD);
    qtest_clock_step(qts, 2 * MS);
    status = qtest_readl(qts, UHCI_TD + 4);
    qtest_writel(qts, UHCI_QH + 4, 1);
    if (status & TD_ACTIVE) {
        return NAK;
    }
    if (status & TD_STALLED) {
        return STALL;
    }
    len = (status + 1) & 0x7ff;
    if (pid == PID_IN && len) {
        qtest_memread(qts, UHCI_DATA, data, len);
    }
    return len;
}

static void usb_setup(USB *u, uint8_t type, uint8_t request, uint16_t value,
                      uint16_t index, uint16_t length)
{
    uint8_t setup[8] = { type, request, value, value >> 8, index, index >> 8,
                         length, length >> 8 };

    g_assert_cmpint(usb_packet(u, PID_SETUP, 0, setup, 8), ==, 8);
}

static int usb_control(USB *u, uint8_t type, uint8_t request, uint16_t value,
                       uint16_t index, void *data, uint16_t length)
{
    int got = 0;

    usb_setup(u, type, request, value, index, length);
    if (type & 0x80) {
        got = usb_packet(u, PID_IN, 0, data, length);
        g_assert_cmpint(usb_packet(u, PID_OUT, 0, NULL, 0), ==, 0);
    } else {
        if (length) {
            got = usb_packet(u, PID_OUT, 0, data, length);
        }
        g_assert_cmpint(usb_packet(u, PID_IN, 0, NULL, 0), ==, 0);
    }
    return got;
}

static void usb_assert_configuration(USB *u, uint8_t expected)
{
    uint8_t value;

    g_assert_cmpint(usb_control(u, 0x80, 8, 0, 0, &value, 1), ==, 1);
    g_assert_cmpint(value, ==, expected);
}

static void usb_set_configuration(USB *u, uint8_t value)
{
    usb_control(u, 0, 9, value, 0, NULL, 0);
    usb_assert_configuration(u, value);
}

/* What the device gets from the host, which takes its time */
static int usb_wait_for(USB *u, unsigned ep, void *data, size_t len)
{
    int got, tries;

    for (tries = 0; (got = usb_packet(u, PID_IN, ep, data, len)) == NAK;
         tries++) {
        g_assert_cmpint(tries, <, 5000);
        g_usleep(1000);
    }
    return got;
}

/*
 * Catches: a configuration that is not restored, of any USB device; a
 * descriptor that is read in parts, of which one is that of another.
 */
static void test_usb(const void *machine)
{
    USB u = usb_start(machine, "usb-mouse", "");
    uint8_t all[64], part[64];
    int i;

    g_assert_cmpint(usb_control(&u, 0x80, 6, 0x100, 0, all, 18), ==, 18);
    usb_set_configuration(&u, 1);
    usb_setup(&u, 0x80, 6, 0x100, 0, 18);
    g_assert_cmpint(usb_packet(&u, PID_IN, 0, part, 8), ==, 8);
    snapshot_save(u.vm, 0);
    for (i = 0; i < 4; i++) {
        usb_control(&u, 0x80, 6, 0x200, 0, part, 34);
        usb_set_configuration(&u, 0);
        restore(u.vm, i);
        g_assert_cmpint(usb_packet(&u, PID_IN, 0, part, 10), ==, 10);
        g_assert_cmpmem(part, 10, all + 8, 10);
        g_assert_cmpint(usb_packet(&u, PID_OUT, 0, NULL, 0), ==, 0);
        usb_assert_configuration(&u, 1);
    }
    usb_end(&u);
}

#define RNDIS           2       /* the configuration */
#define RNDIS_PACKET    1
#define RNDIS_QUERY     4
#define RNDIS_SET       5
#define OID_FILTER      0x0001010e
#define OID_LIST        0x00010101
#define PACKET_HEADER   44
#define FRAME           100

static void rndis_send(USB *u, uint32_t type, uint32_t id, uint32_t oid)
{
    uint32_t msg[8] = { type, 32, id, oid, 4, 20, 0, 1 };
    unsigned i;

    for (i = 0; i < ARRAY_SIZE(msg); i++) {
        msg[i] = cpu_to_le32(msg[i]);
    }
    g_assert_cmpint(usb_control(u, 0x21, 0, 0, 0, msg, sizeof(msg)), ==,
                    sizeof(msg));
}

/* Returns: which request is answered, 0 if none is */
static uint32_t rndis_answer(USB *u)
{
    uint32_t msg[64];
    int got = usb_control(u, 0xa1, 1, 0, 0, msg, sizeof(msg));

    return got > 1 ? le32_to_cpu(msg[2]) : 0;
}

static void net_send(int fd, uint8_t with)
{
    uint8_t packet[4 + FRAME] = { 0, 0, 0, FRAME };

    memset(packet + 4, with, FRAME);
    g_assert_cmpint(write(fd, packet, sizeof(packet)), ==, sizeof(packet));
}

/* A frame that net_out() sent */
static void net_expect(int fd, uint8_t first, uint8_t second)
{
    const size_t half = (PACKET_HEADER + FRAME) / 2;
    uint8_t packet[4 + FRAME], expected[4 + FRAME] = { 0, 0, 0, FRAME };

    memset(expected + 4, first, half - PACKET_HEADER);
    memset(expected + 4 + half - PACKET_HEADER, second, half);
    g_assert_cmpint(recv(fd, packet, sizeof(packet), MSG_WAITALL), ==,
                    sizeof(packet));
    g_assert_cmpmem(packet, sizeof(packet), expected, sizeof(packet));
}

/* Send the first or the second half of a frame */
static void net_out(USB *u, bool second, uint8_t with)
{
    uint8_t packet[PACKET_HEADER + FRAME] = { };
    size_t half = sizeof(packet) / 2;

    stl_le_p(packet, RNDIS_PACKET);
    stl_le_p(packet + 4, sizeof(packet));
    stl_le_p(packet + 8, PACKET_HEADER - 8);
    stl_le_p(packet + 12, FRAME);
    memset(packet + PACKET_HEADER, with, FRAME);
    g_assert_cmpint(usb_packet(u, PID_OUT, 2, packet + (second ? half : 0),
                               half), ==, half);
}

/*
 * Catches: usb-net's configuration, answers that were not fetched, or parts of
 * packets in either direction that are not restored; a network that waits for
 * ever for a buffer that became empty by a restore.
 */
static void test_usb_net(const void *machine)
{
    const size_t all = PACKET_HEADER + FRAME;
    g_autofree char *args = NULL;
    uint8_t in[256], expected[FRAME];
    int sv[2], i;
    USB u;

    g_assert_cmpint(socketpair(PF_UNIX, SOCK_STREAM, 0, sv), ==, 0);
    args = g_strdup_printf("-netdev socket,id=n,fd=%d", sv[1]);
    u = usb_start(machine, "usb-net,netdev=n", args);
    close(sv[1]);
    usb_set_configuration(&u, RNDIS);
    rndis_send(&u, RNDIS_SET, 1, OID_FILTER);
    g_assert_cmpuint(rndis_answer(&u), ==, 1);

    rndis_send(&u, RNDIS_QUERY, 2, OID_LIST);
    rndis_send(&u, RNDIS_QUERY, 3, OID_FILTER);
    net_out(&u, false, 0x11);
    snapshot_save(u.vm, 1);
    net_send(sv[0], 0x22);
    g_assert_cmpint(usb_wait_for(&u, 2, in, 64), ==, 64);
    snapshot_save(u.vm, 0);

    for (i = 0; i < 4; i++) {
        g_assert_cmpuint(rndis_answer(&u), ==, 2);
        if (i & 2) {
            rndis_send(&u, RNDIS_QUERY, 4, OID_LIST);
        } else {
            net_send(sv[0], 0x33);
        }
        net_out(&u, true, 0x44);
        net_expect(sv[0], 0x11, 0x44);
        if (i & 1) {
            usb_set_configuration(&u, 1);
        }
        restore(u.vm, i);

        usb_assert_configuration(&u, RNDIS);
        g_assert_cmpuint(rndis_answer(&u), ==, 2);
        g_assert_cmpuint(rndis_answer(&u), ==, 3);
        g_assert_cmpuint(rndis_answer(&u), ==, 0);
        g_assert_cmpint(usb_packet(&u, PID_IN, 2, in, sizeof(in)), ==,
                        all - 64);
        memset(expected, 0x22, sizeof(expected));
        g_assert_cmpmem(in, all - 64, expected, all - 64);
        net_out(&u, true, 0x77);
        net_expect(sv[0], 0x11, 0x77);
        restore(u.vm, i);
    }

    for (i = 0; i < 4; i++) {
        /* One is in the buffer, and another one waits for it. */
        net_send(sv[0], 0x55);
        g_usleep(10 * 1000);
        snapshot_qmp(u.vm, "restore", 1);
        net_send(sv[0], 0x66);
        do {
            g_assert_cmpint(usb_wait_for(&u, 2, in, sizeof(in)), ==, all);
        } while (in[PACKET_HEADER] != 0x66);
        snapshot_qmp(u.vm, "restore", 0);
    }
    close(sv[0]);
    usb_end(&u);
}

#define FTDI_SET_EVENT_CHR      6
#define FTDI_SET_LATENCY        9
#define FTDI_GET_LATENCY        10

/*
 * Catches: usb-serial's registers, or the characters that it has received, that
 * are not restored; a device that is there though its back end is not, or the
 * other way round, after a restore.
 */
static void test_usb_serial(const void *machine)
{
    g_autofree char *dir = g_dir_make_tmp("snapshot-vmstate-XXXXXX", NULL);
    g_autofree char *path = g_build_filename(dir, "socket", NULL);
    g_autofree char *args = g_strdup_printf(
        "-chardev socket,id=c,path=%s,server=on,wait=off", path);
    USB u = usb_start(machine, "usb-serial,chardev=c", args);
    Error *err = NULL;
    uint8_t in[64];
    int fd, i;

    snapshot_save(u.vm, 1);
    fd = unix_connect(path, &err);
    g_assert_null(err);
    for (i = 0; !(qpci_io_readw(u.dev, u.bar, UHCI_PORT) & PORT_CONNECTED);
         i++) {
        g_assert_cmpint(i, <, 5000);
        g_usleep(1000);
    }
    usb_enable_port(&u);
    usb_set_configuration(&u, 1);
    usb_control(&u, 0x40, FTDI_SET_LATENCY, 33, 0, NULL, 0);
    g_assert_cmpint(write(fd, "hello", 5), ==, 5);
    g_assert_cmpint(usb_wait_for(&u, 1, in, 4), ==, 4);
    g_assert_cmpmem(in + 2, 2, "he", 2);
    snapshot_save(u.vm, 0);

    for (i = 0; i < 4; i++) {
        usb_control(&u, 0x40, FTDI_SET_LATENCY, 44, 0, NULL, 0);
        usb_set_configuration(&u, 0);
        if (i & 2) {
            g_assert_cmpint(usb_packet(&u, PID_IN, 1, in, 64), ==, 5);
            g_assert_cmpint(write(fd, "others", 6), ==, 6);
            g_assert_cmpint(usb_wait_for(&u, 1, in, 3), ==, 3);
        }
        restore(u.vm, i);
        usb_assert_configuration(&u, 1);
        g_assert_cmpint(usb_control(&u, 0xc0, FTDI_GET_LATENCY, 0, 0, in, 1),
                        ==, 1);
        g_assert_cmpint(in[0], ==, 33);
        g_assert_cmpint(usb_packet(&u, PID_IN, 1, in, 64), ==, 5);
        g_assert_cmpmem(in + 2, 3, "llo", 3);
        g_assert_cmpint(usb_packet(&u, PID_IN, 1, in, 64), ==, NAK);
        restore(u.vm, i);
    }

    snapshot_qmp(u.vm, "restore", 1);
    for (i = 0; !(qpci_io_readw(u.dev, u.bar, UHCI_PORT) & PORT_CONNECTED);
         i++) {
        g_assert_cmpint(i, <, 5000);
        g_usleep(1000);
    }
    snapshot_qmp(u.vm, "restore", 0);
    close(fd);
    for (i = 0; qpci_io_readw(u.dev, u.bar, UHCI_PORT) & PORT_CONNECTED; i++) {
        g_assert_cmpint(i, <, 5000);
        g_usleep(1000);
    }
    snapshot_qmp(u.vm, "restore", 0);
    for (i = 0; qpci_io_readw(u.dev, u.bar, UHCI_PORT) & PORT_CONNECTED; i++) {
        g_assert_cmpint(i, <, 5000);
        g_usleep(1000);
    }
    usb_end(&u);
    unlink(path);
    rmdir(dir);
}

/* A virtio device with its queues, and what their driver knows of them */
#define MAX_QUEUES      4
#define VIRTIO_DATA     (8 * MiB)

typedef struct Virtio {
    SnapshotVM *vm;
    QVirtioPCIDevice *pci;
    QVirtioDevice *d;
    QGuestAllocator alloc;
    QVirtQueue *vq[MAX_QUEUES];
    QVirtQueue saved[MAX_QUEUES];
    unsigned nr;
} Virtio;

static void virtio_init(Virtio *v)
{
    unsigned i;

    qvirtio_start_device(v->d);
    qvirtio_set_features(v->d, qvirtio_get_features(v->d) &
                         ~(QVIRTIO_F_BAD_FEATURE |
                           1ull << VIRTIO_RING_F_INDIRECT_DESC |
                           1ull << VIRTIO_RING_F_EVENT_IDX));
    for (i = 0; i < v->nr; i++) {
        v->vq[i] = qvirtqueue_setup(v->d, &v->alloc, i);
    }
    qvirtio_set_driver_ok(v->d);
}

static void virtio_free_queues(Virtio *v)
{
    unsigned i;

    for (i = 0; i < v->nr; i++) {
        qvirtqueue_cleanup(v->d->bus, v->vq[i], &v->alloc);
    }
}

static Virtio virtio_start(const void *machine, const char *device,
                           unsigned queues, const char *args)
{
    QPCIAddress addr = { .devfn = QPCI_DEVFN(0x10, 0) };
    Virtio v = { .nr = queues };

    v.vm = snapshot_vm_start(",verify=on", "-M %s -nodefaults -m 32 %s "
                             "-device %s,addr=10",
                             (const char *)machine, args, device);
    pc_alloc_init(&v.alloc, v.vm->qts, ALLOC_NO_FLAGS);
    v.pci = virtio_pci_new(v.vm->pci, &addr);
    v.d = &v.pci->vdev;
    qvirtio_pci_device_enable(v.pci);
    virtio_init(&v);
    return v;
}

static void virtio_end(Virtio *v)
{
    assert_never_differed(v->vm);
    virtio_free_queues(v);
    g_free(v->pci->pdev);
    g_free(v->pci);
    alloc_destroy(&v->alloc);
    snapshot_vm_end(v->vm);
}

static void virtio_save(Virtio *v)
{
    unsigned i;

    snapshot_save(v->vm, 0);
    for (i = 0; i < v->nr; i++) {
        v->saved[i] = *v->vq[i];
    }
}

static void virtio_restore(Virtio *v, int round)
{
    unsigned i;

    restore(v->vm, round);
    for (i = 0; i < v->nr; i++) {
        *v->vq[i] = v->saved[i];
    }
}

/* How many requests of a queue were completed since its begin */
static uint16_t virtio_used(Virtio *v, unsigned queue)
{
    return qtest_readw(v->vm->qts, v->vq[queue]->used + 2);
}

/* Send @out at @addr, with room for @in bytes behind it, and do not wait. */
static uint32_t virtio_send(Virtio *v, unsigned queue, uint64_t addr,
                            const void *out, size_t size, size_t in)
{
    QTestState *qts = v->vm->qts;
    uint32_t head;

    qtest_memwrite(qts, addr, out, size);
    head = qvirtqueue_add(qts, v->vq[queue], addr, size, false, true);
    qvirtqueue_add(qts, v->vq[queue], addr + size, in, true, false);
    qvirtqueue_kick(qts, v->d, v->vq[queue], head);
    return head;
}

static void virtio_command(Virtio *v, unsigned queue, const void *out,
                           size_t size, void *in, size_t room)
{
    uint32_t head = virtio_send(v, queue, VIRTIO_DATA, out, size, room);

    qvirtio_wait_used_elem(v->vm->qts, v->d, v->vq[queue], head, NULL,
                           10 * 1000 * 1000);
    qtest_memread(v->vm->qts, VIRTIO_DATA + size, in, room);
}

enum { SND_CONTROL, SND_EVENT, SND_TX, SND_RX };

#define SND_PERIOD      4096

static void snd_command(Virtio *v, uint32_t code, uint32_t stream)
{
    struct virtio_snd_pcm_hdr hdr = {
        .hdr.code = cpu_to_le32(code),
        .stream_id = cpu_to_le32(stream),
    };
    uint32_t status;

    virtio_command(v, SND_CONTROL, &hdr, sizeof(hdr), &status, sizeof(status));
    g_assert_cmphex(le32_to_cpu(status), ==, VIRTIO_SND_S_OK);
}

static void snd_prepare(Virtio *v, uint32_t stream, uint8_t channels)
{
    struct virtio_snd_pcm_set_params params = {
        .hdr.hdr.code = cpu_to_le32(VIRTIO_SND_R_PCM_SET_PARAMS),
        .hdr.stream_id = cpu_to_le32(stream),
        .buffer_bytes = cpu_to_le32(4 * SND_PERIOD),
        .period_bytes = cpu_to_le32(SND_PERIOD),
        .channels = channels,
        .format = VIRTIO_SND_PCM_FMT_S16,
        .rate = VIRTIO_SND_PCM_RATE_44100,
    };
    uint32_t status;

    virtio_command(v, SND_CONTROL, &params, sizeof(params), &status,
                   sizeof(status));
    g_assert_cmphex(le32_to_cpu(status), ==, VIRTIO_SND_S_OK);
    snd_command(v, VIRTIO_SND_R_PCM_PREPARE, stream);
}

static uint8_t snd_channels(Virtio *v, uint32_t stream)
{
    struct virtio_snd_query_info query = {
        .hdr.code = cpu_to_le32(VIRTIO_SND_R_PCM_INFO),
        .start_id = cpu_to_le32(stream),
        .count = cpu_to_le32(1),
        .size = cpu_to_le32(sizeof(struct virtio_snd_pcm_info)),
    };
    struct {
        struct virtio_snd_hdr hdr;
        struct virtio_snd_pcm_info info;
    } QEMU_PACKED answer;

    virtio_command(v, SND_CONTROL, &query, sizeof(query), &answer,
                   sizeof(answer));
    g_assert_cmphex(le32_to_cpu(answer.hdr.code), ==, VIRTIO_SND_S_OK);
    return answer.info.channels_max;
}

/* Three periods of sound to be played, three to be recorded */
static void snd_queue(Virtio *v)
{
    g_autofree uint8_t *sound = g_malloc0(4 + SND_PERIOD);
    unsigned i;

    for (i = 0; i < 3; i++) {
        stl_le_p(sound, 0);
        virtio_send(v, SND_TX, VIRTIO_DATA + (i + 1) * 64 * KiB, sound,
                    4 + SND_PERIOD, 8);
        stl_le_p(sound, 1);
        virtio_send(v, SND_RX, VIRTIO_DATA + (i + 4) * 64 * KiB, sound, 4,
                    SND_PERIOD + 8);
    }
}

/*
 * Catches: streams of virtio-sound whose parameters are not restored, or which
 * stay stopped or started; buffers that are lost, or returned twice, or that
 * the device has kept from a driver that reset it.
 */
static void test_sound(const void *machine)
{
    Virtio v = virtio_start(machine, "virtio-sound-pci,audiodev=a", 4,
                            "-audiodev none,id=a");
    QTestState *qts = v.vm->qts;
    int i;

    for (i = 0; i < 2; i++) {
        snd_prepare(&v, i, 1);
        snd_command(&v, VIRTIO_SND_R_PCM_START, i);
    }
    snd_queue(&v);
    /* 46 ms each: something of the first ones */
    qtest_clock_step(qts, 20 * MS);
    g_assert_cmpuint(virtio_used(&v, SND_TX), <, 3);
    g_assert_cmpuint(virtio_used(&v, SND_RX), ==, 0);
    virtio_save(&v);

    for (i = 0; i < 6; i++) {
        if (i & 2) {
            qtest_clock_step(qts, 1000 * MS);
            g_assert_cmpuint(virtio_used(&v, SND_TX), ==, 3);
            g_assert_cmpuint(virtio_used(&v, SND_RX), ==, 3);
            snd_queue(&v);
        }
        if (i & 4) {
            v.d->bus->set_status(v.d, 0);
        } else {
            snd_command(&v, VIRTIO_SND_R_PCM_STOP, 0);
            snd_command(&v, VIRTIO_SND_R_PCM_STOP, 1);
            snd_prepare(&v, 0, 2);
            g_assert_cmpuint(snd_channels(&v, 0), ==, 2);
        }
        virtio_restore(&v, i);
        g_assert_cmpuint(virtio_used(&v, SND_TX), <, 3);
        g_assert_cmpuint(virtio_used(&v, SND_RX), ==, 0);
        g_assert_cmpuint(snd_channels(&v, 0), ==, 1);
        qtest_clock_step(qts, 1000 * MS);
        g_assert_cmpuint(virtio_used(&v, SND_TX), ==, 3);
        g_assert_cmpuint(virtio_used(&v, SND_RX), ==, 3);
        snd_queue(&v);
        qtest_clock_step(qts, 1000 * MS);
        g_assert_cmpuint(virtio_used(&v, SND_TX), ==, 6);
        g_assert_cmpuint(virtio_used(&v, SND_RX), ==, 6);
        virtio_restore(&v, i);
    }

    virtio_free_queues(&v);
    virtio_init(&v);
    snd_prepare(&v, 0, 1);
    snd_command(&v, VIRTIO_SND_R_PCM_START, 0);
    qtest_clock_step(qts, 1000 * MS);
    g_assert_cmpuint(virtio_used(&v, SND_TX), ==, 0);
    virtio_end(&v);
}

enum { CRYPTO_DATA, CRYPTO_CONTROL };

/* Returns: the identifier of a session that encrypts with this key */
/*
 * Catches: a driver's request to record that has no room for the answer, which
 * made the device allocate less than nothing, and write behind it.
 */
static void test_sound_no_room(const void *machine)
{
    Virtio v = virtio_start(machine, "virtio-sound-pci,audiodev=a", 4,
                            "-audiodev none,id=a");
    uint32_t stream = cpu_to_le32(1);
    size_t room;

    snd_prepare(&v, 1, 1);
    snd_command(&v, VIRTIO_SND_R_PCM_START, 1);
    for (room = 1; room < sizeof(struct virtio_snd_pcm_status); room++) {
        virtio_send(&v, SND_RX, VIRTIO_DATA + 64 * KiB, &stream, 4, room);
        g_assert_cmpuint(virtio_used(&v, SND_RX), ==, room);
    }
    virtio_save(&v);
    virtio_restore(&v, 0);
    virtio_end(&v);
}

static uint64_t crypto_create(Virtio *v, uint8_t key)
{
    struct {
        struct virtio_crypto_op_ctrl_req req;
        uint8_t key[16];
    } QEMU_PACKED msg = { };
    struct virtio_crypto_sym_create_session_req sym = { };
    struct virtio_crypto_session_input in;

    msg.req.header.opcode = cpu_to_le32(VIRTIO_CRYPTO_CIPHER_CREATE_SESSION);
    sym.op_type = cpu_to_le32(VIRTIO_CRYPTO_SYM_OP_CIPHER);
    sym.u.cipher.para.algo = cpu_to_le32(VIRTIO_CRYPTO_CIPHER_AES_CBC);
    sym.u.cipher.para.keylen = cpu_to_le32(sizeof(msg.key));
    sym.u.cipher.para.op = cpu_to_le32(VIRTIO_CRYPTO_OP_ENCRYPT);
    msg.req.u.sym_create_session = sym;
    memset(msg.key, key, sizeof(msg.key));
    virtio_command(v, CRYPTO_CONTROL, &msg, sizeof(msg), &in, sizeof(in));
    g_assert_cmphex(le32_to_cpu(in.status), ==, VIRTIO_CRYPTO_OK);
    return le64_to_cpu(in.session_id);
}

static uint8_t crypto_destroy(Virtio *v, uint64_t id)
{
    struct virtio_crypto_op_ctrl_req req = { };
    uint8_t status;

    req.header.opcode = cpu_to_le32(VIRTIO_CRYPTO_CIPHER_DESTROY_SESSION);
    req.u.destroy_session.session_id = cpu_to_le64(id);
    virtio_command(v, CRYPTO_CONTROL, &req, sizeof(req), &status, 1);
    return status;
}

typedef struct CryptoRequest {
    struct virtio_crypto_op_data_req req;
    uint8_t iv[16];
    uint8_t data[16];
} QEMU_PACKED CryptoRequest;

static CryptoRequest crypto_request(uint64_t id)
{
    struct virtio_crypto_cipher_para para = { };
    CryptoRequest msg = { };

    msg.req.header.opcode = cpu_to_le32(VIRTIO_CRYPTO_CIPHER_ENCRYPT);
    msg.req.header.session_id = cpu_to_le64(id);
    msg.req.u.sym_req.op_type = cpu_to_le32(VIRTIO_CRYPTO_SYM_OP_CIPHER);
    para.iv_len = cpu_to_le32(sizeof(msg.iv));
    para.src_data_len = cpu_to_le32(sizeof(msg.data));
    para.dst_data_len = cpu_to_le32(sizeof(msg.data));
    msg.req.u.sym_req.u.cipher.para = para;
    return msg;
}

static uint8_t crypto_encrypt(Virtio *v, uint64_t id, uint8_t result[16])
{
    CryptoRequest msg = crypto_request(id);
    uint8_t in[17];

    virtio_command(v, CRYPTO_DATA, &msg, sizeof(msg), in, sizeof(in));
    memcpy(result, in, 16);
    return in[16];
}

/*
 * Catches: sessions that are lost or have another key or identifier; sessions
 * of a later life which the back end keeps, until it has no place for more; a
 * request that is forgotten if it came when the machine was stopped.
 */
static void test_crypto(const void *machine)
{
    /* With ioeventfd, each queue is notified when the machine goes on. */
    Virtio v = virtio_start(machine,
                            "virtio-crypto-pci,cryptodev=c,ioeventfd=off", 2,
                            "-object cryptodev-backend-builtin,id=c");
    uint8_t expected[16], result[16];
    CryptoRequest msg;
    uint32_t head;
    int i, n;

    g_assert_cmpuint(crypto_create(&v, 0x11), ==, 0);
    g_assert_cmpuint(crypto_create(&v, 0x22), ==, 1);
    g_assert_cmpuint(crypto_create(&v, 0x33), ==, 2);
    g_assert_cmpuint(crypto_encrypt(&v, 2, expected), ==, VIRTIO_CRYPTO_OK);
    g_assert_cmpuint(crypto_destroy(&v, 0), ==, VIRTIO_CRYPTO_OK);
    g_assert_cmpuint(crypto_destroy(&v, 1), ==, VIRTIO_CRYPTO_OK);
    virtio_save(&v);

    for (i = 0; i < 40; i++) {
        for (n = 0; n < 9; n++) {
            crypto_create(&v, i);
        }
        if (i & 2) {
            g_assert_cmpuint(crypto_destroy(&v, 2), ==, VIRTIO_CRYPTO_OK);
        }
        virtio_restore(&v, i);
        g_assert_cmpuint(crypto_encrypt(&v, 2, result), ==, VIRTIO_CRYPTO_OK);
        g_assert_cmpmem(result, 16, expected, 16);
        g_assert_cmpuint(crypto_destroy(&v, 0), !=, VIRTIO_CRYPTO_OK);
        g_assert_cmpuint(crypto_encrypt(&v, 0, result), !=, VIRTIO_CRYPTO_OK);
        for (n = 0; n < 2; n++) {
            g_assert_cmpuint(crypto_create(&v, 0x33), ==, n);
            g_assert_cmpuint(crypto_encrypt(&v, n, result), ==,
                             VIRTIO_CRYPTO_OK);
            g_assert_cmpmem(result, 16, expected, 16);
        }
        virtio_restore(&v, i);
    }

    qtest_qmp_assert_success(v.vm->qts, "{ 'execute': 'stop' }");
    msg = crypto_request(2);
    head = virtio_send(&v, CRYPTO_DATA, VIRTIO_DATA, &msg, sizeof(msg), 17);
    qtest_qmp_assert_success(v.vm->qts, "{ 'execute': 'cont' }");
    qvirtio_wait_used_elem(v.vm->qts, v.d, v.vq[CRYPTO_DATA], head, NULL,
                           10 * 1000 * 1000);
    virtio_end(&v);
}

/* An NVMe controller with two namespaces, and its queues */
#define NVME_ASQ        (4 * MiB)
#define NVME_ACQ        (NVME_ASQ + 4 * KiB)
#define NVME_SQ         (NVME_ASQ + 8 * KiB)
#define NVME_CQ         (NVME_ASQ + 12 * KiB)
#define NVME_DATA       (NVME_ASQ + 16 * KiB)
#define NVME_ENTRIES    16
#define NVME_CC         0x14
#define NVME_CSTS       0x1c
#define NVME_AQA        0x24
#define NVME_DOORBELLS  0x1000
#define NVME_CQ_IEN     2

enum {
    NVME_CREATE_SQ = 1, NVME_GET_LOG, NVME_DELETE_CQ = 4, NVME_CREATE_CQ,
    NVME_IDENTIFY, NVME_SET_FEATURE = 9, NVME_GET_FEATURE, NVME_AER = 12,
    NVME_ATTACH = 21, NVME_DELETE_SQ = 0, NVME_READ = 2,
};

#define NVME_TEMPERATURE        4
#define NVME_WRITE_CACHE        6
#define NVME_ASYNC_CONFIG       11

typedef struct NVMe {
    SnapshotVM *vm;
    QPCIDevice *dev;
    QPCIBar bar;
    uint16_t tail, head, phase;         /* of the admin queues */
} NVMe;

static void nvme_enable(NVMe *v, uint64_t sq, uint64_t cq)
{
    int tries;

    qtest_memset(v->vm->qts, cq, 0, 4096);
    qpci_io_writel(v->dev, v->bar, NVME_CC, 0);
    qpci_io_writel(v->dev, v->bar, NVME_AQA,
                   (NVME_ENTRIES - 1) << 16 | (NVME_ENTRIES - 1));
    qpci_io_writeq(v->dev, v->bar, NVME_AQA + 4, sq);
    qpci_io_writeq(v->dev, v->bar, NVME_AQA + 12, cq);
    qpci_io_writel(v->dev, v->bar, NVME_CC, 4 << 20 | 6 << 16 | 1);
    for (tries = 0; !(qpci_io_readl(v->dev, v->bar, NVME_CSTS) & 1); tries++) {
        g_assert_cmpint(tries, <, 1000);
        g_usleep(1000);
    }
    v->tail = v->head = 0;
    v->phase = 1;
}

static void nvme_doorbell(NVMe *v, unsigned queue, bool completion,
                          uint16_t value)
{
    qpci_io_writel(v->dev, v->bar,
                   NVME_DOORBELLS + queue * 8 + completion * 4, value);
}

static void nvme_submit(NVMe *v, uint64_t at, uint8_t opcode, uint16_t cid,
                        uint32_t nsid, uint64_t data, uint32_t dw10,
                        uint32_t dw11)
{
    uint8_t cmd[64] = { opcode };

    stw_le_p(cmd + 2, cid);
    stl_le_p(cmd + 4, nsid);
    stq_le_p(cmd + 24, data);
    stl_le_p(cmd + 40, dw10);
    stl_le_p(cmd + 44, dw11);
    qtest_memwrite(v->vm->qts, at, cmd, sizeof(cmd));
}

static void nvme_send(NVMe *v, uint8_t opcode, uint16_t cid, uint32_t nsid,
                      uint32_t dw10, uint32_t dw11)
{
    nvme_submit(v, NVME_ASQ + v->tail * 64, opcode, cid, nsid, NVME_DATA, dw10,
                dw11);
    v->tail = (v->tail + 1) % NVME_ENTRIES;
    nvme_doorbell(v, 0, false, v->tail);
}

/* Returns: the result of the next completion, which has to be that of @cid */
static uint32_t nvme_wait(NVMe *v, uint16_t cid)
{
    uint64_t at = NVME_ACQ + v->head * 16;
    uint32_t result;
    int tries;

    for (tries = 0; (qtest_readw(v->vm->qts, at + 14) & 1) != v->phase;
         tries++) {
        g_assert_cmpint(tries, <, 5000);
        g_usleep(1000);
    }
    result = qtest_readl(v->vm->qts, at);
    g_assert_cmphex(qtest_readw(v->vm->qts, at + 12), ==, cid);
    g_assert_cmphex(qtest_readw(v->vm->qts, at + 14) >> 1, ==, 0);
    v->head = (v->head + 1) % NVME_ENTRIES;
    v->phase ^= !v->head;
    nvme_doorbell(v, 0, true, v->head);
    return result;
}

static uint32_t nvme_admin(NVMe *v, uint8_t opcode, uint32_t nsid,
                           uint32_t dw10, uint32_t dw11)
{
    nvme_send(v, opcode, 1, nsid, dw10, dw11);
    return nvme_wait(v, 1);
}

/* @flags: the vector, and whether it is used */
static void nvme_create_queues(NVMe *v, uint32_t flags)
{
    nvme_submit(v, NVME_ASQ + v->tail * 64, NVME_CREATE_CQ, 2, 0, NVME_CQ,
                1 << 16 | 1, flags | 1);        /* two entries, contiguous */
    v->tail = (v->tail + 1) % NVME_ENTRIES;
    nvme_submit(v, NVME_ASQ + v->tail * 64, NVME_CREATE_SQ, 3, 0, NVME_SQ,
                7 << 16 | 1, 1 << 16 | 1);
    v->tail = (v->tail + 1) % NVME_ENTRIES;
    nvme_doorbell(v, 0, false, v->tail);
    nvme_wait(v, 2);
    nvme_wait(v, 3);
}

static void nvme_delete_queues(NVMe *v)
{
    nvme_admin(v, NVME_DELETE_SQ, 0, 1, 0);
    nvme_admin(v, NVME_DELETE_CQ, 0, 1, 0);
}

/* Namespace 2, at controller 0 */
static void nvme_attach(NVMe *v, bool attach)
{
    qtest_writel(v->vm->qts, NVME_DATA, 0 << 16 | 1);
    nvme_admin(v, NVME_ATTACH, 2, !attach, 0);
}

static bool nvme_is_attached(NVMe *v)
{
    nvme_admin(v, NVME_IDENTIFY, 0, 2, 0);
    g_assert_cmpuint(qtest_readl(v->vm->qts, NVME_DATA), ==, 1);
    return qtest_readl(v->vm->qts, NVME_DATA + 4) == 2;
}

/* Returns: which of the reads is the nth to be completed */
static unsigned nvme_wait_read(NVMe *v, unsigned n)
{
    uint64_t at = NVME_CQ + n % 2 * 16;
    int tries;

    for (tries = 0; (qtest_readw(v->vm->qts, at + 14) & 1) == n / 2 % 2;
         tries++) {
        g_assert_cmpint(tries, <, 5000);
        g_usleep(1000);
    }
    g_assert_cmphex(qtest_readw(v->vm->qts, at + 14) >> 1, ==, 0);
    nvme_doorbell(v, 1, true, (n + 1) % 2);
    return qtest_readw(v->vm->qts, at + 12) - 0x100;
}

static void nvme_assert_saved(NVMe *v)
{
    unsigned i, reads = 0;

    g_assert_cmphex(nvme_admin(v, NVME_GET_FEATURE, 0, NVME_TEMPERATURE, 0),
                    ==, 0x150);
    g_assert_cmphex(nvme_admin(v, NVME_GET_FEATURE, 0, NVME_ASYNC_CONFIG, 0),
                    ==, 0x100);
    g_assert_cmphex(nvme_admin(v, NVME_GET_FEATURE, 0, NVME_WRITE_CACHE, 0),
                    ==, 0);
    g_assert_false(nvme_is_attached(v));
    for (i = 0; i < 3; i++) {
        reads |= 1 << nvme_wait_read(v, i);
    }
    g_assert_cmphex(reads, ==, 7);

    /* One event was told, and is masked until it is read. */
    nvme_admin(v, NVME_GET_LOG, 0xffffffff, 1023 << 16 | 4, 0);
    g_assert_cmpuint(qtest_readl(v->vm->qts, NVME_DATA), ==, 2);
    qtest_writel(v->vm->qts, NVME_DATA, 0 << 16 | 1);
    nvme_send(v, NVME_ATTACH, 2, 2, 0, 0);
    g_assert_cmphex(nvme_wait(v, 0xaa), ==, 0x040002);
    nvme_wait(v, 2);
    g_assert_true(nvme_is_attached(v));
}

/*
 * Catches: queues, requests that wait for a place in a full queue or for an
 * event, features, or namespaces that were detached, which are not restored; a
 * controller that keeps anything of a later life.
 */
static void test_nvme(const void *machine)
{
    SnapshotVM *vm = snapshot_vm_start(
        ",verify=on", "-M %s -nodefaults -m 16 "
        "-blockdev null-co,node-name=a,size=1048576,read-zeroes=on,"
        "read-only=on "
        "-blockdev null-co,node-name=b,size=2097152,read-zeroes=on,"
        "read-only=on "
        "-device nvme,serial=1,id=n,addr=10 "
        "-device nvme-ns,bus=n,drive=a,nsid=1 "
        "-device nvme-ns,bus=n,drive=b,nsid=2", (const char *)machine);
    NVMe v = { .vm = vm, .dev = find(vm, 0x10) }, saved;
    int i;

    v.bar = qpci_iomap(v.dev, 0, NULL);
    nvme_enable(&v, NVME_ASQ, NVME_ACQ);
    nvme_admin(&v, NVME_SET_FEATURE, 0, NVME_TEMPERATURE, 0x150);
    nvme_admin(&v, NVME_SET_FEATURE, 0, NVME_ASYNC_CONFIG, 0x100);
    nvme_admin(&v, NVME_SET_FEATURE, 0, NVME_WRITE_CACHE, 0);
    g_assert_true(nvme_is_attached(&v));
    nvme_send(&v, NVME_AER, 0xaa, 0, 0, 0);
    nvme_send(&v, NVME_AER, 0xbb, 0, 0, 0);
    qtest_writel(vm->qts, NVME_DATA, 0 << 16 | 1);
    nvme_send(&v, NVME_ATTACH, 2, 2, 1, 0);
    g_assert_cmphex(nvme_wait(&v, 0xbb), ==, 0x040002);
    nvme_wait(&v, 2);

    nvme_create_queues(&v, 0);
    for (i = 0; i < 3; i++) {
        nvme_submit(&v, NVME_SQ + i * 64, NVME_READ, 0x100 + i, 1,
                    NVME_DATA, i, 0);
    }
    nvme_doorbell(&v, 1, false, 3);
    snapshot_save(vm, 0);
    saved = v;

    for (i = 0; i < 8; i++) {
        switch (i / 2) {
        case 0:
            nvme_enable(&v, NVME_DATA, NVME_DATA + 4 * KiB);
            break;
        case 1:
            nvme_assert_saved(&v);
            nvme_delete_queues(&v);
            break;
        case 2:
            nvme_delete_queues(&v);
            nvme_admin(&v, NVME_SET_FEATURE, 0, NVME_TEMPERATURE, 0x160);
            nvme_admin(&v, NVME_SET_FEATURE, 0, NVME_ASYNC_CONFIG, 0);
            nvme_admin(&v, NVME_SET_FEATURE, 0, NVME_WRITE_CACHE, 1);
            nvme_attach(&v, true);
            break;
        case 3:
            nvme_send(&v, NVME_AER, 0xcc, 0, 0, 0);
            nvme_send(&v, NVME_AER, 0xdd, 0, 0, 0);
            nvme_wait_read(&v, 0);
            break;
        }
        restore(vm, i);
        v = saved;
        nvme_assert_saved(&v);
        restore(vm, i);
        v = saved;
    }
    assert_never_differed(vm);
    g_free(v.dev);
    snapshot_vm_end(vm);
}

/*
 * Catches: a queue with a vector that there is only with MSI-X, which the guest
 * switches off then: QEMU aborted, or what was saved could not be loaded.
 */
static void test_nvme_vector(const void *machine)
{
    SnapshotVM *vm = snapshot_vm_start(
        ",verify=on", "-M %s -nodefaults -m 16 "
        "-blockdev null-co,node-name=a,size=1048576,read-zeroes=on,"
        "read-only=on -device nvme,serial=1,drive=a,addr=10",
        (const char *)machine);
    NVMe v = { .vm = vm, .dev = find(vm, 0x10) };
    uint8_t msix = qpci_find_capability(v.dev, PCI_CAP_ID_MSIX, 0);
    int i;

    g_assert_cmphex(msix, !=, 0);
    v.bar = qpci_iomap(v.dev, 0, NULL);
    nvme_enable(&v, NVME_ASQ, NVME_ACQ);
    qpci_config_writew(v.dev, msix + PCI_MSIX_FLAGS, PCI_MSIX_FLAGS_ENABLE);
    nvme_create_queues(&v, 40 << 16 | NVME_CQ_IEN);
    qpci_config_writew(v.dev, msix + PCI_MSIX_FLAGS, 0);
    snapshot_save(vm, 0);
    for (i = 0; i < 4; i++) {
        nvme_submit(&v, NVME_SQ, NVME_READ, 0x100, 1, NVME_DATA, 0, 0);
        nvme_doorbell(&v, 1, false, 1);
        nvme_wait_read(&v, 0);
        restore(vm, i);
    }
    assert_never_differed(vm);
    g_free(v.dev);
    snapshot_vm_end(vm);
}

static const struct {
    const char *args;
    const char *text;
} nvme_refused[] = {
    { ",cmb_size_mb=1", "memory buffer" },
    { ",pmrdev=m -object memory-backend-ram,id=m,size=1M", "memory region" },
    { ",subsys=s,sriov_max_vfs=1,sriov_vq_flexible=2,sriov_vi_flexible=1",
      "virtual functions" },
    { ",subsys=s -device nvme-ns,drive=a,zoned=on,zoned.zone_size=64K",
      "zoned" },
    { ",subsys=f -device nvme-ns,drive=a,fdp.ruhs=0", "data placement" },
};

/* Catches: a save that would lose what the controller cannot save. */
static void test_nvme_refused(const void *machine)
{
    unsigned i;

    for (i = 0; i < ARRAY_SIZE(nvme_refused); i++) {
        SnapshotVM *vm = snapshot_vm_start(
            ",disks=keep", "-M %s -nodefaults -m 16 "
            "-blockdev null-co,node-name=a,size=1048576,read-zeroes=on "
            "-device nvme-subsys,id=s -device nvme-subsys,id=f,fdp=on,"
            "fdp.nruh=2 -device nvme,serial=1,addr=10%s",
            (const char *)machine, nvme_refused[i].args);

        snapshot_qmp_refused(vm, "save", 0, nvme_refused[i].text);
        snapshot_vm_end(vm);
    }
}

static const struct {
    const char *args;
    const char *section;
    unsigned skip;              /* PCI's configuration has to be the same */
} streams[] = {
    { "-device edu,addr=10", "/edu", 290 },
    { "-device pci-testdev,addr=10", "/pci-testdev", 290 },
    { "-netdev user,id=n -device piix3-usb-uhci,id=u -device "
      "usb-net,netdev=n,bus=u.0", "/usb-net", 8 },
    { "-chardev null,id=c -device piix3-usb-uhci,id=u -device "
      "usb-serial,chardev=c,bus=u.0", "/usb-serial", 8 },
    { "-audiodev none,id=a -device virtio-sound-pci,audiodev=a",
      "/virtio-sound-device", 300 },
    { "-object cryptodev-backend-builtin,id=c "
      "-device virtio-crypto-pci,cryptodev=c", "/virtio-crypto", 300 },
    { "-blockdev null-co,node-name=a,size=1048576,read-only=on "
      "-device nvme,serial=1,drive=a", "/nvme", 4110 },
};

/* Returns: how a migration ended; the caller frees it */
static char *migration_end(QTestState *qts)
{
    int tries;

    for (tries = 0; tries < 3000; tries++) {
        QDict *info = qtest_qmp_assert_success_ref(
            qts, "{ 'execute': 'query-migrate' }");
        const char *status = qdict_get_try_str(info, "status");
        g_autofree char *end = NULL;

        if (!g_strcmp0(status, "completed") || !g_strcmp0(status, "failed")) {
            end = g_strdup(status);
        }
        qobject_unref(info);
        if (end) {
            return g_steal_pointer(&end);
        }
        g_usleep(10 * 1000);
    }
    g_error("a migration does not end");
}

/* Catches: a stream that ends QEMU, when it is loaded or by what is loaded. */
static void test_stream(const void *machine)
{
    g_autofree char *dir = g_dir_make_tmp("snapshot-vmstate-XXXXXX", NULL);
    g_autofree char *path = g_build_filename(dir, "stream", NULL);
    g_autofree char *uri = g_strdup_printf("file:%s", path);
    g_autoptr(GRand) rand = g_rand_new_with_seed(1);
    unsigned i, n, bytes;

    for (i = 0; i < ARRAY_SIZE(streams); i++) {
        g_autofree char *stream = NULL, *end = NULL;
        QTestState *qts = qtest_initf("-M %s -nodefaults -m 16 %s",
                                      (const char *)machine, streams[i].args);
        gsize size, begin, last;
        char *name, footer[5] = { 0x7e };

        g_test_message("%s", streams[i].args);
        qtest_qmp_assert_success(qts, "{ 'execute': 'migrate', 'arguments': {"
                                 " 'uri': %s } }", uri);
        end = migration_end(qts);
        g_assert_cmpstr(end, ==, "completed");
        qtest_quit(qts);
        g_assert_true(g_file_get_contents(path, &stream, &size, NULL));
        name = memmem(stream, size, streams[i].section,
                      strlen(streams[i].section));
        g_assert_nonnull(name);
        begin = name - stream + strlen(streams[i].section);
        /* Behind the section, its identifier comes once more. */
        while ((uint8_t)name[-1] != begin - (name - stream)) {
            name--;
            g_assert_true(name > stream + 6);
        }
        memcpy(footer + 1, name - 5, 4);
        name = memmem(stream + begin, size - begin, footer, sizeof(footer));
        g_assert_nonnull(name);
        last = name - stream - 1;

        for (n = 0; n < 12; n++) {
            g_autofree char *other = g_memdup2(stream, size);
            g_autofree char *how = NULL;

            if (n < 4) {
                other[last - n] ^= 1;
            }
            for (bytes = 0; n >= 4 && bytes < 16; bytes++) {
                gsize at = begin + streams[i].skip +
                    g_rand_int_range(rand, 0, n & 1 ? 250 : 2500);

                if (at <= last) {
                    other[at] = g_rand_int(rand);
                }
            }
            g_assert_true(g_file_set_contents(path, other, size, NULL));
            qts = qtest_initf("-M %s -nodefaults -m 16 %s -incoming defer",
                              (const char *)machine, streams[i].args);
            qtest_qmp_assert_success(
                qts, "{ 'execute': 'migrate-incoming', 'arguments': {"
                " 'uri': %s, 'exit-on-error': false } }", uri);
            how = migration_end(qts);
            g_test_message("%u: %s", n, how);
            qtest_clock_step(qts, 500 * MS);
            qtest_quit(qts);
        }
    }
    unlink(path);
    rmdir(dir);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    if (!qtest_has_device("snapshot")) {
        g_test_skip("there is no snapshot device");
        return g_test_run();
    }

    if (qtest_has_device("edu")) {
        snapshot_add_tests("edu", test_edu);
        snapshot_add_tests("edu-factorial", test_edu_factorial);
    }
    if (qtest_has_device("pci-testdev")) {
        snapshot_add_tests("pci-testdev", test_testdev);
    }
    if (qtest_has_device("piix3-usb-uhci")) {
        snapshot_add_tests("usb", test_usb);
        snapshot_add_tests("usb-net", test_usb_net);
        snapshot_add_tests("usb-serial", test_usb_serial);
    }
    if (qtest_has_device("virtio-sound-pci")) {
        snapshot_add_tests("virtio-sound", test_sound);
        snapshot_add_tests("virtio-sound-no-room", test_sound_no_room);
    }
    if (qtest_has_device("virtio-crypto-pci")) {
        snapshot_add_tests("virtio-crypto", test_crypto);
    }
    if (qtest_has_device("nvme")) {
        snapshot_add_tests("nvme", test_nvme);
        snapshot_add_tests("nvme-vector", test_nvme_vector);
        snapshot_add_test("q35", "dirty", "nvme-refused", test_nvme_refused);
    }
    snapshot_add_test("q35", "dirty", "stream", test_stream);
    return g_test_run();
}
