/* The smallest workspace: one static program that is an HTTP server and can misbehave on request.
 *
 *   /           200, "ok <what WORD in its environment says>"
 *   /whoami     uid, what happens to a write outside /tmp, to one inside, to running a file from there, its capabilities
 *   /echo       the request's body (Content-Length only)
 *   /die        exits with code 7
 *   /hang       answers nothing more, anywhere
 *
 * With the argument `exit` it says a word and ends at once; with `deaf` it never listens.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

static char request[1 << 20];

static void answer(int client, const char *body, size_t size) {
    char head[200];
    int length = snprintf(head, sizeof head, "HTTP/1.1 200 OK\r\nContent-Length: %zu\r\nConnection: close\r\n\r\n", size);
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

int main(int count, char **arguments) {
    setvbuf(stdout, NULL, _IONBF, 0);
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
        if (path && !strncmp(path, " /whoami ", 9)) whoami(client);
        else if (path && !strncmp(path, " /echo", 6)) answer(client, request + body, wanted);
        else {
            char text[200];
            const char *word = getenv("WORD");
            answer(client, text, snprintf(text, sizeof text, "ok %s", word ? word : ""));
        }
        close(client);
    }
}
