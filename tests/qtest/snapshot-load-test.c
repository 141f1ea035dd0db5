/*
 * Tests of the snapshot device: whatever was saved can be loaded, any number of
 * times, before and after a reset, and is then what it was
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/units.h"
#include "hw/net/vmxnet3.h"
#include "libqos/libqos-malloc.h"
#include "libqos/malloc-pc.h"
#include "libqos/virtio.h"
#include "libqos/virtio-pci.h"
#include "qobject/qdict.h"
#include "qobject/qjson.h"
#include "qobject/qlist.h"
#include "snapshot-utils.h"
#include "hw/pci/pci_regs.h"
#include "standard-headers/linux/virtio_balloon.h"
#include "standard-headers/linux/virtio_blk.h"
#include "standard-headers/linux/virtio_config.h"
#include "standard-headers/linux/virtio_gpu.h"
#include "standard-headers/linux/virtio_ids.h"
#include "standard-headers/linux/virtio_iommu.h"
#include "standard-headers/linux/virtio_net.h"
#include "standard-headers/linux/virtio_pci.h"
#include "standard-headers/linux/virtio_ring.h"
#include "standard-headers/linux/virtio_scsi.h"

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

/* What a load allocates has to be what the load before did. */
static void assert_flat(SnapshotVM *vm)
{
    int64_t first, last;
    unsigned i;

    for (i = 0; i < 200; i++) {
        snapshot_qmp(vm, "restore", 0);
    }
    first = snapshot_resident_at_last(vm);
    for (i = 0; i < 600; i++) {
        snapshot_qmp(vm, "restore", 0);
    }
    last = snapshot_resident_at_last(vm);
    g_test_message("grew by %" PRId64 " KiB", (last - first) / KiB);
    g_assert_cmpint(last, <, first + 4 * MiB);
}

typedef struct Virtio {
    SnapshotVM *vm;
    QVirtioPCIDevice *pci;
    QVirtioDevice *d;
    QGuestAllocator alloc;
    QVirtQueue *vq;
    uint64_t buffer;
} Virtio;

/* In slot 8 of bus 0; @machine may have other arguments of QEMU behind it */
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
    v->buffer = guest_alloc(&v->alloc, 256);
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

/* Catches: a quota that is refilled at a time which a restore has put off. */
static void test_rng_rate(const void *machine)
{
    Virtio v;

    virtio_start(&v, machine, "virtio-rng-pci,max-bytes=8,period=1000");
    virtio_use(&v);
    snapshot_qmp(v.vm, "save", 0);
    qtest_clock_step(v.vm->qts, 1500 * 1000 * 1000);
    virtio_use(&v);
    restore(v.vm);
    assert_exact(v.vm);
    /* The period of the save ends before that of the other use would. */
    v.vq->last_used_idx = 1;
    qtest_clock_step(v.vm->qts, 1000 * 1000 * 1000);
    virtio_use(&v);
    virtio_end(&v);
}

/*
 * Catches: a quota that is used up after loadvm, as its period would end at a
 * time that is not that of the state loaded.
 */
static void test_rng_loadvm(const void *machine)
{
    g_autofree char *disk = snapshot_state_file();
    g_autofree char *text = NULL;
    g_autofree char *args = NULL;
    QVirtQueue vq;
    Virtio v;

    if (!disk) {
        return;
    }
    args = g_strdup_printf("%s -drive if=none,id=vmstate,format=qcow2,file=%s "
                           "-device ide-hd,bus=ide.1,drive=vmstate",
                           (const char *)machine, disk);
    virtio_start(&v, args, "virtio-rng-pci,max-bytes=8,period=1000");
    vq = *v.vq;
    text = qtest_hmp(v.vm->qts, "savevm a");
    g_assert_cmpstr(text, ==, "");
    virtio_use(&v);
    g_free(text);
    text = qtest_hmp(v.vm->qts, "loadvm a");
    g_assert_cmpstr(text, ==, "");
    *v.vq = vq;
    virtio_use(&v);
    virtio_end(&v);
    unlink(disk);
}

#ifdef CONFIG_TRACE_LOG
/*
 * Catches: a device that is loaded at each restore, as its timer is moved with
 * the clock and has to be put back.
 */
static void test_rng_idle(const void *machine)
{
    g_autofree char *log = NULL;
    g_autofree char *args = snapshot_trace(machine, "qemu_device_state_load",
                                           &log);
    QVirtQueue vq;
    Virtio v;

    virtio_start(&v, args, "virtio-rng-pci,max-bytes=800,period=1000000");
    virtio_use(&v);
    vq = *v.vq;
    snapshot_qmp(v.vm, "save", 0);
    for (int i = 0; i < 3; i++) {
        qtest_clock_step(v.vm->qts, 1000 * 1000);
        restore(v.vm);
    }
    g_assert_cmpuint(snapshot_count(log, "virtio-rng"), ==, 0);
    virtio_use(&v);
    restore(v.vm);
    g_assert_cmpuint(snapshot_count(log, "virtio-rng"), >, 0);
    *v.vq = vq;
    virtio_use(&v);
    assert_exact(v.vm);
    virtio_end(&v);
    unlink(log);
}
#endif

/*
 * Each thing that PCI devices have, changed alone.  Catches one that a restore
 * does not look at.
 */
static void test_pci_state(const void *machine)
{
    QPCIDevice *dev;
    QPCIBar table;
    QVirtQueue vq;
    uint64_t pba;
    uint8_t cap;
    Virtio v;

    virtio_start(&v, machine, "virtio-rng-pci,disable-legacy=on");
    dev = v.pci->pdev;
    table = qpci_iomap(dev, 1, NULL);
    cap = qpci_find_capability(dev, PCI_CAP_ID_MSIX, 0);
    pba = qpci_config_readl(dev, cap + PCI_MSIX_PBA) & ~PCI_MSIX_FLAGS_BIRMASK;
    qpci_config_writew(dev, cap + PCI_MSIX_FLAGS, PCI_MSIX_FLAGS_ENABLE);
    WRITE_COMMON(&v, queue_select, 0);
    WRITE_COMMON(&v, queue_msix_vector, 0);
    vq = *v.vq;
    snapshot_qmp(v.vm, "save", 0);

    qpci_config_writeb(dev, PCI_INTERRUPT_LINE, 0x5a);
    restore(v.vm);
    g_assert_cmphex(qpci_config_readb(dev, PCI_INTERRUPT_LINE), !=, 0x5a);

    qpci_io_writel(dev, table, PCI_MSIX_ENTRY_SIZE + PCI_MSIX_ENTRY_DATA, 42);
    restore(v.vm);
    g_assert_cmphex(qpci_io_readl(dev, table, PCI_MSIX_ENTRY_SIZE +
                                  PCI_MSIX_ENTRY_DATA), ==, 0);

    /* The vector is masked, so it is pending now. */
    virtio_use(&v);
    g_assert_cmphex(qpci_io_readl(dev, table, pba), ==, 1);
    restore(v.vm);
    g_assert_cmphex(qpci_io_readl(dev, table, pba), ==, 0);
    *v.vq = vq;

    /* By the other interrupt, which a driver may go back to */
    qpci_config_writew(dev, cap + PCI_MSIX_FLAGS, 0);
    snapshot_qmp(v.vm, "save", 0);
    virtio_use(&v);
    restore(v.vm);
    *v.vq = vq;
    virtio_use(&v);
    assert_exact(v.vm);
    virtio_end(&v);
}

