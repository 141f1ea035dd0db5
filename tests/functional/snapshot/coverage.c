/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Snapshot test guest: code whose blocks the host knows
 *
 * Each label cover_* that is not local begins a block. The host predicts from
 * their addresses, and from the path, what a tcg-coverage object counts.
 */

#include "coverage.h"
#include "guest.h"

asm(".pushsection .text\n"
    ".balign 64\n"
    ".globl cover_code, cover_user, cover_end\n"
    "cover_code:\n"
    "cover_start:\n"
    "    test $1, %eax\n"
    "    jz cover_join\n"
    /* I/O amid a block: it is cut in three, the first time and ever after. */
    "cover_io:\n"
    "    nop\n"
    "    mov (%ebx), %edx\n"
    "    nop\n"
    "    jmp cover_join\n"
    "cover_join:\n"
    "    test $2, %eax\n"
    "    jz cover_loop\n"
    /* So it is where it writes to itself; and is translated anew. */
    "cover_modify:\n"
    "    nop\n"
    "    movb $0x90, 1f\n"
    "1:  nop\n"
    "    call cover_function\n"
    "cover_return:\n"
    "    jmp cover_loop\n"
    "cover_loop:\n"
    "    inc %edx\n"
    "    xor %ecx, %edx\n"
    "    ror $7, %edx\n"
    "    dec %ecx\n"
    "    jnz cover_loop\n"
    "cover_last:\n"
    "    ret\n"
    "cover_function:\n"
    "    ret\n"
    "cover_end:\n"
    ".popsection");

static void cover_at(uintptr_t offset, uint32_t path, uint32_t loops)
{
    asm volatile("call *%[code]"
                 : "+a"(path), "+c"(loops)
                 : [code] "r"((uintptr_t)cover_code + offset),
                   "b"(snapshot_bar) : "edx", "cc", "memory");
}

static void cover(uint32_t path, uint32_t loops)
{
    cover_at(0, path, loops);
}

/* The host looks now, and restores. */
static void noreturn wait_for_host(void)
{
    for (;;) {
        asm volatile("cli; hlt");
    }
}

static shared32 cover_turn;

static void cover_in_turn(unsigned cpu)
{
    while (cover_turn != cpu) {
        cpu_pause();
    }
    cover(option("path", 0), option("loops", 1));
    cover_turn = cpu + 1;
    for (;;) {
        asm volatile("cli; hlt");
    }
}

/* Executes the code above on each CPU, after a save or a restore. */
CASE(coverage)
{
    for (unsigned cpu = 1; cpu < cpu_count(); cpu++) {
        ap_start(cpu, cover_in_turn);
    }

    unsigned pass = snapshot_save();

    cover(option("path", 0), option("loops", 1));
    cover_turn = 1;
    while (cover_turn < cpu_count()) {
        cpu_pause();
    }
    if (pass < option("n", 0)) {
        snapshot_restore();
    }
    say("DONE\n");
    wait_for_host();
}

#define TIMER_VECTOR    0x40

static shared32 interrupts;
static bool hangs;

/* What a handler calls, with a known address, too */
asm(".pushsection .text\n"
    ".globl cover_handler\n"
    "cover_handler:\n"
    "    ret\n"
    ".popsection");

static void on_timer(struct frame *frame)
{
    (void)frame;
    interrupts++;
    cover_handler();
    if (hangs) {
        say("DONE\n");
        for (;;) {
            cpu_pause();
        }
    }
    apic_write(APIC_EOI, 0);
}

/*
 * As above, while a timer interrupts it each "period=" ns.  With "hang=1", the
 * first interrupt is the last.
 */
CASE(coverage_irq)
{
    hangs = option("hang", 0);
    irq_handle(TIMER_VECTOR, on_timer);
    apic_write(APIC_TIMER_DIV, 0xb);    /* 1 GHz in QEMU */
    apic_write(APIC_LVT_TIMER, 0x20000 | TIMER_VECTOR);

    snapshot_save();
    apic_write(APIC_TIMER_INIT, option("period", 10007));
    asm volatile("sti");
    for (unsigned i = option("repeat", 1); i; i--) {
        cover(option("path", 0), option("loops", 1));
    }
    asm volatile("cli");
    say("DONE %x\n", interrupts);
    wait_for_host();
}

/*
 * Paging, with two page tables for the same memory, and code in ring 3, which
 * comes back by a fault.
 */
#define SEL_USER_CODE   (SEL_FREE(4) | 3)
#define SEL_USER_DATA   (SEL_FREE(5) | 3)
#define SEL_TSS         SEL_FREE(6)

static uint32_t directories[2][1024] __attribute__((aligned(4096)));
static uint32_t tss[26], user_stack[64], fault_stack[1024];
uint32_t kernel_esp;

