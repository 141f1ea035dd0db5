/*
 * The snapshot engine: write a slot to a file
 *
 * The file is one of QEMU's mapped-ram migration, to which a description of our
 * own is added behind its end.  A job writes it from the slot's image, which
 * never changes, while the machine runs on.  A file with a base has only the
 * pages that differ from the base's, and no migration stream.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bitops.h"
#include "qemu/cutils.h"
#include "qemu/iov.h"
#include "qemu/job.h"
#include "qemu/lockable.h"
#include "qemu/ratelimit.h"
#include "qemu/units.h"
#include "qemu/uuid.h"
#include "qapi/clone-visitor.h"
#include "qapi/error.h"
#include "qapi/qapi-visit-migration.h"
#include "qapi/qobject-output-visitor.h"
#include "qobject/json-writer.h"
#include "qobject/qjson.h"
#include "qobject/qobject.h"
#include "block/aio_task.h"
#include "block/thread-pool.h"
#include "exec/target_page.h"
#include "hw/boards.h"
#include "io/channel-buffer.h"
#include "qemu-version.h"
#include "mapped-ram.h"
#include "migration.h"
#include "options.h"
#include "qemu-file.h"
#include "ram.h"
#include "savevm.h"
#include "vm-snapshot-file.h"
#include "vm-snapshot-int.h"

/* What a task writes: neighbouring pages in one go, with a bit of O_DIRECT */
#define STRIPE (4 * MiB)

/* So many at once: while some wait for the disk, others look for zeroes. */
#define TASKS 4

/* Pages of zeroes are written where leaving them out costs more. */
#define GAP (64 * KiB)

/*
 * RAM blocks begin where a mapping of theirs can be of huge pages; QEMU's
 * own are at multiples of 1 MiB.
 */
#define PAGES_ALIGN (2 * MiB)

/* To be written from there with O_DIRECT, so it is aligned. */
static const uint8_t zeroes[GAP] QEMU_ALIGNED(64 * KiB);

typedef struct ExportBlock {
    RAMSnapshotFileBlock info;  /* the strings are the view's */
    uint64_t bitmap_offset;
    uint64_t same_offset;       /* of one more bitmap, if there is a base */
    size_t bitmap_bytes;
    uint32_t *sums;             /* big-endian, by SNAPSHOT_FILE_SUM_BYTES */
    unsigned nr_sums;
} ExportBlock;

/* Bytes at a place of the file that is no page */
typedef struct ExportPart {
    uint64_t offset;
    GByteArray *bytes;
} ExportPart;

typedef struct ExportJob {
    Job common;
    VMSnapshot *s;
    RAMSnapshotView *view;
    SnapshotExportDisks *disks;
    SnapshotImport *base;       /* or NULL */
    GArray *layers;             /* of @base */
    GArray *blocks;             /* of ExportBlock */
    GArray *parts;              /* of ExportPart; the first begins the file */
    SnapshotFile *description;
    uint64_t pages_end;         /* of the last block, in the file */
    RateLimit limit;
    bool limited;
    bool finishing;             /* the file may be replaced at any time */
    bool disks_renamed;         /* images beside it were replaced */
    char *file;
    char *tmp;                  /* to be renamed to @file; NULL: an fdset */
    int fd;
    int direct_fd;              /* the same with O_DIRECT, or -1 */
} ExportJob;

typedef struct ExportTask {
    AioTask common;
    ExportJob *job;
    ExportBlock *block;
    unsigned i;                 /* of the block */
    uint64_t offset;            /* in the block */
    uint8_t *base;              /* what its base has there */
    struct iovec *iov;
    unsigned niov;
    size_t run, gap;            /* in @iov, bytes; at its end, zeroes */
} ExportTask;

static ExportBlock *nth_block(const ExportJob *job, unsigned i)
{
    return &g_array_index(job->blocks, ExportBlock, i);
}

/* Write at @pos what is in an iovec, which is not kept. */
static int write_all(int fd, struct iovec *iov, unsigned niov, uint64_t pos)
{
    while (niov) {
        ssize_t n = RETRY_ON_EINTR(pwritev(fd, iov, MIN(niov, IOV_MAX), pos));

        if (n <= 0) {
            return n ? -errno : -ENOSPC;
        }
        pos += n;
        iov_discard_front(&iov, &niov, n);
    }
    return 0;
}

