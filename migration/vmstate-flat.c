/*
 * Flattened VMState: find what of the device state changed, and put it back
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/timer.h"
#include "migration/register.h"
#include "memory-file.h"
#include "vmstate-flat.h"

/* Follows the bytes of each field that has a format of its own. */
#define STREAM_END 0x5b5d5b5d

typedef enum StepKind {
    STEP_PRE_SAVE,  /* of @vmsd */
    STEP_NEEDED,    /* @vmsd's needed() must say @expected */
    STEP_EXISTS,    /* @field's field_exists() must say @expected */
    STEP_SAME,      /* a length or a pointer that steps after it rely on */
    STEP_PRE_LOAD,  /* of @vmsd */
    STEP_MEMORY,    /* state */
    STEP_TIMER,     /* state: a QEMUTimer */
    STEP_WATCHED,   /* state that a STEP_STREAM after it has, and loads */
    STEP_STREAM,    /* state: @field, with put() and get() of its own */
    STEP_POST_LOAD, /* of @vmsd */
} StepKind;

typedef struct Step {
    uint8_t kind;               /* StepKind */
    bool follows_host;          /* of state: loading need not bring it back */
    bool watched;               /* of a STEP_STREAM: need not be compared */
    union {
        int version_id;
        bool expected;
        unsigned size;          /* in bytes, of a STEP_STREAM's element */
    };
    int field_version;          /* of a STEP_EXISTS */
    void *ptr;                  /* what the step is about */
    union {
        const VMStateDescription *vmsd;
        const VMStateField *field;
    };
    unsigned data;              /* what is to be there: offset in the data */
    unsigned length;            /* of that, in bytes */
} Step;

/*
 * Bytes between two ranges that may be read: fewer than an allocator, or a
 * sanitizer, leaves between two objects.  Other threads may write to them.
 */
#ifdef CONFIG_TSAN
#define GAP_MAX 0
#else
#define GAP_MAX 15
#endif

/* From here on memcmp() is faster than what can leave gaps out. */
#define LARGE 512

/*
 * Memory of several steps that lie close to each other, compared at once: a
 * device has hundreds of fields, and most are not next to each other in the
 * stream and in memory both.
 */
typedef struct Range {
    const uint8_t *ptr;
    unsigned length;
    unsigned data;              /* what is to be there: offset in @expected */
    bool has_gaps;              /* @mask tells what is compared */
} Range;

/* What is loaded whole, if it changed.  Of each array, the first and the end */
typedef struct Part {
    bool in_place;              /* it may be loaded without a reset */
    bool changed;               /* it has to be loaded */
    unsigned steps, steps_end;
    unsigned checks, checks_end;
    unsigned ranges, ranges_end;
} Part;

struct VMStateFlat {
    GArray *parts;
    GArray *steps;
    GArray *checks;             /* those steps that compare, but for ranges */
    GArray *ranges;
    GByteArray *expected, *mask;
    bool field_follows_host;    /* the field that is being added */
    bool failed;
    GByteArray *data;
    GByteArray *undo;           /* as @data, see vmstate_flat_keep() */
    GPtrArray *tmps;            /* of VMSTATE_WITH_TMP fields, and OpsField */
};

static void add_vmsd(VMStateFlat *flat, const VMStateDescription *vmsd,
                     void *opaque, int version_id);

static VMStateFlat *flat_new(void)
{
    VMStateFlat *flat = g_new0(VMStateFlat, 1);

    /* So that none is NULL: nothing may be added to that, nor to memset(). */
    flat->parts = g_array_sized_new(false, false, sizeof(Part), 1);
    flat->steps = g_array_sized_new(false, false, sizeof(Step), 1);
    flat->checks = g_array_sized_new(false, false, sizeof(Step), 1);
    flat->ranges = g_array_sized_new(false, false, sizeof(Range), 1);
    flat->expected = g_byte_array_sized_new(1);
    flat->mask = g_byte_array_sized_new(1);
    flat->data = g_byte_array_sized_new(1);
    flat->undo = g_byte_array_sized_new(1);
    flat->tmps = g_ptr_array_new_with_free_func(g_free);
    return flat;
}

