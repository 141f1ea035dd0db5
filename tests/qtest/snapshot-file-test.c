/*
 * Tests of slots of the snapshot device in files: what is written to one and
 * taken from it is exact, whatever is wrong with a file is refused, and neither
 * harms the machine
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <zlib.h>
#include "qemu/bitops.h"
#include "qemu/bswap.h"
#include "qemu/cutils.h"
#include "qemu/memfd.h"
#include "qemu/units.h"
#include "qapi/error.h"
#include "qobject/qdict.h"
#include "qobject/qjson.h"
#include "qobject/qlist.h"
#include "qobject/qnum.h"
#include "qobject/qstring.h"
#include "hw/pci/pci_regs.h"
#include "../migration/vm-snapshot-file.h"
#include "snapshot-file-edit.h"
#include "snapshot-utils.h"

#define PAGE    4096
#define SLOTS   5
#define RAM     (16 * MiB)

/* Of all tests; removed with what is left in it */
static char *dir;

static char *path_of(const char *name)
{
    return g_build_filename(dir, name, NULL);
}

/* The machine does not run: nothing changes but what is changed here. */
static SnapshotVM *start(const char *machine, const char *args)
{
    return snapshot_vm_start(",slots=5", "-M %s -m 16 -serial null "
                             "-rtc clock=vm -S %s", machine, args);
}

/* A machine from a file, made as start() makes it; no register is touched. */
static QTestState *start_from(const SnapshotVM *like, const char *machine,
                              const char *file, const char *args)
{
    return qtest_initf("-M %s -m 16 -serial null -rtc clock=vm -S %s "
                       "-device snapshot,slots=5,ram=%s,load=%s", machine, args,
                       like->remap ? "remap" : "dirty", file);
}

static void qmp_slot(QTestState *qts, const char *command, unsigned slot)
{
    qtest_qmp_assert_success(qts, "{ 'execute': %s,"
                             " 'arguments': { 'slot': %u } }", command, slot);
}

static void restore(QTestState *qts, unsigned slot)
{
    qmp_slot(qts, "x-snapshot-device-restore", slot);
}

/* Find nothing that is not as in the slot. */
static void assert_exact(QTestState *qts, unsigned slot)
{
    QDict *found = qtest_qmp_assert_success_ref(
        qts, "{ 'execute': 'x-snapshot-device-verify',"
        " 'arguments': { 'slot': %u } }", slot);
    GString *s = qobject_to_json_pretty(QOBJECT(found), false);

    if (qdict_get_int(found, "pages") || qdict_get_int(found, "fields")) {
        g_test_message("%s", s->str);
    }
    g_assert_cmpuint(qdict_get_int(found, "pages"), ==, 0);
    g_assert_cmpuint(qdict_get_int(found, "fields"), ==, 0);
    g_string_free(s, true);
    qobject_unref(found);
}

/* The only job there is; the caller owns it. */
static QDict *query_job(QTestState *qts)
{
    QDict *rsp = qtest_qmp(qts, "{ 'execute': 'query-jobs' }");
    QList *jobs = qdict_get_qlist(rsp, "return");
    QDict *job = qobject_to(QDict, qlist_peek(jobs));

    g_assert_nonnull(job);
    qobject_ref(job);
    qobject_unref(rsp);
    return job;
}

/* Wait for its end.  Returns: its error, to be freed, or NULL */
static char *end_job(QTestState *qts)
{
    char *error = NULL;

    for (unsigned tries = 0;; tries++) {
        QDict *job = query_job(qts);
        bool over = !strcmp(qdict_get_str(job, "status"), "concluded");

        if (over) {
            error = g_strdup(qdict_get_try_str(job, "error"));
            qtest_qmp_assert_success(qts, "{ 'execute': 'job-dismiss',"
                                     " 'arguments': { 'id': %s } }",
                                     qdict_get_str(job, "id"));
        }
        qobject_unref(job);
        if (over) {
            return error;
        }
        g_assert_cmpuint(tries, <, 60000);
        g_usleep(1000);
    }
}

/* Only what differs from @base, if that is not NULL */
static void export_on(QTestState *qts, unsigned slot, const char *file,
                      const char *base)
{
    g_autofree char *error = NULL;
    QDict *args = qdict_new();

    qdict_put_str(args, "job-id", "e");
    qdict_put_int(args, "slot", slot);
    qdict_put_str(args, "file", file);
    if (base) {
        qdict_put_str(args, "base", base);
    }
    qtest_qmp_assert_success(qts, "{ 'execute': 'x-snapshot-device-export',"
                             " 'arguments': %p }", args);
    error = end_job(qts);
    g_assert_cmpstr(error, ==, NULL);
}

static void start_export(QTestState *qts, unsigned slot, const char *file,
                         uint64_t speed)
{
    qtest_qmp_assert_success(
        qts, "{ 'execute': 'x-snapshot-device-export', 'arguments': "
        "{ 'job-id': 'e', 'slot': %u, 'file': %s, 'speed': %" PRIu64 " } }",
        slot, file, speed);
}

static void export(QTestState *qts, unsigned slot, const char *file)
{
    export_on(qts, slot, file, NULL);
}

static void import(QTestState *qts, unsigned slot, const char *file)
{
    qtest_qmp_assert_success(
        qts, "{ 'execute': 'x-snapshot-device-import', 'arguments': "
        "{ 'slot': %u, 'file': %s } }", slot, file);
}

static void assert_error(QDict *error, const char *text)
{
    const char *desc = qdict_get_str(error, "desc");

    g_test_message("%s", desc);
    g_assert_cmpstr(qdict_get_str(error, "class"), ==, "GenericError");
    g_assert_nonnull(strstr(desc, text));
    qobject_unref(error);
}

static void import_refused(QTestState *qts, const char *file, bool check,
                           const char *text)
{
    assert_error(qtest_qmp_assert_failure_ref(
        qts, "{ 'execute': 'x-snapshot-device-import', 'arguments': "
        "{ 'slot': 4, 'file': %s, 'check': %i } }", file, check), text);
}

static void export_refused(QTestState *qts, const char *file, const char *text)
{
    assert_error(qtest_qmp_assert_failure_ref(
        qts, "{ 'execute': 'x-snapshot-device-export', 'arguments': "
        "{ 'job-id': 'e', 'slot': 0, 'file': %s } }", file), text);
}

static void export_on_refused(QTestState *qts, const char *file,
                              const char *base, const char *text)
{
    assert_error(qtest_qmp_assert_failure_ref(
        qts, "{ 'execute': 'x-snapshot-device-export', 'arguments': "
        "{ 'job-id': 'e', 'slot': 0, 'file': %s, 'base': %s } }", file, base),
        text);
}

static uint64_t get_uint(const QDict *d, const char *key)
{
    return qnum_get_uint(qobject_to(QNum, qdict_get(d, key)));
}

/* What an export wrote */
typedef struct File {
    int fd;
    uint64_t size;
    uint64_t offset;            /* of the description */
    QDict *d;
    char *text;                 /* the same */
} File;

static void read_at(const File *f, void *buf, size_t len, uint64_t offset)
{
    g_assert_cmpint(pread(f->fd, buf, len, offset), ==, len);
}

static void write_at(const File *f, const void *buf, size_t len,
                     uint64_t offset)
{
    g_assert_cmpint(pwrite(f->fd, buf, len, offset), ==, len);
}

/* To be written to by tests, too: nobody has mapped it then. */
static File *open_file(const char *path)
{
    File *f = g_new0(File, 1);
    SnapshotFileFooter footer;
    struct stat st;
    uint32_t length;

    g_assert_cmpint(chmod(path, 0600), ==, 0);
    f->fd = open(path, O_RDWR);
    g_assert_cmpint(f->fd, >=, 0);
    g_assert_cmpint(fstat(f->fd, &st), ==, 0);
    f->size = st.st_size;
    read_at(f, &footer, sizeof(footer), f->size - sizeof(footer));
    g_assert_cmpint(memcmp(footer.magic, SNAPSHOT_FILE_MAGIC, 8), ==, 0);
    f->offset = be64_to_cpu(footer.offset);
    length = be32_to_cpu(footer.length);
    g_assert_cmpuint(f->offset + length + sizeof(footer), ==, f->size);
    f->text = g_malloc0(length + 1);
    read_at(f, f->text, length, f->offset);
    g_assert_cmphex(crc32(0, (uint8_t *)f->text, length), ==,
                    be32_to_cpu(footer.description_crc));
    f->d = qobject_to(QDict, qobject_from_json(f->text, &error_abort));
    return f;
}

static void close_file(File *f)
{
    close(f->fd);
    qobject_unref(f->d);
    g_free(f->text);
    g_free(f);
}

/* Give it another description, with sums that are right. */
static void write_description(const File *f, const char *text, size_t length)
{
    g_assert_true(snapshot_file_write(f->fd, f->offset, text, length));
}

static void write_qdict(const File *f, QDict *d)
{
    GString *s = qobject_to_json(QOBJECT(d));

    write_description(f, s->str, s->len);
    g_string_free(s, true);
}

static QDict *nth(const QDict *d, const char *list, unsigned n)
{
    const QListEntry *entry = qlist_first(qdict_get_qlist((QDict *)d, list));

    for (; n && entry; n--) {
        entry = qlist_next(entry);
    }
    return entry ? qobject_to(QDict, qlist_entry_obj(entry)) : NULL;
}

static bool block_bit(const File *f, const QDict *block, const char *bitmap,
                      uint64_t page)
{
    uint8_t byte;

    read_at(f, &byte, 1, get_uint(block, bitmap) + page / 8);
    return byte >> page % 8 & 1;
}

/* Are the pages the same, and those that are there the same ones? */
static void assert_same_ram(const File *a, const File *b)
{
    QDict *x, *y;
    unsigned i;

    for (i = 0; (x = nth(a->d, "blocks", i)); i++) {
        uint64_t length = get_uint(x, "length"), page;

        y = nth(b->d, "blocks", i);
        g_assert_cmpstr(qdict_get_str(x, "name"), ==,
                        qdict_get_str(y, "name"));
        g_assert_cmpuint(length, ==, get_uint(y, "length"));
        for (page = 0; page < length / PAGE; page++) {
            uint8_t p[PAGE], q[PAGE];
            bool there = block_bit(a, x, "bitmap", page);

            if (there != block_bit(b, y, "bitmap", page)) {
                g_test_message("page %" PRIu64 " of %s", page,
                               qdict_get_str(x, "name"));
                g_assert_not_reached();
            }
            read_at(a, p, PAGE, get_uint(x, "pages") + page * PAGE);
            read_at(b, q, PAGE, get_uint(y, "pages") + page * PAGE);
            g_assert_cmpint(memcmp(p, q, PAGE), ==, 0);
            g_assert_true(there || buffer_is_zero(p, PAGE));
        }
    }
    g_assert_null(nth(b->d, "blocks", i));
}

static uint8_t *section_bytes(const File *f, const QDict *section)
{
    uint64_t length = get_uint(section, "length");
    uint8_t *bytes = g_malloc(length);

    read_at(f, bytes, length, get_uint(section, "offset"));
    return bytes;
}

static void assert_same_sections(const File *a, const File *b)
{
    QDict *x, *y;
    unsigned i, differ = 0;

    for (i = 0; (x = nth(a->d, "sections", i)); i++) {
        uint64_t length = get_uint(x, "length");
        g_autofree uint8_t *p = section_bytes(a, x), *q = NULL;

        y = nth(b->d, "sections", i);
        q = section_bytes(b, y);
        g_assert_cmpstr(qdict_get_str(x, "name"), ==,
                        qdict_get_str(y, "name"));
        g_assert_cmpuint(get_uint(x, "instance"), ==,
                         get_uint(y, "instance"));
        if (length != get_uint(y, "length") || memcmp(p, q, length)) {
            g_test_message("%s differs", qdict_get_str(x, "name"));
            differ++;
        }
    }
    g_assert_null(nth(b->d, "sections", i));
    g_assert_cmpuint(i, >, 10);
    g_assert_cmpuint(differ, ==, 0);
}

static void assert_same_machine(const File *a, const File *b)
{
    GString *x = qobject_to_json_pretty(qdict_get(a->d, "machine"), false);
    GString *y = qobject_to_json_pretty(qdict_get(b->d, "machine"), false);

    g_assert_cmpstr(x->str, ==, y->str);
    g_string_free(x, true);
    g_string_free(y, true);
}

static void assert_same_files(const char *a, const char *b)
{
    File *x = open_file(a), *y = open_file(b);

    assert_same_ram(x, y);
    assert_same_sections(x, y);
    assert_same_machine(x, y);
    close_file(x);
    close_file(y);
}

static QPCIBar map_vga(SnapshotVM *vm)
{
    QPCIDevice *vga = qpci_device_find(vm->pci, QPCI_DEVFN(8, 0));
    QPCIBar bar = qpci_iomap(vga, 0, NULL);

    qpci_device_enable(vga);
    g_free(vga);
    return bar;
}

