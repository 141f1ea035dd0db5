/*
 * Tests of the snapshot device: all that a guest can see of the machine goes
 * back, from every slot, any number of times
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/units.h"
#include "snapshot-utils.h"

/* In pieces: qtest searches all that it has of a line for the line's end. */
static void write_ram(QTestState *qts, const uint8_t *ram, size_t from,
                      size_t to)
{
    const size_t piece = 64 * KiB;

    for (; from < to; from += piece) {
        qtest_bufwrite(qts, from, ram + from, piece);
    }
}

static void check_ram(QTestState *qts, const uint8_t *ram, size_t from,
                      size_t to)
{
    uint8_t piece[64 * KiB];

    for (; from < to; from += sizeof(piece)) {
        qtest_bufread(qts, from, piece, sizeof(piece));
        g_assert_cmpmem(piece, sizeof(piece), ram + from, sizeof(piece));
    }
}

/*
 * Catches: a byte of main memory that does not come back, whatever its content
 * was (holes in the image), where it lies, and how often it is restored.
 */
static void test_ram(const void *machine)
{
    const size_t size = 32 * MiB, low = 640 * KiB, high = 1 * MiB;
    SnapshotVM *vm = snapshot_vm_start("", "-M %s -m 32",
                                       (const char *)machine);
    g_autofree uint8_t *saved = g_malloc(size);
    g_autoptr(GRand) rand = g_rand_new_with_seed(20250101);
    size_t i;

    for (i = 0; i < size; i += 4) {
        /* A quarter is zero, in chunks of all sizes up to 256 KiB. */
        bool zero = !(i >> 20 & 3) && i >> (12 + (i >> 22) % 7) & 1;

        stl_he_p(saved + i, zero ? 0 : g_rand_int(rand));
    }
    write_ram(vm->qts, saved, 0, low);
    write_ram(vm->qts, saved, high, size);
    snapshot_save(vm, 0);

    for (i = 0; i < 3; i++) {
        qtest_memset(vm->qts, 0, i * 0x55, low);
        qtest_memset(vm->qts, high, i * 0x55, size - high);
        g_assert_cmphex(qtest_readl(vm->qts, size - 4), ==, i * 0x55555555);
        snapshot_restore(vm, 0);
        check_ram(vm->qts, saved, 0, low);
        check_ram(vm->qts, saved, high, size);
    }
    snapshot_vm_end(vm);
}

/* One readable and writable bit of device state */
typedef struct DeviceRegister {
    const char *name;
    const char *machine;                /* NULL: both */
    enum { PORT, INDEXED, MEMORY, IOAPIC, CONFIG } space;
    unsigned addr;                      /* CONFIG: devfn */
    unsigned index;                     /* INDEXED, IOAPIC, CONFIG */
    uint32_t saved, changed;
} DeviceRegister;

