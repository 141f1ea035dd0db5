/* SPDX-License-Identifier: MIT */
/*
 * The messages of the snapshot device's control= connection
 *
 * The device and the host's programs include this one file.
 * docs/interop/snapshot-control.rst explains what they do.
 *
 * Licensed under the MIT licence, that a program of any licence may use it.
 */

#ifndef HW_MISC_SNAPSHOT_CONTROL_H
#define HW_MISC_SNAPSHOT_CONTROL_H

#include <stdint.h>

#define SNAPSHOT_CONTROL_MAGIC   0x50414e53     /* "SNAP" */
#define SNAPSHOT_CONTROL_VERSION 1

/* Types; D or H: whether the device or the host sends it */
#define SNAPSHOT_MSG_HELLO      1       /* DH first of all */
#define SNAPSHOT_MSG_READY      2       /* D  the guest waits for a run */
#define SNAPSHOT_MSG_RUN        3       /* H  begin one */
#define SNAPSHOT_MSG_RESULT     4       /* D  how it ended */
#define SNAPSHOT_MSG_CANCEL     5       /* H  end it now */
#define SNAPSHOT_MSG_ENDED      6       /* D  the guest is not READY any more */
#define SNAPSHOT_MSG_ERROR      7       /* D  a message was refused */

/* Flags of HELLO */
#define SNAPSHOT_HELLO_SOCKET   1       /* D  can take a socket, see below */

/* Flags of RUN */
#define SNAPSHOT_RUN_STOPPED    1       /* stop before the first instruction */

/* Why a run has ended */
#define SNAPSHOT_CAUSE_GUEST    0       /* it gave DONE with its RESULT */
#define SNAPSHOT_CAUSE_PANIC    1       /* its kernel's, by pvpanic or alike */
#define SNAPSHOT_CAUSE_RESET    2       /* also a triple fault */
#define SNAPSHOT_CAUSE_SHUTDOWN 3
#define SNAPSHOT_CAUSE_STOPPED  4       /* by QEMU: an error of disk or KVM */
#define SNAPSHOT_CAUSE_HOST_TIME 5      /* the limits of RUN */
#define SNAPSHOT_CAUSE_GUEST_TIME 6
#define SNAPSHOT_CAUSE_CANCELLED 7

/* Why the guest is not READY any more */
#define SNAPSHOT_ENDED_RESET    1       /* the host's user reset it */
#define SNAPSHOT_ENDED_RESTORED 2       /* the user restored a snapshot */
#define SNAPSHOT_ENDED_FAILED   3       /* it could not be put back */
#define SNAPSHOT_ENDED_SAVED    4       /* its slot holds something else */

/* Why a message was refused; behind those with C, the connection is closed */
#define SNAPSHOT_REFUSED_TYPE    1      /* C no such type, or not a host's */
#define SNAPSHOT_REFUSED_HELLO   2      /* C wrong magic, or not said yet */
#define SNAPSHOT_REFUSED_VERSION 3      /* C another version */
#define SNAPSHOT_REFUSED_NOT_READY 4    /* RUN: the guest is not */
#define SNAPSHOT_REFUSED_LENGTH  5      /* RUN: longer than the input's area */
#define SNAPSHOT_REFUSED_FLAGS   6      /* RUN: unknown ones */
#define SNAPSHOT_REFUSED_SOCKET  7      /* C HELLO: not one that is taken */

/* A part of the channel: bytes */
struct snapshot_area {
    uint64_t offset;
    uint64_t size;
};

/* All numbers are little-endian; what is not listed is 0. */
struct snapshot_message {
    uint32_t type;
    uint32_t id;                        /* of a run, as RUN gives it */
    union {
        struct {
            uint32_t magic;
            uint32_t version;
            uint64_t channel;           /* D its size in bytes */
            uint32_t flags;             /* SNAPSHOT_HELLO_* */
        } hello;
        struct {
            struct snapshot_area input;
            struct snapshot_area coverage;
            struct snapshot_area text;
            uint32_t slot;
        } ready;
        struct {
            uint64_t length;            /* of the input in bytes */
            uint64_t host_ns;           /* limits; 0: none */
            uint64_t guest_ns;
            uint32_t flags;             /* SNAPSHOT_RUN_* */
        } run;
        struct {
            uint32_t result;            /* SNAPSHOT_RESULT_* */
            uint32_t cause;             /* SNAPSHOT_CAUSE_* */
            uint64_t host_ns;           /* how long it took */
            uint64_t guest_ns;
            uint64_t text;              /* bytes of text in its area */
        } result;
        struct {
            uint32_t reason;            /* SNAPSHOT_ENDED_*, _REFUSED_* */
        } ended, error;
        uint8_t bytes[56];
    };
};

#endif /* HW_MISC_SNAPSHOT_CONTROL_H */
