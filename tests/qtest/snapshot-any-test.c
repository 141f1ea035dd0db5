/*
 * Test of the snapshot device: every device of the build
 *
 * Each device that QEMU lists is started on each machine, with what it needs of
 * buses and back ends, and gets inputs chosen at random, but the same ones each
 * time: restore the machine as it was at first, accesses, save, accesses, a
 * restore, accesses, a restore; see snapshot-any.c.  Each restore is verified.
 *
 * Catches, in any device: what a restore or a save ends QEMU by, or hangs in;
 * a machine that was saved and cannot be restored, after a reset as well; state
 * or RAM that is not as it was saved; what no section tells, and a restore does
 * not put back; memory that each restore takes more of.
 *
 * A process of its own does that to each device, so that the others have their
 * turn whatever becomes of one.  What ends QEMU is run again without a save or
 * a restore, but resets: if that does so, too, it is a fault of QEMU's own.
 *
 * SNAPSHOT_ANY_INPUTS=N: so many inputs for each device, both ways to put back
 * RAM on each machine, and more restores to look for growth; with 0, only tell
 * what arguments QEMU starts with, unless this test is the other end at a path.
 * SNAPSHOT_ANY_SEED=N: other inputs.
 * SNAPSHOT_ANY_VARIANT=N, SNAPSHOT_ANY_INPUT=N: only these.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <sys/mman.h>
#include <sys/wait.h>
#include "qemu/cutils.h"
#include "qemu/units.h"
#include "libqtest.h"
#include "qobject/qdict.h"
#include "qobject/qlist.h"
#include "contrib/ivshmem-server/ivshmem-server.h"
#include "snapshot-any.h"

/* How many inputs a device gets, and restores to see if memory grows. */
#define INPUTS          3
#define RESTORES        80
#define RESTORES_LONG   1000

/* Memory grows if it does so by this in each part of so many times RESTORES. */
#define ROUNDS          6
#define GROWTH          512     /* bytes, for each restore */

/* After so many faults of QEMU's own, a device had its turn. */
#define MOST_OWN        3

/* In seconds: nothing here takes as long, but with sanitizers on a busy host */
#define HANG            8

/* What a device needs to start, by what it says of itself */
typedef struct Rule {
    const char *key;            /* a bus, a property, a link's type or a name */
    const char *args;           /* of QEMU, before the device */
    const char *properties;     /* of the device */
} Rule;

/* One is enough; the first that QEMU starts with is taken. */
static const Rule bus_rules[] = {
    { "PCI", "", "" },
    { "PCI", "-device pcie-root-port,id=dutbus", ",bus=dutbus" },
    { "PCI", "-device pci-bridge,chassis_nr=1,id=dutbus", ",bus=dutbus" },
    { "PCI", "-device pcie-root-port,id=dutroot -device x3130-upstream,"
      "id=dutbus,bus=dutroot", ",bus=dutbus,chassis=2" },
    { "usb-bus", "-device qemu-xhci,id=dutbus", ",bus=dutbus.0" },
    { "usb-bus", "-device usb-ehci,id=dutbus", ",bus=dutbus.0" },
    { "usb-bus", "-device piix3-usb-uhci,id=dutbus", ",bus=dutbus.0" },
    { "usb-bus", "-device pci-ohci,id=dutbus", ",bus=dutbus.0" },
    { "SCSI", "-device lsi53c895a,id=dutbus", ",bus=dutbus.0" },
    { "SCSI", "-device virtio-scsi-pci,id=dutbus", ",bus=dutbus.0" },
    { "SCSI", "-device megasas,id=dutbus", ",bus=dutbus.0" },
    { "SCSI", "-device mptsas1068,id=dutbus", ",bus=dutbus.0" },
    { "SCSI", "-device pvscsi,id=dutbus", ",bus=dutbus.0" },
    { "SCSI", "-device am53c974,id=dutbus", ",bus=dutbus.0" },
    { "IDE", "", ",bus=ide.0" },
    { "IDE", "-device ich9-ahci,id=dutbus", ",bus=dutbus.0" },
    { "IDE", "-device piix3-ide,id=dutbus", ",bus=dutbus.0" },
    { "floppy-bus", "", "" },
    { "floppy-bus", "-device isa-fdc,id=dutbus", "" },
    { "virtio-serial-bus", "-device virtio-serial-pci,id=dutbus",
      ",bus=dutbus.0" },
    { "HDA", "-device intel-hda,id=dutbus", ",bus=dutbus.0" },
    { "HDA", "-device ich9-intel-hda,id=dutbus", ",bus=dutbus.0" },
    { "sd-bus", "-device sdhci-pci,id=dutbus", "" },
    { "nvme-bus", "-device nvme,serial=1,id=dutbus", "" },
    { "ufs-bus", "-device ufs,serial=1,id=dutbus", "" },
    { "IndustryPack", "-device tpci200,id=dutbus", "" },
    { "i2c-bus", "", ",address=0x2f" },
    { "ISA", "", "" },
    { "ISA", "", ",iobase=0x300" },
    { }
};

