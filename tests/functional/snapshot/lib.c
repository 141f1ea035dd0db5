/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Snapshot test guest: console, PCI, snapshot device, interrupts, APs, fw_cfg
 */

#include "guest.h"

#define DEBUG_PORT      0xe9            /* isa-debugcon */
#define EXIT_PORT       0xf4            /* isa-debug-exit: QEMU exits 2n + 1 */
#define EXIT_PASSED     0x10
#define EXIT_FAILED     0x11

#define MULTIBOOT_CMDLINE 16            /* offset of a char * */

uintptr_t snapshot_bar;
unsigned snapshot_devfn;
uint32_t memory_top;
uintptr_t ap_stack;

static const char *command_line;
static const char *case_name = "?";

/* ------------------------------------------------ console and strings */

void *memset(void *d, int c, size_t n)
{
    void *p = d;

    asm volatile("rep stosb" : "+D"(p), "+c"(n) : "a"(c) : "memory");
    return d;
}

void *memcpy(void *d, const void *s, size_t n)
{
    void *p = d;

    asm volatile("rep movsb" : "+D"(p), "+S"(s), "+c"(n) : : "memory");
    return d;
}

int memcmp(const void *a, const void *b, size_t n)
{
    const uint8_t *p = a, *q = b;

    for (; n; n--, p++, q++) {
        if (*p != *q) {
            return *p - *q;
        }
    }
    return 0;
}

static void put_string(const char *s)
{
    while (*s) {
        outb(DEBUG_PORT, *s++);
    }
}

static void put_hex(uint64_t v)
{
    char buf[17], *p = buf + 16;

    *p = 0;
    do {
        *--p = "0123456789abcdef"[v & 15];
        v >>= 4;
    } while (v);
    put_string(p);
}

static void put_decimal(uint32_t v)
{
    char buf[11], *p = buf + 10;

    *p = 0;
    do {
        *--p = '0' + v % 10;
        v /= 10;
    } while (v);
    put_string(p);
}

void vsay(const char *fmt, va_list ap)
{
    for (; *fmt; fmt++) {
        if (*fmt != '%') {
            outb(DEBUG_PORT, *fmt);
            continue;
        }
        switch (*++fmt) {
        case 's':
            put_string(va_arg(ap, const char *));
            break;
        case 'u':
            put_decimal(va_arg(ap, uint32_t));
            break;
        case 'x':
            put_hex(va_arg(ap, uint32_t));
            break;
        case 'l':
            fmt += 2;
            put_hex(va_arg(ap, uint64_t));
            break;
        }
    }
}

void say(const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    vsay(fmt, ap);
    va_end(ap);
}

void noreturn finish(bool passed)
{
    outb(EXIT_PORT, passed ? EXIT_PASSED : EXIT_FAILED);
    for (;;) {
        asm volatile("cli; hlt");
    }
}

static void noreturn end_with(const char *word, const char *fmt, va_list ap)
{
    say("%s %s: ", word, case_name);
    vsay(fmt, ap);
    say("\n");
    finish(false);
}

void noreturn fail(const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    end_with("FAIL", fmt, ap);
}

void noreturn skip(const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    end_with("SKIP", fmt, ap);
}

/* The value that follows "<key>=" in the command line; NULL: not there */
static const char *find_option(const char *key)
{
    const char *p, *k;

    for (p = command_line; *p; p++) {
        for (k = key; *k && *p == *k; k++, p++) {
            /* match */
        }
        if (!*k && *p == '=') {
            return p + 1;
        }
        while (*p && *p != ' ') {
            p++;
        }
        if (!*p) {
            break;
        }
    }
    return NULL;
}

unsigned option(const char *key, unsigned otherwise)
{
    const char *p = find_option(key);
    unsigned v = 0;

    if (!p) {
        return otherwise;
    }
    for (; *p >= '0' && *p <= '9'; p++) {
        v = v * 10 + *p - '0';
    }
    return v;
}

unsigned repeats(unsigned n)
{
    unsigned most = option("most", n);

    return n < most ? n : most;
}

uint32_t random32(uint32_t *state)
{
    uint32_t x = *state;

    x ^= x << 13;
    x ^= x >> 17;
    x ^= x << 5;
    return *state = x;
}

/* ---------------------------------------------------------------- PCI */

#define PCI_ADDRESS     0xcf8
#define PCI_DATA        0xcfc

