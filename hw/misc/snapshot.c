/*
 * Snapshot device: lets the guest save the whole machine and put it back
 *
 * Registers only; docs/specs/snapshot.rst describes them.  What they start is
 * done by migration/vm-snapshot.c.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/cutils.h"
#include "qemu/log.h"
#include "qemu/module.h"
#include "qapi/clone-visitor.h"
#include "qapi/error.h"
#include "qapi/qapi-visit-migration.h"
#include "qapi/util.h"
#include "hw/qdev-properties.h"
#include "hw/qdev-properties-system.h"
#include "migration/vmstate.h"
#include "snapshot-int.h"
#include "trace.h"

static uint32_t snapshot_error(int ret)
{
    static const struct {
        int ret;
        uint32_t code;
    } errors[] = {
        { -ENOENT, SNAPSHOT_E_EMPTY },
        { -EINVAL, SNAPSHOT_E_SLOT },
        { -ENOTSUP, SNAPSHOT_E_UNSAVABLE },
        { -ESTALE, SNAPSHOT_E_CHANGED },
        { -ENOMEM, SNAPSHOT_E_NOMEM },
        { -EBUSY, SNAPSHOT_E_BUSY },
        { -ETIMEDOUT, SNAPSHOT_E_BUSY },
    };
    unsigned i;

    for (i = 0; i < ARRAY_SIZE(errors); i++) {
        if (errors[i].ret == ret) {
            return SNAPSHOT_STATUS_ERROR | errors[i].code;
        }
    }
    /* The guest does not run to see it. */
    return SNAPSHOT_STATUS_ERROR;
}

static void snapshot_done(void *opaque, VMSnapshotOp op, unsigned slot,
                          int ret)
{
    static const uint32_t status[] = {
        [VM_SNAPSHOT_SAVE] = SNAPSHOT_STATUS_SAVED,
        [VM_SNAPSHOT_RESTORE] = SNAPSHOT_STATUS_RESTORED,
        [VM_SNAPSHOT_DISCARD] = SNAPSHOT_STATUS_DISCARDED,
    };
    SnapshotState *s = opaque;
    SnapshotRequest request = s->request;

    s->request = SNAPSHOT_REQUEST_NONE;
    s->status = ret ? snapshot_error(ret) : status[op];
    trace_snapshot_done(op, s->status);
    if (s->loading) {
        /* The guest may go back to where it was saved, wherever that was. */
        s->loading = false;
        s->slot = slot;
        snapshot_run_load(s, slot, s->load_ready);
        g_clear_pointer(&s->load_ready, qapi_free_SnapshotFileReady);
        return;
    }
    snapshot_run_op_done(s, request, op, slot, ret);
}

static SnapshotFileReady *snapshot_ready(void *opaque, unsigned slot)
{
    return snapshot_run_describe(opaque, slot);
}

static void snapshot_loading(void *opaque, const SnapshotFileReady *ready)
{
    SnapshotState *s = opaque;

    s->loading = true;
    if (ready) {
        s->load_ready = QAPI_CLONE(SnapshotFileReady, ready);
    }
}

bool snapshot_has_slot(const SnapshotState *s)
{
    if (s->slot < s->slots) {
        return true;
    }
    qemu_log_mask(LOG_GUEST_ERROR, "snapshot: there is no slot %" PRIu32 "\n",
                  s->slot);
    return false;
}

int snapshot_request(SnapshotState *s, SnapshotRequest request,
                     VMSnapshotOp op, unsigned slot)
{
    int ret = vm_snapshot_request(s->engine, op, slot);

    if (!ret) {
        s->request = request;
    }
    return ret;
}

/* Give a command of the guest's to the engine.  Returns: as below */
static uint32_t snapshot_start(SnapshotState *s, VMSnapshotOp op)
{
    int ret;

    if (!snapshot_has_slot(s)) {
        return SNAPSHOT_STATUS_ERROR | SNAPSHOT_E_SLOT;
    }
    ret = snapshot_request(s, SNAPSHOT_REQUEST_COMMAND, op, s->slot);
    return ret ? snapshot_error(ret) : SNAPSHOT_STATUS_NONE;
}

