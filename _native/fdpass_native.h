/* The contract between C and Python: every type and function that crosses the border, and who owns what.
 * C includes this file; cffi parses the part between the two marks. No Python.h, no state, no policy.
 *
 * Results are a value >= 0 or -errno. EINTR is returned, never retried: Python runs its signal handlers and calls again. */
#ifndef FDPASS_NATIVE_H
#define FDPASS_NATIVE_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* cffi: begin */
enum {
    FDP_MAX_FDS = 253,  /* SCM_MAX_FD of Linux: one more is a bare EINVAL */
    FDP_HEADER = 16,    /* bytes of a channel's frame header; docs/wire.md has them */
    FDP_LEAST = 192,    /* bytes of the shortest frame: that much is read without knowing what comes */
    FDP_BATCH = 252,    /* descriptors that ride on a frame's first byte, at most */
    FDP_FIRST_FD = 3,   /* no descriptor of ours is ever stdin, stdout or stderr */
    FDP_ADDRESS_MAX = 112
};

/* No user's uid: what chown() takes for "leave it". */
#define FDP_NOBODY 4294967295

/* One received message. fds[0..nfds-1] belong to the message until Python stores -1 in their place. */
typedef struct {
    int nfds;
    int plain;            /* nfds when dropped, msg_flags and address_size are all 0 and need not be read, else -1 */
    int frame;            /* after fdp_recv_frame: the kind of a frame that came whole with what its header announces, else -1 */
    int dropped;          /* 1: the kernel (or the lack of a free number) kept descriptors back */
    int msg_flags;        /* MSG_TRUNC, MSG_EOR ... as the kernel set them */
    int size;             /* where frame is not -1: bytes of its payload */
    int received;         /* bytes of the last receive, 0 while nothing has come */
    int own;              /* 1: has_credentials, and they are those of this process's real uid */
    int has_credentials;  /* 1: pid, uid and gid are the kernel's word about this message's sender */
    int pid;
    unsigned int uid;
    unsigned int gid;
    int address_size;     /* bytes of address in use, 0 when the sender has no name */
    char address[112];    /* sun_path of the sender */
    int fds[506];         /* of two receives at most: see fdp_recv_frame */
} fdp_message;

typedef struct {
    int family;
    int type;
    int protocol;
    int listening;    /* 1 when listen() was called on it */
    int nonblocking;  /* 1 when the open file description has O_NONBLOCK */
} fdp_socket_info;

/* Sends `size` bytes with `nfds` descriptors on their first byte; returns the bytes that went.
 * Ownership: borrows sock and every fds[i], on success and on failure; they stay the caller's. */
ssize_t fdp_send(int sock, const char *data, size_t size, const int *fds, int nfds, int flags);

/* fdp_send for exactly one descriptor, which spares the caller an array.
 * Ownership: borrows sock and fd, on success and on failure; they stay the caller's. */
ssize_t fdp_send_one(int sock, const char *data, size_t size, int fd, int flags);

/* fdp_send, which refuses to send sock itself or what it is connected to with -ELOOP; ends as for fdp_find_end, NULL: all may go.
 * Ownership: as fdp_send. */
ssize_t fdp_send_frame(int sock, const char *data, size_t size, const int *fds, int nfds, int flags, unsigned long long *ends);

/* Receives into buffer; returns the bytes that came. Every descriptor is close-on-exec and numbered 3 or higher.
 * Ownership: borrows sock. On success message->fds[0..nfds-1] are the caller's, to take or to give to fdp_message_close;
 * on failure nothing was received and nfds is 0. Descriptors that the caller has no name for (SCM_PIDFD) are closed here. */
ssize_t fdp_recv(int sock, char *buffer, size_t size, int flags, fdp_message *message);

/* Receives a channel's frame as far as it is there already and buffer holds it, FDP_LEAST bytes or more; never a byte beyond it.
 * Only FDP_LEAST bytes when descriptors are missing, or another uid sent it. `own` goes for all of it.
 * Ownership: as fdp_recv. */
ssize_t fdp_recv_frame(int sock, char *buffer, size_t size, int flags, fdp_message *message);

/* Closes what is left in the message and sets nfds to 0.
 * Ownership: consumes message->fds[0..nfds-1] except those that are -1. */
