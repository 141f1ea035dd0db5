/*
 * Snapshot device: runs
 *
 * A run: an input goes in, the guest executes, a result and coverage come out,
 * and the machine goes back.  docs/interop/snapshot-control.rst describes what
 * a program on the host sees of it, docs/specs/snapshot.rst what the guest
 * does.  How messages come and go is in snapshot-control.c.
 *
 * What the guest has written, registers and memory, is checked whenever it is
 * used: it may change at any time.  Memory is accessed by physical addresses,
 * as a DMA that only RAM answers to.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/error-report.h"
#include "qemu/log.h"
#include "qemu/main-loop.h"
#include "qemu/timer.h"
#include "qemu/units.h"
#include "qapi/error.h"
#include "exec/address-spaces.h"
#include "exec/target_page.h"
#include "exec/tcg-coverage.h"
#include "hw/core/cpu.h"
#include "system/cpus.h"
#include "system/hw_accel.h"
#include "system/runstate.h"
#include "system/tcg.h"
#include "snapshot-int.h"
#include "trace.h"

#define TEXT_MIN        (4 * KiB)
#define AREA_ALIGN      (4 * KiB)
#define RETRY_NS        (10 * SCALE_MS)
#define GIVE_UP_NS      (10 * NANOSECONDS_PER_SECOND)
#define NO_CAUSE        (-1)

static void snapshot_run_set_state(SnapshotRun *run, SnapshotRunState to)
{
    static const uint8_t steps[SNAPSHOT_RUN__MAX] = {
        [SNAPSHOT_RUN_NONE] = BIT(SNAPSHOT_RUN_SAVING),
        [SNAPSHOT_RUN_SAVING] = BIT(SNAPSHOT_RUN_WAITING) |
                                BIT(SNAPSHOT_RUN_NONE),
        /* It is put back once more, if something has come from outside. */
        [SNAPSHOT_RUN_WAITING] = BIT(SNAPSHOT_RUN_RUNNING) |
                                 BIT(SNAPSHOT_RUN_ENDING) |
                                 BIT(SNAPSHOT_RUN_NONE),
        [SNAPSHOT_RUN_RUNNING] = BIT(SNAPSHOT_RUN_ENDING) |
                                 BIT(SNAPSHOT_RUN_NONE),
        [SNAPSHOT_RUN_ENDING] = BIT(SNAPSHOT_RUN_WAITING) |
                                BIT(SNAPSHOT_RUN_NONE),
    };

    g_assert(steps[run->state] & BIT(to));
    trace_snapshot_run_state(run->state, to);
    /* snapshot_run_guest_end() reads it, in any thread. */
    qatomic_set(&run->state, to);
}

/*
 * Regions
 */

static void snapshot_region_clear(SnapshotRegion *r)
{
    g_clear_pointer(&r->pages, g_free);
    r->size = 0;
}

/*
 * The page at an address as the calling vCPU sees it, if it is of RAM.  What is
 * in the channel need not be copied there.
 */
static bool snapshot_find_page(const SnapshotRun *run, uint64_t address,
                               bool write, hwaddr *page)
{
    MemTxAttrs attrs = MEMTXATTRS_UNSPECIFIED;
    hwaddr xlat, len = 1, addr = address;
    MemoryRegion *mr;

    if (current_cpu) {
        addr = cpu_get_phys_page_attrs_debug(current_cpu, address, &attrs);
        if (addr == -1) {
            return false;
        }
    }
    RCU_READ_LOCK_GUARD();
    mr = address_space_translate(&address_space_memory, addr, &xlat, &len,
                                 write, attrs);
    *page = addr;
    return memory_region_is_ram(mr) && !memory_region_is_ram_device(mr) &&
        memory_region_get_ram_ptr(mr) != run->channel &&
        !(write && (mr->readonly || mr->rom_device));
}

/* Returns: false if a page is not there, or it is longer than the channel */
static bool snapshot_region_resolve(const SnapshotRun *run, SnapshotRegion *r,
                                    bool write)
{
    const unsigned page = qemu_target_page_size();
    uint64_t address = r->address, length = r->length;
    size_t i, n;

    snapshot_region_clear(r);
    if (!length) {
        return true;
    }
    if (length > run->channel_size || address + length - 1 < address) {
        return false;
    }
    n = (address + length - 1) / page - address / page + 1;
    r->pages = g_new(hwaddr, n);
    for (i = 0; i < n; i++) {
        if (!snapshot_find_page(run, (address / page + i) * page, write,
                                &r->pages[i])) {
            snapshot_region_clear(r);
            return false;
        }
    }
    r->pages[0] += address % page;
    r->size = length;
    return true;
}