/* O_DIRECT where the file system takes it, for this piece at least */
static int write_pages(const ExportTask *task, uint64_t pos)
{
    g_autofree struct iovec *iov = g_memdup2(task->iov,
                                             task->niov * sizeof(*iov));
    int ret = -EINVAL;

    if (task->job->direct_fd >= 0) {
        ret = write_all(task->job->direct_fd, iov, task->niov, pos);
    }
    if (ret == -EINVAL) {
        memcpy(iov, task->iov, task->niov * sizeof(*iov));
        ret = write_all(task->job->fd, iov, task->niov, pos);
    }
    return ret;
}

static void add_to_run(ExportTask *task, const uint8_t *data, size_t len)
{
    struct iovec *last = task->niov ? &task->iov[task->niov - 1] : NULL;

    if (last && last->iov_base + last->iov_len == data) {
        last->iov_len += len;
    } else {
        task->iov[task->niov++] = (struct iovec) {
            .iov_base = (void *)data,
            .iov_len = len,
        };
    }
    task->run += len;
}

/* Write the run that ends before @end, an offset in the block. */
static int flush_run(ExportTask *task, uint64_t end)
{
    int ret = 0;

    if (task->run) {
        ret = write_pages(task, task->block->info.pages + end - task->gap -
                          task->run);
    }
    task->niov = task->run = task->gap = 0;
    return ret;
}

static void add_sum(ExportBlock *b, uint64_t offset, const uint8_t *page,
                    size_t size)
{
    uint32_t *sum = &b->sums[offset / SNAPSHOT_FILE_SUM_BYTES];

    *sum = cpu_to_be32(snapshot_file_crc(be32_to_cpu(*sum), page, size));
}

/* @page: NULL if it is zero */
static bool is_base_page(const ExportTask *task, const uint8_t *page,
                         uint64_t offset)
{
    const size_t size = qemu_target_page_size();
    const uint8_t *base = task->base + (offset - task->offset);

    return page ? !memcmp(page, base, size) : buffer_is_zero(base, size);
}

/* In a thread: no other task has pages of the same words and sums. */
static int write_stripe(void *opaque)
{
    ExportTask *task = opaque;
    ExportBlock *b = task->block;
    const size_t size = qemu_target_page_size();
    /* Small is what a file with a base is to be. */
    const size_t most_gap = task->base ? 0 : GAP;
    uint64_t off, end = MIN(task->offset + STRIPE, b->info.length);
    int ret = 0;

    if (task->base) {
        ret = ram_snapshot_layers_read(task->job->layers, b->info.idstr,
                                       task->offset, end - task->offset,
                                       task->base);
    }
    for (off = task->offset; off < end && !ret; off += size) {
        const uint8_t *page = ram_snapshot_view_page(task->job->view, task->i,
                                                     off);
        bool same = task->base && is_base_page(task, page, off);

        if (same) {
            set_bit(off / size, b->info.same);
        }
        if (same || !page) {
            task->gap += size;
            continue;
        }
        if (task->gap > most_gap || !task->run) {
            ret = flush_run(task, off);
        } else if (task->gap) {
            add_to_run(task, zeroes, task->gap);
        }
        task->gap = 0;
        add_to_run(task, page, size);
        set_bit(off / size, b->info.bitmap);
        add_sum(b, off, page, size);
    }
    return ret ?: flush_run(task, end);
}

static int coroutine_fn stripe_task(AioTask *common)
{
    ExportTask *task = container_of(common, ExportTask, common);
    /* Each page may be apart, and have zeroes behind it. */
    const unsigned niov = 2 * STRIPE / qemu_target_page_size();
    int ret;

    task->iov = g_new(struct iovec, niov);
    task->base = task->job->base ? g_malloc(STRIPE) : NULL;
    ret = thread_pool_submit_co(write_stripe, task);
    g_free(task->base);
    g_free(task->iov);
    return ret;
}

static void coroutine_fn start_stripe(ExportJob *job, AioTaskPool *pool,
                                      unsigned i, uint64_t offset)
{
    ExportTask *task = g_new0(ExportTask, 1);

    task->common.func = stripe_task;
    task->job = job;
    task->block = nth_block(job, i);
    task->i = i;
    task->offset = offset;
    aio_task_pool_start_task(pool, &task->common);
}