static const DeviceRegister device_registers[] = {
    { "CMOS", NULL, INDEXED, 0x70, 0x50, 0x5a, 0xa5 },
    { "RTC alarm", NULL, INDEXED, 0x70, 0x01, 0x12, 0x34 },
    { "PIC mask", NULL, PORT, 0x21, 0, 0xfb, 0xaa },
    { "slave PIC mask", NULL, PORT, 0xa1, 0, 0xfe, 0x55 },
    { "ELCR", NULL, PORT, 0x4d0, 0, 0x20, 0x40 },
    { "DMA page", NULL, PORT, 0x87, 0, 0x11, 0x22 },
    { "serial scratch", NULL, PORT, 0x3ff, 0, 0x11, 0x22 },
    { "serial line control", NULL, PORT, 0x3fb, 0, 0x03, 0x1b },
    { "VGA map mask", NULL, INDEXED, 0x3c4, 2, 0x0f, 0x03 },
    { "IDE sector count", "pc", PORT, 0x172, 0, 0x11, 0x22 },
    { "floppy motor", "pc", PORT, 0x3f2, 0, 0x1c, 0x0c },
    { "HPET configuration", NULL, MEMORY, 0xfed00010, 0, 2, 0 },
    { "HPET counter", NULL, MEMORY, 0xfed000f0, 0, 0x1234, 0x4321 },
    { "IOAPIC redirection", NULL, IOAPIC, 0xfec00000, 0x12, 0x10031, 0x10042 },
    { "PAM C0000", "pc", CONFIG, 0x00, 0x5a, 0x33, 0x11 },
    { "PAM C0000", "q35", CONFIG, 0x00, 0x91, 0x33, 0x11 },
    { "SMRAM", "pc", CONFIG, 0x00, 0x72, 0x0a, 0x4a },
    { "SMRAM", "q35", CONFIG, 0x00, 0x9d, 0x0a, 0x4a },
    { "PIRQ route", "pc", CONFIG, 0x08, 0x60, 0x0a, 0x0b },
    { "PIRQ route", "q35", CONFIG, 0xf8, 0x60, 0x0a, 0x0b },
    { "power management base", "pc", CONFIG, 0x0b, 0x41, 0xb0, 0xc0 },
    { "power management base", "q35", CONFIG, 0xf8, 0x41, 0xb0, 0xc0 },
};

static void set_register(SnapshotVM *vm, const DeviceRegister *r, uint32_t val)
{
    uint8_t devfn = r->addr;

    switch (r->space) {
    case INDEXED:
        qtest_outb(vm->qts, r->addr, r->index);
        qtest_outb(vm->qts, r->addr + 1, val);
        break;
    case PORT:
        qtest_outb(vm->qts, r->addr, val);
        break;
    case IOAPIC:
        qtest_writel(vm->qts, r->addr, r->index);
        qtest_writel(vm->qts, r->addr + 0x10, val);
        break;
    case MEMORY:
        qtest_writel(vm->qts, r->addr, val);
        break;
    case CONFIG:
        vm->pci->config_writeb(vm->pci, devfn, r->index, val);
        break;
    }
}

static uint32_t get_register(SnapshotVM *vm, const DeviceRegister *r)
{
    uint8_t devfn = r->addr;

    switch (r->space) {
    case INDEXED:
        qtest_outb(vm->qts, r->addr, r->index);
        return qtest_inb(vm->qts, r->addr + 1);
    case PORT:
        return qtest_inb(vm->qts, r->addr);
    case IOAPIC:
        qtest_writel(vm->qts, r->addr, r->index);
        return qtest_readl(vm->qts, r->addr + 0x10);
    case MEMORY:
        return qtest_readl(vm->qts, r->addr);
    case CONFIG:
        return vm->pci->config_readb(vm->pci, devfn, r->index);
    }
    g_assert_not_reached();
}

static void set_registers(SnapshotVM *vm, const char *machine, bool changed)
{
    unsigned i;

    for (i = 0; i < ARRAY_SIZE(device_registers); i++) {
        const DeviceRegister *r = &device_registers[i];

        if (!r->machine || !strcmp(r->machine, machine)) {
            set_register(vm, r, changed ? r->changed : r->saved);
        }
    }
}

static void check_registers(SnapshotVM *vm, const char *machine, bool changed)
{
    unsigned i;

    for (i = 0; i < ARRAY_SIZE(device_registers); i++) {
        const DeviceRegister *r = &device_registers[i];

        if (!r->machine || !strcmp(r->machine, machine)) {
            g_test_message("%s", r->name);
            g_assert_cmphex(get_register(vm, r), ==,
                            changed ? r->changed : r->saved);
        }
    }
}

/* Catches: a device whose state is not saved or not put back. */
static void test_devices(const void *machine)
{
    SnapshotVM *vm = snapshot_vm_start("", "-M %s -serial null",
                                       (const char *)machine);
    int i;

    set_registers(vm, machine, false);
    snapshot_save(vm, 0);
    check_registers(vm, machine, false);
    for (i = 0; i < 3; i++) {
        set_registers(vm, machine, true);
        check_registers(vm, machine, true);
        snapshot_restore(vm, 0);
        check_registers(vm, machine, false);
    }
    snapshot_vm_end(vm);
}