/*
 * Copy between a region and a buffer, at most @len bytes.  Where there is no
 * RAM now, zeroes are read and nothing is written.
 */
static void snapshot_region_rw(const SnapshotRegion *r, uint8_t *buf,
                               size_t len, bool write)
{
    const MemTxAttrs attrs = { .memory = 1 };
    const unsigned page = qemu_target_page_size();
    size_t i, done = 0, n;

    len = MIN(len, r->size);
    for (i = 0; done < len; i++, done += n) {
        n = MIN(len - done, page - r->pages[i] % page);
        if (address_space_rw(&address_space_memory, r->pages[i], attrs,
                             buf + done, n, write) != MEMTX_OK && !write) {
            memset(buf + done, 0, n);
        }
    }
}

/* Lay out the channel: input, coverage, text. */
static bool snapshot_run_resolve(SnapshotState *s)
{
    SnapshotRun *run = &s->run;
    SnapshotRegion *r = run->regions;
    uint64_t most = run->channel_size, input, coverage, text;
    unsigned i;

    if (current_cpu) {
        cpu_synchronize_state(current_cpu);
    }
    for (i = 0; i < SNAPSHOT_REGIONS; i++) {
        if (!snapshot_region_resolve(run, &r[i],
                                     i == SNAPSHOT_REGION_INPUT)) {
            qemu_log_mask(LOG_GUEST_ERROR, "snapshot: region %u, %" PRIu64
                          " bytes at 0x%" PRIx64 ", is not all RAM that is "
                          "present, in the channel, or longer than it\n", i,
                          r[i].length, r[i].address);
            return false;
        }
    }
    coverage = ROUND_UP(r[SNAPSHOT_REGION_COVERAGE].size, AREA_ALIGN);
    text = ROUND_UP(MAX(r[SNAPSHOT_REGION_TEXT].size + 1, TEXT_MIN),
                    AREA_ALIGN);
    if (coverage + text >= most) {
        qemu_log_mask(LOG_GUEST_ERROR, "snapshot: coverage and text leave no "
                      "room for an input in a channel of %" PRIu64 " bytes\n",
                      most);
        return false;
    }
    /* INPUT_LENGTH has 32 bits. */
    input = MIN(most - coverage - text, UINT32_MAX);
    run->areas[SNAPSHOT_REGION_INPUT].size =
        r[SNAPSHOT_REGION_INPUT].size ?
        MIN(r[SNAPSHOT_REGION_INPUT].size, input) : input;
    run->areas[SNAPSHOT_REGION_COVERAGE].offset = most - coverage - text;
    run->areas[SNAPSHOT_REGION_COVERAGE].size =
        r[SNAPSHOT_REGION_COVERAGE].size;
    run->areas[SNAPSHOT_REGION_TEXT].offset = most - text;
    run->areas[SNAPSHOT_REGION_TEXT].size = text;
    return true;
}

/* Bytes of the guest's text, which a zero byte ends in its area */
static size_t snapshot_copy_text(SnapshotRun *run)
{
    const SnapshotRegion *r = &run->regions[SNAPSHOT_REGION_TEXT];
    uint8_t *text = run->channel + run->areas[SNAPSHOT_REGION_TEXT].offset;

    snapshot_region_rw(r, text, r->size, false);
    text[r->size] = 0;
    /* The host may write there, too. */
    return strnlen((char *)text, r->size);
}

/* The end of a run but for the restore */
static void snapshot_run_finish(SnapshotState *s, uint32_t result, int cause)
{
    SnapshotRun *run = &s->run;
    const struct snapshot_area *coverage =
        &run->areas[SNAPSHOT_REGION_COVERAGE];
    /* Less than nothing if the guest restored what it saved before READY */
    int64_t guest_ns = qemu_clock_get_ns(QEMU_CLOCK_VIRTUAL) -
        run->guest_start;
    struct snapshot_message m = {
        .type = cpu_to_le32(SNAPSHOT_MSG_RESULT),
        .id = cpu_to_le32(run->id),
        .result = {
            .result = cpu_to_le32(result),
            .cause = cpu_to_le32(cause),
            .host_ns = cpu_to_le64(get_clock() - run->host_start),
            .guest_ns = cpu_to_le64(MAX(guest_ns, 0)),
        },
    };

    snapshot_region_rw(&run->regions[SNAPSHOT_REGION_COVERAGE],
                       run->channel + coverage->offset, coverage->size, false);
    m.result.text = cpu_to_le64(snapshot_copy_text(run));
    trace_snapshot_run_result(run->id, result, cause);
    snapshot_run_set_state(run, SNAPSHOT_RUN_ENDING);
    s->input_length = 0;
    run->host_deadline = INT64_MAX;
    if (run->wanted) {
        snapshot_control_send(s, &m);
    }
}

