/*
 * The snapshot engine: why something cannot be done
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "hw/qdev-core.h"
#include "migration/misc.h"
#include "system/replay.h"
#include "system/runstate.h"
#include "migration.h"
#include "vm-snapshot-int.h"

static bool vm_snapshot_not_now(Error **errp)
{
    if (replay_mode != REPLAY_MODE_NONE) {
        error_setg(errp, "Record/replay is active");
    } else if (migration_is_running() || migration_in_incoming_postcopy()) {
        error_setg(errp, "A migration is in progress");
    } else if (runstate_check(RUN_STATE_INMIGRATE) ||
               runstate_check(RUN_STATE_FINISH_MIGRATE) ||
               runstate_check(RUN_STATE_POSTMIGRATE) ||
               runstate_check(RUN_STATE_COLO)) {
        error_setg(errp, "The machine is being, or was, migrated (%s)",
                   RunState_str(runstate_get()));
    } else {
        return false;
    }
    return true;
}

int vm_snapshot_refused(const VMSnapshot *s, VMSnapshotOp op, unsigned slot,
                        Error **errp)
{
    if (slot >= s->config.slots) {
        error_setg(errp, "There is no slot %u: the device has %u", slot,
                   s->config.slots);
        return -EINVAL;
    }
    if (op != VM_SNAPSHOT_SAVE && !s->slots[slot].ram) {
        error_setg(errp, "There is no snapshot in slot %u", slot);
        return -ENOENT;
    }
    return op != VM_SNAPSHOT_DISCARD && vm_snapshot_not_now(errp) ? -ENOTSUP
                                                                  : 0;
}

bool vm_snapshot_is_half_done(const VMSnapshot *s, Error **errp)
{
    if (s->half_done) {
        error_setg(errp, "A restore has failed half way: restore a snapshot "
                   "first, or reset the machine");
    }
    return s->half_done;
}

bool vm_snapshot_cannot_save(const VMSnapshot *s, Error **errp)
{
    if (runstate_needs_reset()) {
        error_setg(errp, "The machine is stopped until its next reset (%s)",
                   RunState_str(runstate_get()));
        return true;
    }
    return vm_snapshot_is_half_done(s, errp) ||
        migration_is_blocked_but_by(s->migration_blocker, s->run_blocker,
                                       errp) ||
        qemu_device_state_blocked(errp) ||
        ram_snapshot_blocked(s->store, errp);
}

static int has_section(Object *obj, void *opaque)
{
    return qemu_device_state_has(obj);
}

static int add_unsaved(Object *obj, void *opaque)
{
    g_autofree char *path = object_get_canonical_path(obj);
    const char *type = object_get_typename(obj);
    strList **list = opaque;

    if (!DEVICE_GET_CLASS(obj)->stateless && !has_section(obj, NULL) &&
        !object_child_foreach_recursive(obj, has_section, NULL)) {
        QAPI_LIST_PREPEND(*list, g_strdup_printf("%s (%s)", type, path));
    }
    return 0;
}

strList *vm_snapshot_unsaved(void)
{
    strList *list = NULL;

    object_child_foreach(machine_get_container("peripheral"), add_unsaved,
                         &list);
    object_child_foreach(machine_get_container("peripheral-anon"), add_unsaved,
                         &list);
    return list;
}
