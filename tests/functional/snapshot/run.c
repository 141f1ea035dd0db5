/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Snapshot test guest: runs, of which the input's first byte says what to do
 */

#include "guest.h"

#define PANIC_PORT      0x505           /* of pvpanic */

#define INPUT_SIZE      0x3000
#define COVERAGE_SIZE   0x2000
#define TEXT_SIZE       0x1000

/* None begins or ends with a page. Coverage is in RAM that can be hidden. */
static uint8_t *const input = (void *)0x700001;
static uint8_t *const coverage = (void *)0xd0040;
static char *const text = (void *)0x910ff0;
static unsigned runs;           /* goes back, so that it is 1 in each run */

static uint32_t command(uint32_t what)
{
    uint32_t status;

    barrier();
    snapshot_write(SNAPSHOT_REG_COMMAND, what);
    status = snapshot_read(SNAPSHOT_REG_STATUS);
    barrier();
    return status;
}

static void noreturn done(uint32_t result)
{
    snapshot_write(SNAPSHOT_REG_RESULT, result);
    check(!command(SNAPSHOT_CMD_DONE), "DONE has failed, or gone on");
    for (;;) {
        cpu_pause();
    }
}

static void noreturn hang(void)
{
    for (;;) {
        cpu_pause();
    }
}

static void noreturn triple_fault(void)
{
    static const struct table_pointer none;

    asm volatile("lidt %0; int3" : : "m"(none));
    hang();
}

/* Registers of the next READY are not those of this run. */
static void lie(void)
{
    for (unsigned i = 0; i < SNAPSHOT_REGIONS + 2; i++) {
        snapshot_region(i, (void *)0xfffff000, 0xffffffff);
    }
    snapshot_write(SNAPSHOT_REG_REGION, 0xffffffff);
    snapshot_write(SNAPSHOT_REG_SLOT, 0x12345678);
}

static void twice_in_a_run(void)
{
    snapshot_select(1);
    carry(0);
    command(SNAPSHOT_CMD_SAVE);
    coverage[1]++;
    if (carried() < 3) {
        carry(carried() + 1);
        command(SNAPSHOT_CMD_RESTORE);
        fail("RESTORE went on");
    }
    snapshot_select(0);
}

static shared32 sleep;

static void suspend_if_told(unsigned cpu)
{
    (void)cpu;
    while (!sleep) {
        cpu_pause();
    }
    acpi_suspend();
    hang();
}

static void ata_write(uint32_t sector)
{
    outb(0x1f6, 0xe0);
    outb(0x1f2, 1);
    outb(0x1f3, sector);
    outb(0x1f4, 0);
    outb(0x1f5, 0);
    outb(0x1f7, 0x30);
    while ((inb(0x1f7) & 0x88) != 8) {
        cpu_pause();
    }
    for (int i = 0; i < 256; i++) {
        outw(0x1f0, i);
    }
}

static void ata_wait(void)
{
    while (inb(0x1f7) & 0x88) {
        cpu_pause();
    }
}