/*
 * Limits.  Timers are not touched in each run: that of the host's time is set
 * anew when it has expired, and the virtual clock is the same at each start.
 */

static void snapshot_run_end(SnapshotRun *run, int cause)
{
    qatomic_set(&run->cause, cause);
    qemu_bh_schedule(run->bh);
}

static void snapshot_host_timer(void *opaque)
{
    SnapshotRun *run = opaque;

    if (run->state != SNAPSHOT_RUN_RUNNING ||
        run->host_deadline == INT64_MAX) {
        return;
    }
    if (get_clock() < run->host_deadline) {
        timer_mod(run->host_timer, run->host_deadline);
    } else {
        snapshot_run_end(run, SNAPSHOT_CAUSE_HOST_TIME);
    }
}

static void snapshot_guest_timer(void *opaque)
{
    SnapshotRun *run = opaque;

    if (run->state == SNAPSHOT_RUN_RUNNING) {
        snapshot_run_end(run, SNAPSHOT_CAUSE_GUEST_TIME);
        /* With icount, timers are a vCPU's work. */
        if (current_cpu) {
            cpu_stop_current();
        }
    }
}

static void snapshot_set_deadline(SnapshotRun *run, int64_t deadline)
{
    run->host_deadline = deadline;
    if (deadline < INT64_MAX &&
        (!timer_pending(run->host_timer) ||
         timer_expire_time_ns(run->host_timer) > deadline)) {
        timer_mod(run->host_timer, deadline);
    }
}

/* Time for which the user stops the machine does not count. */
static void snapshot_vm_state(void *opaque, bool running, RunState state)
{
    SnapshotState *s = opaque;
    SnapshotRun *run = &s->run;

    bool error = !running && (state == RUN_STATE_INTERNAL_ERROR ||
                              state == RUN_STATE_IO_ERROR ||
                              state == RUN_STATE_WATCHDOG);

    if (error && run->state > SNAPSHOT_RUN_SAVING) {
        qemu_bh_schedule(run->bh);
    }
    /* The engine stops it for the guest's own commands: that does count. */
    if (run->state != SNAPSHOT_RUN_RUNNING ||
        vm_snapshot_in_progress(s->engine)) {
        return;
    }
    if (running) {
        if (run->host_left < INT64_MAX) {
            snapshot_set_deadline(run, get_clock() + run->host_left);
        }
        return;
    }
    run->host_left = run->host_deadline == INT64_MAX ? INT64_MAX :
        MAX(run->host_deadline - get_clock(), 0);
    run->host_deadline = INT64_MAX;
    if (error) {
        snapshot_run_end(run, SNAPSHOT_CAUSE_STOPPED);
    }
}

/* The guest ends itself: any thread, and the BQL may not be held. */
static bool snapshot_guest_end(void *opaque, ShutdownCause cause)
{
    SnapshotState *s = opaque;
    SnapshotRun *run = &s->run;
    SnapshotRunState state = qatomic_read(&run->state);

    if (state != SNAPSHOT_RUN_RUNNING && state != SNAPSHOT_RUN_ENDING) {
        return false;
    }
    /* The restore, which is to come, undoes it. */
    qatomic_set(&run->swallowed, cause);
    if (state == SNAPSHOT_RUN_RUNNING) {
        snapshot_run_end(run, cause == SHUTDOWN_CAUSE_GUEST_PANIC ?
                         SNAPSHOT_CAUSE_PANIC :
                         cause == SHUTDOWN_CAUSE_GUEST_SHUTDOWN ?
                         SNAPSHOT_CAUSE_SHUTDOWN : SNAPSHOT_CAUSE_RESET);
    }
    return true;
}