/* Returns: STATUS of an error, or NONE if it will be set later */
static uint32_t snapshot_command(SnapshotState *s, uint32_t command)
{
    switch (command) {
    case SNAPSHOT_CMD_SAVE:
        return snapshot_start(s, VM_SNAPSHOT_SAVE);
    case SNAPSHOT_CMD_RESTORE:
        return snapshot_start(s, VM_SNAPSHOT_RESTORE);
    case SNAPSHOT_CMD_DISCARD:
        return snapshot_start(s, VM_SNAPSHOT_DISCARD);
    case SNAPSHOT_CMD_READY:
        return snapshot_run_ready(s);
    case SNAPSHOT_CMD_DONE:
        return snapshot_run_done(s);
    default:
        qemu_log_mask(LOG_GUEST_ERROR, "snapshot: unknown command 0x%" PRIx32
                      "\n", command);
        return SNAPSHOT_STATUS_ERROR | SNAPSHOT_E_COMMAND;
    }
}

/* The region that ADDRESS and LENGTH are of, or NULL */
static SnapshotRegion *snapshot_region(SnapshotState *s)
{
    return s->region < SNAPSHOT_REGIONS ? &s->run.regions[s->region] : NULL;
}

static uint32_t snapshot_features(const SnapshotState *s)
{
    return (vm_snapshot_ram(s->engine) == SNAPSHOT_DEVICE_RAM_DIRTY ?
            SNAPSHOT_FEATURE_DIRTY : SNAPSHOT_FEATURE_REMAP) |
        (s->channel ? SNAPSHOT_FEATURE_CHANNEL : 0) |
        (s->run.channel ? SNAPSHOT_FEATURE_CONTROL : 0);
}

static uint64_t snapshot_register(SnapshotState *s, hwaddr addr)
{
    const SnapshotRegion *region = snapshot_region(s);

    switch (addr) {
    case SNAPSHOT_REG_STATUS:
        return s->status;
    case SNAPSHOT_REG_SLOT:
        return s->slot;
    case SNAPSHOT_REG_SLOTS:
        return s->slots;
    case SNAPSHOT_REG_FEATURES:
        return snapshot_features(s);
    case SNAPSHOT_REG_ARGUMENT:
        return s->argument;
    case SNAPSHOT_REG_RESTORES:
        return vm_snapshot_restores(s->engine, s->slot);
    case SNAPSHOT_REG_PAGES:
        return vm_snapshot_last_pages(s->engine);
    case SNAPSHOT_REG_NANOSECONDS:
        return vm_snapshot_last_ns(s->engine);
    case SNAPSHOT_REG_RESULT:
        return s->result;
    case SNAPSHOT_REG_INPUT_LENGTH:
        return s->input_length;
    case SNAPSHOT_REG_REGION:
        return s->region;
    case SNAPSHOT_REG_ADDRESS:
        return region ? region->address : 0;
    case SNAPSHOT_REG_LENGTH:
        return region ? region->length : 0;
    default:
        qemu_log_mask(LOG_GUEST_ERROR, "snapshot: read of unknown register 0x%"
                      HWADDR_PRIx "\n", addr);
        return 0;
    }
}

static bool snapshot_register_is_64bit(hwaddr addr)
{
    return (addr >= SNAPSHOT_REG_ARGUMENT &&
            addr < SNAPSHOT_REG_NANOSECONDS + 8) ||
        (addr >= SNAPSHOT_REG_ADDRESS && addr < SNAPSHOT_REG_LENGTH + 8);
}

static uint64_t snapshot_read(void *opaque, hwaddr addr, unsigned size)
{
    SnapshotState *s = opaque;
    uint64_t val;

    if (snapshot_register_is_64bit(addr)) {
        val = snapshot_register(s, addr & ~7) >> (addr % 8 * 8);
    } else {
        val = snapshot_register(s, addr);
    }
    trace_snapshot_read(addr, size, val);
    return val;
}

static void snapshot_write(void *opaque, hwaddr addr, uint64_t val,
                           unsigned size)
{
    SnapshotState *s = opaque;
    SnapshotRegion *region = snapshot_region(s);
    uint32_t status;

    trace_snapshot_write(addr, size, val);
    switch (addr) {
    case SNAPSHOT_REG_COMMAND:
        status = snapshot_command(s, val);
        if (status) {
            s->status = status;
        }
        break;
    case SNAPSHOT_REG_SLOT:
        s->slot = val;
        break;
    case SNAPSHOT_REG_ARGUMENT:
    case SNAPSHOT_REG_ARGUMENT + 4:
        s->argument = deposit64(s->argument, addr % 8 * 8, size * 8, val);
        break;
    case SNAPSHOT_REG_RESULT:
        s->result = val;
        break;
    case SNAPSHOT_REG_REGION:
        s->region = val;
        break;
    case SNAPSHOT_REG_ADDRESS:
    case SNAPSHOT_REG_ADDRESS + 4:
    case SNAPSHOT_REG_LENGTH:
    case SNAPSHOT_REG_LENGTH + 4:
        if (region) {
            uint64_t *reg = addr < SNAPSHOT_REG_LENGTH ? &region->address
                                                       : &region->length;

            *reg = deposit64(*reg, addr % 8 * 8, size * 8, val);
        } else {
            qemu_log_mask(LOG_GUEST_ERROR, "snapshot: there is no region %"
                          PRIu32 "\n", s->region);
        }
        break;
    default:
        qemu_log_mask(LOG_GUEST_ERROR, "snapshot: write to read-only or "
                      "unknown register 0x%" HWADDR_PRIx "\n", addr);
        break;
    }
}

