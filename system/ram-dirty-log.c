/*
 * Dirty log: the list of RAM pages that were written to
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/atomic.h"
#include "qemu/bitops.h"
#include "qemu/rcu.h"
#include "exec/cputlb.h"
#include "exec/ram-dirty-log.h"
#include "exec/ramblock.h"
#include "exec/target_page.h"
#include "hw/core/cpu.h"
#include "system/tcg.h"

static void dirty_log_free(RAMDirtyLog *log)
{
    g_free(log->bitmap);
    g_free(log->list);
    g_free(log);
}

static void dirty_log_set(RAMDirtyLog *log)
{
    RAMDirtyLog *old = ram_list.dirty_log;
    CPUState *cpu;

    qatomic_rcu_set(&ram_list.dirty_log, log);
    if (old) {
        call_rcu(old, dirty_log_free, rcu);
    }
    if (tcg_enabled()) {
        CPU_FOREACH(cpu) {
            tlb_flush(cpu);
        }
    }
}

RAMDirtyLog *ram_dirty_log_start(void)
{
    RAMDirtyLog *log = g_new0(RAMDirtyLog, 1);
    ram_addr_t end = 0;
    RAMBlock *rb;

    WITH_RCU_READ_LOCK_GUARD() {
        RAMBLOCK_FOREACH(rb) {
            end = MAX(end, rb->offset + rb->used_length);
        }
    }
    log->page_bits = qemu_target_page_bits();
    log->nr_pages = end >> log->page_bits;
    log->bitmap = g_new0(unsigned long, BITS_TO_LONGS(log->nr_pages));
    log->list = g_new(uint32_t, log->nr_pages);
    dirty_log_set(log);
    return log;
}

void ram_dirty_log_stop(void)
{
    dirty_log_set(NULL);
}

void ram_dirty_log_add(RAMDirtyLog *log, ram_addr_t start, ram_addr_t length)
{
    ram_addr_t page = start >> log->page_bits;
    ram_addr_t last = MIN((start + length - 1) >> log->page_bits,
                          (ram_addr_t)log->nr_pages - 1);

    for (; page <= last; page++) {
        unsigned long *word = &log->bitmap[BIT_WORD(page)];
        unsigned long bit = BIT_MASK(page);

        if (!(qatomic_read(word) & bit) &&
            !(qatomic_fetch_or(word, bit) & bit)) {
            log->list[qatomic_fetch_inc(&log->len)] = page;
        }
    }
}
