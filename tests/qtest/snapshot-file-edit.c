/*
 * Descriptions of snapshots in files that are not what an export writes
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <zlib.h>
#include "qemu/bswap.h"
#include "../migration/vm-snapshot-file.h"
#include "snapshot-file-edit.h"

GArray *snapshot_file_places(const char *text)
{
    GArray *places = g_array_new(false, false, sizeof(unsigned));
    /* Another machine is refused at once: two of its many lines will do. */
    const char *machine = strstr(text, "\"machine\": [");
    const char *end = machine ? strstr(machine, "\"]") : NULL;

    for (unsigned i = 1; text[i]; i++) {
        if (end && text + i > machine + 100 && text + i < end) {
            i = end - text;
        }
        if ((g_ascii_isdigit(text[i]) && text[i - 1] == ' ') ||
            text[i] == '{' || text[i] == '"' || text[i] == '[') {
            g_array_append_val(places, i);
        }
    }
    return places;
}

static void edit_number(GString *s, unsigned at, unsigned digits,
                        SnapshotFileChoose *choose, void *opaque)
{
    static const char *const values[] = {
        "0", "1", "-1", "4096", "2147483648", "4294967295", "4294967296",
        "9223372036854775807", "9223372036854775808", "18446744073709551615",
        "18446744073709551616", "18446744073709547520", "1e3", "0.5", "null",
        "[]", "{}", "\"0\"", "true", "4398046511104",
    };
    static const int64_t steps[] = {
        -4096, -1, 1, 8, 512, 4096, 65536, -65536, 1048576,
    };
    g_autofree char *near = NULL;
    uint64_t value = g_ascii_strtoull(s->str + at, NULL, 10);
    const char *with = values[choose(opaque, ARRAY_SIZE(values))];

    if (choose(opaque, 2)) {
        value += steps[choose(opaque, ARRAY_SIZE(steps))];
        near = g_strdup_printf("%" PRIu64, value);
        with = near;
    }
    g_string_erase(s, at, digits);
    g_string_insert(s, at, with);
}

static unsigned any_place(const GString *s, const GArray *places,
                          SnapshotFileChoose *choose, void *opaque)
{
    unsigned at = g_array_index(places, unsigned,
                                choose(opaque, places->len));

    return MIN(at, s->len - 1);
}

void snapshot_file_edit(GString *s, const GArray *places,
                        SnapshotFileChoose *choose, void *opaque)
{
    unsigned at = any_place(s, places, choose, opaque), other, length;

    switch (choose(opaque, 8)) {
    case 0:             /* A byte */
        s->str[at] = 1 + choose(opaque, 255);
        break;
    case 1:             /* A piece of it is missing. */
        length = MIN(1 + choose(opaque, 200), s->len - at);
        g_string_erase(s, at, length);
        break;
    case 2:             /* Or is there again, somewhere. */
        other = any_place(s, places, choose, opaque);
        length = MIN(1 + choose(opaque, 200), s->len - other);
        g_string_insert_len(s, at, s->str + other, length);
        break;
    default:
        edit_number(s, at, strspn(s->str + at, "0123456789"), choose, opaque);
    }
}

bool snapshot_file_write(int fd, uint64_t offset, const char *text,
                         size_t length)
{
    SnapshotFileFooter footer = {
        .magic = SNAPSHOT_FILE_MAGIC,
        .version = cpu_to_be32(SNAPSHOT_FILE_VERSION),
        .length = cpu_to_be32(length),
        .offset = cpu_to_be64(offset),
        .description_crc = cpu_to_be32(crc32(0, (const uint8_t *)text,
                                             length)),
    };

    footer.crc = cpu_to_be32(crc32(0, (uint8_t *)&footer,
                                   offsetof(SnapshotFileFooter, crc)));
    return pwrite(fd, text, length, offset) == length &&
        pwrite(fd, &footer, sizeof(footer), offset + length) ==
        sizeof(footer) &&
        !ftruncate(fd, offset + length + sizeof(footer));
}
