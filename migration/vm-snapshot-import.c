/*
 * The snapshot engine: make a slot of a file
 *
 * Whatever a file tells of itself is checked before it is used: that is what
 * this file does.  What a device makes of its own section is the device's.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bitops.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qapi/error.h"
#include "qapi/qapi-visit-migration.h"
#include "qapi/qobject-input-visitor.h"
#include "qobject/qjson.h"
#include "qobject/qobject.h"
#include "exec/target_page.h"
#include "qemu-version.h"
#include "vm-snapshot-file.h"
#include "vm-snapshot-int.h"

/* Of the description, in bytes: it is read and parsed in the main loop. */
#define DESCRIPTION_MAX (16 * MiB)

/* Of all that is no page, in bytes: the bitmaps of 64 TiB are 2 GiB. */
#define PARTS_MAX (4 * GiB)

/* So much may lie between pages, beside as many bytes as they are. */
#define BETWEEN_PAGES_MAX GiB

static void clear_block(void *block)
{
    g_free(((RAMSnapshotFileBlock *)block)->idstr);
    g_free(((RAMSnapshotFileBlock *)block)->bitmap);
    g_free(((RAMSnapshotFileBlock *)block)->same);
}

bool snapshot_import_read(const SnapshotImport *im, void *buf, size_t length,
                          uint64_t offset, Error **errp)
{
    int ret = image_file_read(im->fd, buf, length, offset);

    if (ret) {
        error_setg_errno(errp, -ret, "Reading %zu bytes of it at %" PRIu64
                         " failed", length, offset);
    }
    return !ret;
}

/* Does it end as our files do?  Others are taken for migration streams. */
static bool has_footer(const SnapshotImport *im)
{
    SnapshotFileFooter footer;

    return im->size >= sizeof(footer) &&
        snapshot_import_read(im, &footer, sizeof(footer),
                             im->size - sizeof(footer), NULL) &&
        !memcmp(footer.magic, SNAPSHOT_FILE_MAGIC, sizeof(footer.magic));
}

/* The description, as text.  Returns: NULL with @errp set */
static char *read_description(SnapshotImport *im, Error **errp)
{
    SnapshotFileFooter footer;
    g_autofree char *text = NULL;
    uint32_t length;

    if (!snapshot_import_read(im, &footer, sizeof(footer),
                              im->size - sizeof(footer), errp)) {
        return NULL;
    }
    if (be32_to_cpu(footer.crc) !=
        snapshot_file_crc(0, &footer, offsetof(SnapshotFileFooter, crc))) {
        error_setg(errp, "Its last bytes are damaged");
        return NULL;
    }
    if (be32_to_cpu(footer.version) != SNAPSHOT_FILE_VERSION) {
        error_setg(errp, "It is of version %u, and this QEMU reads version %u",
                   be32_to_cpu(footer.version), SNAPSHOT_FILE_VERSION);
        return NULL;
    }
    length = be32_to_cpu(footer.length);
    if (length > DESCRIPTION_MAX ||
        !snapshot_import_has(im, be64_to_cpu(footer.offset), length)) {
        error_setg(errp, "Its description is not in it");
        return NULL;
    }
    text = g_malloc(length + 1);
    if (!snapshot_import_read(im, text, length, be64_to_cpu(footer.offset),
                              errp)) {
        return NULL;
    }
    text[length] = 0;
    if (snapshot_file_crc(0, text, length) !=
        be32_to_cpu(footer.description_crc)) {
        error_setg(errp, "Its description is damaged");
        return NULL;
    }
    return g_steal_pointer(&text);
}

static bool parse_description(SnapshotImport *im, Error **errp)
{
    g_autofree char *text = read_description(im, errp);
    QObject *obj;
    Visitor *v;

    if (!text) {
        return false;
    }
    obj = qobject_from_json(text, errp);
    if (!obj) {
        return false;
    }
    v = qobject_input_visitor_new(obj);
    visit_type_SnapshotFile(v, NULL, &im->description, errp);
    visit_free(v);
    qobject_unref(obj);
    return im->description;
}

