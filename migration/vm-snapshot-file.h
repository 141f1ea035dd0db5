/*
 * The snapshot engine: what a file of a slot is made of
 *
 * docs/interop/snapshot-file.rst describes the format.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef MIGRATION_VM_SNAPSHOT_FILE_H
#define MIGRATION_VM_SNAPSHOT_FILE_H

#ifdef CONFIG_LIBDEFLATE
#include <libdeflate.h>
#else
#include <zlib.h>
#endif
#include "qemu/units.h"
#include "qapi/qapi-types-migration.h"
#include "device-state.h"
#include "ram-snapshot.h"
#include "qemu/job.h"
#include "vm-snapshot-int.h"

#define SNAPSHOT_FILE_MAGIC "QEMUSNAP"
#define SNAPSHOT_FILE_VERSION 2

/*
 * So many bytes, the magic, are before the pages of each block, where a
 * migration has nothing: cut off, the file must not be taken for one.
 */
#define SNAPSHOT_FILE_MARK 8

/* Of a file and those that it is based on, one on the other */
#define SNAPSHOT_FILE_MAX_LAYERS 16

/* Each so many bytes of a RAM block have a sum of their own. */
#define SNAPSHOT_FILE_SUM_BYTES MiB

/* Of all devices, in bytes */
#define SNAPSHOT_FILE_DEVICES_MAX GiB

/* The last bytes of a file, big-endian */
typedef struct SnapshotFileFooter {
    char magic[8];              /* SNAPSHOT_FILE_MAGIC */
    uint32_t version;
    uint32_t length;            /* of the description before it, in bytes */
    uint64_t offset;            /* of that in the file */
    uint32_t description_crc;
    uint32_t crc;               /* of the footer up to here */
} QEMU_PACKED SnapshotFileFooter;

/**
 * snapshot_file_crc: CRC-32 of a file's bytes, as zlib computes it
 * @crc: of the bytes before them, 0 if there are none
 *
 * Most of the CPU time of an export goes here.
 */
static inline uint32_t snapshot_file_crc(uint32_t crc, const void *buf,
                                         size_t length)
{
#ifdef CONFIG_LIBDEFLATE
    return libdeflate_crc32(crc, buf, length);
#else
    return crc32(crc, buf, length);
#endif
}

/*
 * vm-snapshot-export-disks.c: images beside the file.  All is called in the
 * main loop with the BQL held, but as noted.
 */
typedef struct SnapshotExportDisks SnapshotExportDisks;

/**
 * snapshot_export_disks_begin: create an image for each disk written to
 * @disks: of the slot, which may be discarded; may be NULL
 * @file: of the slot; and @suffix: of temporary names, or NULL if images have
 *        no place: they are kept
 *
 * No disk is committed until snapshot_export_disks_end().
 *
 * Returns: for snapshot_export_disks_end(), or NULL with @errp set
 */
SnapshotExportDisks *snapshot_export_disks_begin(const VMSnapshotDisks *disks,
                                                 const char *file,
                                                 const char *suffix, Job *job,
                                                 Error **errp);

/** snapshot_export_disks_bytes: for the job's progress */
uint64_t snapshot_export_disks_bytes(const SnapshotExportDisks *e);

/**
 * snapshot_export_disks_write: returns 0, or -errno
 *
 * With @errp set, but not if the job was cancelled.
 */
int coroutine_fn snapshot_export_disks_write(SnapshotExportDisks *e,
                                             Error **errp);

/** snapshot_export_disks_describe: once all is written; NULL may be no error */
SnapshotFileDiskList *snapshot_export_disks_describe(SnapshotExportDisks *e,
                                                     Error **errp);

/**
 * snapshot_export_disks_rename: in any thread; returns 0 or -errno
 * @some: set if any was renamed
 */
int snapshot_export_disks_rename(SnapshotExportDisks *e, bool *some);

/** snapshot_export_disks_end: remove what was not renamed */
void snapshot_export_disks_end(SnapshotExportDisks *e);

/**
 * snapshot_import_check_disks: are the machine's disks those of a file?
 *
 * After vm_snapshot_disks_prepare().
 */
bool snapshot_import_check_disks(const SnapshotFileDiskList *list,
                                 Error **errp);

/** SnapshotImport: a file that is being read */
typedef struct SnapshotImport {
    char *name;
    int fd;
    struct stat st;             /* as it was opened */
    uint64_t size;              /* of the file */
    SnapshotFile *description;  /* NULL: it is a migration's */
    GArray *blocks;             /* of RAMSnapshotFileBlock */
    uint8_t *sections;          /* of all, in a row */
    uint64_t devices;           /* where a migration's stream goes on */
    struct SnapshotImport *base;        /* or NULL */
    const char *touched_list;   /* name, or NULL */
    SnapshotTouched *touched;   /* that is to be written, or NULL */
} SnapshotImport;

/**
 * snapshot_import_new: open a file and those it is based on, and check them
 * @touched: name of a list of what of the file is touched, or NULL
 * @check: compare the sums of all pages, too
 *
 * Returns: to be freed by snapshot_import_free(), or NULL with @errp set
 */
SnapshotImport *snapshot_import_new(const char *name, const char *touched,
                                    bool check, Error **errp);

void snapshot_import_free(SnapshotImport *im);

/** snapshot_import_depth: of how many files it is made */
unsigned snapshot_import_depth(const SnapshotImport *im);

/** snapshot_import_layers: RAMSnapshotLayers of a file and its bases */
GArray *snapshot_import_layers(const SnapshotImport *im);

/** snapshot_import_has: does the file have so many bytes there? */
static inline bool snapshot_import_has(const SnapshotImport *im,
                                       uint64_t offset, uint64_t length)
{
    return offset <= im->size && length <= im->size - offset;
}

/** snapshot_import_read: read so many bytes, or fail with @errp set */
bool snapshot_import_read(const SnapshotImport *im, void *buf, size_t length,
                          uint64_t offset, Error **errp);

/* vm-snapshot-touched.c: what the first run from a file touched */

/**
 * snapshot_touched_open: read ahead what a list names, if it is there
 * @im: a file whose description was read
 *
 * What is wrong with the list is a warning.
 *
 * Returns: what is to write the list if there is none, else NULL
 */
SnapshotTouched *snapshot_touched_open(const SnapshotImport *im,
                                       const char *list);

/*
 * vm-snapshot-import-stream.c: files of QEMU's own migration, with mapped-ram,
 * as they are or as libvirt saves them
 */

/**
 * snapshot_import_header: list the RAM blocks, and find where devices begin
 *
 * What it says of blocks is to be checked.
 */
bool snapshot_import_header(SnapshotImport *im, Error **errp);

/** snapshot_import_stream: an image of the rest; NULL with @errp set */
DeviceStateImage *snapshot_import_stream(const SnapshotImport *im,
                                         Error **errp);

#endif /* MIGRATION_VM_SNAPSHOT_FILE_H */