/* Make what is below 0xd0000 RAM, and write to what is a ROM's else. */
static void write_roms(SnapshotVM *vm, const char *machine)
{
    QPCIDevice *host = qpci_device_find(vm->pci, QPCI_DEVFN(0, 0));
    const uint8_t pam = !strcmp(machine, "pc") ? 0x59 : 0x90;

    for (unsigned i = 0; i < 3; i++) {
        qpci_config_writeb(host, pam + i, 0x33);
    }
    g_free(host);
    qtest_writel(vm->qts, 0xc0000, 0x12345678);
    qtest_writel(vm->qts, 0xcfffc, 0x9abcdef0);
}

/*
 * Catches: a page that is not written, or to another place; one that was zero
 * and is not in the worker; video RAM, shadowed ROMs or the last page of a
 * block left out; a device whose section is another one after it was loaded; a
 * restore in the worker that lacks something of what the first one did.
 */
static void test_exact(const void *machine)
{
    static const char args[] = "-vga none -device VGA,addr=8";
    g_autofree char *first = path_of("first"), *second = path_of("second");
    const unsigned n = g_getenv("FULL") ? 1000 : 100;
    SnapshotVM *vm = start(machine, args);
    QPCIBar bar = map_vga(vm);
    QTestState *worker;
    QDict *info;

    write_roms(vm, machine);
    snapshot_fill(vm, 1 * MiB, RAM - 1 * MiB, 1);
    snapshot_fill(vm, bar.addr, 8 * MiB, 2);
    qtest_writeq(vm->qts, RAM - 8, 0x1122334455667788);
    qtest_writeq(vm->qts, bar.addr + 16 * MiB - 8, 0x99aabbccddeeff00);
    qtest_writeq(vm->qts, 3 * MiB + 64 * KiB, 1);
    qtest_memset(vm->qts, 4 * MiB, 0xa5, 1 * MiB);
    qtest_memset(vm->qts, 4 * MiB + 512 * KiB, 0, 128 * KiB);
    snapshot_save(vm, 0);
    /* Not what is saved is written, but what is in the slot. */
    snapshot_fill(vm, 1 * MiB, RAM - 1 * MiB, 3);
    qtest_writel(vm->qts, 0xc0000, 0);
    export(vm->qts, 0, first);
    snapshot_check(vm, 1 * MiB, 3 * MiB, 3);

    worker = start_from(vm, machine, first, args);
    assert_exact(worker, 0);
    export(worker, 0, second);
    assert_same_files(first, second);
    g_assert_cmphex(qtest_readl(worker, 0xc0000), ==, 0x12345678);
    g_assert_cmphex(qtest_readl(worker, 0xcfffc), ==, 0x9abcdef0);
    g_assert_cmphex(qtest_readq(worker, RAM - 8), ==, 0x1122334455667788);
    g_assert_cmphex(qtest_readq(worker, bar.addr + 16 * MiB - 8), ==,
                    0x99aabbccddeeff00);
    g_assert_cmphex(qtest_readl(worker, 4 * MiB + 512 * KiB - 4), ==,
                    0xa5a5a5a5);
    g_assert_cmphex(qtest_readl(worker, 4 * MiB + 512 * KiB), ==, 0);

    for (unsigned i = 0; i < n; i++) {
        uint64_t to = g_test_rand_int_range(0, RAM / 8) * 8;

        qtest_writeq(worker, to, i);
        qtest_writeq(worker, bar.addr + to, i);
        restore(worker, 0);
        if (i % 10 == 0) {
            assert_exact(worker, 0);
        }
    }
    assert_exact(worker, 0);
    export(worker, 0, second);
    assert_same_files(first, second);
    info = qtest_qmp_assert_success_ref(
        worker, "{ 'execute': 'x-query-snapshot-device' }");
    g_assert_cmpuint(qdict_get_int(info, "restores"), ==, n + 1);
    qobject_unref(info);

    qtest_quit(worker);
    snapshot_vm_end(vm);
}

/* How often has QEMU opened a file?  NULL: any */
static unsigned count_opened(QTestState *qts, const char *file)
{
    g_autofree char *path = g_strdup_printf("/proc/%d/fd", qtest_pid(qts));
    g_autoptr(GDir) fds = g_dir_open(path, 0, NULL);
    const char *name;
    unsigned n = 0;

    while ((name = g_dir_read_name(fds))) {
        g_autofree char *fd = g_build_filename(path, name, NULL);
        g_autofree char *link = g_file_read_link(fd, NULL);

        n += !file || !g_strcmp0(link, file);
    }
    return n;
}

static unsigned count_fds(QTestState *qts)
{
    return count_opened(qts, NULL);
}

/* What a slot has: the seeds of two parts of RAM; 0 is zeroes */
typedef struct Seeds {
    unsigned low, high;
} Seeds;

static void write_seed(SnapshotVM *vm, uint64_t base, unsigned seed)
{
    if (seed) {
        snapshot_fill(vm, base, 2 * MiB, seed);
    } else {
        qtest_memset(vm->qts, base, 0, 2 * MiB);
    }
}

static void check_seed(SnapshotVM *vm, uint64_t base, unsigned seed)
{
    if (seed) {
        snapshot_check(vm, base, 2 * MiB, seed);
    } else {
        /* Where snapshot_fill() writes */
        for (uint64_t at = base; at < base + 2 * MiB; at += 256 * KiB) {
            uint8_t page[PAGE];

            qtest_bufread(vm->qts, at, page, PAGE);
            g_assert_true(buffer_is_zero(page, PAGE));
        }
    }
}

static void check_seeds(SnapshotVM *vm, const Seeds *seeds)
{
    check_seed(vm, 4 * MiB, seeds->low);
    check_seed(vm, 8 * MiB, seeds->high);
    check_seed(vm, 12 * MiB, 7);        /* Nobody changes that. */
}

/*
 * Catches: a file's pages that are given up while RAM lies on them, or while
 * a slot that was saved after it shares them; pages of another file, or the
 * store's, in their place; a view that moves and loses a file; two imports of
 * one file that are taken for one; a page that is taken from another file of a
 * row than the last that has it.
 */
static void do_beside_slots(const char *machine, bool in_a_row)
{
    const unsigned n = g_getenv("FULL") ? 3000 : 150;
    SnapshotVM *vm = start(machine, "");
    g_autofree char *files[3] = {
        path_of("beside0"), path_of("beside1"), path_of("beside2"),
    };
    Seeds in_file[3] = { { 0, 0 }, { 10, 0 }, { 10, 20 } };
    Seeds slots[SLOTS], now = { 0, 0 };
    bool used[SLOTS] = { };

    write_seed(vm, 12 * MiB, 7);
    for (unsigned i = 0; i < 3; i++) {
        now = in_file[i];
        write_seed(vm, 4 * MiB, now.low);
        write_seed(vm, 8 * MiB, now.high);
        snapshot_qmp(vm, "save", 0);
        export_on(vm->qts, 0, files[i], in_a_row && i ? files[i - 1] : NULL);
    }
    /* A slot shares pages with a file that goes while RAM lies on another. */
    import(vm->qts, 0, files[2]);
    import(vm->qts, 1, files[1]);
    restore(vm->qts, 0);
    snapshot_qmp(vm, "save", 2);
    restore(vm->qts, 1);
    snapshot_qmp(vm, "discard", 0);
    restore(vm->qts, 2);
    now = in_file[2];
    check_seeds(vm, &now);
    snapshot_qmp(vm, "discard", 1);
    snapshot_qmp(vm, "discard", 2);
    for (unsigned i = 0; i < n; i++) {
        unsigned slot = g_test_rand_int_range(0, SLOTS);
        unsigned file = g_test_rand_int_range(0, 3);

        switch (g_test_rand_int_range(0, 8)) {
        case 0:
            snapshot_qmp(vm, "save", slot);
            slots[slot] = now;
            used[slot] = true;
            break;
        case 1:
            now.low = 100 + i;
            write_seed(vm, 4 * MiB, now.low);
            break;
        case 2:
            now.high = g_test_rand_int_range(0, 2) * i;
            write_seed(vm, 8 * MiB, now.high);
            break;
        case 3:
        case 4:
            import(vm->qts, slot, files[file]);
            slots[slot] = in_file[file];
            used[slot] = true;
            break;
        case 5:
            if (used[slot]) {
                snapshot_qmp(vm, "discard", slot);
                used[slot] = false;
            }
            break;
        default:
            if (used[slot]) {
                snapshot_qmp(vm, "restore", slot);
                now = slots[slot];
                assert_exact(vm->qts, slot);
            }
        }
        check_seeds(vm, &now);
    }
    for (unsigned i = 0; i < SLOTS; i++) {
        if (used[i]) {
            snapshot_qmp(vm, "restore", i);
            check_seeds(vm, &slots[i]);
            assert_exact(vm->qts, i);
        }
    }
    snapshot_vm_end(vm);
}

static void test_beside_slots(const void *machine)
{
    do_beside_slots(machine, false);
}

static void test_row_beside_slots(const void *machine)
{
    do_beside_slots(machine, true);
}

/* In how many pages it differs from its base; in @zero of them by being zero */
static void assert_differs(const char *path, unsigned pages, unsigned zero)
{
    unsigned n_pages = 0, n_zero = 0;
    File *f = open_file(path);
    QDict *block;

    for (unsigned i = 0; (block = nth(f->d, "blocks", i)); i++) {
        for (uint64_t k = 0; k < get_uint(block, "length") / PAGE; k++) {
            if (block_bit(f, block, "bitmap", k)) {
                n_pages++;
            } else {
                n_zero += !block_bit(f, block, "same", k);
            }
        }
    }
    g_assert_cmpuint(n_pages, ==, pages);
    g_assert_cmpuint(n_zero, ==, zero);
    close_file(f);
}

static uint64_t count_bytes(const char *path)
{
    struct stat st;

    g_assert_cmpint(stat(path, &st), ==, 0);
    return st.st_blocks * 512;
}

/* What is read ahead is of the file that RAM is mapped from, if it is. */
static void check_touched_base(SnapshotVM *vm, const char *machine,
                               const char *file, const char *base,
                               const char *args)
{
    g_autofree char *list = path_of("btouched"), *text = NULL;
    g_autofree char *load = g_strdup_printf("%s,touched=%s", file, list);
    g_auto(GStrv) lines = NULL;
    File *f;

    unlink(list);
    for (unsigned i = 0; i < 2; i++) {
        QTestState *worker = start_from(vm, machine, load, args);

        restore(worker, 0);
        assert_exact(worker, 0);
        qtest_quit(worker);
    }
    if (vm->remap) {
        g_assert_false(g_file_test(list, G_FILE_TEST_EXISTS));
        return;
    }
    g_assert_true(g_file_get_contents(list, &text, NULL, NULL));
    lines = g_strsplit(text, "\n", 3);
    f = open_file(base);
    g_assert_cmpstr(lines[1], ==, qdict_get_str(f->d, "id"));
    close_file(f);
}

/*
 * Catches: a page that a file with a base lacks, or has although the base has
 * it; one that became zero, or again what it was two files before; a file that
 * is as large as its base; a worker that is not what a whole file makes; a base
 * that is opened once more by each of several slots, and then no relative of
 * the others; a list of what was touched, with places of another file.
 */
static void do_base(const char *machine, const char *args)
{
    SnapshotVM *vm = start(machine, args);
    g_autofree char *boot = path_of("bboot"), *one = path_of("bone");
    g_autofree char *two = path_of("btwo"), *whole = path_of("bwhole");
    g_autofree char *again = path_of("bagain");
    QTestState *worker;

    snapshot_fill(vm, 1 * MiB, RAM - 1 * MiB, 1);
    for (unsigned i = 2; i < 6; i++) {
        qtest_writeq(vm->qts, i * MiB, 1);
    }
    qtest_memset(vm->qts, 6 * MiB, 0, PAGE);
    snapshot_save(vm, 0);
    export(vm->qts, 0, boot);

    qtest_writeq(vm->qts, 2 * MiB, 2);                  /* Changes, back */
    qtest_writeq(vm->qts, 3 * MiB, 2);                  /* Changes twice */
    qtest_writeq(vm->qts, 6 * MiB, 2);                  /* Zero before, after */
    qtest_memset(vm->qts, 4 * MiB, 0, PAGE);            /* Becomes zero */
    qtest_memset(vm->qts, 5 * MiB, 0, PAGE);            /* The same, and back */
    qtest_writeq(vm->qts, RAM - 8, 2);                  /* The last page */
    snapshot_qmp(vm, "save", 1);
    export_on(vm->qts, 1, one, boot);
    assert_differs(one, 4, 2);
    g_assert_cmpuint(count_bytes(one), <, count_bytes(boot) / 2);

    qtest_writeq(vm->qts, 2 * MiB, 1);
    qtest_writeq(vm->qts, 3 * MiB, 3);
    qtest_writeq(vm->qts, 5 * MiB, 3);
    qtest_memset(vm->qts, 6 * MiB, 0, PAGE);
    snapshot_qmp(vm, "save", 2);
    export_on(vm->qts, 2, two, one);
    assert_differs(two, 3, 1);
    export(vm->qts, 2, whole);

    worker = start_from(vm, machine, two, args);
    assert_exact(worker, 0);
    export(worker, 0, again);
    assert_same_files(whole, again);
    import(worker, 1, boot);
    import(worker, 2, one);
    /* What was not put back yet can be written again, too. */
    export_on(worker, 2, again, boot);
    assert_same_files(one, again);
    g_assert_cmpuint(count_opened(worker, boot), ==, 1);
    g_assert_cmpuint(count_opened(worker, one), ==, vm->remap ? 0 : 1);
    for (unsigned i = 0; i < 60; i++) {
        static const uint64_t at_3mib[] = { 3, 1, 2 };
        unsigned slot = g_test_rand_int_range(0, 3);

        qtest_writeq(worker, g_test_rand_int_range(0, RAM / 8) * 8, i);
        restore(worker, slot);
        assert_exact(worker, slot);
        g_assert_cmphex(qtest_readq(worker, 3 * MiB), ==, at_3mib[slot]);
    }
    /* What one has no more need of, the others have. */
    qmp_slot(worker, "x-snapshot-device-discard", 1);
    restore(worker, 2);
    assert_exact(worker, 2);
    qmp_slot(worker, "x-snapshot-device-discard", 2);
    restore(worker, 0);
    assert_exact(worker, 0);
    export(worker, 0, again);
    assert_same_files(whole, again);
    /* Of what there is already, nothing is written. */
    export_on(worker, 0, again, two);
    assert_differs(again, 0, 0);
    qtest_quit(worker);
    check_touched_base(vm, machine, two, boot, args);
    snapshot_vm_end(vm);
}

