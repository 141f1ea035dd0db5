/*
 * Test of the snapshot device: what nobody thought of
 *
 * Steps chosen at random, but the same ones each time: accesses to registers
 * and configuration space, commands of the guest and the host, writes to RAM by
 * CPU and DMA, resets, devices and memory that come and go.  A model tells what
 * has to become of each command, and of RAM.
 *
 * QEMU_TEST_SNAPSHOT_SEED takes other steps, QEMU_TEST_SNAPSHOT_SECONDS more.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/units.h"
#include "hw/pci/pci_regs.h"
#include "qobject/qdict.h"
#include "qobject/qjson.h"
#include "snapshot-utils.h"

#define STATUS_ERROR(e) (SNAPSHOT_STATUS_ERROR | SNAPSHOT_E_##e)

#define SLOTS           4
#define WORDS           16
#define DMA_REQUEST     (64 * KiB)      /* where fw_cfg is told what to do */

/* Of what the machine is made; each thing that comes is another one. */
typedef struct Parts {
    unsigned memory, usb;       /* 0: not there */
} Parts;

typedef struct Model {
    SnapshotVM *vm;
    GRand *rand;
    unsigned steps;
    Parts parts, next;
    uint32_t words[WORDS];      /* as they have to be in RAM */
    struct {
        bool used;
        Parts parts;
        uint32_t words[WORDS];
    } slots[SLOTS];
} Model;

static uint32_t pick(Model *m, uint32_t n)
{
    return g_rand_int_range(m->rand, 0, n);
}

/* A page for each, so that each page differs at other times */
static uint64_t word_address(unsigned i)
{
    return 2 * MiB + i * 256 * KiB + i * 252;
}

/* Configuration space is written to at random, and goes back. */
static void put_bar(Model *m)
{
    qpci_config_writel(m->vm->dev, PCI_BASE_ADDRESS_0, m->vm->bar.addr);
    qpci_device_enable(m->vm->dev);
}

static bool same_parts(const Parts *a, const Parts *b)
{
    /* Memory that nothing uses is no part of the machine. */
    return a->usb == b->usb;
}

static uint32_t expect_save(Model *m, unsigned slot)
{
    if (slot >= SLOTS) {
        return STATUS_ERROR(SLOT);
    }
    m->slots[slot].used = true;
    m->slots[slot].parts = m->parts;
    memcpy(m->slots[slot].words, m->words, sizeof(m->words));
    return SNAPSHOT_STATUS_SAVED;
}

static uint32_t expect_restore(Model *m, unsigned slot)
{
    if (slot >= SLOTS) {
        return STATUS_ERROR(SLOT);
    }
    if (!m->slots[slot].used) {
        return STATUS_ERROR(EMPTY);
    }
    if (!same_parts(&m->slots[slot].parts, &m->parts)) {
        return STATUS_ERROR(CHANGED);
    }
    memcpy(m->words, m->slots[slot].words, sizeof(m->words));
    return SNAPSHOT_STATUS_RESTORED;
}

static uint32_t expect_discard(Model *m, unsigned slot)
{
    if (slot >= SLOTS) {
        return STATUS_ERROR(SLOT);
    }
    if (!m->slots[slot].used) {
        return STATUS_ERROR(EMPTY);
    }
    m->slots[slot].used = false;
    return SNAPSHOT_STATUS_DISCARDED;
}

static const struct {
    uint32_t code;
    const char *name;
    uint32_t (*expect)(Model *m, unsigned slot);
} commands[] = {
    { SNAPSHOT_CMD_SAVE, "save", expect_save },
    { SNAPSHOT_CMD_RESTORE, "restore", expect_restore },
    { SNAPSHOT_CMD_DISCARD, "discard", expect_discard },
};

/* Some, for reads take time; others next time */
static void assert_words(Model *m)
{
    unsigned i;

    for (i = m->steps % 4; i < WORDS; i += 4) {
        g_assert_cmphex(qtest_readl(m->vm->qts, word_address(i)), ==,
                        m->words[i]);
    }
}

/* Each restore was verified. */
static void assert_exact(Model *m)
{
    QDict *info = snapshot_query(m->vm);

    if (qdict_get_int(info, "mismatched")) {
        g_autoptr(GString) s = qobject_to_json(QOBJECT(info));

        g_test_message("%s", s->str);
        g_assert_not_reached();
    }
    g_assert_cmpuint(qdict_get_int(info, "verified"), ==,
                     qdict_get_int(info, "restores"));
    qobject_unref(info);
}

