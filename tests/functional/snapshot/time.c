/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Snapshot test guest: timers, clocks and interrupts on their way
 */

#include "guest.h"

#define APIC_VECTOR     0x40

#define HPET_BASE       0xfed00000u
#define HPET_PERIOD     0x004           /* femtoseconds a tick */
#define HPET_CONFIG     0x010           /* 1 enable, 2 legacy: IRQ 0 */
#define HPET_COUNTER    0x0f0
#define HPET_T0_CONFIG  0x100           /* 4 interrupt enable */
#define HPET_T0_COMPARE 0x108

static uint8_t cmos_read(uint8_t index)
{
    outb(0x70, index);
    return inb(0x71);
}

static void cmos_write(uint8_t index, uint8_t v)
{
    outb(0x70, index);
    outb(0x71, v);
}

static const struct timer *timer_under_test;
static shared32 timer_fired, timer_eip;

static void interrupts_on_briefly(void)
{
    asm volatile("sti; nop; nop; nop; cli" : : : "memory");
}

/* The PIC remembers edges of before; take them now. */
static void pic_unmask_afresh(unsigned irq)
{
    pic_unmask(irq);
    interrupts_on_briefly();
    timer_fired = 0;
}

static unsigned period_us;      /* what every timer is armed for */

static bool apic_bit(unsigned reg, uint8_t vector)
{
    return apic_read(reg + vector / 32 * 0x10) >> vector % 32 & 1;
}

static bool pic_requests(uint8_t vector)
{
    unsigned irq = vector - IRQ_BASE;
    uint16_t port = irq < 8 ? 0x20 : 0xa0;

    outb(port, 0x0a);                   /* the IRR is to be read */
    return inb(port) >> (irq & 7) & 1;
}

/*
 * Waits, with interrupts off, until one is requested. A busy host may be late
 * to run a timer, though its time has come on all clocks.
 */
static void wait_for_request(uint8_t vector)
{
    while (!(vector == APIC_VECTOR ? apic_bit(APIC_IRR, vector)
                                   : pic_requests(vector))) {
        cpu_pause();
    }
}

static void pit_count(unsigned count)
{
    outb(0x43, 0x30);                   /* channel 0, mode 0: once */
    outb(0x40, count);
    outb(0x40, count >> 8);
}

static void pit_arm(void)
{
    /* Or a tick of the BIOS's may come after the edges were taken. */
    pit_count(0);
    pic_unmask_afresh(0);
    pit_count(period_us * 1193 / 1000);         /* at 1.193 MHz */
}

static void pit_stop(void)
{
    outb(0x43, 0x30);                   /* no count: waits for one */
    pic_mask(0);
}

static void pit_ack(void)
{
    pic_eoi(0);
}

static void apic_arm(void)
{
    apic_write(APIC_TIMER_DIV, 0xb);    /* 1 GHz in QEMU */
    apic_write(APIC_LVT_TIMER, APIC_VECTOR);
    apic_write(APIC_TIMER_INIT, period_us * 1000);
}

static void apic_arm_periodic(void)
{
    apic_arm();
    apic_write(APIC_LVT_TIMER, 0x20000 | APIC_VECTOR);
}

static void apic_stop(void)
{
    apic_write(APIC_LVT_TIMER, 0x10000);
    apic_write(APIC_TIMER_INIT, 0);
}

static void apic_ack(void)
{
    apic_write(APIC_EOI, 0);
}

static void hpet_arm(void)
{
    uint32_t ticks = period_us * (1000000000u / mmio_read(HPET_BASE +
                                                          HPET_PERIOD));

    mmio_write(HPET_BASE + HPET_T0_CONFIG, 0);
    mmio_write(HPET_BASE + HPET_CONFIG, 3);
    pic_unmask_afresh(0);
    mmio_write(HPET_BASE + HPET_T0_COMPARE + 4, 0);
    mmio_write(HPET_BASE + HPET_T0_COMPARE,
               mmio_read(HPET_BASE + HPET_COUNTER) + ticks);
    mmio_write(HPET_BASE + HPET_T0_CONFIG, 4);
}

