/*
 * Test of the snapshot device: what the guest writes to disks goes back
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <glib/gstdio.h>
#include "qemu/units.h"
#include "libqos/malloc-pc.h"
#include "libqos/virtio.h"
#include "libqos/virtio-pci.h"
#include "qobject/qdict.h"
#include "qobject/qlist.h"
#include "qobject/qstring.h"
#include "snapshot-utils.h"
#include "standard-headers/linux/virtio_blk.h"
#include "standard-headers/linux/virtio_ring.h"

#define SECTOR          512
#define IMAGE_SECTORS   (8 * MiB / SECTOR)
#define USED_SECTORS    40              /* what tests write to, of them */
#define FLASH_SIZE      (128 * KiB)
#define FLASH           (4 * GiB - FLASH_SIZE)

#define IDE_DATA        0x1f0
#define IDE_COUNT       0x1f2
#define IDE_LBA         0x1f3
#define IDE_DEVICE      0x1f6
#define IDE_COMMAND     0x1f7
#define IDE_BSY         0x80
#define IDE_DRQ         0x08
#define IDE_ERR         0x01
#define IDE_READ        0x20
#define IDE_WRITE       0x30

#define STATUS_CHANGED  (SNAPSHOT_STATUS_ERROR | SNAPSHOT_E_CHANGED)
#define STATUS_REFUSED  (SNAPSHOT_STATUS_ERROR | SNAPSHOT_E_UNSAVABLE)

/* ---- Images ---- */

static char *make_image(size_t size, uint8_t value)
{
    g_autofree char *content = g_malloc(size);
    char *path;
    int fd = g_file_open_tmp("snapshot-disk.XXXXXX", &path, NULL);

    g_assert_cmpint(fd, >=, 0);
    close(fd);
    memset(content, value, size);
    g_assert_true(g_file_set_contents(path, content, size, NULL));
    return path;
}

/* Catches all that reaches the file. */
static void end_image(char *path, size_t size, uint8_t value)
{
    g_autofree char *content = NULL;
    gsize length;
    size_t i;

    g_assert_true(g_file_get_contents(path, &content, &length, NULL));
    g_assert_cmpuint(length, ==, size);
    for (i = 0; i < size; i++) {
        g_assert_cmphex((uint8_t)content[i], ==, value);
    }
    g_unlink(path);
    g_free(path);
}

/* ---- IDE, as it is at port 0x1f0 of the pc ---- */

static void ide_command(SnapshotVM *vm, unsigned unit, uint32_t sector,
                        uint8_t command)
{
    int tries = 10000;

    qtest_outb(vm->qts, IDE_DEVICE, 0xe0 | unit << 4);
    qtest_outb(vm->qts, IDE_COUNT, 1);
    qtest_outb(vm->qts, IDE_LBA, sector);
    qtest_outb(vm->qts, IDE_LBA + 1, sector >> 8);
    qtest_outb(vm->qts, IDE_LBA + 2, sector >> 16);
    qtest_outb(vm->qts, IDE_COMMAND, command);
    while (qtest_inb(vm->qts, IDE_COMMAND) & IDE_BSY) {
        g_assert_cmpint(--tries, >, 0);
        g_usleep(1000);
    }
    g_assert_cmphex(qtest_inb(vm->qts, IDE_COMMAND) & (IDE_DRQ | IDE_ERR), ==,
                    IDE_DRQ);
}

/* All bytes of a sector are the same in these tests. */
static void ide_write(SnapshotVM *vm, unsigned unit, uint32_t sector,
                      uint8_t value)
{
    unsigned i;

    ide_command(vm, unit, sector, IDE_WRITE);
    for (i = 0; i < SECTOR / 2; i++) {
        qtest_outw(vm->qts, IDE_DATA, value << 8 | value);
    }
    while (qtest_inb(vm->qts, IDE_COMMAND) & IDE_BSY) {
        g_usleep(1000);
    }
    g_assert_cmphex(qtest_inb(vm->qts, IDE_COMMAND) & (IDE_DRQ | IDE_ERR), ==,
                    0);
}

static void ide_check(SnapshotVM *vm, unsigned unit, uint32_t sector,
                      uint8_t value)
{
    unsigned i;

    ide_command(vm, unit, sector, IDE_READ);
    for (i = 0; i < SECTOR / 2; i++) {
        g_assert_cmphex(qtest_inw(vm->qts, IDE_DATA), ==, value << 8 | value);
    }
}

static SnapshotVM *start_ide(const void *machine, const char *properties,
                             const char *path, const char *more)
{
    return snapshot_vm_start(
        properties, "-M %s -nodefaults "
        "-drive if=none,id=d,format=raw,file=%s "
        "-device ide-hd,drive=d,bus=ide.0,unit=0,id=hda %s",
        (const char *)machine, path, more);
}

static QDict *query_disk(SnapshotVM *vm)
{
    QDict *info = snapshot_query(vm);
    QDict *disk;

    g_assert_cmpuint(qlist_size(qdict_get_qlist(info, "disks")), ==, 1);
    disk = qobject_to(QDict, qlist_peek(qdict_get_qlist(info, "disks")));
    qobject_ref(disk);
    qobject_unref(info);
    return disk;
}

/* ---- Content ---- */

typedef struct Content {
    uint8_t present[USED_SECTORS];
    uint8_t saved[4][USED_SECTORS];
    bool in_use[4];
} Content;

/* In three areas of 2 MiB, some in the same cluster */
static uint32_t sector_of(unsigned i)
{
    return i % 3 * 5000 + i;
}

/*
 * Slots in any order, from the guest and from the host, beside a model of what
 * the disk has to hold.  Catches: content that does not go back, or only that
 * of the slot used last; a discard that takes something along; something
 * written to the image.
 */
static void test_slots(const void *machine)
{
    char *path = make_image(IMAGE_SECTORS * SECTOR, 0x11);
    SnapshotVM *vm = start_ide(machine, ",slots=4,verify=on", path, "");
    g_autoptr(GRand) rand = g_rand_new_with_seed(1);
    Content c = { };
    QDict *disk, *info;
    unsigned i, j, k;

    memset(c.present, 0x11, USED_SECTORS);
    for (i = 0; i < 300; i++) {
        unsigned n = g_rand_int_range(rand, 0, 4);
        unsigned what = g_rand_int_range(rand, 0, 12);

        if (what == 0 || !c.in_use[n]) {
            snapshot_save(vm, n);
            memcpy(c.saved[n], c.present, USED_SECTORS);
            c.in_use[n] = true;
        } else if (what == 1) {
            snapshot_discard(vm, n);
            c.in_use[n] = false;
        } else if (what < 5) {
            if (what & 1) {
                snapshot_restore(vm, n);
            } else {
                snapshot_qmp(vm, "restore", n);
            }
            memcpy(c.present, c.saved[n], USED_SECTORS);
            for (k = 0; k < 6; k++) {
                j = g_rand_int_range(rand, 0, USED_SECTORS);
                ide_check(vm, 0, sector_of(j), c.present[j]);
            }
        } else {
            j = g_rand_int_range(rand, 0, USED_SECTORS);
            c.present[j] = i;
            ide_write(vm, 0, sector_of(j), i);
            ide_check(vm, 0, sector_of(j), i);
        }
    }

    disk = query_disk(vm);
    g_assert_cmpstr(qdict_get_str(disk, "device"), ==, "hda");
    g_assert_cmpint(qdict_get_int(disk, "clusters"), >, 0);
    g_assert_cmpint(qdict_get_int(disk, "memory-bytes"), >, 0);
    g_assert_cmpint(qdict_get_int(disk, "spilled-bytes"), ==, 0);
    qobject_unref(disk);

    /* What the guest sees stays. */
    for (i = 0; i < 4; i++) {
        if (c.in_use[i]) {
            snapshot_discard(vm, i);
        }
    }
    for (j = 0; j < USED_SECTORS; j++) {
        ide_check(vm, 0, sector_of(j), c.present[j]);
    }
    info = snapshot_query(vm);
    g_assert_cmpint(qdict_get_int(info, "mismatched"), ==, 0);
    qobject_unref(info);
    snapshot_vm_end(vm);
    end_image(path, IMAGE_SECTORS * SECTOR, 0x11);
}