static int coroutine_fn write_block(ExportJob *job, AioTaskPool *pool,
                                    unsigned i)
{
    const uint64_t length = nth_block(job, i)->info.length;
    uint64_t off;

    for (off = 0; off < length; off += STRIPE) {
        uint64_t len = MIN(STRIPE, length - off), delay = 0;

        /* To have a thread find that takes longer. */
        if (job->base || !ram_snapshot_view_is_zero(job->view, i, off, len)) {
            start_stripe(job, pool, i, off);
        }
        job_progress_update(&job->common, len);
        if (job->limited) {
            delay = ratelimit_calculate_delay(&job->limit, len);
        }
        job_sleep_ns(&job->common, delay);
        if (job_is_cancelled(&job->common) || aio_task_pool_status(pool) < 0) {
            break;
        }
    }
    return aio_task_pool_status(pool);
}

static int coroutine_fn write_blocks(ExportJob *job)
{
    AioTaskPool *pool = aio_task_pool_new(TASKS);
    int ret = 0;

    for (unsigned i = 0; i < job->blocks->len && !ret; i++) {
        ret = write_block(job, pool, i);
    }
    aio_task_pool_wait_all(pool);
    ret = aio_task_pool_status(pool);
    aio_task_pool_free(pool);
    return job_is_cancelled(&job->common) ? -ECANCELED : ret;
}

static GByteArray *add_part(ExportJob *job, uint64_t offset)
{
    ExportPart part = { .offset = offset, .bytes = g_byte_array_new() };

    g_array_append_val(job->parts, part);
    return part.bytes;
}

static ExportPart *nth_part(const ExportJob *job, unsigned i)
{
    return &g_array_index(job->parts, ExportPart, i);
}

/* Where there is nothing behind it yet */
static uint64_t parts_end(const ExportJob *job)
{
    uint64_t end = job->pages_end;

    for (unsigned i = 0; i < job->parts->len; i++) {
        const ExportPart *part = nth_part(job, i);

        end = MAX(end, part->offset + part->bytes->len);
    }
    return end;
}

static void add_be(GByteArray *bytes, uint64_t value, unsigned size)
{
    const uint64_t be = cpu_to_be64(value);

    g_byte_array_append(bytes, (const uint8_t *)&be + sizeof(be) - size, size);
}

/* What only the pages tell: bitmaps and sums */
static void add_bitmaps(ExportJob *job)
{
    GByteArray *sums;

    for (unsigned i = 0; i < job->blocks->len; i++) {
        const ExportBlock *b = nth_block(job, i);

        g_byte_array_append(add_part(job, b->bitmap_offset),
                            (const uint8_t *)b->info.bitmap, b->bitmap_bytes);
        if (job->base) {
            g_byte_array_append(add_part(job, b->same_offset),
                                (const uint8_t *)b->info.same,
                                b->bitmap_bytes);
        }
    }
    job->description->page_sums = parts_end(job);
    sums = add_part(job, job->description->page_sums);
    for (unsigned i = 0; i < job->blocks->len; i++) {
        const ExportBlock *b = nth_block(job, i);

        g_byte_array_append(sums, (const uint8_t *)b->sums,
                            b->nr_sums * sizeof(uint32_t));
    }
}

static void add_description(ExportJob *job)
{
    SnapshotFileFooter footer = {
        .magic = SNAPSHOT_FILE_MAGIC,
        .version = cpu_to_be32(SNAPSHOT_FILE_VERSION),
        .offset = cpu_to_be64(parts_end(job)),
    };
    SnapshotFilePartList **tail = &job->description->parts;
    Visitor *v;
    QObject *obj;
    GString *json;
    GByteArray *bytes;

    for (unsigned i = 0; i < job->parts->len; i++) {
        const ExportPart *part = nth_part(job, i);
        SnapshotFilePart *p = g_new0(SnapshotFilePart, 1);

        p->offset = part->offset;
        p->length = part->bytes->len;
        p->crc = snapshot_file_crc(0, part->bytes->data, part->bytes->len);
        QAPI_LIST_APPEND(tail, p);
    }
    v = qobject_output_visitor_new(&obj);
    visit_type_SnapshotFile(v, NULL, &job->description, &error_abort);
    visit_complete(v, &obj);
    visit_free(v);
    json = qobject_to_json(obj);
    qobject_unref(obj);

    bytes = add_part(job, parts_end(job));
    g_byte_array_append(bytes, (const uint8_t *)json->str, json->len);
    footer.length = cpu_to_be32(json->len);
    footer.description_crc = cpu_to_be32(snapshot_file_crc(0, bytes->data,
                                                           json->len));
    footer.crc = cpu_to_be32(snapshot_file_crc(0, &footer,
                                               offsetof(SnapshotFileFooter,
                                                        crc)));
    g_byte_array_append(bytes, (const uint8_t *)&footer, sizeof(footer));
    g_string_free(json, true);
}

