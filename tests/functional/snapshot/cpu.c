/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Snapshot test guest: the state of the CPU that saves and restores
 */

#include "guest.h"

/* --------------------------------------------------- general registers */

#define SEL_BAR         SEL_FREE(0)     /* %fs: base = the device's BAR */
#define GPR_FLAGS       0x00000cd7      /* CF PF AF ZF SF DF OF */

/* As pushal and pushfl leave them */
struct gprs {
    uint32_t edi, esi, ebp, esp, ebx, edx, ecx, eax, eflags;
};

/*
 * Every register and flag is in use at the store, so it goes through a
 * segment and touches neither. gprs_restore() has the complement in each.
 */
asm(".text\n"
    "gprs_save:\n"
    "    pushal\n"
    "    mov %esp, gprs_stack\n"
    "    mov $gprs_alternate_stack_top, %esp\n"
    "    push $0xcd7\n"
    "    popfl\n"
    "    mov $0x11223344, %eax\n"
    "    mov $0x55667788, %ebx\n"
    "    mov $0x99aabbcc, %ecx\n"
    "    mov $0xddeeff01, %edx\n"
    "    mov $0x23456789, %esi\n"
    "    mov $0xabcdef02, %edi\n"
    "    mov $0x13579bdf, %ebp\n"
    "    movl $0x101, %fs:0\n"
    "    pushfl\n"
    "    pushal\n"
    "    cld\n"
    "    mov %esp, %esi\n"
    "    mov gprs_stack, %esp\n"
    "    mov 36(%esp), %edi\n"
    "    mov $9, %ecx\n"
    "    rep movsl\n"
    "    popal\n"
    "    ret\n"
    "gprs_restore:\n"
    "    push $0x200002\n"              /* ID, and none of the others */
    "    popfl\n"
    "    mov $0xeeddccbb, %eax\n"
    "    mov $0xaa998877, %ebx\n"
    "    mov $0x66554433, %ecx\n"
    "    mov $0x221100fe, %edx\n"
    "    mov $0xdcba9876, %esi\n"
    "    mov $0x543210fd, %edi\n"
    "    mov $0xeca86420, %ebp\n"
    "    movl $0x102, %fs:0\n"
    "    call snapshot_not_restored\n"
    ".bss\n"
    "    .lcomm gprs_stack, 4\n"
    "    .lcomm gprs_alternate_stack, 256\n"
    "    .set gprs_alternate_stack_top, gprs_alternate_stack + 256\n"
    ".text\n");

/*
 * Catches a register or flag that is not saved, is saved late (the code behind
 * the store clobbers them all), or is put back and then overwritten by the
 * completion of the store that restored.
 */
CASE(gprs)
{
    struct gprs g;

    gdt_set(SEL_BAR, snapshot_bar, 0xfff, SEG_DATA);
    asm volatile("mov %0, %%fs" : : "r"(SEL_BAR));
    gprs_save(&g);
    check_equal("eax", g.eax, 0x11223344);
    check_equal("ebx", g.ebx, 0x55667788);
    check_equal("ecx", g.ecx, 0x99aabbcc);
    check_equal("edx", g.edx, 0xddeeff01);
    check_equal("esi", g.esi, 0x23456789);
    check_equal("edi", g.edi, 0xabcdef02);
    check_equal("ebp", g.ebp, 0x13579bdf);
    check_equal("eflags", g.eflags, GPR_FLAGS);
    if (snapshot_read(SNAPSHOT_REG_RESTORES) < repeats(option("n", 1000))) {
        gprs_restore();
    }
}

/*
 * Catches hidden segment state that is taken from the descriptor table and
 * not from the CPU: at the save %gs is loaded, and its descriptor no longer
 * says what it did then.
 */
CASE(segments)
{
    static uint32_t place[3] = { 0xa0, 0xb1, 0xc2 };
    const unsigned sel = SEL_FREE(1);
    uint32_t v, selector;

    gdt_set(sel, (uintptr_t)&place[0], 3, SEG_DATA);
    asm volatile("mov %0, %%gs" : : "r"(sel));
    gdt_set(sel, (uintptr_t)&place[1], 3, SEG_DATA);

    unsigned pass = snapshot_save();

    asm volatile("movl %%gs:0, %0; mov %%gs, %1" : "=r"(v), "=r"(selector));
    check_equal("%gs:0", v, place[0]);
    check_equal("%gs", selector, sel);
    gdt_set(sel + 8, (uintptr_t)&place[2], 3, SEG_DATA);
    asm volatile("mov %0, %%gs" : : "r"(sel + (pass & 1) * 8));
    asm volatile("movl %%gs:0, %0" : "=r"(v));
    check_equal("%gs:0 loaded anew", v, place[1 + (pass & 1)]);
    if (pass < repeats(100)) {
        snapshot_restore();
    }
}

