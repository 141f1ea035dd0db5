/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Snapshot test guest: commands of QMP, through a serial port
 */

#include "guest.h"

#define COM1            0x3f8
#define LSR             (COM1 + 5)
#define LSR_DATA        0x01
#define LSR_EMPTY       0x20

static char line[1024];
static shared32 written;

static void send(const char *text)
{
    for (; *text; text++) {
        while (!(inb(LSR) & LSR_EMPTY)) {
            cpu_pause();
        }
        outb(COM1, *text);
    }
}

/* The next line; nothing but polling, while a snapshot may be made */
static void receive(void)
{
    unsigned i = 0;

    do {
        while (!(inb(LSR) & LSR_DATA)) {
            cpu_pause();
        }
        check(i < sizeof(line), "a line is too long");
        line[i] = inb(COM1);
    } while (line[i++] != '\n');
    line[i - 1] = 0;
}

/* Where @text is in the line, or NULL */
static const char *find(const char *text)
{
    for (const char *at = line; *at; at++) {
        unsigned i = 0;

        while (text[i] && at[i] == text[i]) {
            i++;
        }
        if (!text[i]) {
            return at;
        }
    }
    return NULL;
}

/*
 * The answer to a restore reaches the guest that waits for the answer to its
 * save. Catches: RAM, the port or the monitor not being where they were.
 */
CASE(qmp)
{
    static char restore[] = "{\"execute\": \"x-snapshot-device-restore\", "
        "\"arguments\": {\"slot\": 0}, \"id\": \"restore-?\"}\n";
    const unsigned digit = sizeof(restore) - 5;
    const char *id;

    if (option("greeting", 0)) {
        receive();
        check(find("QMP"), "no greeting: %s", line);
        send("{\"execute\": \"qmp_capabilities\"}\n");
        receive();
        check(find("return"), "no capabilities: %s", line);
    }
    if (option("hostile", 0)) {
        send("{\"execute\": \"quit\"}\n");
        receive();
        check(find("error") && find("may pass"), "quit: %s", line);
    }
    send("{\"execute\": \"x-snapshot-device-save\", "
         "\"arguments\": {\"slot\": 0}, \"id\": \"save\"}\n");
    receive();
    check(find("return"), "refused: %s", line);
    id = find("restore-");
    check(id || find("\"save\""), "not an answer to these: %s", line);
    check_equal("what was written to", written, 0);
    written = 1;
    say("%s\n", id ? "restored" : "saved");
    restore[digit] = id ? id[8] + 1 : '1';
    if (restore[digit] > '9') {
        return;
    }
    send(restore);
    receive();
    fail("the restore's answer came to who has asked for it: %s", line);
}