/*
 * All of a kind that are there make variants of a test.  A host's end that
 * nobody reads is a FIFO that is full already.
 */
static const Rule property_rules[] = {
    { "drive", "-drive if=none,id=n,driver=null-co,size=%s,read-zeroes=on",
      ",drive=n" },
    { "drive", "-blockdev null-co,node-name=z,size=%s,read-zeroes=on -drive "
      "if=none,id=n,driver=blkdebug,image=z,inject-error.0.event=none,"
      "werror=stop,rerror=stop", ",drive=n" },
    { "drive", "", "" },
    { "netdev", "-netdev user,id=n", ",netdev=n" },
    { "netdev", "-netdev hubport,hubid=0,id=n -netdev hubport,hubid=0,id=n2 "
      "-device virtio-net-pci,netdev=n2,id=dutpeer", ",netdev=n" },
    { "chardev", "-chardev null,id=c", ",chardev=c" },
    { "chardev", "-chardev pipe,path=%s,id=c", ",chardev=c" },
    { "memdev", "-m 4M,slots=2,maxmem=1G -object memory-backend-ram,id=m,"
      "size=2M,share=on", ",memdev=m" },
    { "fsdev", "-fsdev local,id=f,path=/usr,security_model=none,"
      "readonly=on", ",fsdev=f,mount_tag=t" },
    { "cryptodev", "-object cryptodev-backend-builtin,id=b", ",cryptodev=b" },
    { "bmc", "-device ipmi-bmc-sim,id=b", ",bmc=b" },
    { "serial", "", ",serial=1" },
    { "chassis", "", ",chassis=1" },
    { "chassis_nr", "", ",chassis_nr=1" },
    { "canbus", "-object can-bus,id=b", ",canbus=b" },
    { "canbus0", "-object can-bus,id=b", ",canbus0=b,canbus1=b" },
    { "osk", "", ",osk=ourhardworkbythesewordsguardedpleasedontstealc" },
    /* It waits for a server that greets it.  Only a master can be saved. */
    { "ivshmem-doorbell", "-chardev socket,path=%s,id=c",
      ",chardev=c,master=on" },
    { }
};

/* What a machine has by default, and what it has instead */
static const Rule machine_rules[] = {
    { "machine", "", "" },
    { "machine", "-drive if=pflash,id=n,driver=null-co,size=%s,read-zeroes=on",
      "" },
    { "machine", "-chardev pipe,path=%s,id=c -serial chardev:c -smp 2", "" },
    { }
};

typedef struct Device {
    char *name;
    char *bus;                  /* or NULL */
    char *why_not;              /* it cannot be asked for; of QEMU */
    bool is_cpu;
    GHashTable *properties;     /* names */
} Device;

typedef struct Case {
    const Device *device;       /* NULL: the machine as it is by default */
    const char *machine;
    const char *ram;
    bool growth;
} Case;

/* Between the process that does it and the one that tells of it */
typedef struct Shared {
    unsigned beats;             /* changes as long as it does not hang */
    unsigned input;
    bool has_started;
    bool has_died;
    bool has_no_state;          /* QEMU warned of it */
    int status;                 /* of QEMU, if it died; negative: a signal */
    char step[256];
    char text[4096];
} Shared;

/* What became of a process, by its exit status, or of QEMU */
enum { DONE, FAILED, REFUSED, GONE, DIED, HUNG };

static Shared *shared;
static unsigned n_inputs, only_input, only_variant;
static bool is_long, has_only_input, has_only_variant;
static uint32_t seed;

/* Where the device that is tested looks for its server, or NULL */
static char *server_path;

