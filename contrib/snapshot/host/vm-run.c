/* SPDX-License-Identifier: MIT */
/*
 * Runs: the connection to the device, and its messages
 *
 * Licensed under the MIT licence, that a program of any licence may use it.
 */

#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "vm-internal.h"

static int send_message(struct snapshot_vm *vm,
                        const struct snapshot_message *m)
{
    ssize_t n;

    do {
        n = send(vm->fd, m, sizeof(*m), MSG_NOSIGNAL);
    } while (n < 0 && errno == EINTR);
    return n == sizeof(*m) ? 0 : -1;
}

/* Returns: 1; 0 if there was no message for a second; a negative error */
static int receive(struct snapshot_vm *vm, struct snapshot_message *m)
{
    size_t have = 0;

    while (have < sizeof(*m)) {
        ssize_t n = read(vm->fd, (char *)m + have, sizeof(*m) - have);

        if (n > 0) {
            have += n;
        } else if (n < 0 && errno == EINTR) {
            continue;
        } else if (n < 0 && errno == EAGAIN) {
            if (!have) {
                return 0;
            }
        } else {
            vm->ready = false;
            return vm_has_ended(vm, 3000) ?
                vm_fail_ended(vm, SNAPSHOT_VM_E_DIED) :
                vm_fail_with_output(vm, SNAPSHOT_VM_E_PROTOCOL, "the device "
                                    "has closed the connection");
        }
    }
    return 1;
}

static int set_ready(struct snapshot_vm *vm, const struct snapshot_message *m)
{
    const struct snapshot_area *areas[SNAPSHOT_REGIONS] = {
        [SNAPSHOT_REGION_INPUT] = &m->ready.input,
        [SNAPSHOT_REGION_COVERAGE] = &m->ready.coverage,
        [SNAPSHOT_REGION_TEXT] = &m->ready.text,
    };
    unsigned i;

    for (i = 0; i < SNAPSHOT_REGIONS; i++) {
        vm->areas[i].offset = le64toh(areas[i]->offset);
        vm->areas[i].size = le64toh(areas[i]->size);
        if (vm->areas[i].offset > vm->channel_size ||
            vm->areas[i].size > vm->channel_size - vm->areas[i].offset) {
            return vm_fail(SNAPSHOT_VM_E_PROTOCOL, "READY has an area outside "
                           "the channel");
        }
    }
    vm->ready = true;
    return 0;
}

static int fail_reason(int error, const char *what, const char *const *reasons,
                       size_t n, uint32_t reason)
{
    return vm_fail(error, "%s: %s", what,
                   reason < n && reasons[reason] ? reasons[reason]
                                              : "an unknown reason");
}

static int fail_refused(const struct snapshot_message *m)
{
    static const char *const reasons[] = {
        [SNAPSHOT_REFUSED_TYPE] = "it does not know its type",
        [SNAPSHOT_REFUSED_HELLO] = "it wants HELLO first",
        [SNAPSHOT_REFUSED_VERSION] = "it speaks another version",
        [SNAPSHOT_REFUSED_NOT_READY] = "the guest is not READY",
        [SNAPSHOT_REFUSED_LENGTH] = "the input is too long",
        [SNAPSHOT_REFUSED_FLAGS] = "it does not know the flags",
    };
    uint32_t reason = le32toh(m->error.reason);

    return fail_reason(reason == SNAPSHOT_REFUSED_NOT_READY ?
                       SNAPSHOT_VM_E_ENDED : SNAPSHOT_VM_E_PROTOCOL,
                       "the device has refused a message", reasons,
                       sizeof(reasons) / sizeof(reasons[0]), reason);
}

static int fail_not_ready(const struct snapshot_message *m)
{
    static const char *const reasons[] = {
        [SNAPSHOT_ENDED_RESET] = "somebody has reset it",
        [SNAPSHOT_ENDED_RESTORED] = "somebody has restored a snapshot",
        [SNAPSHOT_ENDED_FAILED] = "it could not be put back; see QEMU's "
                                  "messages",
        [SNAPSHOT_ENDED_SAVED] = "its slot holds something else",
    };

    return fail_reason(SNAPSHOT_VM_E_ENDED, "the guest is not READY any more",
                       reasons, sizeof(reasons) / sizeof(reasons[0]),
                       le32toh(m->ended.reason));
}