static int write_part(const ExportJob *job, const ExportPart *part)
{
    struct iovec iov = {
        .iov_base = part->bytes->data,
        .iov_len = part->bytes->len,
    };

    return part->bytes->len ? write_all(job->fd, &iov, 1, part->offset) : 0;
}

static int sync_directory(const char *file)
{
    g_autofree char *dir = g_path_get_dirname(file);
    int fd = qemu_open_old(dir, O_RDONLY | O_DIRECTORY), ret = 0;

    /*
     * Some file systems cannot, and need not.  And one may be allowed to create
     * files in a directory, and not to read it.
     */
    if (fd < 0 ? errno != EACCES : fsync(fd) < 0 && errno != EINVAL) {
        ret = -errno;
    }
    if (fd >= 0) {
        close(fd);
    }
    return ret;
}

/* Somebody may have replaced one: then nobody could load the file. */
static bool bases_are_there(const SnapshotImport *im)
{
    struct stat st;

    return !im || (!stat(im->name, &st) &&
                   ram_snapshot_file_is_same(&st, &im->st) &&
                   bases_are_there(im->base));
}

/*
 * Give all its name.  Of jobs that would each replace the base of the other,
 * the second finds that.
 */
static int publish(ExportJob *job)
{
    int ret;

    QEMU_LOCK_GUARD(&job->s->publishing);
    if (!bases_are_there(job->base)) {
        return -ESTALE;
    }
    ret = snapshot_export_disks_rename(job->disks, &job->disks_renamed);
    if (ret) {
        return ret;
    }
    /* It may be mapped from now on: nobody shall write to it by mistake. */
    if (fchmod(job->fd, 0400) < 0 || rename(job->tmp, job->file) < 0) {
        return -errno;
    }
    g_clear_pointer(&job->tmp, g_free);
    return sync_directory(job->file);
}

/*
 * In a thread, when all pages are written.  What makes the file one that can
 * be read is written last, for one that is written to in place.
 */
static int finish_file(void *opaque)
{
    ExportJob *job = opaque;
    int ret = 0;

    add_bitmaps(job);
    add_description(job);
    for (unsigned i = job->parts->len; i-- > 1 && !ret;) {
        ret = write_part(job, nth_part(job, i));
    }
    if (!job->tmp && !ret && fdatasync(job->fd) < 0) {
        ret = -errno;
    }
    ret = ret ?: write_part(job, nth_part(job, 0));
    if (!ret && fdatasync(job->fd) < 0) {
        ret = -errno;
    }
    return ret || !job->tmp ? ret : publish(job);
}

static int coroutine_fn write_file(ExportJob *job, Error **errp)
{
    ERRP_GUARD();
    int ret = write_blocks(job);

    ret = ret ?: snapshot_export_disks_write(job->disks, errp);
    if (!ret) {
        job->description->disks = snapshot_export_disks_describe(job->disks,
                                                                 errp);
    }
    if (*errp || ret) {
        return ret ?: -EIO;
    }
    job->finishing = true;
    return thread_pool_submit_co(finish_file, job);
}

/* Returns: whether there will be no file */
static bool export_cancel(Job *common, bool force)
{
    return !container_of(common, ExportJob, common)->finishing;
}

static int coroutine_fn export_run(Job *common, Error **errp)
{
    ExportJob *job = container_of(common, ExportJob, common);
    ERRP_GUARD();
    int ret = write_file(job, errp);

    if (*errp) {
        error_prepend(errp, "'%s' was not written: ", job->file);
    } else if (ret == -ECANCELED) {
        error_setg(errp, "The export to '%s' was cancelled", job->file);
    } else if (ret == -ESTALE) {
        error_setg(errp, "'%s' was not written: its base '%s', or what that is "
                   "based on, was replaced or changed meanwhile", job->file,
                   job->base->name);
    } else if (ret) {
        error_setg_errno(errp, -ret, "Writing '%s' failed%s", job->file,
                         job->disks_renamed && job->tmp ? ", and images of "
                         "disks beside it are new ones already" : "");
        if (ret == -ENOSPC && job->tmp) {
            error_append_hint(errp, "What was there before is still there, "
                              "and takes space, too.\n");
        }
    }
    return ret;
}

