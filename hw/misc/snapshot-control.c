/*
 * Snapshot device: the connection to a program on the host
 *
 * The way of a message.  What the host sends over control=, a chardev, is
 * collected by snapshot_read_control() in the main loop, and told apart by
 * snapshot_message().  HELLO may bring a socket along: RUN is then read from
 * there, by the first vCPU's thread, in snapshot_wait_for_run().  Either way a
 * RUN comes to snapshot_run_ask(), which begins it, or keeps it until the
 * machine is put back, or says why it is refused.
 *
 * What QEMU sends goes through snapshot_control_send(), on any thread: to the
 * socket if there is one, else to the chardev.  A host that breaks the
 * protocol, or does not read, is told why if that is possible, and its
 * connection is closed: later, by the runs' bottom half, as this may be a
 * vCPU's thread.
 *
 * docs/interop/snapshot-control.rst is the protocol.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <poll.h>
#include "qemu/bswap.h"
#include "qemu/main-loop.h"
#include "qemu/units.h"
#include "chardev/char.h"
#include "qapi/error.h"
#include "hw/boards.h"
#include "hw/core/cpu.h"
#include "system/cpus.h"
#include "system/kvm.h"
#include "system/tcg.h"
#include "snapshot-int.h"
#include "trace.h"

#define CHANNEL_MIN     (64 * KiB)

QEMU_BUILD_BUG_ON(sizeof(struct snapshot_message) != 64);

static void snapshot_set_broken(SnapshotState *s)
{
    s->conn.broken = true;
    qemu_bh_schedule(s->run.bh);
}

void snapshot_control_close_broken(SnapshotState *s)
{
    if (s->conn.broken) {
        qemu_chr_fe_disconnect(&s->control);
    }
}

/* The protocol lets a socket's buffer never be full. */
void snapshot_control_send(SnapshotState *s, const struct snapshot_message *m)
{
    SnapshotConnection *conn = &s->conn;
    ssize_t n;

    if (!conn->connected || conn->broken) {
        return;
    }
    if (conn->socket >= 0) {
        n = send(conn->socket, m, sizeof(*m), MSG_DONTWAIT | MSG_NOSIGNAL);
    } else {
        n = qemu_chr_fe_write(&s->control, (const uint8_t *)m, sizeof(*m));
    }
    if (n != sizeof(*m)) {
        snapshot_set_broken(s);
    }
}

void snapshot_control_refuse(SnapshotState *s, uint32_t id, uint32_t reason)
{
    struct snapshot_message m = {
        .type = cpu_to_le32(SNAPSHOT_MSG_ERROR),
        .id = cpu_to_le32(id),
        .error.reason = cpu_to_le32(reason),
    };

    trace_snapshot_run_refused(id, reason);
    snapshot_control_send(s, &m);
    if (reason <= SNAPSHOT_REFUSED_VERSION ||
        reason == SNAPSHOT_REFUSED_SOCKET) {
        snapshot_set_broken(s);
    }
}

static struct snapshot_area snapshot_area_le(struct snapshot_area a)
{
    return (struct snapshot_area) {
        .offset = cpu_to_le64(a.offset),
        .size = cpu_to_le64(a.size),
    };
}

/* What a host has sent before it was told of READY is for an earlier one. */
static void snapshot_refuse_early(SnapshotState *s)
{
    struct snapshot_message m;

    while (s->conn.socket >= 0 && !s->conn.broken &&
           recv(s->conn.socket, &m, sizeof(m), MSG_DONTWAIT) == sizeof(m)) {
        snapshot_control_refuse(s, le32_to_cpu(m.id),
                                SNAPSHOT_REFUSED_NOT_READY);
    }
}

void snapshot_control_ready(SnapshotState *s)
{
    SnapshotConnection *conn = &s->conn;
    const SnapshotRun *run = &s->run;
    struct snapshot_message m = {
        .type = cpu_to_le32(SNAPSHOT_MSG_READY),
        .ready = {
            .input = snapshot_area_le(run->areas[SNAPSHOT_REGION_INPUT]),
            .coverage = snapshot_area_le(run->areas[SNAPSHOT_REGION_COVERAGE]),
            .text = snapshot_area_le(run->areas[SNAPSHOT_REGION_TEXT]),
            .slot = cpu_to_le32(run->slot),
        },
    };

    if (conn->attached && !conn->told_ready) {
        snapshot_refuse_early(s);
        conn->told_ready = true;
        snapshot_control_send(s, &m);
    }
}

void snapshot_control_ended(SnapshotState *s, uint32_t reason)
{
    struct snapshot_message m = {
        .type = cpu_to_le32(SNAPSHOT_MSG_ENDED),
        .ended.reason = cpu_to_le32(reason),
    };

    if (s->conn.attached && s->conn.told_ready) {
        snapshot_control_send(s, &m);
    }
    s->conn.told_ready = false;
}

void snapshot_control_listen(SnapshotState *s)
{
    if (s->conn.socket >= 0 && !qemu_in_vcpu_thread()) {
        qemu_cpu_kick(first_cpu);
    }
}

