/*
 * Device state in memory: save CPUs and devices, and put back what changed
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "exec/memory.h"
#include "hw/qdev-core.h"
#include "migration/misc.h"
#include "migration/register.h"
#include "system/cpus.h"
#include "system/hw_accel.h"
#include "system/reset.h"
#include "device-state.h"
#include "memory-file.h"
#include "savevm.h"
#include "trace.h"
#include "vmstate-flat.h"

/*
 * So often are sections loaded, or devices reset, because that changed others.
 * Twice is enough where two devices change each other's interrupt lines.
 */
#define ROUNDS_MAX 3

/*
 * One for each registered handler but RAM's, in the list's order.  @idstr is a
 * copy, for the handler may be gone when it is wanted.
 */
typedef struct DeviceSection {
    SaveStateEntry *se;         /* valid while the image matches */
    char *idstr;
    int section_id;
    bool present;
    VMStateRestore restore;
    DeviceState *dev;           /* NULL: of no device */
    DeviceState *root;          /* what is reset for it; NULL: nothing is */
    size_t offset;              /* in the image's @data, in bytes */
    size_t length;
    VMStateFlat *flat;          /* NULL: what is serialised is compared */
    GPtrArray *devices;         /* that touch the section, see touched_now() */
    unsigned touched;           /* then when it was as it was saved */
    char *field;                /* the first that was seen to differ */

    /* Of the present restore */
    bool changed;               /* it has to be loaded */
    bool after_reset;           /* after a reset of @root */
    bool was_reset;
} DeviceSection;

struct DeviceStateImage {
    GArray *sections;
    unsigned clock;             /* the section of it */
    bool opened;                /* of a file, and never loaded */
    bool stream;                /* then @data is that of a migration */
    char *reason;               /* of the last reset */
    GByteArray *data;
};

static bool in_memory;

bool qemu_device_state_in_memory(void)
{
    return in_memory;
}

typedef bool *InMemory;

static void in_memory_end(InMemory *begun)
{
    **begun = false;
}

G_DEFINE_AUTO_CLEANUP_CLEAR_FUNC(InMemory, in_memory_end)

static InMemory in_memory_begin(void)
{
    in_memory = true;
    return &in_memory;
}

static bool se_has_state(const SaveStateEntry *se)
{
    return se->vmsd || (se->ops && se->ops->save_state);
}

/* @is_ram is set for all that has a part that is saved while the guest runs. */
static bool se_is_guest_ram(const SaveStateEntry *se)
{
    return se->is_ram && !strcmp(se->idstr, "ram");
}

bool qemu_device_state_blocked(Error **errp)
{
    SaveStateEntry *se = NULL;

    while ((se = qemu_savevm_next_entry(se))) {
        if (se->is_ram && !se_is_guest_ram(se) &&
            (!se->ops->is_active || se->ops->is_active(se->opaque))) {
            error_setg(errp, "'%s' saves its state only to a migration stream",
                       se->idstr);
            return true;
        }
    }
    return false;
}

bool qemu_device_state_has(const void *opaque)
{
    SaveStateEntry *se = NULL;

    while ((se = qemu_savevm_next_entry(se))) {
        if (se->opaque == opaque) {
            return true;
        }
    }
    return false;
}

static void device_section_clear(void *opaque)
{
    DeviceSection *section = opaque;

    vmstate_flat_free(section->flat);
    g_ptr_array_unref(section->devices);
    g_free(section->idstr);
    g_free(section->field);
}

static DeviceSection *section_at(const DeviceStateImage *image, unsigned i)
{
    return &g_array_index(image->sections, DeviceSection, i);
}

static bool se_present(const SaveStateEntry *se)
{
    return se_has_state(se) &&
        (!se->vmsd || vmstate_section_needed(se->vmsd, se->opaque));
}