/* There was no restore to undo it. */
static void snapshot_guest_end_again(SnapshotRun *run)
{
    ShutdownCause cause = qatomic_xchg(&run->swallowed, SHUTDOWN_CAUSE_NONE);

    if (cause == SHUTDOWN_CAUSE_GUEST_PANIC) {
        qemu_system_guest_panicked(NULL);
    } else if (cause == SHUTDOWN_CAUSE_GUEST_SHUTDOWN) {
        qemu_system_shutdown_request(cause);
    } else if (cause != SHUTDOWN_CAUSE_NONE) {
        qemu_system_reset_request(cause);
    }
}

/*
 * Runs
 */

static void snapshot_run_begin(SnapshotState *s)
{
    SnapshotRun *run = &s->run;
    uint64_t host_ns = le64_to_cpu(run->next.run.host_ns);
    uint64_t guest_ns = le64_to_cpu(run->next.run.guest_ns);
    const struct snapshot_area *input = &run->areas[SNAPSHOT_REGION_INPUT];
    const SnapshotRegion *r = &run->regions[SNAPSHOT_REGION_INPUT];

    run->pending = false;
    run->wanted = true;
    run->id = le32_to_cpu(run->next.id);
    run->cause = NO_CAUSE;
    run->swallowed = SHUTDOWN_CAUSE_NONE;
    s->input_length = le64_to_cpu(run->next.run.length);
    s->status = SNAPSHOT_STATUS_RUN;
    snapshot_region_rw(r, run->channel + input->offset, s->input_length, true);

    tcg_coverage_begin_run();
    snapshot_run_set_state(run, SNAPSHOT_RUN_RUNNING);
    trace_snapshot_run_begin(run->id, s->input_length);
    run->guest_start = qemu_clock_get_ns(QEMU_CLOCK_VIRTUAL);
    if (guest_ns) {
        int64_t end = run->guest_start + MIN(guest_ns, INT64_MAX / 2);

        if (!timer_pending(run->guest_timer) ||
            timer_expire_time_ns(run->guest_timer) != end) {
            timer_mod(run->guest_timer, end);
        }
    } else {
        timer_del(run->guest_timer);
    }
    run->host_start = get_clock();
    run->host_left = INT64_MAX;
    run->host_deadline = INT64_MAX;
    if (host_ns) {
        host_ns = MIN(host_ns, INT64_MAX / 2);
        if (runstate_is_live(runstate_get())) {
            snapshot_set_deadline(run, run->host_start + host_ns);
        } else {
            run->host_left = host_ns;
        }
    }
    run->stopped = le32_to_cpu(run->next.run.flags) & SNAPSHOT_RUN_STOPPED;
    if (run->stopped) {
        vm_stop(RUN_STATE_PAUSED);
    }
    if (run->cancel_next && run->cancel_id == run->id) {
        snapshot_run_end(run, SNAPSHOT_CAUSE_CANCELLED);
    }
    run->cancel_next = false;
    vm_snapshot_unpark(s->engine);
    resume_all_vcpus();
}

/* The machine is at READY, and parked. */
static void snapshot_run_wait(SnapshotState *s)
{
    snapshot_run_set_state(&s->run, SNAPSHOT_RUN_WAITING);
    timer_del(s->run.retry_timer);
    s->run.give_up = 0;
    /* The main loop may go on to do something else. */
    s->run.untouched = qemu_in_vcpu_thread() ? bql_times_locked() : 0;
    vm_snapshot_park(s->engine);
    snapshot_control_ready(s);
    if (s->run.pending) {
        /* Not here: the restore is not over. */
        qemu_bh_schedule(s->run.bh);
    } else {
        snapshot_control_listen(s);
    }
}

void snapshot_run_reset(SnapshotState *s, uint32_t reason)
{
    SnapshotRun *run = &s->run;

    if (run->state == SNAPSHOT_RUN_NONE) {
        return;
    }
    snapshot_run_set_state(run, SNAPSHOT_RUN_NONE);
    vm_snapshot_unblock_migration(s->engine);
    timer_del(run->guest_timer);
    timer_del(run->retry_timer);
    run->host_deadline = INT64_MAX;
    if (reason != SNAPSHOT_ENDED_FAILED || runstate_needs_reset()) {
        run->swallowed = SHUTDOWN_CAUSE_NONE;
    }
    s->input_length = 0;
    snapshot_control_ended(s, reason);
    if (run->pending) {
        run->pending = false;
        snapshot_control_refuse(s, le32_to_cpu(run->next.id),
                                SNAPSHOT_REFUSED_NOT_READY);
        snapshot_control_read_on(s);
    }
    vm_snapshot_unpark(s->engine);
    /* Later, as this may be in the middle of a reset. */
    qemu_bh_schedule(run->bh);
}