void vmstate_flat_free(VMStateFlat *flat)
{
    if (flat) {
        g_array_unref(flat->parts);
        g_array_unref(flat->steps);
        g_array_unref(flat->checks);
        g_array_unref(flat->ranges);
        g_byte_array_unref(flat->expected);
        g_byte_array_unref(flat->mask);
        g_byte_array_unref(flat->data);
        g_byte_array_unref(flat->undo);
        g_ptr_array_unref(flat->tmps);
        g_free(flat);
    }
}

static Step *add_step(VMStateFlat *flat, StepKind kind, void *ptr)
{
    Step step = {
        .kind = kind,
        .ptr = ptr,
        .follows_host = flat->field_follows_host,
    };

    g_array_append_val(flat->steps, step);
    return &g_array_index(flat->steps, Step, flat->steps->len - 1);
}

static int compare_ptrs(const void *a, const void *b)
{
    const Step *sa = *(const Step **)a, *sb = *(const Step **)b;

    return (sa->ptr > sb->ptr) - (sa->ptr < sb->ptr);
}

static void append_bytes(GByteArray *array, uint8_t value, unsigned n)
{
    g_byte_array_set_size(array, array->len + n);
    memset(array->data + array->len - n, value, n);
}

static void add_to_ranges(VMStateFlat *flat, const Step *step, Range *range)
{
    const uint8_t *ptr = step->ptr;
    size_t gap = ptr - range->ptr - range->length;

    if (!range->ptr || ptr < range->ptr + range->length || gap > GAP_MAX ||
        (gap && MAX(step->length, range->length) >= LARGE)) {
        if (range->ptr) {
            g_array_append_val(flat->ranges, *range);
        }
        *range = (Range) { .ptr = ptr, .data = flat->expected->len };
        gap = 0;
    }
    append_bytes(flat->expected, 0, gap);
    append_bytes(flat->mask, 0, gap);
    g_byte_array_append(flat->expected, flat->data->data + step->data,
                        step->length);
    append_bytes(flat->mask, 0xff, step->length);
    range->has_gaps |= gap;
    range->length += gap + step->length;
}

static void begin_part(VMStateFlat *flat, bool in_place)
{
    Part part = { .in_place = in_place, .steps = flat->steps->len };

    g_array_append_val(flat->parts, part);
}

static Part *last_part(const VMStateFlat *flat)
{
    return &g_array_index(flat->parts, Part, flat->parts->len - 1);
}

static void end_part(VMStateFlat *flat)
{
    g_autoptr(GPtrArray) memory = g_ptr_array_new();
    Part *part = last_part(flat);
    Range range = { };
    unsigned i;

    part->steps_end = flat->steps->len;
    part->checks = flat->checks->len;
    for (i = part->steps; i < part->steps_end; i++) {
        Step *step = &g_array_index(flat->steps, Step, i);

        if ((step->kind == STEP_MEMORY || step->kind == STEP_WATCHED) &&
            !step->follows_host) {
            g_ptr_array_add(memory, step);
        } else if (step->kind != STEP_PRE_LOAD &&
                   step->kind != STEP_POST_LOAD && !step->watched) {
            g_array_append_val(flat->checks, *step);
        }
    }
    part->checks_end = flat->checks->len;

    g_ptr_array_sort(memory, compare_ptrs);
    part->ranges = flat->ranges->len;
    for (i = 0; i < memory->len; i++) {
        add_to_ranges(flat, memory->pdata[i], &range);
    }
    if (range.ptr) {
        g_array_append_val(flat->ranges, range);
    }
    part->ranges_end = flat->ranges->len;
}

