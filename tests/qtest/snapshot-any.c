/*
 * Inputs for any device: accesses, a save, accesses, a restore, and so on
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/cutils.h"
#include "qemu/units.h"
#include "hw/misc/snapshot-regs.h"
#include "hw/pci/pci_regs.h"
#include "snapshot-any.h"

/* Where descriptors are that devices may find */
#define PLAYGROUND      (1 * MiB)
#define PLAYGROUND_SIZE (64 * KiB)

#define CONFIG_ADDRESS  0xcf8
#define CONFIG_DATA     0xcfc

typedef struct Region {
    uint64_t start, size;
    bool io;
    char name[40];
} Region;

typedef struct ConfigWrite {
    uint32_t addr;
    uint32_t value;
} ConfigWrite;

/*
 * The bytes of an input
 *
 * A step takes those of its record first, then numbers that follow from them.
 * So how many an earlier step took does not change what a later one does.
 */

static bool next_record(SnapshotAny *a)
{
    size_t i;

    if (a->next + SNAPSHOT_ANY_RECORD > a->size) {
        return false;
    }
    a->record = a->next;
    a->next += SNAPSHOT_ANY_RECORD;
    a->used = 0;
    a->random = 0xcbf29ce484222325ull;
    for (i = 0; i < SNAPSHOT_ANY_RECORD; i++) {
        a->random = (a->random ^ a->data[a->record + i]) * 0x100000001b3ull;
    }
    return true;
}

static uint8_t any_byte(SnapshotAny *a)
{
    if (a->used < SNAPSHOT_ANY_RECORD) {
        return a->data[a->record + a->used++];
    }
    a->random = a->random * 6364136223846793005ull + 1442695040888963407ull;
    return a->random >> 56;
}

static uint32_t pick(SnapshotAny *a, uint64_t n)
{
    uint64_t value = any_byte(a);

    if (n > 0x100) {
        value |= any_byte(a) << 8;
    }
    if (n > 0x10000) {
        value |= any_byte(a) << 16 | (uint64_t)any_byte(a) << 24;
    }
    return value % n;
}

static uint64_t any_address(SnapshotAny *a)
{
    return PLAYGROUND + pick(a, PLAYGROUND_SIZE / (4 * KiB)) * 4 * KiB +
        (pick(a, 2) ? 0 : pick(a, 256) * 16);
}

/* Small numbers, bits, masks, addresses of what devices find there */
static uint64_t any_value(SnapshotAny *a)
{
    switch (pick(a, 10)) {
    case 0:
        return pick(a, 4);
    case 1:
        return pick(a, 256);
    case 2:
        return 1ull << pick(a, 32);
    case 3:
        return (1ull << pick(a, 32)) - 1;
    case 4:
    case 5:
        return any_address(a);
    case 6:
        return any_address(a) >> 12;
    case 7:
        return ~0ull << pick(a, 32);
    case 8:
        return any_byte(a) * 0x0101010101010101ull;
    default:
        return pick(a, 1ull << 32) | (uint64_t)pick(a, 1ull << 32) << 32;
    }
}

static void at(SnapshotAny *a, const char *step)
{
    ++*a->beats;
    pstrcpy(a->step, a->step_size, step);
}

static char *hmp(SnapshotAny *a, const char *command)
{
    ++*a->beats;
    return a->ops->hmp(a, command);
}

static void hmp_ignored(SnapshotAny *a, const char *command)
{
    g_free(hmp(a, command));
}

/* PCI: what firmware does, and how to do it again */

static void set_config(SnapshotAny *a, uint32_t addr, uint32_t value)
{
    qtest_outl(a->qts, CONFIG_ADDRESS, addr);
    qtest_outl(a->qts, CONFIG_DATA, value);
}

static uint32_t get_config(SnapshotAny *a, uint32_t addr)
{
    qtest_outl(a->qts, CONFIG_ADDRESS, addr);
    return qtest_inl(a->qts, CONFIG_DATA);
}

