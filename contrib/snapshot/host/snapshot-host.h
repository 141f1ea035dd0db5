/* SPDX-License-Identifier: MIT */
/*
 * Runs of a guest of "-device snapshot", for programs on the host: C API
 *
 *     struct snapshot_vm_result r;
 *     struct snapshot_vm *vm = snapshot_vm_open("toy.vm", -1, 0);
 *
 *     if (!vm) ... snapshot_vm_error() says why
 *     memcpy(snapshot_vm_input(vm, &size), data, length);
 *     status = snapshot_vm_run(vm, length, NULL, &r);
 *     if (status < 0) ... snapshot_vm_error() says why
 *     ... SNAPSHOT_RESULT_OK, _CRASH, ...; r.coverage, r.text, r.cause
 *     snapshot_vm_close(vm);
 *
 * A description (see README.rst) says how QEMU is started.  Each description
 * can have several machines, its instances, which are numbered from 0.  QEMU
 * is a daemon: it stays when the program ends, by whatever, and the next one
 * attaches to it without booting.  One program at a time has an instance.
 *
 * Who is killed at any time leaves nothing that has to be cleaned up: locks
 * end with their process, the device ends a run whose host has gone, and QEMU
 * ends with the process that looks after it (the daemon, a child of nobody).
 *
 * Functions that fail return a negative SNAPSHOT_VM_E_* or NULL, and leave the
 * reason, with what to do, in snapshot_vm_error().  None waits for ever: each
 * wait has a limit, which the description may change.  A struct snapshot_vm is
 * for one thread at a time; snapshot_vm_cancel() alone may be called at any
 * time, also in a signal's handler.  C++ includes this as extern "C".
 *
 * Licensed under the MIT licence, that a program of any licence may use it.
 */

#ifndef CONTRIB_SNAPSHOT_HOST_H
#define CONTRIB_SNAPSHOT_HOST_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "hw/misc/snapshot-control.h"
#include "hw/misc/snapshot-regs.h"

/* These are what libsnapshot-host.so has; the rest of it is hidden. */
#pragma GCC visibility push(default)

/* What functions fail with */
#define SNAPSHOT_VM_E_SYSTEM        1   /* a system call */
#define SNAPSHOT_VM_E_DESCRIPTION   2   /* the description is wrong */
#define SNAPSHOT_VM_E_BUSY          3   /* another program has the machine */
#define SNAPSHOT_VM_E_ABSENT        4   /* none runs, none may be started */
#define SNAPSHOT_VM_E_START         5   /* QEMU has ended before READY */
#define SNAPSHOT_VM_E_NOT_READY     6   /* the guest is not, in time */
#define SNAPSHOT_VM_E_PROTOCOL      7   /* the device says what it must not */
#define SNAPSHOT_VM_E_DIED          8   /* QEMU has ended: a fault of QEMU's? */
#define SNAPSHOT_VM_E_STUCK         9   /* QEMU does not answer any more */
#define SNAPSHOT_VM_E_ENDED         10  /* a user reset or restored the guest */
#define SNAPSHOT_VM_E_LENGTH        11  /* the input is too long */
#define SNAPSHOT_VM_E_USE           12  /* closed, or a call out of turn */

/* Flags of snapshot_vm_open() */
#define SNAPSHOT_VM_ATTACH          1   /* fail if none runs */
#define SNAPSHOT_VM_FRESH           2   /* end the one that runs first */

/* How snapshot_vm_open() has got a machine */
#define SNAPSHOT_VM_RAN             0   /* it ran already */
#define SNAPSHOT_VM_BOOTED          1   /* it was started */
#define SNAPSHOT_VM_KEPT            2   /* and is in its file, for the next */
#define SNAPSHOT_VM_LOADED          3   /* it began from that file */

#define SNAPSHOT_VM_INSTANCES       1024 /* of a description, at most */

struct snapshot_vm;

