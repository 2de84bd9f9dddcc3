/* Connections of one listening socket given to the workers that ask for them: the thread that does it, and the two calls of a worker.
 * What a worker has not received lies in a socket of which the dispatcher holds a duplicate, and is taken back from there. */
#define _GNU_SOURCE 1

#include "platform.h"

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum {
    BATCH = 64,         /* connections given in one round, so that the death of a worker is not overlooked for long */
    FULL_MS = 50,       /* how long the listener is left alone while the process has no free number */
    SHUT_MS = 1000,     /* and while it does not listen */
    LOOK_MS = 5,        /* how long a connection waits for a worker that has less load than those that ask */
    AGAIN_MS = 5,       /* when a message is tried again for which the system had no room */
    PATIENCE_MS = 100,  /* how long a connection may lie unreceived while another worker asks for one */
    SLOW_MS = 1000,     /* how long a worker that left one lying is passed over */
    BEAT_MS = 10,       /* how often it is looked at meanwhile */
    DEAF_MS = 50,       /* how long a worker that sends more than it should is not listened to */
    FLOOD = 64,         /* bytes at once that no worker of ours sends */
    FIRST_SIZE = 16,
    NONE = -1
};

/* FREE: nobody. LIVE: gets connections. RETIRED: gets no more. GONE: its process has ended, what it had not received is not all back. */
enum phase { FREE, LIVE, RETIRED, GONE };

struct line {
    enum phase phase;
    int ours, theirs;   /* our end, and a duplicate of the worker's, in which lies what it has not received */
    int pidfd;
    long long sent;     /* connections that it was given and that were not taken back */
    long long base;     /* its ACCEPTED when it was attached: what is above is what it received */
    long long seen, since; /* received when we last looked; ns: since when it has had something unreceived without receiving any */
    long long ignored;  /* its ASKED when a connection had waited for it in vain; until it asks again nothing waits for it */
    long long slow;     /* ns: until when it is passed over, unless it shows before that it runs */
    long long beat;     /* its HEARTBEAT when that began */
    long long deaf;     /* ns: until when its bytes are not read */
};

struct fdp_dispatcher {
    pthread_mutex_t lock;
    pthread_t thread;
    int running, stopping;
    int listener, wake[2];
    int reserve;        /* a number for one connection in a process that has none left: giving it away frees it again */
    long long *board;
    size_t board_size;
    int lines, order, credits;
    int last;           /* who got the last one */
    unsigned int changes; /* of who holds which descriptors: what poll says of earlier ones is void */
    struct line *line;
    struct pollfd *polled;
    int *who;           /* whose each polled descriptor is, from the third on */
    int *pending;       /* connections that were taken back, the oldest first */
    int pendings, pending_size;
    long long paused;   /* ns: until when the listener is left alone */
    long long held;     /* ns: until when nothing is sent */
    long long patience; /* ns: until when the next connection waits for somebody with less load, 0: it does not */
    long long again;    /* ns: when lines that could not be emptied are tried again */
    fdp_dispatch_stats stats;
    struct fdp_dispatcher *next;
};

/* Every dispatcher, for a fork. Taken before the lock of any of them. */
static pthread_mutex_t registry = PTHREAD_MUTEX_INITIALIZER;
static struct fdp_dispatcher *all;
static int hooked;

static long long now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (long long)now.tv_sec * 1000000000 + now.tv_nsec;
}

static long long ms(long long count) { return count * 1000000; }

static void close_one(int *fd) {
    if (*fd != NONE)
        close(*fd);
    *fd = NONE;
}

/* -- the board ------------------------------------------------------------------------------------------------------------- */

static long long *word(const struct fdp_dispatcher *d, int line, int which) { return d->board + line * FDP_WORDS + which; }

static long long read_word(const struct fdp_dispatcher *d, int line, int which) {
    return __atomic_load_n(word(d, line, which), __ATOMIC_SEQ_CST);
}

static void write_word(struct fdp_dispatcher *d, int line, int which, long long value) {
    __atomic_store_n(word(d, line, which), value, __ATOMIC_SEQ_CST);
}

/* Unsigned: a worker may have written anything at all. */
static long long difference(long long more, long long less) { return (long long)((unsigned long long)more - (unsigned long long)less); }

static long long received(const struct fdp_dispatcher *d, int at) { return difference(read_word(d, at, FDP_ACCEPTED), d->line[at].base); }

