/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Snapshot test guest: more than one CPU
 */

#include "guest.h"

#define WAKE_VECTOR     0x50

/* A line each, so that no CPU waits for another's */
static struct {
    shared32 count;
    uint32_t pad[15];
} chain[MAX_CPUS] __attribute__((aligned(64)));

/* No counts: waits until @cpu has counted @by more. */
static void wait_for_progress(unsigned cpu, uint32_t by)
{
    uint32_t from = chain[cpu].count;

    while (chain[cpu].count - from < by) {
        cpu_pause();
    }
}

/*
 * Counts in memory, in a general register and in a vector register; the three
 * are equal in each round or something was torn.
 */
static void count_chain(unsigned cpu)
{
    uint32_t memory, reg, vector;

    write_cr0(read_cr0() & ~(CR0_EM | CR0_TS));
    write_cr4(read_cr4() | CR4_OSFXSR);
    asm volatile("pxor %%xmm0, %%xmm0\n"
                 "mov $1, %%eax\n"
                 "movd %%eax, %%xmm1\n"
                 "xor %[reg], %[reg]\n"
                 "1: incl %[count]\n"
                 "inc %[reg]\n"
                 "paddd %%xmm1, %%xmm0\n"
                 "movd %%xmm0, %[vector]\n"
                 "mov %[count], %[memory]\n"
                 "cmp %[reg], %[memory]\n"
                 "jne 2f\n"
                 "cmp %[reg], %[vector]\n"
                 "je 1b\n"
                 "2:\n"
                 : [count] "+m"(chain[cpu].count), [reg] "=&r"(reg),
                   [memory] "=&r"(memory), [vector] "=&r"(vector)
                 : : "eax", "cc");
    fail("CPU %u counts %u in memory, %u and %u in registers",
         cpu, memory, reg, vector);
}

/*
 * Catches a CPU whose registers and memory are of different moments, one that
 * runs between the restore of the two, and one that is not put back at all.
 */
CASE(smp)
{
    unsigned cpus = cpu_count(), n = repeats(option("n", 1000));
    uint32_t saved[MAX_CPUS] = { 0 };

    for (unsigned cpu = 1; cpu < cpus; cpu++) {
        ap_start(cpu, count_chain);
    }
    for (unsigned cpu = 1; cpu < cpus; cpu++) {
        wait_for_progress(cpu, 1000);
        saved[cpu] = chain[cpu].count;
    }
    /*
     * carried: low half, CPU 1's count at the restore; high half, how often
     * it was less than that afterwards
     */
    snapshot_write(SNAPSHOT_REG_ARGUMENT + 4, 0);

    unsigned pass = snapshot_save();

    if (pass && chain[1].count - saved[1] < carried() - saved[1]) {
        snapshot_write(SNAPSHOT_REG_ARGUMENT + 4,
                       snapshot_read(SNAPSHOT_REG_ARGUMENT + 4) + 1);
    }
    for (unsigned cpu = 1; cpu < cpus; cpu++) {
        check(chain[cpu].count >= saved[cpu], "CPU %u at %u, saved after %u",
              cpu, chain[cpu].count, saved[cpu]);
        wait_for_progress(cpu, pass % 8 ? 100 : 100000);
    }
    if (pass < n) {
        carry(chain[1].count);
        snapshot_restore();
    }
    /* A busy host may let CPU 1 get ahead of CPU 0, but not as a rule. */
    check(snapshot_read(SNAPSHOT_REG_ARGUMENT + 4) > n / 10,
          "CPU 1 went back in %u of %u restores",
          snapshot_read(SNAPSHOT_REG_ARGUMENT + 4), n);
}

/* What the TSC of the last CPU shows; odd while it is being written */
static struct {
    shared32 sequence, low, high;
} stamp;

static uint64_t rdtsc_in_order(void)
{
    asm volatile("lfence" : : : "memory");
    return rdtsc();
}

static void stamp_time(unsigned cpu)
{
    (void)cpu;
    for (;;) {
        uint64_t now = rdtsc_in_order();

        stamp.sequence++;
        stamp.low = now;
        stamp.high = now >> 32;
        stamp.sequence++;
    }
}

/* A stamp made between call and return */
static uint64_t new_stamp(void)
{
    uint32_t sequence = stamp.sequence;
    uint64_t v;

    while (stamp.sequence - sequence < 4) {
        cpu_pause();
    }
    do {
        sequence = stamp.sequence & ~1u;
        v = stamp.low | (uint64_t)stamp.high << 32;
    } while (stamp.sequence != sequence);
    return v;
}