static void keep_config(SnapshotAny *a, uint32_t addr, uint32_t value)
{
    ConfigWrite w = { addr, value };

    set_config(a, addr, value);
    g_array_append_val(a->config, w);
}

static void set_up_again(SnapshotAny *a)
{
    unsigned i;

    for (i = 0; i < a->config->len; i++) {
        ConfigWrite *w = &g_array_index(a->config, ConfigWrite, i);

        set_config(a, w->addr, w->value);
    }
}

static void set_up_bars(SnapshotAny *a, uint32_t function, unsigned n)
{
    unsigned i;

    for (i = 0; i < n; i++) {
        uint32_t addr = function + PCI_BASE_ADDRESS_0 + i * 4, bits;
        uint64_t size, base, *next, end;

        set_config(a, addr, ~0u);
        bits = get_config(a, addr);
        if (bits & PCI_BASE_ADDRESS_SPACE_IO) {
            size = -(bits & PCI_BASE_ADDRESS_IO_MASK) & 0xffff;
            next = &a->io;
            end = 0xffff;
        } else {
            size = (uint32_t)-(bits & PCI_BASE_ADDRESS_MEM_MASK);
            next = &a->memory;
            end = 0xfc000000;
        }
        if (!size) {
            continue;
        }
        base = ROUND_UP(*next, MAX(size, 4));
        if (base + size > end) {
            base = 0;
        } else {
            *next = base + size;
        }
        keep_config(a, addr, base);
        if ((bits & (PCI_BASE_ADDRESS_SPACE | PCI_BASE_ADDRESS_MEM_TYPE_MASK))
            == PCI_BASE_ADDRESS_MEM_TYPE_64) {
            i++;
            keep_config(a, addr + 4, 0);
        }
    }
}

static void set_up_bus(SnapshotAny *a, unsigned bus);

static void set_up_bridge(SnapshotAny *a, unsigned bus, uint32_t function)
{
    unsigned n = ++a->buses;
    uint64_t memory, io;

    set_up_bars(a, function, 2);
    memory = a->memory = ROUND_UP(a->memory, MiB);
    io = a->io = ROUND_UP(a->io, 4 * KiB);
    set_config(a, function + PCI_PRIMARY_BUS, bus | n << 8 | 0xff0000);
    set_up_bus(a, n);
    a->memory = ROUND_UP(a->memory + 1, MiB);
    a->io = ROUND_UP(a->io + 1, 4 * KiB);
    keep_config(a, function + PCI_PRIMARY_BUS,
                bus | n << 8 | a->buses << 16);
    keep_config(a, function + PCI_MEMORY_BASE,
                memory >> 16 | ((a->memory - 1) & 0xfff00000));
    keep_config(a, function + PCI_IO_BASE,
                io >> 8 | ((a->io - 1) & 0xf000));
}

static void set_up_bus(SnapshotAny *a, unsigned bus)
{
    unsigned devfn;

    for (devfn = 0; devfn < 256; devfn++) {
        uint32_t function = 0x80000000u | bus << 16 | devfn << 8;
        uint32_t id = get_config(a, function), type;

        if (id == 0xffffffff || !id) {
            devfn |= devfn & 7 ? 0 : 7;
            continue;
        }
        if (id == (SNAPSHOT_VENDOR_ID | SNAPSHOT_DEVICE_ID << 16)) {
            continue;
        }
        g_array_append_val(a->functions, function);
        type = get_config(a, function + PCI_CACHE_LINE_SIZE) >> 16 & 0xff;
        if ((type & 0x7f) == PCI_HEADER_TYPE_BRIDGE) {
            set_up_bridge(a, bus, function);
        } else if ((type & 0x7f) == PCI_HEADER_TYPE_NORMAL) {
            set_up_bars(a, function, 6);
        }
        keep_config(a, function + PCI_COMMAND, PCI_COMMAND_IO |
                    PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER);
        if (!(devfn & 7) && !(type & PCI_HEADER_TYPE_MFD)) {
            devfn |= 7;
        }
    }
}