/* What hangs by itself is waited for once, not on each machine. */
static GHashTable *hangs;

/* Ends the process if QEMU ended. */
static void look_for_end(void)
{
    siginfo_t info = { };

    if (waitid(P_ALL, 0, &info, WEXITED | WNOWAIT | WNOHANG) || !info.si_pid) {
        return;
    }
    shared->has_died = true;
    shared->status = info.si_code == CLD_EXITED ? info.si_status
                                                : -info.si_status;
    _exit(DIED);
}

/* libqtest would wait for a QEMU that ended before it connected. */
static void on_child(int sig)
{
    look_for_end();
}

/* libqtest may find a socket closed before the host has ended QEMU. */
static void on_abort(int sig)
{
    int i;

    for (i = 0; i < 100; i++) {
        look_for_end();
        g_usleep(20 * 1000);
    }
    _exit(DIED);
}

/* Resets are waited for.  Others would be kept, of which there are many. */
static bool on_event(QTestState *qts, const char *name, QDict *event,
                     void *opaque)
{
    return strcmp(name, "RESET");
}

/* How inputs reach QEMU from outside */

static char *outside_hmp(SnapshotAny *a, const char *command)
{
    return qtest_hmp(a->qts, "%s", command);
}

static void outside_reset(SnapshotAny *a)
{
    qtest_system_reset(a->qts);
}

static void outside_settle(SnapshotAny *a)
{
}

static G_NORETURN void outside_fail(SnapshotAny *a, const char *text)
{
    pstrcpy(shared->text, sizeof(shared->text), text);
    _exit(FAILED);
}

/* The event tells of it too late, when nobody uses it any more. */
static bool outside_is_gone(SnapshotAny *a)
{
    g_autofree char *list = qtest_hmp(a->qts, "qom-list /machine/peripheral");

    return a->has_unplug && !strstr(list, SNAPSHOT_ANY_ID " (");
}

static const SnapshotAnyOps outside = {
    .hmp = outside_hmp,
    .reset = outside_reset,
    .settle = outside_settle,
    .fail = outside_fail,
    .is_gone = outside_is_gone,
};

/* The same bytes for an input each time; now fewer of them, now more */
static size_t make_input(uint32_t case_seed, unsigned input, uint8_t *data,
                         size_t max)
{
    g_autoptr(GRand) rand = g_rand_new_with_seed(case_seed +
                                                 input * 0x9e3779b1u);
    size_t n = SNAPSHOT_ANY_RECORD * g_rand_int_range(
        rand, 4, max / SNAPSHOT_ANY_RECORD), i;

    for (i = 0; i < n; i++) {
        data[i] = g_rand_int(rand);
    }
    return n;
}

static size_t memory_of(pid_t pid)
{
    g_autofree char *path = g_strdup_printf("/proc/%d/status", (int)pid);
    g_autofree char *text = NULL;
    const char *line;

    g_assert(g_file_get_contents(path, &text, NULL, NULL));
    line = strstr(text, "RssAnon:");
    g_assert_nonnull(line);
    return g_ascii_strtoull(line + 8, NULL, 10) * KiB;
}

static unsigned n_restored, n_grown;
static size_t memory;

static void look_at_memory(SnapshotAny *a)
{
    unsigned part = (is_long ? RESTORES_LONG : RESTORES) / 8;
    size_t now;

    if (n_restored++ % part) {
        return;
    }
    now = memory_of(qtest_pid(a->qts));
    n_grown += now >= memory + part * GROWTH;
    memory = now;
}

/*
 * Memory grows as things are used for the first time, and as the allocator
 * takes more at a time, or RCU frees later.  But what each restore loses is
 * lost all the time.
 */
static void check_growth(SnapshotAny *a, const uint8_t *data, size_t size)
{
    unsigned n = is_long ? RESTORES_LONG : RESTORES, i;
    g_autofree char *text = NULL;
    size_t before;

    snapshot_any_restores(a, data, size, n, look_at_memory);
    before = memory;
    for (i = 0; i < ROUNDS; i++) {
        n_grown = 0;
        snapshot_any_restores(a, data, size, n, look_at_memory);
        if (n_grown < 8) {
            return;
        }
    }
    text = g_strdup_printf("memory grew from %zu KiB to %zu KiB in %u restores",
                           before / KiB, memory / KiB, n * ROUNDS);
    outside_fail(a, text);
}