static void free_blocks(ExportJob *job)
{
    for (unsigned i = 0; i < job->blocks->len; i++) {
        g_free(nth_block(job, i)->info.bitmap);
        g_free(nth_block(job, i)->info.same);
        g_free(nth_block(job, i)->sums);
    }
    for (unsigned i = 0; i < job->parts->len; i++) {
        g_byte_array_unref(nth_part(job, i)->bytes);
    }
    g_array_unref(job->blocks);
    g_array_unref(job->parts);
}

static void export_clean(Job *common)
{
    ExportJob *job = container_of(common, ExportJob, common);

    free_blocks(job);
    if (job->disks) {
        snapshot_export_disks_end(job->disks);
    }
    if (job->view) {
        ram_snapshot_view_free(job->view);
    }
    if (job->base) {
        snapshot_import_free(job->base);
        g_array_unref(job->layers);
    }
    qapi_free_SnapshotFile(job->description);
    if (job->fd >= 0) {
        qemu_close(job->fd);
    }
    if (job->direct_fd >= 0) {
        close(job->direct_fd);
    }
    if (job->tmp) {
        unlink(job->tmp);
    }
    ratelimit_destroy(&job->limit);
    g_free(job->tmp);
    g_free(job->file);
    object_unref(OBJECT(job->s));
}

static const JobDriver export_driver = {
    .instance_size = sizeof(ExportJob),
    .job_type      = JOB_TYPE_SNAPSHOT_DEVICE_EXPORT,
    .run           = export_run,
    .cancel        = export_cancel,
    .clean         = export_clean,
};

static bool open_file(ExportJob *job, Error **errp)
{
    struct stat st;

    if (strstart(job->file, "/dev/fdset/", NULL)) {
        job->fd = qemu_create(job->file, O_RDWR, 0600, errp);
        if (job->fd >= 0 && ram_snapshot_lies_in(job->s->store, job->fd)) {
            error_setg(errp, "'%s' is a file that RAM is mapped from",
                       job->file);
            error_append_hint(errp, "Give the descriptor of another file.\n");
            return false;
        }
        return job->fd >= 0;
    }
    if (!stat(job->file, &st) && !S_ISREG(st.st_mode)) {
        error_setg(errp, "'%s' is no regular file, and is not replaced",
                   job->file);
        return false;
    }
    job->tmp = g_strdup_printf("%s.XXXXXX", job->file);
    job->fd = g_mkstemp_full(job->tmp, O_RDWR | O_CLOEXEC, 0600);
    if (job->fd < 0) {
        error_setg_errno(errp, errno, "Creating '%s' failed", job->tmp);
        g_clear_pointer(&job->tmp, g_free);
        return false;
    }
    job->direct_fd = qemu_open_old(job->tmp, O_WRONLY | O_DIRECT);
    return true;
}

/* A migration stream but for RAM, of a machine that is what the slot has */
typedef struct ExportStream {
    GByteArray *bytes;
    size_t header;              /* bytes before the place of RAM */
} ExportStream;

static bool begin_vmdesc(MigrationState *ms)
{
    if (current_machine->suppress_vmdesc || !ms->send_configuration) {
        return false;
    }
    ms->vmdesc = json_writer_new(false);
    return true;
}

/* For vm_snapshot_visit(): as the functions of a migration write it. */
static bool save_stream(void *opaque, Error **errp)
{
    ExportStream *stream = opaque;
    MigrationState *ms = migrate_get_current();
    bool *mapped_ram = &ms->capabilities[MIGRATION_CAPABILITY_MAPPED_RAM];
    bool *ignore_shared =
        &ms->capabilities[MIGRATION_CAPABILITY_X_IGNORE_SHARED];
    const bool was_mapped_ram = *mapped_ram;
    const bool was_ignore_shared = *ignore_shared;
    QIOChannelBuffer *buffer = qio_channel_buffer_new(0);
    QEMUFile *f = qemu_file_new_output(QIO_CHANNEL(buffer));
    int ret;

    *mapped_ram = true;
    *ignore_shared = false;
    if (begin_vmdesc(ms)) {
        qemu_savevm_state_header(f);
        json_writer_int64(ms->vmdesc, "page_size", qemu_target_page_size());
        json_writer_start_array(ms->vmdesc, "devices");
    } else {
        qemu_savevm_state_header(f);
    }
    qemu_fflush(f);
    stream->header = buffer->usage;
    ret = qemu_savevm_state_complete_precopy_non_iterable(f, false);
    qemu_fflush(f);
    g_clear_pointer(&ms->vmdesc, json_writer_free);
    *mapped_ram = was_mapped_ram;
    *ignore_shared = was_ignore_shared;
    g_byte_array_append(stream->bytes, buffer->data, buffer->usage);
    qemu_fclose(f);
    object_unref(OBJECT(buffer));
    if (ret) {
        error_setg(errp, "The state of devices cannot be saved as a migration "
                   "saves it");
    }
    return !ret;
}