/* What vmstate_save() saves, without header and footer. */
static bool se_save_body(QEMUFile *f, SaveStateEntry *se, Error **errp)
{
    if (!se->vmsd) {
        (se->ops->save_in_memory ?: se->ops->save_state)(f, se->opaque);
    } else if (vmstate_save_state_with_err(f, se->vmsd, se->opaque, NULL,
                                           errp)) {
        error_prepend(errp, "Saving '%s' failed: ", se->idstr);
        return false;
    }
    return true;
}

/* Where a bus takes one device, the two are one, as a device of virtio is. */
static bool is_part_of_parent(const DeviceState *dev)
{
    return dev->parent_bus && BUS_GET_CLASS(dev->parent_bus)->max_dev == 1;
}

/*
 * The smallest part of the machine that a reset knows and that has @dev in it.
 * Some devices are reset by what they are attached to only, as those on USB.
 */
static DeviceState *find_root(DeviceState *dev)
{
    while (dev && (is_part_of_parent(dev) || !qemu_device_has_reset(dev))) {
        dev = dev->parent_bus ? dev->parent_bus->parent : NULL;
    }
    return dev;
}

static bool is_inside(const DeviceState *dev, const DeviceState *root)
{
    while (dev && dev != root) {
        dev = dev->parent_bus ? dev->parent_bus->parent : NULL;
    }
    return dev;
}

static int is_memory(Object *obj, void *opaque)
{
    return object_dynamic_cast(obj, TYPE_MEMORY_REGION) != NULL;
}

static int add_if_device(Object *obj, void *opaque)
{
    if (object_dynamic_cast(obj, TYPE_DEVICE)) {
        g_ptr_array_add(opaque, obj);
    }
    return 0;
}

/* With those that it is made of, and that are on no bus. */
static int add_device(DeviceState *dev, void *opaque)
{
    add_if_device(OBJECT(dev), opaque);
    object_child_foreach_recursive(OBJECT(dev), add_if_device, opaque);
    return 0;
}

/* What a guest accesses to reach @dev: what it is part of, or attached to */
static DeviceState *accessed_for(DeviceState *dev)
{
    Object *whole = object_dynamic_cast(OBJECT(dev)->parent, TYPE_DEVICE);

    if (whole) {
        return DEVICE(whole);
    }
    return dev->parent_bus &&
        !object_child_foreach(OBJECT(dev), is_memory, NULL) ?
        dev->parent_bus->parent : NULL;
}

/*
 * The devices through which a guest changes a section's, or something in it: it
 * may be accessed through what it is attached to only, as a disk of SCSI is.
 */
static GPtrArray *find_devices(const DeviceSection *section)
{
    GPtrArray *devices = g_ptr_array_new();
    DeviceState *dev = section->root ?: section->dev;

    if (section->restore >= VMSTATE_RESTORE_IF_CHANGED) {
        return devices;
    }
    if (dev) {
        qdev_walk_children(dev, add_device, NULL, NULL, NULL, devices);
    }
    while (dev && (dev = accessed_for(dev))) {
        add_if_device(OBJECT(dev), devices);
    }
    return devices;
}

static unsigned touched_now(const DeviceSection *section)
{
    unsigned i, touched = qemu_devices_resets() +
        qatomic_read(&qdev_touched_unknown);

    for (i = 0; i < section->devices->len; i++) {
        const DeviceState *dev = g_ptr_array_index(section->devices, i);

        touched += qatomic_read(&dev->touched);
    }
    return touched;
}

typedef struct FindOwner {
    const void *opaque;
    DeviceState *dev;
} FindOwner;

static int find_owner(Object *obj, void *opaque)
{
    FindOwner *find = opaque;
    size_t offset = (uintptr_t)find->opaque - (uintptr_t)obj;
    const char *type = object_get_typename(obj);

    if (!object_dynamic_cast(obj, TYPE_DEVICE) ||
        offset >= object_type_get_instance_size(type)) {
        return 0;
    }
    find->dev = DEVICE(obj);
    return 1;
}

/*
 * Some devices register what is in them as if it belonged to none.  CPUs do so,
 * too, but are not reset one by one.
 */