static void host_command(Model *m, unsigned i, unsigned slot, bool ok)
{
    g_autofree char *name = g_strdup_printf("x-snapshot-device-%s",
                                            commands[i].name);
    QDict *reply = qtest_qmp(m->vm->qts, "{ 'execute': %s,"
                             " 'arguments': { 'slot': %u } }", name, slot);

    g_assert_cmpint(qdict_haskey(reply, "return"), ==, ok);
    qobject_unref(reply);
}

static unsigned pick_slot(Model *m)
{
    return pick(m, 50) ? pick(m, SLOTS) : g_rand_int(m->rand);
}

/* A command of the guest's or the host's, and what came of it */
static void step_command(Model *m)
{
    unsigned i = pick(m, 8), slot = pick_slot(m);
    uint32_t expected;

    i = i < 2 ? 0 : i < 7 ? 1 : 2;
    put_bar(m);
    expected = commands[i].expect(m, slot);
    if (pick(m, 2)) {
        g_assert_cmphex(snapshot_command(m->vm, commands[i].code, slot), ==,
                        expected);
    } else {
        host_command(m, i, slot, !(expected & SNAPSHOT_STATUS_ERROR));
    }
    assert_exact(m);
    assert_words(m);
}

/* Commands that do not wait for each other, or for a reset */
static void step_hurry(Model *m)
{
    unsigned slot = pick(m, SLOTS), n = pick(m, 5);
    QTestState *qts = m->vm->qts;

    put_bar(m);
    g_assert_cmphex(snapshot_command(m->vm, SNAPSHOT_CMD_SAVE, slot), ==,
                    expect_save(m, slot));
    while (n--) {
        qtest_writel(qts, word_address(pick(m, WORDS)), g_rand_int(m->rand));
        snapshot_writel(m->vm, SNAPSHOT_REG_COMMAND, SNAPSHOT_CMD_RESTORE);
        if (!pick(m, 3)) {
            host_command(m, 1, slot, true);
        }
    }
    if (!pick(m, 4)) {
        snapshot_writel(m->vm, SNAPSHOT_REG_COMMAND, SNAPSHOT_CMD_RESTORE);
        qtest_system_reset(qts);
        put_bar(m);
    }
    g_assert_cmphex(snapshot_command(m->vm, SNAPSHOT_CMD_RESTORE, slot), ==,
                    expect_restore(m, slot));
    assert_exact(m);
    assert_words(m);
}

/* Any access, but for valid commands, of which the model would not know */
static void step_register(Model *m)
{
    unsigned reg = pick(m, 2) ? pick(m, 0x40) : pick(m, SNAPSHOT_BAR_SIZE - 8);
    uint64_t value = (uint64_t)g_rand_int(m->rand) << 32 |
        (pick(m, 2) ? g_rand_int(m->rand) : pick(m, 0x110));

    if (reg == SNAPSHOT_REG_COMMAND) {
        value |= 0x1000;
    }
    switch (pick(m, 8)) {
    case 0:
        qpci_io_writeb(m->vm->dev, m->vm->bar, reg, value);
        break;
    case 1:
        qpci_io_writew(m->vm->dev, m->vm->bar, reg, value);
        break;
    case 2:
        snapshot_writel(m->vm, reg, value);
        break;
    case 3:
        /* QEMU splits what a register does not take as a whole. */
        snapshot_writeq(m->vm, reg | 0x10, value);
        break;
    case 4:
        qpci_io_readb(m->vm->dev, m->vm->bar, reg);
        break;
    case 5:
        qpci_io_readw(m->vm->dev, m->vm->bar, reg);
        break;
    case 6:
        snapshot_readl(m->vm, reg);
        break;
    default:
        snapshot_readq(m->vm, reg);
    }
}

static void step_config(Model *m)
{
    unsigned reg = pick(m, 0x100);

    /* Not where the BAR could cover RAM, of which the model would not know */
    if (reg / 4 != PCI_BASE_ADDRESS_0 / 4) {
        qpci_config_writeb(m->vm->dev, reg, g_rand_int(m->rand));
    }
    qpci_config_readl(m->vm->dev, pick(m, 0x40) * 4);
}

static void step_write(Model *m)
{
    unsigned i = pick(m, WORDS);

    m->words[i] = pick(m, 4) ? g_rand_int(m->rand) : 0;
    qtest_writel(m->vm->qts, word_address(i), m->words[i]);
}

