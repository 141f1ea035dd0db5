/*
 * What devices have to know of snapshots of the whole machine, and to tell
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef MIGRATION_VM_SNAPSHOT_STATE_H
#define MIGRATION_VM_SNAPSHOT_STATE_H

#include "exec/hwaddr.h"
#include "hw/qdev-core.h"

/**
 * VMSnapshotHostWritesFn: where does the host write when a vCPU's state is put?
 * @addr, @length: set, of guest-physical memory, in bytes
 *
 * Called with the BQL held and the vCPUs stopped.
 *
 * Returns: false if nowhere
 */
typedef bool VMSnapshotHostWritesFn(CPUState *cpu, hwaddr *addr,
                                    hwaddr *length);

/**
 * vm_snapshot_exempt_ram: let a verification pass over what @fn tells of
 *
 * For an accelerator, once.
 */
void vm_snapshot_exempt_ram(VMSnapshotHostWritesFn *fn);

#ifdef CONFIG_LINUX
/**
 * vm_snapshot_restore_is_exact: is a restore not to be seen by the guest?
 *
 * For the hooks of devices whose purpose is to tell a guest that its state was
 * loaded.  Called with the BQL held.
 *
 * Returns: true while the snapshot device restores the machine, unless the user
 *          has asked for new-generation=on; false for a migration and loadvm
 */
bool vm_snapshot_restore_is_exact(void);

/**
 * vm_snapshot_disks_go_back: is what a disk holds saved with the device?
 *
 * For hooks of devices that write to the disk what they load.  Called with the
 * BQL held.
 *
 * Returns: true while the snapshot device restores the machine with its disks;
 *          false with disks=keep, for a migration and loadvm
 */
bool vm_snapshot_disks_go_back(void);

/**
 * vm_snapshot_device_changed: what was saved of a device is not for it any more
 * @dev: that is realized
 *
 * For a change from the host's side that makes another device of it, such as a
 * medium of another size, if that is part of its state.  To a snapshot it is as
 * if it had been unplugged and plugged again: a restore is refused.
 * Called with the BQL held.
 */
void vm_snapshot_device_changed(DeviceState *dev);

/**
 * vm_snapshot_load_at_start: begin with what is in the file of load=, if any
 *
 * Called once, when all devices are there and no vCPU has run.
 *
 * Returns: false with @errp set if the machine cannot begin so
 */
bool vm_snapshot_load_at_start(Error **errp);
#else
static inline bool vm_snapshot_restore_is_exact(void)
{
    return false;
}

static inline bool vm_snapshot_disks_go_back(void)
{
    return false;
}

static inline void vm_snapshot_device_changed(DeviceState *dev)
{
}

static inline bool vm_snapshot_load_at_start(Error **errp)
{
    return true;
}
#endif

#endif /* MIGRATION_VM_SNAPSHOT_STATE_H */
