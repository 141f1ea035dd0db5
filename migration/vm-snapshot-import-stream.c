/*
 * The snapshot engine: read the head of a migration with mapped-ram
 *
 * Up to RAM the stream is read here, and each number in it is checked; what
 * follows is loaded as any migration stream is, and trusted as one.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "exec/target_page.h"
#include "hw/boards.h"
#include "mapped-ram.h"
#include "ram.h"
#include "savevm.h"
#include "vm-snapshot-file.h"

/* What libvirt puts before a stream; numbers are of the host's byte order. */
#define LIBVIRT_MAGIC "LibvirtQemudSave"
#define LIBVIRT_HEADER 92
#define LIBVIRT_LENGTH 20       /* where it has the length of its XML */

typedef struct Reader {
    SnapshotImport *im;
    uint64_t pos;
    Error **errp;
} Reader;

static bool get(Reader *r, void *buf, size_t length)
{
    if (!snapshot_import_has(r->im, r->pos, length)) {
        error_setg(r->errp, "It ends at %" PRIu64 ", in the middle of its head",
                   r->im->size);
        return false;
    }
    if (!snapshot_import_read(r->im, buf, length, r->pos, r->errp)) {
        return false;
    }
    r->pos += length;
    return true;
}

/* A big-endian number of @size bytes */
static bool get_be(Reader *r, unsigned size, uint64_t *value)
{
    uint8_t bytes[8] = { };

    if (!get(r, bytes + 8 - size, size)) {
        return false;
    }
    *value = ldq_be_p(bytes);
    return true;
}

/* A name with its length before it */
static bool get_name(Reader *r, unsigned size, char name[256])
{
    uint64_t length;

    if (!get_be(r, size, &length)) {
        return false;
    }
    if (length > 255) {
        error_setg(r->errp, "A name in it has %" PRIu64 " bytes", length);
        return false;
    }
    name[length] = 0;
    return get(r, name, length);
}

static bool expect_be(Reader *r, unsigned size, uint64_t expected,
                      const char *what)
{
    uint64_t value;

    if (!get_be(r, size, &value)) {
        return false;
    }
    if (value != expected) {
        error_setg(r->errp, "It has 0x%" PRIx64 " at %" PRIu64 ", where %s "
                   "has 0x%" PRIx64, value, r->pos - size, what, expected);
        return false;
    }
    return true;
}

static bool skip_libvirt(Reader *r)
{
    char magic[sizeof(LIBVIRT_MAGIC) - 1];
    uint32_t length;

    if (!snapshot_import_has(r->im, 0, LIBVIRT_HEADER) ||
        !get(r, magic, sizeof(magic)) ||
        memcmp(magic, LIBVIRT_MAGIC, sizeof(magic))) {
        r->pos = 0;
        return true;
    }
    r->pos = LIBVIRT_LENGTH;
    if (!get(r, &length, sizeof(length))) {
        return false;
    }
    r->pos = LIBVIRT_HEADER + (uint64_t)length;
    return true;
}

static bool check_capability(Reader *r, bool *mapped_ram)
{
    char name[256];

    if (!get_name(r, 1, name)) {
        return false;
    }
    if (!strcmp(name, "mapped-ram")) {
        *mapped_ram = true;
    } else {
        error_setg(r->errp, "It was written with capability '%s'", name);
        return false;
    }
    return true;
}

static bool read_subsection(Reader *r, bool *mapped_ram)
{
    uint64_t bits, count;
    char name[256];

    if (!get_name(r, 1, name) || !expect_be(r, 4, 1, name)) {
        return false;
    }
    if (!strcmp(name, "configuration/target-page-bits")) {
        if (!get_be(r, 4, &bits)) {
            return false;
        }
        if (bits != qemu_target_page_bits()) {
            error_setg(r->errp, "Its pages have %" PRIu64 " bits, and those of "
                       "the machine %d", bits, qemu_target_page_bits());
            return false;
        }
    } else if (!strcmp(name, "configuration/capabilities")) {
        if (!get_be(r, 4, &count)) {
            return false;
        }
        if (count > MIGRATION_CAPABILITY__MAX) {
            error_setg(r->errp, "It has %" PRIu64 " capabilities", count);
            return false;
        }
        for (; count; count--) {
            if (!check_capability(r, mapped_ram)) {
                return false;
            }
        }
    } else if (!strcmp(name, "configuration/uuid")) {
        r->pos += 16;
    } else {
        error_setg(r->errp, "It has '%s', which this QEMU does not know", name);
        return false;
    }
    return true;
}