static void test_base(const void *machine)
{
    do_base(machine, "");
}

/* RAM that cannot be mapped is read, and then what differs is copied. */
static void test_base_shared(const void *machine)
{
    do_base(machine, "-object memory-backend-memfd,id=shared,size=16M,share=on"
            " -machine memory-backend=shared");
}

static unsigned count_maps(QTestState *qts)
{
    g_autofree char *path = g_strdup_printf("/proc/%d/maps", qtest_pid(qts));
    g_autofree char *text = NULL;
    g_auto(GStrv) lines = NULL;

    g_assert_true(g_file_get_contents(path, &text, NULL, NULL));
    lines = g_strsplit(text, "\n", 0);
    return g_strv_length(lines);
}

/*
 * Catches: memory, addresses or descriptors that an import or an export takes
 * and a discard does not give back. With one slot that stays, for without any
 * all is given up.
 */
static void test_many_rounds(const void *machine)
{
    SnapshotVM *vm = start(machine, "");
    g_autofree char *file = path_of("rounds");
    int64_t before = 0, after;
    unsigned fds = 0, maps = 0;
    const unsigned n = g_getenv("FULL") ? 1000 : 100;

    snapshot_fill(vm, 1 * MiB, RAM - 1 * MiB, 1);
    snapshot_qmp(vm, "save", 0);
    export(vm->qts, 0, file);
    for (unsigned i = 0; i < 2 * n; i++) {
        if (i == n) {
            restore(vm->qts, 0);
            fds = count_fds(vm->qts);
            maps = count_maps(vm->qts);
            before = snapshot_resident_at_last(vm);
        }
        import(vm->qts, 1 + i % 2, file);
        if (i % 3) {
            restore(vm->qts, i % 3 == 1 ? 1 + i % 2 : 0);
        }
        if (i % 50 == 0) {
            export(vm->qts, 1 + i % 2, file);
        }
        snapshot_qmp(vm, "discard", 1 + i % 2);
    }
    restore(vm->qts, 0);
    after = snapshot_resident_at_last(vm);
    g_test_message("%" PRId64 " KiB before, %" PRId64 " KiB after; %u mappings "
                   "before, %u after", before / KiB, after / KiB, maps,
                   count_maps(vm->qts));
    g_assert_cmpuint(count_fds(vm->qts), <=, fds);
    /* Threads come and go, with a few each. */
    g_assert_cmpuint(count_maps(vm->qts), <, maps + n / 4);
    /* Numbers for all pages of a file take 6 bytes a page: 9 MiB. */
    g_assert_cmpint(after, <, before + 4 * MiB);
    assert_exact(vm->qts, 0);
    snapshot_vm_end(vm);
}

/* Flip a bit, see what is said of it, and put it back. */
static void flip(QTestState *qts, const File *f, const char *path,
                 uint64_t offset, const char *text)
{
    uint8_t byte, other;

    read_at(f, &byte, 1, offset);
    other = byte ^ 0x10;
    write_at(f, &other, 1, offset);
    import_refused(qts, path, true, text);
    write_at(f, &byte, 1, offset);
}

static uint64_t first_page(const File *f, const QDict *block, bool there)
{
    uint64_t page = 0;

    while (block_bit(f, block, "bitmap", page) != there) {
        page++;
    }
    return get_uint(block, "pages") + page * PAGE;
}

/* The machine as it was saved in slot 0 is still to be had. */
static void assert_unharmed(QTestState *qts)
{
    restore(qts, 0);
    assert_exact(qts, 0);
}

static const QDict *find_block(const File *f, const char *name)
{
    const QDict *block;

    for (unsigned i = 0; (block = nth(f->d, "blocks", i)); i++) {
        if (!strcmp(qdict_get_str(block, "name"), name)) {
            return block;
        }
    }
    g_assert_not_reached();
}

/*
 * Catches: a kind of place in a file whose change nothing notices, or whose
 * end may be missing.
 */
static void test_damaged(const void *machine)
{
    SnapshotVM *vm = start(machine, "");
    g_autofree char *path = path_of("damaged");
    const QDict *block, *section;
    File *f;

    snapshot_fill(vm, 1 * MiB, RAM - 1 * MiB, 1);
    snapshot_qmp(vm, "save", 0);
    export(vm->qts, 0, path);
    f = open_file(path);
    block = find_block(f, "pc.ram");
    section = nth(f->d, "sections", 5);

    flip(vm->qts, f, path, 0, "the sum is wrong");
    flip(vm->qts, f, path, 5, "the sum is wrong");
    flip(vm->qts, f, path, get_uint(block, "bitmap"), "the sum is wrong");
    flip(vm->qts, f, path, get_uint(block, "bitmap") - 1,
         "the sum is wrong");
    flip(vm->qts, f, path, get_uint(section, "offset"),
         "the sum is wrong");
    flip(vm->qts, f, path, get_uint(f->d, "page-sums") + 3,
         "the sum is wrong");
    flip(vm->qts, f, path, first_page(f, block, true) + 77,
         "of the pages of 'pc.ram'");
    flip(vm->qts, f, path, first_page(f, block, false) + 77,
         "is to be zero, and is not");
    flip(vm->qts, f, path, f->offset + 10, "Its description is damaged");
    flip(vm->qts, f, path, f->size - 1, "Its last bytes are damaged");
    flip(vm->qts, f, path, f->size - 20, "Its last bytes are damaged");
    flip(vm->qts, f, path, f->size - sizeof(SnapshotFileFooter),
         "that is not complete");
    qtest_qmp_assert_success(
        vm->qts, "{ 'execute': 'x-snapshot-device-import', 'arguments': "
        "{ 'slot': 1, 'file': %s, 'check': true } }", path);
    snapshot_qmp(vm, "discard", 1);

    for (uint64_t size = f->size; size; size = size > 40 ? size * 7 / 8 :
         size - 1) {
        g_assert_cmpint(ftruncate(f->fd, size - 1), ==, 0);
        import_refused(vm->qts, path, false, "cannot be loaded");
    }
    assert_unharmed(vm->qts);
    close_file(f);
    snapshot_vm_end(vm);
}

/* Change one member of the description, and put it back. */
static void lie(QTestState *qts, const File *f, const char *path, QDict *d,
                const char *key, uint64_t value, const char *text)
{
    QObject *was = qobject_ref(qdict_get(d, key));

    qdict_put(d, key, qnum_from_uint(value));
    write_qdict(f, f->d);
    import_refused(qts, path, true, text);
    qdict_put_obj(d, key, was);
}

static void rename_in(QTestState *qts, const File *f, const char *path,
                      QDict *d, const char *key, const char *value,
                      const char *text)
{
    QObject *was = qobject_ref(qdict_get(d, key));

    qdict_put_str(d, key, value);
    write_qdict(f, f->d);
    import_refused(qts, path, false, text);
    qdict_put_obj(d, key, was);
}

/* The last of a list twice, and none of it */
static void repeat(QTestState *qts, const File *f, const char *path,
                   const char *list, const char *twice, const char *none)
{
    QList *was = qobject_ref(qdict_get_qlist(f->d, list));
    QList *other = qlist_copy(was);

    qlist_append(other, qobject_ref(qlist_peek(was)));
    qdict_put(f->d, list, other);
    write_qdict(f, f->d);
    import_refused(qts, path, false, twice);

    other = qlist_copy(was);
    qobject_unref(qlist_pop(other));
    qdict_put(f->d, list, other);
    write_qdict(f, f->d);
    import_refused(qts, path, false, none);
    qdict_put(f->d, list, was);
}

/* Sums of the same bytes again and again would take hours. */
static void repeat_part(QTestState *qts, const File *f, const char *path)
{
    QList *was = qobject_ref(qdict_get_qlist(f->d, "parts"));
    QList *other = qlist_copy(was);
    QDict *part, *largest = NULL;

    for (unsigned i = 0; (part = nth(f->d, "parts", i)); i++) {
        if (!largest || get_uint(part, "length") >
            get_uint(largest, "length")) {
            largest = part;
        }
    }
    for (unsigned i = 0; i < 5000; i++) {
        qlist_append(other, qobject_ref(largest));
    }
    qdict_put(f->d, "parts", other);
    write_qdict(f, f->d);
    import_refused(qts, path, false, "in it twice");
    qdict_put(f->d, "parts", was);
}

static void no_file(QTestState *qts, const char *path, const char *text)
{
    import_refused(qts, path, false, text);
    import_refused(qts, path, false, path);
}

/*
 * Catches: a description whose sums are right, and which is believed: pages or
 * bitmaps outside the file, lengths that overflow, memory taken for what a file
 * says, blocks and devices that are missing, double or of others, files that
 * are none, a FIFO that is waited for.
 */
static void test_hostile(const void *machine)
{
    static const uint64_t numbers[] = {
        UINT64_MAX, UINT64_MAX - 4095, INT64_MAX, (uint64_t)INT64_MAX + 1,
        1ull << 40, UINT32_MAX, 4097,
    };
    SnapshotVM *vm = start(machine, "");
    QTestState *qts = vm->qts;
    g_autofree char *path = path_of("hostile"), *fifo = path_of("fifo");
    g_autofree char *empty = path_of("empty"), *text = NULL;
    QDict *block, *other, *section, *part;
    const size_t large = 16 * MiB;
    File *f;

    snapshot_fill(vm, 1 * MiB, RAM - 1 * MiB, 1);
    snapshot_qmp(vm, "save", 0);
    export(qts, 0, path);
    f = open_file(path);
    block = nth(f->d, "blocks", 0);
    other = nth(f->d, "blocks", 1);
    section = nth(f->d, "sections", 3);
    part = nth(f->d, "parts", 1);

    for (unsigned i = 0; i < ARRAY_SIZE(numbers); i++) {
        lie(qts, f, path, block, "length", numbers[i], "RAM block");
        lie(qts, f, path, block, "pages", numbers[i], "RAM block");
        lie(qts, f, path, block, "bitmap", i == 6 ? f->size - 1 : numbers[i],
            "RAM block");
        lie(qts, f, path, part, "offset", numbers[i], "at ");
        lie(qts, f, path, part, "length", numbers[i], "at ");
        lie(qts, f, path, section, "offset", i == 6 ? f->size : numbers[i],
            "is not in it");
        if (i < 6) {
            lie(qts, f, path, section, "length", numbers[i], "is not in it");
        }
        lie(qts, f, path, f->d, "page-sums", numbers[i],
            i < 6 ? " bytes of it at " : "the sum is wrong");
    }
    lie(qts, f, path, f->d, "page-size", 0, "It has pages of 0 bytes");
    lie(qts, f, path, f->d, "page-size", 8192, "It has pages of 8192 bytes");
    lie(qts, f, path, block, "pages", get_uint(block, "pages") + 2048,
        "not at whole pages");
    lie(qts, f, path, other, "pages", get_uint(block, "pages") + PAGE,
        "have the same pages");
    lie(qts, f, path, block, "length", 0, "has 0 bytes in it");
    lie(qts, f, path, section, "version", 77, "is of version 77 in it");
    rename_in(qts, f, path, block, "name", "ram of another", "is not in it");
    rename_in(qts, f, path, block, "name", qdict_get_str(other, "name"),
              "is not in it");
    rename_in(qts, f, path, section, "name", "nobody", "is not in it");
    rename_in(qts, f, path, f->d, "qemu", "1.0", "It was written by QEMU 1.0");
    repeat(qts, f, path, "blocks", "It has two RAM blocks", "is not in it");
    repeat(qts, f, path, "sections", "twice", "is not in it");
    repeat(qts, f, path, "machine", "It is of another machine",
           "It is of another machine");

    repeat_part(qts, f, path);

    /* What is no description */
    for (unsigned i = 0; i < 5; i++) {
        static const char *const bad[][2] = {
            { "", "Expecting a JSON value" },
            { "{", "JSON parse error" },
            { "[]", "expected: object" },
            { "\"\"", "expected: object" },
            { "{\"id\": 1}", "Invalid parameter type for 'id'" },
        };

        write_description(f, bad[i][0], strlen(bad[i][0]));
        import_refused(qts, path, false, bad[i][1]);
    }
    if (!strcmp(machine, "pc") && !vm->remap) {
        text = g_malloc(large + 2);
        memset(text, '[', large + 2);
        write_description(f, text, large);
        import_refused(qts, path, false, "JSON nesting depth");
        write_description(f, text, large + 1);
        import_refused(qts, path, false, "Its description is not in it");
        memset(text, ' ', large);
        write_description(f, text, large);
        import_refused(qts, path, false, "Expecting a JSON value");
    }
    /* As large as its holes are, it would take hours, or all memory. */
    qdict_put(part, "length", qnum_from_uint(1ull << 41));
    write_qdict(f, f->d);
    close_file(f);
    f = open_file(path);
    f->offset += 1ull << 42;
    write_qdict(f, f->d);
    import_refused(qts, path, false, "too many");
    part = nth(f->d, "parts", 1);
    qdict_put_int(part, "length", 0);
    qdict_put_int(part, "crc", 0);
    block = nth(f->d, "blocks", 0);
    lie(qts, f, path, block, "length", 1ull << 41, "RAM block");
    lie(qts, f, path, block, "pages", 1ull << 41, "too far apart");
    section = nth(f->d, "sections", 3);
    lie(qts, f, path, section, "length", 1ull << 32, "Its devices have");
    close_file(f);

    unlink(fifo);
    g_assert_cmpint(mkfifo(fifo, 0600), ==, 0);
    g_assert_true(g_file_set_contents(empty, "", 0, NULL));
    no_file(qts, fifo, "It is no regular file");
    no_file(qts, dir, "It is no regular file");
    no_file(qts, "/dev/zero", "It is no regular file");
    no_file(qts, "/nowhere/at all", "No such file");
    no_file(qts, empty, "It ends at 0, ");
    assert_unharmed(qts);
    snapshot_vm_end(vm);
}

