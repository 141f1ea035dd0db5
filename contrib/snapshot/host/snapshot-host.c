/* SPDX-License-Identifier: MIT */
/*
 * Runs of a guest of "-device snapshot", for programs on the host: instances,
 * and who has them
 *
 * Licensed under the MIT licence, that a program of any licence may use it.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "vm-internal.h"

static __thread char last_error[8192];
static __thread int last_code;

void (*vm_tell)(const char *text);

const char *snapshot_vm_error(void)
{
    return last_error;
}

int snapshot_vm_error_code(void)
{
    return last_code;
}

int vm_fail(int error, const char *format, ...)
{
    va_list ap;

    va_start(ap, format);
    vsnprintf(last_error, sizeof(last_error), format, ap);
    va_end(ap);
    last_code = error;
    return -error;
}

int vm_check(const struct snapshot_vm *vm)
{
    return vm && vm->open ? 0 :
        vm_fail(SNAPSHOT_VM_E_USE, "the machine was closed: call "
                "snapshot_vm_open()");
}

void snapshot_vm_on_wait(void (*tell)(const char *text))
{
    vm_tell = tell;
}

int vm_fail_system(const char *what, const char *path)
{
    return vm_fail(SNAPSHOT_VM_E_SYSTEM, "%s %s: %s", what, path,
                   strerror(errno));
}

uint64_t vm_now_ms(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000ull + t.tv_nsec / 1000000;
}

void vm_sleep_ms(unsigned ms)
{
    struct timespec t = { ms / 1000, ms % 1000 * 1000000l };

    nanosleep(&t, NULL);
}

const char *snapshot_vm_result_name(uint32_t result)
{
    static const char *const names[] = {
        [SNAPSHOT_RESULT_OK] = "ok",
        [SNAPSHOT_RESULT_CRASH] = "crash",
        [SNAPSHOT_RESULT_SANITIZER] = "sanitizer",
        [SNAPSHOT_RESULT_HANG] = "hang",
        [SNAPSHOT_RESULT_STOP] = "stop",
        [SNAPSHOT_RESULT_INVALID] = "invalid",
    };

    return result < sizeof(names) / sizeof(names[0]) ? names[result]
                                                     : "unknown";
}

const char *snapshot_vm_cause_name(uint32_t cause)
{
    static const char *const names[] = {
        [SNAPSHOT_CAUSE_GUEST] = "the guest said so",
        [SNAPSHOT_CAUSE_PANIC] = "panic",
        [SNAPSHOT_CAUSE_RESET] = "reset or triple fault",
        [SNAPSHOT_CAUSE_SHUTDOWN] = "shutdown",
        [SNAPSHOT_CAUSE_STOPPED] = "stopped by QEMU",
        [SNAPSHOT_CAUSE_HOST_TIME] = "limit of host time",
        [SNAPSHOT_CAUSE_GUEST_TIME] = "limit of guest time",
        [SNAPSHOT_CAUSE_CANCELLED] = "cancelled",
    };

    return cause < sizeof(names) / sizeof(names[0]) ? names[cause]
                                                    : "unknown";
}

/* Take the instance's lock and map its state. */
static int take(struct snapshot_vm *vm, const char *base, int instance)
{
    int ret;

    vm->instance = instance;
    if ((size_t)snprintf(vm->directory, sizeof(vm->directory), "%s/%d", base,
                         instance) >= sizeof(vm->directory)) {
        return vm_fail(SNAPSHOT_VM_E_SYSTEM, "%s: too long", base);
    }
    ret = vm_make_directory(vm->directory);
    if (ret) {
        return ret;
    }
    vm->lock = vm_lock_file(vm->directory, "lock");
    if (vm->lock < 0) {
        return vm->lock;
    }
    vm->state = vm_map_file(vm->directory, "state", sizeof(*vm->state), true);
    if (!vm->state) {
        return -snapshot_vm_error_code();
    }
    vm->state->user = getpid();
    vm->state->uses++;
    return 0;
}

static void leave(struct snapshot_vm *vm)
{
    if (vm->state) {
        if (vm->lock >= 0) {
            vm->state->user = 0;
        }
        munmap(vm->state, sizeof(*vm->state));
        vm->state = NULL;
    }
    if (vm->lock >= 0) {
        close(vm->lock);
        vm->lock = -1;
    }
}

static bool exists(const char *base, int instance)
{
    char path[VM_PATH + 16];

    snprintf(path, sizeof(path), "%s/%d", base, instance);
    return !access(path, F_OK);
}

/*
 * The daemon, too, may decide this moment that the machine ends: it says so,
 * and only then looks who has the lock (watch_idle()).
 */
