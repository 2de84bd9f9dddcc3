/* The loop of the load generator: connections begun when the schedule says so, answers read in between, on one thread.
 * It writes what happened when; the figures that follow from it are somebody else's. */
#define _GNU_SOURCE 1

#include "loadgen.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum {
    BATCH = 64,       /* arrivals begun, and events handled, before the other gets its turn */
    READS = 16,       /* buffers read from one connection in its turn */
    BUFFER = 1 << 16,
    REQUEST_MAX = 4096,
    SOURCES = 4096    /* each has all ports of its own: TIME_WAIT never takes the last one */
};
enum { FIRST, LATER, LISTS, NO_LIST = LISTS };
enum { SENDING, WAITING, THINKING };

static const int64_t LEAD = 20000000; /* from the end of the preparations to the start of the schedule */
static const int64_t NEVER = INT64_MAX;
static const uint64_t TIMER = UINT64_MAX, CONTROL = UINT64_MAX - 1;

/* One connection that is open. */
typedef struct {
    int fd;
    int phase;
    int watched; /* 0: not in the epoll set yet */
    int list, before, after;
    int64_t request, last; /* the request under way and the connection's last one, as places in the columns */
    size_t sent;
    flg_parser parser;
} connection;

typedef struct {
    int64_t due, request;
    int slot;
} thought;

typedef struct {
    const flg_load *load;
    int64_t *board;
    int64_t *scheduled, *begun, *connected, *answered, *outcome, *worker, *accepted, *started, *free, *drawn;
    int64_t total, over, next; /* requests, requests that are over, the connection to begin next */
    int epoll, timer;
    int64_t armed;
    int failure;

    connection *slots;
    int *unused, unused_count, fresh, slot_count; /* slots from `fresh` on were never touched */

    /* Every request has the same timeout, so a list in the order of the schedule is in the order of the deadlines. Requests on
     * open connections are scheduled when they begin: among the first ones they would be out of order whenever those are late. */
    int head[LISTS], tail[LISTS];

    thought *thoughts; /* a heap, the next one due first; those whose connection has ended since are left in it */
    int thought_count;

    int64_t *idle; /* closed loop: a ring of the instants since when clients have nothing to do */
    int64_t idle_first, idle_count;

    int closing[BATCH], closing_count, in_batch;

    struct sockaddr_storage target;
    socklen_t target_size;
    int sources;
    char request[REQUEST_MAX];
    char buffer[BUFFER];
} run;

static int64_t now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (int64_t)at.tv_sec * 1000000000 + at.tv_nsec;
}

static int64_t processor_time(void) {
    struct timespec used;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &used);
    return (int64_t)used.tv_sec * 1000000000 + used.tv_nsec;
}

int flg_outcome_of(int error) {
    switch (error) {
    case ECONNREFUSED:
    case ENETUNREACH: /* no answer came from there, but the verdict is as quick and as final */
    case EHOSTUNREACH:
    case ENETDOWN:
    case EHOSTDOWN:
    case EACCES: /* a firewall's word */
    case EPERM:
        return FLG_REFUSED;
    case ECONNRESET:
    case ECONNABORTED:
    case EPIPE:
        return FLG_RESET_BEFORE_ACCEPT;
    case ETIMEDOUT:
        return FLG_TIMEOUT;
    case EADDRNOTAVAIL:
    case EADDRINUSE:
    case EAGAIN: /* of connect: no port is left */
        return FLG_NO_PORT;
    case EMFILE:
    case ENFILE:
    case ENOBUFS:
    case ENOMEM:
        return FLG_NO_DESCRIPTOR;
    default:
        return -error;
    }
}

static int is_first(const run *r, const connection *conn) { return conn->request == conn->last - r->load->requests + 1; }

/* ---------------------------------------------------------------- deadlines and thoughts */