static DeviceState *section_device(const DeviceSection *section)
{
    const SaveStateEntry *se = section->se;
    FindOwner find = { .opaque = se->opaque, .dev = se->dev };

    if (!find.dev && section->restore < VMSTATE_RESTORE_IF_CHANGED) {
        object_child_foreach_recursive(object_get_root(), find_owner, &find);
    }
    return find.dev;
}

static bool section_save(DeviceStateImage *image, DeviceSection *section,
                         Error **errp)
{
    bool ok = se_save_body(memory_file_write(), section->se, errp);
    size_t length = 0;
    const uint8_t *data = memory_file_written(section->section_id, &length);

    if (ok && !data) {
        error_setg(errp, "Saving '%s' failed", section->se->idstr);
    } else if (ok) {
        section->length = length - sizeof(uint32_t);
        g_byte_array_append(image->data, data, length);
    }
    return ok && data;
}

static void section_flatten(DeviceSection *section)
{
    const SaveStateEntry *se = section->se;

    vmstate_flat_free(section->flat);
    section->flat = se->vmsd ?
        vmstate_flat_new(se->vmsd, se->opaque, section->present) :
        vmstate_flat_new_ops(section->idstr, se->ops, se->opaque,
                             se->version_id);
}

static void section_init(DeviceSection *section, bool flatten)
{
    const SaveStateEntry *se = section->se;

    section->idstr = g_strdup(se->idstr);
    section->restore = se->vmsd ? se->vmsd->restore : se->ops->restore;
    section->dev = section_device(section);
    section->root = find_root(section->dev);
    section->devices = find_devices(section);
    section->touched = touched_now(section);
    if (se_has_state(se) && flatten) {
        section_flatten(section);
    }
    trace_qemu_device_state_section(section->idstr, section->restore,
        section->root ? object_get_typename(OBJECT(section->root)) : "nothing",
        section->flat);
}

static DeviceStateImage *image_new(void)
{
    DeviceStateImage *image = g_new0(DeviceStateImage, 1);

    image->data = g_byte_array_new();
    image->sections = g_array_new(false, false, sizeof(DeviceSection));
    g_array_set_clear_func(image->sections, device_section_clear);
    return image;
}

DeviceStateImage *qemu_device_state_save(Error **errp)
{
    G_GNUC_UNUSED g_auto(InMemory) begun = in_memory_begin();
    g_autoptr(DeviceStateImage) image = image_new();
    SaveStateEntry *se = NULL;

    cpu_synchronize_all_states();

    while ((se = qemu_savevm_next_entry(se))) {
        DeviceSection section = {
            .se = se,
            .section_id = se->section_id,
            .present = !se_is_guest_ram(se) && se_present(se),
            .offset = image->data->len,
        };

        if (se_is_guest_ram(se)) {
            continue;
        }
        if (section.present && !section_save(image, &section, errp)) {
            return NULL;
        }
        section_init(&section, true);
        if (section.restore == VMSTATE_RESTORE_CLOCK) {
            image->clock = image->sections->len;
        }
        g_array_append_val(image->sections, section);
    }
    return g_steal_pointer(&image);
}

GArray *qemu_device_state_bytes(const DeviceStateImage *image)
{
    GArray *all = g_array_new(false, false, sizeof(DeviceStateBytes));

    for (unsigned i = 0; i < image->sections->len; i++) {
        const DeviceSection *section = section_at(image, i);
        DeviceStateBytes bytes = {
            .idstr = section->idstr,
            .instance_id = section->se->instance_id,
            .version_id = section->se->version_id,
            .data = image->data->data + section->offset,
            .length = section->length,
        };

        if (section->present) {
            g_array_append_val(all, bytes);
        }
    }
    return all;
}

static const DeviceStateBytes *find_bytes(const GArray *all,
                                          const char *idstr,
                                          uint32_t instance_id)
{
    for (unsigned i = 0; i < all->len; i++) {
        const DeviceStateBytes *bytes = &g_array_index(all, DeviceStateBytes,
                                                       i);

        if (bytes->instance_id == instance_id &&
            !strcmp(bytes->idstr, idstr)) {
            return bytes;
        }
    }
    return NULL;
}

