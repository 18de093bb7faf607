/* The smallest workspace: one static program that is an HTTP server and can misbehave on request.
 *
 *   /           200, "ok <what WORD in its environment says>"
 *   /whoami     uid, what happens to a write outside /tmp, to one inside, to running a file from there, its capabilities
 *   /echo       the request's body (Content-Length only)
 *   /die        exits with code 7
 *   /hang       answers nothing more, anywhere
 *   /slow       answers after half a second
 *   /connect?1.2.3.4:80   "connected", or why it could not within two seconds
 *   /write?/a/file, /read?/a/file   what comes of it
 *   /list?/a/folder       the names in it
 *   /env?NAME   an environment variable
 *   /fill?/a/file   writes 4 MB more to a file
 *   /say?N      writes N lines of 100 bytes to its log
 *   /shm        the size of /dev/shm
 *   /fork       how many processes a fork bomb gets, and what stops it
 *   /grow       takes memory until it is stopped
 *
 * With the argument `exit` it says a word and ends at once; with `deaf` it never listens; with `sick` it answers 500;
 * with `stubborn` it does not listen to SIGTERM; with `leak` it answers, and takes memory until it is stopped. Called
 * as `nvidia-smi` it lists the GPUs its container was given; with SMI_HANGS in the environment it never ends.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <unistd.h>

static char request[1 << 20];
static const char *status = "200 OK";

static void answer(int client, const char *body, size_t size) {
    char head[200];
    int length = snprintf(head, sizeof head, "HTTP/1.1 %s\r\nContent-Length: %zu\r\nConnection: close\r\n\r\n", status, size);
    if (write(client, head, length) < 0 || write(client, body, size) < 0) return;
}

static const char *attempt(const char *path) {
    int file = open(path, O_CREAT | O_WRONLY, 0755);
    if (file < 0) return strerror(errno);
    close(file);
    return "written";
}

static void whoami(int client) {
    char body[2000], line[200], capabilities[200] = "?";
    FILE *status = fopen("/proc/self/status", "r");
    while (status && fgets(line, sizeof line, status))
        if (!strncmp(line, "CapEff:", 7)) strcpy(capabilities, line + 8);
    if (status) fclose(status);
    const char *outside = attempt("/outside"), *inside = attempt("/tmp/inside");
    execl("/tmp/inside", "inside", NULL);
    const char *run = strerror(errno);
    int size = snprintf(body, sizeof body, "uid=%d\nroot=%s\ntmp=%s\nexec=%s\ncaps=%s", getuid(), outside, inside, run,
                        capabilities);
    answer(client, body, size);
}

static const char *reach(char *place) {
    char *colon = strrchr(place, ':');
    if (!colon) return "no port";
    *colon = 0;
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(colon + 1))};
    if (inet_pton(AF_INET, place, &to.sin_addr) != 1) return "no address";
    int probe = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), error = 0;
    socklen_t size = sizeof error;
    struct pollfd wait = {.fd = probe, .events = POLLOUT};
    if (connect(probe, (struct sockaddr *)&to, sizeof to) && errno != EINPROGRESS) error = errno;
    else if (poll(&wait, 1, 2000) != 1) error = ETIMEDOUT;
    else getsockopt(probe, SOL_SOCKET, SO_ERROR, &error, &size);
    close(probe);
    return error ? strerror(error) : "connected";
}

static const char *contents(const char *path) {
    static char text[4096];
    int file = open(path, O_RDONLY);
    if (file < 0) return strerror(errno);
    ssize_t got = read(file, text, sizeof text - 1);
    close(file);
    if (got < 0) return strerror(errno);
    text[got] = 0;
    return text;
}

static const char *names(const char *path) {
    static char text[4096];
    DIR *folder = opendir(path);
    if (!folder) return strerror(errno);
    text[0] = 0;
    for (struct dirent *entry; (entry = readdir(folder));)
        if (entry->d_name[0] != '.' && strlen(text) + strlen(entry->d_name) + 2 < sizeof text)
            strcat(strcat(text, entry->d_name), " ");
    closedir(folder);
    return text;
}

static const char *fork_bomb(void) {
    static char text[200];
    int got = 0;
    pid_t children[20000];
    for (; got < 20000; got++) {
        children[got] = fork();
        if (children[got] < 0) break;
        if (!children[got]) for (;;) pause();
    }
    snprintf(text, sizeof text, "%d %s", got, got == 20000 ? "nothing" : strerror(errno));
    for (int i = 0; i < got; i++) kill(children[i], SIGKILL);
    while (wait(NULL) > 0);
    return text;
}

static void grow(void) {
    for (;;) {
        char *more = malloc(1 << 20);
        if (more) memset(more, 1, 1 << 20);
        usleep(1000);
    }
}

static const char *fill(const char *path) {
    static char block[1 << 20];
    int file = open(path, O_CREAT | O_WRONLY | O_APPEND, 0644);
    if (file < 0) return strerror(errno);
    memset(block, 'x', sizeof block);
    for (int number = 0; number < 4; number++)
        if (write(file, block, sizeof block) != sizeof block) return "not filled";
    fsync(file);
    close(file);
    return "filled";
}

static const char *say(int lines) {
    char line[101];
    for (int number = 0; number < lines; number++) {
        memset(line, '.', sizeof line - 1);
        line[snprintf(line, sizeof line, "line %d ", number)] = '.';
        line[99] = '\n';
        if (write(1, line, 100) != 100) return "not said";
    }
    return "said";
}

static int list_gpus(void) {
    if (getenv("SMI_HANGS")) for (;;) pause();
    const char *given = getenv("NVIDIA_VISIBLE_DEVICES");
    static char first[65536];
    if (!given) { /* a program the engine starts later does not get it: ask the first one's environment */
        int file = open("/proc/1/environ", O_RDONLY);
        ssize_t size = file < 0 ? 0 : read(file, first, sizeof first - 1);
        for (char *entry = first; entry < first + size; entry += strlen(entry) + 1)
            if (!strncmp(entry, "NVIDIA_VISIBLE_DEVICES=", 23)) given = entry + 23;
    }
    if (!given || getenv("NO_GPUS") || !access("/tmp/no-gpus", F_OK)) {
        puts("Failed to initialize NVML: Unknown Error");
        return 255;
    }
    char *list = strdup(given);
    int number = 0;
    for (char *uuid = strtok(list, ","); uuid; uuid = strtok(NULL, ","))
        printf("GPU %d: NVIDIA Fake (UUID: %s)\n", number++, uuid);
    return 0;
}

