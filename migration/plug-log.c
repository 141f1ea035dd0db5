/*
 * Which devices were plugged and unplugged since a moment
 *
 * Time is counted in devices that came or went.  Of those that are there, it
 * is known when they came; of those that went, one is remembered as long as
 * there is a mark at which it was there.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/queue.h"
#include "hw/qdev-core.h"
#include "migration/vm-snapshot-state.h"
#include "plug-log.h"

struct PlugMark {
    uint64_t time;
    uint64_t checked;           /* the same devices at this time */
    QLIST_ENTRY(PlugMark) next;
};

typedef struct GoneDevice {
    uint64_t came, went;
    char *name;
} GoneDevice;

static struct {
    DeviceListener listener;
    uint64_t now;
    /*
     * DeviceState -> when it came.  The keys are no pointers to follow: a
     * device may fail after the listener was told of it, and be freed.
     */
    GHashTable *came;
    GArray *gone;               /* of GoneDevice */
    QLIST_HEAD(, PlugMark) marks;
} plug_log;

static uint64_t came_at(DeviceState *dev)
{
    /* Those that were there before the log have no entry: 0. */
    return GPOINTER_TO_SIZE(g_hash_table_lookup(plug_log.came, dev));
}

static char *device_name(DeviceState *dev)
{
    g_autofree char *name = qdev_get_human_name(dev);

    return g_strdup_printf("'%s' (%s)", name,
                           object_get_typename(OBJECT(dev)));
}

static bool is_marked(uint64_t came, uint64_t went)
{
    PlugMark *mark;

    QLIST_FOREACH(mark, &plug_log.marks, next) {
        if (came <= mark->time && mark->time < went) {
            return true;
        }
    }
    return false;
}

static void device_came(DeviceListener *listener, DeviceState *dev)
{
    plug_log.now++;
    g_hash_table_insert(plug_log.came, dev, GSIZE_TO_POINTER(plug_log.now));
}

static void device_went(DeviceListener *listener, DeviceState *dev)
{
    GoneDevice gone = {
        .came = came_at(dev),
        .went = ++plug_log.now,
    };

    g_hash_table_remove(plug_log.came, dev);
    if (is_marked(gone.came, gone.went)) {
        gone.name = device_name(dev);
        g_array_append_val(plug_log.gone, gone);
    }
}

void vm_snapshot_device_changed(DeviceState *dev)
{
    if (plug_log.came) {
        device_went(&plug_log.listener, dev);
        device_came(&plug_log.listener, dev);
    }
}

static void gone_device_clear(void *gone)
{
    g_free(((GoneDevice *)gone)->name);
}

void plug_log_start(void)
{
    plug_log.came = g_hash_table_new(NULL, NULL);
    plug_log.gone = g_array_new(false, false, sizeof(GoneDevice));
    g_array_set_clear_func(plug_log.gone, gone_device_clear);
    plug_log.listener = (DeviceListener) {
        .realize = device_came,
        .unrealize = device_went,
    };
    device_listener_register(&plug_log.listener);
}

void plug_log_stop(void)
{
    assert(QLIST_EMPTY(&plug_log.marks));
    device_listener_unregister(&plug_log.listener);
    g_clear_pointer(&plug_log.came, g_hash_table_unref);
    g_clear_pointer(&plug_log.gone, g_array_unref);
}

PlugMark *plug_mark_new(void)
{
    PlugMark *mark = g_new0(PlugMark, 1);

    mark->time = mark->checked = plug_log.now;
    QLIST_INSERT_HEAD(&plug_log.marks, mark, next);
    return mark;
}

void plug_mark_free(PlugMark *mark)
{
    unsigned i;

    if (!mark) {
        return;
    }
    QLIST_REMOVE(mark, next);
    g_free(mark);
    for (i = plug_log.gone->len; i-- > 0;) {
        const GoneDevice *gone = &g_array_index(plug_log.gone, GoneDevice, i);

        if (!is_marked(gone->came, gone->went)) {
            g_array_remove_index(plug_log.gone, i);
        }
    }
}

typedef struct FindNew {
    uint64_t since;
    DeviceState *dev;           /* the first; its parts came before it */
} FindNew;

static int find_new(Object *obj, void *opaque)
{
    DeviceState *dev = (DeviceState *)object_dynamic_cast(obj, TYPE_DEVICE);
    FindNew *find = opaque;

    if (!dev || !dev->realized || came_at(dev) <= find->since) {
        return 0;
    }
    find->dev = dev;
    return 1;
}

bool plug_mark_matches(PlugMark *mark, Error **errp)
{
    FindNew find = { .since = mark->time };
    unsigned i;

    if (mark->checked == plug_log.now) {
        return true;
    }
    /* Of a device with parts, the parts are unrealized before it. */
    for (i = plug_log.gone->len; i-- > 0;) {
        const GoneDevice *gone = &g_array_index(plug_log.gone, GoneDevice, i);

        if (gone->came <= mark->time && mark->time < gone->went) {
            error_setg(errp, "Device %s was unplugged after the save",
                       gone->name);
            return false;
        }
    }
    object_child_foreach_recursive(qdev_get_machine(), find_new, &find);
    if (find.dev) {
        g_autofree char *name = device_name(find.dev);

        error_setg(errp, "Device %s was plugged after the save", name);
        return false;
    }
    mark->checked = plug_log.now;
    return true;
}
