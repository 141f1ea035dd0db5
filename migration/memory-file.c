/*
 * State in memory, through a QEMUFile that is made once
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "io/channel-buffer.h"
#include "memory-file.h"

static QIOChannelBuffer *out_buffer, *in_buffer;
static QEMUFile *out, *in;

/* A file keeps its error, and bytes that nobody took. */
static void close_file(QEMUFile **f, QIOChannelBuffer **buffer)
{
    if (*f) {
        qemu_fclose(*f);
        object_unref(OBJECT(*buffer));
        *f = NULL;
    }
}

QEMUFile *memory_file_write(void)
{
    if (!out) {
        out_buffer = qio_channel_buffer_new(0);
        out = qemu_file_new_output(QIO_CHANNEL(out_buffer));
    }
    out_buffer->usage = out_buffer->offset = 0;
    return out;
}

const uint8_t *memory_file_written(uint32_t mark, size_t *length)
{
    qemu_put_be32(out, mark);
    if (qemu_fflush(out)) {
        close_file(&out, &out_buffer);
        return NULL;
    }
    *length = out_buffer->usage;
    return out_buffer->data;
}

QEMUFile *memory_file_read(const uint8_t *data, size_t length)
{
    if (!in) {
        in_buffer = qio_channel_buffer_new(0);
        in = qemu_file_new_input(QIO_CHANNEL(in_buffer));
        g_free(in_buffer->data);
    }
    in_buffer->data = (uint8_t *)data;
    in_buffer->capacity = in_buffer->usage = length;
    in_buffer->offset = 0;
    return in;
}

bool memory_file_read_all(uint32_t mark)
{
    bool ok = qemu_get_be32(in) == mark && !qemu_file_get_error(in);

    /* The data is the caller's. */
    in_buffer->data = NULL;
    if (!ok) {
        close_file(&in, &in_buffer);
    }
    return ok;
}
