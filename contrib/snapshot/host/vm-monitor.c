/* SPDX-License-Identifier: MIT */
/*
 * QEMU's monitor, over the machine's socket "qmp", for as long as it is needed
 *
 * Licensed under the MIT licence, that a program of any licence may use it.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "vm-internal.h"

static int no_answer(void)
{
    return vm_fail(SNAPSHOT_VM_E_SYSTEM, "QEMU's monitor does not answer; has "
                   "another program connected to it?");
}

int vm_monitor_read(struct vm_monitor *m)
{
    return getline(&m->line, &m->size, m->in) > 0 ? 0 : no_answer();
}

/* The next answer.  What begins with anything else is news. */
static int answer(struct vm_monitor *m)
{
    int ret;

    while (!(ret = vm_monitor_read(m))) {
        if (!strncmp(m->line, "{\"return\"", 9)) {
            return 0;
        }
        if (!strncmp(m->line, "{\"error\"", 8)) {
            const char *desc = strstr(m->line, "\"desc\": \"");
            size_t len = strcspn(m->line, "\r\n");

            /* The text ends the line, before two braces. */
            if (desc && m->line + len - desc > 12) {
                desc += 9;
                len = m->line + len - desc - 3;
            } else {
                desc = m->line;
            }
            return vm_fail(SNAPSHOT_VM_E_SYSTEM, "QEMU says: %.*s", (int)len,
                           desc);
        }
    }
    return ret;
}

char *vm_monitor_quote(const char *text)
{
    char *s = malloc(6 * strlen(text) + 3), *to = s;

    if (!s) {
        return NULL;
    }
    *to++ = '"';
    for (; *text; text++) {
        if ((unsigned char)*text < ' ') {
            to += sprintf(to, "\\u%04x", *text);
            continue;
        }
        if (*text == '"' || *text == '\\') {
            *to++ = '\\';
        }
        *to++ = *text;
    }
    *to++ = '"';
    *to = 0;
    return s;
}

int vm_monitor_execute(struct vm_monitor *m, const char *command,
                       const char *arguments)
{
    char *line;
    int n = asprintf(&line, "{\"execute\": \"%s\", \"arguments\": {%s}}\n",
                     command, arguments ? arguments : "");
    ssize_t sent;

    if (n < 0) {
        return vm_fail_system("cannot execute", command);
    }
    sent = send(m->fd, line, n, MSG_NOSIGNAL);
    free(line);
    return sent == n ? answer(m) : vm_fail_system("QEMU's monitor:", command);
}

void vm_monitor_limit(struct vm_monitor *m, unsigned ms)
{
    const struct timeval limit = {
        .tv_sec = ms / 1000,
        .tv_usec = ms % 1000 * 1000,
    };

    setsockopt(m->fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
    setsockopt(m->fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
    clearerr(m->in);
}

int vm_monitor_open(struct vm_monitor *m, const char *directory)
{
    struct sockaddr_un addr = { .sun_family = AF_UNIX };

    memset(m, 0, sizeof(*m));
    m->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if ((size_t)snprintf(addr.sun_path, sizeof(addr.sun_path), "%s/qmp",
                         directory) >= sizeof(addr.sun_path)) {
        return vm_fail(SNAPSHOT_VM_E_SYSTEM, "%s/qmp is too long for a socket",
                       directory);
    }
    if (m->fd < 0 || connect(m->fd, (struct sockaddr *)&addr, sizeof(addr))) {
        return vm_fail_system("cannot connect to", addr.sun_path);
    }
    m->in = fdopen(m->fd, "r");
    if (!m->in) {
        return vm_fail_system("cannot read", addr.sun_path);
    }
    vm_monitor_limit(m, WAIT_MONITOR);
    return vm_monitor_execute(m, "qmp_capabilities", NULL);
}

void vm_monitor_close(struct vm_monitor *m)
{
    if (m->in) {
        fclose(m->in);
    } else if (m->fd >= 0) {
        close(m->fd);
    }
    free(m->line);
    memset(m, 0, sizeof(*m));
    m->fd = -1;
}