static bool snapshot_accepts(void *opaque, hwaddr addr, unsigned size,
                             bool is_write, MemTxAttrs attrs)
{
    return size == 4 || snapshot_register_is_64bit(addr);
}

static const MemoryRegionOps snapshot_ops = {
    .read = snapshot_read,
    .write = snapshot_write,
    .endianness = DEVICE_LITTLE_ENDIAN,
    .valid = {
        .min_access_size = 4,
        .max_access_size = 8,
        .accepts = snapshot_accepts,
    },
    .impl = {
        .min_access_size = 4,
        .max_access_size = 8,
    },
};

static void snapshot_reset_hold(Object *obj, ResetType type)
{
    SnapshotState *s = SNAPSHOT(obj);
    unsigned i;

    vm_snapshot_cancel(s->engine);
    /* The registers tell the guest that it was put back, and how often. */
    if (type == RESET_TYPE_SNAPSHOT_LOAD) {
        if (!vm_snapshot_in_progress(s->engine)) {
            /* It is loadvm. */
            s->request = SNAPSHOT_REQUEST_NONE;
            snapshot_run_reset(s, SNAPSHOT_ENDED_RESTORED);
        }
        return;
    }
    s->request = SNAPSHOT_REQUEST_NONE;
    /* A run may sleep and wake up. */
    if (type != RESET_TYPE_WAKEUP || s->run.state != SNAPSHOT_RUN_RUNNING) {
        snapshot_run_reset(s, SNAPSHOT_ENDED_RESET);
    }
    s->status = SNAPSHOT_STATUS_NONE;
    s->slot = 0;
    s->argument = 0;
    s->result = 0;
    s->region = 0;
    for (i = 0; i < SNAPSHOT_REGIONS; i++) {
        s->run.regions[i].address = 0;
        s->run.regions[i].length = 0;
    }
}

/* off, on or a number */
static bool snapshot_parse_verify(const char *text, uint32_t *every,
                                  Error **errp)
{
    uint64_t n;
    bool on;

    if (!text) {
        return true;
    }
    if (!parse_uint_full(text, 10, &n) && n <= UINT32_MAX) {
        *every = n;
        return true;
    }
    if (!qapi_bool_parse("verify", text, &on, NULL)) {
        error_setg(errp, "verify=%s is neither on, off nor a number", text);
        return false;
    }
    *every = on;
    return true;
}

/* Take a memory backend as the channel: region 2 */
static bool snapshot_add_channel(SnapshotState *s, Error **errp)
{
    MemoryRegion *mr;

    if (host_memory_backend_is_mapped(s->channel)) {
        error_setg(errp, "The memory of channel= is in use already");
        return false;
    }
    mr = host_memory_backend_get_memory(s->channel);
    if (!is_power_of_2(memory_region_size(mr))) {
        error_setg(errp, "The size of channel=, %" PRIu64 " bytes, is not a "
                   "power of 2", memory_region_size(mr));
        return false;
    }
    host_memory_backend_set_kept(s->channel, true);
    host_memory_backend_set_mapped(s->channel, true);
    pci_register_bar(PCI_DEVICE(s), SNAPSHOT_CHANNEL_BAR,
                     PCI_BASE_ADDRESS_SPACE_MEMORY |
                     PCI_BASE_ADDRESS_MEM_PREFETCH |
                     PCI_BASE_ADDRESS_MEM_TYPE_64, mr);
    return true;
}

/* Let restores leave the memory backends alone that keep= names */
static bool snapshot_keep(const char *ids, Error **errp)
{
    g_auto(GStrv) list = g_strsplit(ids, ":", 0);
    char **id;

    for (id = list; *id; id++) {
        Object *obj = object_resolve_path_component(object_get_objects_root(),
                                                    *id);
        HostMemoryBackend *backend =
            (void *)object_dynamic_cast(obj, TYPE_MEMORY_BACKEND);

        if (!backend) {
            error_setg(errp, "keep=%s: '%s' is not the id of a memory backend",
                       ids, *id);
            error_append_hint(errp, "Several are separated by colons.\n");
            return false;
        }
        host_memory_backend_set_kept(backend, true);
    }
    return true;
}

