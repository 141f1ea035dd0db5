/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Snapshot test guest: memory of every kind, and code in it
 */

#include "guest.h"

#define STRAY_BASE      0x800000u       /* free RAM, from 8 MiB to the top */

/* -------------------------------------------------- self-modified code */

typedef uint32_t code(void);

/* mov $imm, %eax; ret: @at may be anywhere, across pages too */
static void emit_constant(uint8_t *at, uint32_t imm)
{
    at[0] = 0xb8;
    memcpy(at + 1, &imm, 4);
    at[5] = 0xc3;
}

static void patch_constant(uint8_t *at, uint32_t imm)
{
    for (unsigned i = 0; i < 4; i++) {
        at[1 + i] = imm >> 8 * i;
        barrier();
    }
}

static inline uint32_t call(uint8_t *at)
{
    barrier();
    return ((code *)(uintptr_t)at)();
}

/*
 * Catches translated code of after the save that survives it, and stores into
 * code that go unnoticed after a restore. Three functions: one is patched in
 * place, one lies across two pages with only the second written, one has data
 * on its page and is never patched; the DMA case brings code by DMA.
 */
CASE(smc)
{
    static uint8_t area[4 * PAGE_SIZE] __attribute__((aligned(4096)));
    uint8_t *plain = area + 16;
    uint8_t *across = area + 2 * PAGE_SIZE - 2;
    uint8_t *shared = area + 3 * PAGE_SIZE;
    shared32 *data = (uint32_t *)(shared + 64);
    unsigned n = repeats(option("n", 1000));

    emit_constant(plain, 1);
    emit_constant(across, 2);
    emit_constant(shared, 3);
    *data = 4;
    check_equal("plain", call(plain), 1);
    check_equal("across", call(across), 2);

    unsigned pass = snapshot_save();

    /* A different one is called first each time, or none before patching. */
    if (pass & 1) {
        check_equal("plain", call(plain), 1);
    }
    if (pass & 2) {
        check_equal("across", call(across), 2);
    }
    if (pass & 4) {
        check_equal("shared", call(shared), 3);
    }
    check_equal("data", *data, 4);

    *data = pass;
    check_equal("shared beside written data", call(shared), 3);
    patch_constant(plain, pass + 100);
    check_equal("patched plain", call(plain), pass + 100);
    /* The immediate's first byte is on the first page, the rest is not. */
    patch_constant(across, (pass << 8) | 2);
    check_equal("patched across", call(across), (pass << 8) | 2);
    if (pass & 8) {
        patch_constant(shared, pass);
        check_equal("patched shared", call(shared), pass);
        patch_constant(shared, 3);
        check_equal("mended shared", call(shared), 3);
    }
    if (pass < n) {
        snapshot_restore();
    }
}

/*
 * The same between two slots that hold different code: what runs is the
 * code of the slot that was restored last, whichever way one goes.
 */
CASE(smc_slots)
{
    static uint8_t page[PAGE_SIZE] __attribute__((aligned(4096)));

    for (unsigned slot = 0; slot < 4; slot++) {
        emit_constant(page, 1000 + slot);
        snapshot_select(slot);

        unsigned pass = snapshot_save();

        /* All four restores of one slot return here, in its state. */
        check_equal("code of this slot", call(page), 1000 + slot);
        emit_constant(page, pass);
        check_equal("code written since", call(page), pass);
        if (pass == 0 && slot < 3) {
            continue;
        }
        if (pass == 0) {
            carry(0);
        }

        uint32_t round = carried();

        if (round < repeats(400)) {
            carry(round + 1);
            snapshot_select(round * 7 / 3 % 4);
            snapshot_restore();
        }
        break;
    }
}

/* -------------------------------------- pages that are written to at times */

#define KEPT_WORD       256             /* in each page: data */

static uint8_t *kept_page(unsigned i)
{
    return (uint8_t *)STRAY_BASE + i * PAGE_SIZE;
}

/*
 * Catches: a page that stays in the log of RAM, for it was written to each
 * time, and is not put back; one that has left the log, but is still written to
 * without a trap; translated code on such a page that survives a write to it,
 * or a restore. Each page is written to for 1 to 8 passes and then not for 1 to
 * 8; every second one has code, which is run each time.
 */
