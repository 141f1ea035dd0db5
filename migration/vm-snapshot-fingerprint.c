/*
 * The snapshot engine: what a machine is made of, to compare it with another
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/qapi-builtin-types.h"
#include "hw/boards.h"
#include "hw/core/cpu.h"
#include "hw/qdev-core.h"
#include "hw/qdev-properties-system.h"
#include "hw/qdev-properties.h"
#include "qemu/accel.h"
#include "vm-snapshot-int.h"

/*
 * What the guest sees of a device is in properties of these types.  What the
 * host gives to it, as a file or a connection, may be another one.
 */
static bool is_compared(const char *type)
{
    static const char *const types[] = {
        "bool", "uint8", "uint16", "uint32", "uint64", "int32", "int64",
        "size", "OnOffAuto",
    };

    for (unsigned i = 0; i < ARRAY_SIZE(types); i++) {
        if (!strcmp(type, types[i])) {
            return true;
        }
    }
    return false;
}

static int compare_lines(gconstpointer a, gconstpointer b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/*
 * Properties as they were when the machine began.  Some are registers, too, and
 * are what the guest has made of them.  A device that was plugged later may
 * have the place of another one.
 */
static GHashTable *at_start;

static void add_property(GPtrArray *lines, Object *obj, const char *path,
                         const char *name)
{
    g_autofree char *key = g_strdup_printf("%s.%s", path, name);
    const char *value = at_start && !DEVICE(obj)->hotplugged ?
        g_hash_table_lookup(at_start, key) : NULL;
    g_autofree char *now = NULL;

    if (!value) {
        value = now = object_property_print(obj, name, false, NULL);
    }
    if (value) {
        g_ptr_array_add(lines, g_strdup_printf("%s=%s", key, value));
    }
}

/* The user's: others, as "realized", tell nothing or change with time. */
static void add_device_properties(GPtrArray *lines, Object *obj,
                                  const char *path)
{
    ObjectClass *oc = object_get_class(obj);

    for (; oc && object_class_dynamic_cast(oc, TYPE_DEVICE);
         oc = object_class_get_parent(oc)) {
        const DeviceClass *dc = DEVICE_CLASS(oc);

        for (unsigned i = 0; i < dc->props_count_; i++) {
            const Property *p = &dc->props_[i];

            if (is_compared(p->info->type) || p->info == &qdev_prop_pci_devfn) {
                add_property(lines, obj, path, p->name);
            }
        }
    }
}

/* A CPU's features are properties of their own. */
static void add_cpu_features(GPtrArray *lines, Object *obj, const char *path)
{
    static const char *const states[] = {
        "realized", "hotplugged", "hotpluggable", "start-powered-off",
    };
    ObjectPropertyIterator iter;
    ObjectProperty *p;

    object_property_iter_init(&iter, obj);
    while ((p = object_property_iter_next(&iter))) {
        bool is_state = false;

        for (unsigned i = 0; i < ARRAY_SIZE(states); i++) {
            is_state |= !strcmp(p->name, states[i]);
        }
        if (!is_state && is_compared(p->type)) {
            add_property(lines, obj, path, p->name);
        }
    }
}

static int add_object(Object *obj, void *opaque)
{
    g_autofree char *path = NULL;

    /* The device that saves may be another one, as of another process. */
    if (!object_dynamic_cast(obj, TYPE_DEVICE) ||
        object_resolve_path_component(obj, "engine")) {
        return 0;
    }
    path = object_get_canonical_path(obj);
    /* In the order of the lines, this comes before what is made of it. */
    g_ptr_array_add(opaque, g_strdup_printf("%s (%s)", path,
                                            object_get_typename(obj)));
    add_device_properties(opaque, obj, path);
    if (object_dynamic_cast(obj, TYPE_CPU)) {
        add_cpu_features(opaque, obj, path);
    }
    return 0;
}

void vm_snapshot_fingerprint_init(void)
{
    g_autoptr(strList) list = vm_snapshot_fingerprint();

    at_start = g_hash_table_new_full(g_str_hash, g_str_equal, g_free, g_free);
    for (const strList *l = list; l; l = l->next) {
        const char *value = strchr(l->value, '=');

        if (value) {
            g_hash_table_insert(at_start,
                                g_strndup(l->value, value - l->value),
                                g_strdup(value + 1));
        }
    }
}

strList *vm_snapshot_fingerprint(void)
{
    g_autoptr(GPtrArray) lines = g_ptr_array_new();
    strList *list = NULL, **tail = &list;
    const char *last = "";

    object_child_foreach_recursive(OBJECT(current_machine), add_object, lines);
    g_ptr_array_sort(lines, compare_lines);
    /* The first line that differs is told: what all else follows from. */
    g_ptr_array_insert(lines, 0, g_strdup_printf("machine: %s",
                       MACHINE_GET_CLASS(current_machine)->name));
    g_ptr_array_insert(lines, 1, g_strdup_printf("accelerator: %s",
                       current_accel_name()));
    for (unsigned i = 0; i < lines->len; i++) {
        char *line = g_ptr_array_index(lines, i);

        /* A property may be known by the class, and by its parent's. */
        if (strcmp(line, last)) {
            QAPI_LIST_APPEND(tail, line);
            last = line;
        } else {
            g_free(line);
        }
    }
    return list;
}