static void noreturn act(const uint8_t *what)
{
    switch (*what) {
    case 'e':
        break;
    case 'd':
        say("delays\n");
        delay_us(1500000);
        act(what + 1);
    case '3':                           /* the other vCPU, now or soon */
        sleep = 1;
        for (unsigned i = 0; i < 50u * what[1]; i++) {
            barrier();
        }
        break;
    case 'z':
        acpi_suspend();
        hang();
    case 'W':
        outb(0x443, 0xf);               /* ib700: 0 s */
        hang();
    case 'D':                           /* the last one fails */
        for (unsigned i = 0; i < 3; i++) {
            ata_write(0);
            ata_wait();
        }
        ata_write(8);
        if (what[1] == 'h') {
            hang();
        }
        break;
    case 'L':
        snapshot_select(1);
        for (;;) {
            command(SNAPSHOT_CMD_SAVE);
        }
    case 'E':
        snapshot_select(2);
        carry(1);
        command(SNAPSHOT_CMD_RESTORE);
        fail("RESTORE went on");
    case 'c':
        done(SNAPSHOT_RESULT_CRASH);
    case 's':
        done(SNAPSHOT_RESULT_SANITIZER);
    case 'S':
        done(SNAPSHOT_RESULT_STOP);
    case 'x':
        done(77);
    case 't':
        triple_fault();
    case 'p':
        outb(PANIC_PORT, 1);
        hang();
    case 'k':
        outb(0x64, 0xfe);
        hang();
    case '9':
        outb(0xcf9, 2);
        outb(0xcf9, 6);
        hang();
    case 'q':
        outl(0xf4, 0x11);               /* isa-debug-exit */
        hang();
    case 'o':
        acpi_power_off();
        hang();
    case 'h':
        hang();
    case 'y':
        say("hangs\n");
        hang();
    case 'H':
        asm volatile("cli; hlt");
        hang();
    case 'w':
        delay_us(1000 * what[1]);
        break;
    case 'R':
        snapshot_select(0);             /* A lie stays there. */
        check_equal("STATUS of READY in a run", command(SNAPSHOT_CMD_READY),
                    SNAPSHOT_STATUS_ERROR | SNAPSHOT_E_RUN);
        break;
    case 'r':
        twice_in_a_run();
        break;
    case 'v':
        command(SNAPSHOT_CMD_SAVE);
        say("DONE %x\n", command(SNAPSHOT_CMD_DONE));
        hang();
    case 'l':
        lie();
        break;
    case 'b':
        pam_write(2, 0);                /* No RAM is where coverage was. */
        break;
    default:
        done(SNAPSHOT_RESULT_INVALID);
    }
    done(SNAPSHOT_RESULT_OK);
}

/* The PIT's first counter has some timer expire every ten microseconds. */
static void start_timer(void)
{
    outb(0x43, 0x34);
    outb(0x40, 12);
    outb(0x40, 0);
}

/* READY until it comes back with an error, or the host restores it */
static void one_run(void)
{
    uint32_t status, length, before = pm_timer();

    status = command(SNAPSHOT_CMD_READY);
    if (status != SNAPSHOT_STATUS_RUN) {
        say("READY %x\n", status);
        return;
    }
    runs++;
    length = snapshot_read(SNAPSHOT_REG_INPUT_LENGTH);
    check(length <= INPUT_SIZE, "an input of %u bytes", length);
    coverage[0] = runs;
    before = (pm_timer() - before) % 0x1000000;
    memcpy(coverage + 4, &before, sizeof(before));
    coverage[8] = inb(0x64) & 1;        /* Is there a key? */
    for (uint32_t i = 0; i < length; i++) {
        coverage[0x100 + input[i]]++;
    }
    /* What was behind the input at READY is there now. */
    for (uint32_t i = length; i < INPUT_SIZE; i++) {
        check_equal("a byte behind the input", input[i], 0xa5);
    }
    memcpy(text, input, length < TEXT_SIZE ? length : TEXT_SIZE);
    act(length ? input : (const uint8_t *)"e");
}

CASE(run)
{
    pam_write(2, 0x33);
    memset(input, 0xa5, INPUT_SIZE);
    memset(coverage, 0, COVERAGE_SIZE);
    memset(text, 0, TEXT_SIZE);
    if (cpu_count() > 1) {
        ap_start(1, suspend_if_told);
    }
    if (option("timer", 0)) {
        start_timer();
    }
    if (option("early", 0)) {
        snapshot_select(2);
        command(SNAPSHOT_CMD_SAVE);
        if (carried()) {
            done(SNAPSHOT_RESULT_OK);
        }
        snapshot_select(0);
        delay_us(1000);
    }
    for (;;) {
        snapshot_region(SNAPSHOT_REGION_INPUT, input, INPUT_SIZE);
        snapshot_region(SNAPSHOT_REGION_COVERAGE, coverage, COVERAGE_SIZE);
        snapshot_region(SNAPSHOT_REGION_TEXT, text, TEXT_SIZE);
        one_run();
    }
}
