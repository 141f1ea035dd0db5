/*
 * The snapshot engine: what a slot has of disks, in images beside its file
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/job.h"
#include "qapi/error.h"
#include "block/block_int.h"
#include "block/snapshot-overlay.h"
#include "vm-snapshot-file.h"
#include "vm-snapshot-int.h"

typedef struct ExportDisk {
    char *device;
    GPtrArray *images;          /* names: of what has the content, and below */
    char *tmp;                  /* the first's until then; NULL: not new */
    SnapshotOverlayExport *x;   /* as long as there is one, commits wait */
} ExportDisk;

struct SnapshotExportDisks {
    GArray *disks;              /* of ExportDisk */
    const char *file;           /* of the slot */
    const char *suffix;
    Job *job;
    uint64_t bytes;
};

static ExportDisk *nth_disk(const SnapshotExportDisks *e, unsigned i)
{
    return &g_array_index(e->disks, ExportDisk, i);
}

/*
 * The images that an overlay is over, beginning with the one right below: their
 * names, and what they are if they have none
 */
static GPtrArray *names_below(BlockDriverState *bs)
{
    GPtrArray *names = g_ptr_array_new_with_free_func(g_free);
    GRAPH_RDLOCK_GUARD_MAINLOOP();

    for (bs = bs->file->bs; bs; bs = bdrv_backing_chain_next(bs)) {
        bdrv_refresh_filename(bs);
        g_ptr_array_add(names, g_strdup(bs->exact_filename[0] ?
                                        bs->exact_filename : bs->filename));
    }
    return names;
}

/* Returns: %NULL if it is no regular file of this host */
static SnapshotFileImage *describe_image(const char *file, const char *name)
{
    SnapshotFileImage *image;
    struct stat st;

    if (stat(file, &st) < 0 || !S_ISREG(st.st_mode)) {
        return NULL;
    }
    image = g_new0(SnapshotFileImage, 1);
    image->image = g_path_get_basename(name);
    image->length = st.st_size;
    image->mtime = st.st_mtim.tv_sec * NANOSECONDS_PER_SECOND +
        st.st_mtim.tv_nsec;
    return image;
}

/* Returns: %NULL if the first is none; its name is @tmp yet, if not %NULL */
static SnapshotFileImageList *describe_images(const GPtrArray *names,
                                              const char *tmp)
{
    SnapshotFileImageList *list = NULL, **tail = &list;

    for (unsigned i = 0; i < names->len; i++) {
        const char *name = g_ptr_array_index(names, i);
        SnapshotFileImage *image = describe_image(i ? name : tmp ?: name, name);

        if (image) {
            QAPI_LIST_APPEND(tail, image);
        } else if (!i) {
            return NULL;
        }
    }
    return list;
}

static void tell_no_file(const char *device, const char *name, Error **errp)
{
    error_setg(errp, "The disk of '%s' is '%s', which is no regular file of "
               "this host", device, name);
    error_append_hint(errp, "An image that has it as its backing file would be "
                      "one (qemu-img create -b).\n");
}

static SnapshotFileDisk *describe_disk(const ExportDisk *disk, Error **errp)
{
    SnapshotFileImageList *images = describe_images(disk->images, disk->tmp);
    SnapshotFileDisk *d;

    if (!images) {
        tell_no_file(disk->device, g_ptr_array_index(disk->images, 0), errp);
        return NULL;
    }
    d = g_new0(SnapshotFileDisk, 1);
    d->device = g_strdup(disk->device);
    d->images = images;
    return d;
}

static bool begin_disk(const char *device, BlockDriverState *bs,
                       SnapshotOverlaySlot *slot, void *opaque, Error **errp)
{
    SnapshotExportDisks *e = opaque;
    ExportDisk disk = { .device = g_strdup(device) };
    g_autoptr(SnapshotFileDisk) d = NULL;
    uint64_t bytes;
    ERRP_GUARD();

    if (e->suffix) {
        disk.tmp = g_strdup_printf("%s.%u.qcow2.%s", e->file, e->disks->len,
                                   e->suffix);
    }
    disk.x = snapshot_overlay_export_begin(slot, disk.tmp, e->job, errp);
    if (!disk.x) {
        error_prepend(errp, "The disk of '%s' cannot be written: ", device);
        g_free(disk.tmp);
        g_free(disk.device);
        return false;
    }
    disk.images = names_below(bs);
    bytes = snapshot_overlay_export_bytes(disk.x);
    e->bytes += bytes;
    if (bytes) {
        g_ptr_array_insert(disk.images, 0,
                           g_strdup_printf("%s.%u.qcow2", e->file,
                                           e->disks->len));
    } else {
        /* Nothing was written: the image itself will do, if it is one. */
        if (disk.tmp) {
            unlink(disk.tmp);
        }
        g_clear_pointer(&disk.tmp, g_free);
    }
    g_array_append_val(e->disks, disk);
    if (bytes && !e->suffix) {
        error_setg(errp, "A file descriptor has no place for what the guest "
                   "has written to the disk of '%s'", device);
        error_append_hint(errp, "Give the name of a file.\n");
        return false;
    }
    if (!bytes) {
        d = describe_disk(&disk, errp);
    }
    return bytes || d;
}