/* Is a section of a file, if it has it, one that can be loaded? */
static bool can_load(const SaveStateEntry *se, const DeviceStateBytes *bytes,
                     Error **errp)
{
    if (!bytes && se_has_state(se) && !(se->vmsd && se->vmsd->needed)) {
        error_setg(errp, "'%s' (%u) of the machine is not in it", se->idstr,
                   se->instance_id);
        return false;
    }
    if (bytes && !se_has_state(se)) {
        error_setg(errp, "'%s' (%u) has state in it, and none in the machine",
                   se->idstr, se->instance_id);
        return false;
    }
    if (bytes && bytes->version_id != se->version_id) {
        error_setg(errp, "'%s' (%u) is of version %u in it, and %d in the "
                   "machine", se->idstr, se->instance_id, bytes->version_id,
                   se->version_id);
        return false;
    }
    return true;
}

static void append_bytes(DeviceStateImage *image, DeviceSection *section,
                         const DeviceStateBytes *bytes)
{
    const uint32_t mark = cpu_to_be32(section->section_id);

    section->length = bytes->length;
    g_byte_array_append(image->data, bytes->data, bytes->length);
    g_byte_array_append(image->data, (const uint8_t *)&mark, sizeof(mark));
}

static const DeviceSection *find_section(const DeviceStateImage *image,
                                         const DeviceStateBytes *bytes)
{
    for (unsigned i = 0; i < image->sections->len; i++) {
        const DeviceSection *section = section_at(image, i);

        if (section->se->instance_id == bytes->instance_id &&
            !strcmp(section->idstr, bytes->idstr)) {
            return section;
        }
    }
    return NULL;
}

DeviceStateImage *qemu_device_state_open(const GArray *sections, Error **errp)
{
    g_autoptr(DeviceStateImage) image = image_new();
    SaveStateEntry *se = NULL;

    image->opened = true;
    while ((se = qemu_savevm_next_entry(se))) {
        const DeviceStateBytes *bytes = find_bytes(sections, se->idstr,
                                                   se->instance_id);
        DeviceSection section = {
            .se = se,
            .section_id = se->section_id,
            .present = bytes,
            .offset = image->data->len,
        };

        if (se_is_guest_ram(se)) {
            continue;
        }
        if (!can_load(se, bytes, errp)) {
            return NULL;
        }
        if (bytes) {
            append_bytes(image, &section, bytes);
        }
        section_init(&section, false);
        g_array_append_val(image->sections, section);
    }
    for (unsigned i = 0; i < sections->len; i++) {
        const DeviceStateBytes *bytes = &g_array_index(sections,
                                                       DeviceStateBytes, i);

        if (!find_section(image, bytes)) {
            error_setg(errp, "It has '%s' (%u), which the machine has not",
                       bytes->idstr, bytes->instance_id);
            return NULL;
        }
        if (find_bytes(sections, bytes->idstr, bytes->instance_id) !=
            bytes) {
            error_setg(errp, "It has '%s' (%u) twice", bytes->idstr,
                       bytes->instance_id);
            return NULL;
        }
    }
    return g_steal_pointer(&image);
}

DeviceStateImage *qemu_device_state_open_stream(const uint8_t *data,
                                                size_t length)
{
    DeviceStateImage *image = image_new();
    SaveStateEntry *se = NULL;

    image->opened = image->stream = true;
    while ((se = qemu_savevm_next_entry(se))) {
        DeviceSection section = { .se = se, .section_id = se->section_id };

        if (!se_is_guest_ram(se)) {
            section_init(&section, false);
            g_array_append_val(image->sections, section);
        }
    }
    g_byte_array_append(image->data, data, length);
    return image;
}

bool qemu_device_state_opened(const DeviceStateImage *image)
{
    return image->opened;
}

