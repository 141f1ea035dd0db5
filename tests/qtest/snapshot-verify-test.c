/*
 * Tests of the snapshot device's verification: it finds and names whatever is
 * not as it was saved, and nothing else
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/atomic.h"
#include "qemu/units.h"
#include "qobject/qdict.h"
#include "qobject/qjson.h"
#include "qobject/qlist.h"
#include "snapshot-utils.h"

/* The machine does not run: nothing changes but what is changed here. */
static SnapshotVM *start(const char *machine, const char *args)
{
    return snapshot_vm_start("", "-M %s -m 32 -serial null -rtc clock=vm -S %s",
                             machine, args);
}

/* What differs now; the caller owns it. */
static QDict *verify(SnapshotVM *vm)
{
    return qtest_qmp_assert_success_ref(
        vm->qts, "{ 'execute': 'x-snapshot-device-verify',"
        " 'arguments': { 'slot': 0 } }");
}

static void assert_counts(QDict *found, uint64_t pages, uint64_t fields)
{
    GString *s = qobject_to_json_pretty(QOBJECT(found), false);

    g_test_message("%s", s->str);
    g_string_free(s, true);
    g_assert_cmpuint(qdict_get_int(found, "pages"), ==, pages);
    g_assert_cmpuint(qdict_get_int(found, "fields"), ==, fields);
    g_assert_cmpuint(qlist_size(qdict_get_qlist(found, "ram")), ==,
                     MIN(pages, 16));
    /* A few devices have two fields of one name. */
    g_assert_cmpuint(qlist_size(qdict_get_qlist(found, "devices")), <=,
                     MIN(fields, 16));
}

static void assert_nothing(SnapshotVM *vm)
{
    QDict *found = verify(vm);

    assert_counts(found, 0, 0);
    qobject_unref(found);
}

static void assert_page(QDict *found, unsigned i, const char *block,
                        uint64_t offset, unsigned byte)
{
    QList *pages = qdict_get_qlist(found, "ram");
    const QListEntry *entry = qlist_first(pages);
    QDict *page;

    for (; i; i--) {
        entry = qlist_next(entry);
    }
    page = qobject_to(QDict, qlist_entry_obj(entry));
    g_assert_nonnull(strstr(qdict_get_str(page, "block"), block));
    g_assert_cmphex(qdict_get_int(page, "offset"), ==, offset);
    g_assert_cmphex(qdict_get_int(page, "byte"), ==, byte);
    g_assert_cmpuint(qdict_get_int(page, "count"), ==, 1);
}

static void flip_byte(SnapshotVM *vm, uint64_t addr)
{
    qtest_writeb(vm->qts, addr, ~qtest_readb(vm->qts, addr));
}

/* Catches: a byte of RAM, of whichever block, that is not compared. */
static void test_ram(const void *machine)
{
    /* Zeroes, a page that is not, the first and the last byte of all */
    static const uint64_t main_ram[] = {
        0, 0x9ffff, 1 * MiB, 4 * MiB + 1, 32 * MiB - 1,
    };
    SnapshotVM *vm = start(machine, "-vga none -device VGA,addr=8");
    QPCIDevice *vga = qpci_device_find(vm->pci, QPCI_DEVFN(8, 0));
    QPCIBar bar = qpci_iomap(vga, 0, NULL);
    QDict *found;
    unsigned i;

    qpci_device_enable(vga);
    snapshot_fill(vm, 4 * MiB, 28 * MiB, 1);
    snapshot_qmp(vm, "save", 0);
    assert_nothing(vm);

    for (i = 0; i < ARRAY_SIZE(main_ram); i++) {
        flip_byte(vm, main_ram[i]);
        found = verify(vm);
        assert_counts(found, 1, 0);
        assert_page(found, 0, "pc.ram", main_ram[i] & ~0xfff,
                    main_ram[i] & 0xfff);
        qobject_unref(found);
        snapshot_qmp(vm, "restore", 0);
        assert_nothing(vm);
    }

    flip_byte(vm, 2 * MiB + 7);
    flip_byte(vm, bar.addr + 0x12345);
    found = verify(vm);
    assert_counts(found, 2, 0);
    assert_page(found, 0, "pc.ram", 2 * MiB, 7);
    assert_page(found, 1, "vga.vram", 0x12000, 0x345);
    qobject_unref(found);

    /* All are counted, some are named. */
    snapshot_fill(vm, 4 * MiB, 28 * MiB, 2);
    found = verify(vm);
    assert_counts(found, 2 + 28 * MiB / (256 * KiB), 0);
    qobject_unref(found);

    snapshot_qmp(vm, "restore", 0);
    assert_nothing(vm);
    g_free(vga);
    snapshot_vm_end(vm);
}