static void *serve(void *opaque)
{
    IvshmemServer *server = opaque;

    for (;;) {
        fd_set fds;
        int end = 0;

        FD_ZERO(&fds);
        ivshmem_server_get_fds(server, &fds, &end);
        if (select(end, &fds, NULL, NULL, NULL) > 0) {
            ivshmem_server_handle_fds(server, &fds, end);
        }
    }
    return NULL;
}

/* A server of ivshmem, which ends with this process; QEMU is its first peer. */
static void start_server(const char *path)
{
    static IvshmemServer server;
    g_autofree char *dir = g_path_get_dirname(path);

    unlink(path);
    g_assert_cmpint(ivshmem_server_init(&server, path, dir, false, MiB, 2,
                                        false), ==, 0);
    g_assert_cmpint(ivshmem_server_start(&server), ==, 0);
    g_thread_unref(g_thread_new("server", serve, &server));
}

static G_NORETURN void session(const Case *c, const char *args,
                               uint32_t case_seed, unsigned first,
                               unsigned end, bool snapshots)
{
    SnapshotAny a = {
        .ops = &outside,
        .whole_machine = !c->device,
        .has_ports = !g_str_has_prefix(c->machine, "microvm"),
        .snapshots = snapshots,
        .has_unplug = true,
        .beats = &shared->beats,
        .step = shared->step,
        .step_size = sizeof(shared->step),
    };
    const struct sigaction child = {
        .sa_handler = on_child, .sa_flags = SA_NOCLDSTOP
    };
    const struct sigaction aborted = { .sa_handler = on_abort };
    g_autofree char *error = NULL;
    uint8_t data[64 * SNAPSHOT_ANY_RECORD];
    size_t size;
    unsigned i;

    if (server_path) {
        start_server(server_path);
    }
    sigaction(SIGCHLD, &child, NULL);
    a.qts = qtest_init_without_qmp_handshake(args);
    sigaction(SIGABRT, &aborted, NULL);
    qtest_qmp_set_event_callback(a.qts, on_event, NULL);
    qobject_unref(qtest_qmp_receive(a.qts));
    qtest_qmp_assert_success(a.qts, "{ 'execute': 'qmp_capabilities' }");
    shared->has_started = true;
    shared->input = first;
    error = snapshot_any_set_up(&a);
    shared->has_no_state = a.has_no_state;
    if (error) {
        pstrcpy(shared->text, sizeof(shared->text), error);
        _exit(REFUSED);
    }
    for (i = first; i < end; i++) {
        shared->input = i;
        size = make_input(case_seed, i, data, sizeof(data));
        if (!snapshot_any_input(&a, data, size)) {
            _exit(GONE);
        }
        if (is_long || i == first) {
            snapshot_any_behaviour(&a, data, size);
        }
    }
    if (c->growth && !has_only_input && n_inputs) {
        size = make_input(case_seed, first, data, sizeof(data));
        if (snapshots) {
            check_growth(&a, data, size);
        } else {
            snapshot_any_restores(&a, data, size, 0, NULL);
        }
    }
    _exit(DONE);
}

/* Returns: what became of it */
static int run(const Case *c, const char *args, uint32_t case_seed,
               unsigned first, unsigned end, bool snapshots, const char *log)
{
    unsigned beats = 0, quiet = 0;
    int status;
    pid_t pid;

    memset(shared, 0, sizeof(*shared));
    fflush(NULL);
    pid = fork();
    g_assert_cmpint(pid, >=, 0);
    if (!pid) {
        int fd = open(log, O_WRONLY | O_CREAT | O_TRUNC, 0600);

        g_assert_cmpint(fd, >=, 0);
        dup2(fd, 1);
        dup2(fd, 2);
        session(c, args, case_seed, first, end, snapshots);
    }
    while (!waitpid(pid, &status, WNOHANG)) {
        g_usleep(2000);
        quiet = shared->beats == beats ? quiet + 1 : 0;
        beats = shared->beats;
        if (quiet > HANG * 500) {
            kill(pid, SIGKILL);
            waitpid(pid, &status, 0);
            return HUNG;
        }
    }
    if (!WIFEXITED(status) || WEXITSTATUS(status) > DIED) {
        return DIED;
    }
    return WEXITSTATUS(status);
}