static const SaveStateEntry *ram_section(void)
{
    SaveStateEntry *se = NULL;

    while ((se = qemu_savevm_next_entry(se))) {
        if (!strcmp(se->idstr, "ram")) {
            break;
        }
    }
    return se;
}

/* Give a block its place behind @end, and @header its header, if it is there */
static void place_block(ExportBlock *b, uint64_t end, bool has_base,
                        GByteArray *header)
{
    const size_t nr_pages = b->info.length / qemu_target_page_size();
    const size_t name = strlen(b->info.idstr);
    MappedRamHeader h;

    if (header) {
        add_be(header, name, 1);
        g_byte_array_append(header, (const uint8_t *)b->info.idstr, name);
        add_be(header, b->info.length, 8);
        end += 1 + name + 8 + sizeof(h);
    }
    b->bitmap_offset = end;
    b->bitmap_bytes = BITS_TO_LONGS(nr_pages) * sizeof(unsigned long);
    b->same_offset = end + b->bitmap_bytes;
    end = b->same_offset + (has_base ? b->bitmap_bytes : 0);
    b->info.pages = ROUND_UP(end + SNAPSHOT_FILE_MARK, PAGES_ALIGN);
    b->info.bitmap = bitmap_new(nr_pages);
    b->info.same = has_base ? bitmap_new(nr_pages) : NULL;
    b->nr_sums = DIV_ROUND_UP(b->info.length, SNAPSHOT_FILE_SUM_BYTES);
    b->sums = g_new0(uint32_t, b->nr_sums);
    if (header) {
        h = (MappedRamHeader) {
            .version = cpu_to_be32(MAPPED_RAM_HDR_VERSION),
            .page_size = cpu_to_be64(qemu_target_page_size()),
            .bitmap_offset = cpu_to_be64(b->bitmap_offset),
            .pages_offset = cpu_to_be64(b->info.pages),
        };
        g_byte_array_append(header, (const uint8_t *)&h, sizeof(h));
    }
}

/* The blocks of a migration, as its section of RAM */
static void place_ram(ExportJob *job, const ExportStream *stream)
{
    const SaveStateEntry *se = ram_section();
    GByteArray *bytes = add_part(job, 0);
    uint64_t total = 0;
    unsigned i;

    g_byte_array_append(bytes, stream->bytes->data, stream->header);
    for (i = 0; i < job->blocks->len; i++) {
        const RAMSnapshotFileBlock *info = &nth_block(job, i)->info;

        total += info->migratable ? info->length : 0;
    }
    add_be(bytes, QEMU_VM_SECTION_START, 1);
    add_be(bytes, se->section_id, 4);
    add_be(bytes, strlen(se->idstr), 1);
    g_byte_array_append(bytes, (const uint8_t *)se->idstr, strlen(se->idstr));
    add_be(bytes, se->instance_id, 4);
    add_be(bytes, se->version_id, 4);
    add_be(bytes, total | RAM_SAVE_FLAG_MEM_SIZE, 8);
    for (i = 0; i < job->blocks->len; i++) {
        ExportBlock *b = nth_block(job, i);

        if (b->info.migratable) {
            if (job->pages_end) {
                bytes = add_part(job, job->pages_end);
            }
            place_block(b, job->pages_end + bytes->len, false, bytes);
            job->pages_end = b->info.pages + b->info.length;
            bytes = add_part(job, b->info.pages - SNAPSHOT_FILE_MARK);
            g_byte_array_append(bytes, (const uint8_t *)SNAPSHOT_FILE_MAGIC,
                                SNAPSHOT_FILE_MARK);
        }
    }
    bytes = add_part(job, job->pages_end);
    add_be(bytes, RAM_SAVE_FLAG_EOS, 8);
    if (migrate_get_current()->send_section_footer) {
        add_be(bytes, QEMU_VM_SECTION_FOOTER, 1);
        add_be(bytes, se->section_id, 4);
    }
    g_byte_array_append(bytes, stream->bytes->data + stream->header,
                        stream->bytes->len - stream->header);
}

