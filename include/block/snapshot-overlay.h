/*
 * The snapshot-overlay block driver, for those who save and restore it
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef BLOCK_SNAPSHOT_OVERLAY_H
#define BLOCK_SNAPSHOT_OVERLAY_H

#include "qapi/qapi-types-block-core.h"
#include "block/graph-lock.h"
#include "qemu/job.h"

/*
 * A node of the driver has its present content, and any number of slots, each
 * of which is the content at the time of a save.  Clusters that are the same in
 * several of them exist once.
 *
 * Unless said otherwise, functions here are called with the BQL held, and with
 * no request in flight on the node, nor one that could begin: it is drained, or
 * nothing that uses it runs.  They never wait, do no I/O, and may be called on
 * any thread.
 */
typedef struct SnapshotOverlaySlot SnapshotOverlaySlot;

/**
 * bdrv_is_snapshot_overlay: whether @bs is a node of this driver
 */
bool bdrv_is_snapshot_overlay(BlockDriverState *bs);

/**
 * snapshot_overlay_insert: keep from now on what is written to a node in memory
 *
 * @bs: any node, used or not; it becomes read-only, unless it is a temporary
 *      file, which cannot be opened anew
 * @options: options of the driver (overlay-size, overlay-dir, node-name) but
 *           @file, or %NULL; the reference goes to this function
 * @errp: why that cannot be, if somebody else writes to @bs, say
 *
 * All that use @bs use the new node instead.  May drain and poll, so that it
 * can only be called in the main loop, not in a coroutine, and with nothing
 * drained.
 *
 * Returns: the new node, whose reference the caller has and, unless it means to
 * delete the node, can drop once something uses it; %NULL on failure, with all
 * as it was.
 */
BlockDriverState *snapshot_overlay_insert(BlockDriverState *bs, QDict *options,
                                          Error **errp);

/**
 * snapshot_overlay_save: make a slot of the present content
 *
 * @bs: a node of this driver
 *
 * Takes time for each cluster written since the last save or restore.  Cannot
 * fail.
 *
 * Returns: the slot, for snapshot_overlay_discard(), though @bs be gone before.
 */
SnapshotOverlaySlot *snapshot_overlay_save(BlockDriverState *bs);

/**
 * snapshot_overlay_slot_bs: the node that a slot is of
 *
 * @slot: the slot
 *
 * Returns: the node, or %NULL if it was closed: there is nothing to go back to.
 */
BlockDriverState *snapshot_overlay_slot_bs(SnapshotOverlaySlot *slot);

/**
 * snapshot_overlay_digest: a number that is another one for another content
 *
 * @bs: a node of this driver
 *
 * Takes time for all that is in memory.  What is in the file is not read: of it
 * only the place counts.
 *
 * Returns: a CRC, of the present content
 */
uint32_t snapshot_overlay_digest(BlockDriverState *bs);

/**
 * snapshot_overlay_restore: make the content of a slot the present one
 *
 * @slot: a slot of a node that is there
 *
 * The slot stays as it is, all others too.  Takes time for each cluster that
 * was written since the last save or restore, and if that was of another slot,
 * for each that differs between the two.  Cannot fail.
 *
 * Dirty bitmaps of the node count what changes as written.
 *
 * Returns: the number of clusters, or of areas that were zeroed as a whole,
 * that were put back.
 */
uint64_t snapshot_overlay_restore(SnapshotOverlaySlot *slot);

/**
 * snapshot_overlay_discard: forget a slot
 *
 * @slot: the slot, which is freed
 *
 * The present content and other slots stay as they are.  Takes time for each
 * cluster that differs between the slot and its neighbours in time.  With the
 * last slot, memory that is not in use goes back to the host, and if there was
 * a commit, that of all that did not change since.
 */
void snapshot_overlay_discard(SnapshotOverlaySlot *slot);

/**
 * snapshot_overlay_query: how much there is
 *
 * @bs: a node of this driver
 * @stats: set; see its description in QAPI
 *
 * Unlike the others, may be called at any time.
 */
void snapshot_overlay_query(BlockDriverState *bs,
                            BlockStatsSpecificSnapshotOverlay *stats);

/**
 * snapshot_overlay_is_empty: is all as below, with no slots?
 *
 * @bs: a node of this driver
 *
 * May be called at any time, too.
 */
bool snapshot_overlay_is_empty(BlockDriverState *bs);

/*
 * To commit is to write the present content to the node below.  Slots stay as
 * they are: what is there before is kept for them, in memory or in the file as
 * clusters are.
 */
typedef struct SnapshotOverlayCommit SnapshotOverlayCommit;

