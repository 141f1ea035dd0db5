/*
 * The snapshot engine: is the machine as it was saved?
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/util.h"
#include "exec/address-spaces.h"
#include "exec/memory.h"
#include "exec/target_page.h"
#include "hw/core/cpu.h"
#include "hw/rtc/mc146818rtc_regs.h"
#include "system/cpu-timers.h"
#include "system/kvm.h"
#include "system/system.h"
#include "trace.h"
#include "migration/vm-snapshot.h"
#include "vm-snapshot-verify.h"
#include "vmstate-compare.h"

/* Differences that are named; all are counted. */
#define NAMED_MAX 16

/* Bytes of a field that are shown. */
#define BYTES_MAX 16

static bool rtc_follows_host(void)
{
    return rtc_clock != QEMU_CLOCK_VIRTUAL;
}

static bool irqchip_is_kvms(void)
{
    return kvm_irqchip_in_kernel();
}

static bool icount_is_on(void)
{
    return icount_enabled();
}

static bool always(void)
{
    return true;
}

/* Fields that do not go back, or not to what was saved. */
static const struct Excuse {
    const char *vmsd;
    const char *field;
    size_t from, to;            /* bytes of it; 0, 0: all */
    bool (*when)(void);
    const char *reason;
} excuses[] = {
#define RUN_STATE(field) \
    { "globalstate", (field), 0, 0, always, \
      "how the machine ran at the last save, to any slot" }
    RUN_STATE("size"),
    RUN_STATE("runstate"),
#undef RUN_STATE
#define HOST_TIME(field) \
    { "timer", (field), 0, 0, icount_is_on, \
      "the host's time; the guest's is what it has executed" }
    HOST_TIME("cpu_ticks_offset"),
    HOST_TIME("cpu_clock_offset"),
#undef HOST_TIME
#define RTC_TIME(from, to) \
    { "mc146818rtc", "cmos_data", (from), (to), rtc_follows_host, \
      "the time of day is the host's" }
    RTC_TIME(RTC_SECONDS, RTC_SECONDS + 1),
    RTC_TIME(RTC_MINUTES, RTC_MINUTES + 1),
    RTC_TIME(RTC_HOURS, RTC_HOURS + 1),
    RTC_TIME(RTC_DAY_OF_WEEK, RTC_YEAR + 1),
    RTC_TIME(RTC_CENTURY, RTC_CENTURY + 1),
    RTC_TIME(RTC_IBM_PS2_CENTURY_BYTE, RTC_IBM_PS2_CENTURY_BYTE + 1),
#undef RTC_TIME
#define RTC_TIMER(field) \
    { "mc146818rtc", (field), 0, 0, rtc_follows_host, \
      "set anew, by a clock of the host's, when it is loaded" }
    RTC_TIMER("periodic_timer"),
    RTC_TIMER("next_periodic_time"),
    RTC_TIMER("update_timer"),
    RTC_TIMER("next_alarm_time"),
    RTC_TIMER("base_rtc"),
    RTC_TIMER("last_update"),
    RTC_TIMER("offset"),
#undef RTC_TIMER
    { "apic", "initial_count_load_time", 0, 0, irqchip_is_kvms,
      "when KVM was asked for the rest; it keeps the timer itself" },
#define PIC_REQUEST(field) \
    { "i8259", (field), 0, 0, irqchip_is_kvms, \
      "KVM's timer runs from when it is loaded, and may have fired since" }
    PIC_REQUEST("irr"),
    PIC_REQUEST("last_irr"),
#undef PIC_REQUEST
    { "tpm-emulator", "state_blobs.volatil.buffer", 0, 0, always,
      "what the TPM's process makes of it, with a clock that runs on" },
};

static bool is_excused(const DeviceStateDifference *d, size_t byte)
{
    unsigned i;

    for (i = 0; d->vmsd && d->field && i < ARRAY_SIZE(excuses); i++) {
        const struct Excuse *e = &excuses[i];

        if (!strcmp(d->vmsd->name, e->vmsd) && !strcmp(d->field, e->field) &&
            (!e->to || (byte >= e->from && byte < e->to)) && e->when()) {
            return true;
        }
    }
    return false;
}

bool vm_snapshot_follows_host(const VMStateDescription *vmsd,
                              const char *field)
{
    unsigned i;

    for (i = 0; i < ARRAY_SIZE(excuses); i++) {
        if (!strcmp(vmsd->name, excuses[i].vmsd) &&
            !strcmp(field, excuses[i].field) && excuses[i].when()) {
            return true;
        }
    }
    return false;
}

/* The first byte that differs and has no excuse; false: there is none. */
static bool first_difference(const DeviceStateDifference *d, size_t *byte)
{
    size_t i, n = MIN(d->saved_length, d->found_length);

    for (i = 0; i < n; i++) {
        if (d->saved[i] != d->found[i] && !is_excused(d, i)) {
            *byte = i;
            return true;
        }
    }
    *byte = n;
    return d->saved_length != d->found_length && !is_excused(d, n);
}