static bool read_configuration(Reader *r, bool *mapped_ram)
{
    const char *machine = MACHINE_GET_CLASS(current_machine)->name;
    char name[256];
    uint64_t type;

    if (!get_name(r, 4, name)) {
        return false;
    }
    if (strcmp(name, machine)) {
        error_setg(r->errp, "It is of machine '%s', and this is '%s'", name,
                   machine);
        return false;
    }
    while (get_be(r, 1, &type)) {
        if (type != QEMU_VM_SUBSECTION) {
            r->pos--;
            return true;
        }
        if (!read_subsection(r, mapped_ram)) {
            return false;
        }
    }
    return false;
}

/* Is it one of ours, without its end? */
static bool is_cut_off(const SnapshotImport *im, uint64_t pages)
{
    char mark[SNAPSHOT_FILE_MARK];

    return pages >= sizeof(mark) &&
        snapshot_import_has(im, pages - sizeof(mark), sizeof(mark)) &&
        snapshot_import_read(im, mark, sizeof(mark), pages - sizeof(mark),
                             NULL) &&
        !memcmp(mark, SNAPSHOT_FILE_MAGIC, sizeof(mark));
}

static bool read_block(Reader *r)
{
    RAMSnapshotFileBlock b = { };
    MappedRamHeader h;
    char name[256];

    if (!get_name(r, 1, name) || !get_be(r, 8, &b.length) ||
        !get(r, &h, sizeof(h))) {
        return false;
    }
    if (be32_to_cpu(h.version) != MAPPED_RAM_HDR_VERSION ||
        be64_to_cpu(h.page_size) != qemu_target_page_size()) {
        error_setg(r->errp, "RAM block '%s' is of version %u with pages of %"
                   PRIu64 " bytes, and not of version %u and %zu", name,
                   be32_to_cpu(h.version), be64_to_cpu(h.page_size),
                   MAPPED_RAM_HDR_VERSION, qemu_target_page_size());
        return false;
    }
    b.pages = be64_to_cpu(h.pages_offset);
    b.bitmap_pos = be64_to_cpu(h.bitmap_offset);
    if (b.pages < r->pos || !b.length ||
        !snapshot_import_has(r->im, b.pages, b.length)) {
        error_setg(r->errp, "RAM block '%s' is empty, or not behind its header",
                   name);
        return false;
    }
    if (is_cut_off(r->im, b.pages)) {
        error_setg(r->errp, "It is a file of x-snapshot-device-export that is "
                   "not complete");
        return false;
    }
    b.idstr = g_strdup(name);
    g_array_append_val(r->im->blocks, b);
    r->pos = b.pages + b.length;
    return true;
}

/* The flags that end a section of RAM, once all pages have a place */
static bool skip_ram_flags(Reader *r)
{
    uint64_t flags;

    do {
        if (!get_be(r, 8, &flags)) {
            return false;
        }
    } while (flags == RAM_SAVE_FLAG_MULTIFD_FLUSH);
    if (flags != RAM_SAVE_FLAG_EOS) {
        error_setg(r->errp, "It has 0x%" PRIx64 " at %" PRIu64 ", and no end "
                   "of RAM", flags, r->pos - 8);
        return false;
    }
    return true;
}

static bool skip_footer(Reader *r, uint64_t section_id)
{
    uint64_t type;

    if (!get_be(r, 1, &type)) {
        return false;
    }
    if (type != QEMU_VM_SECTION_FOOTER) {
        r->pos--;
        return true;
    }
    return expect_be(r, 4, section_id, "the end of its section of RAM");
}