static void hpet_stop(void)
{
    mmio_write(HPET_BASE + HPET_T0_CONFIG, 0);
    mmio_write(HPET_BASE + HPET_CONFIG, 1);
    pic_mask(0);
}

static void rtc_arm(void)
{
    pic_unmask_afresh(8);
    cmos_write(0x0a, 0x28);             /* 256 Hz */
    cmos_write(0x0b, cmos_read(0x0b) | 0x40);
}

static void rtc_stop(void)
{
    cmos_write(0x0b, cmos_read(0x0b) & ~0x40);
    cmos_read(0x0c);
    /* If masked with an interrupt on its way, the PIC gives a spurious one. */
    interrupts_on_briefly();
    pic_mask(8);
}

static void rtc_ack(void)
{
    cmos_read(0x0c);
    pic_eoi(8);
}

static const struct timer {
    const char *name;
    void (*arm)(void), (*stop)(void), (*ack)(void);
    uint8_t vector;
    bool whole;                         /* a period from arm(), not less */
    bool again;                         /* fires more than once */
} timers[] = {
    { "PIT", pit_arm, pit_stop, pit_ack, IRQ_BASE, true, false },
    { "LAPIC", apic_arm, apic_stop, apic_ack, APIC_VECTOR, true, false },
    { "LAPIC, periodic", apic_arm_periodic, apic_stop, apic_ack, APIC_VECTOR,
      true, true },
    { "HPET", hpet_arm, hpet_stop, pit_ack, IRQ_BASE, true, false },
    { "RTC", rtc_arm, rtc_stop, rtc_ack, IRQ_BASE + 8, false, true },
};

#define SLACK_US        2000000         /* a busy host may be that late */

static void timer_interrupt(struct frame *frame)
{
    timer_fired++;
    timer_eip = frame->eip;
    timer_under_test->ack();
}

/* Has each timer in turn; timer_fired counts its interrupts. */
static void for_each_timer(void (*fn)(const struct timer *t))
{
    period_us = option("period", 3000);
    mmio_write(HPET_BASE + HPET_CONFIG, 1);
    for (unsigned i = 0; i < ARRAY_SIZE(timers); i++) {
        timer_under_test = &timers[i];
        timer_fired = 0;
        irq_handle(timers[i].vector, timer_interrupt);
        fn(&timers[i]);
        interrupts_on_briefly();
        timers[i].stop();
        interrupts_on_briefly();
        irq_handle(timers[i].vector, NULL);
    }
}

static uint32_t elapsed_us(uint32_t since)
{
    return ((pm_timer() - since) & 0xffffff) * 100 / 358;
}

static void armed_at_save(const struct timer *t)
{
    uint32_t start = pm_timer(), us;
    uint32_t least = (period_us - 10) * option("least", 100) / 100;
    unsigned pass;

    t->arm();
    pass = snapshot_save();
    check_equal("interrupts so far", timer_fired, 0);
    while (!timer_fired) {
        irq_enable_and_halt();
    }
    us = elapsed_us(start);
    check((us >= least || !t->whole) && us < period_us + SLACK_US,
          "%s fired after %u us in pass %u", t->name, us, pass);
    t->stop();
    if (pass < repeats(option("n", 50))) {
        snapshot_restore();
    }
}

/*
 * Catches a timer that is armed at the save and does not fire after each
 * restore, or fires at once, though it had fired and been stopped. The CPU
 * waits in HLT, so nothing else wakes it.
 */
CASE(timer_armed)
{
    for_each_timer(armed_at_save);
}

static void idle_at_save(const struct timer *t)
{
    unsigned pass = snapshot_save();

    if (pass) {
        asm volatile("sti");
        delay_us(2 * period_us);
        asm volatile("cli");
        check(!timer_fired, "%s fired, armed after the save", t->name);
    }
    t->arm();
    if (pass & 1) {
        wait_for_request(t->vector);
    }
    if (pass < repeats(10)) {
        snapshot_restore();
    }
}

/*
 * Catches a timer, or its interrupt, that is armed after the save and lives
 * on past the restore.
 */