bool qemu_device_state_is_stream(const DeviceStateImage *image)
{
    return image->stream;
}

static bool has_section_id(int section_id)
{
    SaveStateEntry *se = NULL;

    while ((se = qemu_savevm_next_entry(se))) {
        if (se->section_id == section_id) {
            return true;
        }
    }
    return false;
}

bool qemu_device_state_matches(const DeviceStateImage *image, Error **errp)
{
    SaveStateEntry *se = NULL;
    unsigned i = 0;

    while ((se = qemu_savevm_next_entry(se))) {
        const DeviceSection *saved;

        if (se_is_guest_ram(se)) {
            continue;
        }
        if (i == image->sections->len) {
            error_setg(errp, "'%s' was plugged after the save", se->idstr);
            return false;
        }
        saved = section_at(image, i);
        if (saved->section_id != se->section_id) {
            /* Both are in the order of plugging: one of them has no match. */
            if (has_section_id(saved->section_id)) {
                error_setg(errp, "'%s' was plugged after the save", se->idstr);
            } else {
                error_setg(errp, "'%s' was unplugged after the save",
                           saved->idstr);
            }
            return false;
        }
        i++;
    }
    if (i < image->sections->len) {
        error_setg(errp, "'%s' was unplugged after the save",
                   section_at(image, i)->idstr);
        return false;
    }
    return true;
}

/*
 * Serialise a section as it is now, to the memory file.
 *
 * Returns: NULL if that fails
 */
static const uint8_t *section_now(const DeviceSection *section, size_t *length)
{
    QEMUFile *f = memory_file_write();
    bool ok = !se_present(section->se) || se_save_body(f, section->se, NULL);
    const uint8_t *now = memory_file_written(section->section_id, length);

    *length -= now ? sizeof(uint32_t) : 0;
    return ok ? now : NULL;
}

static bool section_serialises_as_saved(const DeviceStateImage *image,
                                        const DeviceSection *section)
{
    size_t length = 0;
    const uint8_t *now = section_now(section, &length);

    return now && length == section->length &&
        !memcmp(now, image->data->data + section->offset, length);
}

/*
 * Once loaded, a section that is not flat is trusted to be as it was saved, as
 * all are after a reset of the machine.
 *
 * After a reset, pointers and lengths may be others that are as good: then the
 * list of steps is made anew, as it is of a section that could not be flat when
 * it was saved.
 */
static VMStateFlatState section_check(const DeviceStateImage *image,
                                      DeviceSection *section, bool loaded)
{
    VMStateFlatState state = VMSTATE_FLAT_AS_SAVED;

    if (section->flat) {
        state = vmstate_flat_check(section->flat, loaded);
    } else if (!loaded && !section_serialises_as_saved(image, section)) {
        state = VMSTATE_FLAT_OTHER_FIELDS;
    }
    if (loaded && section->after_reset &&
        (state > VMSTATE_FLAT_CHANGED || !section->flat)) {
        if (!section_serialises_as_saved(image, section)) {
            return VMSTATE_FLAT_CHANGED;
        }
        section_flatten(section);
        state = VMSTATE_FLAT_AS_SAVED;
    }
    return state;
}

static bool first_field(const DeviceStateDifference *d, void *opaque)
{
    char **field = opaque;

    *field = g_strdup(d->field);
    return false;
}

/* To find the field takes longer than a restore: once for each section */
static const char *find_field(const DeviceStateImage *image,
                              DeviceSection *section)
{
    DeviceStateDifference d = {
        .section = section->idstr,
        .vmsd = section->se->vmsd,
        .saved = image->data->data + section->offset,
        .saved_length = section->length,
    };

    if (!section->field) {
        d.found = section_now(section, &d.found_length);
        if (d.vmsd && d.saved_length && d.found_length) {
            vmstate_compare(&d, section->se->opaque, first_field,
                            &section->field);
        }
        section->field = section->field ?: g_strdup("not as it was saved");
    }
    return section->field;
}