/* Only the functions that are the device, or that it is attached to */
static void choose_functions(SnapshotAny *a)
{
    g_autofree char *info = hmp(a, "info pci");
    g_auto(GStrv) lines = g_strsplit(info, "\n", -1);
    unsigned bus = 0, dev = 0, fn = 0;
    char **line;

    g_array_set_size(a->functions, 0);
    for (line = lines; *line; line++) {
        sscanf(*line, " Bus %u, device %u, function %u", &bus, &dev, &fn);
        if (strstr(*line, "id \"" SNAPSHOT_ANY_ID)) {
            uint32_t f = 0x80000000u | bus << 16 | dev << 11 | fn << 8;

            g_array_append_val(a->functions, f);
        }
    }
}

/*
 * What is not tortured: nothing, the snapshot device, RAM, and what can be told
 * to fill 4 GiB of address space, which takes minutes.
 */
static bool is_left_out(const char *name)
{
    static const char *const names[] = {
        "io", "snapshot", "pc.ram", "microvm.ram", "sparse-mem", "fwcfg.dma",
    };
    unsigned i;

    for (i = 0; i < ARRAY_SIZE(names); i++) {
        if (!strcmp(name, names[i])) {
            return true;
        }
    }
    return false;
}

static void add_regions(SnapshotAny *a, const char *info, bool all)
{
    g_auto(GStrv) lines = g_strsplit(info, "\n", -1);
    bool io = false, is_wanted = false;
    char **line;

    for (line = lines; *line; line++) {
        unsigned long long start, end;
        Region r = { };
        char type[8];
        int prio;

        if (g_str_has_prefix(*line, "FlatView")) {
            is_wanted = false;
        } else if (strstr(*line, "AS \"memory\"")) {
            is_wanted = true;
            io = false;
        } else if (strstr(*line, "AS \"I/O\"")) {
            is_wanted = true;
            io = true;
        } else if (is_wanted &&
                   sscanf(*line, " %llx-%llx (prio %d, %7[^)]): %39s",
                          &start, &end, &prio, type, r.name) == 5 &&
                   !is_left_out(r.name) &&
                   (all || strstr(*line, "{dev id=" SNAPSHOT_ANY_ID) ||
                    strstr(*line, "/" SNAPSHOT_ANY_ID))) {
            r.start = start;
            r.size = end - start + 1;
            r.io = io;
            g_array_append_val(a->regions, r);
        }
    }
}

/* Accesses */

static void see(SnapshotAny *a, uint64_t value)
{
    a->seen = (a->seen ^ value) * 0x100000001b3ull;
}

static void step_region(SnapshotAny *a)
{
    const Region *r = &g_array_index(a->regions, Region,
                                     pick(a, a->regions->len));
    unsigned size = 1 << pick(a, r->io ? 3 : 4);
    uint64_t range = pick(a, 4) ? MIN(r->size, 256) : MIN(r->size, 1ull << 32);
    uint64_t addr = r->start + (pick(a, range) & ~(uint64_t)(size - 1));
    bool is_write = pick(a, 3);
    uint64_t value = any_value(a);
    QTestState *s = a->qts;

    switch (size | is_write << 4 | r->io << 5) {
    case 0x01:
        see(a, qtest_readb(s, addr));
        break;
    case 0x02:
        see(a, qtest_readw(s, addr));
        break;
    case 0x04:
        see(a, qtest_readl(s, addr));
        break;
    case 0x08:
        see(a, qtest_readq(s, addr));
        break;
    case 0x11:
        qtest_writeb(s, addr, value);
        break;
    case 0x12:
        qtest_writew(s, addr, value);
        break;
    case 0x14:
        qtest_writel(s, addr, value);
        break;
    case 0x18:
        qtest_writeq(s, addr, value);
        break;
    case 0x21:
        see(a, qtest_inb(s, addr));
        break;
    case 0x22:
        see(a, qtest_inw(s, addr));
        break;
    case 0x24:
        see(a, qtest_inl(s, addr));
        break;
    case 0x31:
        qtest_outb(s, addr, value);
        break;
    case 0x32:
        qtest_outw(s, addr, value);
        break;
    case 0x34:
        qtest_outl(s, addr, value);
        break;
    default:
        g_assert_not_reached();
    }
}

