/*
 * Tests of the snapshot device: whatever was saved can be loaded, any number of
 * times, before and after a reset, and is then what it was
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/units.h"
#include "hw/net/vmxnet3.h"
#include "libqos/libqos-malloc.h"
#include "libqos/malloc-pc.h"
#include "libqos/virtio.h"
#include "libqos/virtio-pci.h"
#include "qobject/qdict.h"
#include "qobject/qjson.h"
#include "snapshot-utils.h"
#include "standard-headers/linux/virtio_config.h"
#include "standard-headers/linux/virtio_ids.h"
#include "standard-headers/linux/virtio_pci.h"
#include "standard-headers/linux/virtio_ring.h"

/* Each restore was verified, and nothing was another. */
static void assert_exact(SnapshotVM *vm)
{
    QDict *info = snapshot_query(vm);

    if (qdict_get_int(info, "mismatched")) {
        g_autoptr(GString) s = qobject_to_json(QOBJECT(info));

        g_test_message("%s", s->str);
        g_assert_not_reached();
    }
    g_assert_cmpint(qdict_get_int(info, "verified"), >, 0);
    qobject_unref(info);
}

/* By the host: the registers may not be where they were. */
static void restore(SnapshotVM *vm)
{
    snapshot_qmp(vm, "restore", 0);
    snapshot_assert_state(vm, "running");
}

/* In place, or after a reset, and more than once each */
static void restore_all_ways(SnapshotVM *vm)
{
    restore(vm);
    restore(vm);
    qtest_system_reset(vm->qts);
    restore(vm);
    restore(vm);
    assert_exact(vm);
}

/* In bytes */
static uint64_t resident(SnapshotVM *vm)
{
    g_autofree char *path = g_strdup_printf("/proc/%d/statm",
                                            qtest_pid(vm->qts));
    g_autofree char *text = NULL;
    uint64_t pages;

    g_assert_true(g_file_get_contents(path, &text, NULL, NULL));
    g_assert_cmpint(sscanf(text, "%*u %" SCNu64, &pages), ==, 1);
    return pages * qemu_real_host_page_size();
}

/*
 * What a load allocates has to be what the load before did.  How much memory is
 * resident goes up and down, for RCU frees late.
 */
static void assert_flat(SnapshotVM *vm)
{
    uint64_t first = 0, last = UINT64_MAX;
    unsigned i;

    for (i = 0; i < 800; i++) {
        snapshot_qmp(vm, "restore", 0);
        if (i >= 100 && i < 200) {
            first = MAX(first, resident(vm));
        } else if (i >= 700) {
            last = MIN(last, resident(vm));
        }
    }
    g_test_message("grew by %" PRId64 " KiB", (int64_t)(last - first) / KiB);
    g_assert_cmpuint(last, <, first + 4 * MiB);
}

typedef struct Virtio {
    SnapshotVM *vm;
    QVirtioPCIDevice *pci;
    QVirtioDevice *d;
    QGuestAllocator alloc;
    QVirtQueue *vq;
    uint64_t buffer;
} Virtio;

/* In slot 8 of bus 0 */
static void virtio_start(Virtio *v, const void *machine, const char *device)
{
    QPCIAddress addr = { .devfn = QPCI_DEVFN(8, 0) };

    v->vm = snapshot_vm_start(",verify=on", "-M %s -device %s,addr=8",
                              (const char *)machine, device);
    v->pci = virtio_pci_new(v->vm->pci, &addr);
    v->d = &v->pci->vdev;
    pc_alloc_init(&v->alloc, v->vm->qts, ALLOC_NO_FLAGS);
    qvirtio_pci_device_enable(v->pci);
    qvirtio_start_device(v->d);
    qvirtio_set_features(v->d, qvirtio_get_features(v->d) &
                         ~(QVIRTIO_F_BAD_FEATURE |
                           1ull << VIRTIO_RING_F_INDIRECT_DESC |
                           1ull << VIRTIO_RING_F_EVENT_IDX));
    v->vq = qvirtqueue_setup(v->d, &v->alloc, 0);
    qvirtio_set_driver_ok(v->d);
    v->buffer = guest_alloc(&v->alloc, 64);
}

