/* Descriptors kept until they are claimed: the table of tickets, the thread that serves them, and what a fork leaves of both.
 * Everything is behind one lock that nothing blocks under; the thread waits in poll and nowhere else. */
#define _GNU_SOURCE 1

#include "packet.h"
#include "platform.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

enum {
    SILENCE_MS = 5000,   /* a connection without a whole request in its first so many is dropped */
    PARTIAL_MS = 1000,   /* and half a packet may wait so long for its rest */
    FULL_MS = 50,        /* how long a listener is left alone while the process has no free number */
    SWEEP_MS = 100,      /* expired descriptors are closed at most so much later */
    ACCEPTS = 16,        /* connections taken in one round */
    MISSES = 16,         /* claims in a row that name no ticket, after which a connection is dropped */
    FIRST_SIZE = 64,
    NONE = -1
};

/* A ticket; live while fd is not -1, else remembered for what became of it. */
struct entry {
    unsigned char ticket[FDP_TICKET];
    int fd;
    int claims;  /* left */
    int status;  /* FDP_GIVEN while it lives, else how it ended */
    int pid;     /* of the last claimant */
    int next;    /* in its bucket, or in the free list */
    long long deadline; /* ns, 0: none */
};

struct connection {
    int fd;
    int pid;
    int served;  /* 1 once it sent a whole request */
    int misses;
    size_t have; /* bytes of a packet that is not complete */
    long long since, last; /* ns: of the connection or of the packet's first byte; of the last request */
    char bytes[FDP_PACKET];
};

static struct {
    pthread_mutex_t lock;
    pthread_mutex_t closing; /* taken before lock: a fork waits until what has left the table is closed */
    pthread_t thread;
    int running, stopping, hooked;
    int listener, lock_file, wake[2];
    int reserve; /* a number for one claimant in a process that has none left: serving it frees others */

    struct entry *entries;
    int *buckets;
    int size, vacant; /* entries, and as many buckets: a power of two */
    int remembered[FDP_REMEMBERED], oldest, ended;
    long long sweep;  /* ns: when the next ticket expires, 0: none does */
    long long waking; /* ns: until when the thread sleeps, 0: for ever */

    struct connection connections[FDP_CONNECTIONS];
    int connected;
    long long paused; /* ns: until when the listener is left alone */

    int *grave; /* descriptors that have left the table and are closed once the lock is free */
    int graves, grave_size;
    fdp_store_stats stats;
} store = {
    .lock = PTHREAD_MUTEX_INITIALIZER,
    .closing = PTHREAD_MUTEX_INITIALIZER,
    .listener = NONE,
    .lock_file = NONE,
    .wake = {NONE, NONE},
    .reserve = NONE,
    .vacant = NONE,
};

static long long now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (long long)now.tv_sec * 1000000000 + now.tv_nsec;
}

static long long ms(long long count) { return count * 1000000; }

/* -- the table ------------------------------------------------------------------------------------------------------------ */

static int bucket_of(const unsigned char *ticket) {
    unsigned int word;
    memcpy(&word, ticket, sizeof word); /* random already */
    return (int)(word & (unsigned int)(store.size - 1));
}

static int find(const unsigned char *ticket) {
    int at;
    if (!store.size)
        return NONE;
    for (at = store.buckets[bucket_of(ticket)]; at != NONE; at = store.entries[at].next)
        if (!memcmp(store.entries[at].ticket, ticket, FDP_TICKET))
            return at;
    return NONE;
}

static void insert(int at) {
    int *bucket = &store.buckets[bucket_of(store.entries[at].ticket)];
    store.entries[at].next = *bucket;
    *bucket = at;
}

static void forget(int at) {
    int *link = &store.buckets[bucket_of(store.entries[at].ticket)];
    while (*link != at)
        link = &store.entries[*link].next;
    *link = store.entries[at].next;
    store.entries[at].next = store.vacant;
    store.vacant = at;
}

