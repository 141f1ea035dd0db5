/* SPDX-License-Identifier: MIT */
/*
 * A machine's description: the file that says how QEMU is started
 *
 * Licensed under the MIT licence, that a program of any licence may use it.
 */

#define _GNU_SOURCE
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "vm-internal.h"

#define TEXT_MAX        (1 << 20)

uint64_t vm_hash(uint64_t hash, const void *data, size_t len)
{
    const unsigned char *p = data;

    for (; len; len--) {
        hash = (hash ^ *p++) * 0x100000001b3ull;
    }
    return hash;
}

/* A number with K, M or G behind it.  Returns: false if it is none */
static bool parse_number(const char *s, uint64_t *value)
{
    const char *end = s;
    unsigned shift = 0;

    for (*value = 0; isdigit((unsigned char)*end); end++) {
        if (*value > (UINT64_MAX - 9) / 10) {
            return false;
        }
        *value = *value * 10 + (*end - '0');
    }
    switch (*end) {
    case 'G':
        shift += 10;
        /* fall through */
    case 'M':
        shift += 10;
        /* fall through */
    case 'K':
        shift += 10;
        end++;
    }
    if (!isdigit((unsigned char)*s) || *end || *value > UINT64_MAX >> shift) {
        return false;
    }
    *value <<= shift;
    return true;
}

static bool parse_word(const char *s, const char *yes, const char *no,
                       bool *value)
{
    *value = !strcmp(s, yes);
    return *value || !strcmp(s, no);
}

/* Returns: NULL, or what would be right */
static const char *parse_key(struct description *d, const char *key,
                             char *value)
{
    /* The ranges leave room for what is computed from the numbers. */
    static const struct {
        const char *key;
        size_t offset;
        uint64_t min, max;
        const char *wanted;
    } numbers[] = {
        { "channel", offsetof(struct description, channel), 64 << 10,
          16ull << 30, "a number that is a power of 2, from 64K to 16G" },
        { "map", offsetof(struct description, coverage), 4096, 1 << 30,
          "a number that is a power of 2, from 4K to 1G" },
        { "boot", offsetof(struct description, boot_ms), 1, 86400,
          "a number of seconds from 1 to 86400" },
        { "timeout", offsetof(struct description, host_ms), 0, 86400000,
          "a number of ms up to 86400000, or 0 for no limit" },
        { "guest-timeout", offsetof(struct description, guest_ms), 0, 86400000,
          "a number of ms up to 86400000, or 0 for no limit" },
        { "idle", offsetof(struct description, idle_s), 0, 31536000,
          "a number of seconds up to 31536000, or 0 for no limit" },
    };
    size_t i;

    for (i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++) {
        if (!strcmp(key, numbers[i].key)) {
            uint64_t *n = (uint64_t *)((char *)d + numbers[i].offset);

            return !parse_number(value, n) || *n < numbers[i].min ||
                *n > numbers[i].max ||
                (numbers[i].min > 1 && (*n & (*n - 1))) ?
                numbers[i].wanted : NULL;
        }
    }
    if (!strcmp(key, "qemu")) {
        d->qemu = value;
        return *value ? NULL : "QEMU's program";
    }
    if (!strcmp(key, "device")) {
        d->device = value;
        return NULL;
    }
    if (!strcmp(key, "keep")) {
        d->keep = value;
        return *value ? NULL : "a file";
    }
    if (!strcmp(key, "coverage")) {
        if (!strncmp(value, "tcg", 3) && (!value[3] || value[3] == ',')) {
            d->tcg = value + 3;
        } else if (strcmp(value, "guest")) {
            return "\"guest\" or \"tcg\", which options may follow";
        }
        return NULL;
    }
    if (!strcmp(key, "console")) {
        return parse_word(value, "serial", "other", &d->serial) ? NULL :
            "\"serial\" or \"other\"";
    }
    if (!strcmp(key, "affinity")) {
        return parse_word(value, "follow", "any", &d->follow) ? NULL :
            "\"follow\" or \"any\"";
    }
    return "one of qemu, device, channel, coverage, map, console, boot, "
        "timeout, guest-timeout, idle, affinity, keep";
}

static char *trim(char *s)
{
    size_t len;

    while (isspace((unsigned char)*s)) {
        s++;
    }
    len = strlen(s);
    while (len && isspace((unsigned char)s[len - 1])) {
        s[--len] = 0;
    }
    return s;
}