/* Nobody would take over the host's end. */
static bool snapshot_block_migration(SnapshotState *s)
{
    Error *reason = NULL, *err = NULL;

    error_setg(&reason, "The guest waits for runs of the snapshot device's "
               "control=");
    if (vm_snapshot_block_migration(s->engine, reason, &err)) {
        return true;
    }
    warn_report_once("snapshot: the guest's READY failed: %s",
                     error_get_pretty(err));
    error_free(err);
    return false;
}

uint32_t snapshot_run_ready(SnapshotState *s)
{
    SnapshotRun *run = &s->run;

    if (!run->channel) {
        qemu_log_mask(LOG_GUEST_ERROR, "snapshot: READY without control=\n");
        return SNAPSHOT_STATUS_ERROR | SNAPSHOT_E_CONTROL;
    }
    if (run->state != SNAPSHOT_RUN_NONE) {
        qemu_log_mask(LOG_GUEST_ERROR, "snapshot: READY in a run\n");
        return SNAPSHOT_STATUS_ERROR | SNAPSHOT_E_RUN;
    }
    if (!snapshot_has_slot(s)) {
        return SNAPSHOT_STATUS_ERROR | SNAPSHOT_E_SLOT;
    }
    if (!snapshot_run_resolve(s)) {
        return SNAPSHOT_STATUS_ERROR | SNAPSHOT_E_REGION;
    }
    if (!snapshot_block_migration(s)) {
        return SNAPSHOT_STATUS_ERROR | SNAPSHOT_E_UNSAVABLE;
    }
    if (snapshot_request(s, SNAPSHOT_REQUEST_READY, VM_SNAPSHOT_SAVE,
                         s->slot)) {
        vm_snapshot_unblock_migration(s->engine);
        return SNAPSHOT_STATUS_ERROR | SNAPSHOT_E_BUSY;
    }
    run->slot = s->slot;
    snapshot_run_set_state(run, SNAPSHOT_RUN_SAVING);
    return SNAPSHOT_STATUS_NONE;
}

uint32_t snapshot_run_done(SnapshotState *s)
{
    SnapshotRun *run = &s->run;
    uint32_t result = s->result;

    if (run->state != SNAPSHOT_RUN_RUNNING) {
        qemu_log_mask(LOG_GUEST_ERROR, "snapshot: DONE outside a run\n");
        return SNAPSHOT_STATUS_ERROR | SNAPSHOT_E_RUN;
    }
    if (snapshot_request(s, SNAPSHOT_REQUEST_DONE, VM_SNAPSHOT_RESTORE,
                         run->slot)) {
        return SNAPSHOT_STATUS_ERROR | SNAPSHOT_E_BUSY;
    }
    snapshot_run_finish(s, MIN(result, SNAPSHOT_RESULT_INVALID),
                        SNAPSHOT_CAUSE_GUEST);
    return SNAPSHOT_STATUS_NONE;
}

/*
 * Shall the machine be put back later?  A commit of disks comes to its end, but
 * a device that the guest keeps busy may not.
 */
static bool snapshot_run_retry(SnapshotRun *run, int ret)
{
    int64_t now = get_clock();

    if (ret == -ETIMEDOUT && !run->give_up) {
        run->give_up = now + GIVE_UP_NS;
    }
    if (ret != -EBUSY && (ret != -ETIMEDOUT || now >= run->give_up)) {
        return false;
    }
    timer_mod(run->retry_timer, now + RETRY_NS);
    return true;
}

