/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Snapshot test guest: precision
 */

#include "guest.h"

/*
 * How the command is stored: %eax = command, %edi = BAR0. The last two read
 * STATUS first, in one go.
 */
static const struct form {
    uint8_t len, bytes[6];
} forms[] = {
    { 2, { 0x89, 0x07 } },                      /* mov %eax, (%edi) */
    { 3, { 0x89, 0x04, 0x27 } },                /* the same, with a SIB */
    { 6, { 0xc7, 0x07 } },                      /* movl $command, (%edi) */
    { 1, { 0xab } },                            /* stosl */
    { 2, { 0xf3, 0xab } },                      /* rep stosl, %ecx = 1 */
    { 2, { 0x87, 0x07 } },                      /* xchg %eax, (%edi) */
    { 3, { 0xf0, 0x09, 0x0f } },                /* lock or %ecx, (%edi) */
};

#define FORM_MOVL       2
#define FORM_STOS       3
#define FORM_REP_STOS   4
#define FORM_LOCK_OR    6

#define MAX_INCS        24              /* on either side of the store */

static uint8_t code_area[2 * PAGE_SIZE] __attribute__((aligned(4096)));
static shared32 memory_count;

/*
 * @before incs of %ebx, the store, @behind incs, and then a count that nothing
 * reverts: ARGUMENT's. The store ends @page_offset bytes behind the page's
 * first byte, so that it may be the last of a page or lie across two.
 */
static void (*emit(unsigned form, uint32_t command, unsigned before,
                   unsigned behind, unsigned page_offset))(void)
{
    const struct form *f = &forms[form];
    uint8_t *store = code_area + PAGE_SIZE + page_offset - f->len;
    uint8_t *start = store - before, *p = start;
    uint32_t address = (uintptr_t)&memory_count;
    uint32_t count = snapshot_bar + SNAPSHOT_REG_ARGUMENT;

    memset(p, 0x43, before);            /* inc %ebx */
    p = store;
    memcpy(p, f->bytes, f->len);
    if (form == FORM_MOVL) {
        memcpy(p + 2, &command, 4);
    }
    p += f->len;
    memset(p, 0x43, behind);
    p += behind;
    *p++ = 0xff;                        /* incl ARGUMENT */
    *p++ = 0x05;
    memcpy(p, &count, 4);
    p += 4;
    *p++ = 0xff;                        /* incl memory_count */
    *p++ = 0x05;
    memcpy(p, &address, 4);
    p += 4;
    *p++ = 0xc3;
    return (void (*)(void))(uintptr_t)start;
}

struct registers {
    uint32_t ebx, ecx, edi;
};

static inline struct registers run(void (*fn)(void), uint32_t command,
                                   uint32_t ecx)
{
    struct registers r = { 0, ecx, snapshot_bar };

    asm volatile("call *%4"
                 : "+b"(r.ebx), "+c"(r.ecx), "+D"(r.edi), "+a"(command)
                 : "r"(fn) : "memory", "cc");
    return r;
}

static shared32 spin[MAX_CPUS];

static void spinner(unsigned cpu)
{
    for (;;) {
        spin[cpu]++;
    }
}

/*
 * Saves and restores, n times, with stores of every form, at every place of a
 * translation block and of a page. Registers and RAM must be those of the
 * store, and the instruction behind the save must run twice, for the save and
 * for the restore, and the one behind the restore never. Catches a machine
 * saved late (the count in ARGUMENT stays at 1: that instruction had run
 * before), and one restored late (the count is 3).
 */
CASE(precise)
{
    unsigned n = repeats(option("n", 3000));
    unsigned every = option("forms", ARRAY_SIZE(forms));

    for (unsigned cpu = 1; cpu < cpu_count(); cpu++) {
        ap_start(cpu, spinner);
    }
    for (unsigned i = 0; i < n; i++) {
        unsigned form = i % every, before = i / 7 % MAX_INCS;
        unsigned behind = i & 1 ? 0 : i / 3 % MAX_INCS;
        unsigned page_offset = i % 3 ? 32 + i % 512 : i / 3 % 8;
        uint32_t ecx = form == FORM_LOCK_OR ? 0 : 1;
        void (*fn)(void) = emit(form, SNAPSHOT_CMD_SAVE, before, behind,
                                page_offset);
        struct registers r;
        uint32_t status, count;

        /*
         * "lock or" with 0 stores what it has read, STATUS; after a SAVE that
         * is SAVE's number.
         */
        if (form == FORM_LOCK_OR) {
            snapshot_write(SNAPSHOT_REG_COMMAND, SNAPSHOT_CMD_SAVE);
        }
        carry(0);
        memory_count = i;
        r = run(fn, SNAPSHOT_CMD_SAVE, ecx);
        status = snapshot_read(SNAPSHOT_REG_STATUS);
        count = carried();
        check(r.ebx == before + behind, "%u incs, not %u + %u, form %u, %x",
              r.ebx, before, behind, form, status);
        check_equal("RAM", memory_count, i + 1);
        check_equal("edi", r.edi, snapshot_bar +
                    (form == FORM_STOS || form == FORM_REP_STOS ? 4 : 0));
        check_equal("ecx", r.ecx, form == FORM_REP_STOS ? 0 : ecx);
        if (status == SNAPSHOT_STATUS_SAVED) {
            check(count == 1, "%u runs of the code behind the save, form %u",
                  count, form);
            if (form == FORM_LOCK_OR) {
                form = 0;
            }
            fn = emit(form, SNAPSHOT_CMD_RESTORE, behind, before, page_offset);
            run(fn, SNAPSHOT_CMD_RESTORE, 1);
            snapshot_not_restored();
        }
        check(status == SNAPSHOT_STATUS_RESTORED, "status is %x, form %u",
              status, form);
        check(count == 2, "%u runs of the code behind save and restore, form "
              "%u, %u incs behind", count, form, behind);
        check_equal("RESTORES", snapshot_read(SNAPSHOT_REG_RESTORES), 1);
    }
    for (unsigned cpu = 1; cpu < cpu_count(); cpu++) {
        uint32_t now = spin[cpu];

        while (spin[cpu] == now) {      /* they all run on */
            cpu_pause();
        }
    }
}

/*
 * The restore alone, in every pass from another place; far more often, as a
 * save copies all of RAM and a restore does not.
 */
CASE(precise_restores)
{
    unsigned n = repeats(option("n", 10000)), pass;

    for (unsigned cpu = 1; cpu < cpu_count(); cpu++) {
        ap_start(cpu, spinner);
    }
    carry(0);
    pass = snapshot_save();
    check(carried() == 0, "ran past a restore in pass %u", pass);
    if (pass < n) {
        unsigned form = pass % FORM_LOCK_OR;

        run(emit(form, SNAPSHOT_CMD_RESTORE, pass / 7 % MAX_INCS, pass & 1,
                 pass % 3 ? 32 + pass % 512 : pass / 3 % 8),
            SNAPSHOT_CMD_RESTORE, 1);
        snapshot_not_restored();
    }
}