/* Room for one more entry, and for every live descriptor in the grave: to end a ticket must never need memory. */
static int grow(void) {
    int i, size = store.size ? 2 * store.size : FIRST_SIZE;
    struct entry *entries;
    int *buckets, *grave;
    if (store.graves + store.stats.unclaimed >= store.grave_size) {
        i = store.grave_size ? 2 * store.grave_size : FIRST_SIZE;
        if (!(grave = realloc(store.grave, sizeof *grave * (size_t)i)))
            return -ENOMEM;
        store.grave = grave;
        store.grave_size = i;
    }
    if (store.vacant != NONE)
        return 0;
    if (!(entries = realloc(store.entries, sizeof *entries * (size_t)size)))
        return -ENOMEM;
    store.entries = entries;
    if (!(buckets = realloc(store.buckets, sizeof *buckets * (size_t)size)))
        return -ENOMEM;
    store.buckets = buckets;
    for (i = 0; i < size; i++)
        buckets[i] = NONE;
    for (i = store.size; i < size; i++) {
        entries[i].fd = NONE;
        entries[i].next = i + 1 < size ? i + 1 : NONE;
    }
    store.vacant = store.size;
    i = store.size;
    store.size = size;
    while (i--)
        insert(i); /* all were taken: the table grows only when nothing is vacant */
    return 0;
}

/* Ownership: the entry's descriptor goes to the grave, or to *taken when that is not NULL. */
static void end(int at, int status, int *taken) {
    struct entry *entry = &store.entries[at];
    int *place = &store.remembered[store.ended];
    if (taken)
        *taken = entry->fd;
    else
        store.grave[store.graves++] = entry->fd;
    entry->fd = NONE;
    entry->status = status;
    store.stats.unclaimed--;
    if (status == FDP_EXPIRED)
        store.stats.expired++;
    else if (status == FDP_WITHDRAWN)
        store.stats.withdrawn++;
    if (*place != NONE)
        forget(*place);
    *place = at;
    store.ended = (store.ended + 1) % FDP_REMEMBERED;
}

/* What a claim of this ticket gets now; ends it if its time is over. */
static int judge(const unsigned char *ticket, int *at, int *pid) {
    struct entry *entry;
    *pid = 0;
    if ((*at = find(ticket)) == NONE)
        return FDP_UNKNOWN;
    entry = &store.entries[*at];
    if (entry->fd != NONE && entry->deadline && now_ns() >= entry->deadline)
        end(*at, FDP_EXPIRED, NULL);
    *pid = entry->pid;
    return entry->status;
}

static void count_claim(int at, int pid) {
    store.entries[at].pid = pid;
    store.stats.claims++;
}

/* Ends every ticket whose time is over, and notes when the next one's is. */
static void sweep(long long now) {
    int i;
    long long next = 0;
    for (i = 0; i < store.size; i++) {
        if (store.entries[i].fd == NONE || !store.entries[i].deadline)
            continue;
        if (now >= store.entries[i].deadline)
            end(i, FDP_EXPIRED, NULL);
        else if (!next || store.entries[i].deadline < next)
            next = store.entries[i].deadline;
    }
    /* Not for each ticket alone: a sweep looks at all of them. */
    store.sweep = next && next < now + ms(SWEEP_MS) ? now + ms(SWEEP_MS) : next;
}

/* -- locks, and forks ------------------------------------------------------------------------------------------------------ */

static void wake(void) {
    /* A full pair wakes as well. */
    fdp_send(store.wake[1], "", 1, NULL, 0, MSG_DONTWAIT);
}

static void enter(void) {
    pthread_mutex_lock(&store.closing);
    pthread_mutex_lock(&store.lock);
}

/* For who must not wait for a close: leaves what was buried to the thread. */
static void leave_quickly(void) {
    if (store.graves && store.running)
        wake();
    pthread_mutex_unlock(&store.lock);
}