static void add_hook(VMStateFlat *flat, StepKind kind, void *opaque,
                     const VMStateDescription *vmsd, int version_id)
{
    Step *step = add_step(flat, kind, opaque);

    step->vmsd = vmsd;
    step->version_id = version_id;
}

static void set_data(VMStateFlat *flat, Step *step, const void *data,
                     unsigned length)
{
    step->data = flat->data->len;
    step->length = length;
    g_byte_array_append(flat->data, data, length);
}

/* Then it is left to that part, whose hooks put it back. */
static bool is_in_earlier_part(const VMStateFlat *flat, const void *ptr,
                               unsigned length)
{
    unsigned i;

    for (i = 0; i < last_part(flat)->steps; i++) {
        const Step *step = &g_array_index(flat->steps, Step, i);

        if (step->kind == STEP_MEMORY && step->ptr <= ptr &&
            ptr + length <= step->ptr + step->length) {
            return true;
        }
    }
    return false;
}

static void add_memory(VMStateFlat *flat, StepKind kind, void *ptr,
                       unsigned length)
{
    Step *last = &g_array_index(flat->steps, Step, flat->steps->len - 1);

    if (!length ||
        (kind == STEP_MEMORY && is_in_earlier_part(flat, ptr, length))) {
        return;
    }
    if (flat->steps->len > last_part(flat)->steps && last->kind == kind &&
        last->ptr + last->length == ptr &&
        last->follows_host == flat->field_follows_host &&
        last->data + last->length == flat->data->len) {
        g_byte_array_append(flat->data, ptr, length);
        last->length += length;
    } else {
        set_data(flat, add_step(flat, kind, ptr), ptr, length);
    }
}

/* Serialise an element of a field as it is now; NULL if that fails. */
static const uint8_t *stream_now(void *ptr, size_t size,
                                 const VMStateField *field, size_t *length)
{
    int ret = field->info->put(memory_file_write(), ptr, size, field, NULL);
    const uint8_t *now = memory_file_written(STREAM_END, length);

    return ret ? NULL : now;
}

static bool is_one_of(const VMStateInfo *info, const VMStateInfo *const *list,
                      unsigned n)
{
    while (n && info != list[n - 1]) {
        n--;
    }
    return n;
}

/* Is a value in the stream byte by byte, but for their order, that in memory */
static bool is_plain(const VMStateInfo *info)
{
    static const VMStateInfo *const plain[] = {
        &vmstate_info_bool, &vmstate_info_buffer,
        &vmstate_info_int8, &vmstate_info_int16,
        &vmstate_info_int32, &vmstate_info_int64,
        &vmstate_info_uint8, &vmstate_info_uint16,
        &vmstate_info_uint32, &vmstate_info_uint64,
    };

    return is_one_of(info, plain, ARRAY_SIZE(plain));
}

/* So it is, but loading it only checks that it is the same, or not more. */
static bool is_checked(const VMStateInfo *info)
{
    static const VMStateInfo *const checked[] = {
        &vmstate_info_int32_equal, &vmstate_info_int32_le,
        &vmstate_info_uint8_equal, &vmstate_info_uint16_equal,
        &vmstate_info_uint32_equal, &vmstate_info_uint64_equal,
    };

    return is_one_of(info, checked, ARRAY_SIZE(checked));
}

/* Loaded without a reset before, they would have the elements twice. */
static bool appends(const VMStateInfo *info)
{
    return info == &vmstate_info_qtailq || info == &vmstate_info_qlist ||
        info == &vmstate_info_gtree;
}

/* The tmp that put and get make each time is made once. */
static void add_tmp(VMStateFlat *flat, void *ptr, size_t size,
                    const VMStateField *field)
{
    const VMStateDescription *vmsd = field->vmsd;
    void *tmp = g_malloc0(size);

    *(void **)tmp = ptr;
    g_ptr_array_add(flat->tmps, tmp);
    if (vmsd->pre_save) {
        vmsd->pre_save(tmp);
    }
    add_vmsd(flat, vmsd, tmp, vmsd->version_id);
}