static char *last_lines(const char *log, unsigned n)
{
    g_autofree char *text = NULL;
    char *p;

    if (!g_file_get_contents(log, &text, NULL, NULL)) {
        return g_strdup("");
    }
    g_strchomp(text);
    for (p = text + strlen(text); p > text; p--) {
        if (p[-1] == '\n' && !--n) {
            break;
        }
    }
    return g_strdup(p);
}

/* One of QEMU's, not of the test program's or of libqtest's */
static char *reason_of(const char *log)
{
    g_autofree char *text = last_lines(log, 20);
    g_auto(GStrv) lines = g_strsplit(text, "\n", -1);
    char *best = NULL;
    char **line;

    for (line = lines; *line; line++) {
        const char *colon = strstr(*line, "qemu-system-");

        if (colon && !strstr(*line, "starting QEMU") &&
            !strstr(*line, "warning:")) {
            g_free(best);
            best = g_strdup(*line);
        }
    }
    return best ?: g_strdup(text);
}

/* A FIFO that is full, and stays so */
static char *full_pipe(const char *dir)
{
    char *path = g_build_filename(dir, "pipe", NULL);
    g_autofree char *in = g_strconcat(path, ".in", NULL);
    g_autofree char *out = g_strconcat(path, ".out", NULL);
    static int fd = -1;
    char c[4096] = { };

    if (fd >= 0) {
        close(fd);
    }
    mkfifo(in, 0600);
    mkfifo(out, 0600);
    fd = open(out, O_RDWR | O_NONBLOCK | O_CLOEXEC);
    g_assert_cmpint(fd, >=, 0);
    while (write(fd, c, sizeof(c)) > 0) {
        continue;
    }
    return path;
}

static unsigned n_variants(const Device *d)
{
    const Rule *r;
    unsigned most = 1;

    if (!d) {
        return ARRAY_SIZE(machine_rules) - 1;
    }
    for (r = property_rules; d && r->key; r++) {
        const Rule *same;
        unsigned n = 0;

        if (!g_hash_table_contains(d->properties, r->key)) {
            continue;
        }
        for (same = property_rules; same->key; same++) {
            n += !strcmp(same->key, r->key);
        }
        most = MAX(most, n);
    }
    return most;
}

static void add_rule(GString *args, GString *properties, const Rule *r,
                     const Device *d, const char *dir)
{
    g_auto(GStrv) parts = g_strsplit(r->args, "%s", 2);
    g_autofree char *value = NULL;

    if (strstr(r->args, "socket,path=%s")) {
        server_path = g_build_filename(dir, "server", NULL);
        value = g_strdup(server_path);
    } else if (strstr(r->args, "path=%s")) {
        value = full_pipe(dir);
    } else {
        value = g_strdup(!d ? "131072" :
                         !g_strcmp0(d->bus, "floppy-bus") ? "1474560" :
                         "67108864");
    }
    /* No %s, no parts or one */
    if (g_strv_length(parts) == 2) {
        g_string_append_printf(args, " %s%s%s", parts[0], value, parts[1]);
    } else {
        g_string_append_printf(args, " %s", r->args);
    }
    g_string_append(properties, r->properties);
}

static char *command_line(const Case *c, unsigned variant, const Rule *bus,
                          const char *dir)
{
    const Device *d = c->device;
    GString *args = g_string_new(NULL);
    g_autoptr(GString) properties = g_string_new(NULL);
    const Rule *r;

    g_clear_pointer(&server_path, g_free);
    g_string_printf(args, "-M %s -m 2 -no-shutdown %s", c->machine,
                    d ? "-nodefaults" : "");
    if (!d) {
        add_rule(args, properties, machine_rules + variant, d, dir);
    }
    if (d && d->is_cpu) {
        g_string_append_printf(args, " -smp 1,sockets=2,maxcpus=2 -cpu %.*s",
                               (int)(strlen(d->name) - strlen("-x86_64-cpu")),
                               d->name);
        g_string_append(properties, ",socket-id=1,core-id=0,thread-id=0");
    }
    if (bus) {
        add_rule(args, properties, bus, d, dir);
    }
    for (r = property_rules; d && r->key; ) {
        const Rule *of_key = r;
        unsigned n = 0;

        while (r->key && !strcmp(r->key, of_key->key)) {
            r++;
            n++;
        }
        if (g_hash_table_contains(d->properties, of_key->key)) {
            add_rule(args, properties, of_key + variant % n, d, dir);
        }
    }
    if (d) {
        g_string_append_printf(args, " -device %s,id=dut%s", d->name,
                               properties->str);
    }
    g_string_append_printf(args, " -device snapshot,ram=%s,verify=on", c->ram);
    return g_string_free(args, false);
}