/* A close may block (SO_LINGER, a file on a network): it happens where nobody who makes or claims a ticket waits for it. */
static void leave(void) {
    int i, count = store.graves, few[64], *many = few;
    if (count > 64) {
        /* Taken along whole: while the lock is free others may bury too, but only behind `closing`, which is held. */
        many = store.grave;
        store.grave = NULL;
        if ((store.grave = malloc(sizeof *many * (size_t)store.grave_size)) == NULL) {
            store.grave = many;
            for (i = 0; i < count; i++)
                close(many[i]);
            count = 0;
            many = few;
        }
    } else if (count) {
        memcpy(few, store.grave, sizeof *few * (size_t)count);
    }
    store.graves = 0;
    pthread_mutex_unlock(&store.lock);
    for (i = 0; i < count; i++)
        close(many[i]);
    if (many != few)
        free(many);
    pthread_mutex_unlock(&store.closing);
}

static void close_one(int *fd) {
    if (*fd != NONE)
        close(*fd);
    *fd = NONE;
}

/* Everything gone; the memory of the table stays. Ownership: closes all that the store holds. */
static void clear(void) {
    int i;
    for (i = 0; i < store.connected; i++)
        close(store.connections[i].fd);
    store.connected = 0;
    close_one(&store.listener);
    close_one(&store.lock_file);
    close_one(&store.wake[0]);
    close_one(&store.wake[1]);
    close_one(&store.reserve);
    for (i = 0; i < store.size; i++) {
        close_one(&store.entries[i].fd);
        store.entries[i].next = i + 1 < store.size ? i + 1 : NONE;
        store.buckets[i] = NONE;
    }
    for (i = 0; i < store.graves; i++)
        close(store.grave[i]);
    store.graves = 0;
    store.vacant = store.size ? 0 : NONE;
    for (i = 0; i < FDP_REMEMBERED; i++)
        store.remembered[i] = NONE;
    store.ended = 0;
    store.sweep = store.waking = store.paused = 0;
    store.running = store.stopping = 0;
    memset(&store.stats, 0, sizeof store.stats);
}

static void after_fork_in_parent(void) {
    pthread_mutex_unlock(&store.lock);
    pthread_mutex_unlock(&store.closing);
}

/* The thread does not exist here. What it served is the parent's. */
static void after_fork_in_child(void) {
    pthread_mutex_init(&store.lock, NULL);
    pthread_mutex_init(&store.closing, NULL);
    clear();
}

/* -- the thread ------------------------------------------------------------------------------------------------------------ */

/* Ownership: closes the connection. */
static void drop(int at, int counted) {
    close(store.connections[at].fd);
    store.connections[at] = store.connections[--store.connected];
    store.stats.dropped += counted ? 1 : 0;
}

/* Ownership: borrows both. */
static ssize_t reply(int sock, const unsigned char *ticket, int status, int pid, int fd) {
    fdp_packet packet;
    memset(&packet, 0, sizeof packet);
    memcpy(packet.magic, PACKET_MAGIC, sizeof packet.magic);
    packet.status = (uint32_t)status;
    packet.pid = pid;
    if (ticket)
        memcpy(packet.ticket, ticket, FDP_TICKET);
    return fdp_send(sock, (const char *)&packet, sizeof packet, &fd, fd != NONE, MSG_DONTWAIT);
}