/*
 * Catches: RAM blocks other than main memory that are left out (video memory),
 * and memory regions that are not mapped as they were (ROM or RAM at 0xf0000).
 */
static void test_video_and_shadow_ram(const void *machine)
{
    const unsigned pam = !strcmp(machine, "pc") ? 0x59 : 0x90;
    const unsigned rom = 0x00, ram = 0x30;
    SnapshotVM *vm = snapshot_vm_start("", "-M %s -vga none "
                                       "-device VGA,addr=8,vgamem_mb=16",
                                       (const char *)machine);
    QPCIDevice *vga = qpci_device_find(vm->pci, QPCI_DEVFN(8, 0));
    uint8_t firmware[16], shadow[16], now[16];
    uint64_t size;
    QPCIBar bar;
    int i;

    bar = qpci_iomap(vga, 0, &size);
    g_assert_cmphex(size, ==, 16 * MiB);
    qpci_device_enable(vga);
    qtest_memread(vm->qts, 0xffff0, firmware, sizeof(firmware));
    g_assert_cmphex(firmware[0], ==, 0xea);             /* ljmp at reset */

    vm->pci->config_writeb(vm->pci, 0, pam, ram);
    for (i = 0; i < sizeof(shadow); i++) {
        shadow[i] = i ^ 0x80;
    }
    qtest_memwrite(vm->qts, 0xffff0, shadow, sizeof(shadow));
    snapshot_save(vm, 0);
    vm->pci->config_writeb(vm->pci, 0, pam, rom);
    snapshot_save(vm, 1);

    snapshot_round_trip(vm, bar.addr, size);
    qtest_memread(vm->qts, 0xffff0, now, sizeof(now));
    g_assert_cmpmem(now, sizeof(now), firmware, sizeof(firmware));

    snapshot_save(vm, 0);
    vm->pci->config_writeb(vm->pci, 0, pam, ram);
    qtest_memread(vm->qts, 0xffff0, now, sizeof(now));
    g_assert_cmpmem(now, sizeof(now), shadow, sizeof(shadow));
    snapshot_save(vm, 1);

    for (i = 0; i < 3; i++) {
        qtest_memset(vm->qts, 0xffff0, 0x11, sizeof(now));
        snapshot_restore(vm, 0);
        g_assert_cmphex(vm->pci->config_readb(vm->pci, 0, pam), ==, rom);
        qtest_memread(vm->qts, 0xffff0, now, sizeof(now));
        g_assert_cmpmem(now, sizeof(now), firmware, sizeof(firmware));
        snapshot_check(vm, bar.addr, size, 1);

        snapshot_restore(vm, 1);
        g_assert_cmphex(vm->pci->config_readb(vm->pci, 0, pam), ==, ram);
        qtest_memread(vm->qts, 0xffff0, now, sizeof(now));
        g_assert_cmpmem(now, sizeof(now), shadow, sizeof(shadow));
    }
    g_free(vga);
    snapshot_vm_end(vm);
}

/*
 * Catches: the root complex registers of ICH9 mapped twice (which aborts), or
 * left mapped or unmapped: the save knows them on or off, the restore finds
 * them off or on.
 */