SnapshotExportDisks *snapshot_export_disks_begin(const VMSnapshotDisks *disks,
                                                 const char *file,
                                                 const char *suffix, Job *job,
                                                 Error **errp)
{
    SnapshotExportDisks *e = g_new0(SnapshotExportDisks, 1);

    e->disks = g_array_new(false, false, sizeof(ExportDisk));
    e->file = file;
    e->suffix = suffix;
    e->job = job;
    if (disks && !vm_snapshot_disks_foreach(disks, begin_disk, e, errp)) {
        snapshot_export_disks_end(e);
        return NULL;
    }
    return e;
}

uint64_t snapshot_export_disks_bytes(const SnapshotExportDisks *e)
{
    return e->bytes;
}

int coroutine_fn snapshot_export_disks_write(SnapshotExportDisks *e,
                                             Error **errp)
{
    ERRP_GUARD();
    int64_t n;

    for (unsigned i = 0; i < e->disks->len; i++) {
        const ExportDisk *disk = nth_disk(e, i);

        do {
            job_pause_point(e->job);
            if (job_is_cancelled(e->job)) {
                return -ECANCELED;
            }
            n = disk->tmp ? snapshot_overlay_co_export(disk->x, errp) : 0;
            if (n < 0) {
                error_prepend(errp, "The disk of '%s' cannot be written: ",
                              disk->device);
                return n;
            }
            job_progress_update(e->job, n);
        } while (n);
    }
    return 0;
}

SnapshotFileDiskList *snapshot_export_disks_describe(SnapshotExportDisks *e,
                                                     Error **errp)
{
    g_autoptr(SnapshotFileDiskList) list = NULL;
    SnapshotFileDiskList **tail = &list;

    for (unsigned i = 0; i < e->disks->len; i++) {
        const ExportDisk *disk = nth_disk(e, i);
        SnapshotFileDisk *d = describe_disk(disk, errp);

        if (!d) {
            return NULL;
        }
        QAPI_LIST_APPEND(tail, d);
    }
    return g_steal_pointer(&list);
}

int snapshot_export_disks_rename(SnapshotExportDisks *e, bool *some)
{
    for (unsigned i = 0; i < e->disks->len; i++) {
        ExportDisk *disk = nth_disk(e, i);

        if (!disk->tmp) {
            continue;
        }
        /* It may be in use from now on, as the file is. */
        if (chmod(disk->tmp, 0400) < 0 ||
            rename(disk->tmp, g_ptr_array_index(disk->images, 0)) < 0) {
            return -errno;
        }
        g_clear_pointer(&disk->tmp, g_free);
        *some = true;
    }
    return 0;
}

void snapshot_export_disks_end(SnapshotExportDisks *e)
{
    for (unsigned i = 0; i < e->disks->len; i++) {
        ExportDisk *disk = nth_disk(e, i);

        snapshot_overlay_export_end(disk->x);
        if (disk->tmp) {
            unlink(disk->tmp);
        }
        g_ptr_array_unref(disk->images);
        g_free(disk->tmp);
        g_free(disk->device);
    }
    g_array_unref(e->disks);
    g_free(e);
}

static const SnapshotFileDisk *find_disk(const SnapshotFileDiskList *l,
                                         const char *device)
{
    for (; l; l = l->next) {
        if (!strcmp(l->value->device, device)) {
            return l->value;
        }
    }
    return NULL;
}

static bool is_same_image(const SnapshotFileImage *a,
                          const SnapshotFileImage *b)
{
    return a->length == b->length && a->mtime == b->mtime;
}

/* Is it the content that the file of the slot belongs to? */
static bool check_disk(const char *device, BlockDriverState *bs,
                       SnapshotOverlaySlot *slot, void *opaque, Error **errp)
{
    const SnapshotFileDiskList *list = opaque;
    const SnapshotFileDisk *d = find_disk(list, device);
    const SnapshotFileImageList *there = d ? d->images : NULL, *l;
    g_autoptr(SnapshotFileImageList) here = NULL;
    g_autoptr(GPtrArray) below = names_below(bs);
    BlockStatsSpecificSnapshotOverlay stats;

    if (!d) {
        error_setg(errp, "It has nothing of the disk of '%s'", device);
        error_append_hint(errp, "With disks=keep, disks stay as they are.\n");
        return false;
    }
    snapshot_overlay_query(bs, &stats);
    if (stats.clusters || stats.zeroed_areas) {
        error_setg(errp, "The guest has written to the disk of '%s' already",
                   device);
        error_append_hint(errp, "Start QEMU with load=.\n");
        return false;
    }
    here = describe_images(below, NULL);
    if (!here) {
        tell_no_file(device, g_ptr_array_index(below, 0), errp);
        return false;
    }
    l = here;
    while (l && there && is_same_image(l->value, there->value)) {
        l = l->next;
        there = there->next;
    }
    if (!l && !there) {
        return true;
    }
    if (l == here) {
        error_setg(errp, "The disk of '%s' is to be the image '%s' as it was "
                   "written beside the file, and is '%s'", device,
                   there ? there->value->image : "(none)", l->value->image);
    } else {
        error_setg(errp, "The image '%s' of the disk of '%s' is not over the "
                   "same images as when the file was written: '%s' is another "
                   "one, or was written to since", here->value->image, device,
                   (l ?: there)->value->image);
    }
    error_append_hint(errp, "Copies have to keep the time of the last change "
                      "(cp -p).\n");
    return false;
}

bool snapshot_import_check_disks(const SnapshotFileDiskList *list, Error **errp)
{
    return vm_snapshot_disks_foreach(NULL, check_disk, (void *)list, errp);
}