/* One whole request. Returns 0, or -1 when the connection is to be dropped. */
static int serve_claim(struct connection *from) {
    fdp_packet packet;
    ssize_t sent;
    int at, pid, status;
    memcpy(&packet, from->bytes, sizeof packet);
    if (memcmp(packet.magic, PACKET_MAGIC, sizeof packet.magic) || packet.status || packet.pid || packet.spare)
        return -1;
    from->served = 1;
    from->last = now_ns();
    status = judge(packet.ticket, &at, &pid);
    if (status != FDP_GIVEN) {
        store.stats.unanswered++;
        sent = reply(from->fd, packet.ticket, status, pid, NONE);
        from->misses = status == FDP_UNKNOWN ? from->misses + 1 : 0;
        return sent == (ssize_t)sizeof packet && from->misses < MISSES ? 0 : -1;
    }
    from->misses = 0;
    sent = reply(from->fd, packet.ticket, status, 0, store.entries[at].fd);
    /* Per user over all processes, and only without privileges: the claimant asks again until somebody has received some. */
    if (sent == -ETOOMANYREFS && ++store.stats.busy)
        return reply(from->fd, packet.ticket, FDP_BUSY, 0, NONE) == (ssize_t)sizeof packet ? 0 : -1;
    if (sent != (ssize_t)sizeof packet)
        return -1; /* it does not read its answers, or is gone: the ticket was not used */
    count_claim(at, from->pid);
    if (--store.entries[at].claims == 0)
        end(at, FDP_CLAIMED, NULL);
    return 0;
}

/* Reads what is there, one packet at most: a claimant that sends many waits its turn. Returns -1 to drop, -2 at its orderly end. */
static int read_claim(struct connection *from) {
    ssize_t got = recv(from->fd, from->bytes + from->have, FDP_PACKET - from->have, MSG_DONTWAIT);
    if (got < 0)
        return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR ? 0 : -2;
    if (got == 0)
        return from->have || !from->served ? -1 : -2;
    if (!from->have)
        from->since = now_ns();
    from->have += (size_t)got;
    if (from->have < FDP_PACKET)
        return memcmp(from->bytes, PACKET_MAGIC, from->have < 4 ? from->have : 4) ? -1 : 0;
    from->have = 0;
    return serve_claim(from);
}

/* Who goes when somebody new comes: the longest silent of those that never claimed, else of all. */
static int evict(void) {
    int i, worst = NONE;
    for (i = 0; i < store.connected; i++) {
        struct connection *one = &store.connections[i], *than = worst == NONE ? NULL : &store.connections[worst];
        if (!than || one->served < than->served || (one->served == than->served && one->last < than->last))
            worst = i;
    }
    if (worst != NONE)
        drop(worst, !store.connections[worst].served);
    return worst;
}

/* Returns -1 when the listener is not a listener any more. */
static int accept_claimants(long long now) {
    struct connection *one;
    unsigned int uid;
    int i, fd, adopted, pid;
    for (i = 0; i < ACCEPTS; i++) {
        fd = plat_accept(store.listener);
        if (fd == -EMFILE || fd == -ENFILE) {
            /* Said before the kernel has looked whether anybody waits: only the first try of a round is for somebody. */
            if (i)
                return 0;
            /* No number free: the reserve's, or that of a connection which can be made again. Else the listener rests, for it
             * would wake us at once. */
            if (store.reserve != NONE)
                close_one(&store.reserve);
            else
                evict();
            if ((fd = plat_accept(store.listener)) < 0 && fd != -EAGAIN)
                store.paused = now + ms(FULL_MS);
        }
        if (fd < 0)
            return fd == -EBADF || fd == -ENOTSOCK || fd == -EINVAL || fd == -EOPNOTSUPP ? -1 : 0;
        if ((adopted = fdp_adopt(fd)) < 0 || plat_peer(adopted, &uid, &pid) < 0) {
            close(adopted < 0 ? fd : adopted);
            continue;
        }
        if (uid != geteuid()) {
            store.stats.refused++;
            reply(adopted, NULL, FDP_REFUSED, 0, NONE);
            close(adopted);
            continue;
        }
        if (store.connected == FDP_CONNECTIONS)
            evict();
        one = &store.connections[store.connected++];
        memset(one, 0, sizeof *one);
        one->fd = adopted;
        one->pid = pid;
        one->since = one->last = now;
        /* Its request is here as a rule. Served now it needs no place among the kept, which a flood may take at once. */
        if ((adopted = read_claim(one)) < 0)
            drop(store.connected - 1, adopted == -1);
    }
    return 0;
}