/*
 * With a socket for RUN, the first vCPU's thread, which has nothing else to do
 * while the guest waits, waits for it: that the main loop is told of it, and
 * tells the vCPU, would take as long as a short run.  A machine that the main
 * loop puts back has no use for that.
 */
static bool snapshot_wait_is_useful(const SnapshotState *s)
{
    return vm_snapshot_ram(s->engine) == SNAPSHOT_DEVICE_RAM_DIRTY &&
        (tcg_enabled() ||
         (kvm_enabled() && current_machine->smp.max_cpus == 1));
}

/* A vCPU may be waiting for it. */
static void snapshot_close_socket(SnapshotConnection *conn)
{
    int fd = conn->socket;

    conn->socket = -1;
    if (fd >= 0 && conn->polling && conn->orphan < 0) {
        conn->orphan = fd;
        event_notifier_set(&conn->kick);
    } else if (fd >= 0) {
        close(fd);
    }
}

/* Take the socket that came with HELLO, if any; any other file is none. */
static bool snapshot_take_socket(SnapshotState *s)
{
    int fd = qemu_chr_fe_get_msgfd(&s->control), type = 0, domain = 0;
    socklen_t len = sizeof(int);

    if (fd < 0) {
        return true;
    }
    if (!snapshot_wait_is_useful(s) ||
        getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &len) ||
        getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &len) ||
        domain != AF_UNIX || type != SOCK_SEQPACKET) {
        close(fd);
        return false;
    }
    s->conn.socket = fd;
    qemu_cpu_kick(first_cpu);
    return true;
}

static void snapshot_hello(SnapshotState *s)
{
    SnapshotConnection *conn = &s->conn;

    if (le32_to_cpu(conn->in.hello.magic) != SNAPSHOT_CONTROL_MAGIC) {
        snapshot_control_refuse(s, 0, SNAPSHOT_REFUSED_HELLO);
    } else if (le32_to_cpu(conn->in.hello.version) !=
               SNAPSHOT_CONTROL_VERSION) {
        snapshot_control_refuse(s, 0, SNAPSHOT_REFUSED_VERSION);
    } else if (!snapshot_take_socket(s)) {
        snapshot_control_refuse(s, 0, SNAPSHOT_REFUSED_SOCKET);
    } else {
        conn->attached = true;
        if (s->run.state == SNAPSHOT_RUN_WAITING) {
            snapshot_control_ready(s);
        }
    }
}

static void snapshot_ask_for_run(SnapshotState *s,
                                 const struct snapshot_message *m)
{
    uint32_t refused = s->conn.told_ready ? snapshot_run_ask(s, m)
                                          : SNAPSHOT_REFUSED_NOT_READY;

    if (refused) {
        snapshot_control_refuse(s, le32_to_cpu(m->id), refused);
    }
}

static void snapshot_message(SnapshotState *s)
{
    const SnapshotConnection *conn = &s->conn;
    uint32_t type = le32_to_cpu(conn->in.type), id = le32_to_cpu(conn->in.id);

    if (!conn->attached) {
        if (type == SNAPSHOT_MSG_HELLO) {
            snapshot_hello(s);
        } else {
            snapshot_control_refuse(s, 0, SNAPSHOT_REFUSED_HELLO);
        }
    } else if (type == SNAPSHOT_MSG_RUN && conn->socket >= 0) {
        /* It could overtake one that is there. */
        snapshot_control_refuse(s, id, SNAPSHOT_REFUSED_NOT_READY);
    } else if (type == SNAPSHOT_MSG_RUN) {
        snapshot_ask_for_run(s, &conn->in);
    } else if (type == SNAPSHOT_MSG_CANCEL) {
        /* Its RUN may not have been read from the socket yet. */
        snapshot_run_cancel(s, id, conn->socket >= 0);
    } else {
        snapshot_control_refuse(s, id, SNAPSHOT_REFUSED_TYPE);
    }
}

static int snapshot_can_read(void *opaque)
{
    SnapshotState *s = opaque;
    const SnapshotConnection *conn = &s->conn;

    return s->run.pending || conn->broken ? 0
                                          : sizeof(conn->in) - conn->in_len;
}

void snapshot_control_read_on(SnapshotState *s)
{
    qemu_chr_fe_accept_input(&s->control);
}

static void snapshot_read_control(void *opaque, const uint8_t *buf, int len)
{
    SnapshotState *s = opaque;
    SnapshotConnection *conn = &s->conn;

    memcpy((uint8_t *)&conn->in + conn->in_len, buf, len);
    conn->in_len += len;
    if (conn->in_len == sizeof(conn->in)) {
        conn->in_len = 0;
        snapshot_message(s);
    }
}