static void enlist(run *r, int slot, int list) {
    connection *conn = &r->slots[slot];
    conn->list = list;
    conn->after = -1;
    conn->before = r->tail[list];
    if (conn->before >= 0)
        r->slots[conn->before].after = slot;
    else
        r->head[list] = slot;
    r->tail[list] = slot;
}

static void delist(run *r, int slot) {
    connection *conn = &r->slots[slot];
    if (conn->list == NO_LIST)
        return;
    if (conn->before >= 0)
        r->slots[conn->before].after = conn->after;
    else
        r->head[conn->list] = conn->after;
    if (conn->after >= 0)
        r->slots[conn->after].before = conn->before;
    else
        r->tail[conn->list] = conn->before;
    conn->list = NO_LIST;
}

static int64_t deadline(const run *r, int list) {
    int slot = r->head[list];
    return slot < 0 ? NEVER : r->scheduled[r->slots[slot].request] + r->load->timeout;
}

static void think(run *r, thought entry) {
    int at = r->thought_count++, above;
    for (; at > 0; at = above) {
        above = (at - 1) / 2;
        if (r->thoughts[above].due <= entry.due)
            break;
        r->thoughts[at] = r->thoughts[above];
    }
    r->thoughts[at] = entry;
}

static thought next_thought(run *r) {
    thought first = r->thoughts[0], last = r->thoughts[--r->thought_count];
    int at = 0, below;
    for (; (below = 2 * at + 1) < r->thought_count; at = below) {
        if (below + 1 < r->thought_count && r->thoughts[below + 1].due < r->thoughts[below].due)
            below++;
        if (last.due <= r->thoughts[below].due)
            break;
        r->thoughts[at] = r->thoughts[below];
    }
    r->thoughts[at] = last;
    return first;
}

/* ---------------------------------------------------------------- how requests end */

static void over(run *r, int64_t request, int64_t at, int outcome) {
    r->answered[request] = at;
    r->outcome[request] = outcome;
    __atomic_store_n(&r->board[FLG_OVER], ++r->over, __ATOMIC_RELAXED);
}

/* The requests first..last of one connection, none of which will be made any more. */
static void all_over(run *r, int64_t first, int64_t last, int64_t at, int outcome) {
    for (; first <= last; first++)
        over(r, first, at, outcome);
    if (r->load->clients)
        r->idle[(r->idle_first + r->idle_count++) % r->load->clients] = at;
}

/* Ends a connection. Ownership: consumes its descriptor, at the end of the batch when there is one: to close costs more than to
 * read, and the answers behind it in the batch wait for their time of arrival. */
static void finish(run *r, int slot, int64_t first, int64_t at, int outcome) {
    connection *conn = &r->slots[slot];
    delist(r, slot);
    if (r->in_batch)
        r->closing[r->closing_count++] = conn->fd;
    else
        close(conn->fd);
    conn->fd = -1;
    r->unused[r->unused_count++] = slot;
    all_over(r, first, conn->last, at, outcome);
}

/* ---------------------------------------------------------------- sending */

static size_t compose(run *r, const connection *conn) {
    static const char close_it[] = "\r\nConnection: close\r\n\r\n", keep_it[] = "\r\nConnection: keep-alive\r\n\r\n";
    char digits[20], *to = r->request + r->load->head_size;
    uint64_t left = (uint64_t)r->drawn[conn->request];
    size_t count = 0, size;
    if (r->load->protocol == FLG_TCP)
        return r->load->head_size;
    do
        digits[count++] = (char)('0' + left % 10);
    while (left /= 10);
    while (count)
        *to++ = digits[--count];
    size = conn->request == conn->last ? sizeof close_it - 1 : sizeof keep_it - 1;
    memcpy(to, conn->request == conn->last ? close_it : keep_it, size);
    return (size_t)(to - r->request) + size;
}