static void snapshot_exit(PCIDevice *pdev)
{
    SnapshotState *s = SNAPSHOT(pdev);

    snapshot_run_exit(s);
    object_unparent(OBJECT(s->engine));
}

static void snapshot_realize(PCIDevice *pdev, Error **errp)
{
    SnapshotState *s = SNAPSHOT(pdev);
    VMSnapshotConfig config = {
        .slots = s->slots,
        .ram = SNAPSHOT_DEVICE_RAM_AUTO,
        .file = s->file,
        .disks = SNAPSHOT_DEVICE_DISKS_RESTORE,
        .overlay_size = s->overlay_size,
        .overlay_dir = s->overlay_dir,
        .new_generation = s->new_generation,
        .load = s->load,
        .touched = s->touched,
        .load_slot = s->load_slot,
        .done = snapshot_done,
        .ready = snapshot_ready,
        .loading = snapshot_loading,
        .opaque = s,
    };

    if (s->ram) {
        int ram = qapi_enum_parse(&SnapshotDeviceRam_lookup, s->ram, -1, errp);

        if (ram < 0) {
            error_prepend(errp, "ram is auto, remap or dirty: ");
            return;
        }
        config.ram = ram;
    }
    if (s->disks) {
        int disks = qapi_enum_parse(&SnapshotDeviceDisks_lookup, s->disks, -1,
                                    errp);

        if (disks < 0) {
            error_prepend(errp, "disks is restore, keep or refuse: ");
            return;
        }
        config.disks = disks;
    }
    if (!snapshot_parse_verify(s->verify, &config.verify, errp)) {
        return;
    }
    if (s->keep && !snapshot_keep(s->keep, errp)) {
        return;
    }
    if (qemu_chr_fe_backend_connected(&s->control) &&
        !snapshot_run_init(s, errp)) {
        return;
    }
    s->engine = vm_snapshot_new(OBJECT(s), &config, errp);
    if (!s->engine) {
        snapshot_run_exit(s);
        return;
    }
    if (s->channel && !snapshot_add_channel(s, errp)) {
        snapshot_exit(pdev);
        return;
    }
    memory_region_init_io(&s->bar, OBJECT(s), &snapshot_ops, s, "snapshot",
                          SNAPSHOT_BAR_SIZE);
    pci_register_bar(pdev, SNAPSHOT_BAR, PCI_BASE_ADDRESS_SPACE_MEMORY,
                     &s->bar);
}

static bool snapshot_registers_needed(void *opaque)
{
    SnapshotState *s = opaque;

    return !vm_snapshot_in_progress(s->engine);
}

static int snapshot_pre_load_registers(void *opaque)
{
    SnapshotState *s = opaque;

    s->kept = (SnapshotRegisters) {
        .status = s->status,
        .slot = s->slot,
        .argument = s->argument,
        .result = s->result,
        .region = s->region,
    };
    for (unsigned i = 0; i < SNAPSHOT_REGIONS; i++) {
        s->kept.address[i] = s->run.regions[i].address;
        s->kept.length[i] = s->run.regions[i].length;
    }
    return 0;
}

/* A file of a migration that is put into a slot has those of another time. */
static int snapshot_post_load_registers(void *opaque, int version_id)
{
    SnapshotState *s = opaque;

    if (!vm_snapshot_in_progress(s->engine)) {
        return 0;
    }
    s->status = s->kept.status;
    s->slot = s->kept.slot;
    s->argument = s->kept.argument;
    s->result = s->kept.result;
    s->region = s->kept.region;
    for (unsigned i = 0; i < SNAPSHOT_REGIONS; i++) {
        s->run.regions[i].address = s->kept.address[i];
        s->run.regions[i].length = s->kept.length[i];
    }
    return 0;
}

/* Migration takes the registers along, not the snapshots. */
static const VMStateDescription vmstate_snapshot_registers = {
    .name = "snapshot/registers",
    .version_id = 1,
    .minimum_version_id = 1,
    .needed = snapshot_registers_needed,
    .pre_load = snapshot_pre_load_registers,
    .post_load = snapshot_post_load_registers,
    .fields = (const VMStateField[]) {
        VMSTATE_UINT32(status, SnapshotState),
        VMSTATE_UINT32(slot, SnapshotState),
        VMSTATE_UINT64(argument, SnapshotState),
        VMSTATE_END_OF_LIST()
    }
};