CASE(timer_idle)
{
    for_each_timer(idle_at_save);
}

static void pending_at_save(const struct timer *t)
{
    uintptr_t behind;
    unsigned pass;

    t->arm();
    wait_for_request(t->vector);
    check_equal("interrupts so far", timer_fired, 0);
    /* Interrupts come on after the store, so at the next instruction. */
    asm volatile("movl $1f, %[behind]\n"
                 "sti\n"
                 "movl %[save], (%[bar])\n"
                 "1: cli\n"
                 : [behind] "=&r"(behind)
                 : [bar] "r"(snapshot_bar), [save] "r"(SNAPSHOT_CMD_SAVE)
                 : "memory");
    pass = snapshot_read(SNAPSHOT_REG_RESTORES);
    /* KVM's PIT starts a count anew whenever its state is set. */
    check(timer_fired == 1 || (timer_fired && (t->again || option("kvm", 0))),
          "%u interrupts of the %s in pass %u", timer_fired, t->name, pass);
    check(timer_eip == behind, "%s interrupted at %x, not %x, in pass %u",
          t->name, timer_eip, behind, pass);
    t->stop();
    interrupts_on_briefly();
    if (pass < repeats(50)) {
        snapshot_restore();
    }
}

/*
 * Catches an interrupt that is lost or taken twice when it is pending at the
 * save, and a saved program counter that is not the store's successor: the
 * store is the one instruction between STI and the interrupt.
 */
CASE(timer_pending)
{
    for_each_timer(pending_at_save);
}

#define KVM_CLOCK       8               /* in leaf 1's EAX */

static struct {
    shared32 version, reserved;
    uint64_t tsc, ns;
    uint32_t mul;
    int8_t shift;
    uint8_t flags, reserved2[2];
} kvm_clock __attribute__((aligned(32)));

static bool kvm_clock_init(void)
{
    uint32_t r[4];

    cpuid(KVM_CPUID, 0, r);
    if (r[1] != 0x4b4d564b) {           /* "KVMK", "VMKV", "M" */
        return false;
    }
    cpuid(KVM_CPUID + 1, 0, r);
    return r[0] & KVM_CLOCK &&
        wrmsr_safe(MSR_KVM_CLOCK, (uintptr_t)&kvm_clock | 1);
}

static uint64_t kvm_clock_ns(void)
{
    uint32_t version;
    uint64_t delta, ns;

    do {
        version = kvm_clock.version;
        asm volatile("" : : : "memory");
        delta = rdtsc() - kvm_clock.tsc;
        delta = kvm_clock.shift < 0 ? delta >> -kvm_clock.shift
                                    : delta << kvm_clock.shift;
        ns = kvm_clock.ns + (delta >> 32) * kvm_clock.mul +
            ((delta & UINT32_MAX) * kvm_clock.mul >> 32);
        asm volatile("" : : : "memory");
    } while (version & 1 || version != kvm_clock.version);
    return ns;
}

static void need_tsc_to_be_set(void)
{
    uint64_t ahead = rdtsc() + (1ull << 40);

    if (!wrmsr_safe(MSR_TSC, ahead) || rdtsc() < ahead) {
        skip("this KVM does not let the TSC be set");
    }
}

/*
 * How far each clock is behind the save, for the host to judge: the time of
 * the restores, and of the work between save and restore, must not show.
 * Catches a TSC, PM timer, HPET or kvmclock that runs on, and one that creeps.
 * With "young=1", the guest has set the TSC to a little more than 0.
 */