void fdp_message_close(fdp_message *message);

/* A connected pair of AF_UNIX sockets of the given type, both ends asking for the sender's credentials.
 * Ownership: on success ends[0] and ends[1] are the caller's; on failure none was left open and ends is untouched. */
int fdp_pair(int type, int *ends);

/* A duplicate, close-on-exec and numbered 3 or higher.
 * Ownership: borrows fd; the number returned is the caller's. */
int fdp_dup(int fd);

/* Makes fd close-on-exec and numbered 3 or higher; returns its number, which differs only when fd was 0, 1 or 2.
 * Ownership: consumes fd and returns it (or its substitute) to the caller; on failure fd is still the caller's, unchanged. */
int fdp_adopt(int fd);

/* What the kernel says about a socket; -ENOTSOCK when fd is something else.
 * Ownership: borrows fd. */
int fdp_socket_probe(int fd, fdp_socket_info *info);

/* 1 when fd is a socket on which listen() was called, 0 for anything else, -EBADF when it is not open.
 * Ownership: borrows fd. */
int fdp_listens(int fd);

/* Waits until fd is readable (writing = 0) or writable (1); timeout in milliseconds, negative for ever.
 * Returns 1 when ready (errors and hang-ups count as ready), 0 on time-out.
 * Ownership: borrows fd. */
int fdp_wait(int fd, int writing, int timeout_ms);

/* Asks the kernel to attach the sender's credentials to every message that sock receives.
 * Ownership: borrows sock. */
int fdp_ask_credentials(int sock);

/* Asks the kernel to refuse messages with descriptors on their sender's side (SO_PASSRIGHTS off, Linux 6.16). Returns 1 when it will,
 * 0 where it knows no such thing.
 * Ownership: borrows sock. */
int fdp_refuse_rights(int sock);

/* The place of the first descriptor that is sock itself or the socket it is connected to, or nfds. ends[0] and ends[1] keep what the
 * kernel calls the two, 0 while unknown.
 * Ownership: borrows sock and every fds[i]. */
int fdp_find_end(int sock, const int *fds, int nfds, unsigned long long *ends);

/* Maps the first size bytes of a file privately: what is written there stays in this process. Returns 0 and *memory.
 * Ownership: borrows fd, the mapping needs it no longer; *memory is the caller's, for fdp_unmap. */
int fdp_map(int fd, size_t size, char **memory);

/* Ends a mapping. Ownership: consumes memory. */
void fdp_unmap(char *memory, size_t size);

/* Starts a thread that never needs the interpreter: when the process behind pidfd ends, or the peer of channel closes,
 * it sends SIGTERM to this process, and after grace_ms milliseconds ends it with _exit(143). Either descriptor may be -1.
 * Should the process close the watch's descriptors along with all others, the supervisor's pid is asked for instead.
 * Ownership: borrows both; the thread watches duplicates of its own, closed by fdp_watch_stop. At most one watch at a time (-EBUSY). */
int fdp_watch_start(int pidfd, int channel, int supervisor, int grace_ms);

/* Ends the watch, or forgets the one of the parent process when called in a forked child (in_child = 1).
 * Ownership: consumes the duplicates that fdp_watch_start made. */
void fdp_watch_stop(int in_child);

/* -- The store: descriptors kept until they are claimed. docs/claims.md is the protocol. */

enum {
    FDP_TICKET = 16,          /* bytes of a ticket, all random */
    FDP_PACKET = 32,          /* bytes of a request and of an answer */
    FDP_CONNECTIONS = 256,    /* claimants that a store keeps connected */
    FDP_REMEMBERED = 4096     /* ended tickets of which the store still knows how they ended */
};

/* What an answer says, and how a ticket ended. */
enum {
    FDP_GIVEN = 0,      /* the descriptor comes with the answer */
    FDP_CLAIMED = 1,    /* every claim was used; pid is the last claimant's */
    FDP_EXPIRED = 2,
    FDP_WITHDRAWN = 3,  /* the pickling failed after the ticket was made */
    FDP_UNKNOWN = 4,
    FDP_REFUSED = 5,    /* the claimant has another uid */
    FDP_BUSY = 6        /* too many descriptors of this user are in flight: ask again */
};