/* Sent and not received, by what the worker says. */
static long long outstanding(const struct fdp_dispatcher *d, int at) {
    long long count = difference(d->line[at].sent, received(d, at));
    return count < 0 ? 0 : count;
}

/* Whether a worker left one lying and has not been seen to run since. A busy machine may keep one waiting that is well. */
static int passed_over(const struct fdp_dispatcher *d, int at, long long now) {
    return d->line[at].slow > now && read_word(d, at, FDP_HEARTBEAT) == d->line[at].beat;
}

static void pass_over(struct fdp_dispatcher *d, int at, long long now) {
    d->line[at].slow = now + ms(SLOW_MS);
    d->line[at].beat = read_word(d, at, FDP_HEARTBEAT);
}

static int asks(const struct fdp_dispatcher *d, int at, long long now) {
    const struct line *line = &d->line[at];
    /* ASKED is read first: a worker counts what it received before it asks for more. */
    return line->phase == LIVE && !passed_over(d, at, now) && line->sent < read_word(d, at, FDP_ASKED) && outstanding(d, at) < d->credits;
}

static long long load(const struct fdp_dispatcher *d, int at) {
    long long said = read_word(d, at, FDP_LOAD), open = read_word(d, at, FDP_OPEN);
    open = said > 0 ? said - 1 : open;
    /* Whatever a worker writes there, the sum does not overflow. */
    return (open < 0 ? 0 : open > INT_MAX ? INT_MAX : open) + outstanding(d, at);
}

/* Whether it may be worth waiting for this worker, which does not ask now. */
static int may_ask(const struct fdp_dispatcher *d, int at, long long now) {
    long long asked = read_word(d, at, FDP_ASKED);
    return d->line[at].phase == LIVE && !passed_over(d, at, now) && asked > 0 && asked != d->line[at].ignored;
}

/* Who gets the next connection: of those that ask, from the one behind the last on, the first or the least loaded. *above: that one's
 * load is above the band of somebody who does not ask now and may soon, so that a burst does not all go to the quickest. */
static int choose(const struct fdp_dispatcher *d, long long now, int *above) {
    int step, at, best = NONE;
    long long least = 0, lightest = LLONG_MAX, this;
    *above = 0;
    for (step = 1; step <= d->lines; step++) {
        at = (d->last + step) % d->lines;
        if (d->order == FDP_ROUND_ROBIN) {
            if (asks(d, at, now))
                return at;
            continue;
        }
        if (d->line[at].phase != LIVE)
            continue;
        this = load(d, at);
        if (asks(d, at, now)) {
            if (best == NONE || this < least) {
                best = at;
                least = this;
            }
        } else if (this < lightest && may_ask(d, at, now)) {
            lightest = this;
        }
    }
    *above = best != NONE && lightest != LLONG_MAX && least > lightest + 1 + lightest / 128;
    return best;
}

/* Whether somebody can be given a connection now. */
static int ready(const struct fdp_dispatcher *d, long long now) {
    int above;
    return choose(d, now, &above) != NONE && !(above && d->patience > now);
}

/* -- connections in hand --------------------------------------------------------------------------------------------------- */

static void take_reserve(struct fdp_dispatcher *d) {
    if (d->reserve == NONE && (d->reserve = fdp_dup(d->wake[0])) < 0)
        d->reserve = NONE;
}

/* Room for one more. */
static int grow(struct fdp_dispatcher *d) {
    int size = d->pending_size ? 2 * d->pending_size : FIRST_SIZE, *more;
    if (d->pendings < d->pending_size)
        return 0;
    if (!(more = realloc(d->pending, sizeof *more * (size_t)size)))
        return -ENOMEM;
    d->pending = more;
    d->pending_size = size;
    return 0;
}

/* Takes back what a worker has not received. Returns 0, or -1 when some may be left, because something is short.
 * Ownership: what is taken becomes pending. */
static int take_back(struct fdp_dispatcher *d, int at, unsigned long long *count) {
    struct line *line = &d->line[at];
    fdp_message message;
    ssize_t got;
    char byte;
    int i;
    for (;;) {
        take_reserve(d);
        /* Received without a free number a connection is lost. */
        if (grow(d) < 0 || d->reserve == NONE)
            return -1;
        close_one(&d->reserve);
        got = fdp_recv(line->theirs, &byte, 1, MSG_DONTWAIT, &message);
        if (got == -EINTR)
            continue; /* all signals are blocked in the thread, and its owner loses nothing by this */
        if (got <= 0)
            break;
        line->sent--;
        if (!message.nfds)
            d->stats.lost++;
        for (i = 0; i < message.nfds; i++) {
            if (i) {
                close(message.fds[i]); /* we send one at a time */
                continue;
            }
            d->pending[d->pendings++] = message.fds[0];
            ++*count;
        }
    }
    take_reserve(d);
    return 0;
}