/*
 * Two disks, and one that comes later.  Catches: one that is left out; a disk
 * that gets its overlay at the first save only.
 */
static void test_several(const void *machine)
{
    char *path = make_image(IMAGE_SECTORS * SECTOR, 0x11);
    char *second = make_image(IMAGE_SECTORS * SECTOR, 0x22);
    g_autofree char *more = g_strdup_printf(
        "-drive if=none,id=e,format=raw,file=%s "
        "-device ide-hd,drive=e,bus=ide.0,unit=1", second);
    SnapshotVM *vm = start_ide(machine, "", path, more);
    unsigned i;

    ide_write(vm, 0, 1, 0x33);          /* before the first save */
    snapshot_save(vm, 0);
    ide_write(vm, 1, 1, 0x44);
    snapshot_save(vm, 1);
    for (i = 0; i < 3; i++) {
        ide_write(vm, 0, 1, 0x55);
        ide_write(vm, 1, 1, 0x66);
        snapshot_restore(vm, 0);
        ide_check(vm, 0, 1, 0x33);
        ide_check(vm, 1, 1, 0x22);
        snapshot_restore(vm, 1);
        ide_check(vm, 0, 1, 0x33);
        ide_check(vm, 1, 1, 0x44);
    }
    snapshot_vm_end(vm);
    end_image(second, IMAGE_SECTORS * SECTOR, 0x22);
    g_unlink(path);                     /* which was written to */
    g_free(path);
}

/*
 * Catches: overlay-size and overlay-dir that do not reach the overlay; content
 * that does not come back from the file.
 */
static void test_spill(const void *machine)
{
    char *path = make_image(IMAGE_SECTORS * SECTOR, 0x11);
    g_autofree char *dir = g_dir_make_tmp("snapshot-spill.XXXXXX", NULL);
    g_autofree char *properties = g_strdup_printf(
        ",overlay-size=16k,overlay-dir=%s", dir);
    SnapshotVM *vm = start_ide(machine, properties, path, "");
    QDict *disk;
    unsigned i;

    snapshot_save(vm, 0);
    for (i = 0; i < 20; i++) {
        ide_write(vm, 0, i * 8, i);
    }
    disk = query_disk(vm);
    g_assert_cmpint(qdict_get_int(disk, "clusters"), ==, 20);
    g_assert_cmpint(qdict_get_int(disk, "memory-bytes"), ==, 16 * KiB);
    g_assert_cmpint(qdict_get_int(disk, "spilled-bytes"), ==, 64 * KiB);
    qobject_unref(disk);
    snapshot_save(vm, 1);
    snapshot_restore(vm, 0);
    for (i = 0; i < 20; i++) {
        ide_check(vm, 0, i * 8, 0x11);
    }
    snapshot_restore(vm, 1);
    for (i = 0; i < 20; i++) {
        ide_check(vm, 0, i * 8, i);
    }
    snapshot_vm_end(vm);
    end_image(path, IMAGE_SECTORS * SECTOR, 0x11);
    /* No name is left in it. */
    g_assert_cmpint(g_rmdir(dir), ==, 0);
}

/* ---- What is refused ---- */

static void assert_refused(SnapshotVM *vm, const char *command, unsigned slot,
                           uint32_t status, const char *text)
{
    uint32_t code = !strcmp(command, "save") ? SNAPSHOT_CMD_SAVE :
        SNAPSHOT_CMD_RESTORE;

    snapshot_qmp_refused(vm, command, slot, text);
    g_assert_cmphex(snapshot_command(vm, code, slot), ==, status);
    snapshot_assert_state(vm, "running");
}

/* Catches: a disk that is restored though it is told to stay, or refused. */
static void test_keep(const void *machine)
{
    char *path = make_image(IMAGE_SECTORS * SECTOR, 0x11);
    SnapshotVM *vm = start_ide(machine, ",disks=keep", path, "");
    QDict *info;

    snapshot_save(vm, 0);
    ide_write(vm, 0, 1, 0x33);
    snapshot_restore(vm, 0);
    ide_check(vm, 0, 1, 0x33);
    info = snapshot_query(vm);
    g_assert_true(qlist_empty(qdict_get_qlist(info, "disks")));
    qobject_unref(info);
    snapshot_vm_end(vm);
    g_unlink(path);
    g_free(path);
}

/* Catches: a disk that is saved though the user has forbidden it. */
static void test_refuse(const void *machine)
{
    char *path = make_image(IMAGE_SECTORS * SECTOR, 0x11);
    SnapshotVM *vm = start_ide(machine, ",disks=refuse", path, "");

    assert_refused(vm, "save", 0, STATUS_REFUSED, "Disk of 'hda' is writable");
    snapshot_vm_end(vm);
    end_image(path, IMAGE_SECTORS * SECTOR, 0x11);
}

/*
 * Catches: a restore onto another medium, or into none; one that changes
 * something before it is refused; a medium that is never saved.
 */
static void test_medium(const void *machine)
{
    char *path = make_image(1440 * KiB, 0x11);
    char *second = make_image(1440 * KiB, 0x22);
    SnapshotVM *vm = snapshot_vm_start(
        "", "-M %s -nodefaults -drive if=none,id=d,format=raw,file=%s "
        "-device floppy,drive=d,id=fd0",
        (const char *)machine, path);

    snapshot_save(vm, 0);
    qtest_writeb(vm->qts, 0x100000, 0x5a);
    qtest_qmp_assert_success(
        vm->qts, "{ 'execute': 'blockdev-change-medium', 'arguments': {"
        " 'id': 'fd0', 'filename': %s, 'format': 'raw' } }", second);
    assert_refused(vm, "restore", 0, STATUS_CHANGED,
                   "Disk of 'fd0' is not the one");
    g_assert_cmphex(qtest_readb(vm->qts, 0x100000), ==, 0x5a);
    snapshot_save(vm, 1);
    snapshot_restore(vm, 1);
    assert_refused(vm, "restore", 0, STATUS_CHANGED,
                   "Disk of 'fd0' is not the one");
    qtest_qmp_assert_success(
        vm->qts, "{ 'execute': 'blockdev-open-tray', 'arguments': {"
        " 'id': 'fd0', 'force': true } }");
    qtest_qmp_assert_success(
        vm->qts, "{ 'execute': 'blockdev-remove-medium', 'arguments': {"
        " 'id': 'fd0' } }");
    assert_refused(vm, "restore", 1, STATUS_CHANGED,
                   "Disk of 'fd0' is not the one");
    /* Their content is gone, and they are forgotten. */
    snapshot_discard(vm, 0);
    snapshot_save(vm, 1);
    snapshot_restore(vm, 1);
    qtest_qmp_assert_success(
        vm->qts, "{ 'execute': 'blockdev-change-medium', 'arguments': {"
        " 'id': 'fd0', 'filename': %s, 'format': 'raw' } }", second);
    assert_refused(vm, "restore", 1, STATUS_CHANGED,
                   "Disk of 'fd0' was not there");
    snapshot_vm_end(vm);
    end_image(path, 1440 * KiB, 0x11);
    end_image(second, 1440 * KiB, 0x22);
}

