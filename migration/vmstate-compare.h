/*
 * Device state: what differs from a serialised one, field by field
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef MIGRATION_VMSTATE_COMPARE_H
#define MIGRATION_VMSTATE_COMPARE_H

#include "migration/vmstate.h"

/** DeviceStateDifference: a section or a field that is not as it was saved */
typedef struct DeviceStateDifference {
    const char *section;
    uint32_t instance;              /* among sections of this name */
    const VMStateDescription *vmsd; /* of the section; NULL: it has no fields */
    const char *field;              /* with its path; NULL: all the section */
    const uint8_t *saved, *found;   /* as in a stream */
    size_t saved_length, found_length;      /* in bytes; 0: it is not there */
} DeviceStateDifference;

/**
 * DeviceStateDifferenceFn: called for each difference
 * @d: with all that it points to, valid during the call only
 *
 * Returns: false if no others are asked for
 */
typedef bool DeviceStateDifferenceFn(const DeviceStateDifference *d,
                                     void *opaque);

/**
 * vmstate_compare: find the fields in which a device differs from a section
 * @section: the section as it was saved and as it is; has a @vmsd
 * @dev: the device, what vmstate_save_state() is given as @opaque
 * @fn: called with @fn_opaque for each field that differs, in order
 *
 * A subsection that is on one side only is one difference.  Where a field has
 * changed its length, or a subsection has gone, nothing that follows in the
 * section is compared, for it cannot be told what belongs together.
 */
void vmstate_compare(const DeviceStateDifference *section, void *dev,
                     DeviceStateDifferenceFn *fn, void *fn_opaque);

#endif /* MIGRATION_VMSTATE_COMPARE_H */
