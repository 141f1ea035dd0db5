/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Snapshot test guest: a guest in the guest, by AMD's SVM
 */

#include "guest.h"

#define MSR_EFER        0xc0000080
#define MSR_VM_HSAVE_PA 0xc0010117
#define EFER_SVME       (1 << 12)
#define EXIT_HLT        0x78

/* Offsets into the VMCB; segments: selector, attributes, limit, base */
#define VMCB_INTERCEPT1 0x00c
#define VMCB_INTERCEPT2 0x010
#define VMCB_ASID       0x058
#define VMCB_TLB        0x05c
#define VMCB_EXITCODE   0x070
#define VMCB_NESTED     0x090
#define VMCB_NESTED_CR3 0x0b0
#define VMCB_SEGMENT(n) (0x400 + 16 * (n))      /* es cs ss ds */
#define VMCB_GDTR       0x460
#define VMCB_IDTR       0x480
#define VMCB_EFER       0x4d0
#define VMCB_CR4        0x548
#define VMCB_CR3        0x550
#define VMCB_CR0        0x558
#define VMCB_DR7        0x560
#define VMCB_RFLAGS     0x570
#define VMCB_RIP        0x578
#define VMCB_PAT        0x668

static uint8_t vmcb[PAGE_SIZE] __attribute__((aligned(4096)));
static uint8_t host_save[PAGE_SIZE] __attribute__((aligned(4096)));

static uint32_t *vmcb_field(unsigned offset)
{
    return (uint32_t *)(vmcb + offset);
}

/* The inner guest: stores its command, counts, and halts, which exits. */
asm(".text\n"
    "svm_guest:\n"
    "    mov %ebx, (%edi)\n"
    "    inc %esi\n"
    "    hlt\n"
    "    jmp svm_guest\n"
    /* Another one: reads */
    "svm_reader:\n"
    "    mov (%edi), %ebx\n"
    "    hlt\n");

/* Runs it; how often it came past its store */
static uint32_t svm_run(uint32_t command)
{
    uint32_t count = 0;

    *vmcb_field(VMCB_RIP) = (uintptr_t)svm_guest;
    *vmcb_field(VMCB_EXITCODE) = 0;
    asm volatile("clgi; vmrun; stgi"
                 : "+S"(count)
                 : "a"(vmcb), "b"(command), "D"(snapshot_bar)
                 : "memory", "cc");
    check_equal("exit code", *vmcb_field(VMCB_EXITCODE), EXIT_HLT);
    return count;
}

/* KVM has no VMRUN without paging. Addresses stay what they are. */
static void paging_on(void)
{
    static uint32_t directory[1024] __attribute__((aligned(4096)));

    for (uint32_t i = 0; i < 1024; i++) {
        directory[i] = i << 22 | 0x83;  /* 4 MiB, writable, present */
    }
    write_cr4(read_cr4() | CR4_PSE);
    write_cr3((uintptr_t)directory);
    write_cr0(read_cr0() | CR0_PG);
}

static void svm_init(void)
{
    struct table_pointer idtr;
    uint64_t efer;

    check(rdmsr_safe(MSR_EFER, &efer) &&
          wrmsr_safe(MSR_EFER, efer | EFER_SVME) &&
          wrmsr_safe(MSR_VM_HSAVE_PA, (uintptr_t)host_save), "no SVM");
    paging_on();
    asm volatile("sidt %0" : "=m"(idtr));
    *vmcb_field(VMCB_INTERCEPT1) = 1 << 24;     /* HLT */
    *vmcb_field(VMCB_INTERCEPT2) = 1;           /* VMRUN */
    *vmcb_field(VMCB_ASID) = 1;
    for (unsigned i = 0; i < 4; i++) {
        bool code = i == 1;

        *vmcb_field(VMCB_SEGMENT(i)) = code ? SEL_CODE32 | 0xc9b << 16
                                            : SEL_DATA | 0xc93 << 16;
        *vmcb_field(VMCB_SEGMENT(i) + 4) = 0xffffffff;
    }
    *vmcb_field(VMCB_GDTR + 4) = gdt_pointer.limit;
    *vmcb_field(VMCB_GDTR + 8) = gdt_pointer.base;
    *vmcb_field(VMCB_IDTR + 4) = idtr.limit;
    *vmcb_field(VMCB_IDTR + 8) = idtr.base;
    *vmcb_field(VMCB_EFER) = efer | EFER_SVME;
    *vmcb_field(VMCB_CR4) = read_cr4();
    *vmcb_field(VMCB_CR3) = read_cr3();
    *vmcb_field(VMCB_CR0) = read_cr0();
    *vmcb_field(VMCB_DR7) = 0x400;
    *vmcb_field(VMCB_RFLAGS) = 2;
}