/* ------------------------------------------------- x87, SSE, XSAVE */

static uint8_t fp_pattern[2][4096] __attribute__((aligned(64)));
static uint8_t fp_before[4096] __attribute__((aligned(64)));
static uint8_t fp_after[4096] __attribute__((aligned(64)));

/* An XSAVE image; @components of it in use, all others in initial state */
static void fp_fill(uint8_t *image, uint32_t seed, uint32_t components)
{
    uint32_t *w = (uint32_t *)image;

    for (unsigned i = 0; i < 1024; i++) {
        w[i] = random32(&seed);
    }
    /* FCW: all masked, rounding from the seed; FSW: TOP; FTW: abridged */
    w[0] = (0x037f ^ (seed & 3) << 10) | (seed >> 2 & 7) << (16 + 11);
    w[1] &= 0xff;
    w[1] |= 1;
    w[2] = w[3] = w[4] = w[5] = 0;      /* instruction and data pointers */
    w[6] = 0x1f80 ^ (seed & 0x6000);    /* MXCSR: all masked, rounding */
    w[7] = 0xffff;
    for (unsigned i = 0; i < 8; i++) {  /* normal numbers only */
        w[8 + 4 * i + 1] |= 0x80000000;
        w[8 + 4 * i + 2] &= 0x3fff;
        w[8 + 4 * i + 2] |= 1;
        w[8 + 4 * i + 3] = 0;
    }
    memset(image + 512, 0, 64);         /* the XSAVE header */
    w[128] = components;
}

static uint32_t fp_components;          /* 0: FXSAVE is all there is */

static void fp_init(void)
{
    uint32_t r[4];

    write_cr0(read_cr0() & ~(CR0_EM | CR0_TS));
    write_cr4(read_cr4() | CR4_OSFXSR | CR4_OSXMMEXCPT);
    cpuid(1, 0, r);
    if (r[2] & 1 << 26) {
        write_cr4(read_cr4() | CR4_OSXSAVE);
        cpuid(13, 0, r);
        fp_components = r[0] & 0x207;   /* x87, SSE, AVX, PKRU */
        asm volatile("xsetbv" : : "a"(fp_components), "d"(0), "c"(0));
        cpuid(13, 0, r);
        check(r[1] <= sizeof(fp_after), "XSAVE image of %u bytes", r[1]);
    }
}

static inline void fp_load(const uint8_t *image)
{
    if (fp_components) {
        asm volatile("xrstor %0" : : "m"(*image), "a"(fp_components), "d"(0));
    } else {
        asm volatile("fxrstor %0" : : "m"(*image));
    }
}

static inline void fp_store(uint8_t *image)
{
    if (fp_components) {
        asm volatile("xsave %0"
                     : "=m"(*image) : "a"(fp_components), "d"(0) : "memory");
    } else {
        asm volatile("fxsave %0" : "=m"(*image) : : "memory");
    }
}

static void fp_round_trip(uint32_t saved, uint32_t later)
{
    /*
     * RAM reverts, so the second pattern is the same in every pass: it is
     * what the registers hold when a restore begins.
     */
    fp_fill(fp_pattern[0], 0x1234567, saved);
    fp_fill(fp_pattern[1], 0x7654321, later);
    memset(fp_before, 0, sizeof(fp_before));
    memset(fp_after, 0, sizeof(fp_after));
    fp_load(fp_pattern[0]);
    fp_store(fp_before);

    unsigned pass = snapshot_save();

    fp_store(fp_after);
    for (unsigned i = 0; i < sizeof(fp_after); i++) {
        check(fp_after[i] == fp_before[i],
              "byte %u of the XSAVE image is %x, not %x, in pass %u, components"
              " %x over %x", i, fp_after[i], fp_before[i], pass, saved, later);
    }
    fp_load(fp_pattern[1]);
    fp_store(fp_after);
    check(memcmp(fp_after, fp_before, 512), "nothing to revert");
    if (pass < repeats(50)) {
        snapshot_restore();
    }
}

