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
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#include "vm-internal.h"

/*
 * Is it too late?  Only whoever has to wait looks at the clock: @end is set by
 * the first call.
 */
static bool is_over(uint64_t *end, uint64_t ms)
{
    uint64_t now = vm_now_ms();

    if (!*end) {
        *end = now + ms;
    }
    return now >= *end;
}

/* The connection is of no use any more.  Its file stays, for poll(). */
static int give_up(struct snapshot_vm *vm, int ret)
{
    vm->running = 0;
    vm->ready = false;
    vm->broken = -ret;
    shutdown(vm->control, SHUT_RDWR);
    shutdown(vm->fd, SHUT_RDWR);
    return ret;
}

/* Returns: 0; -1 with errno, EAGAIN if QEMU does not take it */
static int send_message(struct snapshot_vm *vm,
                        const struct snapshot_message *m)
{
    size_t sent = 0;
    uint64_t end = 0;

    for (;;) {
        ssize_t n = send(vm->fd, (const char *)m + sent, sizeof(*m) - sent,
                         MSG_NOSIGNAL);

        if (n >= 0) {
            sent += n;
            if (sent == sizeof(*m)) {
                return 0;
            }
        } else if (errno != EINTR && errno != EAGAIN) {
            return -1;
        }
        if (is_over(&end, WAIT_ANSWER)) {
            errno = EAGAIN;
            return -1;
        }
    }
}

static int fail_closed(struct snapshot_vm *vm)
{
    return vm_has_ended(vm, 3000) ?
        vm_fail_ended(vm, SNAPSHOT_VM_E_DIED) :
        vm_fail_with_output(vm, SNAPSHOT_VM_E_PROTOCOL, "the device has "
                            "closed the connection");
}

/*
 * Read once.  What has come of a message is kept for the next call.
 *
 * Returns: 1; 0 if it is not there, after a tick, a signal, or a part of it;
 * a negative error, also if it has begun and does not go on
 */
static int receive(struct snapshot_vm *vm, struct snapshot_message *m)
{
    ssize_t n = read(vm->fd, (char *)&vm->in + vm->in_len,
                     sizeof(vm->in) - vm->in_len);

    if (n > 0) {
        vm->in_len += n;
        if (vm->in_len == sizeof(vm->in)) {
            *m = vm->in;
            vm->in_len = 0;
            vm->in_end = 0;
            return 1;
        }
    } else if (!n || (errno != EINTR && errno != EAGAIN)) {
        return fail_closed(vm);
    }
    if (vm->in_len && is_over(&vm->in_end, WAIT_ANSWER)) {
        char what[128];

        snprintf(what, sizeof(what), "QEMU has sent %zu of the %zu bytes of a "
                 "message, and not the rest in %u s", vm->in_len,
                 sizeof(vm->in), WAIT_ANSWER / 1000);
        return vm_fail_with_output(vm, SNAPSHOT_VM_E_STUCK, what);
    }
    return 0;
}