void snapshot_run_op_done(SnapshotState *s, SnapshotRequest request,
                          VMSnapshotOp op, unsigned slot, int ret)
{
    SnapshotRun *run = &s->run;

    if (run->state == SNAPSHOT_RUN_NONE) {
        return;
    }
    if (request == SNAPSHOT_REQUEST_READY) {
        if (ret) {
            vm_snapshot_unblock_migration(s->engine);
            snapshot_run_set_state(run, SNAPSHOT_RUN_NONE);
        } else {
            snapshot_run_wait(s);
        }
    } else if (request == SNAPSHOT_REQUEST_DONE && ret) {
        if (!snapshot_run_retry(run, ret)) {
            snapshot_run_reset(s, SNAPSHOT_ENDED_FAILED);
        }
    } else if (request == SNAPSHOT_REQUEST_DONE ||
               (request == SNAPSHOT_REQUEST_NONE && !ret &&
                op == VM_SNAPSHOT_RESTORE && slot == run->slot &&
                run->state == SNAPSHOT_RUN_ENDING)) {
        snapshot_run_wait(s);
    } else if (!ret && op == VM_SNAPSHOT_RESTORE) {
        /* The guest may go back in a run; whom the user puts back has none. */
        if (request == SNAPSHOT_REQUEST_NONE) {
            snapshot_run_reset(s, SNAPSHOT_ENDED_RESTORED);
        }
    } else if (!ret && slot == run->slot) {
        snapshot_run_reset(s, SNAPSHOT_ENDED_SAVED);
    }
}

/* Put back a machine whose run has ended, but not by its own DONE. */
static void snapshot_run_put_back(SnapshotState *s)
{
    SnapshotRun *run = &s->run;
    Error *err = NULL;
    int ret = vm_snapshot_run(s->engine, VM_SNAPSHOT_RESTORE, run->slot, &err);

    if (ret && run->state == SNAPSHOT_RUN_ENDING &&
        snapshot_run_retry(run, ret)) {
        warn_report_once("snapshot: a run's end waits: %s",
                         error_get_pretty(err));
        error_free(err);
    } else if (ret) {
        error_reportf_err(err, "snapshot: after a run, the machine cannot be "
                          "put back: ");
        snapshot_run_reset(s, SNAPSHOT_ENDED_FAILED);
    }
}

/* The vCPUs stand still when coverage is copied. */
static void snapshot_run_stop(SnapshotState *s)
{
    SnapshotRun *run = &s->run;
    int cause;

    pause_all_vcpus();
    cause = qatomic_xchg(&run->cause, NO_CAUSE);
    /* Meanwhile, the guest may have given DONE. */
    if (cause != NO_CAUSE && run->state == SNAPSHOT_RUN_RUNNING) {
        bool crash = cause < SNAPSHOT_CAUSE_HOST_TIME;

        snapshot_run_finish(s, crash ? SNAPSHOT_RESULT_CRASH
                                     : SNAPSHOT_RESULT_HANG, cause);
        snapshot_run_put_back(s);
    }
    if (runstate_is_running()) {
        resume_all_vcpus();
    }
}

static void snapshot_retry_timer(void *opaque)
{
    SnapshotState *s = opaque;

    if (s->run.state == SNAPSHOT_RUN_ENDING) {
        snapshot_run_put_back(s);
        qemu_bh_schedule(s->run.bh);
    }
}

/*
 * An error has stopped the machine in a run, or when the restore waited for a
 * request of the run's.  What it was about is undone.  So is the stop that the
 * run began with.
 */
static void snapshot_run_continue(SnapshotRun *run)
{
    if (run->state != SNAPSHOT_RUN_WAITING) {
        return;
    }
    if (runstate_check(RUN_STATE_IO_ERROR) ||
        runstate_check(RUN_STATE_WATCHDOG) ||
        runstate_check(RUN_STATE_PRELAUNCH) ||
        (run->stopped && (runstate_check(RUN_STATE_PAUSED) ||
                          runstate_check(RUN_STATE_DEBUG)))) {
        vm_start();
    }
    run->stopped = false;
}

/*
 * Nothing comes between what puts the machine back here and the run's begin, as
 * something may have since an earlier restore.
 */
static void snapshot_run_begin_pending(SnapshotState *s)
{
    SnapshotRun *run = &s->run;

    if (!vm_snapshot_put_back_parked(s->engine, run->slot)) {
        snapshot_run_set_state(run, SNAPSHOT_RUN_ENDING);
        snapshot_run_put_back(s);
        snapshot_run_continue(run);
    }
    if (run->state == SNAPSHOT_RUN_WAITING) {
        snapshot_run_begin(s);
        snapshot_control_read_on(s);
    }
}

static void snapshot_run_bh(void *opaque)
{
    SnapshotState *s = opaque;
    SnapshotRun *run = &s->run;

    if (qatomic_read(&run->cause) != NO_CAUSE) {
        snapshot_run_stop(s);
    }
    if (run->state == SNAPSHOT_RUN_NONE && runstate_is_running()) {
        resume_all_vcpus();
        snapshot_guest_end_again(run);
    }
    snapshot_run_continue(run);
    snapshot_control_close_broken(s);
    if (run->pending && run->state == SNAPSHOT_RUN_WAITING) {
        snapshot_run_begin_pending(s);
    }
}

