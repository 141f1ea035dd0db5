/*
 * Coverage of the guest's code, as a fuzzer wants it: -object tcg-coverage
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef EXEC_TCG_COVERAGE_H
#define EXEC_TCG_COVERAGE_H

#include "hw/core/cpu.h"

#ifdef CONFIG_TCG

/**
 * tcg_coverage_begin_run() - forget what was counted
 *
 * Clears the map, and does what tcg_coverage_restored() does. Without a
 * tcg-coverage object, it does nothing.
 *
 * Call it with the BQL held, while no vCPU executes code of the guest's.
 */
void tcg_coverage_begin_run(void);

/**
 * tcg_coverage_restored() - the vCPUs were put back to a state of before
 *
 * The first block of each vCPU has no predecessor now. Without a tcg-coverage
 * object, it does nothing.
 *
 * Call it with the BQL held, while no vCPU executes code of the guest's.
 */
void tcg_coverage_restored(void);

/**
 * tcg_coverage_map() - where edges are counted
 * @size: set to the map's size in bytes, a power of two, or 0
 *
 * Returns the map, one byte for each edge, or NULL if there is no tcg-coverage
 * object. It is valid until the BQL is released. vCPUs write to it without any
 * lock.
 */
uint8_t *tcg_coverage_map(size_t *size);

/**
 * tcg_coverage_set_base() - where the guest's code was loaded
 * @base: what is subtracted from its addresses
 *
 * As the object's property "base": code that was translated is translated
 * anew, from each vCPU's next block on. Call it with the BQL held, from any
 * thread. Returns false if there is no tcg-coverage object.
 */
bool tcg_coverage_set_base(uint64_t base);

/**
 * tcg_coverage_set_page_table() - count one address space only
 * @page_table: the physical address of its page table; 0 for any
 *
 * As the object's property "page-table". It holds from each vCPU's next block
 * on. Call it with the BQL held, from any thread. Returns false if there is no
 * tcg-coverage object, or the target cannot tell page tables apart.
 */
bool tcg_coverage_set_page_table(uint64_t page_table);

/**
 * tcg_coverage_update() - a vCPU has got another page table
 * @cpu: the vCPU; it does not execute code of the guest's, or is the caller's
 */
void tcg_coverage_update(CPUState *cpu);

/**
 * tcg_coverage_interrupt() - a vCPU is about to take a hardware interrupt
 * @cpu: the caller's vCPU; its state is what the handler is to return to
 */
void tcg_coverage_interrupt(CPUState *cpu);

#else

static inline void tcg_coverage_begin_run(void)
{
}

static inline void tcg_coverage_restored(void)
{
}

static inline uint8_t *tcg_coverage_map(size_t *size)
{
    *size = 0;
    return NULL;
}

static inline bool tcg_coverage_set_base(uint64_t base)
{
    return false;
}

static inline bool tcg_coverage_set_page_table(uint64_t page_table)
{
    return false;
}

static inline void tcg_coverage_update(CPUState *cpu)
{
}

#endif /* CONFIG_TCG */

#endif /* EXEC_TCG_COVERAGE_H */