static int wait_ready(struct snapshot_vm *vm)
{
    uint64_t end = vm_now_ms() + vm->d.boot_ms;
    struct snapshot_message m;

    while (!vm->ready) {
        int ret = receive(vm, &m);

        if (ret < 0) {
            return ret;
        }
        if (ret && le32toh(m.type) == SNAPSHOT_MSG_READY) {
            ret = set_ready(vm, &m);
            if (ret) {
                return ret;
            }
        } else if (vm_now_ms() > end) {
            char what[200];

            snprintf(what, sizeof(what), "the guest did not get READY in %llu "
                     "s (\"boot =\" in %.100s)",
                     (unsigned long long)vm->d.boot_ms / 1000, vm->d.path);
            return vm_fail_with_output(vm, SNAPSHOT_VM_E_NOT_READY, what);
        }
    }
    return 0;
}

static int hello(struct snapshot_vm *vm)
{
    uint64_t end = vm_now_ms() + WAIT_HELLO;
    struct snapshot_message m, reply = {
        .type = htole32(SNAPSHOT_MSG_HELLO),
        .hello = {
            .magic = htole32(SNAPSHOT_CONTROL_MAGIC),
            .version = htole32(SNAPSHOT_CONTROL_VERSION),
        },
    };
    int ret;

    while (!(ret = receive(vm, &m))) {
        if (vm_now_ms() > end) {
            return vm_fail(SNAPSHOT_VM_E_BUSY, "%s/control: no HELLO: another "
                           "program is connected to it, or QEMU hangs",
                           vm->directory);
        }
    }
    if (ret < 0) {
        return ret;
    }
    if (le32toh(m.type) != SNAPSHOT_MSG_HELLO ||
        le32toh(m.hello.magic) != SNAPSHOT_CONTROL_MAGIC) {
        return vm_fail(SNAPSHOT_VM_E_PROTOCOL, "%s/control: not a snapshot "
                       "device", vm->directory);
    }
    if (le32toh(m.hello.version) != SNAPSHOT_CONTROL_VERSION) {
        return vm_fail(SNAPSHOT_VM_E_PROTOCOL, "the device speaks version %u "
                       "of the protocol, this program version %u",
                       le32toh(m.hello.version), SNAPSHOT_CONTROL_VERSION);
    }
    vm->channel_size = le64toh(m.hello.channel);
    vm->channel = vm_map_file(vm->directory, "channel", vm->channel_size,
                              false);
    if (!vm->channel) {
        return -SNAPSHOT_VM_E_PROTOCOL;
    }
    if (vm->d.tcg) {
        vm->map = vm_map_file(vm->directory, "map", vm->d.coverage, false);
        if (!vm->map) {
            return -SNAPSHOT_VM_E_PROTOCOL;
        }
    }
    return send_message(vm, &reply) ? vm_fail_system("cannot write to",
                                                     vm->directory) : 0;
}

static int connect_control(struct snapshot_vm *vm)
{
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    struct timeval tick = { .tv_sec = TICK / 1000 };
    uint64_t end = vm_now_ms() + WAIT_SOCKET;

    snprintf(addr.sun_path, sizeof(addr.sun_path), "%.90s/control",
             vm->directory);
    for (;;) {
        vm->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (vm->fd < 0) {
            return vm_fail_system("cannot connect to", addr.sun_path);
        }
        setsockopt(vm->fd, SOL_SOCKET, SO_RCVTIMEO, &tick, sizeof(tick));
        setsockopt(vm->fd, SOL_SOCKET, SO_SNDTIMEO, &tick, sizeof(tick));
        if (!connect(vm->fd, (struct sockaddr *)&addr, sizeof(addr))) {
            return hello(vm);
        }
        if (errno != ENOENT && errno != ECONNREFUSED && errno != EINTR &&
            errno != EAGAIN) {
            return vm_fail_system("cannot connect to", addr.sun_path);
        }
        close(vm->fd);
        vm->fd = -1;
        if (vm_has_ended(vm, 0)) {
            return vm_fail_ended(vm, SNAPSHOT_VM_E_START);
        }
        if (vm_now_ms() > end) {
            return vm_fail_with_output(vm, SNAPSHOT_VM_E_STUCK, "QEMU does not "
                                       "open its sockets");
        }
        vm_sleep_ms(5);
    }
}