CASE(kept)
{
    unsigned n = repeats(option("n", 500));

    memset(kept_page(0), 0, 128 * PAGE_SIZE);
    for (unsigned i = 0; i < 128; i += 2) {
        emit_constant(kept_page(i), i);
    }

    unsigned pass = snapshot_save();

    for (unsigned i = 0; i < 128; i++) {
        shared32 *word = (shared32 *)(kept_page(i) + KEPT_WORD);
        unsigned on = 1 + i / 2 % 8, off = 1 + i / 16;
        bool write = pass % (on + off) < on;

        check_equal("word", *word, 0);
        if (i % 2 == 0) {
            check_equal("code", call(kept_page(i)), i);
            if (write) {
                patch_constant(kept_page(i), pass);
                check_equal("patched code", call(kept_page(i)), pass);
            }
        }
        if (write) {
            *word = pass + 1;
        }
    }
    if (pass < n) {
        snapshot_restore();
    }
}

/*
 * Pages that were written to in each of some restores are written to for ever,
 * while the host migrates the machine. Catches: one in the log that a migration
 * does not see written to.
 */
CASE(kept_migrated)
{
    unsigned pass = snapshot_save();

    for (unsigned n = 1; ; n++) {
        for (unsigned i = 0; i < 64; i++) {
            *(shared32 *)kept_page(i) = pass + n;
        }
        if (pass < 10) {
            snapshot_restore();
        }
        for (unsigned i = 0; i < 64; i++) {
            check_equal("word", *(shared32 *)kept_page(i), pass + n);
        }
        if (n % 1024 == 0) {
            say(".");
        }
    }
}

/* ------------------------------------------------------- all of RAM */

/*
 * A sum over everything a guest can see as RAM, but the stack: it is in use,
 * and what is wrong there shows anyway. Order matters to it.
 */
static uint32_t sum_range(uint32_t sum, uintptr_t from, uintptr_t to)
{
    for (const uint32_t *p = (uint32_t *)from; p < (uint32_t *)to; p++) {
        sum = (sum << 5 | sum >> 27) + *p;
    }
    return sum;
}

static noinline uint32_t sum_ram(void)
{
    uint32_t sum = 0;

    sum = sum_range(sum, 0, 0xa0000);
    sum = sum_range(sum, 0xc0000, 0x100000);
    sum = sum_range(sum, 0x100000, (uintptr_t)stack_bottom);
    return sum_range(sum, (uintptr_t)stack_top, memory_top);
}

/*
 * Catches a page that is not put back: every one of RAM and of the BIOS area
 * is summed after every restore. Writes are of 1, 4 and 16 bytes and across
 * pages, to one page and to many; what they are is different in each pass.
 */
CASE(ram)
{
    uint32_t seed = 0x2545f491, sum;
    uint32_t span = memory_top - STRAY_BASE;
    unsigned n = repeats(option("n", 30));

    /* KVM goes on writing the time to where firmware has asked for it. */
    wrmsr_safe(MSR_KVM_CLOCK, 0);
    for (uint32_t *p = (uint32_t *)STRAY_BASE; p < (uint32_t *)memory_top;
         p++) {
        *p = random32(&seed);
    }
    sum = sum_ram();

    unsigned pass = snapshot_save();

    uint32_t now = sum_ram();

    check(now == sum, "RAM sums up to %x, not %x, in pass %u", now, sum, pass);

    seed += pass * 0x9e3779b9;
    for (unsigned i = 0; i < 1u << pass % 13; i++) {
        uint8_t *p = (uint8_t *)STRAY_BASE + random32(&seed) % (span - 16);

        switch (random32(&seed) % 4) {
        case 0:
            *p ^= 0xff;
            break;
        case 1:
            *(uint32_t *)p ^= seed;
            break;
        case 2:
            memset(p, seed, 16);
            break;
        case 3:
            p = (uint8_t *)(((uintptr_t)p | 0xfff) - 1);
            if (p < (uint8_t *)memory_top - 4) {
                *(uint32_t *)p ^= seed;
            }
            break;
        }
    }
    if (pass % 10 == 9) {               /* all of it */
        memset((void *)STRAY_BASE, pass, span);
    }
    *(shared32 *)0x500 += 1;   /* and the lowest, and the last */
    *(shared32 *)(memory_top - 4) += 1;
    if (pass < n) {
        snapshot_restore();
    }
}

/* -------------------------------------------------------------- slots */

/*
 * Catches slots that share memory or state: each of eight is a different
 * machine, restored in a random order, one saved anew and some discarded on
 * the way. Also what an empty slot, a missing one and an unknown command
 * answer, and that a failed command changes nothing.
 */
static void expect_error(uint32_t command, unsigned e)
{
    snapshot_write(SNAPSHOT_REG_COMMAND, command);
    check_equal("status", snapshot_read(SNAPSHOT_REG_STATUS),
                SNAPSHOT_STATUS_ERROR | e);
}