static void add_parts(VMStateFlat *flat, void *ptr, const VMStateField *field)
{
    bool in_place = last_part(flat)->in_place;

    if (!field->info->flatten(flat, ptr)) {
        flat->failed = true;
    }
    vmstate_flat_part(flat, in_place);
}

static void add_element(VMStateFlat *flat, void *ptr, size_t size,
                        const VMStateField *field)
{
    if (field->flags & VMS_STRUCT) {
        add_vmsd(flat, field->vmsd, ptr, field->vmsd->version_id);
    } else if (field->flags & VMS_VSTRUCT) {
        add_vmsd(flat, field->vmsd, ptr, field->struct_version_id);
    } else if (is_plain(field->info)) {
        add_memory(flat, STEP_MEMORY, ptr, size);
    } else if (field->info == &vmstate_info_timer) {
        int64_t expires = timer_expire_time_ns(ptr);

        set_data(flat, add_step(flat, STEP_TIMER, ptr), &expires,
                 sizeof(expires));
    } else if (field->info == &vmstate_info_tmp) {
        add_tmp(flat, ptr, size, field);
    } else if (field->info->flatten) {
        add_parts(flat, ptr, field);
    } else if (field->info != &vmstate_info_unused_buffer) {
        size_t length = 0;
        const uint8_t *now = stream_now(ptr, size, field, &length);
        bool watched = is_checked(field->info) || field->info->watch;
        Step *step;

        if (field->info->watch) {
            field->info->watch(flat, ptr);
        } else if (watched) {
            vmstate_flat_watch(flat, ptr, size);
        }
        if (appends(field->info)) {
            last_part(flat)->in_place = false;
        }
        step = add_step(flat, STEP_STREAM, ptr);
        step->watched = watched;
        /* If it could not be saved now, it will not be as it was then. */
        step->field = field;
        step->size = size;
        set_data(flat, step, now, length);
    }
}

/* Of the number of elements that a device has in a field of its own. */
static unsigned counter_length(const VMStateField *field)
{
    if (field->flags & (VMS_VARRAY_INT32 | VMS_VARRAY_UINT32)) {
        return 4;
    }
    if (field->flags & VMS_VARRAY_UINT16) {
        return 2;
    }
    return field->flags & VMS_VARRAY_UINT8 ? 1 : 0;
}

static void add_field(VMStateFlat *flat, const VMStateField *field,
                      void *opaque)
{
    void *first = opaque + field->offset;
    int i, n = vmstate_n_elems(opaque, field);
    int size = vmstate_size(opaque, field);

    add_memory(flat, STEP_SAME, opaque + field->num_offset,
               counter_length(field));
    if (field->flags & VMS_VBUFFER) {
        add_memory(flat, STEP_SAME, opaque + field->size_offset, 4);
    }
    if (field->flags & VMS_POINTER) {
        add_memory(flat, STEP_SAME, first, sizeof(void *));
        first = *(void **)first;
    }
    for (i = 0; i < n; i++) {
        void *ptr = first + size * i;

        if (field->flags & VMS_ARRAY_OF_POINTER) {
            add_memory(flat, STEP_SAME, ptr, sizeof(void *));
            ptr = *(void **)ptr;
        }
        if (ptr) {
            add_element(flat, ptr, size, field);
        }
    }
}

/* That is so of the time of day, if it is the host's. */
static bool follows_host(const VMStateDescription *vmsd, const char *field)
{
    const VMStateHostField *h;

    for (h = vmsd->host_fields; h && h->name; h++) {
        if (!strcmp(h->name, field) && (!h->when || h->when())) {
            return true;
        }
    }
    return false;
}