static uint32_t queue_desc(Virtio *v, unsigned queue)
{
    WRITE_COMMON(v, queue_select, queue);
    return qpci_io_readl(v->pci->pdev, v->pci->bar, v->pci->common_cfg_offset +
                         offsetof(struct virtio_pci_common_cfg, queue_desc_lo));
}

static void set_queue_desc(Virtio *v, unsigned queue, uint32_t desc)
{
    WRITE_COMMON(v, queue_select, queue);
    WRITE_COMMON(v, queue_desc_lo, desc);
}

/*
 * A guest sets up queues that the device does not have. Catches registers that
 * are not looked at, as they were not in use at the save, and those that were.
 */
static void test_virtio_queues(const void *machine)
{
    Virtio v;

    virtio_start(&v, machine, "virtio-rng-pci,disable-legacy=on");
    snapshot_qmp(v.vm, "save", 0);
    set_queue_desc(&v, 900, 0x1000);
    restore(v.vm);
    g_assert_cmphex(queue_desc(&v, 900), ==, 0);
    restore(v.vm);

    set_queue_desc(&v, 700, 0x2000);
    snapshot_qmp(v.vm, "save", 0);
    for (int i = 0; i < 4; i++) {
        switch (i) {
        case 0:
            set_queue_desc(&v, 900, 0x1000);
            break;
        case 1:
            set_queue_desc(&v, 700, 0x3000);
            break;
        case 2:
            v.d->bus->set_status(v.d, 0);
            break;
        case 3:
            qtest_system_reset(v.vm->qts);
            break;
        }
        restore(v.vm);
        restore(v.vm);
        g_assert_cmphex(queue_desc(&v, 900), ==, 0);
        g_assert_cmphex(queue_desc(&v, 700), ==, 0x2000);
    }
    assert_exact(v.vm);
    virtio_end(&v);
}

static int64_t balloon_get(SnapshotVM *vm, const char *property)
{
    QDict *answer = qtest_qmp(vm->qts, "{ 'execute': 'qom-get', 'arguments': {"
                              " 'path': 'balloon', 'property': %s } }",
                              property);
    QDict *stats = qdict_get_qdict(answer, "return");
    int64_t value = stats ?
        qdict_get_int(qdict_get_qdict(stats, "stats"), "stat-free-memory") :
        qdict_get_int(answer, "return");

    qobject_unref(answer);
    return value;
}

static void balloon_poll(SnapshotVM *vm, int64_t interval)
{
    qtest_qmp_assert_success(vm->qts, "{ 'execute': 'qom-set', 'arguments': {"
                             " 'path': 'balloon',"
                             " 'property': 'guest-stats-polling-interval',"
                             " 'value': %" PRId64 " } }", interval);
}

/* Have the device take a buffer that tells how much memory is free. */
static void balloon_tell(Virtio *v, uint64_t value)
{
    QTestState *qts = v->vm->qts;

    qtest_writew(qts, v->buffer, VIRTIO_BALLOON_S_MEMFREE);
    qtest_writeq(qts, v->buffer + 2, value);
    qvirtqueue_kick(qts, v->d, v->vq,
                    qvirtqueue_add(qts, v->vq, v->buffer, 10, false, false));
    while (balloon_get(v->vm, "guest-stats") != value) {
        g_usleep(1000);
    }
}

/*
 * Catches: a guest that is asked for statistics when a load, or what came after
 * the save, has it; not at all, or though nobody wants any.
 */