/*
 * Catches x87, MXCSR, XMM, YMM or PKRU state that is not saved, and sections
 * for it that are absent from the snapshot (initial state) and so leave what
 * is there at the restore in place.
 */
CASE(fpu)
{
    fp_init();
    if (option("avx", 0)) {
        check((fp_components & 7) == 7, "components are %x", fp_components);
    }
    fp_round_trip(fp_components, fp_components);
    if (fp_components) {
        fp_round_trip(0, fp_components);
        fp_round_trip(fp_components, 0);
        fp_round_trip(fp_components & 3, fp_components & ~3);
    }
    say("components %x\n", fp_components);
}

/* ------------------------------------------------- system registers */

struct system_registers {
    uint32_t cr0, cr2, cr3, cr4, dr[4], dr7, tr, ldtr;
    struct table_pointer gdt, idt;
};

static void system_registers_read(struct system_registers *s)
{
    memset(s, 0, sizeof(*s));
    s->cr0 = read_cr0();
    s->cr2 = read_cr2();
    s->cr3 = read_cr3();
    s->cr4 = read_cr4();
    s->dr[0] = read_db0();
    s->dr[1] = read_db1();
    s->dr[2] = read_db2();
    s->dr[3] = read_db3();
    s->dr7 = read_db7();
    asm volatile("str %0" : "=r"(s->tr));
    asm volatile("sldt %0" : "=r"(s->ldtr));
    asm volatile("sgdt %0" : "=m"(s->gdt));
    asm volatile("sidt %0" : "=m"(s->idt));
}

static void system_registers_set(unsigned flavour)
{
    static uint8_t tss[2][256];
    static uint64_t other_gdt[16];
    struct table_pointer g = gdt_pointer, i;

    asm volatile("sidt %0" : "=m"(i));
    gdt_set(SEL_FREE(2), (uintptr_t)tss[0], 0xff, SEG_TSS);
    gdt_set(SEL_FREE(3), (uintptr_t)tss[1], 0xff, SEG_TSS);
    gdt_set(SEL_FREE(4), (uintptr_t)other_gdt, 63, SEG_LDT);
    memcpy(other_gdt, (void *)g.base, g.limit + 1);
    if (flavour) {
        g.base = (uintptr_t)other_gdt;
    }
    i.limit = flavour ? 0x7ff : 0x3ff;
    asm volatile("lgdt %0; lidt %1" : : "m"(g), "m"(i));
    asm volatile("ltr %w0" : : "r"(SEL_FREE(2 + flavour)));
    asm volatile("lldt %w0" : : "r"(flavour ? SEL_FREE(4) : 0));
    write_cr0((read_cr0() & ~(CR0_WP | CR0_AM | CR0_TS)) |
              (flavour ? CR0_AM : CR0_WP | CR0_TS));
    write_cr2(flavour ? 0x12345678 : 0x87654321);
    write_cr3(flavour ? 0x5000 : 0xa000);
    write_cr4((read_cr4() & ~(CR4_TSD | CR4_DE | CR4_PSE | CR4_PCE)) |
              (flavour ? CR4_TSD | CR4_PSE : CR4_DE | CR4_PCE));
    write_db0(0x1000 + flavour);
    write_db1(0x2000 + flavour);
    write_db2(0x3000 + flavour);
    write_db3(0x4000 + flavour);
    write_db7(flavour ? 0x400 : 0x33330400);
}

/*
 * Catches a control, debug or table register that does not come back, in
 * both directions.
 */
CASE(system)
{
    static struct system_registers before, after;

    for (unsigned flavour = 0; flavour < 2; flavour++) {
        system_registers_set(flavour);
        system_registers_read(&before);

        unsigned pass = snapshot_save();

        system_registers_read(&after);
        for (unsigned i = 0; i < sizeof(after); i++) {
            uint8_t got = ((uint8_t *)&after)[i];
            uint8_t want = ((uint8_t *)&before)[i];

            check(got == want, "byte %u of the system registers is %x, not %x, "
                  "in pass %u", i, got, want, pass);
        }
        system_registers_set(!flavour);
        system_registers_read(&after);
        check(memcmp(&after, &before, sizeof(after)), "nothing to revert");
        if (pass < repeats(20)) {
            snapshot_restore();
        }
    }
}