CASE(slots)
{
    shared32 *stray = (uint32_t *)STRAY_BASE;
    unsigned slots = snapshot_read(SNAPSHOT_REG_SLOTS);
    unsigned slot, pass;
    uint32_t seed;

    check_equal("SLOT", snapshot_read(SNAPSHOT_REG_SLOT), 0);
    check_equal("SLOTS", slots, 8);
    check_equal("STATUS", snapshot_read(SNAPSHOT_REG_STATUS),
                SNAPSHOT_STATUS_NONE);
    expect_error(SNAPSHOT_CMD_RESTORE, SNAPSHOT_E_EMPTY);
    expect_error(SNAPSHOT_CMD_DISCARD, SNAPSHOT_E_EMPTY);
    expect_error(0x999, SNAPSHOT_E_COMMAND);
    snapshot_select(slots);
    expect_error(SNAPSHOT_CMD_SAVE, SNAPSHOT_E_SLOT);
    snapshot_select(0xffffffff);
    expect_error(SNAPSHOT_CMD_RESTORE, SNAPSHOT_E_SLOT);

    for (slot = 0; slot < slots; slot++) {
        stray[0] = slot * 1111;
        stray[slot * 1024 + 1024] = slot;
        write_db0(slot * 0x1000);
        snapshot_select(slot);
        pass = snapshot_save();
        check_equal("RAM of the slot", stray[0], slot * 1111);
        check_equal("RAM of the next slot", stray[slot * 1024 + 2048], 0);
        check_equal("db0 of the slot", read_db0(), slot * 0x1000);
        check_equal("SLOT", snapshot_read(SNAPSHOT_REG_SLOT), slot);
        if (pass) {
            break;
        }
    }
    /* carried: low half the round, high half the generator's state */
    if (slot == slots) {
        carry(0);
        snapshot_write(SNAPSHOT_REG_ARGUMENT + 4, 0x1234567);
    }
    stray[0] = 0xffffffff;
    stray[1024 * (slots + 1)] = 1;
    write_db0(0);
    if (carried() < repeats(200)) {
        carry(carried() + 1);
        seed = snapshot_read(SNAPSHOT_REG_ARGUMENT + 4);
        slot = random32(&seed) % slots;
        snapshot_write(SNAPSHOT_REG_ARGUMENT + 4, seed);
        snapshot_select(slot);
        snapshot_restore();
    }

    snapshot_select(3);
    snapshot_write(SNAPSHOT_REG_COMMAND, SNAPSHOT_CMD_DISCARD);
    check_equal("STATUS", snapshot_read(SNAPSHOT_REG_STATUS),
                SNAPSHOT_STATUS_DISCARDED);
    expect_error(SNAPSHOT_CMD_RESTORE, SNAPSHOT_E_EMPTY);
    pass = snapshot_save();
    check(pass < 2, "pass is %u", pass);
    if (pass == 0) {
        snapshot_restore();
    }
}

/* --------------------------------------------------- video, BIOS, DMA */

#define VBE_INDEX       0x1ce
#define VBE_DATA        0x1cf

static void vbe_write(unsigned index, uint16_t v)
{
    outw(VBE_INDEX, index);
    outw(VBE_DATA, v);
}

static void video_mode(unsigned width, unsigned height, unsigned bits)
{
    vbe_write(4, 0);
    vbe_write(1, width);
    vbe_write(2, height);
    vbe_write(3, bits);
    vbe_write(4, 0x41);                 /* enabled, linear frame buffer */
}

static uintptr_t video_memory(void)
{
    int devfn = pci_find(0x1234, 0x1111);

    check(devfn >= 0, "no VGA");
    return pci_bar(devfn, 0);
}

/*
 * Catches video memory that is forgotten, through the linear frame buffer
 * and the window at 0xa0000, and with it the mode, the palette and the window's
 * place, which are the VGA's state.
 */