/*
 * Catches a CPU that is in the inner guest at the restore and was not at the
 * save, and the reverse: that state is absent from a snapshot of an outer
 * guest.
 */
CASE(svm)
{
    uint32_t r[4];
    unsigned pass;

    cpuid(0x80000001, 0, r);
    if (!(r[2] & 4)) {
        say("no SVM to test\n");
        return;
    }
    svm_init();
    pass = snapshot_save();             /* outside ... */
    check_equal("count", svm_run(0), 1);
    if (pass < repeats(100)) {
        svm_run(SNAPSHOT_CMD_RESTORE);  /* ... from inside */
        snapshot_not_restored();
    }

    check_equal("count", svm_run(SNAPSHOT_CMD_SAVE), 1); /* inside ... */
    pass = snapshot_read(SNAPSHOT_REG_RESTORES);
    check_equal("STATUS", snapshot_read(SNAPSHOT_REG_STATUS),
                pass ? SNAPSHOT_STATUS_RESTORED : SNAPSHOT_STATUS_SAVED);
    if (pass < repeats(100)) {
        snapshot_restore();             /* ... from outside */
    }
}

/* What the reader finds at a linear address */
static uint32_t svm_read(uintptr_t linear)
{
    uint32_t found = 0;

    *vmcb_field(VMCB_RIP) = (uintptr_t)svm_reader;
    *vmcb_field(VMCB_EXITCODE) = 0;
    asm volatile("clgi; vmrun; stgi"
                 : "+b"(found)
                 : "a"(vmcb), "D"(linear)
                 : "memory", "cc");
    check_equal("exit code", *vmcb_field(VMCB_EXITCODE), EXIT_HLT);
    return found;
}

/*
 * Catches copies that KVM keeps of the nested page tables of the guest's own
 * guest, and goes on with when a restore has changed them.
 */
CASE(nested_tables)
{
    const uintptr_t window = 0x40000000;
    static uint32_t nested[1024] __attribute__((aligned(4096)));
    static uint32_t table[1024] __attribute__((aligned(4096)));
    static uint32_t page[2][1024] __attribute__((aligned(4096)));
    uint32_t r[4];
    unsigned pass;

    cpuid(0x8000000a, 0, r);
    if (!(r[3] & 1)) {
        skip("no nested paging to test");
    }
    svm_init();
    for (uint32_t i = 0; i < 1024; i++) {
        nested[i] = i << 22 | 0xe7;     /* 4 MiB, dirty, user, writable */
    }
    nested[window >> 22] = (uintptr_t)table | 0x67;
    page[0][0] = 0xa;
    page[1][0] = 0xb;
    table[0] = (uintptr_t)page[0] | 0x67;
    *vmcb_field(VMCB_NESTED) = 1;
    *vmcb_field(VMCB_NESTED_CR3) = (uintptr_t)nested;
    *vmcb_field(VMCB_PAT) = 0x00070406;
    *vmcb_field(VMCB_PAT + 4) = 0x00070406;
    check_equal("before", svm_read(window), 0xa);

    pass = snapshot_save();
    check_equal("saved", svm_read(window), 0xa);
    table[0] = (uintptr_t)page[1] | 0x67;
    *vmcb_field(VMCB_TLB) = 1;          /* flush */
    check_equal("changed", svm_read(window), 0xb);
    if (pass < repeats(100)) {
        snapshot_restore();
    }
}