/* Ownership: closes all that the line holds. */
static void vacate(struct line *line) {
    close_one(&line->ours);
    close_one(&line->theirs);
    close_one(&line->pidfd);
    line->phase = FREE;
}

/* What befits the phase of a line from which connections are to come back. */
static void empty(struct fdp_dispatcher *d, int at) {
    if (take_back(d, at, &d->stats.recovered) < 0)
        d->again = now_ns() + ms(FULL_MS);
    else if (d->line[at].phase == GONE)
        vacate(&d->line[at]);
}

static void retire(struct fdp_dispatcher *d, int at, enum phase phase) {
    if (d->line[at].phase == FREE)
        return;
    if (d->line[at].phase < phase)
        d->line[at].phase = phase;
    empty(d, at);
}

/* The next connection of the listener, or -1. *more: whether another try makes sense. */
static int next_connection(struct fdp_dispatcher *d, long long now, int *more) {
    int fd, adopted;
    *more = 0;
    if (d->listener == NONE || d->paused > now)
        return NONE;
    fd = plat_accept(d->listener);
    if ((fd == -EMFILE || fd == -ENFILE) && d->reserve != NONE) {
        d->stats.refused++;
        close_one(&d->reserve);
        fd = plat_accept(d->listener);
    }
    if (fd >= FDP_FIRST_FD)
        return fd;
    if (fd >= 0) {
        if ((adopted = fdp_adopt(fd)) >= 0)
            return adopted;
        close(fd);
        fd = adopted;
    }
    switch (fd) {
    case -EAGAIN:
    case -EINTR:
        break;
    case -EMFILE:
    case -ENFILE:
    case -ENOBUFS:
    case -ENOMEM:
        /* The connection stays in the queue, and the listener would wake us at once. */
        d->stats.refused++;
        d->paused = now + ms(FULL_MS);
        break;
    case -EBADF:
    case -ENOTSOCK:
    case -EINVAL:
    case -EOPNOTSUPP:
        /* Somebody has shut it down. Whoever did may let it listen again. */
        d->paused = now + ms(SHUT_MS);
        break;
    default:
        *more = 1; /* the client gave up while it was queued: the next one is fine */
    }
    return NONE;
}

/* Whether a connection is there to be given. */
static int waits(const struct fdp_dispatcher *d, long long now) {
    struct pollfd one = {.fd = d->listener, .events = POLLIN, .revents = 0};
    return d->pendings || (d->paused <= now && poll(&one, 1, 0) == 1 && (one.revents & POLLIN));
}

/* Whether the next connection goes to somebody although another has less load. */
static int impatient(struct fdp_dispatcher *d, long long now) {
    int at;
    if (!waits(d, now)) {
        d->patience = 0;
        return 0;
    }
    if (!d->patience)
        d->patience = now + ms(LOOK_MS);
    if (d->patience > now)
        return 0;
    /* Whoever it waited for is busy, or frozen: the next one does not wait for the same again. */
    for (at = 0; at < d->lines; at++)
        if (!asks(d, at, now))
            d->line[at].ignored = read_word(d, at, FDP_ASKED);
    return 1;
}

/* Sends one connection. Returns 0, or -1 when it was not sent.
 * Ownership: consumes fd when it was. */
static int hand_over(struct fdp_dispatcher *d, int at, int fd, long long now) {
    struct line *line = &d->line[at];
    ssize_t sent = fdp_send_one(line->ours, "c", 1, fd, MSG_DONTWAIT);
    if (sent == 1) {
        close(fd);
        line->sent++;
        if (!line->since) {
            line->since = now;
            line->seen = received(d, at);
        }
        d->last = at;
        d->stats.given++;
        return 0;
    }
    switch (sent) {
    case -EINTR:
        break;
    case -EAGAIN: /* it says that it has received what it has not: what lies there is the system's bound */
        pass_over(d, at, now);
        break;
    case -ETOOMANYREFS: /* too many descriptors of this user are in flight: until somebody has received some */
    case -ENOBUFS:
    case -ENOMEM:
        d->stats.refused++;
        d->held = now + ms(AGAIN_MS);
        break;
    default: /* it has shut its end down, or refuses descriptors */
        retire(d, at, RETIRED);
    }
    return -1;
}