/* Catches: a CD taken for a disk that is written to, as its node could be. */
static void test_cdrom(const void *machine)
{
    char *path = make_image(IMAGE_SECTORS * SECTOR, 0x11);
    SnapshotVM *vm = snapshot_vm_start(
        ",disks=refuse", "-M %s -nodefaults "
        "-drive if=none,id=d,format=raw,file=%s -device ide-cd,drive=d,id=cd",
        (const char *)machine, path);

    snapshot_save(vm, 0);
    qtest_qmp_assert_success(
        vm->qts, "{ 'execute': 'blockdev-change-medium', 'arguments': {"
        " 'id': 'cd', 'filename': %s, 'format': 'raw' } }", path);
    snapshot_restore(vm, 0);
    snapshot_vm_end(vm);
    end_image(path, IMAGE_SECTORS * SECTOR, 0x11);
}

/*
 * Catches: a disk unplugged behind a slot that still has its content; one that
 * comes later and is not saved.
 */
static void test_plug(const void *machine)
{
    char *path = make_image(IMAGE_SECTORS * SECTOR, 0x11);
    char *second = make_image(IMAGE_SECTORS * SECTOR, 0x22);
    SnapshotVM *vm = start_ide(machine, "", path,
                               "-device virtio-scsi-pci,id=scsi");
    QDict *info;
    unsigned i;

    ide_check(vm, 0, 1, 0x11);
    snapshot_save(vm, 0);
    for (i = 0; i < 2; i++) {
        qtest_qmp_assert_success(
            vm->qts, "{ 'execute': 'blockdev-add', 'arguments': {"
            " 'driver': 'raw', 'node-name': 'n', 'file': {"
            " 'driver': 'file', 'filename': %s } } }", second);
        qtest_qmp_device_add(vm->qts, "scsi-hd", "sda",
                             "{ 'drive': 'n', 'bus': 'scsi.0' }");
        assert_refused(vm, "restore", 0, STATUS_CHANGED, "plugged");
        snapshot_save(vm, 1);
        info = snapshot_query(vm);
        g_assert_cmpuint(qlist_size(qdict_get_qlist(info, "disks")), ==, 2);
        qobject_unref(info);
        snapshot_restore(vm, 1);
        qtest_qmp_device_del(vm->qts, "sda");
        qtest_qmp_assert_success(
            vm->qts, "{ 'execute': 'blockdev-del', 'arguments': {"
            " 'node-name': 'n' } }");
        assert_refused(vm, "restore", 1, STATUS_CHANGED, "plugged");
        ide_write(vm, 0, 1, 0x33);
        snapshot_restore(vm, 0);
        ide_check(vm, 0, 1, 0x11);
    }
    snapshot_discard(vm, 1);
    snapshot_vm_end(vm);
    end_image(path, IMAGE_SECTORS * SECTOR, 0x11);
    end_image(second, IMAGE_SECTORS * SECTOR, 0x22);
}

/*
 * Catches: a save while others read or write the node in their own time, or
 * rely on a bitmap that would tell of nothing any more; a refusal that lasts.
 */
static void test_others(const void *machine)
{
    char *path = make_image(IMAGE_SECTORS * SECTOR, 0x11);
    char *target = make_image(IMAGE_SECTORS * SECTOR, 0x22);
    g_autofree char *socket = g_strdup_printf("%s.socket", path);
    SnapshotVM *vm = snapshot_vm_start(
        "", "-M %s -nodefaults -blockdev raw,node-name=n,file.driver=file,"
        "file.filename=%s "
        "-device ide-hd,drive=n,bus=ide.0,unit=0,id=hda,share-rw=on "
        "-blockdev raw,node-name=t,file.driver=file,file.filename=%s",
        (const char *)machine, path, target);

    qtest_qmp_assert_success(
        vm->qts, "{ 'execute': 'blockdev-backup', 'arguments': {"
        " 'job-id': 'job0', 'device': 'n', 'target': 't', 'sync': 'full',"
        " 'speed': 1 } }");
    assert_refused(vm, "save", 0, STATUS_REFUSED, "block job");
    qtest_qmp_assert_success(
        vm->qts, "{ 'execute': 'block-job-cancel', 'arguments': {"
        " 'device': 'job0', 'force': true } }");
    qtest_qmp_eventwait(vm->qts, "BLOCK_JOB_CANCELLED");

    qtest_qmp_assert_success(
        vm->qts, "{ 'execute': 'block-dirty-bitmap-add', 'arguments': {"
        " 'node': 'n', 'name': 'b0' } }");
    assert_refused(vm, "save", 0, STATUS_REFUSED, "bitmap 'b0'");
    qtest_qmp_assert_success(
        vm->qts, "{ 'execute': 'block-dirty-bitmap-remove', 'arguments': {"
        " 'node': 'n', 'name': 'b0' } }");

    qtest_qmp_assert_success(
        vm->qts, "{ 'execute': 'nbd-server-start', 'arguments': {"
        " 'addr': { 'type': 'unix', 'data': { 'path': %s } } } }", socket);
    qtest_qmp_assert_success(
        vm->qts, "{ 'execute': 'block-export-add', 'arguments': {"
        " 'type': 'nbd', 'id': 'x', 'node-name': 'n', 'writable': true } }");
    assert_refused(vm, "save", 0, STATUS_REFUSED, "Node 'n' is exported");
    qtest_qmp_assert_success(
        vm->qts, "{ 'execute': 'block-export-del', 'arguments': {"
        " 'id': 'x' } }");
    qtest_qmp_eventwait(vm->qts, "BLOCK_EXPORT_DELETED");

    snapshot_save(vm, 0);
    ide_write(vm, 0, 1, 0x33);
    snapshot_restore(vm, 0);
    ide_check(vm, 0, 1, 0x11);
    snapshot_vm_end(vm);
    end_image(path, IMAGE_SECTORS * SECTOR, 0x11);
    g_unlink(socket);
    g_unlink(target);
    g_free(target);
}

/* ---- Flash memory ---- */

static void flash_byte(SnapshotVM *vm, uint64_t offset, uint8_t value)
{
    qtest_writeb(vm->qts, FLASH + offset, 0x40);
    qtest_writeb(vm->qts, FLASH + offset, value);
    qtest_writeb(vm->qts, FLASH + offset, 0xff);
}

/*
 * Catches: flash memory whose file is written to by the guest or a restore;
 * one that the guest finds changed.
 */
static void test_flash(const void *machine)
{
    char *path = make_image(FLASH_SIZE, 0xff);
    SnapshotVM *vm = snapshot_vm_start(
        ",verify=on", "-M %s -rtc clock=vm -drive if=pflash,format=raw,file=%s",
        (const char *)machine, path);
    QDict *disk;
    int i;

    snapshot_save(vm, 0);
    flash_byte(vm, 0x1234, 0x5a);
    snapshot_save(vm, 1);
    for (i = 0; i < 3; i++) {
        flash_byte(vm, 0x1234, 0x50 - i);
        flash_byte(vm, 0x1f234, 0x77);
        snapshot_restore(vm, 1);
        g_assert_cmphex(qtest_readb(vm->qts, FLASH + 0x1234), ==, 0x5a);
        g_assert_cmphex(qtest_readb(vm->qts, FLASH + 0x1f234), ==, 0xff);
        disk = query_disk(vm);
        g_assert_cmpint(qdict_get_int(disk, "clusters"), ==, 1);
        qobject_unref(disk);
        snapshot_restore(vm, 0);
        g_assert_cmphex(qtest_readb(vm->qts, FLASH + 0x1234), ==, 0xff);
        disk = query_disk(vm);
        g_assert_cmpint(qdict_get_int(disk, "clusters"), ==, 0);
        qobject_unref(disk);
    }
    snapshot_vm_end(vm);
    end_image(path, FLASH_SIZE, 0xff);
}

/* ---- virtio-blk ---- */

typedef struct Virtio {
    SnapshotVM *vm;
    QVirtioPCIDevice *pci;
    QVirtioDevice *d;
    QGuestAllocator alloc;
    QVirtQueue *vq;
    uint64_t buffer;
} Virtio;