static shared32 debug_traps;

static void debug_trap(struct frame *frame)
{
    debug_traps++;
    write_db6(0);
    frame->eflags |= 0x10000;           /* RF: past an execution breakpoint */
}

static noinline void debug_target(void)
{
    asm volatile("nop");
}

/*
 * Catches breakpoints that come back as register values only: set at the save
 * they must trap after each restore, though cleared meanwhile, and the other
 * way about.
 */
CASE(breakpoint)
{
    static shared32 watched;
    static const uint32_t dr7[] = {
        0x402,                          /* none; execution at db0 */
        0x402 | 0xd0000 << 0,           /* 4 bytes written at db0 */
    };

    irq_handle(1, debug_trap);
    for (unsigned way = 0; way < 4; way++) {
        bool data = way & 1, set = way & 2;
        uint32_t on = dr7[data], off = 0x400;

        write_db0(data ? (uintptr_t)&watched : (uintptr_t)debug_target);
        write_db7(set ? on : off);
        debug_traps = 0;

        unsigned pass = snapshot_save();

        debug_target();
        watched = pass;
        check(debug_traps == set, "%u debug traps, not %u, way %u, pass %u",
              debug_traps, set, way, pass);
        write_db7(set ? off : on);
        debug_target();
        watched = pass;
        check(debug_traps == 1, "%u debug traps in all, way %u, pass %u",
              debug_traps, way, pass);
        if (pass < repeats(20)) {
            snapshot_restore();
        }
    }
    write_db7(0x400);
}

/* -------------------------------------------------------------- MSRs */

/*
 * Which bits can be flipped without upsetting the machine. Most are sections
 * of the CPU's state that are only there when not zero.
 */
static const struct {
    const char *name;
    uint32_t msr;
    uint64_t flip;
    bool required;                      /* on every CPU that QEMU makes */
} msrs[] = {
    { "SYSENTER_CS", 0x174, 0x58, true },
    { "SYSENTER_ESP", 0x175, 0x12345670, true },
    { "SYSENTER_EIP", 0x176, 0x7654320, true },
    { "PAT", 0x277, 0x0000000700000007, true },
    { "STAR", 0xc0000081, 0x0023001000000000, true },
    { "LSTAR", 0xc0000082, 0x1234560, true },
    { "CSTAR", 0xc0000083, 0x6543210, true },
    { "FMASK", 0xc0000084, 0x40700, true },
    { "FS_BASE", 0xc0000100, 0x123000, true },
    { "GS_BASE", 0xc0000101, 0x456000, true },
    { "KERNEL_GS_BASE", 0xc0000102, 0x789000, true },
    { "EFER.SCE", 0xc0000080, 1, true },
    { "MISC_ENABLE", 0x1a0, 1, false },
    { "TSC_ADJUST", 0x3b, 0x100000000, false },
    { "TSC_AUX", 0xc0000103, 0x1234, false },
    { "TSC_DEADLINE", 0x6e0, 0xfffffff0ffffffff, false },
    { "MTRR_PHYSBASE7", 0x20e, 0x80000006, true },
    { "MTRR_PHYSMASK7", 0x20f, 0xfff000800, true },
    { "MTRR_FIX4K_D8000", 0x26b, 0x0101010101010101, true },
    { "MTRR_DEF_TYPE", 0x2ff, 0x006, true },
    { "MCG_STATUS", 0x17a, 4, false },
    { "MCG_CTL", 0x17b, ~0ull, false },
    { "MC9_ADDR", 0x426, 0x1234000, false },
    { "BNDCFGS", 0xd90, 0x1003, false },
    { "XSS", 0xda0, 0x100, false },
    { "PKRS", 0x6e1, 0x55, false },
    { "UMWAIT_CONTROL", 0xe1, 0x1000, false },
    { "SPEC_CTRL", 0x48, 1, false },
    { "VIRT_SSBD", 0xc001011f, 4, false },
    { "VM_HSAVE_PA", 0xc0010117, 0x9000, false },
    { "PERF_GLOBAL_CTRL", 0x38f, 1, false },
    { "EVENTSEL0", 0x186, 0x30000, false },
    { "KVM_POLL_CONTROL", MSR_KVM_POLL, 1, false },
};

