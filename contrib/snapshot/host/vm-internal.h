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
#include <stdio.h>

#include "snapshot-host.h"

#define VM_PATH         300             /* of a file of an instance */
#define CLOSED_KEPT     64              /* handles */
#define INSTANCES       SNAPSHOT_VM_INSTANCES
#define STATE_MAGIC     0x534e5034      /* changes with struct state */
#define RING_SIZE       (64 * 1024)
#define TAIL_LINES      12              /* of a console, in an error */

/* Limits of waits, in ms */
#define WAIT_SOCKET     30000           /* QEMU makes its sockets */
#define WAIT_HELLO      10000
#define WAIT_ANSWER     5000            /* more than a run's own limit */
#define WAIT_END        8000            /* the daemon ends */
#define WAIT_QUIT       5000            /* QEMU ends, on SIGTERM */
#define WAIT_MONITOR    10000           /* its answer to a command */
#define WAIT_KEEP       120000          /* the file of a machine is written */
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
    uint64_t keep;              /* of its parts, if it has still to be kept */
    uint64_t boot_ms;           /* what that took */
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
    const char *keep;           /* file of the machine; NULL: none */
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
    char *keep;                 /* path of the machine's file; NULL: none */
    int began;                  /* SNAPSHOT_VM_RAN, ... */
    uint64_t boot_ms;           /* what that had taken, of a file */
    bool loads;                 /* this moment, from a file */
    bool refused_file;          /* QEMU has */
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

/**
 * vm_start: start a daemon, and it QEMU; returns before QEMU is there
 * @file: a file that QEMU begins from, which is not closed; -1: it boots
 */
int vm_start(struct snapshot_vm *vm, int file);

/**
 * vm_expand: put the instance's values in place of ${instance}, ${directory}
 *
 * Returns: memory of the caller's; NULL if there is none
 */
char *vm_expand(const struct snapshot_vm *vm, const char *text);

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

/* vm-monitor.c */

struct vm_monitor {
    int fd;
    FILE *in;
    char *line;                 /* the last answer */
    size_t size;
};

/** vm_monitor_open: also one that was opened half must be closed */
int vm_monitor_open(struct vm_monitor *m, const char *directory);
void vm_monitor_close(struct vm_monitor *m);

/** vm_monitor_limit: wait so long for an answer, instead of WAIT_MONITOR */
void vm_monitor_limit(struct vm_monitor *m, unsigned ms);

/**
 * vm_monitor_execute: execute a command, whose answer is in @m->line then
 * @arguments: members of a JSON object; NULL: none
 */
int vm_monitor_execute(struct vm_monitor *m, const char *command,
                       const char *arguments);

/** vm_monitor_read: the next line, such as an event, into @m->line */
int vm_monitor_read(struct vm_monitor *m);

/** vm_monitor_quote: a JSON string.  Returns: memory of the caller's; NULL */
char *vm_monitor_quote(const char *text);

/* vm-keep.c */

/** vm_keep_name: set @vm->keep; the instance must be known */
int vm_keep_name(struct snapshot_vm *vm);

/**
 * vm_keep_open: the file that the machine is kept in, if it can begin from that
 *
 * If there is one, but of something else, vm_tell() gets the reason.
 *
 * Returns: the file; -1: it has to boot
 */
int vm_keep_open(struct snapshot_vm *vm);

/**
 * vm_keep_refused: tell that QEMU did not begin from it, with the last error;
 * it will be replaced
 */
void vm_keep_refused(struct snapshot_vm *vm);

/** vm_keep_hash: of what the machine consists of, if it is to be kept; or 0 */
uint64_t vm_keep_hash(const struct snapshot_vm *vm);

/**
 * vm_keep_save: write the machine, which is READY, to its file, if that has to
 * be done.  That it fails is told to vm_tell(), and nothing else comes of it.
 */
void vm_keep_save(struct snapshot_vm *vm);

#endif /* CONTRIB_SNAPSHOT_HOST_VM_INTERNAL_H */