static void replace_id(QTestState *qts, const char *path, const char *base)
{
    File *f = open_file(path);
    QDict *b = qdict_get_qdict(f->d, "base");

    if (base) {
        qdict_put_str(b, "file", base);
    } else {
        qdict_del(f->d, "base");
    }
    write_qdict(f, f->d);
    close_file(f);
}

/*
 * Catches: a slot that could not be restored, as a device or a file of it is
 * gone, and is written all the same, or ends QEMU; a base that is replaced or
 * changed while a file is written that needs it.
 */
static void test_base_gone(const void *machine)
{
    SnapshotVM *vm = start(machine, "");
    QTestState *qts = vm->qts;
    g_autofree char *a = path_of("ga"), *b = path_of("gb");
    g_autofree char *c = path_of("gc");
    File *f;

    snapshot_fill(vm, 1 * MiB, RAM - 1 * MiB, 1);
    snapshot_qmp(vm, "save", 0);
    export(qts, 0, a);

    /* The base goes, or is written to, while the job needs it. */
    export(qts, 0, b);
    for (unsigned i = 0; i < 2; i++) {
        g_autofree char *error = NULL;

        qtest_qmp_assert_success(
            qts, "{ 'execute': 'x-snapshot-device-export', 'arguments': "
            "{ 'job-id': 'e', 'slot': 0, 'file': %s, 'base': %s,"
            " 'speed': 67108864 } }", a, b);
        if (i) {
            f = open_file(b);
            write_at(f, "x", 1, first_page(f, find_block(f, "pc.ram"), true));
            close_file(f);
        } else {
            g_assert_cmpint(rename(b, c), ==, 0);
        }
        error = end_job(qts);
        g_assert_nonnull(error);
        g_assert_nonnull(strstr(error, "was replaced or changed meanwhile"));
        if (!i) {
            g_assert_cmpint(rename(c, b), ==, 0);
        }
    }
    import(qts, 4, a);
    snapshot_qmp(vm, "discard", 4);

    /* Of the slot's own file, a byte is another one. */
    export_on(qts, 0, c, a);
    import(qts, 0, c);
    restore(qts, 0);
    export_on(qts, 0, b, a);
    f = open_file(c);
    write_at(f, "x", 1, 8);
    close_file(f);
    if (!vm->remap) {
        export_on_refused(qts, b, a, "was changed");
        export_refused(qts, b, "was changed");
    }
    snapshot_vm_end(vm);

    vm = start(machine, "-device pci-bridge,id=bridge,chassis_nr=1,addr=7");
    qts = vm->qts;
    snapshot_qmp(vm, "save", 0);
    export(qts, 0, a);
    qtest_qmp_device_add(qts, "usb-ehci", "late", "{ 'addr': '9' }");
    export_on_refused(qts, b, a, "was plugged after the save");
    export_refused(qts, b, "was plugged after the save");
    snapshot_vm_end(vm);
}

/*
 * Catches: a base that is missing, another one, or of another machine; a file
 * that is written over its own base; one that is its own base, or has too many;
 * bitmaps that contradict each other.
 */
static void test_base_refused(const void *machine)
{
    SnapshotVM *vm = start(machine, "");
    QTestState *qts = vm->qts;
    g_autofree char *boot = path_of("rboot"), *one = path_of("rone");
    g_autofree char *moved = path_of("rmoved"), *two = path_of("rtwo");
    g_autofree char *last = g_strdup(boot), *before = NULL;
    const QDict *block;
    unsigned long bits;
    File *f;

    snapshot_fill(vm, 1 * MiB, RAM - 1 * MiB, 1);
    snapshot_qmp(vm, "save", 0);
    export(qts, 0, boot);
    export_on(qts, 0, one, boot);

    export_on_refused(qts, boot, boot, "it is of its own base");
    export_on_refused(qts, boot, one, "it is of its own base");
    export_on_refused(qts, one, one, "it is of its own base");
    export_on_refused(qts, two, "/nowhere/at all", "cannot be a base");
    export_on_refused(qts, two, "/dev/zero", "cannot be a base");
    export_on_refused(qts, "/dev/fdset/1", boot, "has no place");
    export_on_refused(qts, two, "/dev/fdset/1", "has no place");
    import(qts, 4, one);

    g_assert_cmpint(rename(boot, moved), ==, 0);
    import_refused(qts, one, false, "Its base '");
    import_refused(qts, one, false, "No such file");
    /* The same bytes again are not the same file, but it could be. */
    export(qts, 0, boot);
    import_refused(qts, one, false, "is another file than it was");
    g_assert_cmpint(rename(moved, boot), ==, 0);
    import(qts, 4, one);
    snapshot_qmp(vm, "discard", 4);

    f = open_file(boot);
    block = find_block(f, "pc.ram");
    flip(qts, f, one, f->size - 1, "Its last bytes are damaged");
    flip(qts, f, one, first_page(f, block, true) + 77,
         "of the pages of 'pc.ram'");
    close_file(f);

    export_on(qts, 0, two, one);
    f = open_file(two);
    block = find_block(f, "pc.ram");
    for (unsigned i = 0; i < 2; i++) {
        lie(qts, f, two, (QDict *)block, "same", i ? UINT64_MAX : f->size - 1,
            "RAM block 'pc.ram'");
    }
    lie(qts, f, two, (QDict *)block, "bitmap", get_uint(block, "same"),
        "that are to be its base's");
    flip(qts, f, two, get_uint(block, "same"), "the sum is wrong");
    read_at(f, &bits, sizeof(bits), get_uint(block, "same"));
    g_assert_cmphex(bits, ==, ULONG_MAX);
    qdict_del((QDict *)block, "same");
    write_qdict(f, f->d);
    import_refused(qts, two, false, "does not tell what is its base's");
    close_file(f);

    export_on(qts, 0, two, one);
    replace_id(qts, two, NULL);
    import_refused(qts, two, false, "is to have a base, and it has none");
    export_on(qts, 0, two, one);
    replace_id(qts, two, two);
    import_refused(qts, two, false, "More than 16 files");
    import_refused(qts, two, true, "More than 16 files");

    for (unsigned i = 1; i < 16; i++) {
        g_autofree char *name = g_strdup_printf("row%u", i);

        g_free(before);
        before = g_steal_pointer(&last);
        last = path_of(name);
        export_on(qts, 0, last, before);
    }
    import(qts, 4, last);
    export_on_refused(qts, two, last, "there are 15 files below it");
    restore(qts, 4);
    assert_exact(qts, 4);
    assert_unharmed(qts);
    snapshot_vm_end(vm);
}

/*
 * Flip bits of a bitmap, or only set some, and set the sum of what it is part
 * of right.
 */
static void mutate_bitmap(const File *f, bool set)
{
    const QDict *block = nth(f->d, "blocks", g_test_rand_int_range(0, 4));
    uint64_t at = get_uint(block, "bitmap");
    uint64_t bytes = DIV_ROUND_UP(get_uint(block, "length") / PAGE, 64) * 8;
    g_autofree uint8_t *bits = g_malloc(bytes);
    uint8_t *byte = &bits[g_test_rand_int_range(0, bytes)];
    uint8_t value = g_test_rand_int_range(1, 256);
    QDict *part;

    read_at(f, bits, bytes, at);
    *byte = set ? *byte | value : *byte ^ value;
    write_at(f, bits, bytes, at);
    for (unsigned i = 0; (part = nth(f->d, "parts", i)); i++) {
        if (get_uint(part, "offset") == at) {
            qdict_put_int(part, "crc", crc32(0, bits, bytes));
        }
    }
    write_qdict(f, f->d);
}

/*
 * Catches: a bit that is set or clear where it was not, and has the machine be
 * another one without a word.  A page more that is there has the sum of its
 * stripe be another one, and one less is not zero.  Without a look at sums, a
 * page that is there, and is zero, has to be that: where all others are, too,
 * and if there is no such page in the block.
 */
static void test_bitmaps(const void *machine)
{
    SnapshotVM *vm = snapshot_vm_start(",slots=5", "-M %s -m 1 -nodefaults"
                                       " -rtc clock=vm -S",
                                       (const char *)machine);
    const unsigned n = g_getenv("FULL") ? 10000 : 60;
    g_autofree char *path = path_of("bitmaps");
    unsigned taken = 0;

    qtest_memset(vm->qts, 64 * KiB, 0xa5, 64 * KiB);
    snapshot_qmp(vm, "save", 0);
    for (unsigned i = 0; i < n; i++) {
        const bool set = i % 2;
        QDict *rsp;
        File *f;

        export(vm->qts, 0, path);
        f = open_file(path);
        mutate_bitmap(f, set);
        close_file(f);
        rsp = qtest_qmp(vm->qts, "{ 'execute': 'x-snapshot-device-import',"
                        " 'arguments': { 'slot': 4, 'file': %s,"
                        " 'check': %i } }", path, !set);
        if (!qdict_haskey(rsp, "error")) {
            taken++;
            qtest_memset(vm->qts, 64 * KiB, i, 64 * KiB);
            restore(vm->qts, 4);
            assert_exact(vm->qts, 4);
            assert_exact(vm->qts, 0);
            restore(vm->qts, 0);
            snapshot_qmp(vm, "discard", 4);
        }
        qobject_unref(rsp);
    }
    g_test_message("%u inputs, %u of them taken", n, taken);
    g_assert_cmpuint(taken, >=, n / 2);
    assert_unharmed(vm->qts);
    snapshot_vm_end(vm);
}

static unsigned any_number(void *opaque, unsigned n)
{
    return g_test_rand_int_range(0, n);
}

/* Is it still known which bytes are of which device?  @text parses. */
static bool has_same_sections(const QDict *d, const char *text)
{
    QDict *other = qobject_to(QDict, qobject_from_json(text, &error_abort));
    bool same = qobject_is_equal(qdict_get(d, "sections"),
                                 qdict_get(other, "sections"));

    qobject_unref(other);
    return same;
}

/*
 * Catches: what nobody has thought of. Each input is a description with a few
 * changes and sums that are right.  What is taken can be restored, and the
 * machine be put back, unless devices would get what is not theirs: they may do
 * with that what they like.  If all was checked, restores are exact, too: else
 * there may be something where the file is to have a hole.
 */
