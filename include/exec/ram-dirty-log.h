/*
 * Dirty log: the list of RAM pages that were written to
 *
 * The dirty bitmaps of DIRTY_MEMORY_* tell of each page whether it was written
 * to; to find those that were, all of RAM's bits must be looked at.  This log
 * is a list, so that what its user does costs in proportion to the pages that
 * changed, not to the size of the machine.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef EXEC_RAM_DIRTY_LOG_H
#define EXEC_RAM_DIRTY_LOG_H

#include "exec/cpu-common.h"
#include "exec/ramlist.h"

/**
 * RAMDirtyLog: pages written to since they were last taken from the log, and
 * those that were left in it
 *
 * Pages are numbered by their ram_addr_t.  Writers, in any thread, only add;
 * the user removes pages while no vCPU runs.  What vCPUs wrote to under KVM,
 * and devices to RAM that they have mapped, is in the log only after
 * ram_dirty_log_sync().
 */
struct RAMDirtyLog {
    struct rcu_head rcu;
    unsigned page_bits;
    uint32_t nr_pages;          /* of RAM, its blocks as long as they may be */
    bool all;                   /* any page may have been written to */
    unsigned len;               /* of @list */
    unsigned kept;              /* the first of @list: from the time before */
    unsigned long *bitmap;      /* by page: is it in @list? */
    uint32_t *list;
};

/**
 * ram_dirty_log_start: log which pages are written to from now on
 *
 * Replaces a log that there was.  RAM that is plugged later is not logged; a
 * block that is resized is.
 * Called with the BQL held and the vCPUs stopped; the TCG TLBs are flushed by
 * this, for a write to a page that is thought dirty takes no notice.  KVM's
 * logging of all memory slots is started.
 *
 * Returns: NULL with @errp set if a memory listener cannot log; a log that
 * there was then stays
 */
RAMDirtyLog *ram_dirty_log_start(Error **errp);

/**
 * ram_dirty_log_stop: end logging
 *
 * With the BQL held.  vCPUs and other threads may be running: the log is freed
 * when no writer can be using it.
 */
void ram_dirty_log_stop(void);

/**
 * ram_dirty_log_sync: add what is not in the log yet
 *
 * That is what KVM logged, and what devices have mapped to write to it.
 * To be called before the log is looked at, with the BQL held and the vCPUs
 * stopped.  There is a log.
 *
 * Returns: false if the log is not complete, and any page may be dirty
 */
bool ram_dirty_log_sync(void);

/**
 * ram_dirty_log_clear: take pages from the log
 * @keep: so many stay, the first of @list, which may be in any order
 *
 * A write to a page that stays is not trapped (unless somebody else wants to
 * know of it), and whether there was one, the log does not tell.
 * With the BQL held and the vCPUs stopped, after ram_dirty_log_sync().
 */
void ram_dirty_log_clear(RAMDirtyLog *log, unsigned keep);

/**
 * ram_dirty_log_add: note that a range was written to
 *
 * Lock-free; within an RCU critical section or with the BQL held.
 */
void ram_dirty_log_add(RAMDirtyLog *log, ram_addr_t start, ram_addr_t length);

/**
 * ram_dirty_log_written: as ram_dirty_log_add(), if there is a log
 *
 * In any thread, with no lock held.
 */
void ram_dirty_log_written(ram_addr_t start, ram_addr_t length);

/**
 * ram_dirty_log_written_all: any page of RAM may have been written to
 *
 * For those who replace RAM past the memory API (loadvm).  In any thread, with
 * no lock held.  Holds until ram_dirty_log_clear().
 */
void ram_dirty_log_written_all(void);

/**
 * ram_dirty_log_add_word: as ram_dirty_log_add(), for a word of a dirty bitmap
 * @word: its index; bit 0 is page @word * BITS_PER_LONG
 */
void ram_dirty_log_add_word(RAMDirtyLog *log, size_t word, unsigned long bits);

/**
 * ram_write_mappings_track: keep account of RAM that is mapped to be written
 *
 * From now on, until QEMU ends.  Called with the BQL held, before the machine
 * runs: there are no mappings yet.
 */
void ram_write_mappings_track(void);

/**
 * ram_write_mapping_add: address_space_map() hands out RAM that may be written
 *
 * In any thread, before the mapping is used; does nothing without
 * ram_write_mappings_track().
 */
void ram_write_mapping_add(void *host, ram_addr_t start, ram_addr_t length);

/**
 * ram_write_mapping_remove: address_space_unmap() takes it back
 * @host: the address that was handed out, or one within the mapping
 *
 * In any thread, before what was written to is set dirty.
 */
void ram_write_mapping_remove(void *host);

/**
 * ram_dirty_log_is_clean: would a write to this address be news?
 *
 * Within an RCU critical section or with the BQL held.
 */
static inline bool ram_dirty_log_is_clean(ram_addr_t addr)
{
    RAMDirtyLog *log = qatomic_rcu_read(&ram_list.dirty_log);
    ram_addr_t page;

    if (likely(!log)) {
        return false;
    }
    page = addr >> log->page_bits;
    return page < log->nr_pages &&
        !(qatomic_read(&log->bitmap[BIT_WORD(page)]) & BIT_MASK(page));
}

#endif /* EXEC_RAM_DIRTY_LOG_H */
