/*
 * Bring disks, and what devices have still to do, to rest for a snapshot
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef MIGRATION_VM_SNAPSHOT_DRAIN_H
#define MIGRATION_VM_SNAPSHOT_DRAIN_H

/**
 * vm_snapshot_drain_begin: bdrv_drain_all_begin() until nothing goes on
 *
 * A drained section alone is not enough.  A BlockBackend in it holds back the
 * next part of a request that a device carries out in parts; and what
 * completes a request, or goes on with it, may be a bottom half.  So sections
 * are begun and ended, and bottom halves called, until there are no requests
 * and no bottom halves.
 *
 * Called in the main loop with the BQL held, the vCPUs and the virtual clock
 * stopped.  bdrv_drain_all_end() has to follow in any case.
 *
 * Returns: false with @errp set if requests follow on each other without end,
 * as those do which a device finds by itself in the guest's memory
 */
bool vm_snapshot_drain_begin(Error **errp);

/**
 * vm_snapshot_needs_drain: does a request or a bottom half have to end first,
 * or may another thread begin with one at any time?
 *
 * Called with the BQL held, the vCPUs may run.
 */
bool vm_snapshot_needs_drain(void);

#endif /* MIGRATION_VM_SNAPSHOT_DRAIN_H */