/* What differs between the machine that was saved and this one? */
static bool check_machine(const SnapshotImport *im, Error **errp)
{
    g_autoptr(strList) here = vm_snapshot_fingerprint();
    const SnapshotFile *d = im->description;
    const strList *a = d->machine, *b = here;

    if (strcmp(d->qemu, QEMU_FULL_VERSION)) {
        error_setg(errp, "It was written by QEMU %s, and this is %s", d->qemu,
                   QEMU_FULL_VERSION);
        error_append_hint(errp, "Another version of QEMU may load it with "
                          "'-incoming file:'.\n");
        return false;
    }
    if (d->page_size != qemu_target_page_size()) {
        error_setg(errp, "It has pages of %u bytes, and the machine of %zu",
                   d->page_size, qemu_target_page_size());
        return false;
    }
    while (a && b && !strcmp(a->value, b->value)) {
        a = a->next;
        b = b->next;
    }
    if (a || b) {
        error_setg(errp, "It is of another machine: in it is '%s', here '%s'",
                   a ? a->value : "no more", b ? b->value : "no more");
        error_append_hint(errp, "Start QEMU with the machine, the CPU and the "
                          "devices that were there when it was saved.\n");
        return false;
    }
    return true;
}

static bool check_parts(const SnapshotImport *im, Error **errp)
{
    const size_t most = MiB;
    g_autofree uint8_t *buf = g_malloc(most);
    const SnapshotFilePartList *l;
    uint64_t total = 0;

    for (l = im->description->parts; l; l = l->next) {
        const SnapshotFilePart *part = l->value;
        uint32_t crc = 0;
        uint64_t done;

        if (!snapshot_import_has(im, part->offset, part->length)) {
            error_setg(errp, "It is cut off: %" PRIu64 " bytes at %" PRIu64
                       " are not in it", part->length, part->offset);
            return false;
        }
        /* The same bytes again and again would take hours. */
        total += part->length;
        if (part->length > PARTS_MAX || total > MIN(im->size, PARTS_MAX)) {
            error_setg(errp, "The %" PRIu64 " bytes at %" PRIu64 " are in it "
                       "twice, or are too many", part->length, part->offset);
            return false;
        }
        for (done = 0; done < part->length; done += most) {
            size_t n = MIN(most, part->length - done);

            if (!snapshot_import_read(im, buf, n, part->offset + done, errp)) {
                return false;
            }
            crc = snapshot_file_crc(crc, buf, n);
        }
        if (crc != part->crc) {
            error_setg(errp, "It is damaged: of the %" PRIu64 " bytes at %"
                       PRIu64 " the sum is wrong", part->length, part->offset);
            return false;
        }
    }
    return true;
}

static RAMSnapshotFileBlock *nth_block(const SnapshotImport *im, unsigned i)
{
    return &g_array_index(im->blocks, RAMSnapshotFileBlock, i);
}

/* Returns: NULL with @errp set */
static unsigned long *read_bitmap(const SnapshotImport *im, uint64_t pos,
                                  size_t bytes, Error **errp)
{
    /* There may be none of a block's. */
    g_autofree unsigned long *bitmap = g_try_malloc(MAX(bytes, 1));

    if (!bitmap) {
        error_setg(errp, "There is no memory for %zu bytes", bytes);
        return NULL;
    }
    return snapshot_import_read(im, bitmap, bytes, pos, errp) ?
        g_steal_pointer(&bitmap) : NULL;
}

static bool read_bitmaps(const SnapshotImport *im, RAMSnapshotFileBlock *b,
                         Error **errp)
{
    const size_t nr_pages = b->length / qemu_target_page_size();
    const size_t bytes = BITS_TO_LONGS(nr_pages) * sizeof(unsigned long);

    if (b->length % qemu_target_page_size() ||
        b->pages % qemu_real_host_page_size() ||
        !snapshot_import_has(im, b->pages, b->length) ||
        !snapshot_import_has(im, b->bitmap_pos, bytes) ||
        (im->base && !snapshot_import_has(im, b->same_pos, bytes))) {
        error_setg(errp, "RAM block '%s' of %" PRIu64 " bytes is not in it, "
                   "or not at whole pages", b->idstr, b->length);
        return false;
    }
    b->bitmap = read_bitmap(im, b->bitmap_pos, bytes, errp);
    if (b->bitmap && im->base) {
        b->same = read_bitmap(im, b->same_pos, bytes, errp);
    }
    if (!b->bitmap || (im->base && !b->same)) {
        return false;
    }
    if (b->same && bitmap_intersects(b->bitmap, b->same, nr_pages)) {
        error_setg(errp, "RAM block '%s' has pages in it that are to be its "
                   "base's", b->idstr);
        return false;
    }
    return true;
}