static void test_root_complex(const void *machine)
{
    const unsigned devfn = QPCI_DEVFN(0x1f, 0), rcba = 0xf0;
    const uint32_t base = 0xfed1c000, d28ip = base + 0x310c;
    SnapshotVM *vm = snapshot_vm_start("", "-M %s", (const char *)machine);
    int saved, found;

    for (saved = 0; saved < 2; saved++) {
        vm->pci->config_writel(vm->pci, devfn, rcba, base | 1);
        qtest_writel(vm->qts, d28ip, 0x12345678);
        g_assert_cmphex(qtest_readl(vm->qts, d28ip), ==, 0x12345678);
        vm->pci->config_writel(vm->pci, devfn, rcba, base | saved);
        snapshot_save(vm, 0);
        for (found = 0; found < 2; found++) {
            vm->pci->config_writel(vm->pci, devfn, rcba, base | 1);
            qtest_writel(vm->qts, d28ip, 0x87654321);
            vm->pci->config_writel(vm->pci, devfn, rcba, base | found);
            snapshot_restore(vm, 0);
            g_assert_cmphex(vm->pci->config_readl(vm->pci, devfn, rcba), ==,
                            base | saved);
            g_assert_cmphex(qtest_readl(vm->qts, d28ip), ==,
                            saved ? 0x12345678 : 0);
            vm->pci->config_writel(vm->pci, devfn, rcba, base | 1);
            g_assert_cmphex(qtest_readl(vm->qts, d28ip), ==, 0x12345678);
        }
    }
    snapshot_vm_end(vm);
}

static void serial_loop_back(QTestState *qts, uint8_t byte)
{
    qtest_outb(qts, 0x3fc, 0x10);               /* MCR: loop */
    qtest_outb(qts, 0x3f8, byte);
}

/*
 * Catches: state that is in the stream only if there is something to say
 * (here the serial port's receive FIFO) and that survives a restore to a time
 * when there was nothing.
 */
static void test_absent_subsection(const void *machine)
{
    SnapshotVM *vm = snapshot_vm_start("", "-M %s -serial null",
                                       (const char *)machine);
    QTestState *qts = vm->qts;
    int i;

    qtest_outb(qts, 0x3fa, 0x07);               /* FCR: empty, use FIFOs */
    snapshot_save(vm, 0);
    for (i = 0; i < 3; i++) {
        serial_loop_back(qts, 'A');
        serial_loop_back(qts, 'B');
        g_assert_cmphex(qtest_inb(qts, 0x3fd) & 1, ==, 1);
        snapshot_restore(vm, 0);
        g_assert_cmphex(qtest_inb(qts, 0x3fd) & 1, ==, 0);
        serial_loop_back(qts, 'X');
        g_assert_cmphex(qtest_inb(qts, 0x3f8), ==, 'X');
        g_assert_cmphex(qtest_inb(qts, 0x3fd) & 1, ==, 0);
    }
    snapshot_vm_end(vm);
}

/* Catches: what reset loads into RAM written over what was saved. */
static void test_reset_of_rom(const void *machine)
{
    SnapshotVM *vm = snapshot_vm_start("", "-M %s -device loader,"
                                       "addr=0x200000,data=0x1122334455667788,"
                                       "data-len=8", (const char *)machine);
    int i;

    g_assert_cmphex(qtest_readq(vm->qts, 0x200000), ==, 0x1122334455667788);
    qtest_writeq(vm->qts, 0x200000, 42);
    snapshot_save(vm, 0);
    for (i = 0; i < 3; i++) {
        qtest_writeq(vm->qts, 0x200000, 43);
        snapshot_restore(vm, 0);
        g_assert_cmphex(qtest_readq(vm->qts, 0x200000), ==, 42);
    }
    qtest_system_reset(vm->qts);
    g_assert_cmphex(qtest_readq(vm->qts, 0x200000), ==, 0x1122334455667788);
    snapshot_vm_end(vm);
}

static uint8_t cmos_read(QTestState *qts, uint8_t reg)
{
    qtest_outb(qts, 0x70, reg);
    return qtest_inb(qts, 0x71);
}

static void cmos_write(QTestState *qts, uint8_t reg, uint8_t val)
{
    qtest_outb(qts, 0x70, reg);
    qtest_outb(qts, 0x71, val);
}

static void pit_quell(QTestState *qts)
{
    /* The first word of the PIC's initialisation clears its requests. */
    qtest_outb(qts, 0x20, 0x11);
    qtest_outb(qts, 0x21, 0x08);
    qtest_outb(qts, 0x21, 0x04);
    qtest_outb(qts, 0x21, 0x01);
}