static const VMStateDescription vmstate_snapshot_region = {
    .name = "snapshot/region",
    .version_id = 1,
    .minimum_version_id = 1,
    .fields = (const VMStateField[]) {
        VMSTATE_UINT64(address, SnapshotRegion),
        VMSTATE_UINT64(length, SnapshotRegion),
        VMSTATE_END_OF_LIST()
    }
};

static bool snapshot_run_needed(void *opaque)
{
    SnapshotState *s = opaque;

    return s->run.channel && snapshot_registers_needed(s);
}

static const VMStateDescription vmstate_snapshot_run = {
    .name = "snapshot/run",
    .version_id = 1,
    .minimum_version_id = 1,
    .needed = snapshot_run_needed,
    .pre_load = snapshot_pre_load_registers,
    .post_load = snapshot_post_load_registers,
    .fields = (const VMStateField[]) {
        VMSTATE_UINT32(result, SnapshotState),
        VMSTATE_UINT32(region, SnapshotState),
        VMSTATE_STRUCT_ARRAY(run.regions, SnapshotState, SNAPSHOT_REGIONS, 1,
                             vmstate_snapshot_region, SnapshotRegion),
        VMSTATE_END_OF_LIST()
    }
};

/* A QEMU without the device could not load what has it. */
static bool snapshot_needed(void *opaque)
{
    SnapshotState *s = opaque;

    return !vm_snapshot_for_others(s->engine);
}

static const VMStateDescription vmstate_snapshot = {
    .name = "snapshot",
    .needed = snapshot_needed,
    .restore = VMSTATE_RESTORE_IN_PLACE,
    .version_id = 1,
    .minimum_version_id = 1,
    .fields = (const VMStateField[]) {
        VMSTATE_PCI_DEVICE(parent_obj, SnapshotState),
        VMSTATE_END_OF_LIST()
    },
    .subsections = (const VMStateDescription * const []) {
        &vmstate_snapshot_registers,
        &vmstate_snapshot_run,
        NULL
    }
};

static const Property snapshot_properties[] = {
    DEFINE_PROP_UINT32("slots", SnapshotState, slots, 8),
    DEFINE_PROP_STRING("ram", SnapshotState, ram),
    DEFINE_PROP_STRING("file", SnapshotState, file),
    DEFINE_PROP_STRING("verify", SnapshotState, verify),
    DEFINE_PROP_STRING("disks", SnapshotState, disks),
    DEFINE_PROP_SIZE("overlay-size", SnapshotState, overlay_size, 0),
    DEFINE_PROP_STRING("overlay-dir", SnapshotState, overlay_dir),
    DEFINE_PROP_LINK("channel", SnapshotState, channel, TYPE_MEMORY_BACKEND,
                     HostMemoryBackend *),
    DEFINE_PROP_CHR("control", SnapshotState, control),
    DEFINE_PROP_STRING("keep", SnapshotState, keep),
    DEFINE_PROP_STRING("load", SnapshotState, load),
    DEFINE_PROP_STRING("touched", SnapshotState, touched),
    DEFINE_PROP_UINT32("slot", SnapshotState, load_slot, 0),
    DEFINE_PROP_BOOL("new-generation", SnapshotState, new_generation, false),
};

static void snapshot_class_init(ObjectClass *klass, void *data)
{
    DeviceClass *dc = DEVICE_CLASS(klass);
    PCIDeviceClass *k = PCI_DEVICE_CLASS(klass);
    ResettableClass *rc = RESETTABLE_CLASS(klass);

    k->realize = snapshot_realize;
    k->exit = snapshot_exit;
    k->vendor_id = SNAPSHOT_VENDOR_ID;
    k->device_id = SNAPSHOT_DEVICE_ID;
    k->revision = SNAPSHOT_REVISION;
    k->class_id = PCI_CLASS_OTHERS;
    dc->desc = "Saves the running machine and puts it back";
    dc->vmsd = &vmstate_snapshot;
    dc->hotpluggable = false;
    device_class_set_props(dc, snapshot_properties);
    set_bit(DEVICE_CATEGORY_MISC, dc->categories);
    rc->phases.hold = snapshot_reset_hold;
}

static const TypeInfo snapshot_types[] = {
    {
        .name = TYPE_SNAPSHOT,
        .parent = TYPE_PCI_DEVICE,
        .instance_size = sizeof(SnapshotState),
        .class_init = snapshot_class_init,
        .interfaces = (InterfaceInfo[]) {
            { INTERFACE_CONVENTIONAL_PCI_DEVICE },
            { },
        },
    }
};

DEFINE_TYPES(snapshot_types)