/* A case with one set of arguments */
typedef struct Attempt {
    const Case *c;
    unsigned variant;
    char *args;
    char *log;
    char *key;                  /* of hangs */
    uint32_t seed;
} Attempt;

/* What became of the input that ran last, and how to run it again */
static char *story(const Attempt *a, int outcome)
{
    const Case *c = a->c;
    const char *name = c->device ? c->device->name : "default";
    g_autofree char *tail = last_lines(a->log, has_only_input ? 100 : 12);
    g_autofree char *end = g_strdup_printf(
        "QEMU ended: %s %d", shared->status < 0 ? "signal" : "status",
        ABS(shared->status));

    return g_strdup_printf(
        "%s, %s, ram=%s, variant %u, seed %u, input %u, at \"%s\": %s\n"
        "SNAPSHOT_ANY_SEED=%u SNAPSHOT_ANY_VARIANT=%u SNAPSHOT_ANY_INPUT=%u "
        "tests/qtest/snapshot-any-test -p /%s/snapshot/any/%s/%s/%s\n"
        "QEMU's arguments: %s\n%s", name, c->machine, c->ram, a->variant, seed,
        shared->input, shared->step,
        outcome == HUNG ? "QEMU hangs" : outcome == FAILED ? shared->text :
        shared->has_died ? end : "QEMU does not answer",
        seed, a->variant, shared->input, qtest_get_arch(), c->machine, c->ram,
        name, a->args, tail);
}

/* Returns: true if the others may be run */
static bool judge(const Attempt *a, int outcome, unsigned first)
{
    g_autofree char *text = story(a, outcome);

    if (outcome == FAILED ||
        run(a->c, a->args, a->seed, first, shared->input + 1, false,
            a->log) != outcome) {
        g_test_message("FAULT: %s", text);
        g_test_fail();
        return false;
    }
    g_test_message("QEMU's own: %s", text);
    if (outcome == HUNG) {
        g_hash_table_add(hangs, g_strdup(a->key));
    }
    return outcome != HUNG;
}

/* Returns: NULL, or why it cannot be tested */
static char *run_inputs(const Attempt *a)
{
    const Device *d = a->c->device;
    unsigned first = has_only_input ? only_input : 0, own = 0, input;
    unsigned end = has_only_input ? only_input + 1 :
                   d && d->is_cpu && !is_long ? MIN(n_inputs, 1) : n_inputs;
    g_autofree char *dir = g_path_get_dirname(a->log);

    if (g_hash_table_contains(hangs, a->key)) {
        g_test_message("%s hangs by itself, as on another machine", a->key);
        return NULL;
    }
    do {
        int outcome = run(a->c, a->args, a->seed, first, end, true, a->log);

        if (!shared->has_started) {
            return reason_of(a->log);
        }
        input = shared->input;
        switch (outcome) {
        case REFUSED:
            return g_strdup_printf("the save is refused: %s", shared->text);
        case DONE:
            if (!n_inputs && !strstr(a->args, dir)) {
                g_test_message("starts: %s", a->args);
            }
            if (shared->has_no_state) {
                g_test_message("not put back, with a warning: %s", d->name);
            }
            return NULL;
        case GONE:
            break;
        default:
            if (!judge(a, outcome, first) || ++own == MOST_OWN) {
                return NULL;
            }
        }
        first = input + 1;
    } while (first < end);
    return NULL;
}

static char *run_attempt(const Case *c, unsigned variant, const Rule *bus,
                         const char *dir)
{
    g_autofree char *args = command_line(c, variant, bus, dir);
    g_autofree char *log = g_build_filename(dir, "log", NULL);
    g_autofree char *key = g_strdup_printf(
        "%s %u", c->device ? c->device->name : c->machine, variant);
    Attempt a = {
        .c = c,
        .variant = variant,
        .args = args,
        .log = log,
        .key = key,
        .seed = seed + g_str_hash(key) + g_str_hash(c->machine) +
                g_str_hash(c->ram),
    };

    return run_inputs(&a);
}

static const char *after_colon(const char *text)
{
    return strrchr(text, ':') ?: text;
}