CASE(vram)
{
    const uint32_t size = option("mb", 16) << 20;
    uintptr_t lfb = video_memory();
    uint32_t seed = 99, sum, got;
    uint8_t misc;

    video_mode(640, 480, 32);
    for (uint32_t i = 0; i < size; i += 4) {
        mmio_write(lfb + i, random32(&seed));
    }
    outb(0x3c8, 7);
    outb(0x3c9, 0x11);
    outb(0x3c9, 0x22);
    outb(0x3c9, 0x33);
    outb(0x3c4, 4);                     /* sequencer: chain 4 */
    outb(0x3c5, 0x0e);
    outb(0x3ce, 6);                     /* window: 64 KiB at 0xa0000 */
    outb(0x3cf, 5);
    sum = sum_range(0, lfb, lfb + size);
    got = mmio_read(0xa0000 + 0x1234);
    misc = inb(0x3cc);

    unsigned pass = snapshot_save();

    check_equal("video memory", sum_range(0, lfb, lfb + size), sum);
    check_equal("the window", mmio_read(0xa0000 + 0x1234), got);
    check_equal("misc output", inb(0x3cc), misc);
    outw(VBE_INDEX, 1);
    check_equal("width", inw(VBE_DATA), 640);
    outb(0x3c7, 7);
    check_equal("red", inb(0x3c9), 0x11);
    check_equal("green", inb(0x3c9), 0x22);
    check_equal("blue", inb(0x3c9), 0x33);

    mmio_write(lfb + pass * 4096 + 64, 0);
    mmio_write(lfb + size - 4, 0);
    if (pass & 1) {
        mmio_write(0xa0000 + 0x1234, ~got);
        video_mode(800, 600, 32);
        memset((void *)lfb, pass, 800 * 600 * 4);
    }
    if (pass & 2) {
        outb(0x3c8, 7);
        outb(0x3c9, pass);
        outb(0x3c2, misc ^ 0x0c);
        outb(0x3ce, 6);
        outb(0x3cf, 0x0d);              /* window: at 0xb8000 */
        vbe_write(5, 3);                /* bank */
    }
    if (pass < repeats(20)) {
        snapshot_restore();
    }
}

static void wait_for_host(const char *state)
{
    say("SCREEN %s\n", state);
    while (!(inb(0x3fd) & 1)) {
        cpu_pause();
    }
    inb(0x3f8);
}

/*
 * For the host to look at the screen: one picture, saved, another one, then
 * the first again by a restore. Waits for a byte on COM1 after each. Catches a
 * display that does not know what changed. It has a palette, so what is shown
 * is a copy, which QEMU updates where video memory is dirty.
 */
CASE(screen)
{
    uintptr_t lfb = video_memory();
    unsigned pass;

    video_mode(640, 480, 8);
    outb(0x3c8, 0);
    for (unsigned i = 0; i < 3 * 256; i++) {
        outb(0x3c9, i / 3 & 0x3f);
    }
    for (unsigned i = 0; i < 640 * 480; i += 4) {
        mmio_write(lfb + i, i * 0x10204);
    }
    pass = snapshot_save();
    wait_for_host(pass ? "restored" : "saved");
    for (unsigned i = 0; i < 640 * 100; i += 4) {
        mmio_write(lfb + i, 0x3f3f3f3f);
    }
    wait_for_host("changed");
    if (pass < 3) {
        snapshot_restore();
    }
}

/*
 * Catches the shadowing of the BIOS area (PAM) coming back in the register
 * but not in the memory map: RAM readable and writable at the save, ROM at the
 * restore, and the reverse. 0xd0000 to 0xd7fff is PAM3.
 */
CASE(pam)
{
    const uintptr_t at = 0xd0000;
    /*
     * RAM, or ROM: with KVM, QEMU does not protect what is read-only only as
     * an alias. kvm_mem_flags() looks at the memory region.
     */
    const uint8_t read_only = option("kvm", 0) ? 0 : 0x11;
    unsigned pass;

    pam_write(2, 0x33);                 /* read and write RAM */
    mmio_write(at, 0x12345678);
    check_equal("shadow RAM", mmio_read(at), 0x12345678);
    pass = snapshot_save();
    check_equal("shadow RAM", mmio_read(at), 0x12345678);
    mmio_write(at, pass);
    check_equal("written shadow RAM", mmio_read(at), pass);
    pam_write(2, pass & 1 ? 0 : read_only);
    mmio_write(at, 0xbad);
    check(mmio_read(at) != 0xbad, "0xd0000 is writable");
    if (pass < repeats(50)) {
        snapshot_restore();
    }

    pam_write(2, read_only);            /* at the save ... */
    pass = snapshot_save();
    mmio_write(at, 0xbad);
    check(mmio_read(at) != 0xbad, "0xd0000 is writable, pass %u", pass);
    pam_write(2, 0x33);                 /* ... writable at the restore */
    mmio_write(at, pass);
    check_equal("writable shadow RAM", mmio_read(at), pass);
    if (pass < repeats(50)) {
        snapshot_restore();
    }
}

