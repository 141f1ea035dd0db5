/*
 * The snapshot engine: read ahead what the first run from a file touched
 *
 * A list of what of the file was read, up to the end of the first run, is kept
 * in a file of its own.  The next machine that starts asks the host for that
 * before it needs it.  It is a hint: whatever is wrong with it, the machine
 * starts.
 * docs/interop/snapshot-file.rst describes the format.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/notify.h"
#include "qemu/thread.h"
#include "qemu/timer.h"
#include "qapi/error.h"
#include "system/runstate.h"
#include "trace.h"
#include "vm-snapshot-file.h"
#include "vm-snapshot-int.h"

#define FIRST_LINE "QEMU snapshot touched 1"

/* Of a list, in bytes: it is read and parsed in the main loop. */
#define LIST_MAX (4 * MiB)

/* Ranges of a list that is written; small gaps are read as well, if need be. */
#define RANGES_MAX 65536

/* Asked for in one call: of more, the kernel reads what it thinks is enough. */
#define PIECE (128 * KiB)

typedef struct TouchedRange {
    uint64_t offset, length;    /* in the file, in bytes */
} TouchedRange;

struct SnapshotTouched {
    char *list;                 /* name of what is to be written */
    char *id;                   /* of the file */
    GArray *ranges;             /* of TouchedRange: what was read of it */
    RAMSnapshotTouched *ram;    /* once the run has begun */
    const RAMSnapshot *image;   /* that it began with; may be no more */
    VMSnapshot *s;
    Notifier shutdown;
};

typedef struct ReadAhead {
    int fd;
    GArray *ranges;
} ReadAhead;

static TouchedRange *nth_range(const GArray *ranges, unsigned i)
{
    return &g_array_index(ranges, TouchedRange, i);
}

/* In a thread of its own: to ask for more than a disk can queue waits. */
static void *read_ahead(void *opaque)
{
    ReadAhead *r = opaque;
    const int64_t start = get_clock();

    for (unsigned i = 0; i < r->ranges->len; i++) {
        const TouchedRange *range = nth_range(r->ranges, i);

        for (uint64_t off = 0; off < range->length; off += PIECE) {
            posix_fadvise(r->fd, range->offset + off,
                          MIN(PIECE, range->length - off),
                          POSIX_FADV_WILLNEED);
        }
    }
    trace_vm_snapshot_read_ahead_done(get_clock() - start);
    close(r->fd);
    g_array_unref(r->ranges);
    g_free(r);
    return NULL;
}

static void start_read_ahead(const SnapshotImport *im, GArray *ranges)
{
    ReadAhead *r = g_new(ReadAhead, 1);
    uint64_t bytes = 0;
    QemuThread thread;

    for (unsigned i = 0; i < ranges->len; i++) {
        bytes += nth_range(ranges, i)->length;
    }
    trace_vm_snapshot_read_ahead(im->name, ranges->len, bytes);
    r->fd = qemu_dup(im->fd);
    r->ranges = g_array_ref(ranges);
    if (r->fd < 0) {
        g_array_unref(r->ranges);
        g_free(r);
        return;
    }
    qemu_thread_create(&thread, "snapshot-ahead", read_ahead, r,
                       QEMU_THREAD_DETACHED);
}

/* The list as text.  Returns: NULL, with @errp set but if there is none */
static char *read_list(const char *name, Error **errp)
{
    /* To open a FIFO would wait for who writes to it. */
    int fd = qemu_open_old(name, O_RDONLY | O_NONBLOCK);
    g_autofree char *text = NULL;
    struct stat st;
    ssize_t n;

    if (fd < 0) {
        if (errno != ENOENT) {
            error_setg_errno(errp, errno, "Opening it failed");
        }
        return NULL;
    }
    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode)) {
        error_setg(errp, "It is no regular file");
    } else if (st.st_size > LIST_MAX) {
        error_setg(errp, "It has %jd bytes, more than %jd",
                   (intmax_t)st.st_size, (intmax_t)LIST_MAX);
    } else {
        text = g_malloc(st.st_size + 1);
        n = RETRY_ON_EINTR(pread(fd, text, st.st_size, 0));
        if (n < 0) {
            error_setg_errno(errp, errno, "Reading it failed");
            g_clear_pointer(&text, g_free);
        } else {
            text[n] = 0;
        }
    }
    qemu_close(fd);
    return g_steal_pointer(&text);
}

