/*
 * What the tests of the snapshot device share: a machine with the device, its
 * registers, its QMP commands
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/units.h"
#include "libqos/libqos.h"
#include "libqos/pci-pc.h"
#include "qobject/qdict.h"
#include "snapshot-utils.h"

typedef struct Case {
    const char *machine;
    const char *ram;
    GTestDataFunc test;
} Case;

/* Of the case that runs */
static const char *ram;

static void run_case(const void *data)
{
    const Case *c = data;

    ram = c->ram;
    c->test(c->machine);
}

void snapshot_add_test(const char *machine, const char *mode, const char *name,
                       GTestDataFunc test)
{
    g_autofree char *path = g_strdup_printf("snapshot/%s/%s/%s", machine, mode,
                                            name);
    Case c = { .machine = machine, .ram = mode, .test = test };

    if (qtest_has_machine(machine)) {
        qtest_add_data_func_full(path, g_memdup2(&c, sizeof(c)), run_case,
                                 g_free);
    }
}

void snapshot_add_tests(const char *name, GTestDataFunc test)
{
    snapshot_add_test("pc", "remap", name, test);
    snapshot_add_test("pc", "dirty", name, test);
    snapshot_add_test("q35", "remap", name, test);
    snapshot_add_test("q35", "dirty", name, test);
}

static void take_device(QPCIDevice *dev, int devfn, void *opaque)
{
    QPCIDevice **found = opaque;

    g_assert_null(*found);
    *found = dev;
}

void snapshot_map_bar(SnapshotVM *vm)
{
    uint64_t size;

    vm->bar = qpci_iomap(vm->dev, SNAPSHOT_BAR, &size);
    g_assert_cmphex(size, ==, SNAPSHOT_BAR_SIZE);
    g_assert_false(vm->bar.is_io);
    qpci_device_enable(vm->dev);
}

SnapshotVM *snapshot_vm_start(const char *properties, const char *fmt, ...)
{
    SnapshotVM *vm = g_new0(SnapshotVM, 1);
    g_autofree char *args = NULL;
    va_list ap;

    va_start(ap, fmt);
    args = g_strdup_vprintf(fmt, ap);
    va_end(ap);
    vm->qts = qtest_initf("%s -device snapshot,ram=%s%s", args, ram,
                          properties);
    vm->remap = !strcmp(ram, "remap");
    vm->pci = qpci_new_pc(vm->qts, NULL);
    qpci_device_foreach(vm->pci, SNAPSHOT_VENDOR_ID, SNAPSHOT_DEVICE_ID,
                        take_device, &vm->dev);
    g_assert_nonnull(vm->dev);
    snapshot_map_bar(vm);
    return vm;
}

void snapshot_vm_end(SnapshotVM *vm)
{
    g_free(vm->dev);
    qpci_free_pc(vm->pci);
    qtest_quit(vm->qts);
    g_free(vm);
}

uint32_t snapshot_readl(SnapshotVM *vm, unsigned reg)
{
    return qpci_io_readl(vm->dev, vm->bar, reg);
}

uint64_t snapshot_readq(SnapshotVM *vm, unsigned reg)
{
    return qpci_io_readq(vm->dev, vm->bar, reg);
}

void snapshot_writel(SnapshotVM *vm, unsigned reg, uint32_t val)
{
    qpci_io_writel(vm->dev, vm->bar, reg, val);
}

void snapshot_writeq(SnapshotVM *vm, unsigned reg, uint64_t val)
{
    qpci_io_writeq(vm->dev, vm->bar, reg, val);
}

uint32_t snapshot_command(SnapshotVM *vm, uint32_t command, uint32_t slot)
{
    const uint32_t mark = SNAPSHOT_STATUS_ERROR | SNAPSHOT_E_COMMAND;
    uint32_t status;
    int tries = 30000;

    /*
     * The command runs in a bottom half, after its write was answered: give
     * STATUS a value that the command does not.
     */
    snapshot_writel(vm, SNAPSHOT_REG_COMMAND, 0);
    g_assert_cmphex(snapshot_readl(vm, SNAPSHOT_REG_STATUS), ==, mark);

    snapshot_writel(vm, SNAPSHOT_REG_SLOT, slot);
    snapshot_writel(vm, SNAPSHOT_REG_COMMAND, command);
    while ((status = snapshot_readl(vm, SNAPSHOT_REG_STATUS)) == mark) {
        g_assert_cmpint(--tries, >, 0);
        g_usleep(1000);
    }
    return status;
}

void snapshot_save(SnapshotVM *vm, unsigned slot)
{
    g_assert_cmphex(snapshot_command(vm, SNAPSHOT_CMD_SAVE, slot), ==,
                    SNAPSHOT_STATUS_SAVED);
}

void snapshot_restore(SnapshotVM *vm, unsigned slot)
{
    g_assert_cmphex(snapshot_command(vm, SNAPSHOT_CMD_RESTORE, slot), ==,
                    SNAPSHOT_STATUS_RESTORED);
}

