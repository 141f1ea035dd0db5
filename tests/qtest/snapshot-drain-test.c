/*
 * Test of the snapshot device while a disk is in the middle of a request
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <sys/un.h>
#include "qemu/bswap.h"
#include "qemu/units.h"
#include "hw/misc/snapshot-control.h"
#include "snapshot-utils.h"

#define LSI_DSTAT       0x0c
#define LSI_DSTAT_SIR   0x04            /* the script came to its end */
#define LSI_DSP         0x2c

#define SCRIPT          0x100000
#define IDENTIFY        0x110000        /* message to the disk */
#define CDB             0x110010
#define ANSWER          0x110020        /* messages and status from the disk */
#define MARK            0x120000
#define DATA            0x200000
#define LENGTH          (1 * MiB)       /* LSI transfers 128 KiB at a time */

typedef struct Lsi {
    QPCIDevice *dev;
    QPCIBar bar;
} Lsi;

/* Each half of the disk has words of its own. */
static uint32_t word(unsigned half, unsigned i)
{
    return (half + 1) * 0x10000000 + i;
}

static char *make_disk(void)
{
    g_autofree uint32_t *words = g_malloc(2 * LENGTH);
    char *path;
    int fd = g_file_open_tmp("snapshot-disk.XXXXXX", &path, NULL);
    unsigned i, n = LENGTH / sizeof(*words);

    g_assert_cmpint(fd, >=, 0);
    for (i = 0; i < 2 * n; i++) {
        words[i] = word(i / n, i % n);
    }
    g_assert_cmpint(write(fd, words, 2 * LENGTH), ==, 2 * LENGTH);
    close(fd);
    return path;
}

/* A machine with that disk, which lets one request a second through */
static SnapshotVM *start_vm(Lsi *lsi, const void *machine, const char *disk,
                            const char *properties, const char *args)
{
    g_autofree char *all = g_strconcat(",disks=keep", properties, NULL);
    SnapshotVM *vm = snapshot_vm_start(
        all, "-machine %s -nodefaults %s "
        "-drive if=none,id=d,format=raw,file=%s,throttling.iops-total=1 "
        "-device lsi53c895a,addr=8 -device scsi-hd,drive=d,scsi-id=0,id=hd",
        (const char *)machine, args, disk);

    lsi->dev = qpci_device_find(vm->pci, QPCI_DEVFN(8, 0));
    g_assert_nonnull(lsi->dev);
    lsi->bar = qpci_iomap(lsi->dev, 1, NULL);
    qpci_device_enable(lsi->dev);
    return vm;
}

static void check_data(SnapshotVM *vm, unsigned half)
{
    g_autofree uint32_t *words = g_malloc(LENGTH);
    unsigned i;

    qtest_memread(vm->qts, DATA, words, LENGTH);
    for (i = 0; i < LENGTH / sizeof(*words); i++) {
        g_assert_cmphex(words[i], ==, word(half, i));
    }
}

/* Start reading half of the disk; the first command is refused instead. */
static void start_read(SnapshotVM *vm, Lsi *lsi, unsigned half, bool refused)
{
    const uint32_t script[] = {
        0x40000000, 0,                          /* select disk 0 */
        0x06000001, IDENTIFY,                   /* message out */
        0x0200000a, CDB,                        /* command */
        0x07000002, ANSWER,                     /* message in: disconnect */
        0x48000000, 0,                          /* wait for that */
        0x50000000, 0,                          /* wait for reselection */
        0x07000001, ANSWER,                     /* message in: identify */
        0x01000000 | LENGTH, DATA,              /* data in */
        0x03000001, ANSWER,                     /* status */
        0x07000001, ANSWER + 1,                 /* message in: complete */
        0x48000000, 0,
        0x98080000, 0,                          /* interrupt */
    };
    uint8_t cdb[10] = { 0x28 };
    unsigned i;

    stl_be_p(&cdb[2], half * LENGTH / 512);
    stw_be_p(&cdb[7], LENGTH / 512);
    qtest_writeb(vm->qts, IDENTIFY, 0x80);
    qtest_memwrite(vm->qts, CDB, cdb, sizeof(cdb));
    for (i = 0; i < ARRAY_SIZE(script); i++) {
        qtest_writel(vm->qts, SCRIPT + i * 4, script[i]);
    }
    if (refused) {
        for (i = 6; i < 14; i++) {              /* status and what follows */
            qtest_writel(vm->qts, SCRIPT + i * 4, script[i + 10]);
        }
    }
    for (i = 0; i < 4; i++) {
        qpci_io_writeb(lsi->dev, lsi->bar, LSI_DSP + i, SCRIPT >> i * 8);
    }
}

