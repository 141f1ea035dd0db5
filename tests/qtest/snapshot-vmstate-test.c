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
#include "qemu/units.h"
#include "qobject/qdict.h"
#include "qobject/qjson.h"
#include "snapshot-utils.h"

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
 * that was begun after the save, in a machine that never asked for it.
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
        g_assert_cmphex(edu_read(&e, EDU_IRQ), ==, EDU_FACT_IRQ);
        edu_write(&e, EDU_LOWER, EDU_FACT_IRQ);
        edu_write(&e, EDU_STATUS, 0);
        edu_write(&e, EDU_FACTORIAL, 3);
        if (i & 2) {
            edu_wait(&e);
        }
        restore(vm, i);
        g_assert_cmphex(edu_read(&e, EDU_STATUS), ==,
                        EDU_COMPUTING | EDU_IRQFACT);
        g_assert_cmpuint(edu_read(&e, EDU_FACTORIAL), ==, slow);
        g_assert_cmphex(edu_read(&e, EDU_IRQ), ==, 0);
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
    return g_test_run();
}
