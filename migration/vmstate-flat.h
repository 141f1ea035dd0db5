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
 * VMStateFlat: a section that VMStateDescriptions describe, as a list of steps
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
 * VMStateFlatState: what a section is, against what it was when it was saved
 */
typedef enum VMStateFlatState {
    VMSTATE_FLAT_AS_SAVED,
    VMSTATE_FLAT_CHANGED,       /* vmstate_flat_load() puts it back */
    VMSTATE_FLAT_NOT_IN_PLACE,  /* something in it must not be loaded so */
    VMSTATE_FLAT_OTHER_FIELDS,  /* it does not consist of the same fields */
} VMStateFlatState;

/** vmstate_flat_free: free a list, or NULL */
void vmstate_flat_free(VMStateFlat *flat);

/**
 * vmstate_flat_new: the steps of a section
 * @present: did vmstate_section_needed() say that it is to be saved?
 *
 * The state is taken as vmstate_save_state() leaves it, which must have been
 * called, if @present, with nothing having run in between.
 *
 * Returns: the list, which the caller owns, or NULL if the section cannot be
 *          flattened as it is now
 */
VMStateFlat *vmstate_flat_new(const VMStateDescription *vmsd, void *opaque,
                              bool present);

/**
 * vmstate_flat_new_ops: one step for a section that has no description
 * @name: must live as long as the list
 *
 * It is serialised each time.
 */
VMStateFlat *vmstate_flat_new_ops(const char *name, const SaveVMHandlers *ops,
                                  void *opaque, int version_id);

/**
 * vmstate_flat_check: compare a section with what was saved
 * @loaded: a field that follows the host may differ, as it was loaded
 *
 * To be called while a device is as its section tells, before RAM is put back.
 */
VMStateFlatState vmstate_flat_check(VMStateFlat *flat, bool loaded);

/**
 * vmstate_flat_load: load what vmstate_flat_check() just found to be changed
 *
 * That is done as vmstate_load_state() would: with its hooks, and without what
 * the hooks and those of its subsections that are absent leave alone.
 *
 * Returns: false if a hook failed; the rest was loaded all the same
 */
bool vmstate_flat_load(VMStateFlat *flat);

/** vmstate_flat_keep: remember the clock's section, for vmstate_flat_undo() */
void vmstate_flat_keep(VMStateFlat *flat);

/** vmstate_flat_undo: put back what vmstate_flat_keep() remembered */
void vmstate_flat_undo(VMStateFlat *flat);

#endif /* MIGRATION_VMSTATE_FLAT_H */