static int set_ready(struct snapshot_vm *vm, const struct snapshot_message *m)
{
    const struct snapshot_area *areas[SNAPSHOT_REGIONS] = {
        [SNAPSHOT_REGION_INPUT] = &m->ready.input,
        [SNAPSHOT_REGION_COVERAGE] = &m->ready.coverage,
        [SNAPSHOT_REGION_TEXT] = &m->ready.text,
    };
    const struct snapshot_area *input = &vm->areas[SNAPSHOT_REGION_INPUT];
    const struct snapshot_area before = *input;
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
    /* Until snapshot_vm_input(), the input is where it was, if it was. */
    vm->moved = vm->moved || (before.size && memcmp(&before, input,
                                                    sizeof(before)));
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
        [SNAPSHOT_REFUSED_SOCKET] = "it cannot wait on the socket",
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

/* A message that is not what is waited for: a few may be on their way. */
static int skip(struct snapshot_vm *vm, const struct snapshot_message *m)
{
    uint32_t type = le32toh(m->type);

    if (type < SNAPSHOT_MSG_READY || type > SNAPSHOT_MSG_ERROR) {
        return vm_fail(SNAPSHOT_VM_E_PROTOCOL, "the device sent a message of "
                       "unknown type %u", type);
    }
    if (++vm->skipped > SKIP_MAX) {
        return vm_fail(SNAPSHOT_VM_E_PROTOCOL, "the device sent %u messages "
                       "that nobody waits for, the last of type %u about run "
                       "%u, after run %u was asked for", vm->skipped, type,
                       le32toh(m->id), vm->id);
    }
    return 0;
}

/* Tell a program's user what takes so long: up to @limit, in ms. */
static void tell_wait(const struct snapshot_vm *vm, const char *lacks,
                      uint64_t since, uint64_t limit, uint64_t *next)
{
    uint64_t now = vm_now_ms();
    char what[200];

    if (!*next) {
        *next = since + TELL_FIRST;
    }
    if (!vm_tell || now < *next) {
        return;
    }
    *next = now + TELL_AGAIN;
    snprintf(what, sizeof(what), "for %llu s, %s; until %llu s, it is waited "
             "for", (unsigned long long)(now - since) / 1000, lacks,
             (unsigned long long)limit / 1000);
    vm_tell_output(vm, what);
}

static int wait_ready(struct snapshot_vm *vm)
{
    /* One that begins from a file is READY at once. */
    const uint64_t limit = vm->loads && vm->d.boot_ms > WAIT_HELLO ?
        WAIT_HELLO : vm->d.boot_ms;
    uint64_t since = vm_now_ms(), next = 0;
    struct snapshot_message m;

    while (!vm->ready) {
        int ret = receive(vm, &m);

        if (ret > 0 && le32toh(m.type) == SNAPSHOT_MSG_READY) {
            ret = set_ready(vm, &m);
        } else if (ret >= 0 && vm_now_ms() - since > limit) {
            char what[200];

            snprintf(what, sizeof(what), "the guest did not get READY in %llu "
                     "s (\"boot =\" in %.100s)",
                     (unsigned long long)limit / 1000, vm->d.path);
            return vm_fail_with_output(vm, SNAPSHOT_VM_E_NOT_READY, what);
        } else if (ret > 0) {
            ret = skip(vm, &m);
        }
        if (ret < 0) {
            return give_up(vm, ret);
        }
        tell_wait(vm, "the guest is not READY", since, limit, &next);
    }
    return 0;
}

static int map_channel(struct snapshot_vm *vm, size_t size)
{
    vm->channel = vm_map_file(vm->directory, "channel", size, false);
    if (!vm->channel) {
        return -snapshot_vm_error_code();
    }
    vm->channel_size = size;
    if (vm->d.tcg) {
        vm->map = vm_map_file(vm->directory, "map", vm->d.coverage, false);
        if (!vm->map) {
            return -snapshot_vm_error_code();
        }
    }
    return 0;
}

/* QEMU that starts may need as long as its guest; later, it answers. */
static uint64_t start_limit(const struct snapshot_vm *vm, uint64_t usual)
{
    return vm->state->answers || vm->d.boot_ms < usual ? usual :
        vm->d.boot_ms;
}

static void set_tick(int fd)
{
    const struct timeval tick = { .tv_sec = TICK / 1000 };

    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &tick, sizeof(tick));
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &tick, sizeof(tick));
}

static void close_connection(struct snapshot_vm *vm)
{
    if (vm->fd >= 0 && vm->fd != vm->control) {
        close(vm->fd);
    }
    if (vm->control >= 0) {
        close(vm->control);
    }
    vm->control = vm->fd = -1;
}

/*
 * Send HELLO with a socket for all that follows.  A vCPU waits on it: a run
 * takes half the time.
 *
 * Returns: 0; -1 with errno
 */
static int send_socket(struct snapshot_vm *vm, struct snapshot_message *m)
{
    struct iovec data = { .iov_base = m, .iov_len = sizeof(*m) };
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr header;
    } file = {
        .header = {
            .cmsg_level = SOL_SOCKET,
            .cmsg_type = SCM_RIGHTS,
            .cmsg_len = CMSG_LEN(sizeof(int)),
        },
    };
    const struct msghdr message = {
        .msg_iov = &data,
        .msg_iovlen = 1,
        .msg_control = &file,
        .msg_controllen = sizeof(file.bytes),
    };
    int pair[2], error;
    ssize_t n;

    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair)) {
        return -1;
    }
    memcpy(CMSG_DATA(&file.header), &pair[1], sizeof(int));
    set_tick(pair[0]);
    do {
        n = sendmsg(vm->control, &message, MSG_NOSIGNAL);
    } while (n < 0 && errno == EINTR);
    error = n < 0 ? errno : EIO;
    close(pair[1]);
    vm->fd = pair[0];
    if (n == sizeof(*m)) {
        return 0;
    }
    errno = error;
    return -1;
}

