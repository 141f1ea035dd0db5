/*
 * Fuzzing target: save and restore a machine with any device in it
 *
 * QEMU_FUZZ_ARGS has the machine and the device, whose id is "dut", and
 * "-device snapshot,verify=on".  An input is what snapshot-any.c makes of its
 * bytes; a restore that fails or is not exact ends the fuzzer.  With
 * SNAPSHOT_ANY_ALONE set, there are resets instead of snapshots: what fails
 * then is a fault of QEMU's own.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "hw/core/cpu.h"
#include "monitor/monitor.h"
#include "qapi/error.h"
#include "qapi/qapi-commands-misc.h"
#include "tests/qtest/libqtest.h"
#include "tests/qtest/snapshot-any.h"
#include "fuzz.h"

static unsigned beats;
static char step[256];

static char *inside_hmp(SnapshotAny *a, const char *command)
{
    Error *err = NULL;
    char *text = qmp_human_monitor_command(command, false, 0, &err);

    if (err) {
        text = g_strdup(error_get_pretty(err));
        error_free(err);
    }
    return text;
}

static void inside_reset(SnapshotAny *a)
{
    fuzz_reset(a->qts);
}

static void inside_settle(SnapshotAny *a)
{
    flush_events(a->qts);
}

static G_NORETURN void inside_fail(SnapshotAny *a, const char *text)
{
    fprintf(stderr, "at \"%s\": %s\n", a->step, text);
    abort();
}

static bool inside_is_gone(SnapshotAny *a)
{
    return false;
}

static const SnapshotAnyOps inside = {
    .hmp = inside_hmp,
    .reset = inside_reset,
    .settle = inside_settle,
    .fail = inside_fail,
    .is_gone = inside_is_gone,
};

/* Unplugging is left to the qtest program, which can start QEMU anew. */
static SnapshotAny any = {
    .ops = &inside,
    .beats = &beats,
    .step = step,
    .step_size = sizeof(step),
};

static GString *snapshot_any_cmdline(FuzzTarget *t)
{
    const char *args = getenv("QEMU_FUZZ_ARGS");
    GString *line = g_string_new(TARGET_NAME);

    if (!args) {
        fprintf(stderr, "QEMU_FUZZ_ARGS= the arguments of QEMU\n");
        exit(1);
    }
    g_string_append_printf(line, " -display none -audio none "
                           "-machine accel=qtest %s", args);
    return line;
}

static void snapshot_any_pre_fuzz(QTestState *s)
{
    g_autofree char *error = NULL;

    any.qts = s;
    any.snapshots = !getenv("SNAPSHOT_ANY_ALONE");
    any.whole_machine = !strstr(getenv("QEMU_FUZZ_ARGS"), "id=dut");
    any.has_ports = !strstr(getenv("QEMU_FUZZ_ARGS"), "-M microvm");
    error = snapshot_any_set_up(&any);
    if (error) {
        fprintf(stderr, "the save is refused: %s\n", error);
        exit(0);
    }
}

static void snapshot_any_fuzz(QTestState *s, const unsigned char *data,
                              size_t size)
{
    snapshot_any_input(&any, data, size);
    if (size && !(data[0] & 0x38)) {
        snapshot_any_behaviour(&any, data, size);
    }
}

static void register_snapshot_any_target(void)
{
    fuzz_add_target(&(FuzzTarget) {
        .name = "generic-fuzz-snapshot-any",
        .description = "Save and restore a machine with any device",
        .get_init_cmdline = snapshot_any_cmdline,
        .pre_fuzz = snapshot_any_pre_fuzz,
        .fuzz = snapshot_any_fuzz,
    });
}

fuzz_target_init(register_snapshot_any_target);
