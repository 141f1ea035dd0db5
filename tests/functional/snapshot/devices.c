/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Snapshot test guest: the state of devices
 */

#include "guest.h"

/* ---------------------------------------------- registers of many devices */

static uint32_t cmos_get(uint32_t index)
{
    outb(0x70, index);
    return inb(0x71);
}

static void cmos_set(uint32_t index, uint32_t v)
{
    outb(0x70, index);
    outb(0x71, v);
}

static uint32_t port_get(uint32_t port)
{
    return inb(port);
}

static void port_set(uint32_t port, uint32_t v)
{
    outb(port, v);
}

static uint32_t pci_get(uint32_t where)
{
    return pci_read(snapshot_devfn, where);
}

static void pci_set(uint32_t where, uint32_t v)
{
    pci_write(snapshot_devfn, where, v);
}

#define IOAPIC          0xfec00000u

static uint32_t ioapic_get(uint32_t index)
{
    mmio_write(IOAPIC, index);
    return mmio_read(IOAPIC + 0x10);
}

static void ioapic_set(uint32_t index, uint32_t v)
{
    mmio_write(IOAPIC, index);
    mmio_write(IOAPIC + 0x10, v);
}

static uint32_t mmio_get(uint32_t addr)
{
    return mmio_read(addr);
}

static void mmio_set(uint32_t addr, uint32_t v)
{
    mmio_write(addr, v);
}

static uint32_t keyboard_get(uint32_t command)
{
    outb(0x64, command);
    while (!(inb(0x64) & 1)) {
        cpu_pause();
    }
    return inb(0x60);
}

static void keyboard_set(uint32_t command, uint32_t v)
{
    outb(0x64, command | 0x40);
    outb(0x60, v);
}

static const struct {
    const char *name;
    uint32_t (*get)(uint32_t where);
    void (*set)(uint32_t where, uint32_t v);
    uint32_t where, flip;
} registers[] = {
    { "CMOS RAM", cmos_get, cmos_set, 0x50, 0xff },
    { "RTC alarm", cmos_get, cmos_set, 0x01, 0x15 },
    { "RTC register B", cmos_get, cmos_set, 0x0b, 0x20 },
    { "PIC mask", port_get, port_set, 0x21, 0x28 },
    { "second PIC's mask", port_get, port_set, 0xa1, 0x28 },
    { "serial scratch", port_get, port_set, 0x3ff, 0xff },
    { "serial LCR", port_get, port_set, 0x3fb, 0x1f },
    { "serial MCR", port_get, port_set, 0x3fc, 0x10 },
    { "serial IER", port_get, port_set, 0x3f9, 0x05 },
    { "DMA page", port_get, port_set, 0x83, 0xff },
    { "keyboard mode", keyboard_get, keyboard_set, 0x20, 0x10 },
    { "PCI cache line", pci_get, pci_set, 0x0c, 0x10 },
    { "PCI bus master", pci_get, pci_set, 0x04, 0x04 },
    { "PCI interrupt line", pci_get, pci_set, 0x3c, 0x0f },
    { "IOAPIC entry", ioapic_get, ioapic_set, 0x10 + 2 * 9, 0x55 },
    { "APIC TPR", mmio_get, mmio_set, APIC_BASE + APIC_TPR, 0x20 },
    { "APIC LDR", mmio_get, mmio_set, APIC_BASE + APIC_LDR, 0x0f000000 },
    { "APIC error LVT", mmio_get, mmio_set, APIC_BASE + 0x370, 0x33 },
    { "APIC timer divider", mmio_get, mmio_set, APIC_BASE + APIC_TIMER_DIV,
      0x03 },
    { "HPET comparator", mmio_get, mmio_set, 0xfed00128, 0x123456 },
};

/*
 * Catches a device that is not saved or not loaded: a register of each, with
 * its bits as they were at the save and flipped at the restore.
 */
CASE(registers)
{
    uint32_t before[ARRAY_SIZE(registers)];

    for (unsigned flavour = 0; flavour < 2; flavour++) {
        for (unsigned i = 0; i < ARRAY_SIZE(registers); i++) {
            before[i] = registers[i].get(registers[i].where);
        }

        unsigned pass = snapshot_save();

        for (unsigned i = 0; i < ARRAY_SIZE(registers); i++) {
            uint32_t v = registers[i].get(registers[i].where);

            check(v == before[i], "%s is %x, not %x, in pass %u",
                  registers[i].name, v, before[i], pass);
            registers[i].set(registers[i].where, v ^ registers[i].flip);
            check(registers[i].get(registers[i].where) ==
                  (v ^ registers[i].flip),
                  "%s keeps %x, not %x", registers[i].name,
                  registers[i].get(registers[i].where),
                  v ^ registers[i].flip);
        }
        if (pass < repeats(20)) {
            snapshot_restore();
        }
    }
}

/* -------------------------------------------------- queues in devices */

#define UART            0x3f8

