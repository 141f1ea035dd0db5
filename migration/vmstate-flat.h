/*
 * Flattened VMState: find what of the device state changed, and put it back
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef MIGRATION_VMSTATE_FLAT_H
#define MIGRATION_VMSTATE_FLAT_H

#include "migration/register.h"
#include "migration/vmstate.h"

/**
 * VMStateFlat: state that VMStateDescriptions describe, as a list of steps
 *
 * What saving and loading do is decided at each field: does it exist, how many
 * elements has it, where is it.  Here this was decided once; what remains is a
 * list of memory ranges with what is to be in them, of timers, and of the hooks
 * to call in between, in the order of the stream.  Each decision is a step as
 * well: one that comes out otherwise now is noticed before anything is changed.
 *
 * All functions are called with the BQL held and the vCPUs stopped.  What
 * devices call to flatten what has a format of its own is in
 * migration/vmstate.h.
 */

/**
 * VMStateFlatHow: what may be done with a section that is not as it was saved
 */
typedef enum VMStateFlatHow {
    VMSTATE_FLAT_SAME,          /* nothing without a reset */
    VMSTATE_FLAT_IN_PLACE,      /* it may be loaded without a reset */
    VMSTATE_FLAT_ALONE,         /* so it may, which changes no other section */
    VMSTATE_FLAT_CLOCK,         /* so it may, before others are looked at */
} VMStateFlatHow;

/**
 * VMStateFollowsHostFn: may a field differ from what was loaded?
 *
 * That is so of the time of day, if it is the host's.
 */
typedef bool VMStateFollowsHostFn(const VMStateDescription *vmsd,
                                  const char *field);

/** vmstate_flat_new: a list without steps; the caller owns it */
VMStateFlat *vmstate_flat_new(VMStateFollowsHostFn *follows_host);

/** vmstate_flat_free: free a list, or NULL */
void vmstate_flat_free(VMStateFlat *flat);

/**
 * vmstate_flat_add: append the steps of one section
 * @name: for traces; must live as long as @flat
 * @present: did vmstate_section_needed() say that it is to be saved?
 * @how: what may be done with it
 *
 * The state is taken as vmstate_save_state() leaves it, which must have been
 * called, if @present, with nothing having run in between.
 *
 * Returns: false if the section cannot be flattened
 */
bool vmstate_flat_add(VMStateFlat *flat, const char *name,
                      const VMStateDescription *vmsd, void *opaque,
                      bool present, VMStateFlatHow how);

/**
 * vmstate_flat_add_ops: append a section that has no description
 *
 * It is serialised each time, and loaded in place if it changed.
 */
void vmstate_flat_add_ops(VMStateFlat *flat, const char *name,
                          const SaveVMHandlers *ops, void *opaque,
                          int version_id);

/**
 * vmstate_flat_check: find the sections that have to be loaded
 *
 * To be called before RAM is put back, while devices are as their sections
 * tell.  Only the clock is put back by this, as others depend on it.
 *
 * Returns: false if loading without a reset is not enough: a section does not
 *          consist of the same fields any more, or may not be loaded
 */
bool vmstate_flat_check(VMStateFlat *flat);

/**
 * vmstate_flat_load: load the sections that vmstate_flat_check() found
 *
 * A section is loaded whole, as vmstate_load_state() would: with its hooks, and
 * without what the hooks and those of its subsections that are absent leave
 * alone.  Then it must be as it was saved; if others may have been changed by
 * that, they are looked at again, and loaded.
 *
 * Returns: false if that cannot be reached; then the machine must be reset, and
 *          everything loaded.  Each section that changed was loaded all the
 *          same, as far as it can be, so that devices agree with each other.
 */
bool vmstate_flat_load(VMStateFlat *flat);

#endif /* MIGRATION_VMSTATE_FLAT_H */