static bool add_needed(VMStateFlat *flat, const VMStateDescription *vmsd,
                       void *opaque, bool needed)
{
    if (vmsd->needed) {
        Step *step = add_step(flat, STEP_NEEDED, opaque);

        step->vmsd = vmsd;
        step->expected = needed;
    }
    return needed;
}

static void add_vmsd(VMStateFlat *flat, const VMStateDescription *vmsd,
                     void *opaque, int version_id)
{
    const VMStateDescription *const *sub;
    const VMStateField *field;

    if (vmsd->post_save) {
        /* What it undoes would have to be kept from being compared. */
        flat->failed = true;
        return;
    }
    if (vmsd->pre_save) {
        add_hook(flat, STEP_PRE_SAVE, opaque, vmsd, version_id);
    }
    if (vmsd->pre_load) {
        add_hook(flat, STEP_PRE_LOAD, opaque, vmsd, version_id);
    }
    for (field = vmsd->fields; field && field->name; field++) {
        bool exists = vmstate_field_exists(vmsd, field, opaque, version_id);

        if (field->field_exists) {
            Step *step = add_step(flat, STEP_EXISTS, opaque);

            step->field = field;
            step->expected = exists;
            step->field_version = version_id;
        }
        if (exists) {
            flat->field_follows_host = follows_host(vmsd, field->name);
            add_field(flat, field, opaque);
            flat->field_follows_host = false;
        }
    }
    for (sub = vmsd->subsections; sub && *sub; sub++) {
        if (add_needed(flat, *sub, opaque,
                       vmstate_section_needed(*sub, opaque))) {
            add_vmsd(flat, *sub, opaque, (*sub)->version_id);
        }
    }
    if (vmsd->post_load) {
        add_hook(flat, STEP_POST_LOAD, opaque, vmsd, version_id);
    }
}

VMStateFlat *vmstate_flat_new(const VMStateDescription *vmsd, void *opaque,
                              bool present)
{
    VMStateFlat *flat = flat_new();

    begin_part(flat, true);
    if (add_needed(flat, vmsd, opaque, present)) {
        add_vmsd(flat, vmsd, opaque, vmsd->version_id);
    }
    end_part(flat);
    if (flat->failed) {
        vmstate_flat_free(flat);
        return NULL;
    }
    return flat;
}

typedef struct OpsField {
    VMStateField field;
    const SaveVMHandlers *ops;
} OpsField;

static int ops_put(QEMUFile *f, void *opaque, size_t size,
                   const VMStateField *field, JSONWriter *vmdesc)
{
    const SaveVMHandlers *ops = container_of(field, OpsField, field)->ops;

    if (ops->save_in_memory) {
        ops->save_in_memory(f, opaque);
    } else {
        ops->save_state(f, opaque);
    }
    return 0;
}

static int ops_get(QEMUFile *f, void *opaque, size_t size,
                   const VMStateField *field)
{
    const SaveVMHandlers *ops = container_of(field, OpsField, field)->ops;

    return (ops->load_in_memory ?: ops->load_state)(f, opaque,
                                                    field->version_id);
}

static const VMStateInfo ops_info = {
    .name = "section without fields",
    .put = ops_put,
    .get = ops_get,
};

VMStateFlat *vmstate_flat_new_ops(const char *name, const SaveVMHandlers *ops,
                                  void *opaque, int version_id)
{
    VMStateFlat *flat = flat_new();
    OpsField *f = g_new0(OpsField, 1);

    f->field.name = name;
    f->field.info = &ops_info;
    f->field.version_id = version_id;
    f->ops = ops;
    g_ptr_array_add(flat->tmps, f);
    begin_part(flat, true);
    add_element(flat, opaque, 0, &f->field);
    end_part(flat);
    return flat;
}

void vmstate_flat_part(VMStateFlat *flat, bool in_place)
{
    end_part(flat);
    begin_part(flat, in_place);
}

void vmstate_flat_memory(VMStateFlat *flat, void *ptr, size_t length)
{
    add_memory(flat, STEP_MEMORY, ptr, length);
}