/* With a base, the beginning only tells that the file is complete. */
static void place_mark(ExportJob *job)
{
    GByteArray *bytes = add_part(job, 0);

    g_byte_array_append(bytes, (const uint8_t *)SNAPSHOT_FILE_MAGIC,
                        SNAPSHOT_FILE_MARK);
    add_be(bytes, SNAPSHOT_FILE_VERSION, 4);
}

/* Blocks that no migration takes along, or all */
static void place_other_blocks(ExportJob *job)
{
    for (unsigned i = 0; i < job->blocks->len; i++) {
        ExportBlock *b = nth_block(job, i);

        if (!b->info.migratable || job->base) {
            place_block(b, parts_end(job), job->base, NULL);
            job->pages_end = b->info.pages + b->info.length;
        }
    }
}

static void describe_blocks(ExportJob *job)
{
    SnapshotFileBlockList **tail = &job->description->blocks;

    for (unsigned i = 0; i < job->blocks->len; i++) {
        const ExportBlock *b = nth_block(job, i);
        SnapshotFileBlock *d = g_new0(SnapshotFileBlock, 1);

        d->name = g_strdup(b->info.idstr);
        d->length = b->info.length;
        d->bitmap = b->bitmap_offset;
        d->pages = b->info.pages;
        d->has_same = job->base;
        d->same = job->base ? b->same_offset : 0;
        QAPI_LIST_APPEND(tail, d);
    }
}

static void place_sections(ExportJob *job, const DeviceStateImage *image)
{
    g_autoptr(GArray) sections = qemu_device_state_bytes(image);
    SnapshotFileSectionList **tail = &job->description->sections;
    const uint64_t offset = parts_end(job);
    GByteArray *bytes = add_part(job, offset);

    for (unsigned i = 0; i < sections->len; i++) {
        const DeviceStateBytes *s = &g_array_index(sections, DeviceStateBytes,
                                                   i);
        SnapshotFileSection *d = g_new0(SnapshotFileSection, 1);

        d->name = g_strdup(s->idstr);
        d->instance = s->instance_id;
        d->version = s->version_id;
        d->offset = offset + bytes->len;
        d->length = s->length;
        g_byte_array_append(bytes, s->data, s->length);
        QAPI_LIST_APPEND(tail, d);
    }
}

static void list_blocks(ExportJob *job)
{
    ExportBlock b = { };
    uint64_t bytes = 0;

    while (ram_snapshot_view_block(job->view, job->blocks->len, &b.info)) {
        g_array_append_val(job->blocks, b);
        bytes += b.info.length;
    }
    job_progress_set_remaining(&job->common, bytes +
                               snapshot_export_disks_bytes(job->disks));
}

/* How a file names another: the rest of its name if that is beside it */
static char *name_from(const char *file, const char *other)
{
    g_autofree char *dir = g_path_get_dirname(file);
    g_autofree char *other_dir = g_path_get_dirname(other);
    g_autofree char *path = realpath(dir, NULL);
    g_autofree char *other_path = realpath(other_dir, NULL);
    g_autofree char *name = g_path_get_basename(other);

    if (!other_path || !g_strcmp0(path, other_path)) {
        return g_steal_pointer(&name);
    }
    return g_build_filename(other_path, name, NULL);
}

static void describe(ExportJob *job, unsigned n)
{
    const VMSnapshotConfig *config = &job->s->config;
    const VMSnapshotSlot *slot = &job->s->slots[n];
    SnapshotFile *d = job->description;
    QemuUUID uuid;

    qemu_uuid_generate(&uuid);
    d->id = qemu_uuid_unparse_strdup(&uuid);
    d->qemu = g_strdup(QEMU_FULL_VERSION);
    d->page_size = qemu_target_page_size();
    d->suspended = slot->suspended;
    d->ready = config->ready(config->opaque, n);
    if (!d->ready && slot->ready) {
        d->ready = QAPI_CLONE(SnapshotFileReady, slot->ready);
    }
    d->machine = vm_snapshot_fingerprint();
    if (job->base) {
        d->base = g_new0(SnapshotFileBase, 1);
        d->base->file = name_from(job->file, job->base->name);
        d->base->id = g_strdup(job->base->description->id);
    }
    describe_blocks(job);
}