static void step_config(SnapshotAny *a)
{
    uint32_t addr;

    if (!a->functions->len) {
        step_region(a);
        return;
    }
    addr = g_array_index(a->functions, uint32_t, pick(a, a->functions->len));
    addr += pick(a, pick(a, 4) ? 0x40 : 0x100) & ~3u;
    qtest_outl(a->qts, CONFIG_ADDRESS, addr);
    switch (pick(a, 4)) {
    case 0:
        see(a, qtest_inl(a->qts, CONFIG_DATA));
        break;
    case 1:
        qtest_outb(a->qts, CONFIG_DATA + pick(a, 4), any_value(a));
        break;
    case 2:
        qtest_outw(a->qts, CONFIG_DATA + pick(a, 2) * 2, any_value(a));
        break;
    default:
        qtest_outl(a->qts, CONFIG_DATA, any_value(a));
    }
}

/* Descriptors: numbers, flags, and addresses of others */
static void step_ram(SnapshotAny *a)
{
    uint64_t addr = any_address(a), words[16];
    unsigned i, n = 1 + pick(a, ARRAY_SIZE(words));

    for (i = 0; i < n; i++) {
        words[i] = any_value(a);
        if (pick(a, 2)) {
            words[i] = (uint32_t)words[i] | any_value(a) << 32;
        }
    }
    qtest_memwrite(a->qts, addr, words, n * sizeof(words[0]));
}

static void step_clock(SnapshotAny *a)
{
    qtest_clock_step(a->qts, 1ll << pick(a, 27));
}

static const Region *find_region(SnapshotAny *a, const char *prefix)
{
    unsigned i;

    for (i = 0; i < a->regions->len; i++) {
        const Region *r = &g_array_index(a->regions, Region, i);

        if (g_str_has_prefix(r->name, prefix)) {
            return r;
        }
    }
    return NULL;
}

/* A queue of virtio, with requests in it */
static void virtio_ring(SnapshotAny *a, uint64_t desc, unsigned num)
{
    unsigned i, n = MIN(num, 8);
    uint64_t avail = desc + num * 16;

    for (i = 0; i < n; i++) {
        qtest_writeq(a->qts, desc + i * 16, any_address(a));
        qtest_writel(a->qts, desc + i * 16 + 8, pick(a, 0x1000));
        qtest_writel(a->qts, desc + i * 16 + 12,
                     pick(a, 4) | pick(a, n) << 16);
        qtest_writew(a->qts, avail + 4 + i * 2, pick(a, n));
    }
    qtest_writew(a->qts, avail + 2, pick(a, n + 1));
}

#define VIRTIO_QUEUES   4

static void virtio_modern(SnapshotAny *a, uint64_t common, uint64_t notify)
{
    QTestState *s = a->qts;
    unsigned q;

    qtest_writeb(s, common + 0x14, 0);
    qtest_writeb(s, common + 0x14, 3);
    for (q = 0; q < 2; q++) {
        qtest_writel(s, common, q);
        qtest_writel(s, common + 8, q);
        qtest_writel(s, common + 12, qtest_readl(s, common + 4));
    }
    qtest_writeb(s, common + 0x14, 11);
    for (q = 0; q < VIRTIO_QUEUES; q++) {
        uint64_t desc = PLAYGROUND + q * 16 * KiB;
        unsigned num;

        qtest_writew(s, common + 0x16, q);
        num = qtest_readw(s, common + 0x18);
        if (num && num <= 256) {
            qtest_writel(s, common + 0x20, desc);
            qtest_writel(s, common + 0x28, desc + num * 16);
            qtest_writel(s, common + 0x30, desc + 8 * KiB);
            qtest_writew(s, common + 0x1c, 1);
            virtio_ring(a, desc, num);
        }
    }
    qtest_writeb(s, common + 0x14, 15);
    qtest_writew(s, notify + pick(a, VIRTIO_QUEUES) * 4,
                 pick(a, VIRTIO_QUEUES));
}

