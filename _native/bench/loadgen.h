/* The contract between the command's C and its Python: every type and function that crosses the border, and who owns what.
 * C includes this file; cffi parses the part between the two marks. Linux only: no Python.h, no policy, nothing that prints.
 *
 * Results are a value >= 0 or -errno. Times are nanoseconds of CLOCK_MONOTONIC, durations nanoseconds. */
#ifndef FDPASS_LOADGEN_H
#define FDPASS_LOADGEN_H

#include <stddef.h>
#include <stdint.h>

/* cffi: begin */
/* How a request ended. */
enum {
    FLG_OK,
    FLG_REFUSED,             /* no connection came about */
    FLG_RESET_BEFORE_ACCEPT, /* reset before one byte of an answer: what the kernel does to a connection that nobody accepted */
    FLG_RESET_AFTER_ACCEPT,  /* cut off in another way: it had an owner */
    FLG_TIMEOUT,
    FLG_BAD_ANSWER,
    FLG_NO_PORT,
    FLG_NO_DESCRIPTOR
};

enum { FLG_POISSON, FLG_UNIFORM, FLG_BURST };
enum { FLG_EXPONENTIAL, FLG_FIXED, FLG_HYPER };
enum { FLG_HTTP, FLG_TCP };

/* A board: FLG_HEADER words, then FLG_COLUMNS columns of connections * requests words each; request r of connection c is
 * at c * requests + r. */
enum { FLG_OVER, FLG_BEGAN, FLG_ENDED, FLG_CPU, FLG_HEADER = 512 };
enum {
    FLG_SCHEDULED,
    FLG_BEGUN,
    FLG_CONNECTED,
    FLG_ANSWERED,
    FLG_OUTCOME,
    FLG_WORKER,
    FLG_ACCEPTED,
    FLG_STARTED,
    FLG_FREE,
    FLG_DRAWN,
    FLG_COLUMNS
};

/* What to do in one run. */
typedef struct {
    int ipv6;
    int port;
    unsigned char address[16]; /* in network order; the first four for IPv4 */
    int sources;               /* 1: each connection in turn has another source address of 127/8 */
    int protocol;
    int arrivals;
    int distribution;
    int64_t connections;
    int64_t requests; /* per connection */
    int64_t clients;  /* > 0: closed loop, arrivals and gap are not looked at */
    double gap;       /* mean ns between two arrivals */
    double service;   /* mean ns */
    double think;     /* mean ns */
    int64_t timeout;  /* from the schedule */
    uint64_t seed;
    const char *head; /* the request up to where its service time stands; in tcp mode all of it */
    size_t head_size;
} flg_load;

enum { FLG_BODY_START = 160, FLG_LINE_MAX = 256, FLG_HEAD_MAX = 65536 };
enum { FLG_MORE, FLG_DONE, FLG_BAD };

/* The reader of one HTTP/1.x answer. Plain memory: it may be copied, and starts anew with flg_parse_begin. */
typedef struct {
    int stage;
    int status;     /* 0 until it is known */
    int minor;      /* of HTTP/1.minor */
    int keep;       /* the connection may carry another request; meant only when the answer is whole */
    int chunked;
    int line_size;  /* of the line under way; one that is longer than FLG_LINE_MAX goes on being counted */
    int body_size;  /* bytes in body */
    int head_size;  /* of the head, chunk line or trailer under way: limited by FLG_HEAD_MAX */
    int64_t length; /* of Content-Length, -1 without one */
    int64_t left;   /* of the body or chunk under way */
    int64_t seen;   /* bytes of this answer so far */
    char line[FLG_LINE_MAX];
    char body[FLG_BODY_START]; /* the beginning of the body */
} flg_parser;

enum { FLG_STEPS = 128, FLG_BUCKETS = 7296 };

/* A log-linear histogram of durations: FLG_STEPS steps per power of two. All zero is an empty one. */
typedef struct {
    uint64_t count;
    uint64_t sum_low, sum_high; /* 128 bits */
    int64_t min, max;
    uint64_t buckets[FLG_BUCKETS];
} flg_histogram;

/* Runs one load to its end: fills the board, whose word FLG_OVER counts the requests that are over, all along.
 * Returns 0, or 1 when `control` (-1: none) became readable or hung up; what had not ended then has the outcome -1.
 * -errno: the run as such was impossible. EINTR is not returned: the state of a run is here, and its process handles no signal.
 * Ownership: borrows control and everything pointed at; the descriptors it opens are its own, and all closed on return. */
int flg_run(const flg_load *load, int64_t *board, int control);

/* Fills the columns scheduled (from 0; of a later request: the think time before it) and drawn, from the seed alone.
 * Ownership: borrows both; touches no descriptor. */
void flg_schedule(const flg_load *load, int64_t *scheduled, int64_t *drawn);

/* What an errno of socket, bind, connect or a connection's first send says of its connection: an outcome, or -error when it says
 * that no such connection can be made at all.
 * Ownership: touches no descriptor. */
int flg_outcome_of(int error);

/* Serves connections from `listener` until `control` becomes readable or hangs up: each HTTP request is answered at once.
 * Returns 0 or -errno.
 * Ownership: borrows both; makes listener non-blocking. The descriptors it opens are its own, and all closed on return. */
int flg_null_server(int listener, int control);

/* Begins a new answer.
 * Ownership: borrows parser; touches no descriptor. */
void flg_parse_begin(flg_parser *parser);

/* Reads on: returns FLG_MORE, FLG_DONE or FLG_BAD and puts the bytes that belong to this answer into *used.
 * Ownership: borrows everything; touches no descriptor. */
int flg_parse(flg_parser *parser, const char *data, size_t size, size_t *used);

/* What the end of file makes of an answer: FLG_DONE, or FLG_MORE when it was cut off.
 * Ownership: borrows parser; touches no descriptor. */
int flg_parse_end(const flg_parser *parser);

/* Reads "fdpass <worker> <accepted> <started> <free>\n" from the body's start; returns 1, or 0 for a body of another form.
 * Ownership: borrows both; writes found[0..3] only when it returns 1; touches no descriptor. */
int flg_parse_body(const flg_parser *parser, int64_t *found);

/* Counts `size` values; -EINVAL, and none is counted, when one of them is negative.
 * Ownership: borrows both; touches no descriptor. */
int flg_histogram_add(flg_histogram *histogram, const int64_t *values, size_t size);

/* Counts what the other one counted.
 * Ownership: borrows both; touches no descriptor. */
void flg_histogram_merge(flg_histogram *histogram, const flg_histogram *other);

/* The value that `percent` (0 to 100) of those counted do not exceed, within 0.4 %; 0 when empty.
 * Ownership: borrows histogram; touches no descriptor. */
int64_t flg_histogram_percentile(const flg_histogram *histogram, double percent);

/* Sets the timer slack of the calling thread: how late the kernel may let its sleeps end, to spare wake-ups.
 * Ownership: touches no descriptor. */
int flg_timer_slack(int64_t slack);

/* Sleeps until an instant of CLOCK_MONOTONIC; -EINTR when a signal came, which the caller handles before it calls again.
 * Ownership: touches no descriptor. */
int flg_sleep_until(int64_t instant);

/* Computes until the calling thread has used so much processor time.
 * Ownership: touches no descriptor. */
void flg_burn_cpu(int64_t duration);
/* cffi: end */

#endif
