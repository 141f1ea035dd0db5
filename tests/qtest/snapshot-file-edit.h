/*
 * Descriptions of snapshots in files that are not what an export writes, for
 * snapshot-file-test and for the fuzzer
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef SNAPSHOT_FILE_EDIT_H
#define SNAPSHOT_FILE_EDIT_H

/** SnapshotFileChoose: returns a number less than @n */
typedef unsigned SnapshotFileChoose(void *opaque, unsigned n);

/**
 * snapshot_file_places: where numbers, strings and elements of a list begin
 *
 * Returns: offsets in the description, of unsigned
 */
GArray *snapshot_file_places(const char *text);

/** snapshot_file_edit: change a description in one place, by chance */
void snapshot_file_edit(GString *s, const GArray *places,
                        SnapshotFileChoose *choose, void *opaque);

/**
 * snapshot_file_write: give a file another description
 * @offset: of the description, which is at the file's end
 *
 * Its sums are right, so that what it says is looked at.
 *
 * Returns: false if that failed
 */
bool snapshot_file_write(int fd, uint64_t offset, const char *text,
                         size_t length);

#endif /* SNAPSHOT_FILE_EDIT_H */