/* Gives what there is to whoever asks. */
static void give(struct fdp_dispatcher *d, long long now) {
    int i, at, fd, more, above;
    for (i = 0; i < BATCH && d->held <= now; i++) {
        if (grow(d) < 0 || (at = choose(d, now, &above)) == NONE)
            return;
        if (above && !impatient(d, now))
            return;
        d->patience = 0;
        if (d->pendings) {
            /* Out of the list first: what hand_over() takes back from a worker it adds there. */
            fd = d->pending[0];
            memmove(d->pending, d->pending + 1, sizeof fd * (size_t)--d->pendings);
        } else {
            take_reserve(d);
            if ((fd = next_connection(d, now, &more)) == NONE) {
                if (more)
                    continue;
                return;
            }
        }
        if (hand_over(d, at, fd, now) < 0) {
            if (grow(d) < 0) {
                close(fd);
                d->stats.lost++;
                return;
            }
            memmove(d->pending + 1, d->pending, sizeof fd * (size_t)d->pendings++);
            d->pending[0] = fd;
        }
    }
}

/* Whether a worker asks for less than it was sent. */
static int withdrawn(const struct fdp_dispatcher *d, int at) {
    return d->line[at].phase == LIVE && d->line[at].sent > read_word(d, at, FDP_ASKED);
}

/* Takes connections back that lie unreceived too long while others ask, and those of workers that have withdrawn. Returns when to look
 * again, 0: not before something happens. *watch: whoever asks next should wake us, for one lies there and nobody else asks. */
static long long review(struct fdp_dispatcher *d, long long now, int *watch) {
    long long first = 0, count;
    int at, other, live, free;
    *watch = 0;
    if (d->again && d->again <= now) {
        d->again = 0;
        for (at = 0; at < d->lines; at++)
            if (d->line[at].phase > LIVE || withdrawn(d, at))
                empty(d, at);
    }
    for (at = 0; at < d->lines; at++) {
        struct line *line = &d->line[at];
        if (line->phase != LIVE)
            continue;
        /* No event tells that it runs again. */
        if (line->slow > now && (!first || now + ms(BEAT_MS) < first))
            first = now + ms(BEAT_MS);
        if (!line->since)
            continue;
        if (!outstanding(d, at)) {
            line->since = 0;
            continue;
        }
        if ((count = received(d, at)) != line->seen) {
            line->seen = count;
            line->since = now;
        }
        live = free = 0;
        for (other = 0; other < d->lines && !free; other++)
            if (other != at && d->line[other].phase == LIVE) {
                live = 1;
                free = asks(d, other, now);
            }
        if (!free) {
            *watch |= live;
            continue;
        }
        if (line->since + ms(PATIENCE_MS) <= now) {
            pass_over(d, at, now);
            line->since = take_back(d, at, &d->stats.rescued) < 0 ? now : 0;
        } else if (!first || line->since + ms(PATIENCE_MS) < first) {
            first = line->since + ms(PATIENCE_MS);
        }
    }
    return first;
}

/* A worker's bytes mean nothing but that its words have changed. */
static void listen_to(struct fdp_dispatcher *d, int at, long long now) {
    struct line *line = &d->line[at];
    char bytes[FLOOD];
    ssize_t got = recv(line->ours, bytes, sizeof bytes, MSG_DONTWAIT);
    if (got == 0 || (got < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR)) {
        line->deaf = LLONG_MAX;
        retire(d, at, RETIRED);
        return;
    }
    if (got < 0 || got == sizeof bytes)
        line->deaf = now + ms(DEAF_MS);
    line->slow = 0;
    if (withdrawn(d, at))
        empty(d, at);
}

/* -- locks, and forks ------------------------------------------------------------------------------------------------------ */

static void wake(struct fdp_dispatcher *d) {
    /* A full pair wakes as well. */
    fdp_send(d->wake[1], "", 1, NULL, 0, MSG_DONTWAIT);
}

/* Ownership: closes all that the dispatcher holds. */
static void close_all(struct fdp_dispatcher *d) {
    int i;
    for (i = 0; i < d->lines; i++)
        vacate(&d->line[i]);
    for (i = 0; i < d->pendings; i++)
        close(d->pending[i]);
    d->pendings = 0;
    close_one(&d->listener);
    close_one(&d->wake[0]);
    close_one(&d->wake[1]);
    close_one(&d->reserve);
}