/* Catches TSCs that were in step at the save and are not after a restore. */
CASE(smp_clocks)
{
    ap_start(cpu_count() - 1, stamp_time);

    unsigned pass = snapshot_save();

    for (unsigned i = 0; i < 1000; i++) {
        uint64_t before = rdtsc_in_order(), other = new_stamp();
        uint64_t after = rdtsc_in_order();

        check(before <= other && other <= after,
              "%llx on the other CPU, between %llx and %llx on this, pass %u",
              other, before, after, pass);
    }
    if (pass < repeats(100)) {
        snapshot_restore();
    }
}

static shared32 woken;

static void wake(struct frame *frame)
{
    (void)frame;
    woken++;
    apic_write(APIC_EOI, 0);
}

static void halt_then_count(unsigned cpu)
{
    while (!woken) {
        asm volatile("sti; hlt");
    }
    for (;;) {
        chain[cpu].count++;
    }
}

/*
 * Catches a CPU that is halted at the save and runs after the restore, or does
 * not wake any more.
 */
CASE(smp_halted)
{
    unsigned last = cpu_count() - 1;

    irq_handle(WAKE_VECTOR, wake);
    ap_start(last, halt_then_count);
    delay_us(2000);                     /* it has halted by then */

    unsigned pass = snapshot_save();

    delay_us(pass & 1 ? 300 : 0);
    check_equal("woken", woken, 0);
    check_equal("count", chain[last].count, 0);
    apic_send(last, ICR_FIXED | WAKE_VECTOR);
    while (!woken) {
        cpu_pause();
    }
    wait_for_progress(last, 10);
    check_equal("woken", woken, 1);
    if (pass < repeats(500)) {
        snapshot_restore();
    }
}

static void halt_for_good(struct frame *frame)
{
    (void)frame;
    woken++;
    for (;;) {
        asm volatile("cli; hlt");
    }
}

static void count_with_interrupts(unsigned cpu)
{
    asm volatile("sti");
    for (;;) {
        chain[cpu].count++;
    }
}

/* Catches a CPU that runs at the save, is halted later and does not run on. */
CASE(smp_running)
{
    unsigned last = cpu_count() - 1;

    irq_handle(WAKE_VECTOR, halt_for_good);
    ap_start(last, count_with_interrupts);

    unsigned pass = snapshot_save();

    wait_for_progress(last, 10);
    check_equal("woken", woken, 0);
    if (pass & 1) {
        apic_send(last, ICR_FIXED | WAKE_VECTOR);
        while (!woken) {
            cpu_pause();
        }
    } else {
        apic_send(last, ICR_INIT);      /* back to waiting for a SIPI */
    }
    if (pass & 2) {
        delay_us(200);                  /* it has halted by then */
    }
    if (pass < repeats(500)) {
        snapshot_restore();
    }
}

/*
 * Waits until @cpu has stopped counting. It obeys an INIT when its thread gets
 * to run, which a busy host may put off.
 */
static void wait_for_stop(unsigned cpu)
{
    uint32_t seen;

    do {
        seen = chain[cpu].count;
        delay_us(100000);
    } while (chain[cpu].count != seen);
}

static void count(unsigned cpu)
{
    for (;;) {
        chain[cpu].count++;
    }
}

/*
 * Catches a CPU that waits for a SIPI at the save and is started after it:
 * the restore must make it wait again, and a SIPI alone start it.
 */
CASE(smp_waiting)
{
    unsigned last = cpu_count() - 1;

    ap_start(last, count);
    apic_send(last, ICR_INIT);
    wait_for_stop(last);
    chain[last].count = 0;

    unsigned pass = snapshot_save();

    delay_us(pass & 1 ? 300 : 0);
    check_equal("count", chain[last].count, 0);
    apic_send(last, ICR_SIPI | AP_TRAMPOLINE / PAGE_SIZE);
    wait_for_progress(last, 10);
    if (pass < repeats(300)) {
        snapshot_restore();
    }
}

static shared32 cross_pass;

static void save_here(unsigned cpu)
{
    unsigned pass = snapshot_save();

    cross_pass = pass + 1;
    count_chain(cpu);
}

/* Catches what holds only for the CPU that saves: another one restores. */
CASE(smp_cross)
{
    unsigned last = cpu_count() - 1;
    uint32_t seen;

    carry(0);
    ap_start(last, save_here);
    while (!cross_pass) {
        cpu_pause();
    }
    seen = cross_pass - 1;
    check(seen == carried(), "pass %u, not %u", seen, carried());
    wait_for_progress(last, 10);
    if (seen < repeats(500)) {
        carry(seen + 1);
        snapshot_restore();
    }
}