static void virtio_end(Virtio *v)
{
    qvirtqueue_cleanup(v->d->bus, v->vq, &v->alloc);
    g_free(v->pci->pdev);
    g_free(v->pci);
    alloc_destroy(&v->alloc);
    snapshot_vm_end(v->vm);
}

static uint16_t avail_idx(Virtio *v)
{
    return qtest_readw(v->vm->qts, v->vq->avail + 2);
}

static uint16_t used_idx(Virtio *v)
{
    return qtest_readw(v->vm->qts, v->vq->used + 2);
}

/* A random number is asked for, and comes. */
static void virtio_use(Virtio *v)
{
    uint32_t head = qvirtqueue_add(v->vm->qts, v->vq, v->buffer, 8, true,
                                   false);

    qvirtqueue_kick(v->vm->qts, v->d, v->vq, head);
    qvirtio_wait_used_elem(v->vm->qts, v->d, v->vq, head, NULL,
                           10 * 1000 * 1000);
}

static void write_common(Virtio *v, size_t reg, unsigned size, uint32_t val)
{
    uint64_t offset = v->pci->common_cfg_offset + reg;

    if (size == 2) {
        qpci_io_writew(v->pci->pdev, v->pci->bar, offset, val);
    } else {
        qpci_io_writel(v->pci->pdev, v->pci->bar, offset, val);
    }
}

#define WRITE_COMMON(v, field, val) \
    write_common(v, offsetof(struct virtio_pci_common_cfg, field), \
                 sizeof_field(struct virtio_pci_common_cfg, field), val)

/* A driver puts queue 0 somewhere else while it is in use. */
static void move_queue(Virtio *v, uint64_t desc, uint64_t avail, uint64_t used)
{
    WRITE_COMMON(v, queue_select, 0);
    WRITE_COMMON(v, queue_desc_lo, desc);
    WRITE_COMMON(v, queue_desc_hi, desc >> 32);
    WRITE_COMMON(v, queue_avail_lo, avail);
    WRITE_COMMON(v, queue_avail_hi, avail >> 32);
    WRITE_COMMON(v, queue_used_lo, used);
    WRITE_COMMON(v, queue_used_hi, used >> 32);
    WRITE_COMMON(v, queue_enable, 1);
}

/*
 * Catches: indices of a queue that a load derives from the rings, where the
 * driver has written something else: refused, so that the machine is lost, or
 * taken, so that the device goes on elsewhere or is broken.
 */
static void test_virtio_indices(const void *machine)
{
    static const struct {
        int avail, used;        /* added to the indices in RAM */
    } cases[] = {
        { 0, 0 }, { 0, 5000 }, { 0, -1 }, { 5000, 0 }, { -1, 5000 },
    };
    unsigned i, way;

    for (i = 0; i < ARRAY_SIZE(cases); i++) {
        uint16_t used;
        QVirtQueue vq;
        Virtio v;

        virtio_start(&v, machine, "virtio-rng-pci");
        virtio_use(&v);
        virtio_use(&v);
        used = used_idx(&v);
        g_assert_cmpuint(used, ==, 2);
        vq = *v.vq;
        qtest_writew(v.vm->qts, v.vq->avail + 2,
                     avail_idx(&v) + cases[i].avail);
        qtest_writew(v.vm->qts, v.vq->used + 2, used + cases[i].used);
        snapshot_qmp(v.vm, "save", 0);

        for (way = 0; way < 3; way++) {
            g_test_message("avail %+d, used %+d, way %u", cases[i].avail,
                           cases[i].used, way);
            if (way == 1) {
                v.d->bus->set_status(v.d, 0);
            } else if (way == 2) {
                qtest_system_reset(v.vm->qts);
            }
            restore(v.vm);
            restore(v.vm);
            assert_exact(v.vm);
            if (cases[i].avail) {
                /* The device looks as soon as the machine runs. */
                continue;
            }
            g_assert_cmphex(v.d->bus->get_status(v.d), ==,
                            VIRTIO_CONFIG_S_ACKNOWLEDGE |
                            VIRTIO_CONFIG_S_DRIVER |
                            VIRTIO_CONFIG_S_FEATURES_OK |
                            VIRTIO_CONFIG_S_DRIVER_OK);
            /* The device knows its own index. */
            *v.vq = vq;
            virtio_use(&v);
            g_assert_cmpuint(used_idx(&v), ==, used + 1);
        }
        virtio_end(&v);
    }
}