void vm_disconnect(struct snapshot_vm *vm)
{
    vm->running = 0;
    vm->ready = false;
    if (vm->fd >= 0) {
        close(vm->fd);
        vm->fd = -1;
    }
    if (vm->channel) {
        munmap(vm->channel, vm->channel_size);
        vm->channel = NULL;
    }
    if (vm->map) {
        munmap(vm->map, vm->d.coverage);
        vm->map = NULL;
    }
}

int vm_attach(struct snapshot_vm *vm)
{
    int ret = connect_control(vm);

    if (!ret) {
        ret = wait_ready(vm);
    }
    if (ret == -SNAPSHOT_VM_E_DIED) {
        return vm_fail_ended(vm, SNAPSHOT_VM_E_START);
    }
    if (!ret && vm->d.follow) {
        cpu_set_t cpus;

        if (!sched_getaffinity(0, sizeof(cpus), &cpus)) {
            vm_set_affinity(vm->state->qemu, &cpus);
        }
    }
    return ret;
}

void snapshot_vm_limits(const struct snapshot_vm *vm,
                        struct snapshot_vm_limits *limits)
{
    limits->host_ns = vm->d.host_ms * 1000000;
    limits->guest_ns = vm->d.guest_ms * 1000000;
    limits->flags = 0;
}

unsigned char *snapshot_vm_input(struct snapshot_vm *vm, size_t *size)
{
    *size = vm->areas[SNAPSHOT_REGION_INPUT].size;
    return vm->channel + vm->areas[SNAPSHOT_REGION_INPUT].offset;
}

size_t snapshot_vm_coverage_size(const struct snapshot_vm *vm)
{
    return vm->map ? vm->d.coverage : vm->areas[SNAPSHOT_REGION_COVERAGE].size;
}

int snapshot_vm_fd(const struct snapshot_vm *vm)
{
    return vm->fd;
}

int snapshot_vm_begin(struct snapshot_vm *vm, size_t length,
                      const struct snapshot_vm_limits *limits)
{
    struct snapshot_message m = { .type = htole32(SNAPSHOT_MSG_RUN) };
    struct snapshot_vm_limits own;
    int ret;

    if (vm->fd < 0) {
        return vm_fail(SNAPSHOT_VM_E_DIED, "QEMU has ended: call "
                       "snapshot_vm_restart()");
    }
    if (!vm->ready) {
        ret = wait_ready(vm);
        if (ret) {
            return ret;
        }
    }
    if (length > vm->areas[SNAPSHOT_REGION_INPUT].size) {
        return vm_fail(SNAPSHOT_VM_E_LENGTH, "the input has %zu bytes, but the "
                       "guest takes %llu at most", length, (unsigned long long)
                       vm->areas[SNAPSHOT_REGION_INPUT].size);
    }
    if (!limits) {
        snapshot_vm_limits(vm, &own);
        limits = &own;
    }
    m.id = htole32(vm->id + 1);
    m.run.length = htole64(length);
    m.run.host_ns = htole64(limits->host_ns);
    m.run.guest_ns = htole64(limits->guest_ns);
    m.run.flags = htole32(limits->flags);
    vm->limit_ms = limits->flags & SNAPSHOT_RUN_STOPPED ? 0 :
        (limits->host_ns + 999999) / 1000000;
    vm->cancelled = 0;
    vm->id++;
    vm->running = 1;
    /* What is wrong with the connection, the end tells. */
    send_message(vm, &m);
    return 0;
}