static shared32 race;

static void restore_at_once(unsigned cpu)
{
    while (!race) {
        chain[cpu].count++;
    }
    for (;;) {
        snapshot_write(SNAPSHOT_REG_COMMAND, SNAPSHOT_CMD_RESTORE);
    }
}

/* Catches commands of several CPUs at the same moment that upset each other. */
CASE(smp_race)
{
    for (unsigned cpu = 1; cpu < cpu_count(); cpu++) {
        ap_start(cpu, restore_at_once);
    }

    unsigned pass = snapshot_save();

    check(!race, "not restored in pass %u", pass);
    for (unsigned cpu = 1; cpu < cpu_count(); cpu++) {
        wait_for_progress(cpu, 10);
    }
    if (pass < repeats(500)) {
        race = true;
        for (;;) {
            snapshot_write(SNAPSHOT_REG_COMMAND, SNAPSHOT_CMD_RESTORE);
        }
    }
}

#define STORM_PAGES     64

static uint32_t (*const storm_page)[PAGE_SIZE / 4] = (void *)0x800000;

/* Ends the machine from within: by power management, or isa-debug-exit. */
static void storm_end(unsigned how)
{
    if (how == 1) {
        acpi_power_off();
        for (;;) {
            cpu_pause();
        }
    }
    finish(true);
}

static void storm_restore(unsigned cpu)
{
    unsigned after = option("after", 0), end = option("end", 0);

    for (uint32_t i = cpu; ; i++) {
        storm_page[i % STORM_PAGES][cpu] = i;
        if (end && snapshot_read(SNAPSHOT_REG_RESTORES) >= after) {
            storm_end(end);
        }
        snapshot_write(SNAPSHOT_REG_COMMAND, SNAPSHOT_CMD_RESTORE);
    }
}

static void storm_ap(unsigned cpu)
{
    while (!race) {
        chain[cpu].count++;
    }
    storm_restore(cpu);
}

/*
 * All CPUs restore as fast as they can, for ever, while the host does what it
 * likes: STATUS means nothing here, as it may have come from there. With
 * "end=", power goes off "after=" restores.
 */
CASE(storm)
{
    memset(storm_page, 0, sizeof(storm_page[0]) * STORM_PAGES);
    for (unsigned cpu = 1; cpu < cpu_count(); cpu++) {
        ap_start(cpu, storm_ap);
    }
    snapshot_write(SNAPSHOT_REG_COMMAND, SNAPSHOT_CMD_SAVE);
    check(!race, "not put back");
    for (unsigned i = 0; i < STORM_PAGES; i++) {
        for (unsigned cpu = 0; cpu < cpu_count(); cpu++) {
            check_equal("a page", storm_page[i][cpu], 0);
        }
    }
    race = true;
    storm_restore(0);
}

#define HPET_ID         0xfed00000u
#define IOAPIC_SELECT   0xfec00000u
#define PCI_COMMAND     0x04
#define PCI_MEMORY      2u

/*
 * Registers that nothing changes, of three devices, with pauses so that
 * accesses begin at each moment of another CPU's change of the memory map
 */
static void read_constants(unsigned cpu)
{
    const uint32_t select = mmio_read(IOAPIC_SELECT);
    const uint32_t hpet = mmio_read(HPET_ID), id = apic_read(APIC_ID);
    uint32_t random = cpu;

    for (;;) {
        check_equal("the IOAPIC's IOREGSEL", mmio_read(IOAPIC_SELECT), select);
        check_equal("the HPET's ID", mmio_read(HPET_ID), hpet);
        check_equal("the APIC's ID", apic_read(APIC_ID), id);
        for (unsigned i = random32(&random) % 4096; i; i--) {
            barrier();
        }
        chain[cpu].count++;
    }
}

/*
 * Catches a CPU that looks in the memory map of now for what it found in an
 * earlier one: it reads another device's register, or QEMU aborts.
 */
CASE(smp_remap)
{
    uint32_t command = pci_read(snapshot_devfn, PCI_COMMAND);

    for (unsigned cpu = 1; cpu < cpu_count(); cpu++) {
        ap_start(cpu, read_constants);
        wait_for_progress(cpu, 1);
    }
    for (unsigned i = 0; i < option("changes", 5000); i++) {
        pci_write(snapshot_devfn, PCI_COMMAND, command ^ PCI_MEMORY);
        pci_write(snapshot_devfn, PCI_COMMAND, command);
    }
    say("%u, %u rounds\n", chain[1].count, chain[cpu_count() - 1].count);
}