static void do_mutations(const char *machine, bool has_base)
{
    SnapshotVM *vm = snapshot_vm_start(",slots=5", "-M %s -m 1 -nodefaults"
                                       " -rtc clock=vm -S", machine);
    QTestState *qts = vm->qts;
    const char *inputs = g_getenv("SNAPSHOT_FILE_INPUTS");
    const unsigned n = inputs ? atoi(inputs) :
        g_getenv("FULL") ? 1000000 : 2000;
    g_autofree char *path = path_of("mutations"), *base = path_of("mbase");
    unsigned taken = 0, restored = 0;
    GArray *places;
    File *f;

    qtest_memset(qts, 64 * KiB, 0xa5, 64 * KiB);
    snapshot_qmp(vm, "save", 0);
    if (has_base) {
        export(qts, 0, base);
        qtest_memset(qts, 96 * KiB, 0x5a, 64 * KiB);
        snapshot_qmp(vm, "save", 0);
    }
    export_on(qts, 0, path, has_base ? base : NULL);
    f = open_file(path);
    places = snapshot_file_places(f->text);
    for (unsigned i = 0; i < n; i++) {
        GString *s = g_string_new(f->text);
        const bool check = g_test_rand_bit();
        QDict *rsp;

        /* Some are as they were: that all are refused is no test. */
        for (unsigned k = i % 100 ? g_test_rand_int_range(1, 4) : 0; k; k--) {
            snapshot_file_edit(s, places, any_number, NULL);
        }
        write_description(f, s->str, s->len);
        rsp = qtest_qmp(qts, "{ 'execute': 'x-snapshot-device-import',"
                        " 'arguments': { 'slot': 4, 'file': %s,"
                        " 'check': %i } }", path, check);
        if (qdict_haskey(rsp, "error")) {
            const char *desc = qdict_get_str(qdict_get_qdict(rsp, "error"),
                                             "desc");

            g_assert_nonnull(strstr(desc, "cannot be loaded: "));
        } else {
            taken++;
            if (has_same_sections(f->d, s->str)) {
                restored++;
                restore(qts, 4);
                if (check) {
                    assert_exact(qts, 4);
                }
                assert_unharmed(qts);
                /* RAM may be mapped from it. */
                close_file(f);
                export_on(qts, 0, path, has_base ? base : NULL);
                f = open_file(path);
            }
            qmp_slot(qts, "x-snapshot-device-discard", 4);
        }
        qobject_unref(rsp);
        g_string_free(s, true);
        if (i % 1000 == 0) {
            assert_unharmed(qts);
        }
    }
    g_test_message("%u inputs, %u of them taken, %u of these restored", n,
                   taken, restored);
    g_assert_cmpuint(restored, >=, n / 100);
    assert_unharmed(qts);
    g_array_unref(places);
    close_file(f);
    snapshot_vm_end(vm);
}

static void test_mutations(const void *machine)
{
    do_mutations(machine, false);
}

static void test_base_mutations(const void *machine)
{
    do_mutations(machine, true);
}

/* What makes a machine another one, and what of it is to be named */
typedef struct Other {
    const char *args, *name;
} Other;

/*
 * Catches: a file that is taken by a machine which is not the one that was
 * saved, or is refused without what differs.
 */
static void test_others(const void *machine)
{
    static const Other others[] = {
        { "-M %s -m 24 -device e1000,addr=6", "mem-size" },
        { "-M %s -m 16 -device e1000,addr=6 -cpu Nehalem", "(Nehalem-" },
        { "-M %s -m 16 -device e1000,addr=6 -cpu qemu64,-cx16", ".cx16=" },
        { "-M %s -m 16 -device e1000,addr=6 -smp 2",
          "/machine/unattached/device[" },
        { "-M %s -m 16 -device e1000,addr=7", ".addr=" },
        { "-M %s -m 16 -device e1000-82545em,addr=6", "e1000" },
        { "-M %s -m 16 -device e1000,addr=6,extra_mac_registers=off",
          "extra_mac_registers" },
        { "-M %s -m 16 -device e1000,addr=6 -device edu,addr=9", "edu" },
        { "-M %s -m 16", "e1000" },
    };
    SnapshotVM *vm = start(machine, "-device e1000,addr=6");
    const char *mode = vm->remap ? "remap" : "dirty";
    g_autofree char *path = path_of("others");
    const char *twin = !strcmp(machine, "pc") ? "pc-i440fx-9.2" : "pc-q35-9.2";
    QTestState *qts;

    snapshot_qmp(vm, "save", 0);
    export(vm->qts, 0, path);
    for (unsigned i = 0; i < ARRAY_SIZE(others); i++) {
        g_autofree char *args = g_strdup_printf(others[i].args,
                                                (const char *)machine);

        qts = qtest_initf("%s -serial null -rtc clock=vm -S -device snapshot,"
                          "slots=5,ram=%s", args, mode);
        import_refused(qts, path, false, others[i].name);
        qtest_quit(qts);
    }
    qts = qtest_initf("-M %s -m 16 -device e1000,addr=6 -serial null -S"
                      " -rtc clock=vm -device snapshot,slots=5,ram=%s", twin,
                      mode);
    import_refused(qts, path, false, twin);
    qtest_quit(qts);
    /* And it is taken by what is made alike, whatever its host side is. */
    qts = start_from(vm, machine, path, "-device e1000,addr=6 -name other "
                     "-chardev null,id=unused");
    assert_exact(qts, 0);
    qtest_quit(qts);
    snapshot_vm_end(vm);
}

static void command(QTestState *qts, const char *name)
{
    qtest_qmp_assert_success(qts, "{ 'execute': %s,"
                             " 'arguments': { 'id': 'e' } }", name);
}

/* Files in the directory, that tests make by no other name */
static unsigned count_files(const char *prefix)
{
    g_autoptr(GDir) d = g_dir_open(dir, 0, NULL);
    const char *name;
    unsigned n = 0;

    while ((name = g_dir_read_name(d))) {
        n += g_str_has_prefix(name, prefix);
    }
    return n;
}

static void assert_content(const char *path, const char *expected)
{
    g_autofree char *text = NULL;

    g_assert_true(g_file_get_contents(path, &text, NULL, NULL));
    g_assert_cmpstr(text, ==, expected);
}

/*
 * Catches: an export that writes over the file there is, or leaves its own
 * when it is cancelled; one that shows no progress, keeps to no speed or does
 * not pause; one that writes what the machine, or the slot, is meanwhile; one
 * whose slot goes.
 */
static void test_job(const void *machine)
{
    SnapshotVM *vm = start(machine, "");
    g_autofree char *path = path_of("job"), *early = path_of("jobearly");
    g_autofree char *error = NULL;
    int64_t since, progress;
    QDict *job;

    snapshot_fill(vm, 1 * MiB, RAM - 1 * MiB, 1);
    snapshot_qmp(vm, "save", 0);
    export(vm->qts, 0, early);
    g_assert_true(g_file_set_contents(path, "old", -1, NULL));

    start_export(vm->qts, 0, path, 16 * MiB);
    for (progress = 0; !progress;) {
        g_usleep(1000);
        job = query_job(vm->qts);
        g_assert_cmpstr(qdict_get_str(job, "status"), ==, "running");
        progress = qdict_get_int(job, "current-progress");
        qobject_unref(job);
    }
    command(vm->qts, "job-pause");
    g_usleep(300 * 1000);
    job = query_job(vm->qts);
    g_assert_cmpstr(qdict_get_str(job, "type"), ==, "snapshot-device-export");
    g_assert_cmpstr(qdict_get_str(job, "status"), ==, "paused");
    progress = qdict_get_int(job, "current-progress");
    g_assert_cmpint(qdict_get_int(job, "total-progress"), >, RAM);
    g_assert_cmpint(qdict_get_int(job, "total-progress"), >, progress);
    qobject_unref(job);
    g_usleep(300 * 1000);
    job = query_job(vm->qts);
    g_assert_cmpint(qdict_get_int(job, "current-progress"), ==, progress);
    qobject_unref(job);
    assert_content(path, "old");
    command(vm->qts, "job-cancel");
    error = end_job(vm->qts);
    g_assert_nonnull(error);
    g_assert_nonnull(strstr(error, "cancelled"));
    assert_content(path, "old");
    g_assert_cmpuint(count_files("job"), ==, 2);

    /* Some 50 MiB at 64 MiB a second; the slot is another one soon. */
    since = g_get_monotonic_time();
    start_export(vm->qts, 0, path, 64 * MiB);
    snapshot_fill(vm, 1 * MiB, RAM - 1 * MiB, 2);
    restore(vm->qts, 0);
    snapshot_fill(vm, 1 * MiB, RAM - 1 * MiB, 3);
    snapshot_qmp(vm, "save", 0);
    snapshot_qmp(vm, "discard", 0);
    snapshot_fill(vm, 1 * MiB, RAM - 1 * MiB, 4);
    snapshot_qmp(vm, "save", 1);
    g_assert_null(end_job(vm->qts));
    g_assert_cmpint(g_get_monotonic_time() - since, >, 200 * 1000);
    g_assert_cmpuint(count_files("job"), ==, 2);
    assert_same_files(early, path);

    /* At the end of QEMU, as at a cancel */
    g_assert_cmpint(unlink(path), ==, 0);
    start_export(vm->qts, 1, path, 1 * MiB);
    snapshot_vm_end(vm);
    g_assert_cmpuint(count_files("job"), ==, 1);
}

/* Two at once, of two slots, are jobs of their own. */
static void test_two_jobs(const void *machine)
{
    SnapshotVM *vm = start(machine, "");
    g_autofree char *a = path_of("two0"), *b = path_of("two1");
    QDict *rsp;

    snapshot_fill(vm, 1 * MiB, RAM - 1 * MiB, 1);
    snapshot_qmp(vm, "save", 0);
    snapshot_fill(vm, 1 * MiB, RAM - 1 * MiB, 2);
    snapshot_qmp(vm, "save", 1);
    start_export(vm->qts, 0, a, 0);
    qtest_qmp_assert_success(
        vm->qts, "{ 'execute': 'x-snapshot-device-export', 'arguments': "
        "{ 'job-id': 'f', 'slot': 1, 'file': %s } }", b);
    rsp = qtest_qmp_assert_failure_ref(
        vm->qts, "{ 'execute': 'x-snapshot-device-export', 'arguments': "
        "{ 'job-id': 'f', 'slot': 1, 'file': %s } }", b);
    assert_error(rsp, "already in use");
    g_assert_null(end_job(vm->qts));
    g_assert_null(end_job(vm->qts));
    g_assert_cmpuint(count_files("two"), ==, 2);
    import(vm->qts, 2, a);
    import(vm->qts, 3, b);
    restore(vm->qts, 2);
    snapshot_check(vm, 1 * MiB, RAM - 1 * MiB, 1);
    restore(vm->qts, 3);
    snapshot_check(vm, 1 * MiB, RAM - 1 * MiB, 2);
    assert_exact(vm->qts, 1);
    snapshot_vm_end(vm);
}

static void add_fd(QTestState *qts, const char *path, int flags, int fdset)
{
    int fd = open(path, flags, 0600);

    g_assert_cmpint(fd, >=, 0);
    qtest_qmp_fds_assert_success(qts, &fd, 1, "{ 'execute': 'add-fd',"
                                 " 'arguments': { 'fdset-id': %d } }", fdset);
    close(fd);
}

/* Nothing is left of it, as nobody uses it. */
static void remove_fd(QTestState *qts, int fdset)
{
    QDict *rsp;

    qtest_qmp_assert_success(qts, "{ 'execute': 'remove-fd',"
                             " 'arguments': { 'fdset-id': %d } }", fdset);
    rsp = qtest_qmp(qts, "{ 'execute': 'query-fdsets' }");
    g_assert_true(qlist_empty(qdict_get_qlist(rsp, "return")));
    qobject_unref(rsp);
}

/*
 * Catches: an export into a file that the guest's memory, or an image of it, is
 * mapped from, which ends QEMU; one that is refused, and has emptied a file.
 */
static void test_own_files(const void *machine)
{
    g_autofree char *path = path_of("ownfile"), *ram = path_of("ownram");
    g_autofree char *store = path_of("ownstore");
    g_autofree char *properties = g_strdup_printf(",slots=5,file=%s", store);
    const char *const own[] = { path, ram, store };
    SnapshotVM *vm;

    unlink(ram);
    vm = snapshot_vm_start(properties, "-M %s -serial null -rtc clock=vm -S "
                           "-m 16 -object memory-backend-file,id=ram,size=16M,"
                           "share=on,mem-path=%s -machine memory-backend=ram",
                           (const char *)machine, ram);
    snapshot_fill(vm, 1 * MiB, RAM - 1 * MiB, 1);
    snapshot_qmp(vm, "save", 0);
    export(vm->qts, 0, path);
    import(vm->qts, 1, path);
    restore(vm->qts, 1);
    g_assert_cmpint(chmod(path, 0600), ==, 0);
    for (unsigned i = 0; i < ARRAY_SIZE(own); i++) {
        add_fd(vm->qts, own[i], O_RDWR, 1);
        export_refused(vm->qts, "/dev/fdset/1",
                       "is a file that RAM is mapped from");
        remove_fd(vm->qts, 1);
    }
    assert_unharmed(vm->qts);
    restore(vm->qts, 1);
    snapshot_check(vm, 1 * MiB, RAM - 1 * MiB, 1);
    snapshot_vm_end(vm);
}

/*
 * Catches: a file descriptor's old content that shows where the new has no
 * pages; one that stays in use; a device, a directory that is replaced; a limit
 * or a directory that ends more than the job.
 */