static bool usable(const struct snapshot_vm *vm)
{
    return vm->state->magic == STATE_MAGIC &&
        vm->state->description == vm->d.hash &&
        !__atomic_load_n(&vm->state->ended, __ATOMIC_SEQ_CST) &&
        !__atomic_load_n(&vm->state->stop, __ATOMIC_SEQ_CST) &&
        vm_is_locked(vm->directory, "daemon");
}

/* The first free instance, preferably one that runs */
static int take_any(struct snapshot_vm *vm, const char *base)
{
    int i, ret;

    for (i = 0; i < INSTANCES; i++) {
        if (!exists(base, i)) {
            continue;
        }
        ret = take(vm, base, i);
        if (!ret && usable(vm)) {
            return 0;
        }
        leave(vm);
        if (ret && ret != -SNAPSHOT_VM_E_BUSY) {
            return ret;
        }
    }
    for (i = 0; i < INSTANCES; i++) {
        ret = take(vm, base, i);
        if (ret != -SNAPSHOT_VM_E_BUSY) {
            return ret;
        }
        leave(vm);
    }
    return vm_fail(SNAPSHOT_VM_E_BUSY, "all %d instances are in use",
                   INSTANCES);
}

static int start_from(struct snapshot_vm *vm, int file)
{
    int ret;

    vm_disconnect(vm);
    ret = vm_end_daemon(vm->directory, vm->state);
    if (ret >= 0) {
        ret = vm_start(vm, file);
    }
    return ret < 0 ? ret : vm_attach(vm);
}

static int start_anew(struct snapshot_vm *vm)
{
    const uint64_t keep = vm_keep_hash(vm);
    int file = vm_keep_open(vm), ret;
    uint64_t before;

    if (file >= 0) {
        vm->loads = true;
        ret = start_from(vm, file);
        vm->loads = false;
        close(file);
        vm->began = SNAPSHOT_VM_LOADED;
        if (!ret) {
            return 0;
        }
        vm_keep_refused(vm);
    }
    before = vm_now_ms();
    ret = start_from(vm, -1);
    vm->began = SNAPSHOT_VM_BOOTED;
    if (!ret) {
        vm->boot_ms = vm->state->boot_ms = vm_now_ms() - before;
        vm->state->keep = keep;
        vm_keep_save(vm);
    }
    return ret;
}

static int open_vm(struct snapshot_vm *vm, const char *path, int instance,
                   unsigned flags)
{
    char base[VM_PATH];
    int ret = vm_description_load(&vm->d, path);

    if (!ret) {
        ret = vm_base_directory(&vm->d, base, sizeof(base), true);
    }
    if (ret) {
        return ret;
    }
    ret = instance < 0 ? take_any(vm, base) : take(vm, base, instance);
    if (ret == -SNAPSHOT_VM_E_BUSY && instance >= 0) {
        struct snapshot_vm_status status;

        snapshot_vm_status(path, instance, &status);
        return vm_fail(SNAPSHOT_VM_E_BUSY, "instance %d of %s is in use by "
                       "process %d", instance, path, (int)status.user);
    }
    if (!ret) {
        ret = vm_keep_name(vm);
    }
    if (ret) {
        return ret;
    }
    if (usable(vm) && !(flags & SNAPSHOT_VM_FRESH)) {
        ret = vm_attach(vm);
        if (!ret) {
            vm_keep_save(vm);
        }
        /* One that has ended meanwhile is like one that did not run. */
        if (ret != -SNAPSHOT_VM_E_START) {
            return ret;
        }
    }
    if (flags & SNAPSHOT_VM_ATTACH) {
        return vm_fail(SNAPSHOT_VM_E_ABSENT, "instance %d of %s does not run",
                       vm->instance, path);
    }
    return start_anew(vm);
}

struct snapshot_vm *snapshot_vm_open(const char *description, int instance,
                                     unsigned flags)
{
    struct snapshot_vm *vm;

    if (instance >= INSTANCES) {
        vm_fail(SNAPSHOT_VM_E_USE, "there is no instance %d: they are 0 to "
                "%d", instance, INSTANCES - 1);
        return NULL;
    }
    vm = calloc(1, sizeof(*vm));
    if (!vm) {
        vm_fail_system("cannot open", description);
        return NULL;
    }
    vm->lock = vm->control = vm->fd = -1;
    vm->open = true;
    if (open_vm(vm, description, instance, flags) < 0) {
        snapshot_vm_close(vm);
        return NULL;
    }
    return vm;
}