static char *hex(const uint8_t *bytes, size_t length, size_t from)
{
    GString *s = g_string_new(NULL);
    size_t i;

    if (length <= BYTES_MAX) {
        from = 0;
    }
    for (i = from; i < MIN(length, from + BYTES_MAX); i++) {
        g_string_append_printf(s, "%02x", bytes[i]);
    }
    return g_string_free(s, false);
}

static void count_field(SnapshotDeviceMismatches *m,
                        const DeviceStateDifference *d, size_t byte)
{
    SnapshotDeviceFieldList **tail = &m->devices;
    SnapshotDeviceField *field;
    unsigned named = 0;

    m->fields++;
    for (; *tail; tail = &(*tail)->next) {
        field = (*tail)->value;
        if (!strcmp(field->section, d->section) &&
            field->instance == d->instance &&
            !g_strcmp0(field->field, d->field)) {
            field->count++;
            return;
        }
        named++;
    }
    if (named < NAMED_MAX) {
        field = g_new0(SnapshotDeviceField, 1);
        field->section = g_strdup(d->section);
        field->instance = d->instance;
        field->field = g_strdup(d->field);
        field->offset = byte;
        field->saved = hex(d->saved, d->saved_length, byte);
        field->found = hex(d->found, d->found_length, byte);
        field->count = 1;
        QAPI_LIST_APPEND(tail, field);
    }
}

static void count_page(SnapshotDeviceMismatches *m, const char *block,
                       ram_addr_t offset, size_t byte)
{
    SnapshotDevicePageList **tail = &m->ram;
    SnapshotDevicePage *page;
    unsigned named = 0;

    m->pages++;
    for (; *tail; tail = &(*tail)->next) {
        page = (*tail)->value;
        if (page->offset == offset && !strcmp(page->block, block)) {
            page->count++;
            return;
        }
        named++;
    }
    if (named < NAMED_MAX) {
        page = g_new0(SnapshotDevicePage, 1);
        page->block = g_strdup(block);
        page->offset = offset;
        page->byte = byte;
        page->count = 1;
        QAPI_LIST_APPEND(tail, page);
    }
}

typedef struct Counters {
    SnapshotDeviceMismatches *once, *sum;
} Counters;

static void add_field(const DeviceStateDifference *d, void *opaque)
{
    Counters *c = opaque;
    size_t byte;

    if (first_difference(d, &byte)) {
        trace_vm_snapshot_field_differs(d->section, d->instance,
                                        d->field ?: "all", byte);
        count_field(c->once, d, byte);
        if (c->sum) {
            count_field(c->sum, d, byte);
        }
    }
}

static VMSnapshotHostWritesFn *host_writes;

void vm_snapshot_excuse_ram(VMSnapshotHostWritesFn *fn)
{
    host_writes = fn;
}

static bool host_wrote(const uint8_t *byte)
{
    CPUState *cpu;

    CPU_FOREACH(cpu) {
        hwaddr addr, length;
        MemoryRegionSection s;
        const uint8_t *first;

        if (!host_writes || !host_writes(cpu, &addr, &length)) {
            continue;
        }
        s = memory_region_find(get_system_memory(), addr, length);
        if (!s.mr) {
            continue;
        }
        first = memory_region_is_ram(s.mr) ?
            memory_region_get_ram_ptr(s.mr) + s.offset_within_region : NULL;
        length = int128_get64(s.size);
        memory_region_unref(s.mr);
        if (first && byte >= first && byte < first + length) {
            return true;
        }
    }
    return false;
}

static void add_page(const char *block, ram_addr_t offset,
                     const uint8_t *saved, const uint8_t *found, void *opaque)
{
    const size_t size = qemu_target_page_size();
    Counters *c = opaque;
    size_t byte = 0;

    while (saved[byte] == found[byte] || host_wrote(&found[byte])) {
        if (++byte == size) {
            return;
        }
    }
    trace_vm_snapshot_page_differs(block, offset, byte);
    count_page(c->once, block, offset, byte);
    if (c->sum) {
        count_page(c->sum, block, offset, byte);
    }
}

SnapshotDeviceMismatches *vm_snapshot_compare(const RAMSnapshot *ram,
                                              const DeviceStateImage *devices,
                                              SnapshotDeviceMismatches *sum)
{
    Counters c = { g_new0(SnapshotDeviceMismatches, 1), sum };

    /* First devices: KVM's timers do not wait, and saving may write to RAM. */
    qemu_device_state_verify(devices, add_field, &c);
    ram_snapshot_verify(ram, add_page, &c);
    return c.once;
}
