/* SPDX-License-Identifier: MIT */
/*
 * What the library's files share
 *
 * Each instance of a description has a directory.  Three files in it say who
 * is there, by locks that end with their process (open file descriptions'):
 *
 *   lock      held by the program that has the machine
 *   daemon    held by the daemon, whose child QEMU is
 *   state     shared memory: the daemon tells of QEMU what it knows
 *
 * Licensed under the MIT licence, that a program of any licence may use it.
 */

#ifndef CONTRIB_SNAPSHOT_HOST_VM_INTERNAL_H
#define CONTRIB_SNAPSHOT_HOST_VM_INTERNAL_H

#include <sched.h>
#include <signal.h>
#include <stdbool.h>

#include "snapshot-host.h"

#define VM_PATH         300             /* of a file of an instance */
#define CLOSED_KEPT     64              /* handles */
#define INSTANCES       SNAPSHOT_VM_INSTANCES
#define STATE_MAGIC     0x534e5033      /* changes with struct state */
#define RING_SIZE       (64 * 1024)
#define TAIL_LINES      12              /* of a console, in an error */

/* Limits of waits, in ms */
#define WAIT_SOCKET     30000           /* QEMU makes its sockets */
#define WAIT_HELLO      10000
#define WAIT_ANSWER     5000            /* more than a run's own limit */
#define WAIT_END        8000            /* the daemon ends */
#define WAIT_QUIT       5000            /* QEMU ends, on SIGTERM */
#define TICK            1000

/* When a program's user is told what is waited for */
#define TELL_FIRST      5000
#define TELL_AGAIN      30000

#define SKIP_MAX        64              /* messages that nobody waits for */

/* The last bytes of an endless text */
struct ring {
    uint64_t written;
    char data[RING_SIZE];
};

struct state {
    uint32_t magic;
    int32_t daemon;
    int32_t qemu;
    int32_t user;
    uint32_t uses;              /* how often it was opened */
    int32_t ended;              /* QEMU has, with @status as of wait() */
    int32_t status;
    int32_t stop;               /* the daemon shall end QEMU */
    int32_t answers;            /* QEMU has said HELLO */
    uint64_t description;       /* hash of its content */
    struct ring console;
    struct ring messages;
};

/* What the file says.  Memory is @text's but for args. */
struct description {
    char *path;                 /* canonical */
    char *text;
    uint64_t hash;
    const char *qemu;
    const char *device;
    const char *tcg;            /* options of tcg-coverage; NULL: none */
    uint64_t channel;
    uint64_t coverage;          /* bytes of tcg's map */
    uint64_t boot_ms;
    uint64_t host_ms;
    uint64_t guest_ms;
    uint64_t idle_s;
    bool serial;                /* the console is the first serial port */
    bool follow;                /* QEMU runs where its user does */
    char **args;
    size_t n_args;
};

struct snapshot_vm {
    struct description d;
    int instance;
    char directory[256];
    int lock;
    int control;                /* on which a run can be cancelled */
    int fd;                     /* the device speaks there, and gets RUN */
    struct state *state;
    unsigned char *channel;
    size_t channel_size;
    unsigned char *map;         /* tcg's */
    struct snapshot_area areas[SNAPSHOT_REGIONS];
    bool open;                  /* it was not closed */
    bool ready;
    bool moved;                 /* the input's area, since it was asked for */
    int broken;                 /* the connection is, by this error */
    uint64_t limit_ms;          /* of the run; 0: none */
    uint32_t stray;             /* a run that may be under way; 0: none is */
    bool refused;               /* the next was, for that one */
    unsigned skipped;
    struct snapshot_message run;
    struct snapshot_message in; /* what has come of the next */
    size_t in_len;
    uint64_t in_end;            /* when the rest must be there */
    /* The handler of a signal reads them. */
    volatile uint32_t id;
    volatile sig_atomic_t running;
    volatile sig_atomic_t cancelled;
};

/*
 * Errors: what snapshot_vm_error() and snapshot_vm_error_code() tell, in
 * snapshot-host.c
 */

/** vm_fail: Returns: -@error */
int vm_fail(int error, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/** vm_fail_system: with errno's reason */
int vm_fail_system(const char *what, const char *path);

/** vm_now_ms: of a clock that is never set */
uint64_t vm_now_ms(void);
void vm_sleep_ms(unsigned ms);

/** vm_check: is the handle open?  Returns: 0; -SNAPSHOT_VM_E_USE */
int vm_check(const struct snapshot_vm *vm);

/** vm_tell: what snapshot_vm_on_wait() has set; NULL: nothing */
extern void (*vm_tell)(const char *text);

/* vm-description.c */

uint64_t vm_hash(uint64_t hash, const void *data, size_t len);

/** vm_description_load: also one that was loaded half must be freed */
int vm_description_load(struct description *d, const char *path);
void vm_description_free(struct description *d);

/* vm-directory.c */

/** vm_make_directory: make one that nobody else can write to */
int vm_make_directory(const char *path);

/**
 * vm_base_directory: where the machines of a description are: on a tmpfs, as
 * the channel is written to at each run
 * @make: make it
 */
int vm_base_directory(const struct description *d, char *path, size_t size,
                      bool make);
void vm_path(const char *directory, const char *name, char *path, size_t size);

/** vm_is_locked: is the file?  One that is not there is not. */
bool vm_is_locked(const char *directory, const char *name);

/**
 * vm_lock_file: lock a file
 *
 * Returns: the file; a negative error, _E_BUSY if it is locked already
 */
int vm_lock_file(const char *directory, const char *name);

/** vm_new_file: make one whose memory is there, in place of any before */
int vm_new_file(const char *directory, const char *name, size_t size);

/**
 * vm_map_file: map a file
 * @make: make it, or make it as large, with all its memory; else it must be as
 *        large already
 *
 * Returns: NULL if that fails
 */
void *vm_map_file(const char *directory, const char *name, size_t size,
                  bool make);

/* vm-daemon.c */

/** vm_start: start a daemon, and it QEMU; returns before QEMU is there */
int vm_start(struct snapshot_vm *vm);

/**
 * vm_end_daemon: end QEMU and its daemon
 *
 * Returns: 1 if one was ended, 0 if there was none
 */
int vm_end_daemon(const char *directory, struct state *state);

/** vm_has_ended: has QEMU, or will it in @ms? */
bool vm_has_ended(const struct snapshot_vm *vm, unsigned ms);

/** vm_fail_ended: with what QEMU ended by, and its last words */
int vm_fail_ended(const struct snapshot_vm *vm, int error);

/** vm_fail_with_output: with the last words of QEMU and of the guest */
int vm_fail_with_output(const struct snapshot_vm *vm, int error,
                        const char *what);

/** vm_tell_output: @what and the last words, for vm_tell() */
void vm_tell_output(const struct snapshot_vm *vm, const char *what);

/** vm_set_affinity: let a process run on these CPUs, with all its threads */
void vm_set_affinity(pid_t pid, const cpu_set_t *cpus);

/** vm_ring_read: the last bytes, and a zero byte.  Returns: how many */
size_t vm_ring_read(const struct ring *r, char *buf, size_t size);

/* vm-run.c */

/** vm_attach: connect to the device, and wait until the guest is READY */
int vm_attach(struct snapshot_vm *vm);
void vm_disconnect(struct snapshot_vm *vm);

#endif /* CONTRIB_SNAPSHOT_HOST_VM_INTERNAL_H */