void vmstate_flat_watch(VMStateFlat *flat, void *ptr, size_t length)
{
    add_memory(flat, STEP_WATCHED, ptr, length);
}

void vmstate_flat_vmsd(VMStateFlat *flat, const VMStateDescription *vmsd,
                       void *opaque)
{
    if (add_needed(flat, vmsd, opaque, vmstate_section_needed(vmsd, opaque))) {
        add_vmsd(flat, vmsd, opaque, vmsd->version_id);
    }
}

static bool memory_is(const void *ptr, const uint8_t *data, unsigned length)
{
    switch (length) {
    case 1:
        return ldub_p(ptr) == ldub_p(data);
    case 2:
        return lduw_he_p(ptr) == lduw_he_p(data);
    case 4:
        return ldl_he_p(ptr) == ldl_he_p(data);
    case 8:
        return ldq_he_p(ptr) == ldq_he_p(data);
    default:
        return !memcmp(ptr, data, length);
    }
}

static uint64_t word_differs(const Range *range, const uint8_t *expected,
                             const uint8_t *mask, unsigned i)
{
    return (ldq_he_p(range->ptr + i) ^ ldq_he_p(expected + i)) &
        ldq_he_p(mask + i);
}

static bool range_differs(const VMStateFlat *flat, const Range *range)
{
    const uint8_t *expected = flat->expected->data + range->data;
    const uint8_t *mask = flat->mask->data + range->data;
    uint64_t differs = 0;
    unsigned i;

    if (!range->has_gaps) {
        return !memory_is(range->ptr, expected, range->length);
    }
    for (i = 0; i + 8 <= range->length; i += 8) {
        differs |= word_differs(range, expected, mask, i);
    }
    if (i && i < range->length) {
        return differs |
            word_differs(range, expected, mask, range->length - 8);
    }
    for (; i < range->length; i++) {
        differs |= (range->ptr[i] ^ expected[i]) & mask[i];
    }
    return differs;
}

/* Returns: false if a decision has another result */
static bool do_check(const VMStateFlat *flat, const Step *step, bool *differs)
{
    const uint8_t *data = flat->data->data + step->data;
    const uint8_t *now;
    size_t length;

    switch (step->kind) {
    case STEP_PRE_SAVE:
        return !step->vmsd->pre_save(step->ptr);
    case STEP_NEEDED:
        return step->vmsd->needed(step->ptr) == step->expected;
    case STEP_EXISTS:
        return step->field->field_exists(step->ptr, step->field_version) ==
            step->expected;
    case STEP_SAME:
        return memory_is(step->ptr, data, step->length);
    case STEP_MEMORY:
    case STEP_WATCHED:
        *differs = !memory_is(step->ptr, data, step->length);
        return true;
    case STEP_TIMER:
        *differs = timer_expire_time_ns(step->ptr) != ldq_he_p(data);
        return true;
    case STEP_STREAM:
        now = stream_now(step->ptr, step->size, step->field, &length);
        *differs = now &&
            (length != step->length || memcmp(now, data, length));
        return now;
    default:
        g_assert_not_reached();
    }
}

/*
 * Take all decisions again, as a save would, and compare.
 *
 * Returns: false if a decision has another result; else @part->changed tells
 *          whether what would be saved is something else, but for what follows
 *          the host if @loaded
 */
static bool part_check(VMStateFlat *flat, Part *part, bool loaded)
{
    const Step *checks = &g_array_index(flat->checks, Step, 0);
    const Range *ranges = &g_array_index(flat->ranges, Range, 0);
    unsigned i;

    part->changed = false;
    for (i = part->checks; i < part->checks_end; i++) {
        bool differs = false;

        if (!do_check(flat, &checks[i], &differs)) {
            return false;
        }
        part->changed |= differs && !(loaded && checks[i].follows_host);
    }
    /* Last, as some lie behind pointers that were checked just now */
    for (i = part->ranges; i < part->ranges_end && !part->changed; i++) {
        part->changed = range_differs(flat, &ranges[i]);
    }
    return true;
}