static void test_balloon_stats(const void *machine)
{
    const int64_t second = 1000 * 1000 * 1000;
    QVirtQueue *inflate;
    Virtio v;
    int i;

    virtio_start(&v, machine, "virtio-balloon-pci,id=balloon");
    inflate = v.vq;
    v.vq = qvirtqueue_setup(v.d, &v.alloc, 2);
    snapshot_qmp(v.vm, "save", 1);
    balloon_poll(v.vm, 10);
    qtest_clock_step(v.vm->qts, 1);
    balloon_tell(&v, 1000);
    qtest_clock_step(v.vm->qts, 3 * second);
    snapshot_qmp(v.vm, "save", 0);

    for (i = 0; i < 8; i++) {
        if (i & 1) {
            qtest_clock_step(v.vm->qts, 8 * second);
            g_assert_cmpuint(used_idx(&v), ==, 1);
            balloon_tell(&v, 2000);
        }
        if (i & 2) {
            balloon_poll(v.vm, 0);
        }
        if (i & 4) {
            qtest_system_reset(v.vm->qts);
        }
        restore(v.vm);
        g_assert_cmpint(balloon_get(v.vm, "guest-stats"), ==, 1000);
        qtest_clock_step(v.vm->qts, 6 * second);
        g_assert_cmpuint(used_idx(&v), ==, 0);
        qtest_clock_step(v.vm->qts, 2 * second);
        g_assert_cmpuint(used_idx(&v), ==, 1);

        snapshot_qmp(v.vm, "restore", 1);
        g_assert_cmpint(balloon_get(v.vm, "guest-stats-polling-interval"), ==,
                        0);
        balloon_tell(&v, 3000);
        qtest_clock_step(v.vm->qts, 20 * second);
        g_assert_cmpuint(used_idx(&v), ==, 0);
        restore(v.vm);
    }
    assert_exact(v.vm);
    qvirtqueue_cleanup(v.d->bus, inflate, &v.alloc);
    virtio_end(&v);
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

/* One queue each way; the device is told of @queues for sending. */
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

/* Descriptor @n, of a frame with @byte in it, goes to the device. */
static void vmxnet3_give(OneDevice *o, unsigned n, uint8_t byte,
                         uint32_t flags)
{
    const uint64_t buffer = VMXNET3_SHARED + 512 * KiB + n * 64;
    const uint64_t desc = VMXNET3_SHARED + 128 * KiB +
        n * sizeof(struct Vmxnet3_TxDesc);
    QTestState *qts = o->vm->qts;

    qtest_memset(qts, buffer, byte, 64);
    qtest_writew(qts, buffer + 12, 0xb588);
    qtest_writeq(qts, desc, buffer);
    qtest_writel(qts, desc + 12, flags);
    qtest_writel(qts, desc + 8, VMXNET3_TXD_GEN | 64);
    qpci_io_writel(o->dev, o->bars[0], VMXNET3_REG_TXPROD, n + 1);
}

/*
 * Catches: a packet of which the first descriptor was given at the save, and
 * that is sent by what the next one tells.
 */
static void test_vmxnet3_part(const void *machine)
{
    const uint32_t ti = 1 << 15, tag = 0x123;
    /* The device sends of the second part only, with the tag of the first. */
    const struct timeval wait = { .tv_sec = 5 };
    uint8_t packet[4 + 64 + 4], expected[sizeof(packet)] = { 0, 0, 0, 68 };
    g_autofree char *args = NULL;
    int sv[2], i;
    OneDevice o;

    memset(expected + 4, 0x22, sizeof(expected) - 4);
    stw_be_p(expected + 4 + 12, 0x8100);
    stw_be_p(expected + 4 + 14, tag);
    stw_be_p(expected + 4 + 16, 0x88b5);
    g_assert_cmpint(socketpair(PF_UNIX, SOCK_STREAM, 0, sv), ==, 0);
    args = g_strdup_printf("%s -netdev socket,id=n,fd=%d",
                           (const char *)machine, sv[1]);
    g_assert_cmpint(setsockopt(sv[0], SOL_SOCKET, SO_RCVTIMEO, &wait,
                               sizeof(wait)), ==, 0);
    one_device_start(&o, ",verify=on", args, "vmxnet3,netdev=n", 2);
    close(sv[1]);
    g_assert_cmpuint(vmxnet3_activate(&o, 1, 0), ==, 0);
    vmxnet3_give(&o, 0, 0x11, tag << 16 | ti);
    snapshot_qmp(o.vm, "save", 0);
    for (i = 0; i < 4; i++) {
        vmxnet3_give(&o, 1, 0x22, VMXNET3_TXD_EOP);
        g_assert_cmpint(recv(sv[0], packet, sizeof(packet), MSG_WAITALL), ==,
                        sizeof(packet));
        g_assert_cmpmem(packet, sizeof(packet), expected, sizeof(expected));
        if (i & 1) {
            qtest_system_reset(o.vm->qts);
        }
        restore(o.vm);
    }
    assert_exact(o.vm);
    close(sv[0]);
    one_device_end(&o);
}

static bool is_q35(const void *machine)
{
    return !strcmp(machine, "q35");
}

static QPCIDevice *find(SnapshotVM *vm, int slot, int fn)
{
    QPCIDevice *dev = qpci_device_find(vm->pci, QPCI_DEVFN(slot, fn));

    g_assert_nonnull(dev);
    return dev;
}

#define MCH_PCIEXBAR 0x60
#define MCH_SMRAM 0x9d
#define MCH_F_SMBASE 0x9c
#define D_OPEN 0x40
#define D_LCK 0x10

/*
 * Catches: what a lock makes read-only, for ever; a window that a lock opened;
 * and one that the registers do not tell of.
 */
static void test_mch(const void *machine)
{
    SnapshotVM *vm = snapshot_vm_start(",verify=on",
                                       "-M q35 -global mch.smbase-smram=on"
                                       " -m 16");
    g_autofree QPCIDevice *mch = find(vm, 0, 0);
    const uint64_t base = 0xb0000000, smbase = 0x30000;
    uint32_t id;

    qtest_writel(vm->qts, smbase, 0x12345678);
    snapshot_qmp(vm, "save", 0);
    qpci_config_writeb(mch, MCH_SMRAM, D_LCK);
    qpci_config_writeb(mch, MCH_SMRAM, D_OPEN);
    g_assert_cmphex(qpci_config_readb(mch, MCH_SMRAM) & D_OPEN, ==, 0);
    qpci_config_writeb(mch, MCH_F_SMBASE, 0xff);
    qpci_config_writeb(mch, MCH_F_SMBASE, 2);
    g_assert_cmphex(qtest_readl(vm->qts, smbase), ==, UINT32_MAX);
    restore(vm);
    g_assert_cmphex(qtest_readl(vm->qts, smbase), ==, 0x12345678);
    qpci_config_writeb(mch, MCH_SMRAM, D_OPEN);
    g_assert_cmphex(qpci_config_readb(mch, MCH_SMRAM) & D_OPEN, ==, D_OPEN);
    qpci_config_writeb(mch, MCH_F_SMBASE, 0xff);
    g_assert_cmphex(qpci_config_readb(mch, MCH_F_SMBASE), ==, 1);
    snapshot_qmp(vm, "save", 0);
    qpci_config_writeb(mch, MCH_F_SMBASE, 2);
    restore(vm);
    g_assert_cmphex(qtest_readl(vm->qts, smbase), ==, 0x12345678);

    /* The last is reserved: it must not depend on what there was before. */
    qpci_config_writel(mch, MCH_PCIEXBAR, base | 1);
    g_assert_cmphex(qtest_readl(vm->qts, base), ==, 0x29c08086);
    qpci_config_writel(mch, MCH_PCIEXBAR, base | 1 | 3 << 1);
    id = qtest_readl(vm->qts, base);
    snapshot_qmp(vm, "save", 0);
    restore_all_ways(vm);
    g_assert_cmphex(qtest_readl(vm->qts, base), ==, id);
    snapshot_vm_end(vm);
}

#define LPC_PM_BASE 0x600
#define LPC_SMI_EN (LPC_PM_BASE + 0x30)
#define LPC_SMI_STS (LPC_PM_BASE + 0x34)

static QPCIDevice *lpc_start(SnapshotVM *vm)
{
    QPCIDevice *lpc = find(vm, 0x1f, 0);

    qpci_config_writel(lpc, 0x40, LPC_PM_BASE);
    qpci_config_writeb(lpc, 0x44, 0x80);        /* ACPI_EN */
    return lpc;
}

/* Catches: a lock of SMI_EN that is left, or lost. */
static void test_smi_lock(const void *machine)
{
    SnapshotVM *vm = snapshot_vm_start(",verify=on", "-M q35 -m 16");
    g_autofree QPCIDevice *lpc = lpc_start(vm);
    const unsigned pmcon = 0xa0, lock = 0x10;

    snapshot_qmp(vm, "save", 0);
    qpci_config_writew(lpc, pmcon, lock);
    qtest_outl(vm->qts, LPC_SMI_EN, 1);
    g_assert_cmphex(qtest_inl(vm->qts, LPC_SMI_EN) & 1, ==, 0);
    restore_all_ways(vm);
    qtest_outl(vm->qts, LPC_SMI_EN, 1);
    g_assert_cmphex(qtest_inl(vm->qts, LPC_SMI_EN) & 1, ==, 1);

    qpci_config_writew(lpc, pmcon, lock);
    snapshot_qmp(vm, "save", 0);
    restore_all_ways(vm);
    qtest_outl(vm->qts, LPC_SMI_EN, 0);
    g_assert_cmphex(qtest_inl(vm->qts, LPC_SMI_EN) & 1, ==, 1);
    qpci_config_writew(lpc, pmcon, 0);
    g_assert_cmphex(qpci_config_readw(lpc, pmcon) & lock, ==, lock);

    /* A reset ends it, and so it is afterwards. */
    qtest_system_reset(vm->qts);
    snapshot_qmp(vm, "save", 0);
    restore_all_ways(vm);
    g_free(lpc_start(vm));
    qtest_outl(vm->qts, LPC_SMI_EN, 1);
    g_assert_cmphex(qtest_inl(vm->qts, LPC_SMI_EN) & 1, ==, 1);
    snapshot_vm_end(vm);
}

/* Catches: a timer that each restore starts anew, or that a reset leaves. */
static void test_smi_timer(const void *machine)
{
    const unsigned en = 1 << 6, us = 1000;      /* SWSMI, after 1.5 ms */
    SnapshotVM *vm = snapshot_vm_start(",verify=on", "-M q35 -m 16");
    g_autofree QPCIDevice *lpc = lpc_start(vm);

    qtest_outl(vm->qts, LPC_SMI_EN, en);
    qtest_clock_step(vm->qts, 1000 * us);
    snapshot_qmp(vm, "save", 0);
    qtest_clock_step(vm->qts, 100 * us);
    qtest_outl(vm->qts, LPC_SMI_EN, 0);
    restore_all_ways(vm);
    g_assert_cmphex(qtest_inl(vm->qts, LPC_SMI_STS) & en, ==, 0);
    qtest_clock_step(vm->qts, 550 * us);
    g_assert_cmphex(qtest_inl(vm->qts, LPC_SMI_STS) & en, ==, en);

    qtest_outl(vm->qts, LPC_SMI_STS, 0);
    qtest_system_reset(vm->qts);
    qtest_clock_step(vm->qts, 2000 * us);
    g_free(lpc_start(vm));
    g_assert_cmphex(qtest_inl(vm->qts, LPC_SMI_STS) & en, ==, 0);
    snapshot_vm_end(vm);
}

/* Catches: registers for CPU hotplug that a guest has switched, for ever. */
static void test_cpu_hotplug(const void *machine)
{
    const unsigned base = is_q35(machine) ? 0xcd8 : 0xaf00, present = 1;
    SnapshotVM *vm = snapshot_vm_start(",verify=on,slots=2", "-M %s -m 16",
                                       (const char *)machine);
    unsigned i, modern;

    g_assert_cmphex(qtest_inb(vm->qts, base), ==, present);
    snapshot_qmp(vm, "save", 0);
    qtest_outb(vm->qts, base, 0);
    modern = qtest_inb(vm->qts, base);
    g_assert_cmphex(modern, !=, present);
    snapshot_qmp(vm, "save", 1);
    for (i = 0; i < 3; i++) {
        restore_all_ways(vm);
        g_assert_cmphex(qtest_inb(vm->qts, base), ==, present);
        snapshot_qmp(vm, "restore", 1);
        g_assert_cmphex(qtest_inb(vm->qts, base), ==, modern);
        restore(vm);
        qtest_outb(vm->qts, base, 0);
        g_assert_cmphex(qtest_inb(vm->qts, base), ==, modern);
    }
    assert_exact(vm);
    snapshot_vm_end(vm);
}

typedef struct SMBus {
    SnapshotVM *vm;
    QPCIDevice *dev;
    QPCIBar bar;
} SMBus;

static void smbus_write(SMBus *b, unsigned reg, uint8_t val)
{
    if (b->dev) {
        qpci_io_writeb(b->dev, b->bar, reg, val);
    } else {
        qtest_outb(b->vm->qts, 0xb100 + reg, val);
    }
}

static uint8_t smbus_read(SMBus *b, unsigned reg)
{
    return b->dev ? qpci_io_readb(b->dev, b->bar, reg) :
                    qtest_inb(b->vm->qts, 0xb100 + reg);
}

/* Returns: the status */
static uint8_t smbus_start(SMBus *b, unsigned address, unsigned protocol)
{
    smbus_write(b, 0, 0xff);                    /* clear */
    smbus_write(b, 4, address << 1 | 1);
    smbus_write(b, 2, protocol << 2 | 0x40);
    smbus_read(b, 0);                           /* it starts then */
    return smbus_read(b, 0);
}

/*
 * Catches: a transfer that is under way on a bus, though it was not, or that
 * its slave takes part in more than once.
 */
static void test_i2c(const void *machine)
{
    const unsigned eeprom = 0x50, nobody = 0x30, quick = 0, block = 6;
    const uint8_t error = 4, done = 0x80;
    SMBus b = {
        .vm = snapshot_vm_start(",verify=on", "-M %s -m 16",
                                (const char *)machine),
    };
    uint8_t bytes[3];
    unsigned i, round;

    if (is_q35(machine)) {
        b.dev = find(b.vm, 0x1f, 3);
        qpci_config_writeb(b.dev, 0x40, 1);     /* HST_EN */
        qpci_device_enable(b.dev);
        b.bar = qpci_iomap(b.dev, 4, NULL);
    }
    snapshot_qmp(b.vm, "save", 0);
    g_assert_cmphex(smbus_start(&b, nobody, quick) & error, ==, error);
    g_assert_cmphex(smbus_start(&b, eeprom, block) & (error | done), ==, done);
    restore(b.vm);
    /* Of a busy bus nobody would be asked for an address. */
    g_assert_cmphex(smbus_start(&b, nobody, quick) & error, ==, error);
    g_assert_cmphex(smbus_start(&b, eeprom, block) & (error | done), ==, done);
    restore_all_ways(b.vm);
    g_assert_cmphex(smbus_start(&b, nobody, quick) & error, ==, error);

    g_assert_cmphex(smbus_start(&b, eeprom, block) & (error | done), ==, done);
    snapshot_qmp(b.vm, "save", 0);
    for (round = 0; round < 3; round++) {
        for (i = 0; i < sizeof(bytes); i++) {
            uint8_t byte = smbus_read(&b, 7);

            g_assert_cmphex(round ? byte : bytes[i], ==, bytes[i]);
            bytes[i] = byte;
            smbus_write(&b, 0, done);
        }
        restore_all_ways(b.vm);
    }
    g_free(b.dev);
    snapshot_vm_end(b.vm);
}

/* Catches: a request for DMA, or the end of one, that does not go back. */
static void test_dma(const void *machine)
{
    SnapshotVM *vm = snapshot_vm_start(",verify=on,slots=2", "-M %s -m 16",
                                       (const char *)machine);
    unsigned i;

    snapshot_qmp(vm, "save", 0);
    qtest_outb(vm->qts, 0x09, 4 | 1);           /* request channel 1 */
    snapshot_qmp(vm, "save", 1);
    g_assert_cmphex(qtest_inb(vm->qts, 0x08) & 0xf0, ==, 0x20);
    for (i = 0; i < 2; i++) {
        restore_all_ways(vm);
        g_assert_cmphex(qtest_inb(vm->qts, 0x08), ==, 0);
        snapshot_qmp(vm, "restore", 1);
        g_assert_cmphex(qtest_inb(vm->qts, 0x08), ==, 0x20);
    }
    assert_exact(vm);
    snapshot_vm_end(vm);
}

/* Catches: bits that a port changes, and that it then refuses to load. */
static void test_root_port(const void *machine)
{
    const unsigned slot_control = 0x18, slot_status = 0x1a;
    const uint16_t control = 0x800, locked = 0x80;      /* the interlock's */
    OneDevice o;
    uint8_t cap;

    one_device_start(&o, ",verify=on", machine, "pcie-root-port,chassis=1", 0);
    cap = qpci_find_capability(o.dev, PCI_CAP_ID_EXP, 0);
    g_assert_cmphex(cap, !=, 0);
    snapshot_qmp(o.vm, "save", 0);
    qpci_config_writew(o.dev, cap + slot_control, control);
    g_assert_cmphex(qpci_config_readw(o.dev, cap + slot_status) & locked, ==,
                    locked);
    restore_all_ways(o.vm);
    g_assert_cmphex(qpci_config_readw(o.dev, cap + slot_status) & locked, ==,
                    0);
    qpci_config_writew(o.dev, cap + slot_control, control);
    snapshot_qmp(o.vm, "save", 0);
    restore_all_ways(o.vm);
    g_assert_cmphex(qpci_config_readw(o.dev, cap + slot_status) & locked, ==,
                    locked);
    one_device_end(&o);
}

/* Catches: virtual functions, which have no section, that are not put back. */
static void test_igb_functions(const void *machine)
{
    const uint64_t window = 0xb0000000, igb = window + (8 << 15);
    const uint64_t sriov = igb + 0x160;
    g_autofree QPCIDevice *mch = NULL;
    OneDevice o;

    one_device_start(&o, ",verify=on", machine, "igb", 0);
    mch = find(o.vm, 0, 0);
    qpci_config_writel(mch, MCH_PCIEXBAR, window | 1);
    g_assert_cmphex(qtest_readw(o.vm->qts, sriov), ==, PCI_EXT_CAP_ID_SRIOV);
    snapshot_qmp(o.vm, "save", 0);
    qtest_writew(o.vm->qts, sriov + PCI_SRIOV_NUM_VF, 1);
    qtest_writew(o.vm->qts, sriov + PCI_SRIOV_CTRL,
                 PCI_SRIOV_CTRL_VFE | PCI_SRIOV_CTRL_MSE);
    snapshot_qmp_refused(o.vm, "save", 1, "igb");
    restore_all_ways(o.vm);
    g_assert_cmphex(qtest_readw(o.vm->qts, sriov + PCI_SRIOV_CTRL), ==, 0);
    snapshot_qmp(o.vm, "save", 1);
    one_device_end(&o);
}

static uint32_t gpu_command(Virtio *v, const void *command, size_t size)
{
    const uint64_t reply = v->buffer + 128;
    uint32_t head;

    qtest_memwrite(v->vm->qts, v->buffer, command, size);
    head = qvirtqueue_add(v->vm->qts, v->vq, v->buffer, size, false, true);
    qvirtqueue_add(v->vm->qts, v->vq, reply, 64, true, false);
    qvirtqueue_kick(v->vm->qts, v->d, v->vq, head);
    qvirtio_wait_used_elem(v->vm->qts, v->d, v->vq, head, NULL,
                           10 * 1000 * 1000);
    return qtest_readl(v->vm->qts, reply);
}

static void gpu_create(Virtio *v, unsigned id, uint64_t addr)
{
    struct virtio_gpu_resource_create_2d create = {
        .hdr.type = VIRTIO_GPU_CMD_RESOURCE_CREATE_2D,
        .resource_id = id,
        .format = VIRTIO_GPU_FORMAT_B8G8R8X8_UNORM,
        .width = 64,
        .height = 64 + id,
    };
    struct {
        struct virtio_gpu_resource_attach_backing attach;
        struct virtio_gpu_mem_entry entry;
    } backing = {
        .attach.hdr.type = VIRTIO_GPU_CMD_RESOURCE_ATTACH_BACKING,
        .attach.resource_id = id,
        .attach.nr_entries = 1,
        .entry.addr = addr,
        .entry.length = 64 * KiB,
    };

    g_assert_cmphex(gpu_command(v, &create, sizeof(create)), ==,
                    VIRTIO_GPU_RESP_OK_NODATA);
    g_assert_cmphex(gpu_command(v, &backing, sizeof(backing)), ==,
                    VIRTIO_GPU_RESP_OK_NODATA);
}

/* Catches: resources that come back in another order, or are kept twice. */
static void test_gpu(const void *machine)
{
    Virtio v;
    unsigned i;

    virtio_start(&v, machine, "virtio-gpu-pci");
    for (i = 1; i <= 3; i++) {
        gpu_create(&v, i, 8 * MiB + i * MiB);
    }
    snapshot_qmp(v.vm, "save", 0);
    gpu_create(&v, 4, 12 * MiB);
    restore_all_ways(v.vm);
    v.d->bus->set_status(v.d, 0);
    restore_all_ways(v.vm);
    virtio_end(&v);
}

/*
 * Catches: a save that is taken, of what cannot be mapped again: what a guest
 * has moved since, or what is mapped when another device has been loaded.
 */
static void test_gpu_moved(const void *machine)
{
    g_autofree QPCIDevice *vga = NULL;
    QPCIBar bar;
    Virtio v;

    virtio_start(&v, machine, "VGA,addr=9 -device virtio-gpu-pci");
    vga = find(v.vm, 9, 0);
    qpci_device_enable(vga);
    bar = qpci_iomap(vga, 0, NULL);
    gpu_create(&v, 1, 8 * MiB);
    snapshot_qmp(v.vm, "save", 0);
    gpu_create(&v, 2, bar.addr + 1 * MiB);
    snapshot_qmp_refused(v.vm, "save", 1, "virtio-gpu");
    qpci_config_writel(vga, PCI_BASE_ADDRESS_0, 0xf0000000);
    snapshot_qmp_refused(v.vm, "save", 1, "virtio-gpu");
    snapshot_assert_state(v.vm, "running");
    restore_all_ways(v.vm);
    virtio_end(&v);
}

/* Catches: a restore that has the guest announce itself to the network. */
static void test_announce(const void *machine)
{
    QPCIAddress addr = { .devfn = QPCI_DEVFN(8, 0) };
    SnapshotVM *vm = snapshot_vm_start(",verify=on",
                                       "-M %s -device virtio-net-pci,addr=8",
                                       (const char *)machine);
    QVirtioPCIDevice *pci = virtio_pci_new(vm->pci, &addr);
    QVirtioDevice *d = &pci->vdev;
    uint16_t status;

    qvirtio_pci_device_enable(pci);
    qvirtio_start_device(d);
    qvirtio_set_features(d, qvirtio_get_features(d) & ~QVIRTIO_F_BAD_FEATURE);
    g_assert_true(d->features & 1ull << VIRTIO_NET_F_GUEST_ANNOUNCE);
    qvirtio_set_driver_ok(d);
    status = qvirtio_config_readw(d, 6);
    g_assert_cmphex(status & VIRTIO_NET_S_ANNOUNCE, ==, 0);
    snapshot_qmp(vm, "save", 0);
    d->bus->set_status(d, 0);
    restore_all_ways(vm);
    qtest_clock_step(vm->qts, 1000 * 1000 * 1000);
    g_assert_cmphex(qvirtio_config_readw(d, 6), ==, status);
    g_free(pci->pdev);
    g_free(pci);
    snapshot_vm_end(vm);
}

/*
 * Catches: requests that failed, and wait for the machine to go on, that come
 * back in another order, or that cannot be read if packed rings are offered.
 */
static void test_blk_requests(const void *machine)
{
    const uint64_t buffer = 4 * MiB;
    QPCIAddress addr = { .devfn = QPCI_DEVFN(8, 0) };
    SnapshotVM *vm = snapshot_vm_start(
        ",verify=on", "-M %s -blockdev driver=blkdebug,node-name=d,"
        "read-only=on,image.driver=null-co,image.read-only=on,"
        "inject-error.0.event=none,inject-error.0.iotype=read"
        " -device virtio-blk-pci,drive=d,addr=8,rerror=stop,packed=on,"
        "in_order=on,ioeventfd=off", (const char *)machine);
    QVirtioPCIDevice *pci = virtio_pci_new(vm->pci, &addr);
    QVirtioDevice *d = &pci->vdev;
    QGuestAllocator alloc;
    QVirtQueue *vq;
    uint32_t head;
    unsigned i;

    pc_alloc_init(&alloc, vm->qts, ALLOC_NO_FLAGS);
    qvirtio_pci_device_enable(pci);
    qvirtio_start_device(d);
    qvirtio_set_features(d, qvirtio_get_features(d) &
                         ~(QVIRTIO_F_BAD_FEATURE |
                           1ull << VIRTIO_F_RING_PACKED |
                           1ull << VIRTIO_RING_F_INDIRECT_DESC |
                           1ull << VIRTIO_RING_F_EVENT_IDX));
    vq = qvirtqueue_setup(d, &alloc, 0);
    qvirtio_set_driver_ok(d);
    for (i = 0; i < 3; i++) {
        uint64_t request = buffer + i * 4096;

        qtest_memset(vm->qts, request, 0, 16);  /* VIRTIO_BLK_T_IN */
        qtest_writeq(vm->qts, request + 8, i * 8);
        head = qvirtqueue_add(vm->qts, vq, request, 16, false, true);
        qvirtqueue_add(vm->qts, vq, request + 16, 512, true, true);
        qvirtqueue_add(vm->qts, vq, request + 528, 1, true, false);
        qtest_writew(vm->qts, vq->avail + 4 + 2 * i, head);
    }
    /* Told of all at once, the device begins all before one has failed. */
    qtest_writew(vm->qts, vq->avail + 2, i);
    d->bus->virtqueue_kick(d, vq);
    qtest_qmp_eventwait(vm->qts, "STOP");
    snapshot_assert_state(vm, "io-error");
    snapshot_qmp(vm, "save", 0);
    for (i = 0; i < 2; i++) {
        snapshot_qmp(vm, "restore", 0);
        qtest_system_reset(vm->qts);
        snapshot_qmp(vm, "restore", 0);
    }
    assert_exact(vm);
    qvirtqueue_cleanup(d->bus, vq, &alloc);
    g_free(pci->pdev);
    g_free(pci);
    alloc_destroy(&alloc);
    snapshot_vm_end(vm);
}

#define SCSI_SENSE_SIZE offsetof(struct virtio_scsi_config, sense_size)
#define SCSI_CDB_SIZE offsetof(struct virtio_scsi_config, cdb_size)

static void scsi_set_sizes(Virtio *v, uint32_t sense, uint32_t cdb)
{
    uint64_t config = v->pci->device_cfg_offset;

    qpci_io_writel(v->pci->pdev, v->pci->bar, config + SCSI_SENSE_SIZE, sense);
    qpci_io_writel(v->pci->pdev, v->pci->bar, config + SCSI_CDB_SIZE, cdb);
}

/*
 * A CDB of 16 bytes, 20 for sense data; @out bytes at 4 MiB go to the disk, @in
 * come there.
 */
static void scsi_command(Virtio *v, const uint8_t cdb[16], size_t out,
                         size_t in)
{
    struct virtio_scsi_cmd_req request = { .lun = { 1, 0, 0x40 } };
    const size_t length = offsetof(struct virtio_scsi_cmd_req, cdb) + 16;
    QTestState *qts = v->vm->qts;
    uint32_t head;

    memcpy(request.cdb, cdb, 16);
    qtest_memwrite(qts, v->buffer, &request, length);
    head = qvirtqueue_add(qts, v->vq, v->buffer, length, false, true);
    if (out) {
        qvirtqueue_add(qts, v->vq, 4 * MiB, out, false, true);
    }
    qvirtqueue_add(qts, v->vq, v->buffer + length,
                   offsetof(struct virtio_scsi_cmd_resp, sense) + 20, true,
                   in);
    if (in) {
        qvirtqueue_add(qts, v->vq, 4 * MiB, in, true, false);
    }
    qvirtqueue_kick(qts, v->d, v->vq, head);
}

/* The same, to its end */
static void scsi_command_done(Virtio *v, const uint8_t cdb[16], size_t out)
{
    uint16_t used = used_idx(v);
    unsigned tries;

    scsi_command(v, cdb, out, 0);
    for (tries = 0; used_idx(v) == used; tries++) {
        g_assert_cmpuint(tries, <, 10000);
        g_usleep(1000);
    }
}

static const uint8_t test_unit_ready[16] = { };
static const uint8_t scsi_read[16] = { 0x28, [8] = 1 };
static const uint8_t mode_select[16] = { 0x15, 0x10, [4] = 24 };

/*
 * Catches: sizes that a driver has set, which a reset loses; a request that
 * failed, of other sizes than those at the save, which ends QEMU when loaded.
 */
static void test_scsi_sizes(const void *machine)
{
    g_autofree char *args = g_strdup_printf(
        "%s -blockdev driver=blkdebug,node-name=d,read-only=on,"
        "image.driver=null-co,image.read-only=on,"
        "inject-error.0.event=none,inject-error.0.iotype=read",
        (const char *)machine);
    QVirtQueue *control;
    Virtio v;
    int i;

    virtio_start(&v, args, "virtio-scsi-pci,id=s");
    qtest_qmp_device_add(v.vm->qts, "scsi-hd", "hd", "{ 'drive': 'd',"
                         " 'rerror': 'stop', 'bus': 's.0', 'scsi-id': 0 }");
    control = v.vq;
    v.vq = qvirtqueue_setup(v.d, &v.alloc, 2);
    scsi_set_sizes(&v, 80, 40);
    snapshot_qmp(v.vm, "save", 0);
    scsi_set_sizes(&v, 90, 50);
    restore_all_ways(v.vm);
    g_assert_cmpuint(qvirtio_config_readl(v.d, SCSI_SENSE_SIZE), ==, 80);
    g_assert_cmpuint(qvirtio_config_readl(v.d, SCSI_CDB_SIZE), ==, 40);

    scsi_set_sizes(&v, 20, 16);
    /* The driver is told of a reset, and of a new disk. */
    for (i = 0; i < 2; i++) {
        scsi_command_done(&v, test_unit_ready, 0);
    }
    scsi_command(&v, scsi_read, 0, 512);
    qtest_qmp_eventwait(v.vm->qts, "STOP");
    scsi_set_sizes(&v, 1000, 200);
    snapshot_qmp(v.vm, "save", 0);
    for (i = 0; i < 3; i++) {
        snapshot_qmp(v.vm, "restore", 0);
        qtest_qmp_assert_success(v.vm->qts, "{ 'execute': 'cont' }");
        qtest_qmp_eventwait(v.vm->qts, "STOP");
        snapshot_assert_state(v.vm, "io-error");
        g_assert_cmpuint(used_idx(&v), ==, 2);
    }
    assert_exact(v.vm);
    qvirtqueue_cleanup(v.d->bus, control, &v.alloc);
    virtio_end(&v);
}

/* Is the cache of the only disk in use? */
static bool write_cache(SnapshotVM *vm)
{
    QDict *answer = qtest_qmp(vm->qts, "{ 'execute': 'query-block' }");
    bool is = false;
    QListEntry *e;

    QLIST_FOREACH_ENTRY(qdict_get_qlist(answer, "return"), e) {
        QDict *inserted = qdict_get_qdict(qobject_to(QDict,
                                                     qlist_entry_obj(e)),
                                          "inserted");

        is |= inserted && qdict_get_bool(qdict_get_qdict(inserted, "cache"),
                                         "writeback");
    }
    qobject_unref(answer);
    return is;
}

static void scsi_set_write_cache(Virtio *v, bool on)
{
    const uint8_t page[24] = { [4] = 0x08, 0x12, on ? 4 : 0 };

    qtest_memwrite(v->vm->qts, 4 * MiB, page, sizeof(page));
    scsi_command_done(v, mode_select, sizeof(page));
    g_assert_cmpint(write_cache(v->vm), ==, on);
}

static void blk_set_write_cache(Virtio *v, bool on)
{
    qpci_io_writeb(v->pci->pdev, v->pci->bar, v->pci->device_cfg_offset +
                   offsetof(struct virtio_blk_config, wce), on);
    g_assert_cmpint(write_cache(v->vm), ==, on);
}

/* Catches: a cache that a guest has turned on or off, and that stays so. */
static void test_write_cache(const void *machine)
{
    g_autofree char *args = g_strdup_printf(
        "%s -blockdev driver=null-co,node-name=d", (const char *)machine);
    unsigned scsi, i;

    for (scsi = 0; scsi < 2; scsi++) {
        QVirtQueue *first;
        Virtio v;

        virtio_start(&v, args, scsi ? "virtio-scsi-pci,id=s"
                                    : "virtio-blk-pci,drive=d");
        first = v.vq;
        if (scsi) {
            qtest_qmp_device_add(v.vm->qts, "scsi-hd", "hd", "{ 'drive': 'd',"
                                 " 'bus': 's.0', 'scsi-id': 0 }");
            v.vq = qvirtqueue_setup(v.d, &v.alloc, 2);
            scsi_set_sizes(&v, 20, 16);
            for (i = 0; i < 2; i++) {
                scsi_command_done(&v, test_unit_ready, 0);
            }
        }
        for (i = 0; i < 4; i++) {
            bool on = i & 1;

            (scsi ? scsi_set_write_cache : blk_set_write_cache)(&v, on);
            snapshot_qmp(v.vm, "save", 0);
            (scsi ? scsi_set_write_cache : blk_set_write_cache)(&v, !on);
            if (i & 2) {
                qtest_system_reset(v.vm->qts);
            }
            restore(v.vm);
            g_assert_cmpint(write_cache(v.vm), ==, on);
        }
        assert_exact(v.vm);
        if (scsi) {
            qvirtqueue_cleanup(v.d->bus, first, &v.alloc);
        }
        virtio_end(&v);
    }
}

/*
 * Catches: an endpoint of an IOMMU whose bus has another number now: it cannot
 * be found when it is loaded, which ended QEMU.
 */
static void test_iommu_endpoint(const void *machine)
{
    struct virtio_iommu_req_attach attach = {
        .head.type = VIRTIO_IOMMU_T_ATTACH,
        .domain = 1,
        .endpoint = 0x100,
        .tail.status = 0xff,
    };
    const size_t out = offsetof(struct virtio_iommu_req_attach, tail);
    g_autofree QPCIDevice *port = NULL;
    uint32_t head;
    Virtio v;

    virtio_start(&v, "q35 -device pcie-root-port,id=rp,chassis=1,addr=7 "
                 "-device e1000e,bus=rp", "virtio-iommu-pci");
    port = qpci_device_find(v.vm->pci, QPCI_DEVFN(7, 0));
    qpci_config_writel(port, PCI_PRIMARY_BUS, 0x00010100);
    qtest_memwrite(v.vm->qts, v.buffer, &attach, sizeof(attach));
    head = qvirtqueue_add(v.vm->qts, v.vq, v.buffer, out, false, true);
    qvirtqueue_add(v.vm->qts, v.vq, v.buffer + out, sizeof(attach.tail), true,
                   false);
    qvirtqueue_kick(v.vm->qts, v.d, v.vq, head);
    qvirtio_wait_used_elem(v.vm->qts, v.d, v.vq, head, NULL,
                           10 * G_USEC_PER_SEC);
    g_assert_cmpuint(qtest_readb(v.vm->qts, v.buffer + out), ==,
                     VIRTIO_IOMMU_S_OK);
    snapshot_qmp(v.vm, "save", 0);
    qpci_config_writel(port, PCI_PRIMARY_BUS, 0x00050500);
    snapshot_qmp_refused(v.vm, "save", 1, "virtio-iommu");
    restore_all_ways(v.vm);
    snapshot_qmp(v.vm, "save", 1);
    virtio_end(&v);
}

/* Of the directories whose hooks were gone through */
static const char *const devices[] = {
    "e1000", "e1000e", "igb", "rtl8139", "i82550", "i82559er", "i82801",
    "pcnet", "ne2k_pci", "tulip", "vmxnet3", "virtio-net-pci",
    "kvaser_pci,canbus=can0", "pcm3680_pci,canbus0=can0,canbus1=can0",
    "mioe3680_pci,canbus0=can0,canbus1=can0",
    "ctucan_pci,canbus0=can0,canbus1=can0", "virtio-rng-pci",
    "virtio-serial-pci", "virtio-balloon-pci", "virtio-scsi-pci",
    "virtio-gpu-pci", "virtio-keyboard-pci", "virtio-mouse-pci",
    "virtio-tablet-pci", "virtio-iommu-pci", "i6300esb",
    "pci-bridge,chassis_nr=9", "pcie-pci-bridge", "pcie-root-port,chassis=9",
    "ioh3420,chassis=10", "x3130-upstream", "i82801b11-bridge",
};

/*
 * Catches: a device that is not what it was after reset, save, restore; one
 * that cannot be loaded, or keeps what a load allocated.  All in one machine:
 * the error tells which it is.
 */
static void test_devices(const void *machine)
{
    const char *bus = is_q35(machine) ? "pcie.0" : "pci.0";
    g_autoptr(GString) args = g_string_new("-object can-bus,id=can0");
    QPCIDevice *devs[ARRAY_SIZE(devices)] = { };
    SnapshotVM *vm;
    unsigned i, n = 0;

    for (i = 0; i < ARRAY_SIZE(devices); i++) {
        g_auto(GStrv) name = g_strsplit(devices[i], ",", 2);

        if (!qtest_has_device(name[0])) {
            g_test_message("%s: not here", name[0]);
            continue;
        }
        g_string_append_printf(args, " -device %s,bus=%s,addr=%x.%x%s",
                               devices[i], bus, 8 + n / 8, n % 8,
                               n % 8 ? "" : ",multifunction=on");
        n++;
    }
    g_assert_cmpuint(n, >, 25);
    vm = snapshot_vm_start(",verify=20", "-M %s -nodefaults -m 16 %s",
                           (const char *)machine, args->str);
    for (i = 0; i < n; i++) {
        devs[i] = find(vm, 8 + i / 8, i % 8);
    }
    qtest_system_reset(vm->qts);
    snapshot_qmp(vm, "save", 0);
    for (i = 0; i < 20; i++) {
        restore(vm);
    }
    assert_exact(vm);

    for (i = 0; i < n; i++) {
        qpci_device_enable(devs[i]);
    }
    snapshot_qmp(vm, "save", 0);
    assert_flat(vm);
    for (i = 0; i < n; i++) {
        qpci_config_writew(devs[i], PCI_COMMAND, 0);
        g_free(devs[i]);
    }
    for (i = 0; i < 20; i++) {
        restore(vm);
    }
    assert_exact(vm);
    snapshot_vm_end(vm);
}

/* Where firmware has put the ROM of kvmvapic; 0: not yet */
static uint64_t find_vapic_rom(SnapshotVM *vm)
{
    const uint8_t size = 0x2400 / 512;
    uint64_t addr;

    for (addr = 0xc8000; addr < 0xd0000; addr += 0x800) {
        if (qtest_readl(vm->qts, addr) << 8 == (size << 24 | 0xaa5500)) {
            return addr;
        }
    }
    return 0;
}

/*
 * Catches: a ROM that the guest has written to, and that is then refused or
 * patched when it is loaded.
 */
static void test_vapic(const void *machine)
{
    SnapshotVM *vm = snapshot_vm_start(",verify=on",
                                       "-M %s -m 16 -S -accel tcg",
                                       (const char *)machine);
    unsigned tries = 600;
    uint64_t rom;

    qtest_qmp_assert_success(vm->qts, "{ 'execute': 'cont' }");

    /* Its code has run when firmware looks for something to boot. */
    while (!(rom = find_vapic_rom(vm))) {
        g_assert_cmpuint(--tries, >, 0);
        g_usleep(200 * 1000);
    }
    g_usleep(3 * 1000 * 1000);
    qtest_writeb(vm->qts, rom + 2, 0);
    if (qtest_readb(vm->qts, rom + 2)) {
        g_test_message("not mapped writable");
        g_assert_not_reached();
    }
    snapshot_qmp(vm, "save", 0);
    restore_all_ways(vm);
    g_assert_cmphex(qtest_readb(vm->qts, rom + 2), ==, 0);
    qtest_writeb(vm->qts, rom + 2, 1);
    g_assert_cmphex(qtest_readb(vm->qts, rom + 2), ==, 1);
    snapshot_vm_end(vm);
}

/* Catches: a machine whose own devices differ after reset, save, restore. */
static void test_machines(const void *machine)
{
    static const char *const args[] = {
        "", "-rtc clock=vm", "-smp 2", "-global apic-common.vapic=off",
        "-device intel-iommu", "-device vmcoreinfo", "-device pvpanic-pci",
        "-global ICH9-LPC.x-smi-swsmi-timer=off",
        "-global ICH9-LPC.x-smi-periodic-timer=off",
        "-global hpet.timers=8", "-device ib700",
    };
    unsigned i;

    for (i = 0; i < ARRAY_SIZE(args); i++) {
        SnapshotVM *vm;

        if (!is_q35(machine) && (strstr(args[i], "ICH9") ||
                                 strstr(args[i], "iommu"))) {
            continue;
        }
        g_test_message("%s", args[i]);
        vm = snapshot_vm_start(",verify=on", "-M %s -m 16 %s",
                               (const char *)machine, args[i]);
        snapshot_qmp(vm, "save", 0);
        restore_all_ways(vm);
        qtest_system_reset(vm->qts);
        snapshot_qmp(vm, "save", 0);
        restore_all_ways(vm);
        snapshot_vm_end(vm);
    }
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
    snapshot_add_tests("rng-rate", test_rng_rate);
    snapshot_add_tests("rng-loadvm", test_rng_loadvm);
#ifdef CONFIG_TRACE_LOG
    snapshot_add_test("pc", "dirty", "rng-idle", test_rng_idle);
    snapshot_add_test("q35", "dirty", "rng-idle", test_rng_idle);
#endif
    snapshot_add_tests("pci-state", test_pci_state);
    snapshot_add_tests("virtio-queues", test_virtio_queues);
    snapshot_add_test("pc", "dirty", "vmxnet3-memory", test_vmxnet3_memory);
    snapshot_add_test("q35", "dirty", "vmxnet3-memory", test_vmxnet3_memory);
    snapshot_add_tests("balloon-stats", test_balloon_stats);
    snapshot_add_tests("vmxnet3-refused", test_vmxnet3_refused);
    snapshot_add_tests("vmxnet3-mac", test_vmxnet3_mac);
    snapshot_add_tests("vmxnet3-part", test_vmxnet3_part);
    snapshot_add_test("q35", "dirty", "mch", test_mch);
    snapshot_add_test("q35", "remap", "mch", test_mch);
    snapshot_add_test("q35", "dirty", "smi-lock", test_smi_lock);
    snapshot_add_test("q35", "remap", "smi-lock", test_smi_lock);
    snapshot_add_test("q35", "dirty", "smi-timer", test_smi_timer);
    snapshot_add_test("q35", "remap", "smi-timer", test_smi_timer);
    snapshot_add_tests("cpu-hotplug", test_cpu_hotplug);
    snapshot_add_tests("i2c", test_i2c);
    snapshot_add_tests("dma", test_dma);
    snapshot_add_test("q35", "dirty", "root-port", test_root_port);
    snapshot_add_test("q35", "dirty", "igb-functions", test_igb_functions);
    snapshot_add_tests("gpu", test_gpu);
    snapshot_add_tests("gpu-moved", test_gpu_moved);
    snapshot_add_tests("announce", test_announce);
    snapshot_add_tests("scsi-sizes", test_scsi_sizes);
    snapshot_add_tests("write-cache", test_write_cache);
    snapshot_add_test("q35", "dirty", "iommu-endpoint", test_iommu_endpoint);
    snapshot_add_test("q35", "remap", "iommu-endpoint", test_iommu_endpoint);
    snapshot_add_tests("blk-requests", test_blk_requests);
    snapshot_add_test("pc", "dirty", "vapic", test_vapic);
    snapshot_add_test("pc", "remap", "vapic", test_vapic);
    snapshot_add_tests("machines", test_machines);
    snapshot_add_test("pc", "dirty", "devices", test_devices);
    snapshot_add_test("q35", "dirty", "devices", test_devices);
    return g_test_run();
}