/* Catches: a broken device that is not broken, or another one that is. */
static void test_virtio_broken(const void *machine)
{
    const uint8_t ok = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER |
                       VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK;
    /* Beyond all RAM, in its last bytes, where there is none, nowhere */
    static const uint64_t places[] = {
        1ull << 40, 128 * MiB - 16, 0xe8000000, 0,
    };
    unsigned i;

    for (i = 0; i <= ARRAY_SIZE(places); i++) {
        uint16_t avail;
        uint8_t status;
        Virtio v;

        virtio_start(&v, machine, "virtio-rng-pci,disable-legacy=on");
        virtio_use(&v);
        if (i < ARRAY_SIZE(places)) {
            g_test_message("at 0x%" PRIx64, places[i]);
            move_queue(&v, places[i], places[i], places[i]);
        } else {
            qtest_writew(v.vm->qts, v.vq->avail + 2, avail_idx(&v) + 5000);
            v.d->bus->virtqueue_kick(v.d, v.vq);
            while (v.d->bus->get_status(v.d) == ok) {
                g_usleep(1000);
            }
        }
        avail = avail_idx(&v);
        snapshot_qmp(v.vm, "save", 0);
        /* The device looks when the machine runs, and then it is broken. */
        status = v.d->bus->get_status(v.d);
        g_test_message("status 0x%x", status);
        restore_all_ways(v.vm);
        v.d->bus->set_status(v.d, 0);
        restore_all_ways(v.vm);
        g_assert_cmphex(v.d->bus->get_status(v.d), ==, status);
        g_assert_cmpuint(avail_idx(&v), ==, avail);
        virtio_end(&v);
    }
}

/* A machine with a PCI device in slot 8, its first @bars mapped */
typedef struct OneDevice {
    SnapshotVM *vm;
    QPCIDevice *dev;
    QPCIBar bars[2];
} OneDevice;

static void one_device_start(OneDevice *o, const char *properties,
                             const void *machine, const char *device,
                             unsigned bars)
{
    unsigned i;

    o->vm = snapshot_vm_start(properties, "-M %s -m 16 -device %s,addr=8",
                              (const char *)machine, device);
    o->dev = qpci_device_find(o->vm->pci, QPCI_DEVFN(8, 0));
    g_assert_nonnull(o->dev);
    qpci_device_enable(o->dev);
    for (i = 0; i < bars; i++) {
        o->bars[i] = qpci_iomap(o->dev, i, NULL);
    }
}

static void one_device_end(OneDevice *o)
{
    g_free(o->dev);
    snapshot_vm_end(o->vm);
}

#define VMXNET3_SHARED (1 * MiB)
#define VMXNET3_QUEUES (VMXNET3_SHARED + 64 * KiB)

/* One queue each way, with @multicast addresses; @queues for sending are told */
static uint32_t vmxnet3_activate(OneDevice *o, unsigned queues,
                                 unsigned multicast)
{
    struct Vmxnet3_DriverShared shared = {
        .magic = VMXNET3_REV1_MAGIC,
        .devRead.misc = {
            .queueDescPA = VMXNET3_QUEUES,
            .mtu = 1500,
            .numTxQueues = queues,
            .numRxQueues = 1,
        },
        .devRead.rxFilterConf = {
            .mfTableLen = 6 * multicast,
            .mfTablePA = VMXNET3_SHARED + 32 * KiB,
        },
    };
    struct Vmxnet3_TxQueueDesc tx = {
        .conf = {
            .txRingBasePA = VMXNET3_SHARED + 128 * KiB,
            .compRingBasePA = VMXNET3_SHARED + 192 * KiB,
            .txRingSize = 512,
            .compRingSize = 512,
        },
    };
    struct Vmxnet3_RxQueueDesc rx = {
        .conf = {
            .rxRingBasePA[0] = VMXNET3_SHARED + 256 * KiB,
            .compRingBasePA = VMXNET3_SHARED + 320 * KiB,
            .rxRingSize[0] = 32,
            .compRingSize = 32,
        },
    };
    QTestState *qts = o->vm->qts;

    qtest_bufwrite(qts, VMXNET3_SHARED, &shared, sizeof(shared));
    qtest_bufwrite(qts, VMXNET3_QUEUES, &tx, sizeof(tx));
    qtest_bufwrite(qts, VMXNET3_QUEUES + sizeof(tx), &rx, sizeof(rx));
    qpci_io_writel(o->dev, o->bars[1], VMXNET3_REG_DSAL, VMXNET3_SHARED);
    qpci_io_writel(o->dev, o->bars[1], VMXNET3_REG_DSAH, 0);
    qpci_io_writel(o->dev, o->bars[1], VMXNET3_REG_CMD,
                   VMXNET3_CMD_ACTIVATE_DEV);
    return qpci_io_readl(o->dev, o->bars[1], VMXNET3_REG_CMD);
}