/* The script starts again by itself. */
static void start_endless_read(SnapshotVM *vm, Lsi *lsi)
{
    start_read(vm, lsi, 0, false);
    qtest_writel(vm->qts, SCRIPT + 22 * 4, 0x80080000);     /* jump */
    qtest_writel(vm->qts, SCRIPT + 23 * 4, SCRIPT);
}

static void end_script(SnapshotVM *vm)
{
    qtest_writel(vm->qts, SCRIPT + 22 * 4, 0x98080000);     /* interrupt */
}

static bool has_ended(Lsi *lsi)
{
    return qpci_io_readb(lsi->dev, lsi->bar, LSI_DSTAT) & LSI_DSTAT_SIR;
}

/*
 * The host saves, and restores, while the controller reads in parts, of which
 * but one a second is let through.  Catches a save in the middle: whoever
 * waits for the end then waits forever after a restore; and parts of an old
 * request that write to restored RAM.
 */
static void test_lsi(const void *machine)
{
    g_autofree char *path = make_disk();
    Lsi lsi;
    SnapshotVM *vm = start_vm(&lsi, machine, path, "", "");
    unsigned i;

    start_read(vm, &lsi, 0, true);
    g_assert_true(has_ended(&lsi));

    start_read(vm, &lsi, 0, false);
    g_assert_false(has_ended(&lsi));
    snapshot_qmp(vm, "save", 0);
    check_data(vm, 0);

    for (i = 0; i < 3; i++) {
        qtest_memset(vm->qts, DATA, 0, LENGTH);
        g_assert_true(has_ended(&lsi));
        start_read(vm, &lsi, 1, false);
        g_assert_false(has_ended(&lsi));
        snapshot_qmp(vm, "restore", 0);
        check_data(vm, 0);
        qtest_clock_step(vm->qts, 20 * 1000000000LL);
        check_data(vm, 0);
    }

    g_free(lsi.dev);
    snapshot_vm_end(vm);
    unlink(path);
}

/*
 * A script that starts again by itself: no drain comes to its end.  Catches a
 * command that never returns, and one that changes something.
 */
static void test_endless(const void *machine)
{
    g_autofree char *path = make_disk();
    Lsi lsi;
    SnapshotVM *vm = start_vm(&lsi, machine, path, "", "");

    snapshot_qmp(vm, "save", 0);
    start_read(vm, &lsi, 0, true);
    g_assert_true(has_ended(&lsi));

    start_endless_read(vm, &lsi);
    snapshot_qmp_refused(vm, "save", 1, "requests of 'hd' do not come to");
    snapshot_qmp_refused(vm, "restore", 0, "A disk is busy");
    snapshot_assert_state(vm, "running");
    check_data(vm, 0);

    /* There is a way out. */
    end_script(vm);
    snapshot_qmp(vm, "save", 1);
    g_assert_true(has_ended(&lsi));
    snapshot_qmp(vm, "restore", 0);
    snapshot_qmp(vm, "restore", 1);
    g_assert_true(has_ended(&lsi));

    g_free(lsi.dev);
    snapshot_vm_end(vm);
    unlink(path);
}

/* A host's side of control= */
static int connect_host(const char *path)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    const struct timeval limit = { .tv_sec = 60 };
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);

    g_assert_cmpint(fd, >=, 0);
    g_strlcpy(address.sun_path, path, sizeof(address.sun_path));
    g_assert_cmpint(connect(fd, (struct sockaddr *)&address,
                            sizeof(address)), ==, 0);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
    return fd;
}

