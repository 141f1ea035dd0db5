/*
 * Device state: what differs from a serialised one, field by field
 *
 * The fields are gone through as vmstate_save_state_v() does, but each is
 * serialised by itself, to know where it begins and ends.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "io/channel-buffer.h"
#include "qapi/error.h"
#include "migration.h"
#include "qemu-file.h"
#include "savevm.h"
#include "vmstate-compare.h"

/* Where a field is: text takes longer than to compare, and is seldom needed. */
typedef struct Path {
    const struct Path *outer;
    const char *name;
    int index;                  /* or -1: it is no array */
} Path;

typedef struct Comparison {
    const DeviceStateDifference *section;
    DeviceStateDifferenceFn *fn;
    void *fn_opaque;
    size_t pos;                 /* in what was saved, in bytes */
    const Path *path;
    QIOChannelBuffer *bioc;     /* one field as it is now */
    QEMUFile *f;
    bool lost;                  /* @pos is no longer known, nor needed */
} Comparison;

static void append_path(GString *text, const Path *path)
{
    if (path->outer) {
        append_path(text, path->outer);
        g_string_append_c(text, '.');
    }
    g_string_append(text, path->name);
    if (path->index >= 0) {
        g_string_append_printf(text, "[%d]", path->index);
    }
}

static void report(Comparison *c, size_t saved_length, size_t found_length)
{
    DeviceStateDifference d = *c->section;
    g_autoptr(GString) path = g_string_new(NULL);

    append_path(path, c->path);
    d.field = path->str;
    d.saved += c->pos;
    d.saved_length = saved_length;
    d.found = c->bioc->data;
    d.found_length = found_length;
    c->lost = !c->fn(&d, c->fn_opaque);
}

static void scratch_clear(Comparison *c)
{
    c->bioc->usage = c->bioc->offset = 0;
}

static size_t scratch_length(Comparison *c)
{
    qemu_fflush(c->f);
    return c->bioc->usage;
}

static void compare_vmsd(Comparison *c, const VMStateDescription *vmsd,
                         void *dev, int version_id);

/* A field that has no fields. */
static void compare_leaf(Comparison *c, const VMStateField *field,
                         const VMStateInfo *info, void *elem, int size)
{
    const int counted = VMS_VARRAY_INT32 | VMS_VARRAY_UINT32 |
        VMS_VARRAY_UINT16 | VMS_VARRAY_UINT8 | VMS_VBUFFER;
    size_t length, left = c->section->saved_length - c->pos;

    scratch_clear(c);
    info->put(c->f, elem, size, field, NULL);
    length = scratch_length(c);
    if (length > left) {
        report(c, left, length);
        c->lost = true;
        return;
    }
    if (memcmp(c->section->saved + c->pos, c->bioc->data, length)) {
        report(c, length, length);
        /* A list or the like, and something in the section is longer now. */
        c->lost |= c->section->saved_length != c->section->found_length &&
            (length != size || field->flags & counted);
    }
    c->pos += length;
}

static void compare_element(Comparison *c, const VMStateField *field,
                            void *elem, int size)
{
    if (!elem && size) {
        /* As vmstate_save_state_v() does in an array of pointers. */
        compare_leaf(c, field, &vmstate_info_nullptr, elem, 1);
    } else if (field->flags & VMS_STRUCT) {
        compare_vmsd(c, field->vmsd, elem, field->vmsd->version_id);
    } else if (field->flags & VMS_VSTRUCT) {
        compare_vmsd(c, field->vmsd, elem, field->struct_version_id);
    } else {
        compare_leaf(c, field, field->info, elem, size);
    }
}

static void compare_field(Comparison *c, const VMStateField *field, void *dev)
{
    void *first = dev + field->offset;
    int i, n = vmstate_n_elems(dev, field), size = vmstate_size(dev, field);
    Path path = { c->path, field->name, -1 };

    c->path = &path;
    if (field->flags & VMS_POINTER) {
        first = *(void **)first;
    }
    for (i = 0; i < n && !c->lost; i++) {
        void *elem = first + size * i;

        if (field->flags & VMS_ARRAY_OF_POINTER) {
            elem = *(void **)elem;
        }
        if (n > 1) {
            path.index = i;
        }
        compare_element(c, field, elem, size);
    }
    c->path = path.outer;
}

/* Length of the header that a subsection has at @pos, or 0 */
static size_t subsection_header(const Comparison *c,
                                const VMStateDescription *sub)
{
    const uint8_t *p = c->section->saved + c->pos;
    size_t name = strlen(sub->name), header = 2 + name + 4;

    return c->section->saved_length - c->pos >= header &&
        p[0] == QEMU_VM_SUBSECTION && p[1] == name &&
        !memcmp(p + 2, sub->name, name) ? header : 0;
}

static void compare_subsection(Comparison *c, const VMStateDescription *sub,
                               void *dev)
{
    Path path = { c->path, sub->name, -1 };
    size_t header = subsection_header(c, sub);
    bool needed = vmstate_section_needed(sub, dev);

    c->path = &path;
    c->pos += header;
    if (header && needed) {
        compare_vmsd(c, sub, dev, sub->version_id);
    } else if (header) {
        report(c, c->section->saved_length - c->pos, 0);
        c->lost = true;
    } else if (needed) {
        scratch_clear(c);
        vmstate_save_state(c->f, sub, dev, NULL);
        report(c, 0, scratch_length(c));
    }
    c->path = path.outer;
}

static void compare_vmsd(Comparison *c, const VMStateDescription *vmsd,
                         void *dev, int version_id)
{
    const VMStateField *field;
    unsigned i;

    if (vmsd->pre_save) {
        vmsd->pre_save(dev);
    }
    for (field = vmsd->fields; field->name && !c->lost; field++) {
        if (vmstate_field_exists(vmsd, field, dev, version_id)) {
            compare_field(c, field, dev);
        }
    }
    for (i = 0; vmsd->subsections && vmsd->subsections[i] && !c->lost; i++) {
        compare_subsection(c, vmsd->subsections[i], dev);
    }
    if (vmsd->subsections && !c->lost) {
        c->pos++;               /* QEMU_VM_EOF */
    }
    if (vmsd->post_save) {
        vmsd->post_save(dev);
    }
}

void vmstate_compare(const DeviceStateDifference *section, void *dev,
                     DeviceStateDifferenceFn *fn, void *fn_opaque)
{
    Comparison c = {
        .section = section,
        .fn = fn,
        .fn_opaque = fn_opaque,
        .bioc = qio_channel_buffer_new(4096),
    };

    c.f = qemu_file_new_output(QIO_CHANNEL(c.bioc));
    compare_vmsd(&c, section->vmsd, dev, section->vmsd->version_id);
    qemu_fclose(c.f);
    object_unref(OBJECT(c.bioc));
}