static void virtio_request(Virtio *v, uint32_t type, uint64_t sector)
{
    QTestState *qts = v->vm->qts;
    bool in = type == VIRTIO_BLK_T_IN;
    uint32_t head;

    qtest_writel(qts, v->buffer, type);
    qtest_writel(qts, v->buffer + 4, 0);
    qtest_writeq(qts, v->buffer + 8, sector);
    qtest_writeb(qts, v->buffer + 1024, 0xff);
    head = qvirtqueue_add(qts, v->vq, v->buffer, 16, false, true);
    qvirtqueue_add(qts, v->vq, v->buffer + 512, SECTOR, in, true);
    qvirtqueue_add(qts, v->vq, v->buffer + 1024, 1, true, false);
    qvirtqueue_kick(qts, v->d, v->vq, head);
    qvirtio_wait_used_elem(qts, v->d, v->vq, head, NULL, 10 * 1000 * 1000);
    g_assert_cmphex(qtest_readb(qts, v->buffer + 1024), ==, VIRTIO_BLK_S_OK);
}

static void virtio_write(Virtio *v, uint64_t sector, uint8_t value)
{
    qtest_memset(v->vm->qts, v->buffer + 512, value, SECTOR);
    virtio_request(v, VIRTIO_BLK_T_OUT, sector);
}

static void virtio_check(Virtio *v, uint64_t sector, uint8_t value)
{
    uint8_t data[SECTOR];
    unsigned i;

    virtio_request(v, VIRTIO_BLK_T_IN, sector);
    qtest_memread(v->vm->qts, v->buffer + 512, data, SECTOR);
    for (i = 0; i < SECTOR; i++) {
        g_assert_cmphex(data[i], ==, value);
    }
}

static void virtio_start(Virtio *v, const char *properties,
                         const char *machine, const char *path)
{
    QPCIAddress addr = { .devfn = QPCI_DEVFN(8, 0) };

    v->vm = snapshot_vm_start(
        properties, "-M %s -nodefaults -object iothread,id=io "
        "-drive if=none,id=d,format=raw,file=%s "
        "-device virtio-blk-pci,drive=d,iothread=io,addr=8,id=vda",
        machine, path);
    v->pci = virtio_pci_new(v->vm->pci, &addr);
    v->d = &v->pci->vdev;
    pc_alloc_init(&v->alloc, v->vm->qts, ALLOC_NO_FLAGS);
    qvirtio_pci_device_enable(v->pci);
    qvirtio_start_device(v->d);
    qvirtio_set_features(v->d, qvirtio_get_features(v->d) &
                         ~(QVIRTIO_F_BAD_FEATURE |
                           1ull << VIRTIO_RING_F_INDIRECT_DESC |
                           1ull << VIRTIO_RING_F_EVENT_IDX));
    v->vq = qvirtqueue_setup(v->d, &v->alloc, 0);
    qvirtio_set_driver_ok(v->d);
    v->buffer = guest_alloc(&v->alloc, 2048);
}

static void virtio_end(Virtio *v)
{
    qvirtqueue_cleanup(v->d->bus, v->vq, &v->alloc);
    g_free(v->pci->pdev);
    g_free(v->pci);
    alloc_destroy(&v->alloc);
    snapshot_vm_end(v->vm);
}

/* The driver here has indices of its own that have to go back, too. */
static void virtio_restore(Virtio *v, const QVirtQueue *saved)
{
    snapshot_restore(v->vm, 0);
    *v->vq = *saved;
}

/*
 * Catches: a disk in another thread that cannot have an overlay, or whose
 * requests are in flight while it goes back.
 */
static void test_iothread(const void *machine)
{
    char *path = make_image(IMAGE_SECTORS * SECTOR, 0x11);
    Virtio v = { };
    QVirtQueue saved;
    QDict *disk;
    unsigned i;

    virtio_start(&v, ",verify=on", machine, path);
    virtio_check(&v, 1, 0x11);
    snapshot_save(v.vm, 0);
    saved = *v.vq;
    disk = query_disk(v.vm);
    g_assert_cmpstr(qdict_get_str(disk, "device"), ==, "vda");
    qobject_unref(disk);
    for (i = 0; i < 5; i++) {
        virtio_write(&v, 1, 0x30 + i);
        virtio_write(&v, 5000 + i, 0x30 + i);
        virtio_check(&v, 1, 0x30 + i);
        virtio_restore(&v, &saved);
        virtio_check(&v, 1, 0x11);
        virtio_check(&v, 5000 + i, 0x11);
        virtio_restore(&v, &saved);
    }
    virtio_end(&v);
    end_image(path, IMAGE_SECTORS * SECTOR, 0x11);
}

/* ---- Commits ---- */

static void start_commit(SnapshotVM *vm, int slot)
{
    if (slot < 0) {
        qtest_qmp_assert_success(
            vm->qts, "{ 'execute': 'x-snapshot-device-commit', 'arguments': {"
            " 'job-id': 'job0' } }");
    } else {
        qtest_qmp_assert_success(
            vm->qts, "{ 'execute': 'x-snapshot-device-commit', 'arguments': {"
            " 'job-id': 'job0', 'slot': %d } }", slot);
    }
}

static void wait_concluded(SnapshotVM *vm)
{
    bool done = false;

    while (!done) {
        QDict *event = qtest_qmp_eventwait_ref(vm->qts, "JOB_STATUS_CHANGE");

        done = !strcmp(qdict_get_str(qdict_get_qdict(event, "data"), "status"),
                       "concluded");
        qobject_unref(event);
    }
}

/* @text: NULL, or what the error contains. */
static void wait_commit(SnapshotVM *vm, const char *text)
{
    QDict *answer, *job;

    wait_concluded(vm);
    answer = qtest_qmp(vm->qts, "{ 'execute': 'query-jobs' }");
    job = qobject_to(QDict, qlist_peek(qdict_get_qlist(answer, "return")));
    g_assert_cmpstr(qdict_get_str(job, "type"), ==, "snapshot-device-commit");
    if (text) {
        g_test_message("%s", qdict_get_str(job, "error"));
        g_assert_nonnull(strstr(qdict_get_str(job, "error"), text));
        g_assert_nonnull(strstr(qdict_get_str(job, "error"),
                                "has part of the content only"));
    } else {
        g_assert_false(qdict_haskey(job, "error"));
        g_assert_cmpint(qdict_get_int(job, "current-progress"), ==,
                        qdict_get_int(job, "total-progress"));
    }
    qobject_unref(answer);
    qtest_qmp_assert_success(vm->qts, "{ 'execute': 'job-dismiss',"
                             " 'arguments': { 'id': 'job0' } }");
    snapshot_assert_state(vm, "running");
}

static void commit(SnapshotVM *vm, int slot)
{
    start_commit(vm, slot);
    wait_commit(vm, NULL);
}

static void commit_refused(SnapshotVM *vm, int slot, const char *text)
{
    QDict *error = slot < 0 ? qtest_qmp_assert_failure_ref(
        vm->qts, "{ 'execute': 'x-snapshot-device-commit', 'arguments': {"
        " 'job-id': 'job0' } }") : qtest_qmp_assert_failure_ref(
        vm->qts, "{ 'execute': 'x-snapshot-device-commit', 'arguments': {"
        " 'job-id': 'job0', 'slot': %d } }", slot);

    g_test_message("%s", qdict_get_str(error, "desc"));
    g_assert_nonnull(strstr(qdict_get_str(error, "desc"), text));
    qobject_unref(error);
    snapshot_assert_state(vm, "running");
}

/* @used: what is in sector_of(i); the others have @value. */
static void check_image(const char *path, size_t size, uint8_t value,
                        const uint8_t *used)
{
    g_autofree uint8_t *wanted = g_malloc(size);
    g_autofree char *content = NULL;
    gsize length;
    unsigned i;

    memset(wanted, value, size);
    for (i = 0; i < USED_SECTORS; i++) {
        memset(wanted + sector_of(i) * SECTOR, used[i], SECTOR);
    }
    g_assert_true(g_file_get_contents(path, &content, &length, NULL));
    g_assert_cmpmem(content, length, wanted, size);
}