static void pit_arm(QTestState *qts)
{
    qtest_outb(qts, 0x43, 0x30);        /* counter 0, mode 0: once */
    qtest_outb(qts, 0x40, 0x00);
    qtest_outb(qts, 0x40, 0x20);
    pit_quell(qts);
}

static bool pit_fired(QTestState *qts)
{
    return qtest_inb(qts, 0x20) & 1;
}

static void hpet_arm(QTestState *qts)
{
    qtest_writel(qts, 0xfed00010, 0);
    qtest_writel(qts, 0xfed000f0, 0);
    qtest_writel(qts, 0xfed00100, 1 << 8 | 1 << 2 | 1 << 1);
    qtest_writel(qts, 0xfed00108, 500000);      /* of 10 ns */
    qtest_writel(qts, 0xfed00010, 1);
}

static bool hpet_fired(QTestState *qts)
{
    return qtest_readl(qts, 0xfed00020) & 1;
}

static void hpet_quell(QTestState *qts)
{
    qtest_writel(qts, 0xfed00100, 0);
    qtest_writel(qts, 0xfed00010, 0);
    qtest_writel(qts, 0xfed00020, 1);
}

static void rtc_arm(QTestState *qts)
{
    cmos_write(qts, 0x0a, 0x28);                /* 256 Hz */
    cmos_write(qts, 0x0b, 0x42);
    cmos_read(qts, 0x0c);
}

static bool rtc_fired(QTestState *qts)
{
    return cmos_read(qts, 0x0c) & 0x40;
}

static void rtc_quell(QTestState *qts)
{
    cmos_write(qts, 0x0b, 0x02);
    cmos_read(qts, 0x0c);
}

static const struct {
    const char *name;
    void (*arm)(QTestState *qts);
    bool (*fired)(QTestState *qts);
    void (*quell)(QTestState *qts);
} timers[] = {
    { "PIT", pit_arm, pit_fired, pit_quell },
    { "HPET", hpet_arm, hpet_fired, hpet_quell },
    { "RTC", rtc_arm, rtc_fired, rtc_quell },
};

/*
 * Catches: a timer pending at the save that is not armed again by a restore.
 *
 * qtest's clock does not go back, so that a timer may be late already and fire
 * at once; that time goes back is for tests with a CPU.
 */
static void test_timers(const void *machine)
{
    const int64_t delay = 10 * 1000 * 1000;
    SnapshotVM *vm = snapshot_vm_start("", "-M %s -rtc clock=vm",
                                       (const char *)machine);
    QTestState *qts = vm->qts;
    int i, round;

    for (i = 0; i < ARRAY_SIZE(timers); i++) {
        g_test_message("%s", timers[i].name);
        timers[i].arm(qts);
        g_assert_false(timers[i].fired(qts));
        snapshot_save(vm, 0);
        for (round = 0; round < 4; round++) {
            qtest_clock_step(qts, delay);
            g_assert_true(timers[i].fired(qts));
            timers[i].quell(qts);
            qtest_clock_step(qts, delay);
            g_assert_false(timers[i].fired(qts));
            snapshot_restore(vm, 0);
        }
        timers[i].quell(qts);
    }
    snapshot_vm_end(vm);
}

static void set_slot_content(SnapshotVM *vm, unsigned n)
{
    snapshot_fill(vm, 4 * MiB, 1 * MiB, n);
    cmos_write(vm->qts, 0x50, n);
}

static void check_slot_content(SnapshotVM *vm, unsigned n)
{
    snapshot_check(vm, 4 * MiB, 1 * MiB, n);
    g_assert_cmphex(cmos_read(vm->qts, 0x50), ==, n);
}