static void watch(run *r, int slot, uint32_t events) {
    connection *conn = &r->slots[slot];
    struct epoll_event event = {.events = events, .data = {.u64 = (uint64_t)slot}};
    if (epoll_ctl(r->epoll, conn->watched ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, conn->fd, &event) < 0) {
        if (errno == ENOSPC || errno == ENOMEM)
            finish(r, slot, conn->request, now(), FLG_NO_DESCRIPTOR); /* max_user_watches: as much a limit as the table's */
        else
            r->failure = -errno;
        return;
    }
    conn->watched = 1;
}

static void transmit(run *r, int slot) {
    connection *conn = &r->slots[slot];
    size_t size = compose(r, conn);
    ssize_t sent = send(conn->fd, r->request + conn->sent, size - conn->sent, MSG_NOSIGNAL);
    int first = is_first(r, conn), phase = conn->phase, outcome;
    if (sent < 0 && errno != EAGAIN && errno != ENOTCONN && errno != EINTR) {
        outcome = flg_outcome_of(errno);
        if (outcome < 0 || !first)
            outcome = first ? FLG_RESET_BEFORE_ACCEPT : FLG_RESET_AFTER_ACCEPT;
        finish(r, slot, conn->request, now(), outcome);
        return;
    }
    if (sent > 0) {
        if (!conn->sent && first)
            r->connected[conn->request] = now();
        conn->sent += (size_t)sent;
    }
    conn->phase = conn->sent == size ? WAITING : SENDING;
    /* A connection over the loopback is made when connect() returns, though it says EINPROGRESS: most are watched once. */
    if (!conn->watched || conn->phase != phase)
        watch(r, slot, conn->phase == WAITING ? EPOLLIN : EPOLLOUT);
}

static void source_of(const run *r, struct sockaddr_in *source) {
    memset(source, 0, sizeof *source);
    source->sin_family = AF_INET;
    source->sin_addr.s_addr = htonl(0x7f800001u + (uint32_t)(r->next % SOURCES));
}

/* Begins the connection r->next. */
static void begin(run *r) {
    static const int on = 1;
    int64_t first = r->next * r->load->requests, last = first + r->load->requests - 1, at = now();
    int fd = socket(r->target.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), slot, outcome;
    connection *conn;
    r->begun[first] = at;
    if (fd >= 0 && !r->unused_count && r->fresh == r->slot_count) {
        /* More than the limit on descriptors was when the run began. */
        close(fd);
        errno = EMFILE;
        fd = -1;
    }
    if (fd < 0)
        goto fail;
    if (r->sources) {
        struct sockaddr_in source;
        source_of(r, &source);
        /* Without the option bind() would look for a port that is free for every target. */
        if (setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on) < 0 ||
            bind(fd, (struct sockaddr *)&source, sizeof source) < 0)
            goto fail;
    }
    if (connect(fd, (struct sockaddr *)&r->target, r->target_size) < 0 && errno != EINPROGRESS && errno != EINTR)
        goto fail;
    r->next++;
    slot = r->unused_count ? r->unused[--r->unused_count] : r->fresh++;
    conn = &r->slots[slot];
    conn->fd = fd;
    conn->phase = SENDING;
    conn->watched = 0;
    conn->request = first;
    conn->last = last;
    conn->sent = 0;
    flg_parse_begin(&conn->parser);
    enlist(r, slot, FIRST);
    transmit(r, slot);
    return;
fail:
    outcome = flg_outcome_of(errno);
    if (fd >= 0)
        close(fd);
    if (outcome < 0) {
        r->failure = outcome;
        return;
    }
    r->next++;
    all_over(r, first, last, now(), outcome);
}

/* Begins the next request of an open connection; its place in the columns was moved on to already. */
static void begin_later(run *r, int slot) {
    connection *conn = &r->slots[slot];
    r->begun[conn->request] = r->connected[conn->request] = now();
    conn->phase = WAITING; /* as far as the epoll set knows */
    conn->sent = 0;
    flg_parse_begin(&conn->parser);
    enlist(r, slot, LATER);
    transmit(r, slot);
}