static void tell_reason(DeviceStateImage *image, const char *section,
                        const char *what, DeviceStateWay way)
{
    g_free(image->reason);
    image->reason = g_strdup_printf("%s: %s", section, what);
    trace_qemu_device_state_reset(image->reason,
                                  way == DEVICE_STATE_RESET_MACHINE);
}

/*
 * May there be more that changed than the section tells?  Nothing is known of
 * the accesses to what is no device.
 */
static bool is_touched(const DeviceSection *section)
{
    return section->restore < VMSTATE_RESTORE_IF_CHANGED &&
        (!section->dev || touched_now(section) != section->touched);
}

/*
 * Find the sections that are not as they were saved, and those whose device has
 * to be reset for that.
 */
static DeviceStateWay find_changed(DeviceStateImage *image, bool loaded)
{
    DeviceStateWay way = DEVICE_STATE_IN_PLACE;
    unsigned i;

    for (i = 0; i < image->sections->len; i++) {
        DeviceSection *section = section_at(image, i);
        VMStateFlatState state;
        bool touched;

        if (!se_has_state(section->se) || (section->after_reset && !loaded)) {
            continue;
        }
        touched = !loaded && is_touched(section);
        if (touched) {
            state = VMSTATE_FLAT_OTHER_FIELDS;
        } else if (section->restore == VMSTATE_RESTORE_IF_ACCESSED) {
            state = VMSTATE_FLAT_AS_SAVED;
        } else {
            state = section_check(image, section, loaded);
        }
        section->changed = state != VMSTATE_FLAT_AS_SAVED;
        if (!section->changed ||
            (state == VMSTATE_FLAT_CHANGED &&
             section->restore >= VMSTATE_RESTORE_IN_PLACE)) {
            continue;
        }
        section->after_reset = true;
        way = section->dev ? DEVICE_STATE_RESET_DEVICES :
            DEVICE_STATE_RESET_MACHINE;
        tell_reason(image, section->idstr,
                    loaded ? "does not stay as it was saved" :
                    touched ? section->dev ? "was accessed" : "always" :
                    find_field(image, section), way);
        if (way == DEVICE_STATE_RESET_MACHINE) {
            break;
        }
    }
    return way;
}

DeviceStateWay qemu_device_state_choose(DeviceStateImage *image)
{
    G_GNUC_UNUSED g_auto(InMemory) begun = in_memory_begin();
    DeviceSection *clock = section_at(image, image->clock);
    DeviceStateWay way = DEVICE_STATE_RESET_MACHINE;
    unsigned i;

    if (image->opened) {
        return way;
    }
    for (i = 0; i < image->sections->len; i++) {
        section_at(image, i)->after_reset = section_at(image, i)->was_reset =
            false;
    }
    /*
     * All that KVM has is about to be written; but if it is in a nested guest
     * and was not at the save, that is told by what is read here.
     */
    cpu_synchronize_all_states();
    /* What is computed from the clock is compared at the time of the save. */
    vmstate_flat_keep(clock->flat);
    if (vmstate_flat_check(clock->flat, false) != VMSTATE_FLAT_CHANGED ||
        vmstate_flat_load(clock->flat)) {
        way = find_changed(image, false);
    }
    if (way == DEVICE_STATE_RESET_MACHINE) {
        qemu_device_state_unchoose(image);
    }
    return way;
}

void qemu_device_state_unchoose(DeviceStateImage *image)
{
    vmstate_flat_undo(section_at(image, image->clock)->flat);
}

/* Those inside are reset with it, and have to be loaded as well. */
static void reset_root(DeviceStateImage *image, DeviceState *root)
{
    unsigned i;

    for (i = 0; i < image->sections->len; i++) {
        DeviceSection *section = section_at(image, i);

        if (section->dev && is_inside(section->dev, root)) {
            section->changed = section->after_reset = section->was_reset =
                true;
        }
    }
    qemu_device_reset(root, RESET_TYPE_SNAPSHOT_LOAD);
}