typedef struct {
    int unclaimed;                 /* tickets that can be claimed now */
    int connections;               /* claimants connected now */
    unsigned long long made;       /* tickets so far */
    unsigned long long claims;     /* descriptors given so far */
    unsigned long long expired;    /* tickets whose time ran out */
    unsigned long long withdrawn;
    unsigned long long unanswered; /* claims of unknown, claimed or expired tickets */
    unsigned long long busy;       /* times that a claimant was told to ask again */
    unsigned long long refused;    /* connections of another uid */
    unsigned long long dropped;    /* connections closed for garbage, silence, half a packet or answers not read */
} fdp_store_stats;

/* One claim under way. */
typedef struct {
    int stage;    /* 0: to be sent, 1: sent, the answer is awaited */
    int spare;    /* a number held free for the descriptor, or -1 */
    int status;
    int pid;      /* of the claimant that came before, with FDP_CLAIMED; 0 where the system does not tell */
    int fd;       /* with FDP_GIVEN; -1 when the kernel could not install it */
    unsigned char ticket[16];
} fdp_claim;

/* Starts the thread that serves this process's store: it never needs the interpreter. A forked child has no store and none of its
 * descriptors, whoever forked it. Returns 1 when it was started, 0 when it was running.
 * Ownership: consumes listener (bound, listening) and lock (a file, or -1) when it returns 1, else both stay the caller's. */
int fdp_store_start(int listener, int lock);

/* Keeps fd until it was claimed `claims` times or ttl_ns nanoseconds (0: for ever, negative: expired at once) are over, and writes
 * its ticket. At most `bound` tickets, and three quarters of the soft RLIMIT_NOFILE: past that -ENOSPC. -ENOTCONN without a thread.
 * Ownership: borrows fd; the store holds a duplicate, which it closes when the ticket ends. */
int fdp_store_put(int fd, int claims, long long ttl_ns, int bound, unsigned char *ticket);

/* A claim by the owner itself, without the thread. Returns 0, claim->status says how it went; -EMFILE and the like leave the ticket.
 * Ownership: with FDP_GIVEN claim->fd is the caller's. */
int fdp_store_take(fdp_claim *claim);

/* Ends a ticket that nobody will claim. Returns 1, or 0 when there was none.
 * Ownership: the store's duplicate is closed. */
int fdp_store_withdraw(const unsigned char *ticket);

/* How things stand. Ownership: none. */
void fdp_store_count(fdp_store_stats *stats);

/* How many tickets can be claimed at most under the present limit and `bound`. Ownership: none. */
int fdp_store_bound(int bound);

/* Ends the thread and every ticket. Ownership: everything that the store holds is closed. */
void fdp_store_stop(void);

/* Connects to an owner; where many wait to be let in it waits its turn. 0, or -EAGAIN: nobody was let in within timeout_ms, and what
 * the system calls give. A forked child has not got the connection, whoever forked it.
 * Ownership: path is the caller's. *sock is a connection or -1 and closed; then the new one, the caller's for fdp_claim_leave, or -1. */
int fdp_claim_open(const char *path, int timeout_ms, int *sock);

/* Ends a connection; a number that fdp_claim_open has not given in this process is left alone. Ownership: consumes *sock, which is
 * -1 afterwards; nothing when it was. */
void fdp_claim_leave(int *sock);

/* The effective uid of whoever listens at the other end of a claimant's connection, as it was when listen() was called; FDP_NOBODY
 * when the kernel cannot name it.
 * Ownership: borrows sock. */
int fdp_peer_uid(int sock, unsigned int *uid);

/* Claims over a connection to the owner; called again with the same claim after -EINTR. 0: claim->status says how it went.
 * -EMFILE: no number was free for the descriptor, and nothing was claimed. -EPIPE, -ECONNRESET: the owner closed the connection.
 * -ETIMEDOUT, -EPROTO, and what the system calls give. After any error but -EINTR the connection is of no use.
 * Ownership: borrows sock. claim->fd is the caller's; claim->spare is the claim's between calls that return -EINTR, else closed. */
int fdp_claim_run(int sock, fdp_claim *claim, int timeout_ms);

/* Closes what a claim holds. Ownership: consumes claim->fd and claim->spare where they are not -1. */
void fdp_claim_close(fdp_claim *claim);