/* The program closed everything it found open. The numbers may be somebody else's by now: not ours to close. */
static void lose(void) {
    int i;
    store.listener = store.lock_file = store.wake[0] = store.wake[1] = store.reserve = NONE;
    store.connected = store.graves = 0;
    for (i = 0; i < store.size; i++)
        store.entries[i].fd = NONE;
    pthread_detach(pthread_self());
    clear();
}

/* When this connection's patience ends, 0: never. */
static long long patience(const struct connection *one) {
    if (one->have)
        return one->since + ms(PARTIAL_MS);
    return one->served ? 0 : one->since + ms(SILENCE_MS);
}

static int until(long long now) {
    long long first = store.sweep, next;
    int i;
    if (store.paused && (!first || store.paused < first))
        first = store.paused;
    for (i = 0; i < store.connected; i++)
        if ((next = patience(&store.connections[i])) && (!first || next < first))
            first = next;
    store.waking = first;
    if (!first)
        return -1;
    return first <= now ? 0 : first - now > ms(3600000) ? 3600000 : (int)((first - now + 999999) / 1000000);
}

static void take_reserve(void) {
    if (store.reserve == NONE && (store.reserve = fdp_dup(store.wake[0])) < 0)
        store.reserve = NONE;
}

static void *serve(void *unused) {
    struct pollfd polled[FDP_CONNECTIONS + 2];
    struct connection *one;
    long long now;
    char drain[64];
    int i, result, connected, timeout;
    (void)unused;
    enter();
    for (;;) {
        now = now_ns();
        if (store.sweep && store.sweep <= now)
            sweep(now);
        if (store.paused && store.paused <= now)
            store.paused = 0;
        take_reserve();
        for (i = store.connected - 1; i >= 0; i--)
            if (patience(&store.connections[i]) && patience(&store.connections[i]) <= now)
                drop(i, 1);
        connected = store.connected;
        polled[0].fd = store.wake[0];
        polled[1].fd = store.paused ? -1 : store.listener;
        for (i = 0; i < connected; i++)
            polled[i + 2].fd = store.connections[i].fd;
        for (i = 0; i < connected + 2; i++) {
            polled[i].events = POLLIN;
            polled[i].revents = 0;
        }
        timeout = until(now);
        leave();
        if (poll(polled, (nfds_t)connected + 2, timeout) < 0 && errno != EINTR && errno != EAGAIN)
            timeout = -2;
        enter();
        if (store.stopping || timeout == -2)
            break;
        if ((polled[0].revents | polled[1].revents) & POLLNVAL) {
            lose();
            break;
        }
        if (polled[0].revents)
            while (recv(store.wake[0], drain, sizeof drain, MSG_DONTWAIT) == (ssize_t)sizeof drain)
                continue;
        /* Backwards: dropping one moves the last into its place. */
        for (i = connected - 1; i >= 0; i--) {
            one = &store.connections[i];
            if (polled[i + 2].revents && (result = read_claim(one)) < 0)
                drop(i, result == -1);
        }
        if (polled[1].revents && accept_claimants(now_ns()) < 0) {
            lose();
            break;
        }
    }
    leave();
    return NULL;
}

/* -- the owner's side ------------------------------------------------------------------------------------------------------ */