/* What a chipset's register maps, at @here once firmware is done */
struct window {
    unsigned devfn, reg, probe;
    uint32_t value, here, there;        /* @value: to be read at @probe */
    bool port;
};

static uint32_t window_read(const struct window *w, uint32_t base)
{
    return w->port ? inw(base + w->probe) : mmio_read(base + w->probe);
}

static void check_windows(struct window *w, bool moved)
{
    for (; w->reg; w++) {
        uint32_t here = window_read(w, w->here);
        uint32_t there = window_read(w, w->there);

        check((moved ? there : here) == w->value && here != there,
              "%x:%x: %x at %x, %x at %x, moved %u", w->devfn, w->reg, here,
              w->here, there, w->there, moved);
    }
}

static void move_windows(struct window *w, bool moved)
{
    for (; w->reg; w++) {
        pci_write(w->devfn, w->reg, (moved ? w->there : w->here) | 1);
    }
}

/*
 * Catches what a chipset maps (ACPI's ports; with q35 the root complex and the
 * PCI configuration space) coming back in the register, not in the map, where a
 * register beside it changed, or the window moved.
 */
CASE(windows)
{
    struct window i440fx[] = {
        { 0x0b, 0x40, 2, 0x20, .there = 0xb000, .port = true }, { 0 }
    };
    struct window q35[] = {
        { 0xf8, 0x40, 2, 0x20, .there = 0xb000, .port = true },
        { 0xf8, 0xf0, 0x310c, 0x12345678, .there = 0xfed18000 },
        { 0, 0x60, 0, pci_read(0, 0), .there = 0x80000000 }, { 0 }
    };
    struct window *w = pci_read(0, 0) == 0x12378086 ? i440fx : q35;
    unsigned pass;

    for (unsigned i = 0; w[i].reg; i++) {
        w[i].here = pci_read(w[i].devfn, w[i].reg) & ~1u;
    }
    outw(w->here + w->probe, w->value);
    if (w == q35) {
        mmio_write(w[1].here + w[1].probe, w[1].value);
    }
    for (unsigned at_save = 0; at_save < 2; at_save++) {
        move_windows(w, at_save);
        pass = snapshot_save();
        check_windows(w, at_save);
        for (unsigned i = 0; w[i].reg; i++) {
            pci_write(w[i].devfn, 0x3c, pass & 0xff);
        }
        if (pass & 1) {
            move_windows(w, !at_save);
            check_windows(w, !at_save);
        }
        if (pass < repeats(50)) {
            snapshot_restore();
        }
    }
}

/*
 * With verify=, catches memory that only system management mode sees: on its
 * way there, the CPU writes its registers to SMRAM.
 */
CASE(smi)
{
    unsigned pass = snapshot_save();

    /* The firmware's handler returns from commands that it does not know. */
    asm volatile("outb %%al, $0xb2" : : "a"(0xff), "S"(~pass));
    if (pass < repeats(50)) {
        snapshot_restore();
    }
}

#define DMA_AREA        ((uint8_t *)0xc00000)

/*
 * Catches memory and code that QEMU itself writes, by the fw_cfg device's DMA,
 * past the CPU and its dirty tracking; also how far fw_cfg's own reading had
 * come. The blob starts with "mov $0x600d600d, %eax; ret".
 */
CASE(dma)
{
    uint32_t size, seed = 5, sum, words[2];
    int key = fw_cfg_find("opt/snapshot-test/blob", &size);

    check(key >= 0 && size >= PAGE_SIZE, "no blob");
    for (unsigned i = 0; i < size; i += 4) {
        *(uint32_t *)(DMA_AREA + i) = random32(&seed);
    }
    emit_constant(DMA_AREA, 0x01d);
    sum = sum_range(0, (uintptr_t)DMA_AREA, (uintptr_t)DMA_AREA + size);
    fw_cfg_dma_read(key, &words[0], 4);

    unsigned pass = snapshot_save();

    if (pass & 1) {
        check_equal("code", call(DMA_AREA), 0x01d);
    }
    check_equal("memory", sum_range(0, (uintptr_t)DMA_AREA,
                                    (uintptr_t)DMA_AREA + size), sum);
    fw_cfg_dma_read(-1, &words[1], 4);
    fw_cfg_dma_read(key, DMA_AREA, size);
    check_equal("code by DMA", call(DMA_AREA), 0x600d600d);
    check(!memcmp(DMA_AREA, words, sizeof(words)),
          "fw_cfg went on elsewhere: %x %x in pass %u",
          words[0], words[1], pass);
    if (pass < repeats(500)) {
        snapshot_restore();
    }
}