static void timer_load(QEMUTimer *timer, int64_t expires)
{
    /* Arming it anew would wake the main loop. */
    if (timer_expire_time_ns(timer) == expires) {
        return;
    }
    if (expires == -1) {
        timer_del(timer);
    } else {
        timer_mod_ns(timer, expires);
    }
}

static bool stream_load(VMStateFlat *flat, const Step *step)
{
    QEMUFile *f = memory_file_read(flat->data->data + step->data, step->length);
    int ret = step->field->info->get(f, step->ptr, step->size, step->field);

    return memory_file_read_all(STREAM_END) && !ret;
}

/* @from is laid out as @flat->data, whose streams are loaded in any case. */
static bool part_load(VMStateFlat *flat, const Part *part,
                      const GByteArray *from)
{
    const Step *steps = &g_array_index(flat->steps, Step, 0);
    unsigned i;

    for (i = part->steps; i < part->steps_end; i++) {
        const Step *step = &steps[i];
        const uint8_t *data = from->data + step->data;

        switch (step->kind) {
        case STEP_PRE_LOAD:
            if (step->vmsd->pre_load(step->ptr)) {
                return false;
            }
            break;
        case STEP_SAME:
            if (!memory_is(step->ptr, data, step->length)) {
                return false;
            }
            break;
        case STEP_MEMORY:
            memcpy(step->ptr, data, step->length);
            break;
        case STEP_TIMER:
            timer_load(step->ptr, ldq_he_p(data));
            break;
        case STEP_STREAM:
            if (!stream_load(flat, step)) {
                return false;
            }
            break;
        case STEP_POST_LOAD:
            if (step->vmsd->post_load(step->ptr, step->version_id)) {
                return false;
            }
            break;
        case STEP_PRE_SAVE:
        case STEP_NEEDED:
        case STEP_EXISTS:
        case STEP_WATCHED:
            break;
        }
    }
    return true;
}

VMStateFlatState vmstate_flat_check(VMStateFlat *flat, bool loaded)
{
    VMStateFlatState state = VMSTATE_FLAT_AS_SAVED;
    unsigned i;

    for (i = 0; i < flat->parts->len; i++) {
        Part *part = &g_array_index(flat->parts, Part, i);

        if (!part_check(flat, part, loaded)) {
            return VMSTATE_FLAT_OTHER_FIELDS;
        }
        if (part->changed && !part->in_place) {
            state = VMSTATE_FLAT_NOT_IN_PLACE;
        } else if (part->changed && state == VMSTATE_FLAT_AS_SAVED) {
            state = VMSTATE_FLAT_CHANGED;
        }
    }
    return state;
}

bool vmstate_flat_load(VMStateFlat *flat)
{
    bool ok = true;
    unsigned i;

    for (i = 0; i < flat->parts->len; i++) {
        const Part *part = &g_array_index(flat->parts, Part, i);

        ok &= !part->changed || part_load(flat, part, flat->data);
    }
    return ok;
}

/* A section of one part, of memory and timers alone */
void vmstate_flat_keep(VMStateFlat *flat)
{
    const Step *steps = &g_array_index(flat->steps, Step, 0);
    unsigned i;

    g_byte_array_set_size(flat->undo, flat->data->len);
    for (i = 0; i < flat->steps->len; i++) {
        const Step *step = &steps[i];
        uint8_t *undo = flat->undo->data + step->data;

        if (step->kind == STEP_MEMORY) {
            memcpy(undo, step->ptr, step->length);
        } else if (step->kind == STEP_TIMER) {
            stq_he_p(undo, timer_expire_time_ns(step->ptr));
        }
    }
}

void vmstate_flat_undo(VMStateFlat *flat)
{
    part_load(flat, last_part(flat), flat->undo);
}