static void virtio_legacy(SnapshotAny *a, uint64_t port)
{
    QTestState *s = a->qts;
    unsigned q;

    qtest_outb(s, port + 18, 3);
    qtest_outl(s, port + 4, qtest_inl(s, port));
    for (q = 0; q < VIRTIO_QUEUES; q++) {
        uint64_t desc = PLAYGROUND + q * 16 * KiB;
        unsigned num;

        qtest_outw(s, port + 14, q);
        num = qtest_inw(s, port + 12);
        if (num && num <= 256) {
            qtest_outl(s, port + 8, desc >> 12);
            virtio_ring(a, desc, num);
        }
    }
    qtest_outb(s, port + 18, 7);
    qtest_outw(s, port + 16, pick(a, VIRTIO_QUEUES));
}

/*
 * A virtio device does nothing before its driver has set up all of it, which
 * random accesses seldom do.
 */
static void step_virtio(SnapshotAny *a)
{
    const Region *common = find_region(a, "virtio-pci-common");
    const Region *notify = find_region(a, "virtio-pci-notify");
    const Region *legacy = find_region(a, "virtio-pci");
    unsigned which = pick(a, 4);

    if (common && notify && !which) {
        virtio_modern(a, common->start, notify->start);
    } else if (legacy && legacy->io && which == 1) {
        virtio_legacy(a, legacy->start);
    } else if (common && notify && which == 2) {
        qtest_writew(a->qts, notify->start + pick(a, VIRTIO_QUEUES) * 4,
                     pick(a, VIRTIO_QUEUES));
    } else {
        step_region(a);
    }
}

/* What the host does beside */

static void host_reset(SnapshotAny *a)
{
    a->ops->reset(a);
    if (pick(a, 4)) {
        set_up_again(a);
    }
}

static void host_stop(SnapshotAny *a)
{
    hmp_ignored(a, "stop");
}

static void host_cont(SnapshotAny *a)
{
    hmp_ignored(a, "cont");
}

static void host_stop_cont(SnapshotAny *a)
{
    host_stop(a);
    host_cont(a);
}

static void host_screendump(SnapshotAny *a)
{
    hmp_ignored(a, "screendump /dev/null");
}

static void host_input(SnapshotAny *a)
{
    g_autofree char *command = pick(a, 2) ?
        g_strdup_printf("sendkey %c %u", 'a' + pick(a, 26), pick(a, 300)) :
        g_strdup_printf("mouse_move %u %u", pick(a, 100), pick(a, 100));

    hmp_ignored(a, command);
}

static void host_eject(SnapshotAny *a)
{
    a->has_changed_medium = true;
    hmp_ignored(a, "eject n");
}

static void host_change(SnapshotAny *a)
{
    a->has_changed_medium = true;
    hmp_ignored(a, "change n null-co:// raw");
}

/* The guest does not answer, unless by accident. */
static void host_unplug(SnapshotAny *a)
{
    if (a->has_unplug) {
        hmp_ignored(a, "device_del " SNAPSHOT_ANY_ID);
    }
}

static void host_verify(SnapshotAny *a)
{
    if (a->snapshots) {
        hmp_ignored(a, "x_snapshot_device_verify 1");
    }
}

static void step_host(SnapshotAny *a)
{
    static const struct {
        const char *name;
        void (*step)(SnapshotAny *a);
    } steps[] = {
        { "; reset", host_reset },
        { "; stop", host_stop },
        { "; cont", host_cont },
        { "; stop, cont", host_stop_cont },
        { "; screendump", host_screendump },
        { "; input", host_input },
        { "; eject", host_eject },
        { "; change", host_change },
        { "; unplug", host_unplug },
        { "; verify", host_verify },
    };
    unsigned i = pick(a, ARRAY_SIZE(steps));

    pstrcat(a->step, a->step_size, steps[i].name);
    steps[i].step(a);
}