/* A register, and the field that it is in */
typedef struct Fault {
    const char *machine;                /* NULL: both */
    enum { PORT, INDEXED, MEMORY, IOAPIC, CONFIG } space;
    unsigned addr;                      /* CONFIG: devfn */
    unsigned index;                     /* INDEXED, IOAPIC, CONFIG */
    uint8_t value;
    const char *section;                /* or the end of its name */
    const char *field;
    int byte;                           /* of it; -1: any */
} Fault;

static const Fault faults[] = {
    { NULL, INDEXED, 0x70, 0x50, 0xa5, "mc146818rtc", "cmos_data", 0x50 },
    { NULL, INDEXED, 0x70, 0x01, 0x34, "mc146818rtc", "cmos_data", 1 },
    { NULL, PORT, 0x21, 0, 0xaa, "i8259", "imr", 0 },
    { NULL, PORT, 0xa1, 0, 0x55, "i8259", "imr", 0 },
    { NULL, PORT, 0x4d0, 0, 0x40, "i8259", "elcr", 0 },
    { NULL, PORT, 0x0a, 0, 0x02, "dma", "mask", 0 },
    { NULL, PORT, 0x40, 0, 0x12, "i8254", "channels[0].count", -1 },
    { NULL, PORT, 0x3ff, 0, 0x22, "serial", "state.scr", 0 },
    { NULL, PORT, 0x3fb, 0, 0x1b, "serial", "state.lcr", 0 },
    { NULL, PORT, 0x92, 0, 0x02, "port92", "outport", 0 },
    { NULL, PORT, 0x60, 0, 0xf3, "ps2kbd", "parent_obj.write_cmd", -1 },
    { NULL, PORT, 0x3c8, 0, 0x33, "/vga", "vga.dac_write_index", 0 },
    { NULL, INDEXED, 0x3c4, 2, 0x03, "/vga", "vga.sr", 2 },
    { NULL, MEMORY, 0xfed000f0, 0, 0x21, "hpet", "hpet_counter", 7 },
    { NULL, IOAPIC, 0xfec00000, 0x12, 0x42, "ioapic", "ioredtbl", -1 },
    { NULL, CONFIG, 0x00, 0x0c, 0, "PCIHost", "config_reg", -1 },
    { "pc", PORT, 0x172, 0, 0x22, "ide", "bus[1].ifs[0].nsector", 3 },
    { "pc", PORT, 0x3f2, 0, 0x1c, "fdc", "state.dor", 0 },
    { "pc", CONFIG, 0x00, 0x5a, 0x11, "I440FX", "parent_obj.config", 0x5a },
    { "pc", CONFIG, 0x08, 0x61, 0x0b, "PIIX3", "dev.config", 0x61 },
    { "pc", CONFIG, 0x0b, 0x41, 0xc0, "piix4_pm", "parent_obj.config", 0x41 },
    { "q35", CONFIG, 0x00, 0x91, 0x11, "mch", "parent_obj.config", 0x91 },
    { "q35", CONFIG, 0xf8, 0x61, 0x0b, "ICH9LPC", "d.config", 0x61 },
    { "q35", CONFIG, 0xfa, 0x3c, 0x0b, "ich9_ahci", "parent_obj.config", 0x3c },
    { "q35", CONFIG, 0xfb, 0x3c, 0x0b, "ich9_smb", "dev.config", 0x3c },
};

static void set_fault(SnapshotVM *vm, const Fault *f)
{
    switch (f->space) {
    case INDEXED:
        qtest_outb(vm->qts, f->addr, f->index);
        qtest_outb(vm->qts, f->addr + 1, f->value);
        break;
    case PORT:
        qtest_outb(vm->qts, f->addr, f->value);
        break;
    case IOAPIC:
        qtest_writel(vm->qts, f->addr, f->index);
        qtest_writel(vm->qts, f->addr + 0x10, f->value);
        break;
    case MEMORY:
        qtest_writel(vm->qts, f->addr, f->value);
        break;
    case CONFIG:
        vm->pci->config_writeb(vm->pci, f->addr, f->index, f->value);
        break;
    }
}