static unsigned uart_drain(uint8_t first)
{
    unsigned n;

    for (n = 0; inb(UART + 5) & 1; n++) {
        check_equal("byte in the FIFO", inb(UART), first + n);
    }
    return n;
}

/* Between two looks at a device that waits for QEMU's main loop to lock it */
static void leave_main_loop_alone(void)
{
    for (unsigned i = 0; i < 100; i++) {
        cpu_pause();
    }
}

/* Loops @n bytes back to the FIFO, which holds what arrived before as well. */
static void uart_fill(uint8_t first, unsigned n)
{
    while (n--) {
        outb(UART, first++);
        while (!(inb(UART + 5) & 0x20)) {
            leave_main_loop_alone();
        }
    }
}

#define KEYBOARD_REPLY  3               /* bytes: ACK and two of identity */

static unsigned keyboard_drain(void)
{
    unsigned n;

    for (n = 0; inb(0x64) & 1; n++) {
        inb(0x60);
    }
    return n;
}

static void keyboard_ask(void)
{
    outb(0x60, 0xf2);                   /* identify */
    while (!(inb(0x64) & 1)) {
        cpu_pause();
    }
}

/*
 * Catches a queue whose section is absent from the snapshot when it is empty,
 * and so keeps what came after the save; and one that is not put back.
 */
CASE(queues)
{
    outb(UART + 3, 3);                  /* 8n1 */
    outb(UART + 2, 7);                  /* FIFO on, cleared */
    outb(UART + 4, 0x10);               /* loop back */
    uart_drain(0);
    keyboard_drain();
    for (unsigned n = 0; n <= 6; n += 3) {      /* bytes at the save */
        uart_fill(0x40, n);
        if (n) {
            keyboard_ask();
        }

        unsigned pass = snapshot_save();

        if (pass != 1) {                /* in pass 1: restore over full */
            uart_fill(0x40 + n, 1);     /* or old bytes may hide */
            check_equal("bytes in the FIFO", uart_drain(0x40), n + 1);
            check_equal("bytes from the keyboard", keyboard_drain(),
                        n ? KEYBOARD_REPLY : 0);
        }
        if (pass & 1) {
            uart_fill(0x80 + pass, 4);
            keyboard_ask();
        }
        if (pass < repeats(20)) {
            snapshot_restore();
        }
        outb(UART + 2, 7);
        keyboard_drain();
    }
}

/*
 * Catches a BAR that comes back in configuration space but not in the memory
 * map, or the other way about. The device itself is moved.
 */
CASE(bar)
{
    uintptr_t home = snapshot_bar;
    unsigned pass = snapshot_save();

    check_equal("BAR0", pci_read(snapshot_devfn, 0x10) & ~0xfu, home);
    check_equal("SLOTS", snapshot_read(SNAPSHOT_REG_SLOTS), 8);
    snapshot_bar = 0xe0000000 + pass % 16 * SNAPSHOT_BAR_SIZE;
    pci_write(snapshot_devfn, 0x10, snapshot_bar);
    check_equal("SLOTS", snapshot_read(SNAPSHOT_REG_SLOTS), 8);
    check(mmio_read(home + SNAPSHOT_REG_SLOTS) != 8, "BAR0 is at two places");
    if (pass < repeats(50)) {
        snapshot_restore();
    }
}

/*
 * Catches a snapshot that a reset of the machine destroys, or that does not
 * restore across it. The machine boots again; only then does the first command
 * succeed.
 */
CASE(reset)
{
    shared32 *stray = (uint32_t *)0x800000;
    unsigned pass;

    check_equal("SLOT", snapshot_read(SNAPSHOT_REG_SLOT), 0);
    snapshot_write(SNAPSHOT_REG_COMMAND, SNAPSHOT_CMD_RESTORE);
    check_equal("STATUS", snapshot_read(SNAPSHOT_REG_STATUS),
                SNAPSHOT_STATUS_ERROR | SNAPSHOT_E_EMPTY);
    *stray = 0x1234;
    write_db0(0x1234);
    snapshot_select(1);
    snapshot_select(0);
    pass = snapshot_save();
    check_equal("RAM", *stray, 0x1234);
    check_equal("db0", read_db0(), 0x1234);
    if (pass < 3) {
        *stray = 0;
        snapshot_select(5);
        say("RESET\n");
        outb(0xcf9, 2);
        outb(0xcf9, 6);
        for (;;) {
            cpu_pause();
        }
    }
}

#define IDE             0x170           /* the pc's second channel */

static void ide_wait(uint8_t mask, uint8_t want)
{
    while ((inb(IDE + 7) & mask) != want) {
        cpu_pause();
    }
}

/*
 * Catches a transfer that is under way at the save or at the restore: a part of
 * a CD-ROM drive's IDENTIFY PACKET DEVICE has been read, not its model. Its
 * state is in sections that are absent when the drive is idle.
 */