/* Catches: slots that share anything, and an order in which they matter. */
static void test_slots(const void *machine)
{
    SnapshotVM *vm = snapshot_vm_start(",slots=64", "-M %s -m 16",
                                       (const char *)machine);
    unsigned i, slot, round;

    for (i = 0; i < 64; i++) {
        set_slot_content(vm, i);
        snapshot_save(vm, i);
    }
    for (round = 0; round < 2; round++) {
        for (i = 0; i < 64; i++) {
            slot = (i * 37 + 11) % 64;
            snapshot_restore(vm, slot);
            check_slot_content(vm, slot);
        }
    }

    /* A third anew, a third gone */
    for (i = 0; i < 64; i++) {
        if (i % 3 == 1) {
            set_slot_content(vm, 100 + i);
            snapshot_save(vm, i);
        } else if (i % 3 == 2) {
            snapshot_discard(vm, i);
        }
    }
    for (i = 0; i < 64; i++) {
        slot = (i * 23 + 5) % 64;
        if (slot % 3 == 2) {
            g_assert_cmphex(snapshot_command(vm, SNAPSHOT_CMD_RESTORE, slot),
                            ==, SNAPSHOT_STATUS_ERROR | SNAPSHOT_E_EMPTY);
        } else {
            snapshot_restore(vm, slot);
            check_slot_content(vm, slot % 3 ? 100 + slot : slot);
            g_assert_cmpuint(snapshot_readq(vm, SNAPSHOT_REG_RESTORES), ==,
                             slot % 3 ? 1 : 3);
        }
    }
    snapshot_vm_end(vm);
}

static uint64_t file_usage(const char *path)
{
    struct stat st;

    g_assert_cmpint(stat(path, &st), ==, 0);
    return st.st_blocks * 512;
}

/*
 * Catches: RAM that lies on an image which is discarded, replaced or written
 * over; memory of an image that is not given back.
 */
static void test_discard(const void *machine)
{
    const uint64_t base = 1 * MiB, size = 15 * MiB;
    g_autofree uint8_t *zeroes = g_malloc0(base + size);
    g_autofree char *dir = g_dir_make_tmp("snapshot-XXXXXX", NULL);
    g_autofree char *path = g_strdup_printf("%s/ram", dir);
    g_autofree char *properties = g_strdup_printf(",file=%s", path);
    SnapshotVM *vm = snapshot_vm_start(properties, "-M %s -m 16",
                                       (const char *)machine);
    uint64_t one;
    unsigned i;

    snapshot_fill(vm, base, size, 1);
    snapshot_save(vm, 1);
    one = file_usage(path);
    /* A page in each 256 KiB is not zero. */
    g_assert_cmpuint(one, >=, size / 64);
    snapshot_fill(vm, base, size, 2);
    snapshot_save(vm, 2);

    snapshot_restore(vm, 1);
    snapshot_discard(vm, 1);
    snapshot_check(vm, base, size, 1);
    /* It would take the place of the first, were that not in use. */
    snapshot_fill(vm, base, size / 2, 3);
    snapshot_save(vm, 3);
    snapshot_check(vm, base, size / 2, 3);
    snapshot_check(vm, base + size / 2, size / 2, 1);

    snapshot_restore(vm, 2);
    snapshot_check(vm, base, size, 2);
    g_assert_cmpuint(file_usage(path), <, 3 * one);
    snapshot_restore(vm, 3);
    snapshot_check(vm, base, size / 2, 3);
    snapshot_check(vm, base + size / 2, size / 2, 1);
    snapshot_discard(vm, 2);

    /* A loop of saves and restores in one slot is what a fuzzer may do. */
    for (i = 4; i < 20; i++) {
        snapshot_fill(vm, base, size, i);
        snapshot_save(vm, 3);
        snapshot_fill(vm, base, size, i + 1);
        snapshot_restore(vm, 3);
        snapshot_check(vm, base, size, i);
        g_assert_cmpuint(file_usage(path), <, 3 * one);
    }

    snapshot_discard(vm, 3);
    snapshot_save(vm, 0);
    snapshot_restore(vm, 0);
    snapshot_discard(vm, 0);
    g_assert_cmpuint(file_usage(path), <, 2 * one);
    snapshot_check(vm, base, size, i - 1);

    /* Zeroes, which are not written, where another image was */
    snapshot_save(vm, 1);
    snapshot_save(vm, 2);
    snapshot_discard(vm, 1);
    qtest_memset(vm->qts, base, 0, size);
    snapshot_save(vm, 1);
    snapshot_fill(vm, base, size, 1);
    snapshot_restore(vm, 1);
    check_ram(vm->qts, zeroes, base, base + size);

    snapshot_vm_end(vm);
    g_assert_cmpint(access(path, F_OK), !=, 0);
    g_assert_cmpint(rmdir(dir), ==, 0);
}

