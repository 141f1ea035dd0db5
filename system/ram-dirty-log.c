/*
 * Dirty log: the list of RAM pages that were written to
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/atomic.h"
#include "qemu/bitmap.h"
#include "qemu/host-utils.h"
#include "qemu/rcu.h"
#include "exec/cputlb.h"
#include "exec/memory.h"
#include "exec/ram-dirty-log.h"
#include "exec/ramblock.h"
#include "exec/target_page.h"
#include "hw/core/cpu.h"
#include "system/kvm.h"
#include "system/tcg.h"

static void dirty_log_free(RAMDirtyLog *log)
{
    g_free(log->bitmap);
    g_free(log->list);
    g_free(log);
}

/* Of TCG, only a TLB miss or a write that is trapped looks at the log. */
static void trap_writes(void)
{
    CPUState *cpu;

    if (tcg_enabled()) {
        CPU_FOREACH(cpu) {
            tlb_flush(cpu);
        }
    }
}

static void dirty_log_set(RAMDirtyLog *log)
{
    RAMDirtyLog *old = ram_list.dirty_log;

    qatomic_rcu_set(&ram_list.dirty_log, log);
    if (old) {
        call_rcu(old, dirty_log_free, rcu);
    }
    trap_writes();
}

RAMDirtyLog *ram_dirty_log_start(Error **errp)
{
    ram_addr_t end = 0;
    RAMDirtyLog *log;
    RAMBlock *rb;

    if (kvm_enabled() &&
        !memory_global_dirty_log_start(GLOBAL_DIRTY_SNAPSHOT, errp)) {
        return NULL;
    }
    log = g_new0(RAMDirtyLog, 1);
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
    if (kvm_enabled()) {
        memory_global_dirty_log_stop(GLOBAL_DIRTY_SNAPSHOT);
    }
}

bool ram_dirty_log_sync(void)
{
    return !kvm_enabled() || kvm_dirty_log_collect();
}

void ram_dirty_log_clear(RAMDirtyLog *log)
{
    unsigned i;

    for (i = 0; i < log->len; i++) {
        clear_bit(log->list[i], log->bitmap);
    }
    log->len = 0;
    trap_writes();
}

static void dirty_log_append(RAMDirtyLog *log, uint32_t page)
{
    log->list[qatomic_fetch_inc(&log->len)] = page;
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
            dirty_log_append(log, page);
        }
    }
}

void ram_dirty_log_add_word(RAMDirtyLog *log, size_t word, unsigned long bits)
{
    size_t page = word * BITS_PER_LONG;

    if (page >= log->nr_pages) {
        return;
    }
    if (log->nr_pages - page < BITS_PER_LONG) {
        bits &= BITMAP_LAST_WORD_MASK(log->nr_pages);
    }
    bits &= ~qatomic_fetch_or(&log->bitmap[word], bits);
    for (; bits; bits &= bits - 1) {
        dirty_log_append(log, page + ctzl(bits));
    }
}