int fdp_store_start(int listener, int lock) {
    sigset_t every, before;
    int result = 0;
    enter();
    if (store.running)
        goto out;
    if (!store.hooked) {
        if ((result = -pthread_atfork(enter, after_fork_in_parent, after_fork_in_child)) < 0)
            goto out;
        store.hooked = 1;
    }
    clear();
    if ((result = fdp_pair(SOCK_STREAM, store.wake)) < 0)
        goto out;
    take_reserve();
    store.listener = listener;
    store.lock_file = lock;
    store.running = 1;
    /* Python's handlers run on the main thread; a signal taken by this thread would interrupt nobody's wait. */
    sigfillset(&every);
    pthread_sigmask(SIG_SETMASK, &every, &before);
    result = -pthread_create(&store.thread, NULL, serve, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (result < 0) {
        store.listener = store.lock_file = NONE; /* still the caller's */
        clear();
        goto out;
    }
    result = 1;
out:
    leave();
    return result;
}

int fdp_store_bound(int bound) {
    struct rlimit limit;
    rlim_t most;
    if (getrlimit(RLIMIT_NOFILE, &limit) < 0)
        return bound;
    most = limit.rlim_cur / 4 * 3;
    if (limit.rlim_cur == RLIM_INFINITY || most > INT_MAX)
        most = INT_MAX;
    return bound > 0 && bound < (int)most ? bound : (int)most;
}

int fdp_store_put(int fd, int claims, long long ttl_ns, int bound, unsigned char *ticket) {
    struct entry *entry;
    long long now = ttl_ns ? now_ns() : 0;
    int result, copy, at;
    unsigned char made[FDP_TICKET];
    if ((result = plat_random(made, sizeof made)) < 0)
        return result;
    bound = fdp_store_bound(bound);
    pthread_mutex_lock(&store.lock);
    if (!store.running) {
        result = -ENOTCONN;
        goto out;
    }
    if (store.stats.unclaimed >= bound && store.sweep)
        sweep(now_ns());
    if (store.stats.unclaimed >= bound) {
        result = -ENOSPC;
        goto out;
    }
    if ((result = grow()) < 0)
        goto out;
    if ((copy = fdp_dup(fd)) < 0) {
        result = copy;
        goto out;
    }
    at = store.vacant;
    entry = &store.entries[at];
    store.vacant = entry->next;
    memcpy(entry->ticket, made, sizeof made);
    entry->fd = copy;
    entry->claims = claims;
    entry->status = FDP_GIVEN;
    entry->pid = 0;
    entry->deadline = ttl_ns ? now + ttl_ns : 0;
    insert(at);
    store.stats.made++;
    store.stats.unclaimed++;
    if (entry->deadline && (!store.sweep || entry->deadline < store.sweep)) {
        store.sweep = entry->deadline;
        if (!store.waking || store.sweep < store.waking)
            wake();
    }
    memcpy(ticket, made, sizeof made);
    result = 0;
out:
    leave_quickly();
    return result;
}

int fdp_store_take(fdp_claim *claim) {
    int at, result = 0;
    claim->fd = NONE;
    pthread_mutex_lock(&store.lock);
    claim->status = judge(claim->ticket, &at, &claim->pid);
    if (claim->status != FDP_GIVEN) {
        store.stats.unanswered++;
    } else if (store.entries[at].claims > 1) {
        result = fdp_dup(store.entries[at].fd);
        if (result >= 0) {
            claim->fd = result;
            result = 0;
            store.entries[at].claims--;
            count_claim(at, (int)getpid());
        }
    } else {
        count_claim(at, (int)getpid());
        store.entries[at].claims = 0;
        end(at, FDP_CLAIMED, &claim->fd);
    }
    leave_quickly();
    return result;
}

int fdp_store_withdraw(const unsigned char *ticket) {
    int at, found;
    enter();
    at = find(ticket);
    found = at != NONE && store.entries[at].fd != NONE;
    if (found)
        end(at, FDP_WITHDRAWN, NULL);
    leave();
    return found;
}

void fdp_store_count(fdp_store_stats *stats) {
    enter();
    if (store.sweep)
        sweep(now_ns());
    *stats = store.stats;
    stats->connections = store.connected;
    leave();
}

void fdp_store_stop(void) {
    pthread_t thread;
    enter();
    if (!store.running || store.stopping) {
        leave();
        return;
    }
    store.stopping = 1;
    thread = store.thread;
    wake();
    leave();
    pthread_join(thread, NULL);
    enter();
    clear();
    leave();
}
