/*
 * The snapshot engine: is the machine as it was saved?
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef MIGRATION_VM_SNAPSHOT_VERIFY_H
#define MIGRATION_VM_SNAPSHOT_VERIFY_H

#include "qapi/qapi-types-migration.h"
#include "device-state.h"
#include "ram-snapshot.h"

/**
 * vm_snapshot_compare: compare the machine with an image of it
 * @ram: an image for which ram_snapshot_matches() holds
 * @devices: an image for which qemu_device_state_matches() holds
 * @sum: what is found is added to it; may be NULL
 *
 * The vCPUs are stopped and the BQL is held.  The machine is not changed.
 *
 * Returns: what differs, to be freed with
 * qapi_free_SnapshotDeviceMismatches()
 */
SnapshotDeviceMismatches *vm_snapshot_compare(const RAMSnapshot *ram,
                                              const DeviceStateImage *devices,
                                              SnapshotDeviceMismatches *sum);

#endif /* MIGRATION_VM_SNAPSHOT_VERIFY_H */
