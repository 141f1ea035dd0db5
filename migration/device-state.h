/*
 * Device state in memory: save CPUs and devices, and put back what changed
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef MIGRATION_DEVICE_STATE_H
#define MIGRATION_DEVICE_STATE_H

#include "vmstate-compare.h"

/**
 * DeviceStateImage: the state of all CPUs and devices, kept in memory
 *
 * It can be loaded any number of times, only into the machine that it was
 * saved from, and only while the same devices are plugged.
 *
 * All functions are called with the BQL held, and but for
 * qemu_device_state_blocked() and qemu_device_state_has() with the vCPUs
 * stopped.
 */
typedef struct DeviceStateImage DeviceStateImage;

/**
 * DeviceStateWay: what has to be reset before state can be loaded
 */
typedef enum DeviceStateWay {
    DEVICE_STATE_IN_PLACE,      /* nothing */
    DEVICE_STATE_RESET_DEVICES, /* the devices that changed */
    DEVICE_STATE_RESET_MACHINE, /* everything */
    DEVICE_STATE_WAYS,
} DeviceStateWay;

/**
 * qemu_device_state_blocked: can every active section be saved to memory?
 * @errp: set to the name of the section that cannot
 *
 * Finds handlers that only know how to write themselves to a migration
 * stream.  Unmigratable devices are qemu_savevm_state_blocked()'s to find.
 *
 * Returns: true if some section cannot be saved
 */
bool qemu_device_state_blocked(Error **errp);

/**
 * qemu_device_state_has: is there a section for this device?
 * @opaque: the device
 */
bool qemu_device_state_has(const void *opaque);

/**
 * qemu_device_state_save: save CPUs and devices, but no RAM, to memory
 * @errp: set to the name of the section that failed, and the reason
 *
 * global_state_store() was called before.  Devices may bring fields up to date
 * in pre_save(), which the guest cannot see; otherwise the machine is not
 * changed.
 *
 * Returns: the image, to be freed with qemu_device_state_free(), or NULL
 */
DeviceStateImage *qemu_device_state_save(Error **errp);

/**
 * qemu_device_state_matches: does the machine still have these sections?
 * @image: what qemu_device_state_save() returned
 * @errp: set to the name of the first device that came or went
 */
bool qemu_device_state_matches(const DeviceStateImage *image, Error **errp);

/**
 * qemu_device_state_choose: find the sections that changed
 * @image: an image for which qemu_device_state_matches() holds
 *
 * To be called before RAM is put back, while devices are as their sections
 * tell.  Of the machine, only its clock is put back by this, as the state of
 * others depends on it; and not even that, if the machine has to be reset.
 *
 * Returns: how to go on: RAM has to be put back, and
 *          qemu_device_state_load_changed() follows, after
 *          qemu_device_state_reset() where that is needed; or a reset of the
 *          machine, RAM, and qemu_device_state_load().
 */
DeviceStateWay qemu_device_state_choose(DeviceStateImage *image);

/**
 * qemu_device_state_unchoose: leave the machine as it was found
 *
 * After qemu_device_state_choose(), if nothing else was done.
 */
void qemu_device_state_unchoose(DeviceStateImage *image);

/**
 * qemu_device_state_reset: reset the devices that changed
 *
 * Returns: false if the machine has to be reset
 */
bool qemu_device_state_reset(DeviceStateImage *image);

/**
 * qemu_device_state_load_changed: load the sections that changed
 *
 * RAM was put back before, for virtio devices read their rings.  Then each
 * section must be as it was saved; if others were changed by that, an
 * interrupt line say, they are loaded again.
 *
 * Returns: false if that cannot be reached; then the machine must be reset, and
 *          everything loaded.  Each section that changed was loaded all the
 *          same, as far as it can be, so that devices agree with each other.
 */
bool qemu_device_state_load_changed(DeviceStateImage *image);

/**
 * qemu_device_state_load: load all sections, in a machine that was reset
 * @errp: set to the name of the section that failed, and the reason
 *
 * RAM was put back before.
 *
 * Returns: false if the machine is left in an undefined state
 */
bool qemu_device_state_load(DeviceStateImage *image, Error **errp);

/**
 * DeviceStateBytes: a section of an image, as it is in a file
 */
typedef struct DeviceStateBytes {
    const char *idstr;
    uint32_t instance_id;
    uint32_t version_id;
    const uint8_t *data;        /* without header and footer */
    size_t length;
} DeviceStateBytes;

/**
 * qemu_device_state_bytes: what is to be in a file of an image
 * @image: for which qemu_device_state_matches() holds
 *
 * Returns: of DeviceStateBytes, which point to what is the image's; the caller
 *          owns the array
 */
GArray *qemu_device_state_bytes(const DeviceStateImage *image);

/**
 * qemu_device_state_open: make an image of sections that come from a file
 * @sections: of DeviceStateBytes, which are copied
 * @errp: set to a section that the machine has and they have not, or the other
 *        way round, or that is of another version
 *
 * What is in them is not looked at: it is loaded after a reset of the machine,
 * and the image that is restored from then on is one of the machine that this
 * gives.  To compare with this one before makes no sense.
 */
DeviceStateImage *qemu_device_state_open(const GArray *sections, Error **errp);

/**
 * qemu_device_state_open_stream: make an image of a migration stream
 * @data: the stream behind RAM, which is copied
 *
 * As qemu_device_state_open(); but what sections it has is not known before it
 * is loaded, which is done as for a migration.
 */
DeviceStateImage *qemu_device_state_open_stream(const uint8_t *data,
                                                size_t length);

/** qemu_device_state_opened: is it an image of qemu_device_state_open()? */
bool qemu_device_state_opened(const DeviceStateImage *image);

/** qemu_device_state_is_stream: of qemu_device_state_open_stream()? */
bool qemu_device_state_is_stream(const DeviceStateImage *image);

/**
 * qemu_device_state_reason: why something was reset
 *
 * Returns: the section, and the field if one is known, that asked for the last
 *          reset, or NULL if nothing was reset since the save
 */
const char *qemu_device_state_reason(const DeviceStateImage *image);

/**
 * qemu_device_state_verify: find the CPUs and devices that are not as saved
 * @image: an image for which qemu_device_state_matches() holds
 * @fn: called for each field that differs
 */
void qemu_device_state_verify(const DeviceStateImage *image,
                              DeviceStateDifferenceFn *fn, void *opaque);

/** qemu_device_state_size: how many bytes the state itself takes */
size_t qemu_device_state_size(const DeviceStateImage *image);

/** qemu_device_state_free: forget an image; NULL is allowed */
void qemu_device_state_free(DeviceStateImage *image);

G_DEFINE_AUTOPTR_CLEANUP_FUNC(DeviceStateImage, qemu_device_state_free)

#endif /* MIGRATION_DEVICE_STATE_H */