/* ---------------------------------------------------------------- receiving */

static void answered(run *r, int slot, int64_t at, int outcome, int surplus) {
    connection *conn = &r->slots[slot];
    int64_t found[4], request = conn->request;
    if (r->load->protocol == FLG_HTTP && flg_parse_body(&conn->parser, found)) {
        r->worker[request] = found[0];
        r->accepted[request] = found[1];
        r->started[request] = found[2];
        r->free[request] = found[3];
    }
    if (request == conn->last) {
        finish(r, slot, request, at, outcome);
        return;
    }
    delist(r, slot);
    over(r, request, at, outcome);
    conn->request++;
    if (surplus || !conn->parser.keep) {
        finish(r, slot, conn->request, at, surplus ? FLG_BAD_ANSWER : FLG_RESET_AFTER_ACCEPT);
        return;
    }
    r->scheduled[conn->request] += at; /* the think time stood there */
    if (r->load->think > 0) {
        thought entry = {.due = r->scheduled[conn->request], .request = conn->request, .slot = slot};
        conn->phase = THINKING;
        think(r, entry);
    } else
        begin_later(r, slot);
}

static void receive(run *r, int slot) {
    connection *conn = &r->slots[slot];
    int first = is_first(r, conn), reads, result;
    ssize_t got;
    size_t used;
    for (reads = 0; reads < READS; reads++) {
        got = recv(conn->fd, r->buffer, BUFFER, 0);
        if (got < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        if (conn->phase == THINKING) {
            /* Nothing was asked for: an end is an orderly close between two answers. */
            finish(r, slot, conn->request, now(), got > 0 ? FLG_BAD_ANSWER : FLG_RESET_AFTER_ACCEPT);
            return;
        }
        if (got < 0) {
            int cut = first && !conn->parser.seen ? FLG_RESET_BEFORE_ACCEPT : FLG_RESET_AFTER_ACCEPT;
            finish(r, slot, conn->request, now(), errno == ETIMEDOUT ? FLG_TIMEOUT : cut);
            return;
        }
        if (r->load->protocol == FLG_TCP) {
            answered(r, slot, now(), FLG_OK, 0);
            return;
        }
        if (got == 0) {
            result = flg_parse_end(&conn->parser);
            if (result == FLG_MORE) {
                finish(r, slot, conn->request, now(), FLG_RESET_AFTER_ACCEPT);
                return;
            }
            used = 0;
        } else
            result = flg_parse(&conn->parser, r->buffer, (size_t)got, &used);
        if (result == FLG_BAD) {
            finish(r, slot, conn->request, now(), FLG_BAD_ANSWER);
            return;
        }
        if (result == FLG_DONE) {
            answered(r, slot, now(), conn->parser.status < 400 ? FLG_OK : FLG_BAD_ANSWER, (size_t)got > used);
            return;
        }
        if (got < BUFFER)
            return;
    }
}

/* ---------------------------------------------------------------- the loop */

static int64_t next_arrival(const run *r) {
    if (r->next == r->load->connections)
        return NEVER;
    if (r->load->clients)
        return r->idle_count ? r->idle[r->idle_first] : NEVER;
    return r->scheduled[r->next * r->load->requests];
}

/* Begins what is due, a batch at most; returns when the next is. */
static int64_t begin_due(run *r) {
    int64_t at = now(), arrival = next_arrival(r);
    int left = BATCH;
    while (arrival <= at && left-- && !r->failure) {
        if (r->load->clients) {
            r->scheduled[r->next * r->load->requests] = arrival;
            r->idle_first = (r->idle_first + 1) % r->load->clients;
            r->idle_count--;
        }
        begin(r);
        at = now();
        arrival = next_arrival(r);
    }
    left = BATCH;
    while (r->thought_count && r->thoughts[0].due <= at && left-- && !r->failure) {
        thought entry = next_thought(r);
        connection *conn = &r->slots[entry.slot];
        /* Closed meanwhile, the slot is free or another connection's. */
        if (conn->fd >= 0 && conn->phase == THINKING && conn->request == entry.request)
            begin_later(r, entry.slot);
    }
    return r->thought_count && r->thoughts[0].due < arrival ? r->thoughts[0].due : arrival;
}

/* Gives up what is late; returns when the next will be. */
static int64_t expire(run *r) {
    int64_t at = now(), earliest = NEVER;
    int list, slot;
    for (list = 0; list < LISTS; list++) {
        while (deadline(r, list) <= at) {
            slot = r->head[list];
            finish(r, slot, r->slots[slot].request, at, FLG_TIMEOUT);
        }
        if (deadline(r, list) < earliest)
            earliest = deadline(r, list);
    }
    return earliest;
}

/* Arms the timer for an instant, unless it will go off before that anyway. */
static int arm(run *r, int64_t instant) {
    struct itimerspec when;
    if (instant >= r->armed)
        return 0;
    memset(&when, 0, sizeof when);
    when.it_value.tv_sec = (time_t)(instant / 1000000000);
    when.it_value.tv_nsec = (long)(instant % 1000000000);
    r->armed = instant;
    return timerfd_settime(r->timer, TFD_TIMER_ABSTIME, &when, NULL) < 0 ? -errno : 0;
}

static int loop(run *r) {
    struct epoll_event events[BATCH];
    int count, i, stopped = 0, result;
    while (r->over < r->total && !stopped && !r->failure) {
        int64_t due = begin_due(r), late = expire(r), first = due < late ? due : late;
        int waits = first > now();
        if (r->over == r->total || r->failure)
            break;
        if (waits && (result = arm(r, first)) < 0)
            return result;
        count = epoll_wait(r->epoll, events, BATCH, waits ? -1 : 0);
        if (count < 0) {
            if (errno == EINTR)
                continue; /* stopped and continued: no handler is waiting to be run */
            return -errno;
        }
        r->in_batch = 1;
        for (i = 0; i < count && !r->failure; i++) {
            if (events[i].data.u64 == TIMER)
                r->armed = NEVER;
            else if (events[i].data.u64 == CONTROL)
                stopped = 1;
            else if (r->slots[events[i].data.u64].phase == SENDING)
                transmit(r, (int)events[i].data.u64);
            else
                receive(r, (int)events[i].data.u64);
        }
        r->in_batch = 0;
        while (r->closing_count)
            close(r->closing[--r->closing_count]);
    }
    return r->failure ? r->failure : r->over < r->total;
}

static void set_target(run *r) {
    const flg_load *load = r->load;
    if (load->ipv6) {
        struct sockaddr_in6 *target = (struct sockaddr_in6 *)&r->target;
        target->sin6_family = AF_INET6;
        target->sin6_port = htons((uint16_t)load->port);
        memcpy(&target->sin6_addr, load->address, 16);
        r->target_size = sizeof *target;
    } else {
        struct sockaddr_in *target = (struct sockaddr_in *)&r->target;
        target->sin_family = AF_INET;
        target->sin_port = htons((uint16_t)load->port);
        memcpy(&target->sin_addr, load->address, 4);
        r->target_size = sizeof *target;
    }
    r->sources = load->sources && !load->ipv6 && load->address[0] == 127;
}

static int prepare(run *r, int control) {
    struct epoll_event event = {.events = EPOLLIN, .data = {.u64 = CONTROL}};
    const flg_load *load = r->load;
    struct rlimit limit;
    int64_t most = load->clients && load->clients < load->connections ? load->clients : load->connections;
    if (load->connections < 1 || load->requests < 1 || load->head_size + 64 > REQUEST_MAX)
        return -EINVAL;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < (rlim_t)most)
        most = (int64_t)limit.rlim_cur;
    if (most > INT32_MAX / 4)
        return -EINVAL;
    r->slot_count = (int)most;
    /* calloc: memory that no connection comes to use is never touched. One thought for each request that may be thought about,
     * as those of ended connections stay in the heap. */
    r->slots = calloc((size_t)most, sizeof *r->slots);
    r->unused = calloc((size_t)most, sizeof *r->unused);
    r->thoughts = load->think > 0 && load->requests > 1 ? calloc((size_t)r->total, sizeof *r->thoughts) : NULL;
    r->idle = load->clients ? calloc((size_t)load->clients, sizeof *r->idle) : NULL;
    if (!r->slots || !r->unused || (load->clients && !r->idle) || (load->think > 0 && load->requests > 1 && !r->thoughts))
        return -ENOMEM;
    if ((r->epoll = epoll_create1(EPOLL_CLOEXEC)) < 0)
        return -errno;
    if ((r->timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK)) < 0)
        return -errno;
    if (control >= 0 && epoll_ctl(r->epoll, EPOLL_CTL_ADD, control, &event) < 0)
        return -errno;
    /* On the edge: each expiry is one event, and nobody has to read the timer. */
    event.events = EPOLLIN | EPOLLET;
    event.data.u64 = TIMER;
    if (epoll_ctl(r->epoll, EPOLL_CTL_ADD, r->timer, &event) < 0)
        return -errno;
    return flg_timer_slack(1);
}

