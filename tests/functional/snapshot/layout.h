/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Snapshot test guest: numbers that C and assembly share
 */

#ifndef SNAPSHOT_GUEST_LAYOUT_H
#define SNAPSHOT_GUEST_LAYOUT_H

#define SEL_CODE32      0x08
#define SEL_DATA        0x10
#define SEL_CODE64      0x18
#define SEL_FREE(n)     (0x20 + 8 * (n)) /* descriptors for the cases' use */
#define SEL_FREE_COUNT  8

#define AP_TRAMPOLINE   0x8000          /* below 1 MiB, page aligned */

#endif /* SNAPSHOT_GUEST_LAYOUT_H */