uint32_t pci_read(unsigned devfn, unsigned reg)
{
    outl(PCI_ADDRESS, 0x80000000u | devfn << 8 | reg);
    return inl(PCI_DATA);
}

void pci_write(unsigned devfn, unsigned reg, uint32_t v)
{
    outl(PCI_ADDRESS, 0x80000000u | devfn << 8 | reg);
    outl(PCI_DATA, v);
}

int pci_find(uint16_t vendor, uint16_t device)
{
    for (unsigned devfn = 0; devfn < 256; devfn++) {
        if (pci_read(devfn, 0) == ((uint32_t)device << 16 | vendor)) {
            return devfn;
        }
    }
    return -1;
}

uintptr_t pci_bar(unsigned devfn, unsigned bar)
{
    pci_write(devfn, 4, pci_read(devfn, 4) | 2);
    return pci_read(devfn, 0x10 + 4 * bar) & ~0xfu;
}

/* ---------------------------------------------------- snapshot device */

uint64_t snapshot_read64(unsigned reg)
{
    return snapshot_read(reg) | (uint64_t)snapshot_read(reg + 4) << 32;
}

void snapshot_region(unsigned which, const void *address, uint32_t length)
{
    snapshot_write(SNAPSHOT_REG_REGION, which);
    snapshot_write(SNAPSHOT_REG_ADDRESS, (uintptr_t)address);
    snapshot_write(SNAPSHOT_REG_ADDRESS + 4, 0);
    snapshot_write(SNAPSHOT_REG_LENGTH, length);
    snapshot_write(SNAPSHOT_REG_LENGTH + 4, 0);
}

unsigned snapshot_save(void)
{
    uint32_t status, restores;

    snapshot_write(SNAPSHOT_REG_COMMAND, SNAPSHOT_CMD_SAVE);
    status = snapshot_read(SNAPSHOT_REG_STATUS);
    restores = snapshot_read(SNAPSHOT_REG_RESTORES);
    check(status == (restores ? SNAPSHOT_STATUS_RESTORED
                              : SNAPSHOT_STATUS_SAVED),
          "status is %x after %u restores", status, restores);
    return restores;
}

void noreturn snapshot_not_restored(void)
{
    fail("ran past a restore, status %x", snapshot_read(SNAPSHOT_REG_STATUS));
}

void noreturn snapshot_restore(void)
{
    snapshot_write(SNAPSHOT_REG_COMMAND, SNAPSHOT_CMD_RESTORE);
    snapshot_not_restored();
}

/* ------------------------------------------- descriptors, interrupts */

static irq_handler *irq_handlers[256];

static struct {
    uint16_t low, selector, type, high;
} idt[256];

/* Set where rdmsr_safe() or wrmsr_safe() must go on after a #GP */
static shared32 fixup;

void irq_dispatch(struct frame *frame)
{
    if (irq_handlers[frame->vector & 0xff]) {
        irq_handlers[frame->vector & 0xff](frame);
    } else if (frame->vector == 13 && fixup) {
        frame->eip = fixup;
        fixup = 0;
    } else if (frame->vector == IRQ_BASE + 15) {
        /* Spurious: what the slave PIC had requested was masked since. */
        pic_eoi(0);
    } else {
        fail("vector %x, error %x at %x, cr2 %x", frame->vector, frame->error,
             frame->eip, read_cr2());
    }
}

bool rdmsr_safe(uint32_t msr, uint64_t *v)
{
    uint32_t ok = 0;

    asm volatile("movl $1f, %[fixup]; rdmsr; movl $1, %[ok]; 1:"
                 : [ok] "+m"(ok), [fixup] "=m"(fixup), "=A"(*v) : "c"(msr));
    fixup = 0;
    return ok;
}

bool wrmsr_safe(uint32_t msr, uint64_t v)
{
    uint32_t ok = 0;

    asm volatile("movl $1f, %[fixup]; wrmsr; movl $1, %[ok]; 1:"
                 : [ok] "+m"(ok), [fixup] "=m"(fixup)
                 : "A"(v), "c"(msr) : "memory");
    fixup = 0;
    return ok;
}

void irq_handle(uint8_t vector, irq_handler *handler)
{
    irq_handlers[vector] = handler;
}

void idt_load(void)
{
    struct table_pointer pointer = { sizeof(idt) - 1, (uintptr_t)idt };

    asm volatile("lidt %0" : : "m"(pointer));
}