static void migration_refused(SnapshotVM *vm)
{
    QDict *error = qtest_qmp_assert_failure_ref(
        vm->qts, "{ 'execute': 'migrate', 'arguments': {"
        " 'uri': 'exec:cat >/dev/null' } }");

    g_assert_nonnull(strstr(qdict_get_str(error, "desc"),
                            "in this QEMU's memory only"));
    qobject_unref(error);
}

static void wait_for_migration(SnapshotVM *vm)
{
    bool done = false;

    while (!done) {
        QDict *info = qtest_qmp_assert_success_ref(
            vm->qts, "{ 'execute': 'query-migrate' }");
        const char *status = qdict_get_str(info, "status");

        g_assert_cmpstr(status, !=, "failed");
        done = !strcmp(status, "completed");
        qobject_unref(info);
        g_usleep(10000);
    }
}

/*
 * Catches: a migration, or an internal snapshot, without what is in memory; a
 * second save that is refused for that reason of ours; a machine that cannot be
 * migrated any more when all is in the image, and there are no slots.
 */
static void test_migration(const void *machine)
{
    char *path = make_image(IMAGE_SECTORS * SECTOR, 0x11);
    SnapshotVM *vm = start_ide(machine, "", path, "");
    uint8_t used[USED_SECTORS];
    QDict *disk;
    g_autofree char *text = NULL;

    memset(used, 0x11, sizeof(used));
    used[0] = 0x22;
    snapshot_save(vm, 0);
    snapshot_save(vm, 1);
    migration_refused(vm);
    text = qtest_hmp(vm->qts, "savevm a");
    g_assert_nonnull(strstr(text, "in this QEMU's memory only"));
    snapshot_save(vm, 0);
    snapshot_restore(vm, 0);

    ide_write(vm, 0, sector_of(0), used[0]);
    commit(vm, 1);
    snapshot_discard(vm, 1);
    snapshot_discard(vm, 0);
    migration_refused(vm);
    snapshot_save(vm, 0);
    commit(vm, -1);
    migration_refused(vm);
    snapshot_discard(vm, 0);
    disk = query_disk(vm);
    g_assert_cmpint(qdict_get_int(disk, "clusters"), ==, 0);
    g_assert_cmpint(qdict_get_int(disk, "memory-bytes"), ==, 0);
    qobject_unref(disk);
    qtest_qmp_assert_success(vm->qts, "{ 'execute': 'migrate', 'arguments': {"
                             " 'uri': 'exec:cat >/dev/null' } }");
    wait_for_migration(vm);
    snapshot_vm_end(vm);
    check_image(path, IMAGE_SECTORS * SECTOR, 0x11, used);
    g_unlink(path);
    g_free(path);
}

/*
 * Slots and commits of them in any order, and of what the guest sees, beside a
 * model.  Catches: content of another slot; what one commit wrote and the next
 * does not write back; a slot that has lost what was in the image before.
 */
static void test_commit(const void *machine)
{
    char *path = make_image(IMAGE_SECTORS * SECTOR, 0x11);
    SnapshotVM *vm = start_ide(machine, ",slots=4,verify=on,overlay-size=32k",
                               path, "");
    g_autoptr(GRand) rand = g_rand_new_with_seed(2);
    Content c = { };
    QDict *disk, *info;
    unsigned i, j, k;

    memset(c.present, 0x11, USED_SECTORS);
    commit(vm, -1);                     /* Nothing to do yet */
    for (i = 0; i < 300; i++) {
        unsigned n = g_rand_int_range(rand, 0, 4);
        unsigned what = g_rand_int_range(rand, 0, 16);

        if (what == 0 || !c.in_use[n]) {
            snapshot_save(vm, n);
            memcpy(c.saved[n], c.present, USED_SECTORS);
            c.in_use[n] = true;
        } else if (what == 1) {
            snapshot_discard(vm, n);
            c.in_use[n] = false;
        } else if (what < 5) {
            snapshot_restore(vm, n);
            memcpy(c.present, c.saved[n], USED_SECTORS);
            for (k = 0; k < 6; k++) {
                j = g_rand_int_range(rand, 0, USED_SECTORS);
                ide_check(vm, 0, sector_of(j), c.present[j]);
            }
        } else if (what < 8) {
            commit(vm, n);
            check_image(path, IMAGE_SECTORS * SECTOR, 0x11, c.saved[n]);
        } else if (what == 8) {
            commit(vm, -1);
            check_image(path, IMAGE_SECTORS * SECTOR, 0x11, c.present);
        } else {
            j = g_rand_int_range(rand, 0, USED_SECTORS);
            c.present[j] = i;
            ide_write(vm, 0, sector_of(j), i);
        }
        if (what >= 5) {
            j = g_rand_int_range(rand, 0, USED_SECTORS);
            ide_check(vm, 0, sector_of(j), c.present[j]);
        }
    }

    /* With no slots, nothing stays in memory. */
    for (i = 0; i < 4; i++) {
        if (c.in_use[i]) {
            snapshot_discard(vm, i);
        }
    }
    commit(vm, -1);
    disk = query_disk(vm);
    g_assert_cmpint(qdict_get_int(disk, "clusters"), ==, 0);
    g_assert_cmpint(qdict_get_int(disk, "memory-bytes"), ==, 0);
    g_assert_cmpint(qdict_get_int(disk, "spilled-bytes"), ==, 0);
    qobject_unref(disk);
    for (j = 0; j < USED_SECTORS; j++) {
        ide_check(vm, 0, sector_of(j), c.present[j]);
    }
    info = snapshot_query(vm);
    g_assert_cmpint(qdict_get_int(info, "mismatched"), ==, 0);
    qobject_unref(info);
    snapshot_vm_end(vm);
    check_image(path, IMAGE_SECTORS * SECTOR, 0x11, c.present);
    g_unlink(path);
    g_free(path);
}

/*
 * Catches: a disk that is left out; RAM that goes back with the disks; an HMP
 * command that does not wait, or takes no slot for slot 0.
 */
static void test_commit_several(const void *machine)
{
    uint8_t first[USED_SECTORS], second[USED_SECTORS];
    char *path = make_image(IMAGE_SECTORS * SECTOR, 0x11);
    char *path2 = make_image(IMAGE_SECTORS * SECTOR, 0x22);
    g_autofree char *more = g_strdup_printf(
        "-drive if=none,id=e,format=raw,file=%s "
        "-device ide-hd,drive=e,bus=ide.0,unit=1,id=hdb", path2);
    SnapshotVM *vm = start_ide(machine, "", path, more);
    g_autofree char *text = NULL, *none = NULL, *wrong = NULL;

    memset(first, 0x11, USED_SECTORS);
    memset(second, 0x22, USED_SECTORS);
    snapshot_save(vm, 0);
    ide_write(vm, 0, sector_of(1), 0x33);
    ide_write(vm, 1, sector_of(2), 0x44);
    snapshot_save(vm, 1);
    ide_write(vm, 0, sector_of(1), 0x55);
    ide_write(vm, 1, sector_of(2), 0x66);
    qtest_writeb(vm->qts, 0x100000, 0x5a);
    commit(vm, 1);
    first[1] = 0x33;
    second[2] = 0x44;
    check_image(path, IMAGE_SECTORS * SECTOR, 0x11, first);
    check_image(path2, IMAGE_SECTORS * SECTOR, 0x22, second);
    g_assert_cmphex(qtest_readb(vm->qts, 0x100000), ==, 0x5a);
    ide_check(vm, 0, sector_of(1), 0x55);
    ide_check(vm, 1, sector_of(2), 0x66);

    text = qtest_hmp(vm->qts, "x_snapshot_device_commit");
    g_assert_cmpstr(text, ==, "");
    first[1] = 0x55;
    second[2] = 0x66;
    check_image(path, IMAGE_SECTORS * SECTOR, 0x11, first);
    check_image(path2, IMAGE_SECTORS * SECTOR, 0x22, second);
    none = qtest_hmp(vm->qts, "x_snapshot_device_commit 0");
    g_assert_cmpstr(none, ==, "");
    first[1] = 0x11;
    second[2] = 0x22;
    check_image(path, IMAGE_SECTORS * SECTOR, 0x11, first);
    check_image(path2, IMAGE_SECTORS * SECTOR, 0x22, second);
    wrong = qtest_hmp(vm->qts, "x_snapshot_device_commit 2");
    g_assert_nonnull(strstr(wrong, "There is no snapshot in slot 2"));
    ide_check(vm, 0, sector_of(1), 0x55);
    snapshot_restore(vm, 1);
    ide_check(vm, 0, sector_of(1), 0x33);
    ide_check(vm, 1, sector_of(2), 0x44);
    snapshot_vm_end(vm);
    end_image(path, IMAGE_SECTORS * SECTOR, 0x11);
    end_image(path2, IMAGE_SECTORS * SECTOR, 0x22);
}