void snapshot_vm_close(struct snapshot_vm *vm)
{
    /* They stay for a while, so that their use is an error. */
    static struct snapshot_vm *closed[CLOSED_KEPT];
    static unsigned n;
    unsigned i;

    if (!vm || !vm->open) {
        return;
    }
    vm_disconnect(vm);
    leave(vm);
    vm_description_free(&vm->d);
    free(vm->keep);
    memset(vm, 0, sizeof(*vm));
    i = __atomic_fetch_add(&n, 1, __ATOMIC_RELAXED) % CLOSED_KEPT;
    free(__atomic_exchange_n(&closed[i], vm, __ATOMIC_ACQ_REL));
}

int snapshot_vm_restart(struct snapshot_vm *vm)
{
    int ret = vm_check(vm);

    return ret ? ret : start_anew(vm);
}

int snapshot_vm_status(const char *description, int instance,
                       struct snapshot_vm_status *status)
{
    struct description d;
    struct state *state;
    char base[VM_PATH];
    int ret;

    memset(status, 0, sizeof(*status));
    status->instance = instance;
    memset(&d, 0, sizeof(d));
    d.path = realpath(description, NULL);
    if (!d.path) {
        return vm_fail_system("cannot find", description);
    }
    ret = vm_base_directory(&d, base, sizeof(base), false);
    free(d.path);
    if (ret || instance < 0 || !exists(base, instance)) {
        return ret;
    }
    if ((size_t)snprintf(status->directory, sizeof(status->directory),
                         "%s/%d", base, instance) >=
        sizeof(status->directory)) {
        return vm_fail(SNAPSHOT_VM_E_SYSTEM, "%s: too long", base);
    }
    state = vm_map_file(status->directory, "state", sizeof(*state), false);
    if (!state) {
        return 1;
    }
    if (vm_is_locked(status->directory, "daemon") &&
        state->magic == STATE_MAGIC) {
        status->daemon = state->daemon;
        status->qemu = state->ended ? 0 : state->qemu;
    }
    if (vm_is_locked(status->directory, "lock")) {
        status->user = state->user;
    }
    munmap(state, sizeof(*state));
    return 1;
}

int snapshot_vm_stop(const char *description, int instance)
{
    int i = instance < 0 ? 0 : instance, n = 0, ret = 0;
    const int last = instance < 0 ? INSTANCES - 1 : instance;
    struct snapshot_vm_status status;

    for (; i <= last && ret >= 0; i++) {
        struct state *state;

        ret = snapshot_vm_status(description, i, &status);
        state = ret > 0 ? vm_map_file(status.directory, "state", sizeof(*state),
                                      false) : NULL;
        if (state) {
            ret = vm_end_daemon(status.directory, state);
            munmap(state, sizeof(*state));
            n += ret > 0;
        }
    }
    return ret < 0 ? ret : n;
}

int snapshot_vm_instance(const struct snapshot_vm *vm)
{
    int ret = vm_check(vm);

    return ret ? ret : vm->instance;
}

const char *snapshot_vm_directory(const struct snapshot_vm *vm)
{
    return vm_check(vm) ? NULL : vm->directory;
}

int snapshot_vm_began(const struct snapshot_vm *vm, const char **file,
                      uint64_t *boot_ms)
{
    int ret = vm_check(vm);

    *file = ret ? NULL : vm->keep;
    *boot_ms = ret ? 0 : vm->boot_ms;
    return ret ? ret : vm->began;
}

size_t snapshot_vm_console(const char *directory, int qemu, char *buf,
                           size_t size)
{
    struct state *state = vm_map_file(directory, "state", sizeof(*state),
                                      false);
    size_t n;

    if (!state) {
        return 0;
    }
    n = vm_ring_read(qemu ? &state->messages : &state->console, buf, size);
    munmap(state, sizeof(*state));
    return n;
}

size_t snapshot_vm_console_since(const char *directory, uint64_t *position,
                                 char *buf, size_t size)
{
    struct state *state = vm_map_file(directory, "state",
                                      sizeof(*state), false);
    const struct ring *r;
    uint64_t end;
    size_t n = 0;

    if (!state) {
        return 0;
    }
    r = &state->console;
    end = __atomic_load_n(&r->written, __ATOMIC_ACQUIRE);
    if (*position > end) {
        *position = 0;              /* of a machine that was there before */
    }
    if (size && end > *position) {
        n = end - *position < size - 1 ? end - *position : size - 1;
        n = vm_ring_read(r, buf, n + 1);
    } else if (size) {
        *buf = 0;
    }
    *position = end;
    munmap(state, sizeof(*state));
    return n;
}