static void test_places(const void *machine)
{
    SnapshotVM *vm = start(machine, "");
    g_autofree char *path = path_of("place"), *fifo = path_of("placefifo");
    g_autofree char *error = NULL;
    struct rlimit limit = { 4 * MiB, RLIM_INFINITY };
    QDict *rsp;

    /* First a file full of pages, then the same with less of them. */
    snapshot_fill(vm, 1 * MiB, RAM - 1 * MiB, 1);
    snapshot_qmp(vm, "save", 0);
    for (unsigned i = 0; i < 2; i++) {
        add_fd(vm->qts, path, O_RDWR | O_CREAT, 1);
        export(vm->qts, 0, "/dev/fdset/1");
        remove_fd(vm->qts, 1);
        if (!i) {
            qtest_memset(vm->qts, 1 * MiB, 0, 8 * MiB);
            snapshot_qmp(vm, "save", 0);
        }
    }
    add_fd(vm->qts, path, O_RDONLY, 2);
    import(vm->qts, 1, "/dev/fdset/2");
    remove_fd(vm->qts, 2);
    add_fd(vm->qts, "/dev/null", O_RDONLY, 3);
    rsp = qtest_qmp(vm->qts, "{ 'execute': 'x-snapshot-device-import',"
                    " 'arguments': { 'slot': 1, 'file': %s,"
                    " 'touched': '/dev/fdset/3' } }", path);
    g_assert_true(qdict_haskey(rsp, "return"));
    qobject_unref(rsp);
    remove_fd(vm->qts, 3);
    snapshot_fill(vm, 1 * MiB, RAM - 1 * MiB, 2);
    restore(vm->qts, 1);
    assert_exact(vm->qts, 1);
    assert_exact(vm->qts, 0);

    unlink(fifo);
    g_assert_cmpint(mkfifo(fifo, 0600), ==, 0);
    export_refused(vm->qts, fifo, "is no regular file");
    export_refused(vm->qts, "/dev/null", "is no regular file");
    export_refused(vm->qts, dir, "is no regular file");
    export_refused(vm->qts, "/nowhere/at all", "Creating '/nowhere/at all.");
    export_refused(vm->qts, "/dev/fdset/7", "Failed to find fdset");
    g_assert_cmpuint(count_files("place"), ==, 2);

    if (!prlimit(qtest_pid(vm->qts), RLIMIT_FSIZE, &limit, NULL)) {
        rsp = qtest_qmp(
            vm->qts, "{ 'execute': 'x-snapshot-device-export', 'arguments': "
            "{ 'job-id': 'e', 'slot': 0, 'file': %s } }", path);

        if (!qdict_haskey(rsp, "error")) {
            error = end_job(vm->qts);
            g_assert_nonnull(error);
            g_test_message("%s", error);
        }
        qobject_unref(rsp);
        g_assert_cmpuint(count_files("place"), ==, 2);
    }
    assert_unharmed(vm->qts);
    snapshot_vm_end(vm);
}

/*
 * Catches: a file that was changed under the machine and is restored from, or
 * read where it no longer is, which would be the end of QEMU.
 */
static void test_changed(const void *machine)
{
    SnapshotVM *vm = start(machine, "");
    g_autofree char *path = path_of("changed");
    QTestState *worker;

    snapshot_fill(vm, 1 * MiB, RAM - 1 * MiB, 1);
    snapshot_qmp(vm, "save", 0);
    for (unsigned i = 0; i < 3; i++) {
        File *f;

        export(vm->qts, 0, path);
        worker = start_from(vm, machine, path, "");
        /* Another in its place changes nothing. */
        export(vm->qts, 0, path);
        restore(worker, 0);
        assert_exact(worker, 0);
        qtest_quit(worker);

        worker = start_from(vm, machine, path, "");
        f = open_file(path);
        if (i == 0) {
            g_assert_cmpint(ftruncate(f->fd, 4 * MiB), ==, 0);
        } else if (i == 1) {
            g_assert_cmpint(ftruncate(f->fd, 0), ==, 0);
        } else {
            write_at(f, "new", 3, first_page(f, find_block(f, "pc.ram"), true));
        }
        for (unsigned k = 0; k < 3; k++) {
            static const char *const commands[] = {
                "restore", "save", "verify",
            };
            g_autofree char *name = g_strdup_printf("x-snapshot-device-%s",
                                                    commands[k]);

            assert_error(qtest_qmp_assert_failure_ref(
                worker, "{ 'execute': %s, 'arguments': { 'slot': 0 } }", name),
                "was changed");
        }
        assert_error(qtest_qmp_assert_failure_ref(
            worker, "{ 'execute': 'x-snapshot-device-export', 'arguments': "
            "{ 'job-id': 'e', 'slot': 0, 'file': %s } }", path),
            "was changed");
        qtest_qmp_assert_success(worker, "{ 'execute': 'query-status' }");
        close_file(f);
        qtest_quit(worker);
    }
    snapshot_vm_end(vm);
}

/*
 * Catches: two files that are taken for one, though the pages of one end before
 * those of the other, as it was written anew with the length and the time of
 * the other: what is behind the end would be what QEMU has in its memory there.
 */
static void test_same_time(const void *machine)
{
    SnapshotVM *vm = start(machine, "");
    g_autofree char *path = path_of("sametime");
    g_autofree char *pages = g_malloc(RAM);
    struct timespec times[2];
    struct stat st;
    GString *text;
    uint64_t at;
    File *f;

    qtest_memset(vm->qts, 1 * MiB, 0x11, RAM - 1 * MiB);
    snapshot_qmp(vm, "save", 0);
    export(vm->qts, 0, path);
    f = open_file(path);
    at = ROUND_UP(f->size, 2 * MiB);
    f->offset += 64 * MiB;
    write_qdict(f, f->d);
    import(vm->qts, 1, path);
    restore(vm->qts, 1);
    assert_exact(vm->qts, 1);

    g_assert_cmpint(fstat(f->fd, &st), ==, 0);
    memset(pages, 0x77, RAM);
    write_at(f, pages, RAM - 1 * MiB, at + 1 * MiB);
    qdict_put_int((QDict *)find_block(f, "pc.ram"), "pages", at);
    text = qobject_to_json(QOBJECT(f->d));
    f->offset = st.st_size - sizeof(SnapshotFileFooter) - text->len;
    write_description(f, text->str, text->len);
    g_string_free(text, true);
    times[0] = st.st_atim;
    times[1] = st.st_mtim;
    g_assert_cmpint(futimens(f->fd, times), ==, 0);
    import(vm->qts, 2, path);
    restore(vm->qts, 2);
    assert_exact(vm->qts, 2);
    for (at = 1 * MiB; at < RAM; at += MiB / 4) {
        g_assert_cmphex(qtest_readl(vm->qts, at), ==, 0x77777777);
    }
    assert_unharmed(vm->qts);
    close_file(f);
    snapshot_vm_end(vm);
}

/*
 * Catches: an export for which what the machine is in the slot is not all put
 * back: what the guest can read, how many restores there were, what it waits
 * for.
 */
static void test_unnoticed(const void *machine)
{
    SnapshotVM *vm = start(machine, "-no-shutdown");
    g_autofree char *path = path_of("unnoticed");
    QDict *before, *after;
    static const char *const same[] = { "restores", "last-pages" };

    snapshot_save(vm, 0);
    for (unsigned i = 0; i < 3; i++) {
        snapshot_fill(vm, 1 * MiB, i * MiB, 2);
        snapshot_restore(vm, 0);
    }
    snapshot_fill(vm, 1 * MiB, RAM - 1 * MiB, 3);
    snapshot_qmp(vm, "save", 1);
    before = snapshot_query(vm);
    export(vm->qts, 0, path);
    after = snapshot_query(vm);
    for (unsigned i = 0; i < ARRAY_SIZE(same); i++) {
        g_assert_cmpint(qdict_get_try_int(before, same[i], -1), ==,
                        qdict_get_try_int(after, same[i], -1));
    }
    assert_exact(vm->qts, 1);
    qobject_unref(before);
    qobject_unref(after);
    snapshot_vm_end(vm);
}

/* Of the memory that test_shared() is about; some stripes of the reader's */
#define SHARED (64 * MiB)

/* Whose memory is the file that @fd is of this process */
static char *shared_args(int fd)
{
    return g_strdup_printf("-m 64 -object memory-backend-file,id=ram,size=64M,"
                           "share=on,mem-path=/proc/%d/fd/%d -machine "
                           "memory-backend=ram", getpid(), fd);
}

/* Pages of the first, of a middle and of the last stripe, and what is beside */
static void fill_shared(QTestState *qts, uint8_t value)
{
    qtest_memset(qts, 1 * MiB, value, 3 * PAGE);
    qtest_memset(qts, 31 * MiB, value + 1, 2 * MiB);
    qtest_memset(qts, 32 * MiB - PAGE, 0, 2 * PAGE);
    qtest_memset(qts, 40 * MiB, value + 2, 4 * MiB);
    qtest_memset(qts, SHARED - 1, value + 3, 1);
}

static void assert_same_content(int a, int b)
{
    g_autoptr(GMappedFile) x = g_mapped_file_new_from_fd(a, false, NULL);
    g_autoptr(GMappedFile) y = g_mapped_file_new_from_fd(b, false, NULL);

    g_assert_cmpuint(g_mapped_file_get_length(x), ==, SHARED);
    g_assert_cmpmem(g_mapped_file_get_contents(x), SHARED,
                    g_mapped_file_get_contents(y),
                    g_mapped_file_get_length(y));
}

/*
 * Catches: memory that has to stay where it is and is not what is in the file,
 * in any of the parts that threads read; what was there, left where the file
 * has zeroes; memory taken for what was never touched; a write after it that no
 * restore puts back.
 */
static void test_shared(const void *machine)
{
    const int ram = qemu_memfd_create("ram", 0, false, 0, 0, &error_abort);
    const int other = qemu_memfd_create("other", 0, false, 0, 0, &error_abort);
    g_autofree char *path = path_of("shared");
    g_autofree char *args = shared_args(ram), *other_args = shared_args(other);
    SnapshotVM *vm = start(machine, args);
    QTestState *worker;
    struct stat st;

    fill_shared(vm->qts, 0x10);
    snapshot_qmp(vm, "save", 0);
    export(vm->qts, 0, path);

    worker = start_from(vm, machine, path, other_args);
    g_assert_cmpint(fstat(other, &st), ==, 0);
    g_assert_cmpint(st.st_blocks * 512, >, 6 * MiB);
    g_assert_cmpint(st.st_blocks * 512, <, 8 * MiB);
    assert_exact(worker, 0);
    assert_same_content(ram, other);
    for (unsigned i = 0; i < 3; i++) {
        fill_shared(worker, i);
        qtest_memset(worker, 50 * MiB, 1, 1 * MiB);
        restore(worker, 0);
        assert_same_content(ram, other);
    }
    assert_exact(worker, 0);

    /* Over what is there, and from one to the other */
    fill_shared(worker, 0x20);
    qtest_memset(worker, 8 * MiB, 0x55, 5 * MiB);
    qmp_slot(worker, "x-snapshot-device-save", 1);
    import(worker, 2, path);
    for (unsigned i = 0; i < 3; i++) {
        restore(worker, 2);
        assert_same_content(ram, other);
        assert_exact(worker, 2);
        qtest_memset(worker, 10 * MiB, 0x66, 20 * MiB);
        restore(worker, 1);
        assert_exact(worker, 1);
    }
    qtest_quit(worker);
    snapshot_vm_end(vm);
    close(ram);
    close(other);
}

/* Is a page of RAM in a list?  @f is the file that it is of. */
static bool is_listed(const char *list, const File *f, uint64_t page)
{
    const uint64_t at = get_uint(find_block(f, "pc.ram"), "pages") + page;
    g_autofree char *text = NULL;
    g_auto(GStrv) lines = NULL;
    bool found = false;

    g_assert_true(g_file_get_contents(list, &text, NULL, NULL));
    lines = g_strsplit(text, "\n", 0);
    g_assert_cmpstr(lines[0], ==, "QEMU snapshot touched 1");
    g_assert_cmpstr(lines[1], ==, qdict_get_str(f->d, "id"));
    for (unsigned i = 2; *lines[i]; i++) {
        uint64_t offset, length;

        g_assert_cmpint(sscanf(lines[i], "%" SCNx64 " %" SCNx64, &offset,
                               &length), ==, 2);
        found |= at >= offset && at + PAGE <= offset + length;
    }
    return found;
}

/* What has a run to touch for a list; other pages are far from these. */
static void touch(QTestState *qts)
{
    qtest_readb(qts, 5 * MiB);
    qtest_writeb(qts, 9 * MiB, 1);
}

