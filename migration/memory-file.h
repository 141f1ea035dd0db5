/*
 * State in memory, through a QEMUFile that is made once
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef MIGRATION_MEMORY_FILE_H
#define MIGRATION_MEMORY_FILE_H

#include "qemu-file.h"

/*
 * One writer and one reader at a time, with the BQL held.  Both write, or
 * expect, a mark behind the state, as some that read state look at the byte
 * behind theirs.
 */

/** memory_file_write: begin to write; the file stays ours */
QEMUFile *memory_file_write(void);

/**
 * memory_file_written: end what memory_file_write() began
 * @mark: to be written behind it
 * @length: set to the number of bytes, with the mark's
 *
 * Returns: the bytes, which are there until the next write, or NULL if there
 *          was an error
 */
const uint8_t *memory_file_written(uint32_t mark, size_t *length);

/** memory_file_read: begin to read @length bytes; the file stays ours */
QEMUFile *memory_file_read(const uint8_t *data, size_t length);

/**
 * memory_file_read_all: end what memory_file_read() began
 *
 * Returns: false if there was an error, or if what follows is not @mark
 */
bool memory_file_read_all(uint32_t mark);

#endif /* MIGRATION_MEMORY_FILE_H */