/*
 * What a host wants
 */

/*
 * Has nobody come, and changed something, since the machine was put back?  With
 * KVM, devices are in the kernel.
 */
static bool snapshot_run_is_untouched(const SnapshotRun *run)
{
    return tcg_enabled() && run->untouched == bql_times_locked();
}

/* Begin a run now, or leave to the main loop what it has to do before. */
static void snapshot_prepare_run(SnapshotState *s)
{
    SnapshotRun *run = &s->run;
    bool stopped = le32_to_cpu(run->next.run.flags) & SNAPSHOT_RUN_STOPPED;

    if (run->state == SNAPSHOT_RUN_ENDING) {
        run->pending = true;
    } else if ((stopped && qemu_in_vcpu_thread()) ||
               (!snapshot_run_is_untouched(run) &&
                !vm_snapshot_put_back_parked(s->engine, run->slot))) {
        run->pending = true;
        qemu_bh_schedule(run->bh);
    } else {
        snapshot_run_begin(s);
    }
}

uint32_t snapshot_run_ask(SnapshotState *s, const struct snapshot_message *m)
{
    SnapshotRun *run = &s->run;

    if (run->state != SNAPSHOT_RUN_WAITING &&
        run->state != SNAPSHOT_RUN_ENDING) {
        return SNAPSHOT_REFUSED_NOT_READY;
    }
    if (le64_to_cpu(m->run.length) > run->areas[SNAPSHOT_REGION_INPUT].size) {
        return SNAPSHOT_REFUSED_LENGTH;
    }
    if (le32_to_cpu(m->run.flags) & ~SNAPSHOT_RUN_STOPPED) {
        return SNAPSHOT_REFUSED_FLAGS;
    }
    run->next = *m;
    snapshot_prepare_run(s);
    return 0;
}

void snapshot_run_cancel(SnapshotState *s, uint32_t id, bool may_come)
{
    SnapshotRun *run = &s->run;

    if (run->state == SNAPSHOT_RUN_RUNNING && run->id == id) {
        snapshot_run_end(run, SNAPSHOT_CAUSE_CANCELLED);
    } else if (may_come) {
        run->cancel_next = true;
        run->cancel_id = id;
    }
}

void snapshot_run_host_gone(SnapshotState *s)
{
    SnapshotRun *run = &s->run;

    run->pending = run->wanted = run->cancel_next = false;
    if (run->state == SNAPSHOT_RUN_RUNNING) {
        /* Nobody waits for its result. */
        snapshot_run_end(run, SNAPSHOT_CAUSE_CANCELLED);
    }
}

bool snapshot_run_init(SnapshotState *s, Error **errp)
{
    SnapshotRun *run = &s->run;

    if (!snapshot_control_init(s, errp)) {
        return false;
    }
    run->cause = NO_CAUSE;
    run->host_deadline = INT64_MAX;
    run->host_timer = timer_new_ns(QEMU_CLOCK_REALTIME, snapshot_host_timer,
                                   run);
    run->guest_timer = timer_new_ns(QEMU_CLOCK_VIRTUAL, snapshot_guest_timer,
                                    run);
    run->retry_timer = timer_new_ns(QEMU_CLOCK_REALTIME, snapshot_retry_timer,
                                    s);
    /* As the engine's: not in the main context, which aio_poll() runs. */
    run->bh = aio_bh_new(iohandler_get_aio_context(), snapshot_run_bh, s);
    run->vm_state = qemu_add_vm_change_state_handler(snapshot_vm_state, s);
    qemu_set_guest_end_handler(snapshot_guest_end, s);
    snapshot_control_start(s);
    return true;
}

void snapshot_run_exit(SnapshotState *s)
{
    SnapshotRun *run = &s->run;
    unsigned i;

    if (!run->channel) {
        return;
    }
    snapshot_control_exit(s);
    qemu_set_guest_end_handler(NULL, NULL);
    qemu_del_vm_change_state_handler(run->vm_state);
    timer_free(run->host_timer);
    timer_free(run->guest_timer);
    timer_free(run->retry_timer);
    qemu_bh_delete(run->bh);
    for (i = 0; i < SNAPSHOT_REGIONS; i++) {
        snapshot_region_clear(&run->regions[i]);
    }
}