/* One line: a comment, an option of QEMU's, or a key and its value */
static int parse_line(struct description *d, char *line, unsigned number)
{
    const char *wanted;
    char *value;

    line = trim(line);
    if (!*line || *line == '#') {
        return 0;
    }
    if (*line == '-') {
        value = line + strcspn(line, " \t");
        d->args[d->n_args++] = line;
        if (*value) {
            *value = 0;
            d->args[d->n_args++] = trim(value + 1);
        }
        return 0;
    }
    value = strchr(line, '=');
    if (!value) {
        return vm_fail(SNAPSHOT_VM_E_DESCRIPTION, "%s:%u: \"%s\" is neither an "
                       "option of QEMU's, such as \"-m 512M\", nor \"key = "
                       "value\"", d->path, number, line);
    }
    *value = 0;
    line = trim(line);
    value = trim(value + 1);
    wanted = parse_key(d, line, value);
    if (wanted) {
        return vm_fail(SNAPSHOT_VM_E_DESCRIPTION, "%s:%u: \"%s = %s\": must be "
                       "%s", d->path, number, line, value, wanted);
    }
    return 0;
}

void vm_description_free(struct description *d)
{
    free(d->path);
    free(d->text);
    free(d->args);
}

/* Only a file is read, which neither waits for anybody nor is endless. */
static int read_file(const char *path, char **text, size_t *len)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    struct stat st;
    ssize_t n = 0;

    if (fd < 0) {
        return vm_fail_system("cannot open", path);
    }
    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode)) {
        close(fd);
        return vm_fail(SNAPSHOT_VM_E_DESCRIPTION, "%s is not a file", path);
    }
    if (st.st_size > TEXT_MAX) {
        close(fd);
        return vm_fail(SNAPSHOT_VM_E_DESCRIPTION, "%s has %llu bytes: a "
                       "description has %u at most", path,
                       (unsigned long long)st.st_size, TEXT_MAX);
    }
    *text = calloc(1, st.st_size + 1);
    while (*text && *len < (size_t)st.st_size &&
           ((n = read(fd, *text + *len, st.st_size - *len)) > 0 ||
            (n < 0 && errno == EINTR))) {
        *len += n > 0 ? n : 0;
    }
    if (!*text || n < 0) {
        int error = errno;

        close(fd);
        errno = error;
        return vm_fail_system("cannot read", path);
    }
    close(fd);
    return 0;
}

int vm_description_load(struct description *d, const char *path)
{
    unsigned number = 0, lines = 1;
    char *line, *next;
    size_t len = 0, i;
    int ret;

    memset(d, 0, sizeof(*d));
    d->path = realpath(path, NULL);
    if (!d->path) {
        return vm_fail_system("cannot find", path);
    }
    ret = read_file(d->path, &d->text, &len);
    if (ret) {
        return ret;
    }
    if (strlen(d->text) != len) {
        return vm_fail(SNAPSHOT_VM_E_DESCRIPTION, "%s is not a text", d->path);
    }
    d->hash = vm_hash(0xcbf29ce484222325ull, d->text, len);
    for (i = 0; i < len; i++) {
        lines += d->text[i] == '\n';
    }
    d->args = calloc(2 * lines, sizeof(*d->args));
    if (!d->args) {
        return vm_fail_system("cannot read", d->path);
    }
    d->channel = 2 * 1024 * 1024;
    d->coverage = 64 * 1024;
    d->boot_ms = 120;
    d->host_ms = 1000;
    d->idle_s = 600;
    d->serial = true;
    d->follow = true;
    for (line = d->text; line; line = next) {
        next = strchr(line, '\n');
        if (next) {
            *next++ = 0;
        }
        ret = parse_line(d, line, ++number);
        if (ret) {
            return ret;
        }
    }
    d->boot_ms *= 1000;
    if (d->keep && d->device && strstr(d->device, "load=")) {
        return vm_fail(SNAPSHOT_VM_E_DESCRIPTION, "%s: a machine with \"keep "
                       "=\" has its own \"load=\"", d->path);
    }
    if (!d->qemu) {
        return vm_fail(SNAPSHOT_VM_E_DESCRIPTION, "%s: no \"qemu = PROGRAM\"",
                       d->path);
    }
    return 0;
}