static void assert_differs(SnapshotVM *vm, bool differs)
{
    QDict *m = qtest_qmp_assert_success_ref(
        vm->qts, "{ 'execute': 'x-snapshot-device-verify',"
        " 'arguments': { 'slot': 0 } }");
    QList *disks = qdict_get_qlist(m, "disks");

    g_assert_cmpuint(qlist_size(disks), ==, differs);
    if (differs) {
        g_assert_cmpstr(qstring_get_str(qobject_to(QString,
                                                   qlist_peek(disks))), ==,
                        "hda");
    }
    qobject_unref(m);
}

/*
 * Catches: a disk that did not go back, or not in all of its content, which
 * nobody is told of; a disk taken for another one for how it came to be as it
 * is.
 */
static void test_verify(const void *machine)
{
    char *path = make_image(IMAGE_SECTORS * SECTOR, 0x11);
    SnapshotVM *vm = start_ide(machine, ",verify=on", path, "");
    QDict *info;
    unsigned i;

    /* From here on, the overlay has what is written. */
    snapshot_save(vm, 0);
    ide_write(vm, 0, 1, 0x22);
    ide_write(vm, 0, 9, 0x22);
    snapshot_save(vm, 0);
    assert_differs(vm, false);
    for (i = 0; i < 3; i++) {
        ide_write(vm, 0, 1 + 8 * i, 0x30 + i);
        assert_differs(vm, true);
        snapshot_restore(vm, 0);
        assert_differs(vm, false);
        ide_write(vm, 0, 5000 + i, 0);
        snapshot_save(vm, 1);
        assert_differs(vm, true);
        snapshot_restore(vm, 0);
        assert_differs(vm, false);
    }
    ide_write(vm, 0, 1, 0x33);
    ide_write(vm, 0, 1, 0x22);
    assert_differs(vm, false);
    commit(vm, 1);
    assert_differs(vm, false);
    info = snapshot_query(vm);
    g_assert_cmpint(qdict_get_int(info, "mismatched"), ==, 0);
    g_assert_cmpint(qdict_get_int(info, "verified"), ==, 6);
    qobject_unref(info);
    snapshot_vm_end(vm);
    unlink(path);
    g_free(path);
}

/*
 * Catches: a disk that cannot be opened anew, as its file has no name; one
 * whose commit would be of no use.
 */
static void test_temporary(const void *machine)
{
    char *path = make_image(IMAGE_SECTORS * SECTOR, 0x11);
    SnapshotVM *vm = start_ide(machine, "", path, "-snapshot");

    ide_write(vm, 0, 1, 0x22);
    snapshot_save(vm, 0);
    ide_write(vm, 0, 1, 0x33);
    ide_write(vm, 0, 2, 0x33);
    commit_refused(vm, 0, "Disk of 'hda' cannot be committed: Node");
    snapshot_restore(vm, 0);
    ide_check(vm, 0, 1, 0x22);
    ide_check(vm, 0, 2, 0x11);
    snapshot_vm_end(vm);
    end_image(path, IMAGE_SECTORS * SECTOR, 0x11);
}

/* Catches: what is committed though the user has said that disks stay. */
static void test_commit_refused(const void *machine)
{
    static const char *const disks[] = { "keep", "refuse" };
    char *path = make_image(IMAGE_SECTORS * SECTOR, 0x11);
    SnapshotVM *vm;
    unsigned i;

    for (i = 0; i < 2; i++) {
        g_autofree char *properties = g_strdup_printf(",disks=%s", disks[i]);

        vm = start_ide(machine, properties, path, "");
        commit_refused(vm, -1, "nothing to commit");
        snapshot_vm_end(vm);
    }

    vm = start_ide(machine, "", path, "-device virtio-scsi-pci,id=scsi "
                   "-blockdev null-co,node-name=n,size=1048576,read-zeroes=on");
    commit_refused(vm, 0, "There is no snapshot in slot 0");
    snapshot_save(vm, 0);
    commit_refused(vm, 1, "There is no snapshot in slot 1");
    commit_refused(vm, 64, "There is no slot 64");
    qtest_qmp_device_add(vm->qts, "scsi-hd", "sda",
                         "{ 'drive': 'n', 'bus': 'scsi.0' }");
    commit_refused(vm, 0, "Disk of 'sda' was not there");
    commit(vm, -1);
    snapshot_vm_end(vm);
    end_image(path, IMAGE_SECTORS * SECTOR, 0x11);
}

static SnapshotVM *start_blkdebug(const void *machine, const char *path,
                                  const char *options)
{
    return snapshot_vm_start(
        "", "-M %s -nodefaults -blockdev driver=raw,node-name=n,"
        "file.driver=blkdebug,file.image.driver=file,file.image.filename=%s%s "
        "-device ide-hd,drive=n,bus=ide.0,unit=0,id=hda",
        (const char *)machine, path, options);
}

/* Go on from the save, and commit: the image has what one did not come to. */
static void end_commit(SnapshotVM *vm, char *path, uint8_t *used)
{
    ide_check(vm, 0, sector_of(3), 0x11);
    ide_write(vm, 0, sector_of(4), 0x55);
    commit(vm, -1);
    used[3] = 0x11;
    used[4] = 0x55;
    check_image(path, IMAGE_SECTORS * SECTOR, 0x11, used);
    snapshot_vm_end(vm);
    g_unlink(path);
    g_free(path);
}

/*
 * Catches: a save or restore in the middle of a commit, by the guest or the
 * host; a job that cannot be cancelled, or goes on then.
 */
static void test_commit_busy(const void *machine)
{
    static const char *const commands[] = { "save", "restore", "discard" };
    uint8_t used[USED_SECTORS];
    char *path = make_image(IMAGE_SECTORS * SECTOR, 0x11);
    SnapshotVM *vm = start_blkdebug(machine, path, "");
    unsigned i;

    memset(used, 0x11, USED_SECTORS);
    ide_check(vm, 0, sector_of(1), 0x11);
    snapshot_save(vm, 0);
    ide_write(vm, 0, sector_of(3), 0x33);
    ide_write(vm, 0, sector_of(4), 0x44);
    g_free(qtest_hmp(vm->qts, "qemu-io -d hda \"break pwritev A\""));
    start_commit(vm, -1);
    g_free(qtest_hmp(vm->qts, "qemu-io -d hda \"wait_break A\""));
    snapshot_assert_state(vm, "paused");
    for (i = 0; i < ARRAY_SIZE(commands); i++) {
        snapshot_qmp_refused(vm, commands[i], 0, "commit of disks");
    }
    g_assert_cmphex(snapshot_command(vm, SNAPSHOT_CMD_RESTORE, 0), ==,
                    SNAPSHOT_STATUS_ERROR | SNAPSHOT_E_BUSY);
    qtest_qmp_assert_success(vm->qts, "{ 'execute': 'job-cancel',"
                             " 'arguments': { 'id': 'job0' } }");
    g_free(qtest_hmp(vm->qts, "qemu-io -d hda \"resume A\""));
    wait_commit(vm, "cancelled");

    used[3] = 0x33;                     /* and no more */
    check_image(path, IMAGE_SECTORS * SECTOR, 0x11, used);
    ide_check(vm, 0, sector_of(4), 0x44);
    snapshot_restore(vm, 0);
    ide_check(vm, 0, sector_of(4), 0x11);
    end_commit(vm, path, used);
}

