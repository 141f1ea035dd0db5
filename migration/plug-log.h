/*
 * Which devices were plugged and unplugged since a moment
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef MIGRATION_PLUG_LOG_H
#define MIGRATION_PLUG_LOG_H

/**
 * PlugMark: a moment to compare the machine's devices with
 *
 * Some devices have no section of their own, such as ports of virtio-serial:
 * they are found by nothing else.  All functions are called with the BQL held.
 */
typedef struct PlugMark PlugMark;

/** plug_log_start: watch devices from now on; for one user at a time */
void plug_log_start(void);

/** plug_log_stop: all marks have been freed */
void plug_log_stop(void);

/**
 * plug_mark_new: mark this moment
 *
 * Returns: to be freed with plug_mark_free()
 */
PlugMark *plug_mark_new(void);

/** plug_mark_free: forget a moment; NULL is allowed */
void plug_mark_free(PlugMark *mark);

/**
 * plug_mark_matches: are the devices those that there were at the mark?
 * @errp: set to the name of one that came or went
 *
 * A device that came and went meanwhile does not count.  One that went and
 * was plugged again does: it is another one.  Unless a device came or went
 * since the last call, this compares two numbers.
 */
bool plug_mark_matches(PlugMark *mark, Error **errp);

#endif /* MIGRATION_PLUG_LOG_H */