/* A connection in the hand of the thread would stay open in the child for ever, and its client wait for an end that does not come. */
static void before_fork(void) {
    struct fdp_dispatcher *d;
    pthread_mutex_lock(&registry);
    for (d = all; d; d = d->next)
        pthread_mutex_lock(&d->lock);
}

static void after_fork_in_parent(void) {
    struct fdp_dispatcher *d;
    for (d = all; d; d = d->next)
        pthread_mutex_unlock(&d->lock);
    pthread_mutex_unlock(&registry);
}

/* The threads do not exist here. */
static void after_fork_in_child(void) {
    struct fdp_dispatcher *d;
    for (d = all; d; d = d->next) {
        pthread_mutex_init(&d->lock, NULL);
        d->running = 0;
        close_all(d);
    }
    all = NULL;
    pthread_mutex_init(&registry, NULL);
}

/* -- the thread ------------------------------------------------------------------------------------------------------------ */

/* The program closed everything it found open. The numbers may be somebody else's by now: not ours to close. */
static void lose(struct fdp_dispatcher *d) {
    int i;
    for (i = 0; i < d->lines; i++) {
        d->line[i].ours = d->line[i].theirs = d->line[i].pidfd = NONE;
        d->line[i].phase = FREE;
    }
    d->listener = d->wake[0] = d->wake[1] = d->reserve = NONE;
    d->pendings = 0;
}

static void poll_for(struct fdp_dispatcher *d, nfds_t *count, int fd, int who) {
    d->polled[*count].fd = fd;
    d->polled[*count].events = POLLIN;
    d->polled[*count].revents = 0;
    if (*count >= 2)
        d->who[*count - 2] = who;
    ++*count;
}

static void sooner(long long *first, long long than, long long now) {
    if (than > now && than != LLONG_MAX && (!*first || than < *first))
        *first = than;
}

/* What to wait for. Returns when to look again all the same, 0: never. */
static long long prepare(struct fdp_dispatcher *d, nfds_t *count, int hungry, long long now, long long first) {
    int at;
    *count = 0;
    poll_for(d, count, d->wake[0], NONE);
    /* Where nobody asks connections wait in the kernel's queue: that is the one queue of all workers. */
    poll_for(d, count, hungry || d->pendings || d->paused > now ? NONE : d->listener, NONE);
    for (at = 0; at < d->lines; at++) {
        struct line *line = &d->line[at];
        if (line->phase == FREE)
            continue;
        if (line->deaf <= now)
            poll_for(d, count, line->ours, at);
        /* Of one whose end has been seen it would stay readable until everything is back. */
        if (line->pidfd != NONE && line->phase != GONE)
            poll_for(d, count, line->pidfd, at);
        sooner(&first, line->deaf, now);
    }
    if (!hungry)
        sooner(&first, d->paused, now);
    sooner(&first, d->held, now);
    sooner(&first, d->patience, now);
    sooner(&first, d->again, now);
    return first;
}

static void heed(struct fdp_dispatcher *d, nfds_t count, long long now) {
    nfds_t i;
    int at;
    for (i = 2; i < count; i++) {
        at = d->who[i - 2];
        /* An earlier event, or the owner, may have freed the line. */
        if (!d->polled[i].revents || d->line[at].phase == FREE)
            continue;
        if (d->polled[i].fd == d->line[at].pidfd)
            retire(d, at, GONE);
        else if (d->polled[i].fd == d->line[at].ours)
            listen_to(d, at, now);
    }
}

