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
#include "migration/vm-snapshot-state.h"
#include "trace.h"
#include "vm-snapshot-int.h"

/* Differences that are named; all are counted. */
#define NAMED_MAX 16

/* Bytes of a field that are shown. */
#define BYTES_MAX 16

/* Does the byte follow the host, so that it need not go back? */
static bool follows_host(const DeviceStateDifference *d, size_t byte)
{
    const VMStateHostField *h = d->vmsd ? d->vmsd->host_fields : NULL;

    for (; d->field && h && h->name; h++) {
        if (!strcmp(d->field, h->name) &&
            (!h->to || (byte >= h->from && byte < h->to)) &&
            (!h->when || h->when())) {
            return true;
        }
    }
    return false;
}

/* The first byte that differs and should not; false: there is none. */
static bool first_difference(const DeviceStateDifference *d, size_t *byte)
{
    size_t i, n = MIN(d->saved_length, d->found_length);

    for (i = 0; i < n; i++) {
        if (d->saved[i] != d->found[i] && !follows_host(d, i)) {
            *byte = i;
            return true;
        }
    }
    *byte = n;
    return d->saved_length != d->found_length && !follows_host(d, n);
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

static bool add_field(const DeviceStateDifference *d, void *opaque)
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
    return true;
}

static VMSnapshotHostWritesFn *host_writes;

void vm_snapshot_exempt_ram(VMSnapshotHostWritesFn *fn)
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

static void name_disk(SnapshotDeviceMismatches *m, const char *device)
{
    strList **tail = &m->disks;

    for (; *tail; tail = &(*tail)->next) {
        if (!strcmp((*tail)->value, device)) {
            return;
        }
    }
    QAPI_LIST_APPEND(tail, g_strdup(device));
}

static void add_disk(const char *device, void *opaque)
{
    Counters *c = opaque;

    trace_vm_snapshot_disk_differs(device);
    name_disk(c->once, device);
    if (c->sum) {
        name_disk(c->sum, device);
    }
}

SnapshotDeviceMismatches *vm_snapshot_compare(const RAMSnapshot *ram,
                                              const DeviceStateImage *devices,
                                              const VMSnapshotDisks *disks,
                                              SnapshotDeviceMismatches *sum)
{
    Counters c = { g_new0(SnapshotDeviceMismatches, 1), sum };

    /* First devices: KVM's timers do not wait, and saving may write to RAM. */
    qemu_device_state_verify(devices, add_field, &c);
    ram_snapshot_verify(ram, add_page, &c);
    vm_snapshot_disks_verify(disks, add_disk, &c);
    return c.once;
}