static uint64_t msr_value(unsigned i)
{
    uint64_t v = 0;

    check(rdmsr_safe(msrs[i].msr, &v), "cannot read %s", msrs[i].name);
    return v;
}

/* KVM has this one even where CPUID does not say so; QEMU ignores it then. */
static bool msr_is_offered(uint32_t msr)
{
    uint32_t r[4];

    cpuid(KVM_CPUID + 1, 0, r);
    return msr != MSR_KVM_POLL || r[0] & 1 << 12;
}

static void msrs_flip(uint64_t usable)
{
    for (unsigned i = 0; i < ARRAY_SIZE(msrs); i++) {
        if (usable >> i & 1) {
            check(wrmsr_safe(msrs[i].msr, msr_value(i) ^ msrs[i].flip),
                  "cannot write %s", msrs[i].name);
        }
    }
}

/*
 * Catches an MSR that is not saved, and above all one that was zero at the
 * save, so that its section is absent from the snapshot, and is not zero at
 * the restore: it must be zero again.
 */
CASE(msrs)
{
    uint64_t before[ARRAY_SIZE(msrs)], usable = 0, v;
    unsigned count = 0;

    for (unsigned i = 0; i < ARRAY_SIZE(msrs); i++) {
        if (msr_is_offered(msrs[i].msr) && rdmsr_safe(msrs[i].msr, &v) &&
            wrmsr_safe(msrs[i].msr, v ^ msrs[i].flip) &&
            msr_value(i) == (v ^ msrs[i].flip)) {
            check(wrmsr_safe(msrs[i].msr, v), "cannot reset %s", msrs[i].name);
            usable |= 1ull << i;
            count++;
        } else {
            check(!msrs[i].required, "no MSR %s", msrs[i].name);
        }
    }
    for (unsigned flipped = 0; flipped < 2; flipped++) {
        for (unsigned i = 0; i < ARRAY_SIZE(msrs); i++) {
            before[i] = usable >> i & 1 ? msr_value(i) : 0;
        }

        unsigned pass = snapshot_save();

        for (unsigned i = 0; i < ARRAY_SIZE(msrs); i++) {
            if (usable >> i & 1) {
                check(msr_value(i) == before[i],
                      "%s is %llx, not %llx, in pass %u",
                      msrs[i].name, msr_value(i), before[i], pass);
            }
        }
        msrs_flip(usable);
        if (pass < repeats(20)) {
            snapshot_restore();
        }
        /* and once more with them flipped at the save */
    }
    say("%u MSRs\n", count);
    for (unsigned i = 0; i < ARRAY_SIZE(msrs); i++) {
        say("%s %s\n", usable >> i & 1 ? "tested" : "absent", msrs[i].name);
    }
}

/* ------------------------------------------------------------- paging */

#define WINDOW          0x40000000u     /* virtual, mapped by window_table */

static uint32_t directory[2][1024] __attribute__((aligned(4096)));
static uint32_t window_table[2][1024] __attribute__((aligned(4096)));
static uint32_t pages[4][1024] __attribute__((aligned(4096)));

static void invalidate_page(uintptr_t addr)
{
    asm volatile("invlpg (%0)" : : "r"(addr) : "memory");
}

/* Maps all identically, but the window's first two pages in each directory */
static void paging_init(void)
{
    for (unsigned i = 0; i < 2048; i++) {
        directory[i / 1024][i % 1024] = (i % 1024) << 22 | 0x83;
    }
    for (unsigned d = 0; d < 2; d++) {
        directory[d][WINDOW >> 22] = (uintptr_t)window_table[d] | 3;
        window_table[d][0] = (uintptr_t)pages[2 * d] | 3;
        window_table[d][1] = (uintptr_t)pages[2 * d + 1] | 3;
    }
    for (unsigned i = 0; i < 4; i++) {
        pages[i][0] = 0xface0 + i;
    }
    write_cr4(read_cr4() | CR4_PSE);
    write_cr3((uintptr_t)directory[0]);
}

static void paging_refused(struct frame *frame)
{
    skip("this KVM refuses page tables of 32 bits, at %x", frame->eip);
}

/*
 * Catches a paging mode, a page table or a TLB entry of after the save that
 * survives it: the window must show what it showed at the save, with no flush
 * by the guest.
 */
