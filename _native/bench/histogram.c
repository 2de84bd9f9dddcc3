/* A log-linear histogram of nanoseconds: exact below 2 * FLG_STEPS, from there FLG_STEPS equal steps to the next power of two. */
#include "loadgen.h"

#include <errno.h>
#include <math.h>

enum { BITS = 7 }; /* 1 << BITS == FLG_STEPS */

_Static_assert(1 << BITS == FLG_STEPS, "the steps of a power of two");
_Static_assert((62 - BITS + 2) * FLG_STEPS == FLG_BUCKETS, "every int64_t that is not negative has its bucket");

static int shift_of(uint64_t value) { return value < 2 * FLG_STEPS ? 0 : 63 - __builtin_clzll(value) - BITS; }

static size_t bucket_of(uint64_t value) {
    int shift = shift_of(value);
    return ((size_t)shift << BITS) + (size_t)(value >> shift);
}

/* The middle of a bucket. */
static int64_t value_of(size_t bucket) {
    int shift = bucket < 2 * FLG_STEPS ? 0 : (int)(bucket >> BITS) - 1;
    uint64_t low = (uint64_t)(bucket - ((size_t)shift << BITS)) << shift;
    return (int64_t)(low + ((uint64_t)1 << shift) / 2);
}

static void add_sum(flg_histogram *histogram, uint64_t low, uint64_t high) {
    histogram->sum_low += low;
    histogram->sum_high += high + (histogram->sum_low < low);
}

int flg_histogram_add(flg_histogram *histogram, const int64_t *values, size_t size) {
    size_t i;
    for (i = 0; i < size; i++)
        if (values[i] < 0)
            return -EINVAL;
    for (i = 0; i < size; i++) {
        if (!histogram->count || values[i] < histogram->min)
            histogram->min = values[i];
        if (values[i] > histogram->max)
            histogram->max = values[i];
        histogram->count++;
        add_sum(histogram, (uint64_t)values[i], 0);
        histogram->buckets[bucket_of((uint64_t)values[i])]++;
    }
    return 0;
}

void flg_histogram_merge(flg_histogram *histogram, const flg_histogram *other) {
    size_t i;
    if (!other->count)
        return;
    if (!histogram->count || other->min < histogram->min)
        histogram->min = other->min;
    if (other->max > histogram->max)
        histogram->max = other->max;
    histogram->count += other->count;
    add_sum(histogram, other->sum_low, other->sum_high);
    for (i = 0; i < FLG_BUCKETS; i++)
        histogram->buckets[i] += other->buckets[i];
}

int64_t flg_histogram_percentile(const flg_histogram *histogram, double percent) {
    double wanted = ceil(percent / 100 * (double)histogram->count);
    uint64_t rank = wanted < 1 ? 1 : (uint64_t)wanted, below = 0;
    int64_t value;
    size_t i;
    /* The ends are known exactly. */
    if (rank <= 1)
        return histogram->min;
    if (rank >= histogram->count)
        return histogram->max;
    for (i = 0; i < FLG_BUCKETS - 1; i++)
        if ((below += histogram->buckets[i]) >= rank)
            break;
    value = value_of(i);
    return value < histogram->min ? histogram->min : value > histogram->max ? histogram->max : value;
}
