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

/** vmstate_flat_new: a list without steps; the caller owns it */
VMStateFlat *vmstate_flat_new(void);

/** vmstate_flat_free: free a list, or NULL */
void vmstate_flat_free(VMStateFlat *flat);

/**
 * vmstate_flat_add: append the steps of one section
 * @name: for traces; must live as long as @flat
 * @present: did vmstate_section_needed() say that it is to be saved?
 * @in_place: may it be loaded without a reset?  Else it must not change.
 *
 * The state is taken as vmstate_save_state() leaves it, which must have been
 * called, if @present, with nothing having run in between.
 *
 * Returns: false if the section cannot be flattened
 */
bool vmstate_flat_add(VMStateFlat *flat, const char *name,
                      const VMStateDescription *vmsd, void *opaque,
                      bool present, bool in_place);

/**
 * vmstate_flat_add_ops: append a section that has no description
 *
 * It is serialised each time, and loaded in place if it changed.
 */
void vmstate_flat_add_ops(VMStateFlat *flat, const char *name,
                          const SaveVMHandlers *ops, void *opaque,
                          int version_id);

/**
 * vmstate_flat_may_restore: are those as they were that must not change?
 *
 * To be asked where it would be too late when vmstate_flat_restore() finds out.
 * That it then succeeds is likely, not certain.
 */
bool vmstate_flat_may_restore(VMStateFlat *flat);

/**
 * vmstate_flat_restore: load the sections that are not as they were
 *
 * A section is loaded whole, as vmstate_load_state() would: with its hooks, and
 * without what the hooks and those of its subsections that are absent leave
 * alone.
 *
 * Returns: false if a section does not consist of the same fields any more,
 *          or may not or cannot be loaded; then the machine must be reset, and
 *          everything loaded
 */
bool vmstate_flat_restore(VMStateFlat *flat);

#endif /* MIGRATION_VMSTATE_FLAT_H */