static void idt_init(void)
{
    for (unsigned i = 0; i < 256; i++) {
        uintptr_t stub = (uintptr_t)irq_stubs + 16 * i;

        idt[i].low = stub;
        idt[i].selector = SEL_CODE32;
        idt[i].type = 0x8e00;           /* present, interrupt gate */
        idt[i].high = stub >> 16;
    }
    idt_load();
}

void gdt_set(unsigned selector, uint32_t base, uint32_t limit, uint8_t type)
{
    uint32_t low = (limit & 0xffff) | base << 16;
    uint32_t high = (base >> 16 & 0xff) | type << 8 | (limit & 0xf0000) |
                    0x400000 | (base & 0xff000000);

    gdt[selector / 8] = low | (uint64_t)high << 32;
}

void pic_init(void)
{
    outb(0x20, 0x11);                   /* ICW1: edge, cascade, ICW4 */
    outb(0xa0, 0x11);
    outb(0x21, IRQ_BASE);
    outb(0xa1, IRQ_BASE + 8);
    outb(0x21, 4);
    outb(0xa1, 2);
    outb(0x21, 1);
    outb(0xa1, 1);
    outb(0x21, 0xfb);                   /* all masked but the cascade */
    outb(0xa1, 0xff);
}

void pic_unmask(unsigned irq)
{
    uint16_t port = irq < 8 ? 0x21 : 0xa1;

    outb(port, inb(port) & ~(1 << (irq & 7)));
}

void pic_mask(unsigned irq)
{
    uint16_t port = irq < 8 ? 0x21 : 0xa1;

    outb(port, inb(port) | 1 << (irq & 7));
}

void pic_eoi(unsigned irq)
{
    if (irq >= 8) {
        outb(0xa0, 0x20);
    }
    outb(0x20, 0x20);
}

/* -------------------------------------------------------- APIC and APs */

static void (*ap_function)(unsigned cpu);
static shared32 ap_running;
static char ap_stacks[MAX_CPUS][4096] __attribute__((aligned(16)));

void apic_enable(void)
{
    apic_write(APIC_SVR, 0x1ff);
    apic_write(APIC_TPR, 0);
}

void apic_send(unsigned cpu, uint32_t icr)
{
    apic_write(APIC_ICR_HIGH, cpu << 24);
    apic_write(APIC_ICR, icr);
    while (apic_read(APIC_ICR) & 0x1000) {
        cpu_pause();
    }
}

unsigned cpu_count(void)
{
    unsigned n = option("cpus", 1);

    check(n <= MAX_CPUS, "%u CPUs are too many", n);
    return n;
}

void noreturn ap_main(void)
{
    unsigned cpu = apic_read(APIC_ID) >> 24;
    void (*fn)(unsigned cpu) = ap_function;

    idt_load();
    apic_enable();
    ap_running = true;
    fn(cpu);
    for (;;) {
        asm volatile("cli; hlt");
    }
}

void ap_start(unsigned cpu, void (*fn)(unsigned cpu))
{
    memcpy((void *)AP_TRAMPOLINE, ap_trampoline,
           ap_trampoline_end - ap_trampoline);
    ap_stack = (uintptr_t)ap_stacks[cpu] + sizeof(ap_stacks[cpu]);
    ap_function = fn;
    ap_running = false;
    apic_send(cpu, ICR_INIT);
    delay_us(1000);
    apic_send(cpu, ICR_SIPI | AP_TRAMPOLINE / PAGE_SIZE);
    while (!ap_running) {
        cpu_pause();
    }
}

/* --------------------------------------------------------------- time */

static uint16_t pm_timer_port;

uint32_t pm_timer(void)
{
    return inl(pm_timer_port);
}

void delay_us(unsigned us)
{
    uint32_t start = pm_timer(), ticks = us * 358 / 100 + 1;

    while (((pm_timer() - start) & 0xffffff) < ticks) {
        cpu_pause();
    }
}

/* Where the chipset keeps PAM1 ... PAM6, as a byte address in devfn 0 */
static unsigned pam_register(void)
{
    return pci_read(0, 0) == 0x12378086 ? 0x5a : 0x91;
}

void pam_write(unsigned n, uint8_t v)
{
    unsigned reg = pam_register() + n, shift = 8 * (reg & 3);
    uint32_t old = pci_read(0, reg & ~3u);

    pci_write(0, reg & ~3u, (old & ~(0xffu << shift)) | v << shift);
}