/* fw_cfg writes its signature, "QEMU", into RAM or over the registers. */
static void step_dma(Model *m)
{
    QTestState *qts = m->vm->qts;
    unsigned i = pick(m, WORDS);
    uint64_t to = word_address(i);
    uint32_t len = 4;

    if (pick(m, 2)) {
        m->words[i] = 0x554d4551;
    } else {
        to = m->vm->bar.addr + pick(m, 0x40);
        len = pick(m, 64);
    }
    /* Select key 0 and read it */
    qtest_writel(qts, DMA_REQUEST, cpu_to_be32(2 | 8));
    qtest_writel(qts, DMA_REQUEST + 4, cpu_to_be32(len));
    qtest_writeq(qts, DMA_REQUEST + 8, cpu_to_be64(to));
    qtest_outl(qts, 0x514, 0);
    qtest_outl(qts, 0x518, cpu_to_be32(DMA_REQUEST));
    assert_words(m);
}

static unsigned count_ram_blocks(SnapshotVM *vm)
{
    g_autofree char *text = qtest_hmp(vm->qts, "info ramblock");
    unsigned n = 0;
    char *c;

    for (c = text; *c; c++) {
        n += *c == '\n';
    }
    return n;
}

static void step_memory(Model *m)
{
    QTestState *qts = m->vm->qts;
    unsigned blocks;

    if (!m->parts.memory) {
        qtest_qmp_assert_success(
            qts, "{ 'execute': 'object-add', 'arguments': {"
            " 'qom-type': 'memory-backend-ram', 'id': 'm', 'size': %u } }",
            (unsigned)(1 * MiB));
        m->parts.memory = ++m->next.memory;
        return;
    }
    blocks = count_ram_blocks(m->vm);
    qtest_qmp_assert_success(
        qts, "{ 'execute': 'object-del', 'arguments': { 'id': 'm' } }");
    /* Its RAM block goes when RCU allows. */
    while (count_ram_blocks(m->vm) == blocks) {
        g_usleep(1000);
    }
    m->parts.memory = 0;
}

static void step_usb(Model *m)
{
    QTestState *qts = m->vm->qts;

    if (!m->parts.usb) {
        qtest_qmp_device_add(qts, "usb-tablet", "u", "{}");
        m->parts.usb = ++m->next.usb;
    } else {
        qtest_qmp_device_del(qts, "u");
        m->parts.usb = 0;
    }
}

static void step_reset(Model *m)
{
    qtest_system_reset(m->vm->qts);
    assert_words(m);
}

static void step_stop(Model *m)
{
    qtest_qmp_assert_success(m->vm->qts, "{ 'execute': 'stop' }");
    step_command(m);
    qtest_qmp_assert_success(m->vm->qts, "{ 'execute': 'cont' }");
}

static const struct {
    void (*fn)(Model *m);
    unsigned weight;
} steps[] = {
    { step_command, 30 },
    { step_register, 30 },
    { step_write, 30 },
    { step_config, 10 },
    { step_dma, 10 },
    { step_hurry, 5 },
    { step_memory, 2 },
    { step_usb, 2 },
    { step_stop, 2 },
    { step_reset, 1 },
};

static void step(Model *m)
{
    unsigned i, n = 0;

    for (i = 0; i < ARRAY_SIZE(steps); i++) {
        n += steps[i].weight;
    }
    n = pick(m, n);
    for (i = 0; n >= steps[i].weight; i++) {
        n -= steps[i].weight;
    }
    m->steps++;
    g_test_message("step %u: %u", m->steps, i);
    steps[i].fn(m);
}

/*
 * Catches: an end of QEMU, by whatever sequence; a command with another result
 * than it should have; RAM and devices that are not put back.
 */
static void test_random(const void *machine)
{
    const char *seconds = g_getenv("QEMU_TEST_SNAPSHOT_SECONDS");
    const char *seed = g_getenv("QEMU_TEST_SNAPSHOT_SEED");
    int64_t end = g_get_monotonic_time() +
        (seconds ? atoi(seconds) : 3) * G_USEC_PER_SEC;
    Model m = {
        .rand = g_rand_new_with_seed(seed ? atoi(seed) : 1),
    };

    m.vm = snapshot_vm_start(",slots=4,verify=on",
                             "-M %s -m 8 -vga none -rtc clock=vm"
                             " -device qemu-xhci", (const char *)machine);
    do {
        step(&m);
    } while (g_get_monotonic_time() < end);
    g_test_message("%u steps", m.steps);
    snapshot_vm_end(m.vm);
    g_rand_free(m.rand);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    if (!qtest_has_device("snapshot") || !qtest_has_device("qemu-xhci")) {
        g_test_skip("there is no snapshot device, or no USB");
        return g_test_run();
    }

    snapshot_add_tests("random", test_random);
    return g_test_run();
}