/* Catches: packets and lists that each load allocates, and a reset does not. */
static void test_vmxnet3_memory(const void *machine)
{
    unsigned active;

    for (active = 0; active < 2; active++) {
        OneDevice o;

        one_device_start(&o, ",verify=100", machine, "vmxnet3", 2);
        if (active) {
            g_assert_cmpuint(vmxnet3_activate(&o, 1, 1000), ==, 0);
        }
        snapshot_qmp(o.vm, "save", 0);
        assert_flat(o.vm);
        assert_exact(o.vm);
        one_device_end(&o);
    }
}

/*
 * Catches: a device that was not activated, for the driver asked for too much,
 * and that is refused once more when it is loaded.
 */
static void test_vmxnet3_refused(const void *machine)
{
    OneDevice o;

    one_device_start(&o, ",verify=on", machine, "vmxnet3", 2);
    g_assert_cmpuint(vmxnet3_activate(&o, 200, 0), ==, 1);
    snapshot_qmp(o.vm, "save", 0);
    restore_all_ways(o.vm);
    g_assert_cmpuint(vmxnet3_activate(&o, 1, 0), ==, 0);
    restore_all_ways(o.vm);
    one_device_end(&o);
}

/* Catches: an address that a driver gave the device, and a reset leaves. */
static void test_vmxnet3_mac(const void *machine)
{
    uint32_t low, high;
    OneDevice o;

    one_device_start(&o, ",verify=on", machine,
                     "vmxnet3,mac=52:54:00:12:34:56", 2);
    snapshot_qmp(o.vm, "save", 0);
    low = qpci_io_readl(o.dev, o.bars[1], VMXNET3_REG_MACL);
    high = qpci_io_readl(o.dev, o.bars[1], VMXNET3_REG_MACH);
    qpci_io_writel(o.dev, o.bars[1], VMXNET3_REG_MACL, 0x03020100);
    qpci_io_writel(o.dev, o.bars[1], VMXNET3_REG_MACH, 0x0504);
    g_assert_cmphex(qpci_io_readl(o.dev, o.bars[1], VMXNET3_REG_MACL), !=, low);
    restore_all_ways(o.vm);
    g_assert_cmphex(qpci_io_readl(o.dev, o.bars[1], VMXNET3_REG_MACL), ==, low);
    g_assert_cmphex(qpci_io_readl(o.dev, o.bars[1], VMXNET3_REG_MACH), ==,
                    high);
    one_device_end(&o);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    if (!qtest_has_device("snapshot")) {
        g_test_skip("there is no snapshot device");
        return g_test_run();
    }

    snapshot_add_tests("virtio-indices", test_virtio_indices);
    snapshot_add_tests("virtio-broken", test_virtio_broken);
    snapshot_add_test("pc", "dirty", "vmxnet3-memory", test_vmxnet3_memory);
    snapshot_add_test("q35", "dirty", "vmxnet3-memory", test_vmxnet3_memory);
    snapshot_add_tests("vmxnet3-refused", test_vmxnet3_refused);
    snapshot_add_tests("vmxnet3-mac", test_vmxnet3_mac);
    return g_test_run();
}