void snapshot_discard(SnapshotVM *vm, unsigned slot)
{
    g_assert_cmphex(snapshot_command(vm, SNAPSHOT_CMD_DISCARD, slot), ==,
                    SNAPSHOT_STATUS_DISCARDED);
}

void snapshot_qmp(SnapshotVM *vm, const char *command, unsigned slot)
{
    g_autofree char *name = g_strdup_printf("x-snapshot-device-%s", command);

    qtest_qmp_assert_success(vm->qts, "{ 'execute': %s,"
                             " 'arguments': { 'slot': %u } }", name, slot);
}

void snapshot_qmp_refused(SnapshotVM *vm, const char *command, unsigned slot,
                          const char *text)
{
    g_autofree char *name = g_strdup_printf("x-snapshot-device-%s", command);
    QDict *error = qtest_qmp_assert_failure_ref(
        vm->qts, "{ 'execute': %s, 'arguments': { 'slot': %u } }", name, slot);

    g_assert_cmpstr(qdict_get_str(error, "class"), ==, "GenericError");
    g_test_message("%s: %s", name, qdict_get_str(error, "desc"));
    g_assert_nonnull(strstr(qdict_get_str(error, "desc"), text));
    qobject_unref(error);
}

QDict *snapshot_query(SnapshotVM *vm)
{
    return qtest_qmp_assert_success_ref(
        vm->qts, "{ 'execute': 'x-query-snapshot-device' }");
}

int64_t snapshot_resident(SnapshotVM *vm)
{
    g_autofree char *path = g_strdup_printf("/proc/%d/status",
                                            qtest_pid(vm->qts));
    g_autofree char *text = NULL;
    const char *line;

    g_assert_true(g_file_get_contents(path, &text, NULL, NULL));
    line = strstr(text, "RssAnon:");
    g_assert_nonnull(line);
    return g_ascii_strtoll(line + strlen("RssAnon:"), NULL, 10) * KiB;
}

int64_t snapshot_resident_at_last(SnapshotVM *vm)
{
    int64_t least = snapshot_resident(vm);
    unsigned same;

    for (same = 0; same < 10; same++) {
        int64_t now;

        g_usleep(50 * 1000);
        now = snapshot_resident(vm);
        if (now < least) {
            least = now;
            same = 0;
        }
    }
    return least;
}

char *snapshot_state_file(void)
{
    char *path;
    int fd;

    if (!have_qemu_img()) {
        g_test_skip("QTEST_QEMU_IMG is not set");
        return NULL;
    }
    fd = g_file_open_tmp("snapshot-state-XXXXXX", &path, NULL);
    g_assert_cmpint(fd, >=, 0);
    close(fd);
    mkqcow2(path, 64);
    return path;
}

char *snapshot_trace(const char *machine, const char *event, char **log)
{
    int fd = g_file_open_tmp("snapshot-trace-XXXXXX", log, NULL);

    g_assert_cmpint(fd, >=, 0);
    close(fd);
    return g_strdup_printf("%s -D %s -trace %s", machine, *log, event);
}

unsigned snapshot_count(const char *file, const char *text)
{
    g_autofree char *content = NULL;
    unsigned n = 0;

    g_assert_true(g_file_get_contents(file, &content, NULL, NULL));
    for (const char *s = content; (s = strstr(s, text)); s++) {
        n++;
    }
    return n;
}

void snapshot_assert_state(SnapshotVM *vm, const char *state)
{
    QDict *status = qtest_qmp_assert_success_ref(
        vm->qts, "{ 'execute': 'query-status' }");

    g_assert_cmpstr(qdict_get_str(status, "status"), ==, state);
    qobject_unref(status);
}

/* There is one pattern in each range, anywhere in the range's first page. */
#define PATTERN_RANGE (256 * KiB)

static uint64_t pattern_address(uint64_t range)
{
    return range + (range >> 15 & 0xff8);
}

static uint64_t pattern(uint64_t addr, unsigned seed)
{
    return (addr ^ seed) * 0x9e3779b97f4a7c15ull + seed;
}

void snapshot_fill(SnapshotVM *vm, uint64_t base, uint64_t size, unsigned seed)
{
    uint64_t range;

    for (range = base; range < base + size; range += PATTERN_RANGE) {
        uint64_t addr = pattern_address(range);

        qtest_writeq(vm->qts, addr, pattern(addr, seed));
    }
}

void snapshot_check(SnapshotVM *vm, uint64_t base, uint64_t size,
                    unsigned seed)
{
    uint64_t range;

    for (range = base; range < base + size; range += PATTERN_RANGE) {
        uint64_t addr = pattern_address(range);

        g_assert_cmphex(qtest_readq(vm->qts, addr), ==, pattern(addr, seed));
    }
}

void snapshot_round_trip(SnapshotVM *vm, uint64_t base, uint64_t size)
{
    int i;

    snapshot_fill(vm, base, size, 1);
    snapshot_save(vm, 0);
    snapshot_check(vm, base, size, 1);
    for (i = 2; i < 5; i++) {
        snapshot_fill(vm, base, size, i);
        snapshot_check(vm, base, size, i);
        snapshot_restore(vm, 0);
        snapshot_check(vm, base, size, 1);
    }
}