static bool prepare(ExportJob *job, unsigned n, const ExportStream *stream,
                    Error **errp)
{
    const VMSnapshotSlot *slot = &job->s->slots[n];

    if (!open_file(job, errp)) {
        return false;
    }
    job->view = ram_snapshot_view_new(slot->ram, errp);
    if (!job->view) {
        return false;
    }
    /* Images are beside the file, and have its temporary name's end. */
    job->disks = snapshot_export_disks_begin(slot->disks, job->file, job->tmp ?
                                             job->tmp + strlen(job->file) + 1 :
                                             NULL, &job->common, errp);
    if (!job->disks) {
        return false;
    }
    list_blocks(job);
    if (job->base) {
        place_mark(job);
    } else {
        place_ram(job, stream);
    }
    place_sections(job, slot->devices);
    place_other_blocks(job);
    describe(job, n);
    /* What was in it must not be found where pages are left out. */
    if (ftruncate(job->fd, 0) < 0 ||
        ftruncate(job->fd, parts_end(job)) < 0) {
        error_setg_errno(errp, errno, "Making '%s' %" PRIu64 " bytes long "
                         "failed", job->file, parts_end(job));
        return false;
    }
    return true;
}

/* To be written, it must be none that it needs. */
static bool is_layer(const char *file, const SnapshotImport *im)
{
    struct stat st;

    return im && ((!stat(file, &st) && st.st_dev == im->st.st_dev &&
                   st.st_ino == im->st.st_ino) || is_layer(file, im->base));
}

/* Returns: NULL with @errp set */
static SnapshotImport *open_base(const char *file, const char *base,
                                 Error **errp)
{
    ERRP_GUARD();
    SnapshotImport *im;

    if (strstart(file, "/dev/fdset/", NULL) ||
        strstart(base, "/dev/fdset/", NULL)) {
        error_setg(errp, "A file descriptor has no place, from which to name "
                   "a base");
        error_append_hint(errp, "Give the names of both files.\n");
        return NULL;
    }
    im = snapshot_import_new(base, NULL, false, errp);
    if (!im) {
        error_prepend(errp, "'%s' cannot be a base: ", base);
        return NULL;
    }
    if (!im->description) {
        error_setg(errp, "'%s' cannot be a base: it is a migration's", base);
    } else if (snapshot_import_depth(im) == SNAPSHOT_FILE_MAX_LAYERS) {
        error_setg(errp, "'%s' cannot be a base: there are %u files below it",
                   base, SNAPSHOT_FILE_MAX_LAYERS - 1);
    } else if (is_layer(file, im)) {
        error_setg(errp, "'%s' cannot be written, for it is of its own base",
                   file);
    } else {
        return im;
    }
    snapshot_import_free(im);
    return NULL;
}

Job *vm_snapshot_export_start(VMSnapshot *s, const char *job_id, int flags,
                              unsigned n, const char *file, const char *base,
                              uint64_t speed, Error **errp)
{
    SnapshotImport *im = NULL;
    ExportStream stream = { };
    ExportJob *job = NULL;

    if (base) {
        /* Without one, vm_snapshot_visit() asks for that. */
        im = vm_snapshot_matches(&s->slots[n], errp) ?
            open_base(file, base, errp) : NULL;
        if (!im) {
            return NULL;
        }
    }
    stream.bytes = g_byte_array_new();
    if (im || vm_snapshot_visit(s, n, save_stream, &stream, errp)) {
        job = job_create(job_id, &export_driver, NULL, qemu_get_aio_context(),
                         flags, NULL, NULL, errp);
    }
    if (job) {
        job->s = s;
        object_ref(OBJECT(s));
        job->file = g_strdup(file);
        job->fd = job->direct_fd = -1;
        job->base = g_steal_pointer(&im);
        job->layers = job->base ? snapshot_import_layers(job->base) : NULL;
        job->blocks = g_array_new(false, false, sizeof(ExportBlock));
        job->parts = g_array_new(false, false, sizeof(ExportPart));
        job->description = g_new0(SnapshotFile, 1);
        ratelimit_init(&job->limit);
        job->limited = speed;
        if (speed) {
            ratelimit_set_speed(&job->limit, speed, 100 * SCALE_MS);
        }
        if (prepare(job, n, &stream, errp)) {
            job_start(&job->common);
        } else {
            export_clean(&job->common);
            job_early_fail(&job->common);
            job = NULL;
        }
    }
    if (im) {
        snapshot_import_free(im);
    }
    g_byte_array_unref(stream.bytes);
    return job ? &job->common : NULL;
}