static bool get_line(char **at, const char **line)
{
    char *end = strchr(*at, '\n');

    if (!end) {
        return false;
    }
    *end = 0;
    *line = *at;
    *at = end + 1;
    return true;
}

static bool parse_range(const SnapshotImport *im, const char *line,
                        TouchedRange *range)
{
    const char *end;

    return g_ascii_isxdigit(*line) &&
        !qemu_strtou64(line, &end, 16, &range->offset) && *end == ' ' &&
        g_ascii_isxdigit(end[1]) &&
        !qemu_strtou64(end + 1, NULL, 16, &range->length) && range->length &&
        snapshot_import_has(im, range->offset, range->length);
}

/* @text is changed.  Returns: NULL with @errp set */
static GArray *parse_list(const SnapshotImport *im, char *text, Error **errp)
{
    g_autoptr(GArray) ranges = g_array_new(false, false, sizeof(TouchedRange));
    const char *line;
    uint64_t end = 0;
    char *at = text;

    if (!get_line(&at, &line) || strcmp(line, FIRST_LINE)) {
        error_setg(errp, "It is none of this version");
        return NULL;
    }
    if (!get_line(&at, &line) || strcmp(line, im->description->id)) {
        error_setg(errp, "It is of another file");
        return NULL;
    }
    while (get_line(&at, &line)) {
        TouchedRange range;

        if (!parse_range(im, line, &range) || range.offset < end) {
            error_setg(errp, "In it, '%.64s' is no range, or not behind the "
                       "one before, or not in the file", line);
            return NULL;
        }
        end = range.offset + range.length;
        g_array_append_val(ranges, range);
    }
    if (*at) {
        error_setg(errp, "It is cut off");
        return NULL;
    }
    return g_steal_pointer(&ranges);
}

static void add_range(off_t offset, off_t length, void *opaque)
{
    SnapshotTouched *t = opaque;
    const TouchedRange range = { .offset = offset, .length = length };
    TouchedRange *last = t->ranges->len
        ? nth_range(t->ranges, t->ranges->len - 1) : NULL;

    if (last && last->offset + last->length == offset) {
        last->length += length;
    } else if (length) {
        g_array_append_val(t->ranges, range);
    }
}

static SnapshotTouched *touched_new(const SnapshotImport *im, const char *list)
{
    SnapshotTouched *t = g_new0(SnapshotTouched, 1);
    const SnapshotFilePartList *l;

    t->list = g_strdup(list);
    t->id = g_strdup(im->description->id);
    t->ranges = g_array_new(false, false, sizeof(TouchedRange));
    for (l = im->description->parts; l; l = l->next) {
        add_range(l->value->offset, l->value->length, t);
    }
    return t;
}

SnapshotTouched *snapshot_touched_open(const SnapshotImport *im,
                                       const char *list)
{
    g_autoptr(GArray) ranges = NULL;
    g_autofree char *text = NULL;
    Error *err = NULL;

    text = read_list(list, &err);
    if (!text && !err) {
        return touched_new(im, list);
    }
    ranges = text ? parse_list(im, text, &err) : NULL;
    if (!ranges) {
        error_prepend(&err, "snapshot: The list '%s' is not used: ", list);
        error_append_hint(&err, "Remove it to have it written anew.\n");
        warn_report_err(err);
        return NULL;
    }
    start_read_ahead(im, ranges);
    return NULL;
}