CASE(paging)
{
    unsigned pass;

    paging_init();
    if (option("kvm", 0)) {
        irq_handle(13, paging_refused);
        write_cr0(read_cr0() | CR0_PG);
        write_cr0(read_cr0() & ~CR0_PG);
        irq_handle(13, NULL);
    }

    pass = snapshot_save();             /* without paging ... */
    check(!(read_cr0() & CR0_PG), "paging is on, pass %u", pass);
    check_equal("page 0", pages[0][0], 0xface0);
    write_cr0(read_cr0() | CR0_PG | CR0_WP);
    check_equal("window", mmio_read(WINDOW), 0xface0);
    mmio_write(WINDOW, pass);
    check_equal("page 0", mmio_read((uintptr_t)pages[0]), pass);
    if (pass < repeats(50)) {
        snapshot_restore();             /* ... from paging */
    }

    write_cr0(read_cr0() & ~CR0_PG);
    pages[0][0] = 0xface0;
    write_cr0(read_cr0() | CR0_PG);
    pass = snapshot_save();             /* paging, entry A, CR3 0 ... */
    check(read_cr0() & CR0_PG, "paging is off, pass %u", pass);
    check_equal("cr3", read_cr3(), (uintptr_t)directory[0]);
    check_equal("window", mmio_read(WINDOW), 0xface0);
    switch (pass % 4) {
    case 0:                             /* ... from another entry */
        window_table[0][0] = (uintptr_t)pages[1] | 3;
        invalidate_page(WINDOW);
        check_equal("window remapped", mmio_read(WINDOW), 0xface1);
        break;
    case 1:                             /* ... from another CR3 */
        write_cr3((uintptr_t)directory[1]);
        check_equal("window of cr3", mmio_read(WINDOW), 0xface2);
        break;
    case 2:                             /* ... from without paging */
        write_cr0(read_cr0() & ~CR0_PG);
        break;
    case 3:                             /* ... from global pages */
        write_cr4(read_cr4() | CR4_PGE);
        window_table[0][0] = (uintptr_t)pages[3] | 0x103;
        invalidate_page(WINDOW);
        check_equal("global window", mmio_read(WINDOW), 0xface3);
        write_cr3(read_cr3());
        check_equal("global window", mmio_read(WINDOW), 0xface3);
        break;
    }
    if (pass < repeats(200)) {
        snapshot_restore();
    }
    write_cr0(read_cr0() & ~CR0_PG);
}

/*
 * Catches a copy that KVM keeps of a page table, and a TLB entry, of after the
 * save: with CR0 and CR3 as they were, nothing else makes KVM look again. An
 * entry of the last level changes, or one of the first.
 */
CASE(page_tables)
{
    paging_init();
    if (option("kvm", 0)) {
        irq_handle(13, paging_refused);
    }
    write_cr0(read_cr0() | CR0_PG);
    irq_handle(13, NULL);
    check_equal("window before", mmio_read(WINDOW), 0xface0);

    unsigned pass = snapshot_save();

    check_equal("window", mmio_read(WINDOW), 0xface0);
    if (pass & 1) {
        directory[0][WINDOW >> 22] = (uintptr_t)window_table[1] | 3;
    } else {
        window_table[0][0] = (uintptr_t)pages[2] | 3;
    }
    invalidate_page(WINDOW);
    check_equal("window remapped", mmio_read(WINDOW), 0xface2);
    if (pass < repeats(100)) {
        snapshot_restore();
    }
    write_cr0(read_cr0() & ~CR0_PG);
}

/* ---------------------------------------------------------------- A20 */

static void a20_set(bool on)
{
    outb(0x92, (inb(0x92) & ~3) | on << 1);
}

/*
 * Catches an address line 20 that comes back in port 0x92 but not in the CPU:
 * with it off, an odd mebibyte shows the even one below. All that the guest
 * uses is in even ones; the BAR is moved there.
 */
CASE(a20)
{
    const uintptr_t even = 0x600000, odd = 0x700000;
    unsigned pass;

    snapshot_bar = 0xe0000000;
    pci_write(snapshot_devfn, 0x10, snapshot_bar);
    mmio_write(even, 0xe0e0);
    mmio_write(odd, 0x0d0d);
    for (unsigned on = 0; on < 2; on++) {
        a20_set(on);
        pass = snapshot_save();
        check(mmio_read(odd) == (on ? 0x0d0d : 0xe0e0),
              "A20 should be %u, pass %u", on, pass);
        check_equal("port 0x92", inb(0x92) & 2, on << 1);
        a20_set(!on);
        check(mmio_read(odd) == (on ? 0xe0e0 : 0x0d0d),
              "A20 cannot be %u", !on);
        if (pass < repeats(50)) {
            snapshot_restore();
        }
    }
    a20_set(true);
}