void snapshot_vm_cancel(struct snapshot_vm *vm)
{
    struct snapshot_message m = {
        .type = htole32(SNAPSHOT_MSG_CANCEL),
        .id = htole32(vm->id),
    };
    int error = errno;

    if (vm->running) {
        vm->cancelled = 1;
        send(vm->fd, &m, sizeof(m), MSG_NOSIGNAL | MSG_DONTWAIT);
    }
    errno = error;
}

static void set_result(struct snapshot_vm *vm, struct snapshot_vm_result *r,
                       const struct snapshot_message *m)
{
    const struct snapshot_area *coverage =
        &vm->areas[SNAPSHOT_REGION_COVERAGE];
    const struct snapshot_area *text = &vm->areas[SNAPSHOT_REGION_TEXT];
    uint64_t length = le64toh(m->result.text);

    r->result = le32toh(m->result.result);
    r->cause = le32toh(m->result.cause);
    r->host_ns = le64toh(m->result.host_ns);
    r->guest_ns = le64toh(m->result.guest_ns);
    r->coverage_size = snapshot_vm_coverage_size(vm);
    r->coverage = vm->map ? vm->map :
        r->coverage_size ? vm->channel + coverage->offset : NULL;
    r->text = length < text->size ? (char *)vm->channel + text->offset : "";
    r->text_length = length < text->size ? length : 0;
}

int snapshot_vm_end(struct snapshot_vm *vm, struct snapshot_vm_result *result)
{
    uint64_t waited = 0, since_cancel = 0;
    struct snapshot_message m;
    int ret;

    for (;;) {
        ret = receive(vm, &m);
        if (ret < 0) {
            vm->running = 0;
            if (ret == -SNAPSHOT_VM_E_DIED) {
                close(vm->fd);
                vm->fd = -1;
            }
            return ret;
        }
        if (!ret) {
            waited += TICK;
            since_cancel += vm->cancelled ? TICK : 0;
            if (vm->limit_ms && waited > vm->limit_ms + WAIT_ANSWER &&
                !vm->cancelled) {
                snapshot_vm_cancel(vm);
            } else if (since_cancel > WAIT_ANSWER) {
                vm->running = 0;
                return vm_fail_with_output(vm, SNAPSHOT_VM_E_STUCK, "QEMU does "
                                           "not answer any more");
            }
            continue;
        }
        switch (le32toh(m.type)) {
        case SNAPSHOT_MSG_RESULT:
            if (le32toh(m.id) != vm->id) {
                continue;
            }
            vm->running = 0;
            set_result(vm, result, &m);
            if (result->result > SNAPSHOT_RESULT_INVALID) {
                return vm_fail(SNAPSHOT_VM_E_PROTOCOL, "QEMU sends result %u, "
                               "which is none", (unsigned)result->result);
            }
            return result->result;
        case SNAPSHOT_MSG_ENDED:
            vm->running = 0;
            vm->ready = false;
            return fail_not_ready(&m);
        case SNAPSHOT_MSG_READY:
            ret = set_ready(vm, &m);
            if (ret) {
                return ret;
            }
            continue;
        case SNAPSHOT_MSG_ERROR:
            if (le32toh(m.id) != vm->id) {
                continue;
            }
            vm->running = 0;
            ret = fail_refused(&m);
            vm->ready = vm->ready && ret != -SNAPSHOT_VM_E_ENDED;
            return ret;
        default:
            vm->running = 0;
            return vm_fail(SNAPSHOT_VM_E_PROTOCOL, "the device sent a message "
                           "of unknown type %u", le32toh(m.type));
        }
    }
}

int snapshot_vm_run(struct snapshot_vm *vm, size_t length,
                    const struct snapshot_vm_limits *limits,
                    struct snapshot_vm_result *result)
{
    int ret = snapshot_vm_begin(vm, length, limits);

    return ret ? ret : snapshot_vm_end(vm, result);
}