/* Is another device to be reset that this one is inside of? */
static bool is_reset_by_other(const DeviceStateImage *image,
                              const DeviceState *root)
{
    unsigned i;

    for (i = 0; i < image->sections->len; i++) {
        const DeviceSection *section = section_at(image, i);

        if (section->after_reset && section->root && section->root != root &&
            is_inside(root, section->root)) {
            return true;
        }
    }
    return false;
}

bool qemu_device_state_reset(DeviceStateImage *image)
{
    G_GNUC_UNUSED g_auto(InMemory) begun = in_memory_begin();
    DeviceStateWay way = DEVICE_STATE_RESET_DEVICES;
    unsigned round, i;

    for (round = 0; way == DEVICE_STATE_RESET_DEVICES; round++) {
        if (round == ROUNDS_MAX) {
            return false;
        }
        for (i = 0; i < image->sections->len; i++) {
            DeviceSection *section = section_at(image, i);

            if (section->after_reset && !section->was_reset &&
                section->root && !is_reset_by_other(image, section->root)) {
                reset_root(image, section->root);
            }
        }
        way = find_changed(image, false);
    }
    return way != DEVICE_STATE_RESET_MACHINE;
}

static bool load_section(const DeviceStateImage *image,
                         const DeviceSection *section, Error **errp)
{
    SaveStateEntry *se = section->se;
    QEMUFile *f = memory_file_read(image->data->data + section->offset,
                                   section->length + sizeof(uint32_t));
    int ret = se->vmsd ?
        vmstate_load_state(f, se->vmsd, se->opaque, se->version_id) :
        (se->ops->load_in_memory ?: se->ops->load_state)(f, se->opaque,
                                                         se->version_id);
    bool all = memory_file_read_all(section->section_id);

    if (ret < 0) {
        error_setg_errno(errp, -ret, "Loading '%s' failed", se->idstr);
    } else if (!all) {
        error_setg(errp, "Loading '%s' left or took bytes that are not its "
                   "own", se->idstr);
    }
    return ret >= 0 && all;
}

static bool has_changed(const DeviceStateImage *image)
{
    unsigned i;

    for (i = 0; i < image->sections->len; i++) {
        if (section_at(image, i)->changed) {
            return true;
        }
    }
    return false;
}

/*
 * A section that cannot be loaded does not keep those behind it from being
 * loaded: a reset follows, which expects devices that agree with each other,
 * as a bus does with the interrupts of its devices.
 */
static bool load_changed(DeviceStateImage *image, bool *others)
{
    bool ok = true;
    unsigned i;

    for (i = 0; i < image->sections->len; i++) {
        DeviceSection *section = section_at(image, i);
        bool loaded;

        if (!section->changed) {
            continue;
        }
        trace_qemu_device_state_load(section->idstr, section->after_reset);
        *others |= section->restore != VMSTATE_RESTORE_ALONE;
        if (!section->after_reset) {
            loaded = vmstate_flat_load(section->flat);
        } else {
            loaded = !section->present || load_section(image, section, NULL);
        }
        if (!loaded) {
            tell_reason(image, section->idstr, "cannot be loaded",
                        DEVICE_STATE_RESET_MACHINE);
            ok = false;
            /* In parts only, it may not be fit to be looked at. */
            continue;
        }
        /*
         * A subsection that was absent is not loaded; if there is need of it
         * afterwards, only a reset clears what it stands for.
         */
        switch (section_check(image, section, true)) {
        case VMSTATE_FLAT_AS_SAVED:
            break;
        case VMSTATE_FLAT_CHANGED:
            /* Perhaps for what follows: loaded again, it may stay. */
            *others = true;
            break;
        default:
            tell_reason(image, section->idstr, "cannot be loaded so",
                        DEVICE_STATE_RESET_MACHINE);
            ok = false;
        }
    }
    return ok;
}