struct snapshot_vm_limits {
    uint64_t host_ns;           /* of the host's real time; 0: none */
    uint64_t guest_ns;          /* of the guest's virtual time; 0: none */
    uint32_t flags;             /* SNAPSHOT_RUN_*, such as STOPPED */
};

/* Pointers stay valid until the next run, and until the machine is closed. */
struct snapshot_vm_result {
    uint32_t result;            /* SNAPSHOT_RESULT_* */
    uint32_t cause;             /* SNAPSHOT_CAUSE_*: what has ended the run */
    uint64_t host_ns;           /* how long it took */
    uint64_t guest_ns;
    const unsigned char *coverage; /* counts of edges; NULL: there are none */
    size_t coverage_size;
    const char *text;           /* the guest's; it may lack a zero byte */
    size_t text_length;
};

/* What snapshot_vm_status() tells of an instance */
struct snapshot_vm_status {
    int instance;
    pid_t daemon;               /* 0: none runs */
    pid_t qemu;
    pid_t user;                 /* the program that has it; 0: none */
    char directory[256];        /* with qmp, a socket for QEMU's monitor */
};

/**
 * snapshot_vm_error: why the last function that failed in this thread did so
 *
 * Returns: text of one or more lines, without a newline at its end; valid
 * until the next failure
 */
const char *snapshot_vm_error(void);

/**
 * snapshot_vm_on_wait: have somebody told what takes long
 * @tell: is called when a guest has not been READY for 5 s, and every 30 s
 *        from then on, with what is waited for and the last lines of its
 *        console; and with the reason why a machine with a file ("keep =")
 *        boots, or is not written to it; NULL: nobody is told
 *
 * For all machines of the program.
 */
void snapshot_vm_on_wait(void (*tell)(const char *text));

/** snapshot_vm_error_code: the SNAPSHOT_VM_E_* of that failure, positive */
int snapshot_vm_error_code(void);

/**
 * snapshot_vm_open: attach to a machine; start it if it does not run yet
 * @description: path of the file that describes it
 * @instance: which; -1: the first that no other program has, preferably one
 *            that runs already
 * @flags: SNAPSHOT_VM_ATTACH, SNAPSHOT_VM_FRESH, or 0
 *
 * Returns when the guest is READY.  A machine that runs, but was started with
 * another content of @description, is ended and started anew.
 *
 * With "keep = FILE" in the description, the first start boots, and writes the
 * machine to FILE; from then on, all begin from that.
 *
 * QEMU's threads get the CPUs that the caller may run on, unless the
 * description says otherwise (affinity=).
 */
struct snapshot_vm *snapshot_vm_open(const char *description, int instance,
                                     unsigned flags);

/**
 * snapshot_vm_close: let go of the machine, which stays for the next; NULL is
 * allowed
 *
 * The use of a machine that was closed fails with SNAPSHOT_VM_E_USE, as long
 * as no more than 64 others were closed since.
 */
void snapshot_vm_close(struct snapshot_vm *vm);

/**
 * snapshot_vm_restart: end QEMU, if it still runs, and start it anew
 *
 * After SNAPSHOT_VM_E_DIED, _E_STUCK or _E_PROTOCOL, without which each
 * further run fails as the first did.  Sizes and pointers change.  If it fails,
 * the machine stays the caller's, and it can be tried again.
 */
int snapshot_vm_restart(struct snapshot_vm *vm);

/**
 * snapshot_vm_stop: end an instance's QEMU, and its daemon; a program that has
 * it sees QEMU die
 * @instance: -1: all of them
 *
 * Returns: how many were ended
 */
int snapshot_vm_stop(const char *description, int instance);

/**
 * snapshot_vm_status: look at an instance without changing anything
 *
 * Returns: 1, 0 if there never was such an instance
 */
int snapshot_vm_status(const char *description, int instance,
                       struct snapshot_vm_status *status);

/** snapshot_vm_instance: its number, or a negative SNAPSHOT_VM_E_* */
int snapshot_vm_instance(const struct snapshot_vm *vm);