static bool check_places(const SnapshotImport *im, Error **errp)
{
    uint64_t total = 0, end = 0;

    for (unsigned i = 0; i < im->blocks->len; i++) {
        const RAMSnapshotFileBlock *b = nth_block(im, i);

        for (unsigned k = 0; k < i; k++) {
            const RAMSnapshotFileBlock *other = nth_block(im, k);

            if (b->pages < other->pages + other->length &&
                other->pages < b->pages + b->length) {
                error_setg(errp, "RAM blocks '%s' and '%s' have the same "
                           "pages in it", other->idstr, b->idstr);
                return false;
            }
        }
        total += b->length;
        end = MAX(end, b->pages + b->length);
    }
    /* There is a number for each page up to there. */
    if (end > 2 * total + BETWEEN_PAGES_MAX) {
        error_setg(errp, "It has %" PRIu64 " bytes of RAM, and their end at "
                   "%" PRIu64 ": they are too far apart", total, end);
        return false;
    }
    return true;
}

/* How large a bitmap may be, the machine's blocks tell, not the file's. */
static bool read_blocks(SnapshotImport *im, Error **errp)
{
    if (!ram_snapshot_blocks_match(im->blocks, errp)) {
        return false;
    }
    for (unsigned i = 0; i < im->blocks->len; i++) {
        if (!read_bitmaps(im, nth_block(im, i), errp)) {
            return false;
        }
    }
    return check_places(im, errp);
}

static void list_blocks(SnapshotImport *im)
{
    const SnapshotFileBlockList *l;

    for (l = im->description->blocks; l; l = l->next) {
        RAMSnapshotFileBlock b = {
            .idstr = g_strdup(l->value->name),
            .length = l->value->length,
            .pages = l->value->pages,
            .bitmap_pos = l->value->bitmap,
            .same_pos = l->value->same,
        };

        g_array_append_val(im->blocks, b);
    }
}

static DeviceStateImage *read_devices(SnapshotImport *im, Error **errp)
{
    g_autoptr(GArray) sections = g_array_new(false, false,
                                             sizeof(DeviceStateBytes));
    const SnapshotFileSectionList *l;
    uint64_t total = 0;
    uint8_t *to;

    for (l = im->description->sections; l; l = l->next) {
        const SnapshotFileSection *d = l->value;

        if (!snapshot_import_has(im, d->offset, d->length)) {
            error_setg(errp, "'%s' of %" PRIu64 " bytes is not in it", d->name,
                       d->length);
            return NULL;
        }
        total += d->length;
        if (d->length > SNAPSHOT_FILE_DEVICES_MAX ||
            total > SNAPSHOT_FILE_DEVICES_MAX) {
            error_setg(errp, "Its devices have more than %" PRIu64 " bytes, "
                       "with '%s'", (uint64_t)SNAPSHOT_FILE_DEVICES_MAX,
                       d->name);
            return NULL;
        }
    }
    to = im->sections = g_try_malloc(total);
    if (total && !to) {
        error_setg(errp, "There is no memory for %" PRIu64 " bytes", total);
        return NULL;
    }
    for (l = im->description->sections; l; l = l->next) {
        const SnapshotFileSection *d = l->value;
        DeviceStateBytes bytes = {
            .idstr = d->name,
            .instance_id = d->instance,
            .version_id = d->version,
            .data = to,
            .length = d->length,
        };

        if (!snapshot_import_read(im, to, d->length, d->offset, errp)) {
            return NULL;
        }
        g_array_append_val(sections, bytes);
        to += d->length;
    }
    return qemu_device_state_open(sections, errp);
}

