/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Snapshot test guest: the same instructions after each restore
 */

#include "guest.h"

#define PANIC_PORT      0x505           /* pvpanic: stops the machine here */
#define PIT_HZ          1193182

#define CALL_VECTOR     0x50

#define SPREAD          256             /* pages that the work writes to */

static uint8_t (*const pages)[PAGE_SIZE] = (void *)0x400000;
static uint8_t code[16] __attribute__((aligned(4096)));
static shared32 ticks, tick_eip, state, number;
static shared32 theirs;

/* Where an interrupt finds the program depends on each instruction's time. */
static void on_tick(struct frame *frame)
{
    ticks++;
    tick_eip = tick_eip * 33 + frame->eip;
    pic_eoi(0);
}

static uint32_t tsc(void)
{
    uint32_t v;

    asm volatile("rdtsc" : "=a"(v) : : "edx");
    return v;
}

/* A function made anew each time, that its translation is in question. */
static uint32_t run_new_code(uint32_t v)
{
    uint32_t (*fn)(void) = (void *)code;

    code[0] = 0xb8;                     /* mov $v, %eax; ret */
    memcpy(code + 1, &v, 4);
    code[5] = 0xc3;
    return fn();
}

static uint32_t devices(void)
{
    uint32_t v;

    outb(0x43, 0x00);                   /* latch the PIT's counter 0 */
    v = inb(0x40);
    v |= inb(0x40) << 8;
    outb(0x70, 0x50 + v % 16);
    outb(0x71, v);                      /* CMOS */
    v += pm_timer() + apic_read(APIC_TIMER_NOW) + mmio_read(0xfed000f0);
    outb(0x3c8, v);                     /* VGA, or nobody */
    return v;
}

static void on_call(struct frame *frame)
{
    (void)frame;
    apic_write(APIC_EOI, 0);
}

static void their_work(unsigned cpu)
{
    uint32_t s = cpu;

    for (;;) {
        irq_enable_and_halt();
        for (unsigned i = 0; i < 100; i++) {
            uint8_t *p = pages[random32(&s) % SPREAD];

            *(uint32_t *)p += tsc();
        }
        theirs += s;
        apic_send(0, ICR_FIXED | CALL_VECTOR);
    }
}

/*
 * One CPU runs while the other is halted. Whose turn it is, where both run, no
 * instruction count tells: QEMU's main loop has a say in it.
 */
static void call_them(void)
{
    uint32_t before = theirs;

    pic_mask(0);
    apic_send(1, ICR_FIXED | CALL_VECTOR);
    while (theirs == before) {
        irq_enable_and_halt();
    }
    pic_unmask(0);
}

static void work(unsigned rounds)
{
    uint32_t s = state;

    for (unsigned i = 0; i < rounds; i++) {
        uint8_t *p = pages[random32(&s) % SPREAD];

        p[s % PAGE_SIZE] += i;
        *(uint32_t *)(p + (s >> 8) % (PAGE_SIZE - 4)) ^= tsc();
        asm volatile("fsts %0; fmuls %0; fadds %1"
                     : "=m"(number) : "m"(*(uint32_t *)p));
        if (i % 16 == 0) {
            s ^= run_new_code(s + i);
        }
        if (i % 64 == 0) {
            s ^= devices() | 1;
        }
        if (i % 256 == 0) {
            irq_enable_and_halt();
            if (cpu_count() > 1) {
                call_them();
            }
        } else if (i % 4 == 0) {
            asm volatile("sti; nop; cli" : : : "memory");
        }
        state = s;
    }
}

/*
 * Saves, works, stops the machine, and restores for ever. Whatever differs
 * from one stop to the next did not go back, or does not follow from what did:
 * the host compares. No register of the device is read, as those do not go
 * back.
 */
CASE(exact)
{
    unsigned rounds = option("rounds", 1000);
    uint32_t divisor = PIT_HZ / 2000;

    write_cr0(read_cr0() & ~(CR0_EM | CR0_TS));
    asm volatile("fninit; fld1");
    state = 1;
    irq_handle(IRQ_BASE, on_tick);
    apic_write(APIC_TIMER_DIV, 0xb);
    apic_write(APIC_TIMER_INIT, 0xffffffff);
    mmio_write(0xfed00010, 1);          /* HPET on */
    outb(0x43, 0x34);
    outb(0x40, divisor);
    outb(0x40, divisor >> 8);
    pic_unmask(0);
    irq_handle(CALL_VECTOR, on_call);
    if (cpu_count() > 1) {
        ap_start(1, their_work);
        delay_us(1000);                 /* until it is halted */
    }

    snapshot_write(SNAPSHOT_REG_COMMAND, SNAPSHOT_CMD_SAVE);
    work(rounds);
    outb(PANIC_PORT, 1);
    snapshot_write(SNAPSHOT_REG_COMMAND, SNAPSHOT_CMD_RESTORE);
    snapshot_not_restored();
}
