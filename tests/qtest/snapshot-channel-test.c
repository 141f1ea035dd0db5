/*
 * Tests of the snapshot device: memory that restores leave alone
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/units.h"
#include "qobject/qdict.h"
#include "snapshot-utils.h"

#define SIZE    (1 * MiB)

/* An engine's own memory, another one, which goes back, and the channel */
typedef struct Memory {
    QPCIDevice *dev;
    QPCIBar bar;
    bool kept;
} Memory;

static uint32_t word(const Memory *m, unsigned offset)
{
    return qpci_io_readl(m->dev, m->bar, offset);
}

static void set_word(const Memory *m, unsigned offset, uint32_t value)
{
    qpci_io_writel(m->dev, m->bar, offset, value);
}

static void assert_exact(SnapshotVM *vm)
{
    QDict *found = qtest_qmp_assert_success_ref(
        vm->qts, "{ 'execute': 'x-snapshot-device-verify',"
        " 'arguments': { 'slot': 0 } }");

    g_assert_cmpuint(qdict_get_int(found, "pages"), ==, 0);
    g_assert_cmpuint(qdict_get_int(found, "fields"), ==, 0);
    qobject_unref(found);
}

/*
 * Catches: channel= or keep= that goes back with a restore, is compared, makes
 * it slow for ever, or takes other memory with it; a channel that is not the
 * memory that the host sees.
 */
static void test_kept(const void *machine)
{
    g_autofree char *path = NULL;
    g_autofree char *content = NULL;
    Memory m[3] = { };
    SnapshotVM *vm;
    unsigned i, n;
    int fd = g_file_open_tmp("snapshot-channel-XXXXXX", &path, NULL);

    g_assert_cmpint(fd, >=, 0);
    close(fd);
    vm = snapshot_vm_start(
        ",channel=c,keep=k,verify=on",
        "-M %s -m 16 -nodefaults -rtc clock=vm -S"
        " -object memory-backend-file,id=c,share=on,size=1M,mem-path=%s"
        " -object memory-backend-memfd,id=k,share=on,size=1M"
        " -object memory-backend-memfd,id=g,share=on,size=1M"
        " -device ivshmem-plain,master=on,memdev=k,addr=0x10"
        " -device ivshmem-plain,master=on,memdev=g,addr=0x11",
        (const char *)machine, path);
    g_assert_cmphex(snapshot_readl(vm, SNAPSHOT_REG_FEATURES) &
                    (SNAPSHOT_FEATURE_CHANNEL | SNAPSHOT_FEATURE_CONTROL), ==,
                    SNAPSHOT_FEATURE_CHANNEL);
    for (i = 0; i < 3; i++) {
        uint64_t size;

        m[i].kept = i != 1;
        m[i].dev = i == 2 ? vm->dev :
            qpci_device_find(vm->pci, QPCI_DEVFN(0x10 + i, 0));
        g_assert_nonnull(m[i].dev);
        if (i < 2) {
            qpci_device_enable(m[i].dev);
        }
        m[i].bar = qpci_iomap(m[i].dev, 2, &size);
        g_assert_cmphex(size, ==, SIZE);
        set_word(&m[i], 0x1000, 0x100 + i);
    }
    qtest_writel(vm->qts, 1 * MiB, 1);
    snapshot_save(vm, 0);
    for (n = 0; n < 20; n++) {
        for (i = 0; i < 3; i++) {
            set_word(&m[i], 0x1000, 0x200 + n);
            set_word(&m[i], SIZE - 4, n);
        }
        qtest_writel(vm->qts, 1 * MiB, 2);
        snapshot_restore(vm, 0);
        for (i = 0; i < 3; i++) {
            g_test_message("restore %u, memory %u", n, i);
            g_assert_cmphex(word(&m[i], 0x1000), ==,
                            m[i].kept ? 0x200 + n : 0x100 + i);
            g_assert_cmphex(word(&m[i], SIZE - 4), ==, m[i].kept ? n : 0);
        }
        g_assert_cmphex(qtest_readl(vm->qts, 1 * MiB), ==, 1);
        assert_exact(vm);
    }
    g_assert_true(g_file_get_contents(path, &content, NULL, NULL));
    g_assert_cmphex(ldl_le_p(content + 0x1000), ==, 0x200 + n - 1);
    for (i = 0; i < 2; i++) {
        g_free(m[i].dev);
    }
    snapshot_vm_end(vm);
    unlink(path);
}

/*
 * A guest that calls a part of the channel its own memory.  Catches a copy of
 * what is there onto itself.
 */
static void test_region(const void *machine)
{
    SnapshotVM *vm = snapshot_vm_start(
        ",channel=c,control=r", "-M %s -m 16 -nodefaults"
        " -object memory-backend-memfd,id=c,share=on,size=1M"
        " -chardev null,id=r", (const char *)machine);
    QPCIBar channel = qpci_iomap(vm->dev, 2, NULL);
    unsigned i;

    for (i = 0; i < SNAPSHOT_REGIONS; i++) {
        snapshot_writel(vm, SNAPSHOT_REG_REGION, i);
        snapshot_writeq(vm, SNAPSHOT_REG_ADDRESS, channel.addr + 0x3000);
        snapshot_writeq(vm, SNAPSHOT_REG_LENGTH, 0x2000);
        g_assert_cmphex(snapshot_command(vm, SNAPSHOT_CMD_READY, 0), ==,
                        SNAPSHOT_STATUS_ERROR | SNAPSHOT_E_REGION);
        snapshot_writeq(vm, SNAPSHOT_REG_ADDRESS, 0x3000);
    }
    snapshot_vm_end(vm);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    snapshot_add_tests("kept", test_kept);
    snapshot_add_tests("kept/region", test_region);
    return g_test_run();
}
