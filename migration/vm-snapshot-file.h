/*
 * The snapshot engine: what a file of a slot is made of
 *
 * docs/interop/snapshot-file.rst describes the format.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef MIGRATION_VM_SNAPSHOT_FILE_H
#define MIGRATION_VM_SNAPSHOT_FILE_H

#include "qemu/units.h"

#define SNAPSHOT_FILE_MAGIC "QEMUSNAP"
#define SNAPSHOT_FILE_VERSION 1

/* Each so many bytes of a RAM block have a sum of their own. */
#define SNAPSHOT_FILE_SUM_BYTES MiB

/* The last bytes of a file, big-endian */
typedef struct SnapshotFileFooter {
    char magic[8];              /* SNAPSHOT_FILE_MAGIC */
    uint32_t version;
    uint32_t length;            /* of the description before it, in bytes */
    uint64_t offset;            /* of that in the file */
    uint32_t description_crc;
    uint32_t crc;               /* of the footer up to here */
} QEMU_PACKED SnapshotFileFooter;

#endif /* MIGRATION_VM_SNAPSHOT_FILE_H */