static char *read_proc(SnapshotVM *vm, const char *name)
{
    g_autofree char *path = g_strdup_printf("/proc/%d/%s", qtest_pid(vm->qts),
                                            name);
    char *text;

    g_assert_true(g_file_get_contents(path, &text, NULL, NULL));
    return text;
}

static int count_mappings(SnapshotVM *vm)
{
    g_autofree char *text = read_proc(vm, "maps");
    int n = 0;
    char *c;

    for (c = text; *c; c++) {
        n += *c == '\n';
    }
    return n;
}

static int count_files(SnapshotVM *vm)
{
    g_autofree char *path = g_strdup_printf("/proc/%d/fd", qtest_pid(vm->qts));
    g_autoptr(GDir) dir = g_dir_open(path, 0, NULL);
    int n = 0;

    g_assert_nonnull(dir);
    while (g_dir_read_name(dir)) {
        n++;
    }
    return n;
}

/*
 * Catches: memory, mappings or files lost with each restore, and state that
 * wears out.
 */
static void test_soak(const void *machine)
{
    enum { WARM_UP = 1000, RESTORES = 9000 };
    SnapshotVM *vm = snapshot_vm_start("", "-M %s", (const char *)machine);
    int64_t before = 0, growth;
    int mappings = 0, files = 0, i;

    set_registers(vm, machine, false);
    snapshot_fill(vm, 1 * MiB, 127 * MiB, 1);
    snapshot_save(vm, 0);
    snapshot_fill(vm, 1 * MiB, 127 * MiB, 2);
    for (i = 0; i < WARM_UP + RESTORES; i++) {
        if (i == WARM_UP) {
            mappings = count_mappings(vm);
            files = count_files(vm);
            before = snapshot_resident_at_last(vm);
        }
        qtest_writeq(vm->qts, 1 * MiB + i % 1000 * 0x2000, i);
        set_register(vm, &device_registers[i % 10], i);
        snapshot_restore(vm, 0);
    }
    growth = (snapshot_resident_at_last(vm) - before) / KiB;
    g_test_message("%d restores: %" PRId64 " KiB more", RESTORES, growth);
    g_assert_cmpint(growth, <, 2048);
    g_assert_cmpint(count_mappings(vm), <, mappings + 100);
    g_assert_cmpint(count_files(vm), ==, files);
    g_assert_cmpuint(snapshot_readq(vm, SNAPSHOT_REG_RESTORES), ==,
                     WARM_UP + RESTORES);
    snapshot_check(vm, 1 * MiB, 127 * MiB, 1);
    check_registers(vm, machine, false);
    snapshot_vm_end(vm);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    if (!qtest_has_device("snapshot")) {
        g_test_skip("there is no snapshot device");
        return g_test_run();
    }

    snapshot_add_tests("ram", test_ram);
    snapshot_add_tests("devices", test_devices);
    snapshot_add_tests("video-and-shadow-ram", test_video_and_shadow_ram);
    snapshot_add_test("q35", "remap", "root-complex", test_root_complex);
    snapshot_add_test("q35", "dirty", "root-complex", test_root_complex);
    snapshot_add_tests("absent-subsection", test_absent_subsection);
    snapshot_add_tests("reset-of-rom", test_reset_of_rom);
    snapshot_add_tests("timers", test_timers);
    snapshot_add_tests("slots", test_slots);
    snapshot_add_tests("discard", test_discard);
    snapshot_add_tests("soak", test_soak);
    return g_test_run();
}
