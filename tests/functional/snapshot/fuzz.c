/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Snapshot test guest: runs for a fuzzer on the host
 *
 * All that a bare-metal guest does to be fuzzed: tell the device where input,
 * coverage and text are; READY; process; DONE.
 */

#include "guest.h"

static uint8_t *const input = (uint8_t *)0x400000;
static uint8_t *const map = (uint8_t *)0x600000;
static char *const text = (char *)0x700000;

#include "fuzz-target.h"

static void done(uint32_t result, const char *words)
{
    for (unsigned i = 0; (text[i] = words[i]); i++) {
        /* copy */
    }
    snapshot_write(SNAPSHOT_REG_RESULT, result);
    snapshot_write(SNAPSHOT_REG_COMMAND, SNAPSHOT_CMD_DONE);
    fail("ran past DONE, status %x", snapshot_read(SNAPSHOT_REG_STATUS));
}

/* What the letter asks for: each way in which a run can end */
static void end_run(unsigned letter)
{
    static const char letters[] = "CAHWPTROSI";
    static const struct table_pointer no_idt;
    unsigned i;

    for (i = 0; letters[i] && letters[i] != (char)letter; i++) {
        /* find */
    }
    if (!letters[i] || (letter == 'S' && !option("stop", 1))) {
        return;
    }
    EDGE(0x800 + 2 * letter);
    switch (letter) {
    case 'C':
        done(SNAPSHOT_RESULT_CRASH, "the planted crash");
        break;
    case 'A':
        done(SNAPSHOT_RESULT_SANITIZER, "ERROR: a planted report");
        break;
    case 'H':
        asm volatile("cli");
        for (;;) {
            cpu_pause();
        }
    case 'W':
        for (;;) {
            asm volatile("cli; hlt");
        }
    case 'P':
        say("Kernel panic - not syncing: planted\n");
        outb(0x505, 1);                 /* pvpanic */
        break;
    case 'T':
        asm volatile("lidt %0; int3" : : "m"(no_idt));
        break;
    case 'R':
        outb(0xcf9, 6);
        break;
    case 'O':
        acpi_power_off();
        break;
    case 'S':
        done(SNAPSHOT_RESULT_STOP, "the guest has seen enough");
        break;
    case 'I':
        done(SNAPSHOT_RESULT_INVALID, "not possible here");
        break;
    }
    /* What was asked for takes its time. */
    delay_us(1000000);
    fail("goes on after '%x'", letter);
}

/* With "mute", READY never comes; with "alone", no host is needed. */
CASE(fuzz)
{
    uint32_t size;

    say("the guest is there\n");
    while (option("mute", 0)) {
        cpu_pause();
    }
    memset(input, 0, option("size", MAP_SIZE));
    memset(map, 0, MAP_SIZE);
    memset(text, 0, PAGE_SIZE);
    if (option("alone", 0)) {
        memcpy(input, "xx", 2);
        snapshot_save();
        target(input, 2);
        snapshot_restore();
    }
    snapshot_region(SNAPSHOT_REGION_INPUT, input, option("size", MAP_SIZE));
    snapshot_region(SNAPSHOT_REGION_COVERAGE, map, MAP_SIZE);
    snapshot_region(SNAPSHOT_REGION_TEXT, text, PAGE_SIZE);
    snapshot_write(SNAPSHOT_REG_COMMAND, SNAPSHOT_CMD_READY);
    check(snapshot_read(SNAPSHOT_REG_STATUS) == SNAPSHOT_STATUS_RUN,
          "READY: status %x", snapshot_read(SNAPSHOT_REG_STATUS));
    size = snapshot_read(SNAPSHOT_REG_INPUT_LENGTH);
    end_run(target(input, size));
    done(SNAPSHOT_RESULT_OK, "");
}