/* As QEMU finds out whether the host can tell of single pages */
static bool host_tells_pages(void)
{
    struct uffdio_api api = {
        .api = UFFD_API,
        .features = UFFD_FEATURE_WP_ASYNC,
    };
    int fd = syscall(__NR_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
    bool ok = fd >= 0 && !ioctl(fd, UFFDIO_API, &api);

    if (fd >= 0) {
        close(fd);
    }
    return ok;
}

static void assert_touched(const char *list, const File *f)
{
    if (host_tells_pages()) {
        g_assert_false(is_listed(list, f, 5 * MiB + PAGE));
        g_assert_false(is_listed(list, f, 9 * MiB + PAGE));
    }
    g_assert_true(is_listed(list, f, 5 * MiB));
    g_assert_true(is_listed(list, f, 9 * MiB));
    g_assert_false(is_listed(list, f, 7 * MiB));
    g_assert_false(is_listed(list, f, 14 * MiB));
}

/*
 * Catches: a list that lacks what the run read or wrote, or has all there is;
 * one that is of a later run, or of what an export makes of the machine, or
 * that an end without a restore leaves unwritten; one that is there and is not
 * used, or is written to.
 */
static void test_touched(const void *machine)
{
    SnapshotVM *vm = start(machine, "");
    g_autofree char *path = path_of("touched"), *log = path_of("touchedlog");
    g_autofree char *list = path_of("list"), *other = path_of("otherlist");
    g_autofree char *load = g_strdup_printf("%s,touched=%s", path, list);
    g_autofree char *load_other = g_strdup_printf("%s,touched=%s", path, other);
    g_autofree char *args = g_strdup_printf("-trace vm_snapshot_read_ahead -D "
                                            "%s", log);
    g_autofree char *before = NULL, *text = NULL, *again = path_of("tagain");
    QTestState *worker;
    File *f;

    for (unsigned i = 0; i < RAM / PAGE; i++) {
        qtest_writel(vm->qts, i * PAGE + 8, i + 1);
    }
    snapshot_qmp(vm, "save", 0);
    export(vm->qts, 0, path);
    f = open_file(path);

    /* Of the machine before */
    unlink(list);
    unlink(other);
    worker = start_from(vm, machine, load, "");
    touch(worker);
    g_assert_false(g_file_test(list, G_FILE_TEST_EXISTS));
    restore(worker, 0);
    assert_touched(list, f);
    qtest_memset(worker, 1 * MiB, 2, 14 * MiB);
    restore(worker, 0);
    assert_touched(list, f);
    assert_exact(worker, 0);
    qtest_quit(worker);

    g_assert_true(g_file_get_contents(list, &before, NULL, NULL));
    worker = start_from(vm, machine, load, args);
    qtest_memset(worker, 1 * MiB, 2, 14 * MiB);
    restore(worker, 0);
    assert_exact(worker, 0);
    qtest_quit(worker);
    assert_content(list, before);
    g_assert_true(g_file_get_contents(log, &text, NULL, NULL));
    g_assert_nonnull(strstr(text, " ranges, "));

    worker = start_from(vm, machine, load_other, "");
    touch(worker);
    qtest_quit(worker);
    assert_touched(other, f);

    /* To write the slot, the machine becomes what it has. */
    unlink(other);
    worker = start_from(vm, machine, load_other, "");
    touch(worker);
    export(worker, 0, again);
    assert_touched(other, f);
    qtest_memset(worker, 1 * MiB, 2, 14 * MiB);
    restore(worker, 0);
    assert_touched(other, f);
    qtest_quit(worker);
    close_file(f);
    snapshot_vm_end(vm);
}

static char *replace(const char *text, const char *from, const char *to)
{
    g_auto(GStrv) parts = g_strsplit(text, from, 0);

    return g_strjoinv(to, parts);
}

/* %id and %size stand for those of the file. */
static void write_list(const char *list, const char *form, const File *f)
{
    g_autofree char *size = g_strdup_printf("%" PRIx64, f->size);
    g_autofree char *text = replace(form, "%id", qdict_get_str(f->d, "id"));
    g_autofree char *all = replace(text, "%size", size);

    g_assert_true(g_file_set_contents(list, all, -1, NULL));
}

/* Import with a list that is no good: a warning, and nothing else */
static void list_refused(QTestState *qts, const char *path, const char *list,
                         const char *text)
{
    g_autofree char *said = qtest_hmp(qts, "x_snapshot_device_import -t %s "
                                      "%s 4", list, path);

    g_test_message("%s", said);
    g_assert_nonnull(strstr(said, "is not used: "));
    g_assert_nonnull(strstr(said, text));
    for (unsigned i = 0; i < 2; i++) {
        touch(qts);
        restore(qts, 4);
    }
    assert_exact(qts, 4);
}

/*
 * Catches: a list that makes a load fail or wait, or is believed, whatever is
 * in it, or that is replaced though it is none.
 */
static void test_lists(const void *machine)
{
#define BEGIN "QEMU snapshot touched 1\n%id\n"
    static const struct {
        const char *form, *text;
    } lists[] = {
        { "", "none of this version" },
        { "QEMU snapshot touched 2\n", "none of this version" },
        { "QEMU snapshot touched 1\nanother\n", "another file" },
        { "QEMU snapshot touched 1", "none of this version" },
        { BEGIN "0 %size1\n", "no range" },
        { BEGIN "%size 1\n", "no range" },
        { BEGIN "ffffffffffffffff 2\n", "no range" },
        { BEGIN "1000 ffffffffffffffff\n", "no range" },
        { BEGIN "10000000000000000 1\n", "no range" },
        { BEGIN "2000 1000\n1000 1000\n", "no range" },
        { BEGIN "1000 1000\n1fff 1\n", "no range" },
        { BEGIN "1000 0\n", "no range" },
        { BEGIN "-1 1\n", "no range" },
        { BEGIN "1000 -1\n", "no range" },
        { BEGIN " 1000 1\n", "no range" },
        { BEGIN "1000\n", "no range" },
        { BEGIN "1000 1 1\n", "no range" },
        { BEGIN "\n", "no range" },
        { BEGIN "1000 1000", "cut off" },
    };
    SnapshotVM *vm = start(machine, "");
    g_autofree char *path = path_of("lists"), *list = path_of("bad");
    g_autofree char *fifo = path_of("badfifo"), *nowhere = path_of("no/list");
    QDict *rsp;
    File *f;

    snapshot_fill(vm, 1 * MiB, RAM - 1 * MiB, 1);
    snapshot_qmp(vm, "save", 0);
    export(vm->qts, 0, path);
    f = open_file(path);
    for (unsigned i = 0; i < ARRAY_SIZE(lists); i++) {
        g_autofree char *before = NULL;

        write_list(list, lists[i].form, f);
        g_assert_true(g_file_get_contents(list, &before, NULL, NULL));
        list_refused(vm->qts, path, list, lists[i].text);
        assert_content(list, before);
    }
    g_assert_cmpint(truncate(list, 4 * MiB + 1), ==, 0);
    list_refused(vm->qts, path, list, "more than");
    unlink(fifo);
    g_assert_cmpint(mkfifo(fifo, 0600), ==, 0);
    list_refused(vm->qts, path, fifo, "no regular file");
    list_refused(vm->qts, path, dir, "no regular file");
    list_refused(vm->qts, path, "/proc/self/mem", "none of this version");

    rsp = qtest_qmp(vm->qts, "{ 'execute': 'x-snapshot-device-import', "
                    "'arguments': { 'slot': 4, 'file': %s, 'touched': %s } }",
                    path, nowhere);
    g_assert_true(qdict_haskey(rsp, "return"));
    qobject_unref(rsp);
    restore(vm->qts, 4);
    restore(vm->qts, 4);
    assert_exact(vm->qts, 4);
    close_file(f);
    snapshot_vm_end(vm);
#undef BEGIN
}

/* A machine that runs, or sleeps, has clocks that go on. */
static void assert_exact_but_time(QTestState *qts, unsigned slot)
{
    QDict *found = qtest_qmp_assert_success_ref(
        qts, "{ 'execute': 'x-snapshot-device-verify',"
        " 'arguments': { 'slot': %u } }", slot);
    const QListEntry *entry;

    g_assert_cmpuint(qdict_get_int(found, "pages"), ==, 0);
    QLIST_FOREACH_ENTRY(qdict_get_qlist(found, "devices"), entry) {
        g_assert_cmpstr(qdict_get_str(qobject_to(QDict,
                                                 qlist_entry_obj(entry)),
                                      "section"), ==, "timer");
    }
    qobject_unref(found);
}

static void wait_state(SnapshotVM *vm, const char *state)
{
    for (unsigned tries = 0; tries < 1000; tries++) {
        QDict *status = qtest_qmp_assert_success_ref(
            vm->qts, "{ 'execute': 'query-status' }");
        bool there = !strcmp(qdict_get_str(status, "status"), state);

        qobject_unref(status);
        if (there) {
            return;
        }
        g_usleep(1000);
    }
    snapshot_assert_state(vm, state);
}

static void assert_worker_state(const SnapshotVM *like, const char *file,
                                const char *state)
{
    QTestState *qts = qtest_initf("-M pc -m 16 -serial null -rtc clock=vm "
                                  "-action panic=pause -device pvpanic "
                                  "-device snapshot,slots=5,ram=%s,load=%s",
                                  like->remap ? "remap" : "dirty", file);
    QDict *status = qtest_qmp_assert_success_ref(
        qts, "{ 'execute': 'query-status' }");

    g_assert_cmpstr(qdict_get_str(status, "status"), ==, state);
    qobject_unref(status);
    assert_exact_but_time(qts, 0);
    qtest_quit(qts);
}

/* The machine is migrated then, and of no use any more. */
static void migrate(SnapshotVM *vm, const char *path)
{
    bool done = false;

    qtest_qmp_assert_success(
        vm->qts, "{ 'execute': 'migrate-set-capabilities', 'arguments': {"
        " 'capabilities': [ { 'capability': 'mapped-ram', 'state': true } ]"
        " } }");
    qtest_qmp_assert_success(vm->qts, "{ 'execute': 'migrate',"
                             " 'arguments': { 'uri': %s } }", path);
    while (!done) {
        QDict *info = qtest_qmp_assert_success_ref(
            vm->qts, "{ 'execute': 'query-migrate' }");

        done = !strcmp(qdict_get_str(info, "status"), "completed");
        g_assert_cmpstr(qdict_get_str(info, "status"), !=, "failed");
        qobject_unref(info);
        g_usleep(1000);
    }
}

/*
 * Catches: a machine that wakes up, or runs on, because one of its slots is
 * written; one that sleeps in a slot, or was migrated asleep, and does not in a
 * worker.
 */
static void test_states(const void *machine)
{
    SnapshotVM *vm = snapshot_vm_start(",slots=5", "-M %s -m 16 -serial null"
                                       " -rtc clock=vm -action panic=pause"
                                       " -device pvpanic",
                                       (const char *)machine);
    QPCIDevice *pm = qpci_device_find(vm->pci, QPCI_DEVFN(1, 3));
    g_autofree char *awake = path_of("awake"), *asleep = path_of("asleep");
    g_autofree char *stream = path_of("stream"), *uri = NULL;

    qpci_config_writel(pm, 0x40, 0x601);
    qpci_config_writeb(pm, 0x80, 1);
    snapshot_qmp(vm, "save", 0);
    qtest_outw(vm->qts, 0x604, 1 << 13 | 1 << 10);
    wait_state(vm, "suspended");
    snapshot_fill(vm, 1 * MiB, RAM - 1 * MiB, 1);
    snapshot_qmp(vm, "save", 1);
    export(vm->qts, 0, awake);
    snapshot_assert_state(vm, "suspended");
    assert_exact_but_time(vm->qts, 1);
    export(vm->qts, 1, asleep);
    assert_worker_state(vm, awake, "running");
    assert_worker_state(vm, asleep, "suspended");

    restore(vm->qts, 0);
    snapshot_assert_state(vm, "running");
    export(vm->qts, 1, asleep);
    snapshot_assert_state(vm, "running");
    assert_worker_state(vm, asleep, "suspended");

    qtest_outb(vm->qts, 0x505, 1);
    wait_state(vm, "guest-panicked");
    export(vm->qts, 1, asleep);
    export(vm->qts, 0, awake);
    snapshot_assert_state(vm, "guest-panicked");
    assert_worker_state(vm, asleep, "suspended");
    assert_worker_state(vm, awake, "running");
    assert_exact_but_time(vm->qts, 0);

    unlink(stream);
    uri = g_strdup_printf("file:%s", stream);
    restore(vm->qts, 1);
    qtest_qmp_assert_success(vm->qts, "{ 'execute': 'cont' }");
    snapshot_assert_state(vm, "suspended");
    migrate(vm, uri);
    assert_worker_state(vm, stream, "suspended");
    g_free(pm);
    snapshot_vm_end(vm);
}

/* A file of a slot with a section that only the device can find wrong */
static void export_bad(QTestState *qts, unsigned slot, const char *path)
{
    QDict *section;
    File *f;

    export(qts, slot, path);
    f = open_file(path);
    for (unsigned i = 0; (section = nth(f->d, "sections", i)); i++) {
        if (!strcmp(qdict_get_str(section, "name"), "serial")) {
            break;
        }
    }
    g_assert_nonnull(section);
    qdict_put_int(section, "length", get_uint(section, "length") - 1);
    write_qdict(f, f->d);
    close_file(f);
}

/* Fail half way, which leaves a machine that only a restore can help. */
static void restore_bad(SnapshotVM *vm, unsigned slot)
{
    snapshot_qmp_refused(vm, "restore", slot, "Loading 'serial'");
    snapshot_assert_state(vm, "internal-error");
    snapshot_qmp_refused(vm, "save", 1, "stopped until its next reset");
}

static int64_t machine_resets(SnapshotVM *vm)
{
    QDict *info = snapshot_query(vm);
    int64_t n = qdict_get_int(info, "machine-resets");

    qobject_unref(info);
    return n;
}

/* Returns: what QEMU, which did not start, has said */
static char *load_refused(const SnapshotVM *like, const char *machine,
                          const char *file, const char *args)
{
    g_autofree char *cmd = g_strdup_printf(
        "%s -M %s -m 16 -serial null -rtc clock=vm -display none -accel qtest "
        "%s -device snapshot,slots=5,ram=%s,load=%s",
        getenv("QTEST_QEMU_BINARY"), machine, args,
        like->remap ? "remap" : "dirty", file);
    char *said;
    int status;

    g_assert_true(g_spawn_command_line_sync(cmd, NULL, &said, &status, NULL));
    g_test_message("%s", said);
    g_assert_true(WIFEXITED(status));
    g_assert_cmpint(WEXITSTATUS(status), ==, 1);
    return said;
}

/*
 * Catches: a restore that fails half way, and ends QEMU if the machine does not
 * run, whatever it is stopped for; one after it that does not begin with a
 * reset; a commit of what no guest has written.
 */
static void test_bad_section(const void *machine)
{
    g_autofree char *disk = path_of("baddisk"), *path = path_of("bad");
    g_autofree char *args = g_strdup_printf("-device pvpanic -drive if=ide,"
                                            "format=raw,file.filename=%s,"
                                            "file.locking=off", disk);
    g_autofree char *zeroes = g_malloc0(1 * MiB), *said = NULL;
    SnapshotVM *vm;
    int64_t resets;

    g_assert_true(g_file_set_contents(disk, zeroes, 1 * MiB, NULL));
    vm = start(machine, args);
    snapshot_qmp(vm, "save", 0);
    export_bad(vm->qts, 0, path);
    import(vm->qts, 4, path);
    snapshot_assert_state(vm, "prelaunch");
    restore_bad(vm, 4);
    restore_bad(vm, 4);
    assert_error(qtest_qmp_assert_failure_ref(
        vm->qts, "{ 'execute': 'x-snapshot-device-commit',"
        " 'arguments': { 'job-id': 'c' } }"), "has failed half way");
    resets = machine_resets(vm);
    assert_unharmed(vm->qts);
    g_assert_cmpint(machine_resets(vm), ==, resets + 1);
    snapshot_assert_state(vm, "prelaunch");
    assert_unharmed(vm->qts);
    g_assert_cmpint(machine_resets(vm), ==, resets + (vm->remap ? 2 : 1));
    said = load_refused(vm, machine, path, args);
    g_assert_nonnull(strstr(said, "load=: "));
    g_assert_nonnull(strstr(said, "Loading 'serial'"));
    snapshot_vm_end(vm);

    vm = snapshot_vm_start(",slots=5", "-M %s -m 16 -serial null"
                           " -rtc clock=vm -action panic=pause %s",
                           (const char *)machine, args);
    snapshot_qmp(vm, "save", 0);
    import(vm->qts, 4, path);
    qtest_outb(vm->qts, 0x505, 1);
    wait_state(vm, "guest-panicked");
    restore_bad(vm, 4);
    restore(vm->qts, 0);
    snapshot_vm_end(vm);
}

/* The line of the fingerprint that two files differ in, or NULL */
static const char *first_difference(const File *a, const File *b)
{
    const QListEntry *x = qlist_first(qdict_get_qlist(a->d, "machine"));
    const QListEntry *y = qlist_first(qdict_get_qlist(b->d, "machine"));

    for (; x && y; x = qlist_next(x), y = qlist_next(y)) {
        const char *line = qstring_get_str(qobject_to(QString,
                                                      qlist_entry_obj(x)));

        if (strcmp(line, qstring_get_str(qobject_to(QString,
                                                    qlist_entry_obj(y))))) {
            return line;
        }
    }
    return x || y ? "the number of lines" : NULL;
}

/* Write to what its configuration and BARs have. */
static void poke(QTestState *qts, QPCIDevice *dev)
{
    for (unsigned i = 0; i < 6; i++) {
        uint32_t was = qpci_config_readl(dev, PCI_BASE_ADDRESS_0 + 4 * i);
        uint64_t size;
        QPCIBar bar;

        qpci_config_writel(dev, PCI_BASE_ADDRESS_0 + 4 * i, 0xffffffff);
        size = qpci_config_readl(dev, PCI_BASE_ADDRESS_0 + 4 * i);
        qpci_config_writel(dev, PCI_BASE_ADDRESS_0 + 4 * i, was);
        if (!size) {
            continue;
        }
        bar = qpci_iomap(dev, i, &size);
        qpci_device_enable(dev);
        for (unsigned k = 0; k < 200; k++) {
            qpci_io_writel(dev, bar, 4 * g_test_rand_int_range(0, MIN(size,
                           1024) / 4), g_test_rand_int());
        }
        if ((was & 6) == 4) {
            i++;
        }
    }
    for (unsigned i = 0x40; i < 0x100; i += 4) {
        qpci_config_writel(dev, i, g_test_rand_int());
    }
}

/*
 * Catches: a property in the fingerprint that is a register, which the guest or
 * time changes: a file would be refused by a machine made alike.
 */
static void test_fingerprint(const void *machine)
{
    static const char *const devices[] = {
        "e1000", "e1000e", "rtl8139", "pcnet", "i82550", "vmxnet3", "tulip",
        "virtio-net-pci", "virtio-rng-pci", "virtio-balloon-pci",
        "virtio-serial-pci", "virtio-gpu-pci", "virtio-scsi-pci",
        "virtio-keyboard-pci", "edu", "VGA", "cirrus-vga", "vmware-svga",
        "bochs-display", "ati-vga", "qxl", "AC97", "ES1370", "intel-hda",
        "nec-usb-xhci", "usb-ehci", "piix3-usb-uhci", "pci-ohci",
        "lsi53c895a", "megasas", "am53c974", "ich9-ahci", "sdhci-pci",
        "i6300esb", "pci-serial", "pci-testdev", "tpci200",
        "igb", "pvscsi", "ich9-intel-hda", "vmcoreinfo",
        "virtio-crypto-pci", "pci-ipmi-kcs", "ivshmem-plain", "sb16",
        "isa-serial", "isa-debug-exit", "adlib", "gus", "cs4231a",
        "isa-ipmi-kcs", "pc-testdev", "i82801b11-bridge",
        "pci-bridge", "pcie-root-port", "amd-iommu",
    };
    g_autofree char *a = path_of("print0"), *b = path_of("print1");
    unsigned n = 0, bad = 0;

    for (unsigned i = 0; i < ARRAY_SIZE(devices); i++) {
        QPCIDevice *dev;
        SnapshotVM *vm;
        File *x, *y;
        const char *differ;
        QDict *rsp;

        if (!qtest_has_device(devices[i]) ||
            !strcmp(devices[i], "isa-debug-exit") ||
            !strcmp(devices[i], "ivshmem-plain") ||
            !strcmp(devices[i], "virtio-crypto-pci") ||
            strstr(devices[i], "ipmi") || strstr(devices[i], "iommu") ||
            (strstr(devices[i], "pcie") && !strcmp(machine, "pc"))) {
            continue;
        }
        vm = snapshot_vm_start(",slots=2", "-M %s -m 16 -vga none -net none "
                               "-serial null -rtc clock=vm -device %s%s",
                               (const char *)machine, devices[i],
                               strstr(devices[i], "pci-bridge") ?
                               ",chassis_nr=1" : "");
        rsp = qtest_qmp(vm->qts, "{ 'execute': 'x-snapshot-device-save',"
                        " 'arguments': { 'slot': 0 } }");
        if (qdict_haskey(rsp, "error")) {
            qobject_unref(rsp);
            snapshot_vm_end(vm);
            continue;
        }
        qobject_unref(rsp);
        export(vm->qts, 0, a);
        for (unsigned devfn = 0; devfn < 256; devfn++) {
            dev = qpci_device_find(vm->pci, devfn);
            if (dev && devfn != vm->dev->devfn) {
                poke(vm->qts, dev);
            }
            g_free(dev);
        }
        qtest_clock_step(vm->qts, 1000000000);
        rsp = qtest_qmp(vm->qts, "{ 'execute': 'x-snapshot-device-save',"
                        " 'arguments': { 'slot': 0 } }");
        if (!qdict_haskey(rsp, "error")) {
            export(vm->qts, 0, b);
            x = open_file(a);
            y = open_file(b);
            differ = first_difference(x, y);
            if (differ) {
                g_test_message("%s: %s", devices[i], differ);
                bad++;
            }
            close_file(x);
            close_file(y);
            n++;
        }
        qobject_unref(rsp);
        snapshot_vm_end(vm);
    }
    g_test_message("%u devices", n);
    g_assert_cmpuint(bad, ==, 0);
    g_assert_cmpuint(n, >, 20);
}

/* Catches: a device that is described as the one that had its id before. */
static void test_plugged(const void *machine)
{
    SnapshotVM *vm = start(machine, "-device piix3-usb-uhci,id=u -device "
                           "usb-mouse,id=d,bus=u.0,usb_version=2");
    g_autofree char *path = path_of("plugged");

    for (unsigned i = 2; i; i--) {
        g_autofree char *line = g_strdup_printf("/d.usb_version=%u\"", i);
        File *f;

        snapshot_qmp(vm, "save", 0);
        export(vm->qts, 0, path);
        f = open_file(path);
        g_assert_nonnull(strstr(f->text, line));
        close_file(f);
        qtest_qmp_device_del(vm->qts, "d");
        qtest_qmp_device_add(vm->qts, "usb-mouse", "d", "{ 'bus': 'u.0',"
                             " 'usb_version': 1 }");
    }
    snapshot_vm_end(vm);
}

static void remove_dir(void)
{
    g_autoptr(GDir) d = g_dir_open(dir, 0, NULL);
    const char *name;

    while ((name = g_dir_read_name(d))) {
        g_autofree char *path = path_of(name);

        unlink(path);
    }
    rmdir(dir);
    g_free(dir);
}

int main(int argc, char **argv)
{
    int ret;

    g_test_init(&argc, &argv, NULL);
    dir = g_dir_make_tmp("snapshot-file-XXXXXX", NULL);
    snapshot_add_tests("file/exact", test_exact);
    snapshot_add_tests("file/beside-slots", test_beside_slots);
    snapshot_add_tests("file/row-beside-slots", test_row_beside_slots);
    snapshot_add_tests("file/base", test_base);
    snapshot_add_tests("file/base-shared", test_base_shared);
    snapshot_add_tests("file/base-refused", test_base_refused);
    snapshot_add_test("pc", "dirty", "file/base-gone", test_base_gone);
    snapshot_add_test("pc", "remap", "file/base-gone", test_base_gone);
    snapshot_add_tests("file/many-rounds", test_many_rounds);
    snapshot_add_tests("file/damaged", test_damaged);
    snapshot_add_tests("file/hostile", test_hostile);
    snapshot_add_tests("file/bad-section", test_bad_section);
    snapshot_add_test("pc", "dirty", "file/mutations", test_mutations);
    snapshot_add_test("pc", "remap", "file/mutations", test_mutations);
    snapshot_add_test("pc", "dirty", "file/base-mutations",
                      test_base_mutations);
    snapshot_add_test("pc", "remap", "file/base-mutations",
                      test_base_mutations);
    snapshot_add_test("pc", "dirty", "file/bitmaps", test_bitmaps);
    snapshot_add_test("pc", "remap", "file/bitmaps", test_bitmaps);
    snapshot_add_test("pc", "dirty", "file/states", test_states);
    snapshot_add_test("pc", "remap", "file/states", test_states);
    snapshot_add_test("pc", "dirty", "file/others", test_others);
    snapshot_add_test("q35", "remap", "file/others", test_others);
    snapshot_add_tests("file/job", test_job);
    snapshot_add_test("pc", "dirty", "file/two-jobs", test_two_jobs);
    snapshot_add_test("q35", "remap", "file/two-jobs", test_two_jobs);
    snapshot_add_tests("file/places", test_places);
    snapshot_add_tests("file/own-files", test_own_files);
    snapshot_add_tests("file/changed", test_changed);
    snapshot_add_tests("file/same-time", test_same_time);
    snapshot_add_tests("file/unnoticed", test_unnoticed);
    snapshot_add_tests("file/shared", test_shared);
    snapshot_add_tests("file/touched", test_touched);
    snapshot_add_test("pc", "dirty", "file/lists", test_lists);
    snapshot_add_test("q35", "remap", "file/lists", test_lists);
    snapshot_add_test("q35", "dirty", "file/fingerprint", test_fingerprint);
    snapshot_add_test("pc", "dirty", "file/plugged", test_plugged);
    ret = g_test_run();
    remove_dir();
    return ret;
}
