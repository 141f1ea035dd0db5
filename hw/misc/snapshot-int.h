/*
 * Snapshot device: what its files have in common
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef HW_MISC_SNAPSHOT_INT_H
#define HW_MISC_SNAPSHOT_INT_H

#include "chardev/char-fe.h"
#include "hw/misc/snapshot-control.h"
#include "hw/misc/snapshot-regs.h"
#include "hw/pci/pci_device.h"
#include "migration/vm-snapshot.h"
#include "qemu/event_notifier.h"
#include "system/hostmem.h"
#include "system/runstate.h"

#define TYPE_SNAPSHOT "snapshot"
OBJECT_DECLARE_SIMPLE_TYPE(SnapshotState, SNAPSHOT)

/* What a migration takes along, and a restore leaves alone */
typedef struct SnapshotRegisters {
    uint32_t status;
    uint32_t slot;
    uint64_t argument;
    uint32_t result;
    uint32_t region;
    uint64_t address[SNAPSHOT_REGIONS];
    uint64_t length[SNAPSHOT_REGIONS];
} SnapshotRegisters;

/* Where the guest is; snapshot_run_set_state() knows the legal steps. */
typedef enum SnapshotRunState {
    SNAPSHOT_RUN_NONE,          /* it has not given READY */
    SNAPSHOT_RUN_SAVING,        /* it has: the save is to come */
    SNAPSHOT_RUN_WAITING,       /* for a run, with the machine parked */
    SNAPSHOT_RUN_RUNNING,
    SNAPSHOT_RUN_ENDING,        /* RESULT was sent, the restore is to come */
    SNAPSHOT_RUN__MAX,
} SnapshotRunState;

/* A part of the guest's memory that is copied from or to the channel */
typedef struct SnapshotRegion {
    uint64_t address;           /* registers */
    uint64_t length;
    hwaddr *pages;              /* physical, by READY; NULL: no region */
    size_t size;                /* bytes, by READY */
} SnapshotRegion;

/* What the guest has asked the engine for */
typedef enum SnapshotRequest {
    SNAPSHOT_REQUEST_NONE,
    SNAPSHOT_REQUEST_COMMAND,
    SNAPSHOT_REQUEST_READY,
    SNAPSHOT_REQUEST_DONE,
} SnapshotRequest;

typedef struct SnapshotRun {
    SnapshotRunState state;
    unsigned slot;
    CPUState *cpu;              /* that gave READY; NULL: qtest did */
    SnapshotRegion regions[SNAPSHOT_REGIONS];
    struct snapshot_area areas[SNAPSHOT_REGIONS];
    uint8_t *channel;
    uint64_t channel_size;

    /* Of the run that is under way */
    uint32_t id;
    bool wanted;                /* the host that asked for it is still there */
    int64_t host_start;         /* ns, by get_clock() */
    int64_t host_deadline;      /* the same; INT64_MAX: none */
    int64_t host_left;          /* while the user has stopped the machine */
    int64_t guest_start;        /* ns, by the virtual clock */
    bool stopped;               /* it began so: the stop ends with it */
    ShutdownCause swallowed;    /* what the guest asked for, but for the run */
    int cause;                  /* why @bh shall end it; SNAPSHOT_CAUSE_* */
    QEMUTimer *host_timer;
    QEMUTimer *guest_timer;
    QEMUTimer *retry_timer;     /* to try again to put the machine back */
    int64_t give_up;            /* when that ends, by get_clock(); 0: not set */
    QEMUBH *bh;
    VMChangeStateEntry *vm_state;

    /* Of the next */
    struct snapshot_message next;       /* RUN */
    bool pending;               /* @next waits for WAITING, or for @bh */
    bool cancel_next;           /* if it has @cancel_id */
    uint32_t cancel_id;
    uint64_t untouched;         /* bql_times_locked(), if nobody has come */
} SnapshotRun;

/* To the program on the host */
typedef struct SnapshotConnection {
    bool connected;
    bool attached;              /* it has said HELLO */
    bool told_ready;
    bool broken;                /* the runs' @bh shall close the connection */
    unsigned in_len;
    struct snapshot_message in; /* the next, as far as it has come */

    /* The socket that the host may have given, on which a vCPU waits */
    int socket;                 /* -1: none */
    int orphan;                 /* one that has to be closed; -1: none */
    bool polling;
    EventNotifier kick;         /* ends @polling */
} SnapshotConnection;

struct SnapshotState {
    PCIDevice parent_obj;

    MemoryRegion bar;
    VMSnapshot *engine;
    SnapshotRequest request;
    SnapshotRun run;
    SnapshotConnection conn;

