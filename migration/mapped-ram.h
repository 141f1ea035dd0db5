/*
 * The header of a RAM block in a file of mapped-ram
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef MIGRATION_MAPPED_RAM_H
#define MIGRATION_MAPPED_RAM_H

#define MAPPED_RAM_HDR_VERSION 1

/* Big-endian, behind the block's name and its length */
struct MappedRamHeader {
    uint32_t version;
    uint64_t page_size;         /* of the target, in bytes: of a bit */
    uint64_t bitmap_offset;     /* in the file: bit set, page is there */
    uint64_t pages_offset;      /* in the file: of the block's first page */
} QEMU_PACKED;
typedef struct MappedRamHeader MappedRamHeader;

#endif /* MIGRATION_MAPPED_RAM_H */
