/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Snapshot test guest: what the cases stand on
 *
 * A flat 32-bit protected mode machine without paging, interrupts off, one
 * case a boot. Remember when writing one that RAM reverts, so a variable holds
 * what it held at the save; what must survive a restore goes to ARGUMENT
 * (carry()) or to the console.
 */

#ifndef SNAPSHOT_GUEST_H
#define SNAPSHOT_GUEST_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "hw/misc/snapshot-regs.h"
#include "layout.h"

#define ARRAY_SIZE(a)   (sizeof(a) / sizeof((a)[0]))
#define PAGE_SIZE       4096u
#define noreturn        __attribute__((noreturn))
#define noinline        __attribute__((noinline))

/*
 * CASE(name) { body }: a test, run when the command line names it. It passes
 * by returning.
 */
struct guest_case {
    const char *name;
    void (*run)(void);
};

#define CASE(id)                                                        \
    static void case_##id(void);                                        \
    static const struct guest_case case_entry_##id                      \
        __attribute__((used, section(".cases"), aligned(4))) =          \
        { #id, case_##id };                                             \
    static void case_##id(void)

/* What interrupts, other CPUs, devices or a restore change unannounced */
typedef volatile uint32_t shared32;

/* Port and memory-mapped I/O */
static inline uint8_t inb(uint16_t port)
{
    uint8_t v;

    asm volatile("inb %1, %0" : "=a"(v) : "Nd"(port));
    return v;
}

static inline uint16_t inw(uint16_t port)
{
    uint16_t v;

    asm volatile("inw %1, %0" : "=a"(v) : "Nd"(port));
    return v;
}

static inline uint32_t inl(uint16_t port)
{
    uint32_t v;

    asm volatile("inl %1, %0" : "=a"(v) : "Nd"(port));
    return v;
}

static inline void outb(uint16_t port, uint8_t v)
{
    asm volatile("outb %0, %1" : : "a"(v), "Nd"(port) : "memory");
}

static inline void outw(uint16_t port, uint16_t v)
{
    asm volatile("outw %0, %1" : : "a"(v), "Nd"(port) : "memory");
}

static inline void outl(uint16_t port, uint32_t v)
{
    asm volatile("outl %0, %1" : : "a"(v), "Nd"(port) : "memory");
}

static inline uint32_t mmio_read(uintptr_t addr)
{
    return *(shared32 *)addr;
}

static inline void mmio_write(uintptr_t addr, uint32_t v)
{
    *(shared32 *)addr = v;
}

static inline void barrier(void)
{
    asm volatile("" : : : "memory");
}

static inline void cpu_pause(void)
{
    asm volatile("pause" : : : "memory");
}

static inline uint64_t rdtsc(void)
{
    uint64_t v;

    asm volatile("rdtsc" : "=A"(v) : : "memory");
    return v;
}

static inline void cpuid(uint32_t leaf, uint32_t sub, uint32_t r[4])
{
    asm volatile("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3])
                 : "a"(leaf), "c"(sub));
}

#define READ_REGISTER(name)                                             \
    static inline uint32_t read_##name(void)                            \
    {                                                                   \
        uint32_t v;                                                     \
                                                                        \
        asm volatile("mov %%" #name ", %0" : "=r"(v) : : "memory");     \
        return v;                                                       \
    }
#define WRITE_REGISTER(name)                                            \
    static inline void write_##name(uint32_t v)                         \
    {                                                                   \
        asm volatile("mov %0, %%" #name : : "r"(v) : "memory");         \
    }
READ_REGISTER(cr0) WRITE_REGISTER(cr0)
READ_REGISTER(cr2) WRITE_REGISTER(cr2)
READ_REGISTER(cr3) WRITE_REGISTER(cr3)
READ_REGISTER(cr4) WRITE_REGISTER(cr4)
READ_REGISTER(db0) WRITE_REGISTER(db0)
READ_REGISTER(db1) WRITE_REGISTER(db1)
READ_REGISTER(db2) WRITE_REGISTER(db2)
READ_REGISTER(db3) WRITE_REGISTER(db3)
READ_REGISTER(db6) WRITE_REGISTER(db6)
READ_REGISTER(db7) WRITE_REGISTER(db7)

#define CR0_EM          (1u << 2)
#define CR0_TS          (1u << 3)
#define CR0_NE          (1u << 5)
#define CR0_WP          (1u << 16)
#define CR0_AM          (1u << 18)
#define CR0_PG          (1u << 31)
#define CR4_TSD         (1u << 2)
#define CR4_DE          (1u << 3)
#define CR4_PSE         (1u << 4)
#define CR4_PAE         (1u << 5)
#define CR4_PGE         (1u << 7)
#define CR4_PCE         (1u << 8)
#define CR4_OSFXSR      (1u << 9)
#define CR4_OSXMMEXCPT  (1u << 10)
#define CR4_OSXSAVE     (1u << 18)

#define MSR_TSC         0x10
#define MSR_KVM_CLOCK   0x4b564d01
#define MSR_KVM_POLL    0x4b564d05

#define KVM_CPUID       0x40000000      /* the first of KVM's own leaves */

/* False when the CPU has no such MSR or refuses the value (#GP). */
bool rdmsr_safe(uint32_t msr, uint64_t *v);
bool wrmsr_safe(uint32_t msr, uint64_t v);

/* Console, on the debug port: not part of a snapshot */
void vsay(const char *fmt, va_list ap);         /* %s %u %x %llx */
void say(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

/* Ends the machine with one line, "FAIL <case>: ...". */
void noreturn fail(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
void noreturn finish(bool passed);

/* Ends it with "SKIP <case>: ...": for what only some KVMs can do. */
void noreturn skip(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

#define check(cond, ...)                                                \
    do {                                                                \
        if (!(cond)) {                                                  \
            fail(__VA_ARGS__);                                          \
        }                                                               \
    } while (0)
#define check_equal(what, got, want)                                    \
    do {                                                                \
        uint64_t got_ = (got), want_ = (want);                          \
        check(got_ == want_, "%s is %llx, not %llx", (what), got_, want_); \
    } while (0)

void *memset(void *d, int c, size_t n);
void *memcpy(void *d, const void *s, size_t n);
int memcmp(const void *a, const void *b, size_t n);

/* A number from the command line, "key=n" */
unsigned option(const char *key, unsigned otherwise);

/* How often to restore: n times, at most as often as "most=" allows */
unsigned repeats(unsigned n);

/* xorshift; state in RAM, so that the sequence reverts as well */
uint32_t random32(uint32_t *state);

/* PCI, mechanism 1, bus 0 */
uint32_t pci_read(unsigned devfn, unsigned reg);
void pci_write(unsigned devfn, unsigned reg, uint32_t v);
int pci_find(uint16_t vendor, uint16_t device);         /* devfn, or -1 */
uintptr_t pci_bar(unsigned devfn, unsigned bar);        /* decoding enabled */

/*
 * What is at 0xc0000 + 0x8000 * @n: 0x33 is RAM, 0x11 RAM that is read-only, 0
 * what is behind PCI
 */
void pam_write(unsigned n, uint8_t v);

/* The snapshot device */
extern uintptr_t snapshot_bar;
extern unsigned snapshot_devfn;

static inline uint32_t snapshot_read(unsigned reg)
{
    return mmio_read(snapshot_bar + reg);
}

static inline void snapshot_write(unsigned reg, uint32_t v)
{
    mmio_write(snapshot_bar + reg, v);
}

uint64_t snapshot_read64(unsigned reg);

/*
 * Save to / restore from the slot in SLOT. As setjmp() does, snapshot_save()
 * returns once for the save, 0, and once for each restore, how many there have
 * been; it ends the test when STATUS and RESTORES disagree.
 */
unsigned snapshot_save(void);
void noreturn snapshot_restore(void);
void noreturn snapshot_not_restored(void);      /* past the store: fail */

static inline void snapshot_select(unsigned slot)
{
    snapshot_write(SNAPSHOT_REG_SLOT, slot);
}

/* Tell the device of a region of RAM for runs: SNAPSHOT_REGION_*. */
void snapshot_region(unsigned which, const void *address, uint32_t length);

/* The word that crosses restores */
static inline void carry(uint32_t v)
{
    snapshot_write(SNAPSHOT_REG_ARGUMENT, v);
}

static inline uint32_t carried(void)
{
    return snapshot_read(SNAPSHOT_REG_ARGUMENT);
}

/* Descriptors and interrupts */
struct frame {
    uint32_t edi, esi, ebp, esp, ebx, edx, ecx, eax;
    uint32_t vector, error, eip, cs, eflags;
};

typedef void irq_handler(struct frame *frame);

void irq_handle(uint8_t vector, irq_handler *handler);  /* NULL: unexpected */
void idt_load(void);
void gdt_set(unsigned selector, uint32_t base, uint32_t limit, uint8_t type);

#define SEG_DATA        0x93            /* present, writable, accessed */
#define SEG_TSS         0x89            /* present, 32-bit, not busy */
#define SEG_LDT         0x82

static inline void irq_enable_and_halt(void)
{
    asm volatile("sti; hlt; cli" : : : "memory");
}

/* PIC: IRQ n arrives at vector IRQ_BASE + n; all masked at the start. */
#define IRQ_BASE        0x20

void pic_init(void);
void pic_unmask(unsigned irq);
void pic_mask(unsigned irq);
void pic_eoi(unsigned irq);

/* Local APIC */
#define APIC_BASE       0xfee00000u
#define APIC_ID         0x020
#define APIC_TPR        0x080
#define APIC_EOI        0x0b0
#define APIC_LDR        0x0d0
#define APIC_SVR        0x0f0
#define APIC_ISR        0x100
#define APIC_IRR        0x200
#define APIC_ICR        0x300
#define APIC_ICR_HIGH   0x310
#define APIC_LVT_TIMER  0x320
#define APIC_TIMER_INIT 0x380
#define APIC_TIMER_NOW  0x390
#define APIC_TIMER_DIV  0x3e0

static inline uint32_t apic_read(unsigned reg)
{
    return mmio_read(APIC_BASE + reg);
}

static inline void apic_write(unsigned reg, uint32_t v)
{
    mmio_write(APIC_BASE + reg, v);
}

void apic_enable(void);
void apic_send(unsigned cpu, uint32_t icr);     /* waits until accepted */

#define ICR_FIXED       0x4000u                 /* | vector */
#define ICR_INIT        0x4500u
#define ICR_SIPI        0x4600u                 /* | page */

/*
 * Application processors. The ids are 0 to n - 1; ap_start() sends INIT and
 * SIPI, waits until @fn runs there, on a stack of its own, and returns.
 */
#define MAX_CPUS        8

unsigned cpu_count(void);                       /* from "cpus=" */
void ap_start(unsigned cpu, void (*fn)(unsigned cpu));

/* ACPI's PM timer: 3579545 Hz, 24 bits */
uint32_t pm_timer(void);
void delay_us(unsigned us);

void acpi_power_off(void);                      /* takes a while */
void acpi_suspend(void);

/* fw_cfg by DMA: reads @len bytes of @key on from where it is selected. */
int fw_cfg_find(const char *name, uint32_t *size);      /* key, or -1 */
void fw_cfg_select(uint16_t key);
void fw_cfg_dma_read(int key, void *buf, uint32_t len); /* -1: no select */

/* Page tables for long mode: the low 4 GiB, identical */
void *long_mode_page_tables(void);

/* In start.S */
struct table_pointer {
    uint16_t limit;
    uint32_t base;
} __attribute__((packed));

extern uint64_t gdt[];
extern struct table_pointer gdt_pointer;
extern const char irq_stubs[], ap_trampoline[], ap_trampoline_end[];
extern char stack_bottom[], stack_top[];

/*
 * Calls the 64-bit @fn(@argument) and returns its %eax, in 32 bits and
 * without paging.
 */
uint32_t long_mode_call(void (*fn)(void), void *pml4, uint32_t argument);

/* In guest.ld */
extern const struct guest_case cases_start[], cases_end[];
extern char guest_end[];

extern uint32_t memory_top;                     /* bytes of RAM below 4 GiB */

/* Assembly beside the cases */
struct gprs;
void gprs_save(struct gprs *captured);
void gprs_restore(void);
void long_restore(void);
void long_save(void);
void svm_guest(void), svm_reader(void);

#endif /* SNAPSHOT_GUEST_H */