    /* properties */
    uint32_t slots;
    char *ram;
    char *file;
    char *verify;
    char *disks;
    uint64_t overlay_size;
    SnapshotRegisters kept;     /* while they are being loaded */
    bool loading;               /* the restore of @load is to come */
    SnapshotFileReady *load_ready;      /* its guest waits; or NULL */
    char *load;
    char *touched;
    uint32_t load_slot;
    char *overlay_dir;
    bool new_generation;
    HostMemoryBackend *channel;
    CharBackend control;
    char *keep;

    /* registers */
    uint32_t status;
    uint32_t slot;
    uint64_t argument;
    uint32_t result;
    uint32_t input_length;
    uint32_t region;
};

/*
 * snapshot-run.c: runs, for a program on the host.  All is called with the BQL
 * held.
 */

/**
 * snapshot_run_init: serve control=
 *
 * Returns: false with @errp set if there is no channel that it could be done
 * with
 */
bool snapshot_run_init(SnapshotState *s, Error **errp);

void snapshot_run_exit(SnapshotState *s);

/**
 * snapshot_run_reset: the guest, or who gave READY in it, is no more
 * @reason: SNAPSHOT_ENDED_*
 */
void snapshot_run_reset(SnapshotState *s, uint32_t reason);

/**
 * snapshot_run_ready, snapshot_run_done: the guest's commands
 *
 * Returns: SNAPSHOT_STATUS_NONE if snapshot_run_op_done() follows, else the
 * error's STATUS; nothing has changed then
 */
uint32_t snapshot_run_ready(SnapshotState *s);
uint32_t snapshot_run_done(SnapshotState *s);

/** snapshot_run_describe: as VMSnapshotReady */
SnapshotFileReady *snapshot_run_describe(SnapshotState *s, unsigned slot);

/**
 * snapshot_run_load: let the guest of a slot that was loaded wait for inputs
 * @ready: what snapshot_run_describe() has returned in another process
 *
 * For VMSnapshotDone.
 */
void snapshot_run_load(SnapshotState *s, unsigned slot,
                       const SnapshotFileReady *ready);

/**
 * snapshot_run_op_done: as VMSnapshotDone
 * @request: which the guest made; NONE: it was the host's user, or a run's end
 */
void snapshot_run_op_done(SnapshotState *s, SnapshotRequest request,
                          VMSnapshotOp op, unsigned slot, int ret);

/* What comes from the connection */

/**
 * snapshot_run_ask: begin a run, or do so as soon as the machine is put back
 * @m: a RUN; it is copied
 *
 * Called in the main loop, or by the thread of a vCPU that is parked.
 *
 * Returns: 0, or SNAPSHOT_REFUSED_*
 */
uint32_t snapshot_run_ask(SnapshotState *s, const struct snapshot_message *m);

/**
 * snapshot_run_cancel: end the run that has this id
 * @may_come: it may also be asked for later
 */
void snapshot_run_cancel(SnapshotState *s, uint32_t id, bool may_come);

/** snapshot_run_host_gone: nobody wants what was asked for */
void snapshot_run_host_gone(SnapshotState *s);

/*
 * snapshot-control.c: the connection.  All is called with the BQL held.  Of the
 * device's other files, it calls what stands above.
 */

/**
 * snapshot_control_init: find the channel
 *
 * Sets s->run.channel.
 *
 * Returns: false with @errp set, and nothing to undo, if it cannot be used
 */
bool snapshot_control_init(SnapshotState *s, Error **errp);

/** snapshot_control_start: from now on, hosts may come; s->run is complete */
void snapshot_control_start(SnapshotState *s);

void snapshot_control_exit(SnapshotState *s);

/** snapshot_control_ready, snapshot_control_ended: tell the host, if any */
void snapshot_control_ready(SnapshotState *s);
void snapshot_control_ended(SnapshotState *s, uint32_t reason);

/** snapshot_control_listen: let the vCPU's wait be for the socket, if any */
void snapshot_control_listen(SnapshotState *s);

/** snapshot_control_read_on: s->run.pending, which held messages, is false */
void snapshot_control_read_on(SnapshotState *s);

/** snapshot_control_refuse: a message with @id; SNAPSHOT_REFUSED_* says why */
void snapshot_control_refuse(SnapshotState *s, uint32_t id, uint32_t reason);

/** snapshot_control_send: any message, on any thread; it does not wait */
void snapshot_control_send(SnapshotState *s, const struct snapshot_message *m);

/** snapshot_control_close_broken: close the connection if it is broken */
void snapshot_control_close_broken(SnapshotState *s);

/* snapshot.c */

/** snapshot_has_slot: is there one of the number in SLOT? */
bool snapshot_has_slot(const SnapshotState *s);

/** snapshot_request: as vm_snapshot_request(), on behalf of @request */
int snapshot_request(SnapshotState *s, SnapshotRequest request,
                     VMSnapshotOp op, unsigned slot);

#endif /* HW_MISC_SNAPSHOT_INT_H */