static void *dispatch(void *argument) {
    struct fdp_dispatcher *d = argument;
    char drain[64];
    long long now, first, left;
    nfds_t count;
    unsigned int changes;
    int hungry, watch, timeout, result;
    pthread_mutex_lock(&d->lock);
    while (!d->stopping) {
        now = now_ns();
        give(d, now);
        first = review(d, now, &watch);
        hungry = !ready(d, now);
        if (!hungry && d->pendings && d->held <= now && !d->patience)
            continue; /* the batch was full, or something was taken back */
        if (hungry || watch) {
            /* Said before the last look: a worker that asks after it reads this and sends a byte. */
            write_word(d, d->lines, FDP_HUNGRY, 1);
            if (hungry && ready(d, now)) {
                write_word(d, d->lines, FDP_HUNGRY, 0);
                continue;
            }
            if (watch)
                first = review(d, now, &watch);
            watch = 1;
        }
        first = prepare(d, &count, hungry, now, first);
        left = first - now;
        changes = d->changes;
        timeout = !first ? -1 : left <= 0 ? 0 : left > ms(3600000) ? 3600000 : (int)((left + 999999) / 1000000);
        pthread_mutex_unlock(&d->lock);
        result = poll(d->polled, count, timeout);
        if (result < 0 && errno != EINTR && errno != EAGAIN)
            result = -2;
        pthread_mutex_lock(&d->lock);
        if (hungry || watch)
            write_word(d, d->lines, FDP_HUNGRY, 0);
        if (d->stopping)
            break;
        if (result == -2 || (result > 0 && d->polled[0].revents & POLLNVAL)) {
            lose(d);
            d->running = 0;
            pthread_detach(pthread_self());
            break;
        }
        if (result <= 0)
            continue;
        if (d->polled[0].revents)
            while (recv(d->wake[0], drain, sizeof drain, MSG_DONTWAIT) == (ssize_t)sizeof drain)
                continue;
        if (changes == d->changes)
            heed(d, count, now_ns());
    }
    pthread_mutex_unlock(&d->lock);
    return NULL;
}

/* -- the owner's side ------------------------------------------------------------------------------------------------------ */

/* Ownership: consumes d, which no thread and no registry knows. */
static void discard(struct fdp_dispatcher *d) {
    if (d->line)
        close_all(d);
    if (d->board)
        munmap(d->board, d->board_size);
    pthread_mutex_destroy(&d->lock);
    free(d->line);
    free(d->polled);
    free(d->who);
    free(d->pending);
    free(d);
}

int fdp_dispatch_start(int listener, int board, int lines, int order, int credits, fdp_dispatcher **made) {
    struct fdp_dispatcher *d;
    sigset_t every, before;
    void *mapped;
    int i, result = -ENOMEM;
    if (lines < 1 || credits < 1 || credits > FDP_CREDITS)
        return -EINVAL;
    if (!(d = calloc(1, sizeof *d)))
        return -ENOMEM;
    pthread_mutex_init(&d->lock, NULL);
    d->listener = d->wake[0] = d->wake[1] = d->reserve = NONE;
    d->lines = lines;
    d->order = order;
    d->credits = credits;
    d->last = lines - 1;
    d->line = calloc((size_t)lines, sizeof *d->line);
    d->polled = calloc((size_t)lines * 2 + 2, sizeof *d->polled);
    d->who = calloc((size_t)lines * 2, sizeof *d->who);
    for (i = 0; d->line && i < lines; i++)
        d->line[i].ours = d->line[i].theirs = d->line[i].pidfd = NONE;
    if (!d->line || !d->polled || !d->who || grow(d) < 0)
        goto fail;
    d->board_size = (size_t)(lines + 1) * FDP_WORDS * sizeof *d->board;
    mapped = mmap(NULL, d->board_size, PROT_READ | PROT_WRITE, MAP_SHARED, board, 0);
    if (mapped == MAP_FAILED) {
        result = -errno;
        goto fail;
    }
    d->board = mapped;
    if ((result = fdp_pair(SOCK_STREAM, d->wake)) < 0)
        goto fail;
    if ((result = fdp_dup(listener)) < 0)
        goto fail;
    d->listener = result;
    take_reserve(d);
    pthread_mutex_lock(&registry);
    if (!hooked && (result = -pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child)) < 0)
        goto unlock;
    hooked = 1;
    /* Python's handlers run on the main thread; a signal taken by this thread would interrupt nobody's wait. */
    sigfillset(&every);
    pthread_sigmask(SIG_SETMASK, &every, &before);
    d->running = 1;
    result = -pthread_create(&d->thread, NULL, dispatch, d);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (result < 0)
        goto unlock;
    d->next = all;
    all = d;
    pthread_mutex_unlock(&registry);
    *made = d;
    return 0;
unlock:
    pthread_mutex_unlock(&registry);
fail:
    discard(d);
    return result;
}