static int hello(struct snapshot_vm *vm)
{
    uint64_t since = vm_now_ms(), limit = start_limit(vm, WAIT_HELLO);
    uint64_t end = 0, next = 0;
    struct snapshot_message m, reply = {
        .type = htole32(SNAPSHOT_MSG_HELLO),
        .hello = {
            .magic = htole32(SNAPSHOT_CONTROL_MAGIC),
            .version = htole32(SNAPSHOT_CONTROL_VERSION),
        },
    };
    int ret;

    while (!(ret = receive(vm, &m))) {
        tell_wait(vm, "QEMU does not say HELLO", since, limit, &next);
        if (is_over(&end, limit)) {
            return vm_fail(SNAPSHOT_VM_E_BUSY, "%s/control: no HELLO: another "
                           "program is connected to it, or QEMU hangs",
                           vm->directory);
        }
    }
    if (ret < 0) {
        return ret;
    }
    vm->state->answers = 1;
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
    ret = map_channel(vm, le64toh(m.hello.channel));
    if (ret) {
        return ret;
    }
    ret = le32toh(m.hello.flags) & SNAPSHOT_HELLO_SOCKET ?
        send_socket(vm, &reply) : send_message(vm, &reply);
    if (ret) {
        return errno == EPIPE || errno == ECONNRESET ? fail_closed(vm) :
            vm_fail_system("cannot write to", vm->directory);
    }
    return 0;
}