static bool is_named(QDict *found, const Fault *f)
{
    QListEntry *entry;

    QLIST_FOREACH_ENTRY(qdict_get_qlist(found, "devices"), entry) {
        QDict *d = qobject_to(QDict, qlist_entry_obj(entry));
        const char *field = qdict_get_try_str(d, "field");

        if (g_str_has_suffix(qdict_get_str(d, "section"), f->section) &&
            field && g_str_has_prefix(field, f->field) &&
            (f->byte < 0 || qdict_get_int(d, "offset") == f->byte)) {
            g_assert_cmpstr(qdict_get_str(d, "saved"), !=,
                            qdict_get_str(d, "found"));
            return true;
        }
    }
    return false;
}

/*
 * Catches: a device whose state is not compared, and a field that is taken for
 * another.  What else differs is of the same access, as an index register.
 */
static void test_devices(const void *machine)
{
    SnapshotVM *vm = start(machine, "");
    unsigned i;

    snapshot_qmp(vm, "save", 0);
    assert_nothing(vm);
    for (i = 0; i < ARRAY_SIZE(faults); i++) {
        const Fault *f = &faults[i];
        QDict *found;

        if (f->machine && strcmp(f->machine, machine)) {
            continue;
        }
        g_test_message("%s: %s", f->section, f->field);
        set_fault(vm, f);
        found = verify(vm);
        assert_counts(found, qdict_get_int(found, "pages"),
                      qdict_get_int(found, "fields"));
        g_assert_cmpuint(qdict_get_int(found, "pages"), ==, 0);
        g_assert_cmpuint(qdict_get_int(found, "fields"), <, 16);
        if (!is_named(found, f)) {
            g_test_message("FAILED");
            g_test_fail();
        }
        qobject_unref(found);
        snapshot_qmp(vm, "restore", 0);
        assert_nothing(vm);
    }
    snapshot_vm_end(vm);
}

/* Catches: a subsection that came or went and is not seen, or not named. */
static void test_subsection(const void *machine)
{
    static const Fault fifo = {
        .section = "serial", .field = "state.serial/recv_fifo", .byte = -1,
    };
    SnapshotVM *vm = start(machine, "");
    QDict *found;

    qtest_outb(vm->qts, 0x3fa, 0x07);       /* FCR: empty, use FIFOs */
    qtest_outb(vm->qts, 0x3fc, 0x10);       /* MCR: loop */
    snapshot_qmp(vm, "save", 0);
    qtest_outb(vm->qts, 0x3f8, 'A');
    snapshot_qmp(vm, "save", 1);
    found = verify(vm);
    assert_counts(found, 0, qdict_get_int(found, "fields"));
    g_assert_true(is_named(found, &fifo));
    qobject_unref(found);

    snapshot_qmp(vm, "save", 0);
    qtest_outb(vm->qts, 0x3fa, 0x07);
    found = verify(vm);
    g_assert_true(is_named(found, &fifo));
    qobject_unref(found);
    snapshot_qmp(vm, "restore", 0);
    assert_nothing(vm);
    snapshot_vm_end(vm);
}

static unsigned query(SnapshotVM *vm, const char *key)
{
    QDict *info = snapshot_query(vm);
    unsigned n = qdict_get_int(info, key);

    qobject_unref(info);
    return n;
}

/* Catches: a value of verify= that is misunderstood, a restore left out. */
static void test_every(const void *machine)
{
    static const struct {
        const char *value;
        unsigned every;
    } values[] = {
        { "", 0 }, { ",verify=off", 0 }, { ",verify=0", 0 },
        { ",verify=on", 1 }, { ",verify=1", 1 }, { ",verify=3", 3 },
    };
    unsigned i, restores;

    for (i = 0; i < ARRAY_SIZE(values); i++) {
        unsigned every = values[i].every;
        SnapshotVM *vm = snapshot_vm_start(values[i].value, "-M %s -m 8",
                                           (const char *)machine);

        g_assert_cmpuint(query(vm, "verify"), ==, every);
        snapshot_save(vm, 0);
        for (restores = 1; restores <= 7; restores++) {
            flip_byte(vm, 1 * MiB);
            snapshot_restore(vm, 0);
            g_assert_cmpuint(query(vm, "verified"), ==,
                             every ? restores / every : 0);
        }
        g_assert_cmpuint(query(vm, "mismatched"), ==, 0);
        snapshot_vm_end(vm);
    }
}

static void test_refused(const void *machine)
{
    SnapshotVM *vm = snapshot_vm_start("", "-M %s -m 8 -S",
                                       (const char *)machine);

    snapshot_qmp_refused(vm, "verify", 0, "There is no snapshot in slot 0");
    snapshot_qmp_refused(vm, "verify", 8, "There is no slot 8");
    snapshot_save(vm, 0);
    assert_nothing(vm);
    snapshot_vm_end(vm);
}