/* ---------------------------------------------------------- long mode */

asm(".text\n"
    ".code64\n"
    "long_restore:\n"
    "    mov $0x1122334455667788, %r8\n"
    "    mov %edi, %edi\n"
    "    movl $0x102, (%rdi)\n"
    "    mov $1, %eax\n"
    "    ret\n"
    "long_save:\n"                      /* returns 0: registers are right */
    "    mov %edi, %edi\n"
    "    mov $0x8877665544332211, %rax\n"
    "    mov %rax, %rbx\n"
    "    push %rbp\n"
    "    mov $0x0807060504030201, %rbp\n"
    "    lea 1(%rax), %r8\n"
    "    lea 2(%rax), %r9\n"
    "    lea 3(%rax), %r10\n"
    "    lea 4(%rax), %r11\n"
    "    lea 5(%rax), %r12\n"
    "    lea 6(%rax), %r13\n"
    "    lea 7(%rax), %r14\n"
    "    lea 8(%rax), %r15\n"
    "    movq %r15, %xmm15\n"
    "    movl $0x101, (%rdi)\n"
    "    movq %xmm15, %rcx\n"
    "    sub %r15, %rcx\n"
    "    sub %rax, %rbx\n"
    "    or %rbx, %rcx\n"
    "    lea -8(%r15), %r15\n"
    "    sub %rax, %r15\n"
    "    or %r15, %rcx\n"
    "    lea -7(%r14), %r14\n"
    "    sub %rax, %r14\n"
    "    or %r14, %rcx\n"
    "    lea -6(%r13), %r13\n"
    "    sub %rax, %r13\n"
    "    or %r13, %rcx\n"
    "    lea -5(%r12), %r12\n"
    "    sub %rax, %r12\n"
    "    or %r12, %rcx\n"
    "    lea -4(%r11), %r11\n"
    "    sub %rax, %r11\n"
    "    or %r11, %rcx\n"
    "    lea -3(%r10), %r10\n"
    "    sub %rax, %r10\n"
    "    or %r10, %rcx\n"
    "    lea -2(%r9), %r9\n"
    "    sub %rax, %r9\n"
    "    or %r9, %rcx\n"
    "    dec %r8\n"
    "    sub %rax, %r8\n"
    "    or %r8, %rcx\n"
    "    mov $0x8877665544332211, %rbx\n"
    "    sub %rbx, %rax\n"
    "    or %rax, %rcx\n"
    "    mov $0x0807060504030201, %rbx\n"
    "    sub %rbx, %rbp\n"
    "    or %rbp, %rcx\n"
    "    setnz %al\n"
    "    movzbl %al, %eax\n"
    "    pop %rbp\n"
    "    ret\n"
    ".code32\n");

/*
 * Catches a CPU mode (EFER.LMA, paging, the code segment's L bit) that does
 * not come back, and 64-bit registers that are saved by half.
 */
CASE(long_mode)
{
    void *pml4 = long_mode_page_tables();
    uint32_t r[4];
    unsigned pass;

    cpuid(0x80000001, 0, r);
    check(r[3] & 1 << 29, "no long mode");
    write_cr0(read_cr0() & ~(CR0_EM | CR0_TS));
    write_cr4(read_cr4() | CR4_OSFXSR);
    /* A KVM that cannot emulate it shall tell so now. */
    asm volatile("movd %eax, %xmm0");

    pass = snapshot_save();             /* in 32 bits ... */
    check(!(read_cr0() & CR0_PG), "paging is on");
    check(!(read_cr4() & CR4_PAE), "PAE is on");
    if (pass < repeats(100)) {
        long_mode_call(long_restore, pml4, snapshot_bar);
        snapshot_not_restored();        /* ... from 64 bits */
    }

    /* In 64 bits, from 32 */
    check_equal("registers differ",
                long_mode_call(long_save, pml4, snapshot_bar), 0);
    check(!(read_cr0() & CR0_PG), "paging is on");
    if (snapshot_read(SNAPSHOT_REG_RESTORES) < repeats(100)) {
        snapshot_restore();
    }
}