/*
 * The first bus that it can be on; which one that is differs with the machine
 * and with how RAM is put back, so that all have their turn.
 */
static char *run_variant(const Case *c, unsigned variant, const char *dir)
{
    g_autoptr(GPtrArray) buses = g_ptr_array_new();
    const Rule *r;
    char *reason = NULL;
    unsigned i, first;

    for (r = bus_rules; r->key; r++) {
        if (c->device && !g_strcmp0(r->key, c->device->bus)) {
            g_ptr_array_add(buses, (void *)r);
        }
    }
    if (!buses->len) {
        return run_attempt(c, variant, NULL, dir);
    }
    first = !strcmp(c->ram, "dirty") + 2 * !strcmp(c->machine, "q35");
    for (i = 0; i < buses->len; i++) {
        g_autofree char *before = reason;

        reason = run_attempt(c, variant, g_ptr_array_index(
            buses, (first + i) % buses->len), dir);
        if (!reason || (before && !strcmp(after_colon(before),
                                          after_colon(reason)))) {
            break;              /* or it has nothing to do with the bus */
        }
    }
    return reason;
}

static void test_device(const void *data)
{
    const Case *c = data;
    g_autofree char *dir = g_dir_make_tmp("snapshot-any-XXXXXX", NULL);
    g_autofree char *remove = g_strdup_printf("rm -rf %s", dir);
    g_autofree char *reason = NULL;
    unsigned i, n_tested = 0;

    g_assert_nonnull(dir);
    for (i = 0; i < n_variants(c->device); i++) {
        if (!has_only_variant || i == only_variant) {
            g_autofree char *why = run_variant(c, i, dir);

            n_tested += !why;
            reason = reason ?: g_steal_pointer(&why);
        }
    }
    if (!n_tested) {
        g_test_skip(reason);
    }
    g_assert_cmpint(system(remove), ==, 0);
}

/* What QEMU says of its devices */

static void add_case(const Device *d, const char *machine, const char *ram,
                     bool growth)
{
    Case c = {
        .device = d, .machine = machine, .ram = ram, .growth = growth
    };
    g_autofree char *path = g_strdup_printf("snapshot/any/%s/%s/%s", machine,
                                            ram, d ? d->name : "default");

    qtest_add_data_func_full(path, g_memdup2(&c, sizeof(c)), test_device,
                             g_free);
}

static void add_cases(const Device *d, unsigned i)
{
    bool all = is_long || has_only_input;

    if (d && d->is_cpu && !has_only_input) {
        /* There are many, of one kind. */
        add_case(d, i & 2 ? "pc" : "q35", i & 1 ? "dirty" : "remap", false);
        return;
    }
    if (all || (i & 1)) {
        add_case(d, "pc", "dirty", true);
        add_case(d, "q35", "remap", false);
    }
    if (all || !(i & 1)) {
        add_case(d, "pc", "remap", false);
        add_case(d, "q35", "dirty", true);
    }
    if (!d || !g_strcmp0(d->bus, "virtio-bus")) {
        add_case(d, "microvm,pcie=on", i & 1 ? "dirty" : "remap", false);
    }
}

static QList *qom_list(QTestState *qts, const char *implements)
{
    QDict *reply = qtest_qmp(qts, "{ 'execute': 'qom-list-types', 'arguments':"
                             " { 'implements': %s, 'abstract': false } }",
                             implements);
    QList *list = qdict_get_qlist(reply, "return");

    qobject_ref(list);
    qobject_unref(reply);
    return list;
}

/* One that is named itself needs that, whatever properties it has. */
static void add_properties(QTestState *qts, Device *d)
{
    const Rule *r;
    QDict *reply;
    QListEntry *e;

    for (r = property_rules; r->key; r++) {
        if (!strcmp(r->key, d->name)) {
            g_hash_table_add(d->properties, g_strdup(d->name));
            return;
        }
    }
    reply = qtest_qmp(qts, "{ 'execute': 'device-list-properties',"
                      " 'arguments': { 'typename': %s } }", d->name);
    QLIST_FOREACH_ENTRY(qdict_get_qlist(reply, "return"), e) {
        QDict *property = qobject_to(QDict, qlist_entry_obj(e));

        if (g_str_has_prefix(qdict_get_str(property, "type"), "child<")) {
            continue;
        }
        g_hash_table_add(d->properties,
                         g_strdup(qdict_get_str(property, "name")));
    }
    qobject_unref(reply);
}