/**
 * snapshot_overlay_commit_begin: prepare to write to the node below
 *
 * @bs: a node of this driver
 * @job: to be paused while others want the node below idle, or %NULL
 * @errp: why that cannot be, with the name of the node
 *
 * The node below becomes writable, and @bs is drained, until
 * snapshot_overlay_commit_end(): requests of its users wait.  Slots may be
 * saved, restored and discarded before the first piece is committed.
 *
 * For the main loop, as it drains and polls; not in a coroutine.
 *
 * Returns: for snapshot_overlay_commit_end(), or %NULL with nothing changed
 */
SnapshotOverlayCommit *snapshot_overlay_commit_begin(BlockDriverState *bs,
                                                     Job *job, Error **errp);

/**
 * snapshot_overlay_commit_bytes: how much is to be written, in bytes
 */
uint64_t snapshot_overlay_commit_bytes(SnapshotOverlayCommit *c);

/**
 * snapshot_overlay_co_commit: write the next piece
 *
 * @c: a commit
 * @errp: what failed and where
 *
 * Pieces are written in ascending order.  After the last one all is flushed;
 * if there are no slots then, nothing stays in memory, as all is as below.
 *
 * All versions read as before, also after an error, but the image has part of
 * the content then.  A commit that is begun anew writes it all.
 *
 * Returns: the bytes written, as snapshot_overlay_commit_bytes() counts them; 0
 * if that was all; or a negative errno with @errp set
 */
int64_t coroutine_fn GRAPH_UNLOCKED
snapshot_overlay_co_commit(SnapshotOverlayCommit *c, Error **errp);

/**
 * snapshot_overlay_commit_end: let the node below be as it was, and @bs go on
 *
 * @c: the commit, which is freed, complete or not
 *
 * As snapshot_overlay_commit_begin(), for the main loop.
 */
void snapshot_overlay_commit_end(SnapshotOverlayCommit *c);

/*
 * To export is to write what a slot has to a new qcow2 image, whose backing
 * file is the image of the node below.  All goes on meanwhile: requests, and
 * slots that are saved, restored and discarded; only a commit has to wait.
 *
 * As with any image that has a backing file, it is of no use any more once
 * somebody, a later commit say, has changed the image below.
 */
typedef struct SnapshotOverlayExport SnapshotOverlayExport;

/**
 * snapshot_overlay_export_begin: create the image, with nothing in it yet
 *
 * @slot: the slot; its content is kept until snapshot_overlay_export_end(), so
 *        that it can be discarded
 * @filename: path of the image.  There must be no such file.  %NULL: none is
 *            created, and nothing can be written; to hold the slot, to keep
 *            commits away, and to know how much there is
 * @job: to be paused while others want all idle, or %NULL
 * @errp: why that cannot be, with the name of the node or the file
 *
 * What is mostly in a row is written past the host's cache, where the file
 * system can do that; the rest is put together there, and leaves it at the end.
 *
 * There may be requests in flight.  Takes as much memory as the node has for
 * where its clusters are, and time for each of them.
 *
 * For the main loop, as it polls; not in a coroutine.
 *
 * Returns: for snapshot_overlay_export_end(), or %NULL with nothing changed and
 * no file
 */
SnapshotOverlayExport *
snapshot_overlay_export_begin(SnapshotOverlaySlot *slot, const char *filename,
                              Job *job, Error **errp);

/**
 * snapshot_overlay_export_bytes: how much is to be written, in bytes
 *
 * More than that may be in the image, which also has to say where all is; and
 * less, as zeroes take hardly any space.
 */
uint64_t snapshot_overlay_export_bytes(SnapshotOverlayExport *x);

/**
 * snapshot_overlay_co_export: write the next piece
 *
 * @x: an export
 * @errp: what failed and where
 *
 * For a coroutine in the main loop.  A piece has some MiB.  After the last one
 * the image is complete, and on the disk, but for its directory entry.
 *
 * Returns: the bytes written, as snapshot_overlay_export_bytes() counts them; 0
 * if that was all; or a negative errno with @errp set: then the image is not
 * complete and never will be.
 */
int64_t coroutine_fn GRAPH_UNLOCKED
snapshot_overlay_co_export(SnapshotOverlayExport *x, Error **errp);

/**
 * snapshot_overlay_export_end: close the image
 *
 * @x: the export, which is freed, complete or not
 *
 * If it is not complete, the file is left to the caller to delete.  Drains the
 * node if the slot was discarded.  For the main loop, as it polls.
 */
void snapshot_overlay_export_end(SnapshotOverlayExport *x);

#endif
