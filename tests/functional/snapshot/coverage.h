/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Snapshot test guest: code in assembly whose blocks the host knows
 */

#ifndef SNAPSHOT_GUEST_COVERAGE_H
#define SNAPSHOT_GUEST_COVERAGE_H

#include <stdint.h>

/*
 * eax: which path, 1 with I/O, 2 with code that is written to; ebx: a register
 * of the device; ecx: how often to loop
 */
void cover_code(void);

/* What an interrupt handler calls */
void cover_handler(void);

/* That code in ring 3, with @stack, selectors @code and @data */
void cover_in_user(uint32_t *stack, uint32_t code, uint32_t data);
/* From the handler of the fault that it ends with: back to its caller */
void cover_leave_user(void);

#endif /* SNAPSHOT_GUEST_COVERAGE_H */