/* Out of 32 */
static const struct {
    unsigned weight;
    void (*step)(SnapshotAny *a);
} steps[] = {
    { 19, step_region },
    { 2, step_config },
    { 5, step_ram },
    { 2, step_clock },
    { 3, step_virtio },
    { 1, step_host },
};

static void accesses(SnapshotAny *a, const char *when, size_t n)
{
    at(a, when);
    while (n-- && next_record(a)) {
        unsigned i, what = pick(a, 32);

        for (i = 0; what >= steps[i].weight; i++) {
            what -= steps[i].weight;
        }
        steps[i].step(a);
        if (pick(a, 4)) {
            a->ops->settle(a);
        }
        ++*a->beats;
    }
}

/* The snapshot's side */

/* Returns: NULL, or why not */
static char *run_snapshot(SnapshotAny *a, const char *command, unsigned slot)
{
    g_autofree char *line = g_strdup_printf("x_snapshot_device_%s %u", command,
                                            slot);
    g_autofree char *answer = hmp(a, line);
    /* The rest are warnings, of a device without state for example. */
    char *error = strstr(answer, "Error: ");

    if (strstr(answer, SNAPSHOT_ANY_ID ") has no migration state")) {
        a->has_no_state = true;
    }
    return error ? g_strchomp(g_strdup(error + strlen("Error: "))) : NULL;
}

static char *save(SnapshotAny *a, unsigned slot)
{
    at(a, "save");
    return a->snapshots ? run_snapshot(a, "save", slot) : NULL;
}

static void check_exact(SnapshotAny *a)
{
    g_autofree char *info = hmp(a, "info snapshot-device");

    if (!strstr(info, ", 0 with mismatches")) {
        const char *p = strstr(info, "verified:");
        g_autofree char *text = g_strconcat("not as saved: ", p ?: info, NULL);

        a->ops->fail(a, text);
    }
}

/* Returns: false if a device went for good */
static bool restore(SnapshotAny *a, unsigned slot, size_t n)
{
    g_autofree char *error = NULL;

    at(a, slot ? "restore of the first" : "restore");
    if (!a->snapshots) {
        a->ops->reset(a);
        qtest_memset(a->qts, PLAYGROUND, 0, PLAYGROUND_SIZE + 4 * KiB);
        host_cont(a);
        set_up_again(a);
        if (!slot) {
            size_t next = a->next;

            a->next = SNAPSHOT_ANY_RECORD;
            accesses(a, "accesses as before", n);
            a->next = next;
            if (a->is_reset_first) {
                a->ops->reset(a);
                set_up_again(a);
            }
        }
        return true;
    }
    error = run_snapshot(a, "restore", slot);
    if (error) {
        /* A card with another medium is another card, a disk another disk. */
        if (a->ops->is_gone(a) ||
            (a->has_changed_medium && (strstr(error, "after the save") ||
                                       strstr(error, "Disk of '")))) {
            return false;
        }
        a->ops->fail(a, error);
    }
    check_exact(a);
    return true;
}

bool snapshot_any_input(SnapshotAny *a, const uint8_t *data, size_t size)
{
    unsigned loops, i;
    bool has_reset;
    size_t n;

    a->data = data;
    a->size = size;
    a->next = 0;
    if (!next_record(a)) {
        return true;
    }
    loops = 1 + !pick(a, 4);
    has_reset = !pick(a, 4);
    a->is_reset_first = !pick(a, 4);
    n = (size / SNAPSHOT_ANY_RECORD - 1) / (loops + 2);

    if (!restore(a, SNAPSHOT_ANY_BASE, 0)) {
        return false;
    }
    host_cont(a);
    accesses(a, "accesses before the save", n);
    if (a->is_reset_first) {
        /* Loading must not add to a state that is as after a reset. */
        a->ops->reset(a);
        set_up_again(a);
    }
    if (a->snapshots) {
        g_autofree char *error = save(a, 0);

        if (error) {
            return true;
        }
    }
    for (i = 0; i < loops; i++) {
        accesses(a, "accesses after the save", n);
        if (!restore(a, 0, n)) {
            return false;
        }
    }
    if (has_reset) {
        at(a, "reset before a restore");
        a->ops->reset(a);
        if (!restore(a, 0, n)) {
            return false;
        }
    }
    accesses(a, "accesses after the last restore", n);
    return restore(a, 0, n);
}