static void tell(int fd, struct snapshot_message m)
{
    g_assert_cmpint(write(fd, &m, sizeof(m)), ==, sizeof(m));
}

static struct snapshot_message hear(int fd, uint32_t type)
{
    struct snapshot_message m;

    g_assert_cmpint(recv(fd, &m, sizeof(m), MSG_WAITALL), ==, sizeof(m));
    g_assert_cmpuint(le32_to_cpu(m.type), ==, type);
    return m;
}

static void begin_run(int fd, unsigned id)
{
    tell(fd, (struct snapshot_message) {
        .type = cpu_to_le32(SNAPSHOT_MSG_RUN),
        .id = cpu_to_le32(id),
    });
}

/* What one run writes to MARK is gone in the next. */
static void wait_for_run(SnapshotVM *vm)
{
    while (snapshot_readl(vm, SNAPSHOT_REG_STATUS) != SNAPSHOT_STATUS_RUN ||
           qtest_readl(vm->qts, MARK)) {
        g_usleep(1000);
    }
    qtest_writel(vm->qts, MARK, 1);
}

/*
 * A run leaves that script behind.  Catches a guest that is not put back when
 * the script has come to its end, because the restore of its DONE was refused
 * before; and one that the host waits for without end.
 */
static void test_endless_run(const void *machine)
{
    g_autofree char *disk = make_disk();
    g_autofree char *dir = g_dir_make_tmp("snapshot-drain-XXXXXX", NULL);
    g_autofree char *path = g_build_filename(dir, "control", NULL);
    g_autofree char *args = g_strdup_printf(
        "-object memory-backend-memfd,id=c,share=on,size=128K "
        "-chardev socket,id=r,path=%s,server=on,wait=off", path);
    Lsi lsi;
    SnapshotVM *vm = start_vm(&lsi, machine, disk, ",channel=c,control=r",
                              args);
    int fd = connect_host(path);
    bool twice = false;
    unsigned id;

    start_read(vm, &lsi, 0, true);
    g_assert_true(has_ended(&lsi));
    hear(fd, SNAPSHOT_MSG_HELLO);
    tell(fd, (struct snapshot_message) {
        .type = cpu_to_le32(SNAPSHOT_MSG_HELLO),
        .hello = {
            .magic = cpu_to_le32(SNAPSHOT_CONTROL_MAGIC),
            .version = cpu_to_le32(SNAPSHOT_CONTROL_VERSION),
        },
    });
    snapshot_writel(vm, SNAPSHOT_REG_COMMAND, SNAPSHOT_CMD_READY);
    hear(fd, SNAPSHOT_MSG_READY);
    begin_run(fd, 1);
    for (id = 1; ; id++) {
        wait_for_run(vm);
        start_endless_read(vm, &lsi);
        if (id % 2) {
            snapshot_writel(vm, SNAPSHOT_REG_COMMAND, SNAPSHOT_CMD_DONE);
        } else {
            tell(fd, (struct snapshot_message) {
                .type = cpu_to_le32(SNAPSHOT_MSG_CANCEL),
                .id = cpu_to_le32(id),
            });
        }
        g_assert_cmpuint(le32_to_cpu(hear(fd, SNAPSHOT_MSG_RESULT).id), ==, id);
        if (twice) {
            break;
        }
        begin_run(fd, id + 1);
        g_usleep(300 * 1000);
        end_script(vm);
        twice = id % 2 == 0;
    }
    /* Nobody ends the script. */
    g_assert_cmpuint(le32_to_cpu(hear(fd, SNAPSHOT_MSG_ENDED).ended.reason),
                     ==, SNAPSHOT_ENDED_FAILED);
    snapshot_assert_state(vm, "running");

    close(fd);
    g_free(lsi.dev);
    snapshot_vm_end(vm);
    unlink(disk);
    rmdir(dir);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    if (qtest_has_device("lsi53c895a")) {
        snapshot_add_tests("drain/lsi", test_lsi);
        snapshot_add_tests("drain/endless", test_endless);
        snapshot_add_test("pc", "dirty", "drain/run", test_endless_run);
    }
    return g_test_run();
}