/*
 * Catches: an error that is not told, or not of which disk; a guest that finds
 * its disk changed then; a commit that cannot be tried again.
 */
static void test_commit_error(const void *machine)
{
    uint8_t used[USED_SECTORS];
    char *path = make_image(IMAGE_SECTORS * SECTOR, 0x11);
    g_autofree char *options = g_strdup_printf(
        ",file.inject-error.0.event=none,file.inject-error.0.iotype=write,"
        "file.inject-error.0.once=on,file.inject-error.0.errno=28,"
        "file.inject-error.0.sector=%u", sector_of(4));
    SnapshotVM *vm = start_blkdebug(machine, path, options);

    memset(used, 0x11, USED_SECTORS);
    snapshot_save(vm, 0);
    ide_write(vm, 0, sector_of(3), 0x33);
    ide_write(vm, 0, sector_of(4), 0x44);
    start_commit(vm, -1);
    wait_commit(vm, "image of 'hda'");
    used[3] = 0x33;
    check_image(path, IMAGE_SECTORS * SECTOR, 0x11, used);
    ide_check(vm, 0, sector_of(3), 0x33);
    ide_check(vm, 0, sector_of(4), 0x44);
    snapshot_restore(vm, 0);
    end_commit(vm, path, used);
}

/*
 * QEMU ends while a job writes slowly.  Catches: one that waits for the other
 * for ever; a job that goes on where all is to be at rest; a guest that runs
 * again on the way out.
 */
static void test_commit_quit(const void *machine)
{
    char *path = make_image(IMAGE_SECTORS * SECTOR, 0x11);
    SnapshotVM *vm = snapshot_vm_start(
        "", "-M %s -nodefaults "
        "-object throttle-group,id=tg,x-bps-write=2048 "
        "-blockdev driver=throttle,throttle-group=tg,node-name=n,"
        "file.driver=raw,file.file.driver=file,file.file.filename=%s "
        "-device ide-hd,drive=n,bus=ide.0,unit=0,id=hda",
        (const char *)machine, path);
    g_autofree char *content = NULL;
    bool done = false;
    unsigned i;

    snapshot_save(vm, 0);
    for (i = 0; i < 30; i++) {
        ide_write(vm, 0, i * 8, 0x33);
    }
    start_commit(vm, -1);
    /* A reset does not get in its way, nor does somebody who drains. */
    qtest_qmp_assert_success(vm->qts, "{ 'execute': 'system_reset' }");
    qtest_qmp_eventwait(vm->qts, "RESET");
    qtest_qmp_assert_success(
        vm->qts, "{ 'execute': 'blockdev-add', 'arguments': {"
        " 'driver': 'raw', 'node-name': 'r', 'read-only': true,"
        " 'file': 'n' } }");
    g_assert_true(g_file_get_contents(path, &content, NULL, NULL));
    g_assert_cmphex((uint8_t)content[29 * 8 * SECTOR], ==, 0x11);

    qtest_qmp_send(vm->qts, "{ 'execute': 'quit' }");
    while (!done) {
        QDict *message = qtest_qmp_receive_dict(vm->qts);
        const char *event = qdict_get_try_str(message, "event");

        g_assert_cmpstr(event, !=, "RESUME");
        done = !g_strcmp0(event, "JOB_STATUS_CHANGE") &&
            !strcmp(qdict_get_str(qdict_get_qdict(message, "data"), "status"),
                    "concluded");
        qobject_unref(message);
    }
    snapshot_vm_end(vm);
    g_free(content);
    g_assert_true(g_file_get_contents(path, &content, NULL, NULL));
    for (i = 1; i < 30; i++) {
        /* 0x33, and from some sector on 0x11 */
        g_assert_cmphex((uint8_t)content[i * 8 * SECTOR], <=,
                        (uint8_t)content[(i - 1) * 8 * SECTOR]);
    }
    g_unlink(path);
    g_free(path);
}

/* Catches: a commit that needs the disk to be in the main loop's thread. */
static void test_commit_iothread(const void *machine)
{
    uint8_t used[USED_SECTORS];
    char *path = make_image(IMAGE_SECTORS * SECTOR, 0x11);
    Virtio v = { };
    QVirtQueue saved;
    unsigned i;

    memset(used, 0x11, USED_SECTORS);
    virtio_start(&v, ",verify=on", machine, path);
    virtio_check(&v, sector_of(1), 0x11);
    virtio_write(&v, sector_of(2), 0x22);
    snapshot_save(v.vm, 0);
    saved = *v.vq;
    for (i = 0; i < 3; i++) {
        virtio_write(&v, sector_of(1), 0x30 + i);
        commit(v.vm, -1);
        used[1] = 0x30 + i;
        used[2] = 0x22;
        check_image(path, IMAGE_SECTORS * SECTOR, 0x11, used);
        virtio_check(&v, sector_of(1), 0x30 + i);
        commit(v.vm, 0);
        used[1] = 0x11;
        check_image(path, IMAGE_SECTORS * SECTOR, 0x11, used);
        virtio_check(&v, sector_of(1), 0x30 + i);
        virtio_restore(&v, &saved);
        virtio_check(&v, sector_of(1), 0x11);
        virtio_check(&v, sector_of(2), 0x22);
        virtio_restore(&v, &saved);
    }
    virtio_end(&v);
    check_image(path, IMAGE_SECTORS * SECTOR, 0x11, used);
    g_unlink(path);
    g_free(path);
}

/* IDE at port 0x1f0 is the pc's, as is a controller of floppies. */
/* ---- Files of slots ---- */

/* Returns: the answer, to be freed */
static QDict *start_export(SnapshotVM *vm, const char *file, int64_t speed)
{
    return qtest_qmp(vm->qts, "{ 'execute': 'x-snapshot-device-export',"
                     " 'arguments': { 'job-id': 'export0', 'slot': 0,"
                     " 'file': %s, 'speed': %" PRId64 " } }", file, speed);
}

static void export_refused(SnapshotVM *vm, const char *file, const char *text)
{
    QDict *answer = start_export(vm, file, 0);
    const char *desc;

    g_assert_true(qdict_haskey(answer, "error"));
    desc = qdict_get_str(qdict_get_qdict(answer, "error"), "desc");
    g_test_message("%s", desc);
    g_assert_nonnull(strstr(desc, text));
    qobject_unref(answer);
}

static void end_export(SnapshotVM *vm, const char *text)
{
    QDict *answer;
    const char *error;

    wait_concluded(vm);
    answer = qtest_qmp(vm->qts, "{ 'execute': 'query-jobs' }");
    error = qdict_get_try_str(qobject_to(QDict, qlist_peek(
                              qdict_get_qlist(answer, "return"))), "error");
    g_test_message("%s", error ?: "no error");
    g_assert_true(text ? error && strstr(error, text) : !error);
    qobject_unref(answer);
    qtest_qmp_assert_success(vm->qts, "{ 'execute': 'job-dismiss',"
                             " 'arguments': { 'id': 'export0' } }");
}

static void export(SnapshotVM *vm, const char *file)
{
    QDict *answer = start_export(vm, file, 0);

    g_assert_true(qdict_haskey(answer, "return"));
    qobject_unref(answer);
    end_export(vm, NULL);
}

