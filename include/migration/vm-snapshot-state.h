/*
 * Is a guest to notice that it was restored from a snapshot?
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef MIGRATION_VM_SNAPSHOT_STATE_H
#define MIGRATION_VM_SNAPSHOT_STATE_H

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
#else
static inline bool vm_snapshot_restore_is_exact(void)
{
    return false;
}
#endif

#endif /* MIGRATION_VM_SNAPSHOT_STATE_H */
