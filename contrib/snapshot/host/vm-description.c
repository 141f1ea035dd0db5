/* SPDX-License-Identifier: MIT */
/*
 * A machine's description: the file that says how QEMU is started
 *
 * Licensed under the MIT licence, that a program of any licence may use it.
 */

#define _GNU_SOURCE
#include <ctype.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "vm-internal.h"

uint64_t vm_hash(uint64_t hash, const void *data, size_t len)
{
    const unsigned char *p = data;

    for (; len; len--) {
        hash = (hash ^ *p++) * 0x100000001b3ull;
    }
    return hash;
}

/* A number with K, M or G behind it, at least @min */
static bool parse_number(const char *s, uint64_t min, uint64_t *value)
{
    const char *end = s;
    unsigned shift = 0;

    for (*value = 0; isdigit(*end) && end - s < 18; end++) {
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
    if (!isdigit(*s) || *end || *value > UINT64_MAX >> shift) {
        return false;
    }
    *value <<= shift;
    return *value >= min;
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
    static const struct {
        const char *key;
        size_t offset;
        uint64_t min;
    } numbers[] = {
        { "channel", offsetof(struct description, channel), 64 * 1024 },
        { "map", offsetof(struct description, coverage), 4096 },
        { "boot", offsetof(struct description, boot_ms), 1 },
        { "timeout", offsetof(struct description, host_ms), 0 },
        { "guest-timeout", offsetof(struct description, guest_ms), 0 },
        { "idle", offsetof(struct description, idle_s), 0 },
    };
    size_t i;

    for (i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++) {
        if (!strcmp(key, numbers[i].key)) {
            uint64_t *n = (uint64_t *)((char *)d + numbers[i].offset);

            if (!parse_number(value, numbers[i].min, n)) {
                return "a number, with K, M or G behind it if need be";
            }
            return numbers[i].min > 1 && (*n & (*n - 1)) ? "a power of 2"
                                                         : NULL;
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
        "timeout, guest-timeout, idle, affinity";
}

static char *trim(char *s)
{
    size_t len;

    while (isspace(*s)) {
        s++;
    }
    len = strlen(s);
    while (len && isspace(s[len - 1])) {
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

static int read_file(const char *path, char **text, size_t *len)
{
    FILE *f = fopen(path, "re");
    struct stat st;

    if (!f) {
        return vm_fail_system("cannot open", path);
    }
    if (fstat(fileno(f), &st) < 0 || !S_ISREG(st.st_mode)) {
        fclose(f);
        return vm_fail(SNAPSHOT_VM_E_DESCRIPTION, "%s is not a file", path);
    }
    *text = calloc(1, st.st_size + 1);
    if (!*text) {
        fclose(f);
        return vm_fail_system("cannot read", path);
    }
    *len = fread(*text, 1, st.st_size, f);
    fclose(f);
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
    if (!d->qemu) {
        return vm_fail(SNAPSHOT_VM_E_DESCRIPTION, "%s: no \"qemu = PROGRAM\"",
                       d->path);
    }
    return 0;
}