/* The devices that may be asked for are in the monitor's help. */
static void find_bus(const char *help, Device *d)
{
    g_autofree char *key = g_strdup_printf("name \"%s\"", d->name);
    const char *line = strstr(help, key), *end;

    if (!line) {
        return;
    }
    g_clear_pointer(&d->why_not, g_free);
    line += strlen(key);
    if (g_str_has_prefix(line, ", bus ")) {
        line += strlen(", bus ");
        end = line + strcspn(line, ",\r\n");
        d->bus = g_strndup(line, end - line);
    }
}

static int compare_devices(const void *a, const void *b)
{
    const Device *const *da = a, *const *db = b;

    return strcmp((*da)->name, (*db)->name);
}

static GPtrArray *list_devices(void)
{
    QTestState *qts = qtest_init("-M none");
    GPtrArray *devices = g_ptr_array_new();
    QList *names = qom_list(qts, "device"), *cpus = qom_list(qts, "cpu");
    g_autofree char *help = qtest_hmp(qts, "device_add help");
    QListEntry *e, *cpu;

    QLIST_FOREACH_ENTRY(names, e) {
        QDict *type = qobject_to(QDict, qlist_entry_obj(e));
        Device *d = g_new0(Device, 1);

        d->name = g_strdup(qdict_get_str(type, "name"));
        d->properties = g_hash_table_new(g_str_hash, g_str_equal);
        d->why_not = g_strdup("");
        find_bus(help, d);
        if (d->why_not) {
            QDict *reply = qtest_qmp(qts, "{ 'execute': 'device_add',"
                                     " 'arguments': { 'driver': %s } }",
                                     d->name);

            g_free(d->why_not);
            d->why_not = g_strdup(qdict_get_str(
                qdict_get_qdict(reply, "error"), "desc"));
            qobject_unref(reply);
        } else {
            add_properties(qts, d);
        }
        QLIST_FOREACH_ENTRY(cpus, cpu) {
            QDict *c = qobject_to(QDict, qlist_entry_obj(cpu));

            d->is_cpu |= !strcmp(qdict_get_str(c, "name"), d->name);
        }
        g_ptr_array_add(devices, d);
    }
    g_ptr_array_sort(devices, compare_devices);
    qobject_unref(names);
    qobject_unref(cpus);
    qtest_quit(qts);
    return devices;
}

/* They are tested as parts of the machines that have them. */
static void test_parts(const void *data)
{
    const GPtrArray *devices = data;
    unsigned i, n = 0;

    for (i = 0; i < devices->len; i++) {
        const Device *d = g_ptr_array_index(devices, i);

        if (d->why_not) {
            g_test_message("not on its own: %s: %s", d->name, d->why_not);
            n++;
        }
    }
    g_assert_cmpuint(n, <, devices->len);
}

static uint32_t number(const char *name, bool *is_set, uint32_t otherwise)
{
    const char *text = g_getenv(name);

    if (is_set) {
        *is_set = text;
    }
    return text ? g_ascii_strtoull(text, NULL, 0) : otherwise;
}

int main(int argc, char **argv)
{
    GPtrArray *devices;
    unsigned i, n = 0;

    g_test_init(&argc, &argv, NULL);
    if (!qtest_has_device("snapshot")) {
        g_test_skip("no snapshot device");
        return g_test_run();
    }
    n_inputs = number("SNAPSHOT_ANY_INPUTS", &is_long, INPUTS);
    seed = number("SNAPSHOT_ANY_SEED", NULL, 1);
    only_input = number("SNAPSHOT_ANY_INPUT", &has_only_input, 0);
    only_variant = number("SNAPSHOT_ANY_VARIANT", &has_only_variant, 0);
    shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE,
                  MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    g_assert(shared != MAP_FAILED);

    hangs = g_hash_table_new(g_str_hash, g_str_equal);
    devices = list_devices();
    qtest_add_data_func("snapshot/any/parts", devices, test_parts);
    add_cases(NULL, 0);
    for (i = 0; i < devices->len; i++) {
        const Device *d = g_ptr_array_index(devices, i);

        if (!d->why_not && strcmp(d->name, "snapshot")) {
            add_cases(d, n++);
        }
    }
    return g_test_run();
}