/* To ring 3, to the code above, to its end, and by an HLT back. */
asm(".pushsection .text\n"
    ".globl cover_in_user, cover_leave_user\n"
    "cover_in_user:\n"                  /* (stack, code, data) */
    "    push %ebp\n"
    "    push %ebx\n"
    "    push %esi\n"
    "    push %edi\n"
    "    mov 20(%esp), %edx\n"
    "    mov 24(%esp), %esi\n"
    "    mov 28(%esp), %edi\n"
    "    mov %esp, kernel_esp\n"
    "    movl $1f, (%edx)\n"            /* where the code above returns to */
    "    mov %edi, %ds\n"
    "    push %edi\n"
    "    push %edx\n"
    "    push $2\n"
    "    push %esi\n"
    "    push $cover_code\n"
    "    xor %eax, %eax\n"
    "    mov $1, %ecx\n"
    "    iret\n"
    "1:  hlt\n"
    "cover_leave_user:\n"
    "    mov kernel_esp, %esp\n"
    "    mov $0x10, %eax\n"
    "    mov %eax, %ds\n"
    "    mov %eax, %es\n"
    "    pop %edi\n"
    "    pop %esi\n"
    "    pop %ebx\n"
    "    pop %ebp\n"
    "    ret\n"
    ".popsection");
static void on_fault(struct frame *frame)
{
    check(frame->cs == SEL_USER_CODE, "a fault at %x", frame->eip);
    cover_leave_user();
}

#define ALIAS           0x10000000u     /* there is the memory of 0, too */

/*
 * In ring 0 with each page table "a=" and "b=" times, "alias=" times where the
 * same memory is as well, "u=" times in ring 3
 */
CASE(coverage_modes)
{
    for (unsigned i = 0; i < 1024; i++) {
        directories[0][i] = directories[1][i] = i << 22 | 0x87;
    }
    directories[0][ALIAS >> 22] = directories[1][ALIAS >> 22] = 0x87;
    gdt_set(SEL_FREE(4), 0, 0xfffff, 0xfb);
    gdt[SEL_FREE(4) / 8] |= 1ull << 55;         /* in pages */
    gdt_set(SEL_FREE(5), 0, 0xfffff, 0xf3);
    gdt[SEL_FREE(5) / 8] |= 1ull << 55;
    gdt_set(SEL_TSS, (uintptr_t)tss, sizeof(tss) - 1, SEG_TSS);
    tss[1] = (uintptr_t)(fault_stack + ARRAY_SIZE(fault_stack));
    tss[2] = SEL_DATA;
    asm volatile("ltr %w0" : : "r"(SEL_TSS));
    irq_handle(13, on_fault);
    write_cr4(read_cr4() | CR4_PSE);
    write_cr3((uintptr_t)directories[0]);
    write_cr0(read_cr0() | CR0_PG);
    say("CR3 %x %x\n", (uintptr_t)directories[0], (uintptr_t)directories[1]);

    snapshot_save();
    for (unsigned i = option("a", 0); i; i--) {
        cover(0, 1);
    }
    for (unsigned i = option("alias", 0); i; i--) {
        cover_at(ALIAS, 0, 1);
    }
    write_cr3((uintptr_t)directories[1]);
    for (unsigned i = option("b", 0); i; i--) {
        cover(0, 1);
    }
    write_cr3((uintptr_t)directories[0]);
    for (unsigned i = option("u", 0); i; i--) {
        cover_in_user(&user_stack[63], SEL_USER_CODE, SEL_USER_DATA);
    }
    say("DONE\n");
    wait_for_host();
}

/* ------------------------------------------------------------------ work */

static uint32_t numbers[4096];

static void sort(uint32_t *v, int n)
{
    uint32_t pivot = v[n / 2];
    int i = 0, j = n - 1;

    while (i <= j) {
        while (v[i] < pivot) {
            i++;
        }
        while (v[j] > pivot) {
            j--;
        }
        if (i <= j) {
            uint32_t t = v[i];

            v[i++] = v[j];
            v[j--] = t;
        }
    }
    if (j > 0) {
        sort(v, j + 1);
    }
    if (i < n - 1) {
        sort(v + i, n - i);
    }
}

/* Bit by bit, a branch for each */
static uint32_t crc(const uint8_t *p, size_t n)
{
    uint32_t c = ~0u;

    while (n--) {
        c ^= *p++;
        for (unsigned bit = 0; bit < 8; bit++) {
            c = c & 1 ? c >> 1 ^ 0xedb88320 : c >> 1;
        }
    }
    return ~c;
}

/* For scripts/coverage-cost: code with a branch each few instructions */
CASE(coverage_work)
{
    uint32_t state = 1, sum = 0;

    for (unsigned i = option("n", 100); i; i--) {
        for (unsigned j = 0; j < ARRAY_SIZE(numbers); j++) {
            numbers[j] = random32(&state);
        }
        sum ^= crc((const uint8_t *)numbers, sizeof(numbers));
        sort(numbers, ARRAY_SIZE(numbers));
        for (unsigned j = 1; j < ARRAY_SIZE(numbers); j++) {
            check(numbers[j - 1] <= numbers[j], "not sorted");
        }
    }
    say("DONE %x\n", sum);
}
