/* A server that does nothing: it answers each HTTP request the moment it is read. What a load generator can reach at most. */
#define _GNU_SOURCE 1

#include "loadgen.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { BATCH = 64, REQUEST_MAX = 8192 };

/* A connection that has to be waited for; most are answered and closed as soon as they are accepted. */
typedef struct client {
    int fd;
    size_t size;
    struct client *before, *after;
    char data[REQUEST_MAX];
} client;

typedef struct {
    int epoll, listener;
    int full; /* 1: no descriptor was left for the next connection; the listener is not watched until one is closed */
    client all; /* the ring of those that are open */
    char data[REQUEST_MAX];
} server;

static const char KEEP[] = "HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\nfdpass 0 0 0 0\n";
static const char CLOSE[] = "HTTP/1.1 200 OK\r\nContent-Length: 15\r\nConnection: close\r\n\r\nfdpass 0 0 0 0\n";

/* 1 when the request asks for the connection's end. */
static int is_last(const char *head, const char *end) {
    static const char name[] = "\r\nConnection:";
    const char *at;
    for (at = head; (at = memmem(at, (size_t)(end - at), "\r\n", 2)) != NULL; at += 2) {
        if ((size_t)(end - at) < sizeof name - 1 || strncasecmp(at, name, sizeof name - 1))
            continue;
        for (at += sizeof name - 1; at < end && *at == ' ';)
            at++;
        return end - at >= 5 && !strncasecmp(at, "close", 5);
    }
    /* What says nothing is kept, unless it is of the older protocol. */
    at = memmem(head, (size_t)(end - head), "\r\n", 2);
    return at && at - head >= 8 && !memcmp(at - 8, "HTTP/1.0", 8);
}

/* Answers the whole requests in data; returns the bytes that belong to the next one, moved to its start, or -1 to close. */
static ssize_t answer(int fd, char *data, size_t size) {
    char *at = data, *end;
    while ((end = memmem(at, size - (size_t)(at - data), "\r\n\r\n", 4)) != NULL) {
        int last = is_last(at, end + 2);
        size_t length = last ? sizeof CLOSE - 1 : sizeof KEEP - 1;
        /* A client whose receive buffer is full does not read its answers: it is let go. */
        if (send(fd, last ? CLOSE : KEEP, length, MSG_NOSIGNAL) != (ssize_t)length || last)
            return -1;
        at = end + 4;
    }
    size -= (size_t)(at - data);
    memmove(data, at, size);
    return size == REQUEST_MAX ? -1 : (ssize_t)size;
}

static int watch_listener(server *s, int on) {
    struct epoll_event event = {.events = on ? EPOLLIN : 0, .data = {.ptr = &s->all}};
    s->full = !on;
    return epoll_ctl(s->epoll, EPOLL_CTL_MOD, s->listener, &event) < 0 ? -errno : 0;
}

/* Ownership: consumes the client and its descriptor. */
static void let_go(client *one) {
    one->before->after = one->after;
    one->after->before = one->before;
    close(one->fd);
    free(one);
}

/* Ownership: consumes fd: closed on return, or held by a client in the ring. */
static void welcome(server *s, int fd) {
    ssize_t got = recv(fd, s->data, REQUEST_MAX, 0), kept = 0;
    struct epoll_event event = {.events = EPOLLIN, .data = {.ptr = NULL}};
    client *one;
    if (got > 0 ? (kept = answer(fd, s->data, (size_t)got)) < 0 : got == 0 || errno != EAGAIN)
        goto done;
    if (!(one = malloc(sizeof *one)))
        goto done;
    event.data.ptr = one;
    if (epoll_ctl(s->epoll, EPOLL_CTL_ADD, fd, &event) < 0) {
        free(one);
        goto done;
    }
    one->fd = fd;
    one->size = (size_t)kept;
    memcpy(one->data, s->data, (size_t)kept);
    one->before = &s->all;
    one->after = s->all.after;
    one->after->before = one;
    s->all.after = one;
    return;
done:
    close(fd);
}

static int welcome_all(server *s) {
    int i, fd;
    for (i = 0; i < BATCH; i++) {
        fd = accept4(s->listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0 && (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM))
            /* With none to close there is nothing to wait for. */
            return s->all.after == &s->all ? -errno : watch_listener(s, 0);
        if (fd < 0)
            /* A connection may be gone before it is accepted: its network's errors are its own. */
            return errno == EBADF || errno == EINVAL || errno == ENOTSOCK || errno == EOPNOTSUPP ? -errno : 0;
        welcome(s, fd);
    }
    return 0;
}

/* Returns 1 when the client is gone. */
static int serve(client *one) {
    ssize_t got = recv(one->fd, one->data + one->size, REQUEST_MAX - one->size, 0), kept;
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return 0;
    if (got > 0 && (kept = answer(one->fd, one->data, one->size + (size_t)got)) >= 0) {
        one->size = (size_t)kept;
        return 0;
    }
    let_go(one);
    return 1;
}

int flg_null_server(int listener, int control) {
    struct epoll_event events[BATCH], event = {.events = EPOLLIN, .data = {.ptr = NULL}};
    int flags = fcntl(listener, F_GETFL), result = 0, count, i, gone;
    server *s;
    if (flags < 0 || fcntl(listener, F_SETFL, flags | O_NONBLOCK) < 0)
        return -errno;
    if (!(s = calloc(1, sizeof *s)))
        return -ENOMEM;
    s->listener = listener;
    s->all.before = s->all.after = &s->all;
    if ((s->epoll = epoll_create1(EPOLL_CLOEXEC)) < 0 || epoll_ctl(s->epoll, EPOLL_CTL_ADD, control, &event) < 0)
        result = -errno;
    event.data.ptr = &s->all;
    if (!result && epoll_ctl(s->epoll, EPOLL_CTL_ADD, listener, &event) < 0)
        result = -errno;
    while (!result) {
        if ((count = epoll_wait(s->epoll, events, BATCH, -1)) < 0) {
            if (errno == EINTR)
                continue; /* stopped and continued: no handler is waiting to be run */
            result = -errno;
        }
        for (i = gone = 0; i < count && result >= 0; i++) {
            if (!events[i].data.ptr)
                result = 1;
            else if (events[i].data.ptr == &s->all)
                result = result ? result : welcome_all(s);
            else
                gone += serve(events[i].data.ptr);
        }
        if (gone && s->full && result >= 0 && (i = watch_listener(s, 1)) < 0)
            result = i;
    }
    while (s->all.after != &s->all)
        let_go(s->all.after);
    if (s->epoll >= 0)
        close(s->epoll);
    free(s);
    return result < 0 ? result : 0;
}
