/*
 * Dirty log: the list of RAM pages that were written to
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/atomic.h"
#include "qemu/bitmap.h"
#include "qemu/host-utils.h"
#include "qemu/lockable.h"
#include "qemu/rcu.h"
#include "exec/cputlb.h"
#include "exec/memory.h"
#include "exec/ram-dirty-log.h"
#include "exec/ramblock.h"
#include "exec/target_page.h"
#include "hw/core/cpu.h"
#include "system/kvm.h"
#include "system/tcg.h"

/* A piece of RAM that devices have mapped to write to it */
typedef struct WriteMapping {
    void *host;
    ram_addr_t start;
    ram_addr_t length;
    unsigned count;             /* of mappings that start at @host */
} WriteMapping;

static struct {
    bool tracked;
    QemuMutex lock;             /* of @by_host */
    GHashTable *by_host;        /* of WriteMapping */
} write_mappings;

void ram_write_mappings_track(void)
{
    if (!write_mappings.tracked) {
        qemu_mutex_init(&write_mappings.lock);
        write_mappings.by_host = g_hash_table_new_full(NULL, NULL, NULL,
                                                       g_free);
        qatomic_store_release(&write_mappings.tracked, true);
    }
}

void ram_write_mapping_add(void *host, ram_addr_t start, ram_addr_t length)
{
    WriteMapping *m;

    if (likely(!qatomic_load_acquire(&write_mappings.tracked))) {
        return;
    }
    QEMU_LOCK_GUARD(&write_mappings.lock);
    m = g_hash_table_lookup(write_mappings.by_host, host);
    if (!m) {
        m = g_new0(WriteMapping, 1);
        m->host = host;
        m->start = start;
        g_hash_table_insert(write_mappings.by_host, host, m);
    }
    m->length = MAX(m->length, length);
    m->count++;
}

static gboolean mapping_contains(gpointer key, gpointer value, gpointer host)
{
    const WriteMapping *m = value;

    return (uintptr_t)host - (uintptr_t)m->host < m->length;
}

void ram_write_mapping_remove(void *host)
{
    WriteMapping *m;

    if (likely(!qatomic_load_acquire(&write_mappings.tracked))) {
        return;
    }
    QEMU_LOCK_GUARD(&write_mappings.lock);
    m = g_hash_table_lookup(write_mappings.by_host, host);
    if (!m) {
        /* Who has cut off the head of an iovec gives back what is left. */
        m = g_hash_table_find(write_mappings.by_host, mapping_contains, host);
    }
    if (m && !--m->count) {
        g_hash_table_remove(write_mappings.by_host, m->host);
    }
}

/* Who holds a mapping may have written, and tells of it when it is done. */
static void dirty_log_add_mapped(RAMDirtyLog *log)
{
    GHashTableIter iter;
    gpointer value;

    if (!write_mappings.tracked) {
        return;
    }
    QEMU_LOCK_GUARD(&write_mappings.lock);
    g_hash_table_iter_init(&iter, write_mappings.by_host);
    while (g_hash_table_iter_next(&iter, NULL, &value)) {
        const WriteMapping *m = value;

        ram_dirty_log_add(log, m->start, m->length);
    }
}

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
            /* A block that grows does not change the list of blocks. */
            end = MAX(end, rb->offset + rb->max_length);
        }
    }
    log->page_bits = qemu_target_page_bits();
    log->nr_pages = end >> log->page_bits;
    log->bitmap = g_new0(unsigned long, BITS_TO_LONGS(log->nr_pages));
    log->list = g_new(uint32_t, log->nr_pages);
    dirty_log_set(log);
    trap_writes();
    return log;
}

void ram_dirty_log_stop(void)
{
    /*
     * Writes that are still trapped take the slow path once more.  To flush the
     * TLBs is up to the vCPUs' own threads, which may be running.
     */
    dirty_log_set(NULL);
    if (kvm_enabled()) {
        memory_global_dirty_log_stop(GLOBAL_DIRTY_SNAPSHOT);
    }
}

bool ram_dirty_log_sync(void)
{
    RAMDirtyLog *log = ram_list.dirty_log;
    bool ok = !kvm_enabled() || kvm_dirty_log_collect();

    dirty_log_add_mapped(log);
    return ok && !qatomic_read(&log->all);
}

void ram_dirty_log_clear(RAMDirtyLog *log, unsigned keep)
{
    unsigned i;

    for (i = keep; i < log->len; i++) {
        clear_bit(log->list[i], log->bitmap);
    }
    log->len = log->kept = keep;
    log->all = false;
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

void ram_dirty_log_written(ram_addr_t start, ram_addr_t length)
{
    RAMDirtyLog *log;

    RCU_READ_LOCK_GUARD();
    log = qatomic_rcu_read(&ram_list.dirty_log);
    if (log) {
        ram_dirty_log_add(log, start, length);
    }
}

void ram_dirty_log_written_all(void)
{
    RAMDirtyLog *log;

    RCU_READ_LOCK_GUARD();
    log = qatomic_rcu_read(&ram_list.dirty_log);
    if (log) {
        qatomic_set(&log->all, true);
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