CASE(ide)
{
    uint16_t reference[256], v;
    unsigned pass;

    outb(IDE + 6, 0xa0);
    for (unsigned round = 0; round < 2; round++) {
        outb(IDE + 7, 0xa1);
        ide_wait(0x88, 0x08);
        for (unsigned i = 0; i < 256; i++) {
            reference[i] = inw(IDE);
        }
        ide_wait(0x88, 0);
    }

    outb(IDE + 7, 0xa1);
    ide_wait(0x88, 0x08);
    for (unsigned i = 0; i < 20; i++) {
        v = inw(IDE);
        check_equal("word of the drive's identity", v, reference[i]);
    }
    pass = snapshot_save();             /* busy; idle or busy at restore */
    for (unsigned i = 20; i < (pass & 1 ? 256 : 40); i++) {
        v = inw(IDE);
        check_equal("word of the drive's identity", v, reference[i]);
    }
    if (pass < repeats(20)) {
        snapshot_restore();
    }

    for (unsigned i = 40; i < 256; i++) {
        inw(IDE);
    }
    ide_wait(0x88, 0);
    pass = snapshot_save();             /* idle; busy at restore */
    check_equal("drive's status", inb(IDE + 7) & 0x88, 0);
    outb(IDE + 7, 0xa1);
    ide_wait(0x88, 0x08);
    for (unsigned i = 0; i < 50; i++) {
        v = inw(IDE);
        check_equal("word of the drive's identity", v, reference[i]);
    }
    if (pass < repeats(20)) {
        snapshot_restore();
    }
}

/* ---------------------------------------------- the device's own registers */

static void write_sized(uintptr_t addr, unsigned size, const uint32_t *v)
{
    switch (size) {
    case 1:
        asm volatile("movb %b0, (%1)" : : "q"(*v), "r"(addr) : "memory");
        break;
    case 2:
        asm volatile("movw %w0, (%1)" : : "r"(*v), "r"(addr) : "memory");
        break;
    case 4:
        asm volatile("movl %0, (%1)" : : "r"(*v), "r"(addr) : "memory");
        break;
    case 8:
        /* KVM's emulation of accesses to devices lacks the one from XMM */
        asm volatile("movq (%0), %%mm0; movq %%mm0, (%1); emms"
                     : : "r"(v), "r"(addr) : "memory");
        break;
    case 16:
        asm volatile("movups (%0), %%xmm0; movups %%xmm0, (%1)"
                     : : "r"(v), "r"(addr) : "memory");
        break;
    }
}

/*
 * Catches accesses that make QEMU fall over, and registers that are not the
 * documented ones: stores of every width at every alignment, of values that
 * are no commands, and loads of what is not listed.
 */
CASE(robust)
{
    const uint32_t values[2][4] = {
        { 0, 0, 0, 0 }, { ~0u, ~0u, ~0u, ~0u },
    };
    const unsigned slots = snapshot_read(SNAPSHOT_REG_SLOTS);
    const uint32_t features = snapshot_read(SNAPSHOT_REG_FEATURES);

    write_cr0(read_cr0() & ~(CR0_EM | CR0_TS));
    write_cr4(read_cr4() | CR4_OSFXSR);
    for (unsigned v = 0; v < 2; v++) {
        for (unsigned size = 1; size <= 16; size *= 2) {
            for (unsigned at = 0; at < 0x100; at++) {
                write_sized(snapshot_bar + at, size, values[v]);
            }
            write_sized(snapshot_bar + SNAPSHOT_BAR_SIZE - size, size,
                        values[v]);
        }
    }
    check_equal("SLOTS", snapshot_read(SNAPSHOT_REG_SLOTS), slots);
    check_equal("FEATURES", snapshot_read(SNAPSHOT_REG_FEATURES), features);
    check_equal("RESTORES", snapshot_read64(SNAPSHOT_REG_RESTORES), 0);
    check_equal("PAGES", snapshot_read64(SNAPSHOT_REG_PAGES), 0);
    check_equal("NANOSECONDS", snapshot_read64(SNAPSHOT_REG_NANOSECONDS), 0);
    for (unsigned at = 0x30; at < SNAPSHOT_BAR_SIZE;
         at += at < 0x1000 ? 4 : 0xffc) {
        bool writable = at == SNAPSHOT_REG_RESULT || at == SNAPSHOT_REG_REGION;

        check(snapshot_read(at) == (writable ? ~0u : 0), "register %x is %x",
              at, snapshot_read(at));
    }
    write_sized(snapshot_bar + SNAPSHOT_REG_ARGUMENT, 8,
                (const uint32_t[]) { 0x89abcdef, 0x01234567 });
    check_equal("ARGUMENT", snapshot_read64(SNAPSHOT_REG_ARGUMENT),
                0x0123456789abcdef);
    snapshot_write(SNAPSHOT_REG_ARGUMENT + 4, 0);
    check_equal("ARGUMENT", snapshot_read64(SNAPSHOT_REG_ARGUMENT),
                0x89abcdef);
    snapshot_select(slots - 1);
    if (snapshot_save() < 3) {
        snapshot_restore();
    }
}
