/*
 * Fuzzing target: load snapshots from files that are not what they should be
 *
 * An input says which places of the description of a file are changed, and how;
 * the sums are right.  What is loaded all the same is only discarded: the state
 * of devices in a file is trusted.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qapi/error.h"
#include "qapi/qapi-commands-migration.h"
#include "qapi/qapi-commands-misc.h"
#include "tests/qtest/libqtest.h"
#include "tests/qtest/snapshot-file-edit.h"
#include "migration/vm-snapshot-file.h"
#include "fuzz.h"

#define SLOT 4

typedef struct Input {
    const unsigned char *data;
    size_t size;
} Input;

/* A whole file, and one that it is the base of */
static struct {
    char *path;
    int fd;
    uint64_t offset;            /* of the description */
    char *text;
    size_t length;
    GArray *places;
} files[2];

static char *directory;

static unsigned choose(void *opaque, unsigned n)
{
    Input *in = opaque;
    unsigned value = 0;

    for (unsigned i = 0; i < (n > 256 ? 2 : 1) && in->size; i++, in->size--) {
        value = value << 8 | *in->data++;
    }
    return value % n;
}

static void must(const char *format, ...)
{
    g_autofree char *command = NULL, *said = NULL;
    va_list ap;

    va_start(ap, format);
    command = g_strdup_vprintf(format, ap);
    va_end(ap);
    said = qmp_human_monitor_command(command, false, 0, &error_abort);
    if (*said) {
        fprintf(stderr, "%s: %s\n", command, said);
        abort();
    }
}

static void open_exported(unsigned i)
{
    g_autofree char *base = i ? g_strdup_printf("-b %s", files[0].path)
                              : g_strdup("");
    SnapshotFileFooter footer;
    struct stat st;

    files[i].path = g_strdup_printf("%s/%u", directory, i);
    must("x_snapshot_device_export %s %s 0", base, files[i].path);
    if (chmod(files[i].path, 0600) < 0) {
        abort();
    }
    files[i].fd = open(files[i].path, O_RDWR);
    if (fstat(files[i].fd, &st) < 0 ||
        pread(files[i].fd, &footer, sizeof(footer),
              st.st_size - sizeof(footer)) != sizeof(footer)) {
        abort();
    }
    files[i].offset = be64_to_cpu(footer.offset);
    files[i].length = be32_to_cpu(footer.length);
    files[i].text = g_malloc0(files[i].length + 1);
    if (pread(files[i].fd, files[i].text, files[i].length, files[i].offset) !=
        files[i].length) {
        abort();
    }
    files[i].places = snapshot_file_places(files[i].text);
}

static GString *snapshot_file_cmdline(FuzzTarget *t)
{
    return g_string_new(TARGET_NAME " -display none -audio none -machine pc "
                        "-nodefaults -accel qtest -m 1 -rtc clock=vm "
                        "-device snapshot,slots=5");
}

static void remove_files(void)
{
    unlink(files[0].path);
    unlink(files[1].path);
    rmdir(directory);
}

static void snapshot_file_pre_fuzz(QTestState *s)
{
    directory = g_dir_make_tmp("snapshot-fuzz-XXXXXX", NULL);
    qtest_memset(s, 64 * KiB, 0xa5, 64 * KiB);
    must("x_snapshot_device_save 0");
    open_exported(0);
    qtest_memset(s, 96 * KiB, 0x5a, 64 * KiB);
    must("x_snapshot_device_save 0");
    open_exported(1);
    atexit(remove_files);
}

static void snapshot_file_fuzz(QTestState *s, const unsigned char *data,
                               size_t size)
{
    Input in = { .data = data, .size = size };
    unsigned i = choose(&in, 2);
    bool check = choose(&in, 2);
    g_autoptr(GString) text = g_string_new(files[i].text);
    Error *err = NULL;

    do {
        snapshot_file_edit(text, files[i].places, choose, &in);
    } while (in.size && text->len);
    if (!snapshot_file_write(files[i].fd, files[i].offset, text->str,
                             text->len)) {
        abort();
    }
    qmp_x_snapshot_device_import(SLOT, files[i].path, NULL, true, check, &err);
    if (err) {
        error_free(err);
    } else {
        must("x_snapshot_device_discard %u", SLOT);
    }
    /* The other file is sound again: it may be the base. */
    if (!snapshot_file_write(files[i].fd, files[i].offset, files[i].text,
                             files[i].length)) {
        abort();
    }
}

static void register_snapshot_file_target(void)
{
    fuzz_add_target(&(FuzzTarget) {
        .name = "generic-fuzz-snapshot-file",
        .description = "Load snapshots from files that are damaged",
        .get_init_cmdline = snapshot_file_cmdline,
        .pre_fuzz = snapshot_file_pre_fuzz,
        .fuzz = snapshot_file_fuzz,
    });
}

fuzz_target_init(register_snapshot_file_target);