/* -- The dispatcher: accepts for a group of workers and gives each connection to one of them, as long as they ask for some. */

/* The board, as the dispatcher sees it: lines of FDP_WORDS words of 8 bytes, one for each worker and one more, whose first word is
 * FDP_HUNGRY. fdpass/_board.py says what the words mean. */
enum { FDP_WORDS = 8, FDP_OPEN = 0, FDP_ACCEPTED = 1, FDP_HEARTBEAT = 2, FDP_LOAD = 4, FDP_ASKED = 6, FDP_HUNGRY = 0 };

/* Who gets the next connection, of those that have asked for one. */
enum { FDP_ROUND_ROBIN = 0, FDP_LEAST_LOADED = 1 };

enum { FDP_CREDITS = 128 /* connections that one worker may have unreceived, at most: a socket pair takes about twice as many */ };

typedef struct fdp_dispatcher fdp_dispatcher;

typedef struct {
    int pending;                   /* connections that were taken back and wait for somebody to ask */
    unsigned long long given;      /* connections sent to a worker, those taken back included */
    unsigned long long recovered;  /* taken back because their worker ended, left or was retired */
    unsigned long long rescued;    /* taken back from a worker that left them lying while another one asked */
    unsigned long long lost;       /* taken back in a process without a free descriptor number, which is how they ended */
    unsigned long long refused;    /* times that accept or sendmsg said that something was short */
} fdp_dispatch_stats;

/* Starts a thread that never needs the interpreter. board: the file of `lines` + 1 lines. credits: what a worker may have unreceived
 * whatever it asks for, 1 to FDP_CREDITS. A forked child has no dispatcher and none of its descriptors, whoever forked it.
 * Ownership: borrows listener (listening, non-blocking) and board; *made is the caller's, for fdp_dispatch_stop. */
int fdp_dispatch_start(int listener, int board, int lines, int order, int credits, fdp_dispatcher **made);

/* Makes ready for a worker on a line that has none: its ASKED is 0. Returns the worker's end of a socket pair. -EBUSY where the line
 * has a worker still.
 * Ownership: the number returned is the caller's to send and close; the dispatcher keeps the other end and a duplicate of this one. */
int fdp_dispatch_attach(fdp_dispatcher *dispatcher, int line);

/* The worker of that line has started: when the process behind pidfd ends, what it has not received goes to others. Once it has ended,
 * or without a worker, this does nothing.
 * Ownership: borrows pidfd, the dispatcher keeps a duplicate; -1: only fdp_dispatch_ended tells. */
int fdp_dispatch_launched(fdp_dispatcher *dispatcher, int line, int pidfd);

/* Gives that line's worker nothing more; what it has not received goes to others.
 * Ownership: the connections become the dispatcher's again. */
void fdp_dispatch_retire(fdp_dispatcher *dispatcher, int line);

/* The process is gone: as fdp_dispatch_retire, and the line is free for another. Ownership: everything of that line is closed. */
void fdp_dispatch_ended(fdp_dispatcher *dispatcher, int line);

/* How things stand. Ownership: none. */
void fdp_dispatch_count(fdp_dispatcher *dispatcher, fdp_dispatch_stats *stats);

/* Ends the thread. Connections that no worker has received are closed, as those in a listening socket's queue are. In a forked child it
 * frees the memory, there is nothing else.
 * Ownership: consumes dispatcher and all that it holds. */
void fdp_dispatch_stop(fdp_dispatcher *dispatcher);

/* In the worker: asked for `count` connections so far; wakes the dispatcher when it waits for that, or in any case with `wake`, as
 * befits a count that went down. Returns 0; -EAGAIN and the like do no harm.
 * Ownership: borrows sock; asked and hungry are words of the board. */
int fdp_ask(int sock, long long *asked, const long long *hungry, long long count, int wake);

/* In the worker: the next connection. -EAGAIN: none is there; -EPIPE: there will be no more; -EMFILE: *spare is -1 and no number is free,
 * nothing was received. -EBADMSG: the kernel could not install it, and it is lost, which is what the number held free is to prevent.
 * Ownership: borrows sock; the connection is the caller's; *spare (a number held free, or -1) is closed and taken anew, and the caller's. */
int fdp_take(int sock, int *spare);
/* cffi: end */

#endif