int main(int count, char **arguments) {
    setvbuf(stdout, NULL, _IONBF, 0);
    signal(SIGPIPE, SIG_IGN); /* whoever asked may be gone */
    if (strstr(arguments[0], "nvidia-smi")) return list_gpus();
    puts("hello from the workspace");
    if (count > 1 && !strcmp(arguments[1], "sick")) status = "500 Sick";
    if (count > 1 && !strcmp(arguments[1], "stubborn")) signal(SIGTERM, SIG_IGN);
    if (count > 1 && !strcmp(arguments[1], "leak") && fork()) grow();
    if (count > 1 && !strcmp(arguments[1], "exit")) {
        puts("I would rather not");
        return 3;
    }
    if (count > 1 && !strcmp(arguments[1], "deaf")) {
        for (;;) pause();
    }
    int server = socket(AF_INET, SOCK_STREAM, 0), yes = 1;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(8080)};
    setsockopt(server, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(server, (struct sockaddr *)&address, sizeof address) || listen(server, 64)) return 1;
    for (;;) {
        int client = accept(server, NULL, NULL);
        size_t have = 0, body = 0, wanted = 0;
        while (have < sizeof request - 1) {
            ssize_t got = read(client, request + have, sizeof request - 1 - have);
            if (got <= 0) break;
            have += got;
            request[have] = 0;
            char *end = strstr(request, "\r\n\r\n");
            if (!end) continue;
            body = end + 4 - request;
            for (char *line = request; line < end; line = strstr(line, "\r\n") + 2)
                if (!strncasecmp(line, "content-length:", 15)) wanted = atol(line + 15);
            if (have >= body + wanted) break;
        }
        char *path = strchr(request, ' ');
        if (path && !strncmp(path, " /die ", 6)) return 7;
        if (path && !strncmp(path, " /hang ", 7)) for (;;) pause();
        char *query = path ? strchr(path, '?') : NULL;
        if (query) *strchrnul(query, ' ') = 0, query++;
        const char *found = NULL;
        if (path && !strncmp(path, " /grow ", 7)) grow();
        if (path && !strncmp(path, " /slow ", 7)) usleep(500000);
        if (path && !strncmp(path, " /fork ", 7)) found = fork_bomb();
        if (path && !strncmp(path, " /shm ", 6)) {
            static char size[50];
            struct statvfs shm;
            statvfs("/dev/shm", &shm);
            snprintf(size, sizeof size, "%lu", (unsigned long)(shm.f_blocks * shm.f_frsize));
            found = size;
        }
        if (query && !strncmp(path, " /connect", 9)) found = reach(query);
        if (query && !strncmp(path, " /write", 7)) found = attempt(query);
        if (query && !strncmp(path, " /read", 6)) found = contents(query);
        if (query && !strncmp(path, " /list", 6)) found = names(query);
        if (query && !strncmp(path, " /fill", 6)) found = fill(query);
        if (query && !strncmp(path, " /say", 5)) found = say(atoi(query));
        if (query && !strncmp(path, " /env", 5)) found = getenv(query) ? getenv(query) : "";
        if (found) answer(client, found, strlen(found));
        else if (path && !strncmp(path, " /whoami ", 9)) whoami(client);
        else if (path && !strncmp(path, " /echo", 6)) answer(client, request + body, wanted);
        else {
            char text[200];
            const char *word = getenv("WORD");
            answer(client, text, snprintf(text, sizeof text, "ok %s", word ? word : ""));
        }
        close(client);
    }
}