/* Most devices have their registers there. */
#define SWEEP   256

static void sweep(SnapshotAny *a)
{
    unsigned i;

    at(a, "reads to compare");
    for (i = 0; i < a->regions->len; i++) {
        const Region *r = &g_array_index(a->regions, Region, i);
        uint64_t addr, end = r->start + MIN(r->size, SWEEP);

        for (addr = r->start; addr < end; addr += r->io ? 1 : 4) {
            see(a, r->io ? qtest_inb(a->qts, addr) : qtest_readl(a->qts, addr));
            ++*a->beats;
        }
    }
}

/* Returns: a hash of what was read */
static uint64_t behaviour(SnapshotAny *a, size_t n)
{
    a->seen = 0;
    a->next = SNAPSHOT_ANY_RECORD;
    if (!restore(a, 0, 0)) {
        return 0;
    }
    host_cont(a);
    sweep(a);
    accesses(a, "accesses to compare", n);
    return a->seen;
}

void snapshot_any_behaviour(SnapshotAny *a, const uint8_t *data, size_t size)
{
    size_t n = size / SNAPSHOT_ANY_RECORD / 2;
    g_autofree char *error = NULL;
    unsigned round;

    a->data = data;
    a->size = size;
    a->next = SNAPSHOT_ANY_RECORD;
    if (!a->snapshots || a->has_no_state || !restore(a, SNAPSHOT_ANY_BASE, 0)) {
        return;
    }
    host_cont(a);
    accesses(a, "accesses before a save to compare with", n);
    error = save(a, 0);
    if (error) {
        return;
    }
    /*
     * What happens by chance does not do so each time; nor does a second of the
     * RTC pass, be the host so slow that each round takes one.
     */
    for (round = 0; round < 10; round++) {
        uint64_t seen;

        /* What is not put back is from now on what these accesses leave. */
        behaviour(a, n);
        seen = behaviour(a, n);
        if (behaviour(a, n) != seen || a->has_changed_medium) {
            return;
        }
        if (!restore(a, 0, 0)) {
            return;
        }
        host_cont(a);
        a->next = (n + 1) * SNAPSHOT_ANY_RECORD;
        accesses(a, "other accesses", n);
        if (behaviour(a, n) == seen) {
            return;
        }
    }
    a->ops->fail(a, "after a restore, accesses read what they did not read "
                 "before, as others were made between");
}

void snapshot_any_restores(SnapshotAny *a, const uint8_t *data, size_t size,
                           unsigned n, void (*before)(SnapshotAny *a))
{
    a->data = data;
    a->size = size;
    a->next = 0;
    if (!restore(a, SNAPSHOT_ANY_BASE, 0)) {
        return;
    }
    host_cont(a);
    accesses(a, "accesses before many restores", size / SNAPSHOT_ANY_RECORD);
    g_free(save(a, 0));
    at(a, "many restores");
    while (n--) {
        before(a);
        g_free(run_snapshot(a, "restore", 0));
    }
}

char *snapshot_any_set_up(SnapshotAny *a)
{
    g_autofree char *info = NULL;

    a->has_changed_medium = false;
    a->memory = 0xe0000000;
    a->io = 0xc000;
    a->config = g_array_new(false, false, sizeof(ConfigWrite));
    a->functions = g_array_new(false, false, sizeof(uint32_t));
    a->regions = g_array_new(false, false, sizeof(Region));
    if (a->has_ports) {
        set_up_bus(a, 0);
        if (!a->whole_machine) {
            choose_functions(a);
        }
    }
    info = hmp(a, "info mtree -f -o");
    add_regions(a, info, a->whole_machine);
    if (!a->regions->len) {
        add_regions(a, info, true);
    }
    return save(a, SNAPSHOT_ANY_BASE);
}