static int connect_control(struct snapshot_vm *vm)
{
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    uint64_t since = vm_now_ms(), limit = start_limit(vm, WAIT_SOCKET);
    uint64_t end = 0, next = 0;
    int ret;

    if ((size_t)snprintf(addr.sun_path, sizeof(addr.sun_path), "%s/control",
                         vm->directory) >= sizeof(addr.sun_path)) {
        return vm_fail(SNAPSHOT_VM_E_SYSTEM, "%s/control is too long for a "
                       "socket", vm->directory);
    }
    for (;;) {
        vm->control = vm->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (vm->fd < 0) {
            return vm_fail_system("cannot connect to", addr.sun_path);
        }
        set_tick(vm->fd);
        if (!connect(vm->fd, (struct sockaddr *)&addr, sizeof(addr))) {
            ret = hello(vm);
            return ret ? give_up(vm, ret) : 0;
        }
        if (errno != ENOENT && errno != ECONNREFUSED && errno != EINTR &&
            errno != EAGAIN) {
            return vm_fail_system("cannot connect to", addr.sun_path);
        }
        close_connection(vm);
        if (vm_has_ended(vm, 0)) {
            return vm_fail_ended(vm, SNAPSHOT_VM_E_DIED);
        }
        tell_wait(vm, "QEMU has not opened its sockets", since, limit, &next);
        if (is_over(&end, limit)) {
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
    vm->moved = false;
    vm->broken = SNAPSHOT_VM_E_DIED;
    vm->stray = 0;
    vm->refused = false;
    memset(vm->areas, 0, sizeof(vm->areas));
    vm->in_len = 0;
    vm->in_end = 0;
    close_connection(vm);
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
    int ret;

    vm->broken = 0;
    vm->skipped = 0;
    ret = connect_control(vm);
    if (!ret) {
        ret = wait_ready(vm);
    }
    if (ret) {
        vm->broken = -ret;
        return ret == -SNAPSHOT_VM_E_DIED ?
            vm_fail_ended(vm, SNAPSHOT_VM_E_START) : ret;
    }
    if (vm->d.follow) {
        cpu_set_t cpus;

        if (!sched_getaffinity(0, sizeof(cpus), &cpus)) {
            vm_set_affinity(vm->state->qemu, &cpus);
        }
    }
    return 0;
}

/* Can a run be asked for, or will it after a wait? */
static int make_ready(struct snapshot_vm *vm)
{
    if (vm->broken) {
        return vm_fail(vm->broken, "%s: call snapshot_vm_restart()",
                       vm->broken == SNAPSHOT_VM_E_DIED ? "QEMU has ended" :
                       "the connection to QEMU was given up");
    }
    return vm->ready || vm->running ? 0 : wait_ready(vm);
}

void snapshot_vm_limits(const struct snapshot_vm *vm,
                        struct snapshot_vm_limits *limits)
{
    memset(limits, 0, sizeof(*limits));
    if (!vm_check(vm)) {
        limits->host_ns = vm->d.host_ms * 1000000;
        limits->guest_ns = vm->d.guest_ms * 1000000;
    }
}

unsigned char *snapshot_vm_input(struct snapshot_vm *vm, size_t *size)
{
    *size = 0;
    if (vm_check(vm) || make_ready(vm)) {
        return NULL;
    }
    vm->moved = false;
    *size = vm->areas[SNAPSHOT_REGION_INPUT].size;
    return vm->channel + vm->areas[SNAPSHOT_REGION_INPUT].offset;
}

size_t snapshot_vm_coverage_size(const struct snapshot_vm *vm)
{
    if (vm_check(vm)) {
        return 0;
    }
    return vm->map ? vm->d.coverage : vm->areas[SNAPSHOT_REGION_COVERAGE].size;
}

int snapshot_vm_fd(const struct snapshot_vm *vm)
{
    if (vm_check(vm)) {
        return -1;
    }
    if (vm->fd < 0) {
        vm_fail(SNAPSHOT_VM_E_DIED, "QEMU has ended: call "
                "snapshot_vm_restart()");
    }
    return vm->fd;
}

static void cancel(struct snapshot_vm *vm, uint32_t id)
{
    struct snapshot_message m = {
        .type = htole32(SNAPSHOT_MSG_CANCEL),
        .id = htole32(id),
    };

    send(vm->control, &m, sizeof(m), MSG_NOSIGNAL | MSG_DONTWAIT);
}

/* What is wrong with the connection, the end tells, but for this. */
static int ask_for_run(struct snapshot_vm *vm)
{
    if (send_message(vm, &vm->run) < 0 && errno == EAGAIN) {
        return give_up(vm, vm_fail_with_output(vm, SNAPSHOT_VM_E_STUCK, "QEMU "
                                               "does not take a message any "
                                               "more"));
    }
    /* A signal may have wanted it before it was there. */
    if (vm->cancelled) {
        cancel(vm, vm->id);
    }
    return 0;
}

int snapshot_vm_begin(struct snapshot_vm *vm, size_t length,
                      const struct snapshot_vm_limits *limits)
{
    struct snapshot_vm_limits own;
    int ret = vm_check(vm);

    if (!ret) {
        ret = make_ready(vm);
    }
    if (ret) {
        return ret;
    }
    if (vm->running) {
        return vm_fail(SNAPSHOT_VM_E_USE, "a run is under way: call "
                       "snapshot_vm_end() first");
    }
    if (vm->moved && length) {
        return vm_fail(SNAPSHOT_VM_E_ENDED, "since the guest is READY again, "
                       "its input is elsewhere: call snapshot_vm_input() and "
                       "write it there");
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
    vm->run = (struct snapshot_message) {
        .type = htole32(SNAPSHOT_MSG_RUN),
        .id = htole32(vm->id + 1),
        .run = {
            .length = htole64(length),
            .host_ns = htole64(limits->host_ns),
            .guest_ns = htole64(limits->guest_ns),
            .flags = htole32(limits->flags),
        },
    };
    vm->limit_ms = limits->flags & SNAPSHOT_RUN_STOPPED || !limits->host_ns ?
        0 : limits->host_ns / 1000000 + 1;
    vm->cancelled = 0;
    vm->skipped = 0;
    vm->id++;
    vm->running = 1;
    return ask_for_run(vm);
}

void snapshot_vm_cancel(struct snapshot_vm *vm)
{
    int error = errno;

    if (vm && vm->open && vm->running) {
        vm->cancelled = 1;
        cancel(vm, vm->id);
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

/*
 * The guest is not READY any more.  If it was again before RUN came, the run
 * is under way, and nobody waits for it.  On a socket, the next RUN would not
 * even be refused: it is not read before that run has ended.
 */
static int end_not_ready(struct snapshot_vm *vm, int ret)
{
    vm->running = 0;
    vm->ready = false;
    vm->stray = vm->id;
    vm->refused = false;
    cancel(vm, vm->stray);
    return ret;
}

static int refused(struct snapshot_vm *vm, const struct snapshot_message *m)
{
    uint32_t reason = le32toh(m->error.reason);

    if (reason == SNAPSHOT_REFUSED_NOT_READY && vm->stray) {
        /* RUN is sent again when the run that is in its way has ended. */
        vm->refused = true;
        return 0;
    }
    if (reason == SNAPSHOT_REFUSED_NOT_READY) {
        return end_not_ready(vm, fail_refused(m));
    }
    vm->running = 0;
    return reason > SNAPSHOT_REFUSED_VERSION ? fail_refused(m) :
        give_up(vm, fail_refused(m));
}

/* A run that nobody waited for has ended. */
static int stray_ended(struct snapshot_vm *vm)
{
    bool refused = vm->refused;

    vm->stray = 0;
    vm->refused = false;
    return refused ? ask_for_run(vm) : 0;
}

/* Returns: 1 if it is the run's end, with @result; 0; a negative error */
static int take_message(struct snapshot_vm *vm,
                        const struct snapshot_message *m,
                        struct snapshot_vm_result *result)
{
    uint32_t type = le32toh(m->type), id = le32toh(m->id);
    int ret;

    if (type == SNAPSHOT_MSG_RESULT && id == vm->id) {
        set_result(vm, result, m);
        if (result->result > SNAPSHOT_RESULT_INVALID) {
            return give_up(vm, vm_fail(SNAPSHOT_VM_E_PROTOCOL, "QEMU sends "
                                       "result %u, which is none",
                                       (unsigned)result->result));
        }
        vm->running = 0;
        vm->stray = 0;
        vm->refused = false;
        return 1;
    }
    if (type == SNAPSHOT_MSG_ENDED) {
        return end_not_ready(vm, fail_not_ready(m));
    }
    if (type == SNAPSHOT_MSG_ERROR && id == vm->id) {
        return refused(vm, m);
    }
    if (type == SNAPSHOT_MSG_RESULT && vm->stray && id == vm->stray) {
        return stray_ended(vm);
    }
    ret = skip(vm, m);
    if (!ret && type == SNAPSHOT_MSG_READY) {
        ret = set_ready(vm, m);
    }
    return ret < 0 ? give_up(vm, ret) : 0;
}

int snapshot_vm_end(struct snapshot_vm *vm, struct snapshot_vm_result *result)
{
    uint64_t end = 0, end_cancelled = 0, end_stray = 0;
    struct snapshot_message m;
    int ret = vm_check(vm);

    if (ret) {
        return ret;
    }
    if (!vm->running) {
        return vm_fail(SNAPSHOT_VM_E_USE, "no run is under way: call "
                       "snapshot_vm_begin() first");
    }
    for (;;) {
        ret = receive(vm, &m);
        if (ret < 0) {
            return give_up(vm, ret);
        }
        if (ret) {
            ret = take_message(vm, &m, result);
            if (ret) {
                return ret < 0 ? ret : (int)result->result;
            }
        }
        if (vm->limit_ms && !vm->cancelled &&
            is_over(&end, vm->limit_ms + WAIT_ANSWER)) {
            snapshot_vm_cancel(vm);
        }
        if ((vm->cancelled && is_over(&end_cancelled, WAIT_ANSWER)) ||
            (vm->refused && is_over(&end_stray, WAIT_ANSWER))) {
            char what[128];

            snprintf(what, sizeof(what), "QEMU does not answer any more: run "
                     "%u was told to end, and has no RESULT after %u s",
                     vm->refused ? vm->stray : vm->id, WAIT_ANSWER / 1000);
            return give_up(vm, vm_fail_with_output(vm, SNAPSHOT_VM_E_STUCK,
                                                   what));
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