void acpi_power_off(void)
{
    outw(pm_timer_port - 4, 0x2000);    /* PM1 control: SLP_EN, S5 */
}

void acpi_suspend(void)
{
    outw(pm_timer_port - 4, 0x2400);    /* SLP_EN, S3 */
}

static void pm_timer_init(void)
{
    int devfn = pci_find(0x8086, 0x7113);       /* PIIX4's power management */

    if (devfn < 0) {
        devfn = pci_find(0x8086, 0x2918);       /* ICH9 LPC */
    }
    check(devfn >= 0, "no PM timer");
    pm_timer_port = (pci_read(devfn, 0x40) & 0xff80) + 8;
}

/* ------------------------------------------------------------- fw_cfg */

#define FW_CFG_SELECT   0x510
#define FW_CFG_DMA      0x514
#define FW_CFG_RAM_SIZE 0x03
#define FW_CFG_FILE_DIR 0x19
#define DMA_ERROR       1u
#define DMA_READ        2u
#define DMA_SELECT      8u

void fw_cfg_select(uint16_t key)
{
    outw(FW_CFG_SELECT, key);
}

void fw_cfg_dma_read(int key, void *buf, uint32_t len)
{
    struct {
        shared32 control, length, address_high, address_low;
    } dma;
    uint32_t control = DMA_READ;

    if (key >= 0) {
        control |= DMA_SELECT | (uint32_t)key << 16;
    }
    dma.control = __builtin_bswap32(control);
    dma.length = __builtin_bswap32(len);
    dma.address_high = 0;
    dma.address_low = __builtin_bswap32((uintptr_t)buf);
    outl(FW_CFG_DMA, 0);
    outl(FW_CFG_DMA + 4, __builtin_bswap32((uintptr_t)&dma));
    while (dma.control & ~__builtin_bswap32(DMA_ERROR)) {
        cpu_pause();
    }
    check(!dma.control, "fw_cfg DMA error");
}

int fw_cfg_find(const char *name, uint32_t *size)
{
    struct {
        uint32_t size;
        uint16_t select, reserved;
        char name[56];
    } file;
    uint32_t count;
    size_t len;

    for (len = 0; name[len]; len++) {
        /* strlen */
    }
    fw_cfg_dma_read(FW_CFG_FILE_DIR, &count, sizeof(count));
    for (count = __builtin_bswap32(count); count; count--) {
        fw_cfg_dma_read(-1, &file, sizeof(file));
        if (!memcmp(file.name, name, len + 1)) {
            *size = __builtin_bswap32(file.size);
            return __builtin_bswap16(file.select);
        }
    }
    return -1;
}

/* ---------------------------------------------------------- long mode */

void *long_mode_page_tables(void)
{
    static uint64_t tables[6][512] __attribute__((aligned(4096)));

    tables[0][0] = (uintptr_t)tables[1] | 3;
    for (unsigned i = 0; i < 4; i++) {
        tables[1][i] = (uintptr_t)tables[2 + i] | 3;
    }
    for (unsigned i = 0; i < 4 * 512; i++) {
        tables[2 + i / 512][i % 512] = (uint64_t)i << 21 | 0x83;
    }
    return tables[0];
}

/* ---------------------------------------------------------------- main */

void noreturn guest_main(const uint32_t *multiboot)
{
    const char *wanted;
    int devfn;

    command_line = (const char *)multiboot[MULTIBOOT_CMDLINE / 4];
    idt_init();
    pic_init();
    pm_timer_init();
    apic_enable();
    /* All of it, also what firmware reserves for itself */
    fw_cfg_dma_read(FW_CFG_RAM_SIZE, &memory_top, sizeof(memory_top));
    wanted = find_option("case");
    check(wanted, "no case= in \"%s\"", command_line);

    for (const struct guest_case *c = cases_start; c < cases_end; c++) {
        size_t len;

        for (len = 0; c->name[len] && c->name[len] == wanted[len]; len++) {
            /* match */
        }
        if (c->name[len] || (wanted[len] && wanted[len] != ' ')) {
            continue;
        }
        case_name = c->name;
        devfn = pci_find(SNAPSHOT_VENDOR_ID, SNAPSHOT_DEVICE_ID);
        check(devfn >= 0, "no snapshot device");
        snapshot_devfn = devfn;
        snapshot_bar = pci_bar(devfn, SNAPSHOT_BAR);
        c->run();
        say("PASS %s\n", case_name);
        finish(true);
    }
    fail("no case %s", wanted);
}