/* What was reset is as it was saved, and another image knows that it was. */
static void note_touched(DeviceStateImage *image)
{
    unsigned i;

    for (i = 0; i < image->sections->len; i++) {
        DeviceSection *section = section_at(image, i);

        if (section->after_reset) {
            section->touched = touched_now(section);
        }
    }
}

bool qemu_device_state_load_changed(DeviceStateImage *image)
{
    G_GNUC_UNUSED g_auto(InMemory) begun = in_memory_begin();
    bool others = true;
    unsigned round;

    for (round = 0; others; round++) {
        if (round == ROUNDS_MAX) {
            tell_reason(image, "some", "do not stay as they were loaded",
                        DEVICE_STATE_RESET_MACHINE);
            return false;
        }
        others = false;
        if (!load_changed(image, &others)) {
            return false;
        }
        if (others && find_changed(image, true) != DEVICE_STATE_IN_PLACE) {
            return false;
        }
        others = others && has_changed(image);
    }
    note_touched(image);
    cpu_synchronize_all_post_init();
    return true;
}

/* As a migration's, not one in memory: devices make up for what it lacks. */
static bool load_stream(const DeviceStateImage *image, Error **errp)
{
    int ret;

    cpu_synchronize_all_pre_loadvm();
    ret = qemu_load_device_state(memory_file_read(image->data->data,
                                                  image->data->len));
    /* A description of it is left. */
    memory_file_read_all(0);
    if (ret) {
        error_setg_errno(errp, -ret, "Loading the migration stream failed");
    }
    return !ret;
}

/* After a reset of the machine, and with all loaded, lists of steps heal. */
static void check_loaded(DeviceStateImage *image)
{
    for (unsigned i = 0; i < image->sections->len; i++) {
        DeviceSection *section = section_at(image, i);

        section->after_reset = true;
        if (se_has_state(section->se)) {
            section_check(image, section, true);
        }
    }
    note_touched(image);
}

static bool load_sections(DeviceStateImage *image, Error **errp)
{
    G_GNUC_UNUSED g_auto(InMemory) begun = in_memory_begin();
    unsigned i;

    cpu_synchronize_all_pre_loadvm();
    for (i = 0; i < image->sections->len; i++) {
        const DeviceSection *section = section_at(image, i);

        if (section->present && !load_section(image, section, errp)) {
            return false;
        }
    }
    if (!image->opened) {
        check_loaded(image);
    }
    cpu_synchronize_all_post_init();
    return true;
}

bool qemu_device_state_load(DeviceStateImage *image, Error **errp)
{
    return image->stream ? load_stream(image, errp)
                         : load_sections(image, errp);
}

void qemu_device_state_verify(const DeviceStateImage *image,
                              DeviceStateDifferenceFn *fn, void *opaque)
{
    G_GNUC_UNUSED g_auto(InMemory) begun = in_memory_begin();
    unsigned i;

    cpu_synchronize_all_states();

    for (i = 0; i < image->sections->len; i++) {
        const DeviceSection *section = section_at(image, i);
        DeviceStateDifference d = {
            .section = section->idstr,
            .instance = section->se->instance_id,
            .vmsd = section->se->vmsd,
            .saved = image->data->data + section->offset,
            .saved_length = section->length,
        };

        d.found = section_now(section, &d.found_length);
        if (d.found_length == d.saved_length &&
            !memcmp(d.found, d.saved, d.saved_length)) {
            continue;
        }
        if (d.vmsd && d.saved_length && d.found_length) {
            vmstate_compare(&d, section->se->opaque, fn, opaque);
        } else {
            fn(&d, opaque);
        }
    }
}

const char *qemu_device_state_reason(const DeviceStateImage *image)
{
    return image->reason;
}

size_t qemu_device_state_size(const DeviceStateImage *image)
{
    return image->data->len;
}

void qemu_device_state_free(DeviceStateImage *image)
{
    if (image) {
        g_array_unref(image->sections);
        g_byte_array_unref(image->data);
        g_free(image->reason);
        g_free(image);
    }
}