static bool check_block_sums(const SnapshotImport *im,
                             const RAMSnapshotFileBlock *b, uint64_t *offset,
                             Error **errp)
{
    const size_t size = qemu_target_page_size();
    g_autofree uint8_t *buf = g_malloc(SNAPSHOT_FILE_SUM_BYTES);
    uint64_t at, page;

    for (at = 0; at < b->length; at += SNAPSHOT_FILE_SUM_BYTES) {
        size_t n = MIN(SNAPSHOT_FILE_SUM_BYTES, b->length - at);
        uint32_t crc = 0, expected;

        if (!snapshot_import_read(im, &expected, sizeof(expected), *offset,
                                  errp) ||
            !snapshot_import_read(im, buf, n, b->pages + at, errp)) {
            return false;
        }
        *offset += sizeof(expected);
        for (page = 0; page < n; page += size) {
            if (test_bit((at + page) / size, b->bitmap)) {
                crc = snapshot_file_crc(crc, buf + page, size);
            } else if (!buffer_is_zero(buf + page, size)) {
                error_setg(errp, "It is damaged: the page of '%s' at 0x%"
                           PRIx64 " is to be zero, and is not", b->idstr,
                           at + page);
                return false;
            }
        }
        if (crc != be32_to_cpu(expected)) {
            error_setg(errp, "It is damaged: of the pages of '%s' at 0x%"
                       PRIx64 " the sum is wrong", b->idstr, at);
            return false;
        }
    }
    return true;
}

static bool check_sums(const SnapshotImport *im, Error **errp)
{
    uint64_t offset;

    if (!im->description) {
        error_setg(errp, "It has no sums: it is a migration's");
        return false;
    }
    offset = im->description->page_sums;
    for (unsigned i = 0; i < im->blocks->len; i++) {
        if (!check_block_sums(im, nth_block(im, i), &offset, errp)) {
            return false;
        }
    }
    return true;
}

static bool open_file(SnapshotImport *im, Error **errp)
{
    /* To open a FIFO would wait for who writes to it. */
    im->fd = qemu_open(im->name, O_RDONLY | O_NONBLOCK, errp);
    if (im->fd < 0) {
        return false;
    }
    if (fstat(im->fd, &im->st) < 0 || !S_ISREG(im->st.st_mode)) {
        error_setg(errp, "It is no regular file");
        return false;
    }
    im->size = im->st.st_size;
    return true;
}

/* For vm_snapshot_fill(): what was found to be sound */
static bool make_images(VMSnapshot *s, VMSnapshotSlot *slot, void *opaque,
                        Error **errp)
{
    SnapshotImport *im = opaque;
    g_autoptr(GArray) layers = snapshot_import_layers(im);

    if (im->description) {
        if (!snapshot_import_check_disks(im->description->disks, errp)) {
            return false;
        }
        slot->devices = read_devices(im, errp);
        slot->suspended = im->description->suspended;
        slot->ready = g_steal_pointer(&im->description->ready);
    } else {
        slot->devices = snapshot_import_stream(im, errp);
    }
    if (!slot->devices) {
        return false;
    }
    slot->ram = ram_snapshot_open(s->store, layers, im->description, errp);
    if (slot->ram && ram_snapshot_is_mapped(slot->ram)) {
        slot->touched = g_steal_pointer(&im->touched);
    } else if (slot->ram && im->touched) {
        warn_report("snapshot: '%s' is read and copied: no list of what is "
                    "touched is written", im->name);
    }
    return slot->ram;
}

static SnapshotImport *open_import(const char *name, const char *touched,
                                   bool check, unsigned above, Error **errp);

/* Relative names are those of files beside it. */
static char *base_path(const SnapshotImport *im)
{
    const char *name = im->description->base->file;
    g_autofree char *dir = g_path_get_dirname(im->name);

    return g_path_is_absolute(name) ? g_strdup(name) :
        g_build_filename(dir, name, NULL);
}

static bool open_base(SnapshotImport *im, bool check, unsigned above,
                      Error **errp)
{
    const SnapshotFileBase *base = im->description->base;
    g_autofree char *path = base_path(im);
    ERRP_GUARD();

    if (strstart(im->name, "/dev/fdset/", NULL) &&
        !g_path_is_absolute(base->file)) {
        error_setg(errp, "Its base '%s' is to be beside it, and a file "
                   "descriptor has no place", base->file);
        error_append_hint(errp, "Give the name of the file.\n");
        return false;
    }
    if (above + 2 > SNAPSHOT_FILE_MAX_LAYERS) {
        error_setg(errp, "More than %u files are based one on the other",
                   SNAPSHOT_FILE_MAX_LAYERS);
        return false;
    }
    im->base = open_import(path, NULL, check, above + 1, errp);
    if (!im->base) {
        error_prepend(errp, "Its base '%s': ", path);
        return false;
    }
    if (!im->base->description || strcmp(im->base->description->id, base->id)) {
        error_setg(errp, "Its base '%s' is another file than it was: it is %s, "
                   "and was %s", path, im->base->description ?
                   im->base->description->id : "a migration's", base->id);
        return false;
    }
    return true;
}