static bool snapshot_wait_for_run(void *opaque, CPUState *cpu)
{
    SnapshotState *s = opaque;
    SnapshotConnection *conn = &s->conn;
    const SnapshotRun *run = &s->run;
    struct snapshot_message m;
    struct pollfd fds[2];
    ssize_t n;

    if (conn->socket < 0 || cpu != first_cpu || conn->broken ||
        run->pending || run->state != SNAPSHOT_RUN_WAITING) {
        return false;
    }
    n = recv(conn->socket, &m, sizeof(m), MSG_DONTWAIT | MSG_TRUNC);
    if (n == sizeof(m) && le32_to_cpu(m.type) == SNAPSHOT_MSG_RUN) {
        snapshot_ask_for_run(s, &m);
        return true;
    }
    if (n > 0) {
        snapshot_control_refuse(s, 0, SNAPSHOT_REFUSED_TYPE);
        return true;
    }
    if (!n || (errno != EAGAIN && errno != EINTR)) {
        snapshot_set_broken(s);
        return true;
    }

    fds[0] = (struct pollfd) { .fd = conn->socket, .events = POLLIN };
    fds[1] = (struct pollfd) { .fd = event_notifier_get_fd(&conn->kick),
                               .events = POLLIN };
    qatomic_set(&conn->polling, true);
    smp_mb(); /* with snapshot_kick(): what it is about, or the kick, is seen */
    if (cpu_thread_is_idle(cpu)) {
        bql_unlock();
        poll(fds, 2, -1);
        bql_lock();
        s->run.untouched++;
    }
    conn->polling = false;
    if (fds[1].revents) {
        event_notifier_test_and_clear(&conn->kick);
    }
    if (conn->orphan >= 0) {
        close(conn->orphan);
        conn->orphan = -1;
    }
    return true;
}

static void snapshot_kick(void *opaque, CPUState *cpu)
{
    SnapshotState *s = opaque;

    smp_mb(); /* with snapshot_wait_for_run() */
    if (qatomic_read(&s->conn.polling)) {
        event_notifier_set(&s->conn.kick);
    }
}

static const CPUWaitOps snapshot_wait_ops = {
    .wait = snapshot_wait_for_run,
    .kick = snapshot_kick,
};

static void snapshot_control_event(void *opaque, QEMUChrEvent event)
{
    SnapshotState *s = opaque;
    SnapshotConnection *conn = &s->conn;
    struct snapshot_message m = {
        .type = cpu_to_le32(SNAPSHOT_MSG_HELLO),
        .hello = {
            .magic = cpu_to_le32(SNAPSHOT_CONTROL_MAGIC),
            .version = cpu_to_le32(SNAPSHOT_CONTROL_VERSION),
            .channel = cpu_to_le64(s->run.channel_size),
        },
    };

    if (qemu_chr_has_feature(qemu_chr_fe_get_driver(&s->control),
                             QEMU_CHAR_FEATURE_FD_PASS) &&
        snapshot_wait_is_useful(s)) {
        m.hello.flags = cpu_to_le32(SNAPSHOT_HELLO_SOCKET);
    }

    if (event != CHR_EVENT_OPENED && event != CHR_EVENT_CLOSED) {
        return;
    }
    conn->connected = event == CHR_EVENT_OPENED;
    conn->attached = conn->told_ready = conn->broken = false;
    conn->in_len = 0;
    snapshot_close_socket(conn);
    snapshot_run_host_gone(s);
    snapshot_control_send(s, &m);
}

bool snapshot_control_init(SnapshotState *s, Error **errp)
{
    MemoryRegion *mr;
    int ret;

    if (!s->channel) {
        error_setg(errp, "control= needs channel=, a memory backend through "
                   "which inputs and results pass");
        return false;
    }
    if (object_dynamic_cast(OBJECT(qemu_chr_fe_get_driver(&s->control)),
                            TYPE_CHARDEV_MUX)) {
        error_setg(errp, "control= has a chardev that several may use: give it "
                   "one without mux=on");
        return false;
    }
    mr = host_memory_backend_get_memory(s->channel);
    if (!qemu_ram_is_shared(mr->ram_block)) {
        error_setg(errp, "The memory of channel= is QEMU's alone: use "
                   "share=on, so that a program can map it, too");
        return false;
    }
    if (mr->readonly) {
        error_setg(errp, "The memory of channel= is read-only, and results "
                   "have to be written there");
        return false;
    }
    if (memory_region_size(mr) < CHANNEL_MIN) {
        error_setg(errp, "The memory of channel= is smaller than %" PRIu64
                   " bytes", (uint64_t)CHANNEL_MIN);
        return false;
    }
    ret = event_notifier_init(&s->conn.kick, false);
    if (ret) {
        error_setg_errno(errp, -ret, "control= needs an eventfd");
        return false;
    }
    s->conn.socket = s->conn.orphan = -1;
    s->run.channel = memory_region_get_ram_ptr(mr);
    s->run.channel_size = memory_region_size(mr);
    return true;
}

void snapshot_control_start(SnapshotState *s)
{
    qemu_set_cpu_wait(&snapshot_wait_ops, s);
    qemu_chr_fe_set_handlers(&s->control, snapshot_can_read,
                             snapshot_read_control, snapshot_control_event,
                             NULL, s, NULL, true);
}

void snapshot_control_exit(SnapshotState *s)
{
    qemu_chr_fe_deinit(&s->control, false);
    qemu_set_cpu_wait(NULL, NULL);
    snapshot_close_socket(&s->conn);
    event_notifier_cleanup(&s->conn.kick);
}