int flg_run(const flg_load *load, int64_t *board, int control) {
    int64_t used = processor_time(), i, *columns = board + FLG_HEADER;
    int result;
    run *r = calloc(1, sizeof *r);
    if (!r)
        return -ENOMEM;
    r->load = load;
    r->board = board;
    r->total = load->connections * load->requests;
    r->epoll = r->timer = -1;
    r->armed = NEVER;
    r->head[FIRST] = r->head[LATER] = r->tail[FIRST] = r->tail[LATER] = -1;
    r->scheduled = columns + FLG_SCHEDULED * r->total;
    r->begun = columns + FLG_BEGUN * r->total;
    r->connected = columns + FLG_CONNECTED * r->total;
    r->answered = columns + FLG_ANSWERED * r->total;
    r->outcome = columns + FLG_OUTCOME * r->total;
    r->worker = columns + FLG_WORKER * r->total;
    r->accepted = columns + FLG_ACCEPTED * r->total;
    r->started = columns + FLG_STARTED * r->total;
    r->free = columns + FLG_FREE * r->total;
    r->drawn = columns + FLG_DRAWN * r->total;
    if ((result = prepare(r, control)) < 0)
        goto done;
    set_target(r);
    memcpy(r->request, load->head, load->head_size);
    flg_schedule(load, r->scheduled, r->drawn);
    for (i = 0; i < r->total; i++)
        r->outcome[i] = r->worker[i] = -1;
    board[FLG_BEGAN] = now() + LEAD;
    for (i = 0; i < r->total; i += load->requests)
        r->scheduled[i] += board[FLG_BEGAN];
    for (; r->idle_count < load->clients; r->idle_count++)
        r->idle[r->idle_count] = board[FLG_BEGAN];
    result = loop(r);
    board[FLG_ENDED] = now();
    /* What waits for an answer or for a client, and was never begun, was never scheduled either: a think time may stand there. */
    for (i = 0; i < r->total; i++)
        if (!r->begun[i] && (load->clients || i % load->requests))
            r->scheduled[i] = 0;
    for (i = 0; i < r->fresh; i++)
        if (r->slots[i].fd >= 0)
            close(r->slots[i].fd);
done:
    if (r->timer >= 0)
        close(r->timer);
    if (r->epoll >= 0)
        close(r->epoll);
    free(r->slots);
    free(r->unused);
    free(r->thoughts);
    free(r->idle);
    free(r);
    board[FLG_CPU] = processor_time() - used;
    return result;
}