/* A file with a base has one more bitmap of each block. */
static bool check_bases(const SnapshotImport *im, Error **errp)
{
    const SnapshotFile *d = im->description;
    const SnapshotFileBlockList *l;

    for (l = d->blocks; l; l = l->next) {
        if (l->value->has_same != !!d->base) {
            error_setg(errp, "RAM block '%s' in it %s", l->value->name,
                       d->base ? "does not tell what is its base's" :
                       "is to have a base, and it has none");
            return false;
        }
    }
    return true;
}

/* The disk is to have all requests at once, and none of a page before them. */
static void ask_for_parts(const SnapshotImport *im)
{
    const SnapshotFilePartList *l;

    for (l = im->description->parts; l; l = l->next) {
        posix_fadvise(im->fd, l->value->offset, l->value->length,
                      POSIX_FADV_WILLNEED);
    }
}

static bool read_parts(SnapshotImport *im, bool check, unsigned above,
                       Error **errp)
{
    const SnapshotImport *mapped = im;

    if (!parse_description(im, errp) || !check_machine(im, errp)) {
        return false;
    }
    ask_for_parts(im);
    if (!check_parts(im, errp) || !check_bases(im, errp) ||
        (im->description->base && !open_base(im, check, above, errp))) {
        return false;
    }
    while (mapped->base) {
        mapped = mapped->base;
    }
    if (im->touched_list) {
        im->touched = snapshot_touched_open(mapped, im->touched_list);
    }
    return true;
}

static bool read_file(SnapshotImport *im, bool check, unsigned above,
                      Error **errp)
{
    if (has_footer(im)) {
        if (!read_parts(im, check, above, errp)) {
            return false;
        }
        list_blocks(im);
    } else if (!snapshot_import_header(im, errp)) {
        return false;
    } else if (im->touched_list) {
        warn_report("snapshot: '%s' is a migration's, and has no id: touched= "
                    "is not used", im->name);
    }
    return read_blocks(im, errp) && (!check || check_sums(im, errp));
}

static SnapshotImport *open_import(const char *name, const char *touched,
                                   bool check, unsigned above, Error **errp)
{
    SnapshotImport *im = g_new0(SnapshotImport, 1);

    im->name = g_strdup(name);
    im->touched_list = touched;
    im->fd = -1;
    im->blocks = g_array_new(false, false, sizeof(RAMSnapshotFileBlock));
    g_array_set_clear_func(im->blocks, clear_block);
    if (!open_file(im, errp) || !read_file(im, check, above, errp)) {
        g_clear_pointer(&im, snapshot_import_free);
    }
    return im;
}

SnapshotImport *snapshot_import_new(const char *name, const char *touched,
                                    bool check, Error **errp)
{
    return open_import(name, touched, check, 0, errp);
}

void snapshot_import_free(SnapshotImport *im)
{
    if (im->base) {
        snapshot_import_free(im->base);
    }
    if (im->fd >= 0) {
        qemu_close(im->fd);
    }
    g_array_unref(im->blocks);
    g_free(im->sections);
    snapshot_touched_free(im->touched);
    qapi_free_SnapshotFile(im->description);
    g_free(im->name);
    g_free(im);
}

unsigned snapshot_import_depth(const SnapshotImport *im)
{
    return 1 + (im->base ? snapshot_import_depth(im->base) : 0);
}

GArray *snapshot_import_layers(const SnapshotImport *im)
{
    GArray *layers = im->base ? snapshot_import_layers(im->base) :
        g_array_new(false, false, sizeof(RAMSnapshotLayer));
    const RAMSnapshotLayer layer = {
        .fd = im->fd,
        .name = im->name,
        .st = im->st,
        .blocks = im->blocks,
    };

    g_array_append_val(layers, layer);
    return layers;
}

bool vm_snapshot_open(VMSnapshot *s, unsigned n, const char *file,
                      const char *touched, bool check, bool *is_stream,
                      Error **errp)
{
    ERRP_GUARD();
    SnapshotImport *im = snapshot_import_new(file, touched, check, errp);
    bool ok = im && vm_snapshot_fill(s, n, make_images, im, errp);

    if (im) {
        *is_stream = !im->description;
        snapshot_import_free(im);
    }
    if (!ok) {
        error_prepend(errp, "'%s' cannot be loaded: ", file);
    }
    return ok;
}