/* Another process that writes to the guest's shared memory, at any time */
typedef struct Meddler {
    uint8_t *byte;
    bool stop;
} Meddler;

static gpointer meddle(gpointer opaque)
{
    Meddler *m = opaque;

    while (!qatomic_read(&m->stop)) {
        qatomic_inc(m->byte);
    }
    return NULL;
}

static bool count_event(QTestState *qts, const char *name, QDict *event,
                        void *opaque)
{
    unsigned *count = opaque;

    if (!strcmp(name, "SNAPSHOT_DEVICE_MISMATCH")) {
        QDict *data = qdict_get_qdict(event, "data");

        g_assert_cmpint(qdict_get_int(data, "slot"), ==, 0);
        assert_counts(qdict_get_qdict(data, "mismatches"), 1, 0);
        assert_page(qdict_get_qdict(data, "mismatches"), 0, "m0", 0x5000,
                    0x678);
        ++*count;
    }
    return true;
}

/*
 * Catches: a mismatch that a restore leaves and nobody is told of, and a flood
 * of events.  Between the restore and its verification nothing can be planted
 * from here, but by one who does not wait.
 */
static void test_event(const void *machine)
{
    const size_t size = 8 * MiB;
    g_autofree char *path = NULL;
    int fd = g_file_open_tmp("snapshot-XXXXXX", &path, NULL);
    g_autofree char *args = g_strdup_printf(
        "-M %s,memory-backend=m0 -m 8 -object memory-backend-file,id=m0,"
        "size=8M,share=on,mem-path=%s", (const char *)machine, path);
    unsigned events = 0, mismatched, tries;
    Meddler meddler = { };
    SnapshotVM *vm;
    GThread *thread;
    QDict *info, *found, *page;
    uint8_t *ram;

    g_assert_cmpint(fd, >=, 0);
    g_assert_cmpint(ftruncate(fd, size), ==, 0);
    ram = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    g_assert_true(ram != MAP_FAILED);
    meddler.byte = ram + 0x5678;

    vm = snapshot_vm_start(",verify=on", "%s", args);
    qtest_qmp_set_event_callback(vm->qts, count_event, &events);
    snapshot_save(vm, 0);
    snapshot_restore(vm, 0);
    g_assert_cmpuint(query(vm, "mismatched"), ==, 0);

    thread = g_thread_new("meddler", meddle, &meddler);
    for (tries = 0; query(vm, "mismatched") < 5; tries++) {
        g_assert_cmpuint(tries, <, 1000);
        snapshot_restore(vm, 0);
    }
    qatomic_set(&meddler.stop, true);
    g_thread_join(thread);
    snapshot_restore(vm, 0);

    mismatched = query(vm, "mismatched");
    g_assert_cmpuint(mismatched, ==, 5);
    g_assert_cmpuint(events, ==, 1);
    qtest_clock_step(vm->qts, 1000 * 1000 * 1000);
    g_assert_cmpuint(query(vm, "verified"), ==, tries + 2);
    g_assert_cmpuint(events, ==, 2);
    qtest_clock_step(vm->qts, 1000 * 1000 * 1000);
    g_assert_cmpuint(query(vm, "mismatched"), ==, 5);
    g_assert_cmpuint(events, ==, 2);
    /* The guest is not told. */
    g_assert_cmphex(snapshot_readl(vm, SNAPSHOT_REG_STATUS), ==,
                    SNAPSHOT_STATUS_RESTORED);

    info = snapshot_query(vm);
    found = qdict_get_qdict(info, "mismatches");
    g_assert_cmpint(qdict_get_int(found, "pages"), ==, 5);
    g_assert_cmpint(qlist_size(qdict_get_qlist(found, "ram")), ==, 1);
    page = qobject_to(QDict, qlist_peek(qdict_get_qlist(found, "ram")));
    g_assert_cmpint(qdict_get_int(page, "count"), ==, 5);
    qobject_unref(info);

    snapshot_vm_end(vm);
    munmap(ram, size);
    close(fd);
    unlink(path);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    if (!qtest_has_device("snapshot")) {
        g_test_skip("there is no snapshot device");
        return g_test_run();
    }

    snapshot_add_tests("verify/ram", test_ram);
    snapshot_add_tests("verify/devices", test_devices);
    snapshot_add_tests("verify/subsection", test_subsection);
    snapshot_add_tests("verify/every", test_every);
    snapshot_add_tests("verify/refused", test_refused);
    snapshot_add_tests("verify/event", test_event);
    return g_test_run();
}