/** snapshot_vm_directory: with its sockets; NULL if it was closed */
const char *snapshot_vm_directory(const struct snapshot_vm *vm);

/**
 * snapshot_vm_began: how the last open or restart has got the machine
 * @file: gets the one that it is kept in, valid until the machine is closed;
 *        or NULL, without "keep ="
 * @boot_ms: gets the time that its boot took, before _BOOTED, _KEPT or _LOADED;
 *           else 0
 *
 * Returns: SNAPSHOT_VM_RAN, ...; or a negative SNAPSHOT_VM_E_*
 */
int snapshot_vm_began(const struct snapshot_vm *vm, const char **file,
                      uint64_t *boot_ms);

/** snapshot_vm_limits: those of the description */
void snapshot_vm_limits(const struct snapshot_vm *vm,
                        struct snapshot_vm_limits *limits);

/**
 * snapshot_vm_input: where the next input must be written to
 * @size: how much fits there
 *
 * After SNAPSHOT_VM_E_ENDED, it waits until the guest is READY, as the place
 * may be another then.
 *
 * Returns: NULL if it fails, with @size 0
 */
unsigned char *snapshot_vm_input(struct snapshot_vm *vm, size_t *size);

/** snapshot_vm_coverage_size: of the guest's map; 0: it has none */
size_t snapshot_vm_coverage_size(const struct snapshot_vm *vm);

/**
 * snapshot_vm_run: run the guest with @length bytes of input
 * @limits: NULL: the description's
 *
 * Returns: SNAPSHOT_RESULT_*, with @result filled; or a negative
 * SNAPSHOT_VM_E_*.  After _E_ENDED, the next waits for READY, but its input has
 * to be written anew, where snapshot_vm_input() says.
 */
int snapshot_vm_run(struct snapshot_vm *vm, size_t length,
                    const struct snapshot_vm_limits *limits,
                    struct snapshot_vm_result *result);

/**
 * snapshot_vm_begin, snapshot_vm_end: the halves of snapshot_vm_run()
 *
 * Between them, snapshot_vm_fd() becomes readable when the run has ended.
 */
int snapshot_vm_begin(struct snapshot_vm *vm, size_t length,
                      const struct snapshot_vm_limits *limits);
int snapshot_vm_end(struct snapshot_vm *vm, struct snapshot_vm_result *result);

/** snapshot_vm_fd: -1 if it is not connected; restart makes another */
int snapshot_vm_fd(const struct snapshot_vm *vm);

/**
 * snapshot_vm_cancel: end the run that is under way, if there is one
 *
 * snapshot_vm_end() returns SNAPSHOT_RESULT_HANG, cause CANCELLED.
 */
void snapshot_vm_cancel(struct snapshot_vm *vm);

/**
 * snapshot_vm_console: the last bytes that a guest wrote to its console
 * @directory: the instance's, of snapshot_vm_directory() or a status
 * @qemu: what QEMU itself wrote (stderr) instead
 * @buf: gets them, and a zero byte
 *
 * Returns: how many.  The daemon reads the console: what is written this
 * moment may be missing.
 */
size_t snapshot_vm_console(const char *directory, int qemu, char *buf,
                           size_t size);

/**
 * snapshot_vm_console_since: what a guest has written to its console lately
 * @position: where the last call came to, 0 before the first; it goes on there
 * @buf: gets the last bytes of it, and a zero byte; may be NULL if @size is 0
 *
 * Returns: how many
 */
size_t snapshot_vm_console_since(const char *directory, uint64_t *position,
                                 char *buf, size_t size);

/** snapshot_vm_result_name, snapshot_vm_cause_name: in words */
const char *snapshot_vm_result_name(uint32_t result);
const char *snapshot_vm_cause_name(uint32_t cause);

#pragma GCC visibility pop

#endif /* CONTRIB_SNAPSHOT_HOST_H */