int fdp_dispatch_attach(fdp_dispatcher *d, int at) {
    struct line *line;
    int ends[2], copy, result;
    if (at < 0 || at >= d->lines)
        return -EINVAL;
    pthread_mutex_lock(&d->lock);
    line = &d->line[at];
    if (!d->running)
        result = -ENOTCONN;
    else if (line->phase != FREE)
        result = -EBUSY;
    else
        result = plat_pair(SOCK_STREAM, ends);
    if (result < 0)
        goto out;
    /* Numbers below 3 belong to nobody; the credentials that fdp_pair() asks for would have to be made for each connection. */
    if ((result = fdp_adopt(ends[0])) < 0)
        goto close;
    ends[0] = result;
    if ((result = fdp_adopt(ends[1])) < 0)
        goto close;
    ends[1] = result;
    if ((copy = result = fdp_dup(ends[1])) < 0)
        goto close;
    memset(line, 0, sizeof *line);
    line->ours = ends[0];
    line->theirs = copy;
    line->pidfd = NONE;
    line->ignored = -1;
    line->phase = LIVE;
    d->changes++;
    line->base = read_word(d, at, FDP_ACCEPTED);
    write_word(d, at, FDP_ASKED, 0);
    wake(d);
    result = ends[1];
    goto out;
close:
    close(ends[0]);
    close(ends[1]);
out:
    pthread_mutex_unlock(&d->lock);
    return result;
}

int fdp_dispatch_launched(fdp_dispatcher *d, int at, int pidfd) {
    int result = 0;
    if (at < 0 || at >= d->lines)
        return -EINVAL;
    pthread_mutex_lock(&d->lock);
    if (pidfd != NONE && d->line[at].phase != FREE && d->line[at].pidfd == NONE) {
        result = fdp_dup(pidfd);
        if (result >= 0) {
            d->line[at].pidfd = result;
            d->changes++;
            wake(d);
            result = 0;
        }
    }
    pthread_mutex_unlock(&d->lock);
    return result;
}

static void leave(fdp_dispatcher *d, int at, enum phase phase) {
    if (at < 0 || at >= d->lines)
        return;
    pthread_mutex_lock(&d->lock);
    retire(d, at, phase);
    if (d->running)
        wake(d);
    pthread_mutex_unlock(&d->lock);
}

void fdp_dispatch_retire(fdp_dispatcher *d, int at) { leave(d, at, RETIRED); }

void fdp_dispatch_ended(fdp_dispatcher *d, int at) { leave(d, at, GONE); }

void fdp_dispatch_count(fdp_dispatcher *d, fdp_dispatch_stats *stats) {
    pthread_mutex_lock(&d->lock);
    *stats = d->stats;
    stats->pending = d->pendings;
    pthread_mutex_unlock(&d->lock);
}

void fdp_dispatch_stop(fdp_dispatcher *d) {
    struct fdp_dispatcher **link;
    int running;
    pthread_mutex_lock(&d->lock);
    running = d->running;
    d->stopping = 1;
    if (running)
        wake(d);
    pthread_mutex_unlock(&d->lock);
    if (running)
        pthread_join(d->thread, NULL);
    /* Known to a fork until everything is closed. */
    pthread_mutex_lock(&registry);
    for (link = &all; *link && *link != d; link = &(*link)->next)
        continue;
    if (*link)
        *link = d->next;
    close_all(d);
    pthread_mutex_unlock(&registry);
    discard(d);
}

/* -- the worker's side ----------------------------------------------------------------------------------------------------- */

int fdp_ask(int sock, long long *asked, const long long *hungry, long long count, int wake) {
    ssize_t sent;
    __atomic_store_n(asked, count, __ATOMIC_SEQ_CST);
    if (!wake && !__atomic_load_n(hungry, __ATOMIC_SEQ_CST))
        return 0;
    sent = fdp_send(sock, "a", 1, NULL, 0, MSG_DONTWAIT);
    return sent < 0 ? (int)sent : 0;
}

int fdp_take(int sock, int *spare) {
    fdp_message message;
    ssize_t got;
    char byte;
    int i, result;
    if (*spare < 0) {
        if ((result = fdp_dup(sock)) < 0)
            return result;
        *spare = result;
    }
    close_one(spare);
    got = fdp_recv(sock, &byte, 1, MSG_DONTWAIT, &message);
    result = got == 0 ? -EPIPE : (int)got;
    if (got > 0) {
        result = message.nfds ? message.fds[0] : -EBADMSG;
        for (i = 1; i < message.nfds; i++)
            close(message.fds[i]);
    }
    if ((*spare = fdp_dup(sock)) < 0)
        *spare = NONE;
    return result;
}