CASE(clocks)
{
    bool has_kvm_clock = kvm_clock_init();

    if (has_kvm_clock) {
        need_tsc_to_be_set();
    }
    mmio_write(HPET_BASE + HPET_CONFIG, 1);
    if (option("young", 0)) {
        check(wrmsr_safe(MSR_TSC, 1000), "the TSC is read-only");
    }

    uint32_t pm = pm_timer();
    uint32_t hpet = mmio_read(HPET_BASE + HPET_COUNTER);
    uint64_t kvm = has_kvm_clock ? kvm_clock_ns() : 0;
    uint64_t tsc = rdtsc();
    unsigned pass = snapshot_save();
    uint64_t tsc_now = rdtsc();
    uint64_t kvm_now = has_kvm_clock ? kvm_clock_ns() : 0;
    uint32_t hpet_now = mmio_read(HPET_BASE + HPET_COUNTER);
    uint32_t pm_now = pm_timer();

    say("CLOCK %llx %x %x %llx\n", tsc_now - tsc, hpet_now - hpet,
        (pm_now - pm) & 0xffffff, kvm_now - kvm);
    delay_us(option("work", 2000));
    say("WORK %llx %x %x %llx\n", rdtsc() - tsc,
        mmio_read(HPET_BASE + HPET_COUNTER) - hpet,
        (pm_timer() - pm) & 0xffffff,
        has_kvm_clock ? kvm_clock_ns() - kvm : 0);
    if (pass < repeats(option("n", 1000))) {
        snapshot_restore();
    }
}

/* ------------------------------------------ interrupt controllers' state */

static shared32 ipis[256];

static void ipi_without_eoi(struct frame *frame)
{
    ipis[frame->vector]++;
}

static void ipi_self(uint8_t vector)
{
    apic_send(apic_read(APIC_ID) >> 24, ICR_FIXED | vector);
}

/*
 * Catches interrupts in service and interrupts requested, in the local APIC
 * and in the PIC, that do not come back or do not go away.
 */
CASE(irqs)
{
    const uint8_t serviced = 0x61, requested = 0x51, later = 0x71;
    unsigned pass;

    irq_handle(serviced, ipi_without_eoi);
    irq_handle(requested, ipi_without_eoi);
    irq_handle(later, ipi_without_eoi);
    ipi_self(serviced);
    interrupts_on_briefly();
    if (option("kvm", 0) && !ipis[serviced]) {
        skip("this KVM does not look for interrupts after each instruction");
    }
    check_equal("first interrupt", ipis[serviced], 1);
    ipi_self(requested);
    interrupts_on_briefly();
    check_equal("the lower one", ipis[requested], 0);

    pass = snapshot_save();
    check(apic_bit(APIC_ISR, serviced), "not in service, pass %u", pass);
    check(apic_bit(APIC_IRR, requested), "not requested, pass %u", pass);
    check(!apic_bit(APIC_ISR, later) && !apic_bit(APIC_IRR, later),
          "requested after the save, pass %u", pass);
    ipi_self(later);
    if (pass & 3) {
        interrupts_on_briefly();
        check_equal("the higher one", ipis[later], 1);
        apic_write(APIC_EOI, 0);
    }
    if (pass & 2) {
        apic_write(APIC_EOI, 0);
        interrupts_on_briefly();
        check_equal("the lower one, at last", ipis[requested], 1);
        check(apic_bit(APIC_ISR, requested), "lower one not in service");
    }
    if (pass < repeats(50)) {
        snapshot_restore();
    }

    /* The PIC: its IRQ 0 in service, and its vectors moved after the save. */
    irq_handle(IRQ_BASE, ipi_without_eoi);
    apic_write(APIC_EOI, 0);
    apic_write(APIC_EOI, 0);
    apic_write(APIC_EOI, 0);
    pit_arm();
    while (!ipis[IRQ_BASE]) {
        irq_enable_and_halt();
    }
    pass = snapshot_save();
    outb(0x20, 0x0b);                   /* read the in-service register */
    check_equal("PIC in service", inb(0x20), 1);
    pit_arm();
    wait_for_request(IRQ_BASE);
    interrupts_on_briefly();
    check_equal("interrupts of the PIC", ipis[IRQ_BASE], 1);
    pic_eoi(0);
    if (pass & 1) {
        interrupts_on_briefly();
        check_equal("interrupts of the PIC", ipis[IRQ_BASE], 2);
        pic_eoi(0);
    }
    if (pass & 2) {
        outb(0x20, 0x11);
        outb(0x21, 0x80);
        outb(0x21, 4);
        outb(0x21, 1);
    }
    if (pass < repeats(20)) {
        snapshot_restore();
    }
}