static void remove_files(const char *file)
{
    g_autofree char *image = g_strdup_printf("%s.0.qcow2", file);

    g_unlink(image);
    g_unlink(file);
}

/*
 * Catches: a commit to an image while a file is written that is to belong to it
 * as it is, because nothing was written to the disk: it would belong to it as
 * it has become.
 */
static void test_export_commit(const void *machine)
{
    char *path = make_image(IMAGE_SECTORS * SECTOR, 0x11);
    g_autofree char *file = g_strdup_printf("%s.slot", path);
    SnapshotVM *vm = start_ide(machine, "", path, "");

    snapshot_fill(vm, 1 * MiB, 16 * MiB, 1);
    snapshot_save(vm, 0);
    ide_write(vm, 0, 1, 0x33);
    qobject_unref(start_export(vm, file, 1 * MiB));
    commit_refused(vm, -1, "a slot is being exported");
    qtest_qmp_assert_success(vm->qts, "{ 'execute': 'job-cancel',"
                             " 'arguments': { 'id': 'export0' } }");
    end_export(vm, "cancelled");
    commit(vm, -1);
    snapshot_vm_end(vm);
    remove_files(file);
    g_unlink(path);
    g_free(path);
}

static void use_fd(SnapshotVM *vm, const char *file, int flags)
{
    int fd = open(file, flags);

    g_assert_cmpint(fd, >=, 0);
    qtest_qmp_fds_assert_success(vm->qts, &fd, 1, "{ 'execute': 'add-fd',"
                                 " 'arguments': { 'fdset-id': 1 } }");
    close(fd);
}

/*
 * Catches: a descriptor that a slot cannot be written to, though its disks are
 * as their images are; one whose file is emptied, and then refused.
 */
static void test_export_fd(const void *machine)
{
    char *path = make_image(IMAGE_SECTORS * SECTOR, 0x11);
    g_autofree char *file = g_strdup_printf("%s.slot", path), *old = NULL;
    SnapshotVM *vm = start_ide(machine, "", path, "");

    snapshot_fill(vm, 1 * MiB, 16 * MiB, 1);
    snapshot_save(vm, 0);
    g_assert_true(g_file_set_contents(file, "old", -1, NULL));
    use_fd(vm, file, O_RDWR);
    export(vm, "/dev/fdset/1");
    snapshot_fill(vm, 1 * MiB, 16 * MiB, 2);
    qtest_qmp_assert_success(
        vm->qts, "{ 'execute': 'x-snapshot-device-import', 'arguments': "
        "{ 'slot': 1, 'file': %s, 'check': true } }", file);
    snapshot_restore(vm, 1);
    snapshot_check(vm, 1 * MiB, 16 * MiB, 1);
    snapshot_discard(vm, 1);
    snapshot_restore(vm, 0);

    g_assert_true(g_file_set_contents(file, "old", -1, NULL));
    use_fd(vm, file, O_RDWR);
    ide_write(vm, 0, 1, 0x33);
    snapshot_save(vm, 0);
    export_refused(vm, "/dev/fdset/1", "has written to the disk of 'hda'");
    g_assert_true(g_file_get_contents(file, &old, NULL, NULL));
    g_assert_cmpstr(old, ==, "old");
    export(vm, file);
    snapshot_vm_end(vm);
    remove_files(file);
    end_image(path, IMAGE_SECTORS * SECTOR, 0x11);
}

/*
 * Catches: a disk that is no file of the host's, which is told of when all else
 * is written, or not at all.
 */
static void test_export_device(const void *machine)
{
    char *path = make_image(IMAGE_SECTORS * SECTOR, 0x11);
    g_autofree char *file = g_strdup_printf("%s.slot", path);
    SnapshotVM *vm = start_ide(machine, "", path, "");
    QDict *error;

    snapshot_save(vm, 0);
    export(vm, file);
    snapshot_vm_end(vm);

    vm = snapshot_vm_start(
        "", "-M %s -nodefaults -drive if=none,id=d,format=raw,"
        "file.driver=null-co,file.size=8M,file.read-zeroes=on "
        "-device ide-hd,drive=d,bus=ide.0,unit=0,id=hda",
        (const char *)machine);
    error = qtest_qmp_assert_failure_ref(
        vm->qts, "{ 'execute': 'x-snapshot-device-import', 'arguments': "
        "{ 'slot': 1, 'file': %s } }", file);
    g_test_message("%s", qdict_get_str(error, "desc"));
    g_assert_nonnull(strstr(qdict_get_str(error, "desc"), "no regular file"));
    qobject_unref(error);
    snapshot_save(vm, 0);
    export_refused(vm, file, "no regular file");
    ide_write(vm, 0, 1, 0x33);
    snapshot_save(vm, 0);
    export(vm, file);
    snapshot_vm_end(vm);
    remove_files(file);
    end_image(path, IMAGE_SECTORS * SECTOR, 0x11);
}

/* Catches: an image that is a new one while the file is not, and no error. */
static void test_export_half(const void *machine)
{
    char *path = make_image(IMAGE_SECTORS * SECTOR, 0x11);
    g_autofree char *file = g_strdup_printf("%s.slot", path);
    SnapshotVM *vm = start_ide(machine, "", path, "");
    QDict *answer;

    snapshot_save(vm, 0);
    answer = start_export(vm, file, 256 * MiB);
    g_assert_true(qdict_haskey(answer, "return"));
    qobject_unref(answer);
    g_assert_cmpint(g_mkdir(file, 0700), ==, 0);
    end_export(vm, "failed: Is a directory");

    g_assert_cmpint(g_rmdir(file), ==, 0);
    ide_write(vm, 0, 1, 0x33);
    snapshot_save(vm, 0);
    qobject_unref(start_export(vm, file, 256 * MiB));
    g_assert_cmpint(g_mkdir(file, 0700), ==, 0);
    end_export(vm, "images of disks beside it are new ones already");
    snapshot_vm_end(vm);
    g_assert_cmpint(g_rmdir(file), ==, 0);
    remove_files(file);
    end_image(path, IMAGE_SECTORS * SECTOR, 0x11);
}

static void add_pc_tests(const char *name, GTestDataFunc test)
{
    snapshot_add_test("pc", "remap", name, test);
    snapshot_add_test("pc", "dirty", name, test);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    add_pc_tests("disks/slots", test_slots);
    add_pc_tests("disks/several", test_several);
    add_pc_tests("disks/spill", test_spill);
    add_pc_tests("disks/keep", test_keep);
    add_pc_tests("disks/refuse", test_refuse);
    add_pc_tests("disks/plug", test_plug);
    add_pc_tests("disks/others", test_others);
    add_pc_tests("disks/migration", test_migration);
    add_pc_tests("disks/commit/temporary", test_temporary);
    add_pc_tests("disks/medium", test_medium);
    add_pc_tests("disks/cdrom", test_cdrom);
    add_pc_tests("disks/verify", test_verify);
    add_pc_tests("disks/commit/slots", test_commit);
    add_pc_tests("disks/commit/several", test_commit_several);
    add_pc_tests("disks/commit/refused", test_commit_refused);
    add_pc_tests("disks/commit/busy", test_commit_busy);
    add_pc_tests("disks/commit/error", test_commit_error);
    add_pc_tests("disks/commit/quit", test_commit_quit);
    add_pc_tests("disks/export/commit", test_export_commit);
    add_pc_tests("disks/export/fd", test_export_fd);
    add_pc_tests("disks/export/device", test_export_device);
    add_pc_tests("disks/export/half", test_export_half);
    snapshot_add_tests("disks/flash", test_flash);
    if (qtest_has_device("virtio-blk-pci")) {
        snapshot_add_tests("disks/iothread", test_iothread);
        snapshot_add_tests("disks/commit/iothread", test_commit_iothread);
    }
    return g_test_run();
}