static bool read_ram(Reader *r, uint64_t *section_id)
{
    uint64_t total, instance, version, sum = 0;
    char name[256];

    if (!expect_be(r, 1, QEMU_VM_SECTION_START, "a section of RAM") ||
        !get_be(r, 4, section_id) || !get_name(r, 1, name) ||
        !get_be(r, 4, &instance) || !get_be(r, 4, &version) ||
        !get_be(r, 8, &total)) {
        return false;
    }
    if (strcmp(name, "ram") || version != 4 ||
        !(total & RAM_SAVE_FLAG_MEM_SIZE)) {
        error_setg(r->errp, "It begins with section '%s' of version %" PRIu64
                   ", and not with RAM", name, version);
        return false;
    }
    total &= ~(uint64_t)RAM_SAVE_FLAG_MEM_SIZE;
    while (sum < total) {
        if (!read_block(r)) {
            return false;
        }
        sum += g_array_index(r->im->blocks, RAMSnapshotFileBlock,
                             r->im->blocks->len - 1).length;
    }
    return skip_ram_flags(r) && skip_footer(r, *section_id);
}

/* What comes between RAM and the first device says nothing new. */
static bool skip_to_devices(Reader *r, uint64_t ram_id)
{
    uint64_t type, value;

    while (get_be(r, 1, &type)) {
        switch (type) {
        case QEMU_VM_SECTION_FULL:
            r->im->devices = r->pos - 1;
            return true;
        case QEMU_VM_SECTION_PART:
        case QEMU_VM_SECTION_END:
            if (!expect_be(r, 4, ram_id, "its section of RAM") ||
                !skip_ram_flags(r) || !skip_footer(r, ram_id)) {
                return false;
            }
            break;
        case QEMU_VM_COMMAND:
            if (!get_be(r, 2, &value) || !get_be(r, 2, &value)) {
                return false;
            }
            r->pos += value;
            break;
        default:
            error_setg(r->errp, "It has a section of type %" PRIu64 " at %"
                       PRIu64 ", before any device", type, r->pos - 1);
            return false;
        }
    }
    return false;
}

bool snapshot_import_header(SnapshotImport *im, Error **errp)
{
    Reader r = { .im = im, .errp = errp };
    bool mapped_ram = false;
    uint64_t magic, version, type, ram_id;

    if (!skip_libvirt(&r) || !get_be(&r, 4, &magic) ||
        !get_be(&r, 4, &version)) {
        return false;
    }
    if (magic != QEMU_VM_FILE_MAGIC || version != QEMU_VM_FILE_VERSION) {
        error_setg(errp, "It is neither a file of x-snapshot-device-export "
                   "that is complete, nor a migration stream");
        return false;
    }
    if (!get_be(&r, 1, &type)) {
        return false;
    }
    if (type == QEMU_VM_CONFIGURATION) {
        if (!read_configuration(&r, &mapped_ram)) {
            return false;
        }
    }
    if (!mapped_ram) {
        error_setg(errp, "It is a migration stream without mapped-ram");
        error_append_hint(errp, "Write it with capability mapped-ram ('virsh "
                          "save --image-format sparse').\n");
        return false;
    }
    return read_ram(&r, &ram_id) && skip_to_devices(&r, ram_id);
}

DeviceStateImage *snapshot_import_stream(const SnapshotImport *im,
                                         Error **errp)
{
    const uint64_t length = im->size - im->devices;
    g_autofree uint8_t *data = NULL;

    if (length > SNAPSHOT_FILE_DEVICES_MAX) {
        error_setg(errp, "Its devices have %" PRIu64 " bytes", length);
        return NULL;
    }
    data = g_try_malloc(length);
    if (!data) {
        error_setg(errp, "There is no memory for %" PRIu64 " bytes", length);
        return NULL;
    }
    if (!snapshot_import_read(im, data, length, im->devices, errp)) {
        return NULL;
    }
    return qemu_device_state_open_stream(data, length);
}