void snapshot_touched_free(SnapshotTouched *t)
{
    if (!t) {
        return;
    }
    if (t->ram) {
        notifier_remove(&t->shutdown);
        ram_snapshot_touched_free(t->ram);
    }
    g_array_unref(t->ranges);
    g_free(t->list);
    g_free(t->id);
    g_free(t);
}

static int compare_ranges(const void *a, const void *b)
{
    const TouchedRange *ra = a, *rb = b;

    return (ra->offset > rb->offset) - (ra->offset < rb->offset);
}

/* Join ranges that are not further apart than @gap. */
static void join_ranges(GArray *ranges, uint64_t gap)
{
    unsigned n = 0;

    for (unsigned i = 0; i < ranges->len; i++) {
        const TouchedRange *range = nth_range(ranges, i);
        TouchedRange *last = n ? nth_range(ranges, n - 1) : NULL;
        const uint64_t end = range->offset + range->length;

        if (last && range->offset <= last->offset + last->length + gap) {
            last->length = MAX(end, last->offset + last->length) -
                last->offset;
        } else {
            *nth_range(ranges, n++) = *range;
        }
    }
    g_array_set_size(ranges, n);
}

static void sort_ranges(GArray *ranges)
{
    uint64_t gap = 0;

    qsort(ranges->data, ranges->len, sizeof(TouchedRange), compare_ranges);
    do {
        join_ranges(ranges, gap);
        gap = MAX(2 * gap, 4 * KiB);
    } while (ranges->len > RANGES_MAX);
}

/* Under another name first: many machines may write it at the same time. */
static bool write_list(const SnapshotTouched *t, Error **errp)
{
    g_autofree char *tmp = g_strdup_printf("%s.XXXXXX", t->list);
    GString *text = g_string_new(FIRST_LINE "\n");
    int fd = g_mkstemp_full(tmp, O_RDWR | O_CLOEXEC, 0644);
    bool ok = fd >= 0;

    if (ok) {
        g_string_append_printf(text, "%s\n", t->id);
        for (unsigned i = 0; i < t->ranges->len; i++) {
            const TouchedRange *range = nth_range(t->ranges, i);

            g_string_append_printf(text, "%" PRIx64 " %" PRIx64 "\n",
                                   range->offset, range->length);
        }
        ok = qemu_write_full(fd, text->str, text->len) == text->len &&
            !rename(tmp, t->list);
        if (!ok) {
            error_setg_errno(errp, errno, "Writing '%s' failed", tmp);
            unlink(tmp);
        }
        close(fd);
    } else {
        error_setg_errno(errp, errno, "Creating '%s' failed", tmp);
    }
    g_string_free(text, true);
    return ok;
}

static void end(SnapshotTouched *t)
{
    const int64_t start = get_clock();
    Error *err = NULL;

    t->s->touched = NULL;

    if (ram_snapshot_touched_find(t->ram, add_range, t, &err)) {
        sort_ranges(t->ranges);
        if (write_list(t, &err)) {
            trace_vm_snapshot_touched(t->list, t->ranges->len,
                                      get_clock() - start);
        }
    }
    if (err) {
        error_prepend(&err, "snapshot: touched=: ");
        warn_report_err(err);
    }
    snapshot_touched_free(t);
}

void snapshot_touched_end(VMSnapshot *s, const VMSnapshotSlot *slot)
{
    /* While the guest waits for inputs, what came from outside is undone. */
    if (!s->parked || slot->ram != s->touched->image) {
        end(s->touched);
    }
}

static void end_at_shutdown(Notifier *n, void *data)
{
    end(container_of(n, SnapshotTouched, shutdown));
}

void snapshot_touched_begin(VMSnapshot *s, VMSnapshotSlot *slot)
{
    SnapshotTouched *t = g_steal_pointer(&slot->touched);

    snapshot_touched_free(s->touched);
    s->touched = t;
    t->s = s;
    t->image = slot->ram;
    t->ram = ram_snapshot_touched_begin(slot->ram);
    t->shutdown.notify = end_at_shutdown;
    qemu_register_shutdown_notifier(&t->shutdown);
}
