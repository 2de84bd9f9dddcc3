/* When connections come and what each asks for, from a seed alone: no clock, no socket.
 * Generators: splitmix64 and xoshiro256** (Blackman and Vigna, public domain). */
#include "loadgen.h"

#include <math.h>

typedef struct {
    uint64_t state[4];
} stream;

static uint64_t splitmix64(uint64_t *state) {
    uint64_t mixed = (*state += 0x9e3779b97f4a7c15u);
    mixed = (mixed ^ (mixed >> 30)) * 0xbf58476d1ce4e5b9u;
    mixed = (mixed ^ (mixed >> 27)) * 0x94d049bb133111ebu;
    return mixed ^ (mixed >> 31);
}

/* A stream of its own for each purpose: the services of a seed are the same whatever the arrivals are. */
static stream stream_of(uint64_t seed, uint64_t purpose) {
    uint64_t state = seed, apart = purpose;
    stream made;
    int i;
    state = splitmix64(&state) ^ splitmix64(&apart);
    for (i = 0; i < 4; i++)
        made.state[i] = splitmix64(&state);
    return made;
}

static uint64_t rotate(uint64_t value, int by) { return (value << by) | (value >> (64 - by)); }

static uint64_t xoshiro256ss(stream *from) {
    uint64_t *state = from->state, result = rotate(state[1] * 5, 7) * 9, shifted = state[1] << 17;
    state[2] ^= state[0];
    state[3] ^= state[1];
    state[1] ^= state[2];
    state[0] ^= state[3];
    state[2] ^= shifted;
    state[3] = rotate(state[3], 45);
    return result;
}

/* In (0, 1]: the logarithm is finite. */
static double uniform(stream *from) { return (double)((xoshiro256ss(from) >> 11) + 1) * 0x1p-53; }

static double exponential(stream *from, double mean) { return -mean * log(uniform(from)); }

/* Two exponentials with balanced means: each brings half of the work. The squared coefficient of variation is 4. */
static double hyperexponential(stream *from, double mean) {
    double rare = 0.5 * (1 - sqrt(3.0 / 5.0)), weight = uniform(from) <= rare ? rare : 1 - rare;
    return exponential(from, mean / (2 * weight));
}

static int64_t rounded(double value) { return value < 9e18 ? (int64_t)(value + 0.5) : INT64_MAX / 2; }

void flg_schedule(const flg_load *load, int64_t *scheduled, int64_t *drawn) {
    stream arrivals = stream_of(load->seed, 1), services = stream_of(load->seed, 2), thinks = stream_of(load->seed, 3);
    int64_t c, r, i = 0;
    double at = 0;
    for (c = 0; c < load->connections; c++)
        for (r = 0; r < load->requests; r++, i++) {
            if (r)
                scheduled[i] = load->think > 0 ? rounded(exponential(&thinks, load->think)) : 0;
            else if (load->clients || load->arrivals == FLG_BURST)
                scheduled[i] = 0;
            else if (load->arrivals == FLG_UNIFORM)
                scheduled[i] = rounded((double)(c + 1) * load->gap);
            else
                scheduled[i] = rounded(at += exponential(&arrivals, load->gap));
            if (!(load->service > 0))
                drawn[i] = 0;
            else if (load->distribution == FLG_FIXED)
                drawn[i] = rounded(load->service);
            else if (load->distribution == FLG_HYPER)
                drawn[i] = rounded(hyperexponential(&services, load->service));
            else
                drawn[i] = rounded(exponential(&services, load->service));
        }
}
