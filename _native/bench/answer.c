/* The reader of one HTTP/1.x answer to a GET, in whatever pieces it comes. Pure: no socket, no clock, no memory of its own. */
#define _GNU_SOURCE 1

#include "loadgen.h"

#include <string.h>
#include <strings.h>

enum { STATUS_LINE, HEADER, BODY, UNTIL_END, CHUNK_LINE, CHUNK, CHUNK_END, TRAILER, WHOLE, BROKEN };

static int blank(char c) { return c == ' ' || c == '\t'; }
static int digit(char c) { return c >= '0' && c <= '9'; }

static void begin_head(flg_parser *parser) {
    parser->stage = STATUS_LINE;
    parser->status = 0;
    parser->minor = 0;
    parser->keep = 0;
    parser->chunked = 0;
    parser->line_size = 0;
    parser->length = -1;
}

void flg_parse_begin(flg_parser *parser) {
    begin_head(parser);
    parser->body_size = 0;
    parser->head_size = 0;
    parser->left = 0;
    parser->seen = 0;
}

/* A line's end without its blanks. */
static const char *trimmed(const char *from, const char *end) {
    while (end > from && blank(end[-1]))
        end--;
    return end;
}

static int is(const char *from, const char *end, const char *word) {
    size_t size = strlen(word);
    return (size_t)(end - from) == size && !strncasecmp(from, word, size);
}

/* The last member of a list from..*end, whose end then is before the comma, or `from` when no other is left. */
static const char *last_member(const char *from, const char **end) {
    const char *start = *end, *stop = *end;
    while (start > from && start[-1] != ',')
        start--;
    *end = start > from ? start - 1 : from;
    while (start < stop && blank(*start))
        start++;
    return start;
}

static int status_line(flg_parser *parser, const char *line, const char *end) {
    if (end - line < 12 || memcmp(line, "HTTP/1.", 7) || !digit(line[7]) || line[8] != ' ' || line[9] < '1' || line[9] > '9' ||
        !digit(line[10]) || !digit(line[11]) || (end - line > 12 && line[12] != ' '))
        return FLG_BAD;
    parser->minor = line[7] - '0';
    parser->status = (line[9] - '0') * 100 + (line[10] - '0') * 10 + (line[11] - '0');
    parser->keep = parser->minor > 0;
    parser->stage = HEADER;
    /* Nobody asked for another protocol. */
    return parser->status == 101 ? FLG_BAD : FLG_MORE;
}

static int content_length(flg_parser *parser, const char *value, const char *end) {
    int64_t length = 0;
    if (value == end || end - value > 18)
        return FLG_BAD;
    for (; value < end; value++) {
        if (!digit(*value))
            return FLG_BAD;
        length = length * 10 + (*value - '0');
    }
    if (parser->length >= 0 && parser->length != length)
        return FLG_BAD;
    parser->length = length;
    return FLG_MORE;
}

static int header(flg_parser *parser, const char *line, const char *end, int whole) {
    const char *colon = memchr(line, ':', (size_t)(end - line)), *value, *member, *rest;
    int matters;
    /* A name is not empty and has no blank at its end; a line that begins with one goes on from the last, which is obsolete. */
    if (!colon || colon == line || blank(*line) || blank(colon[-1]))
        return whole || blank(*line) ? FLG_BAD : FLG_MORE;
    matters = is(line, colon, "content-length") || is(line, colon, "transfer-encoding") || is(line, colon, "connection");
    if (!matters)
        return FLG_MORE;
    if (!whole)
        return FLG_BAD;
    for (value = colon + 1; value < end && blank(*value);)
        value++;
    if (is(line, colon, "content-length"))
        return content_length(parser, value, end);
    rest = end;
    member = last_member(value, &rest);
    if (is(line, colon, "transfer-encoding")) {
        /* 1: chunked comes last; -1: another coding does, whose end is that of the file. */
        parser->chunked = is(member, trimmed(member, end), "chunked") ? 1 : -1;
        return FLG_MORE;
    }
    for (;;) {
        const char *stop = trimmed(member, end);
        if (is(member, stop, "close"))
            parser->keep = -1; /* whatever else is said */
        else if (is(member, stop, "keep-alive") && !parser->keep)
            parser->keep = 1;
        if (rest == value)
            return FLG_MORE;
        end = rest;
        member = last_member(value, &rest);
    }
}

static int head_end(flg_parser *parser) {
    if (parser->status < 200) {
        begin_head(parser); /* an interim answer: the final one follows */
        return FLG_MORE;
    }
    parser->head_size = 0;
    parser->keep = parser->keep > 0;
    if (parser->status == 204 || parser->status == 304)
        parser->stage = WHOLE;
    else if (parser->chunked > 0)
        parser->stage = CHUNK_LINE;
    else if (parser->chunked < 0 || parser->length < 0) {
        parser->stage = UNTIL_END;
        parser->keep = 0;
    } else {
        parser->left = parser->length;
        parser->stage = parser->left ? BODY : WHOLE;
    }
    return parser->stage == WHOLE ? FLG_DONE : FLG_MORE;
}

static int chunk_line(flg_parser *parser, const char *line, const char *end) {
    const char *at = line;
    int64_t size = 0;
    for (; at < end; at++) {
        int c = *at | 0x20, value = digit(*at) ? *at - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
        if (value < 0)
            break;
        if (at - line == 15)
            return FLG_BAD;
        size = size * 16 + value;
    }
    if (at == line)
        return FLG_BAD;
    while (at < end && blank(*at))
        at++;
    if (at < end && *at != ';')
        return FLG_BAD;
    parser->head_size = 0;
    parser->left = size;
    parser->stage = size ? CHUNK : TRAILER;
    return FLG_MORE;
}

/* One line without its end; whole: it fitted into parser->line. */
static int line_done(flg_parser *parser, const char *line, const char *end, int whole) {
    switch (parser->stage) {
    case STATUS_LINE:
        return status_line(parser, line, end);
    case HEADER:
        return line == end ? head_end(parser) : header(parser, line, trimmed(line, end), whole);
    case CHUNK_LINE:
        return chunk_line(parser, line, end);
    case CHUNK_END:
        parser->stage = CHUNK_LINE;
        return line == end ? FLG_MORE : FLG_BAD;
    default: /* TRAILER */
        if (line != end)
            return FLG_MORE;
        parser->stage = WHOLE;
        return FLG_DONE;
    }
}

/* Takes bytes up to the line's end; returns how many. */
static size_t take_line(flg_parser *parser, const char *data, size_t size, int *result) {
    const char *newline = memchr(data, '\n', size), *line = data, *end;
    size_t taken = newline ? (size_t)(newline - data) + 1 : size, text = newline ? taken - 1 : taken;
    int whole;
    if (taken > (size_t)(FLG_HEAD_MAX - parser->head_size)) {
        *result = FLG_BAD;
        return taken;
    }
    parser->head_size += (int)taken;
    if (!newline || parser->line_size) {
        size_t room = parser->line_size < FLG_LINE_MAX ? (size_t)(FLG_LINE_MAX - parser->line_size) : 0;
        memcpy(parser->line + FLG_LINE_MAX - room, data, text < room ? text : room);
        parser->line_size += (int)text;
        line = parser->line;
        text = (size_t)parser->line_size;
    }
    if (!newline) {
        /* What is not HTTP may never send a line's end. */
        *result = parser->stage == STATUS_LINE && memcmp(line, "HTTP/1.", text < 7 ? text : 7) ? FLG_BAD : FLG_MORE;
        return taken;
    }
    whole = text <= FLG_LINE_MAX;
    end = line + (whole ? text : FLG_LINE_MAX);
    if (whole && end > line && end[-1] == '\r')
        end--;
    parser->line_size = 0;
    *result = line_done(parser, line, end, whole);
    return taken;
}

static size_t take_body(flg_parser *parser, const char *data, size_t size) {
    size_t room = (size_t)(FLG_BODY_START - parser->body_size);
    if (parser->stage != UNTIL_END && (int64_t)size > parser->left)
        size = (size_t)parser->left;
    memcpy(parser->body + parser->body_size, data, size < room ? size : room);
    parser->body_size += (int)(size < room ? size : room);
    parser->left -= (int64_t)size;
    return size;
}

int flg_parse(flg_parser *parser, const char *data, size_t size, size_t *used) {
    size_t at = 0;
    int result = parser->stage == WHOLE ? FLG_DONE : parser->stage == BROKEN ? FLG_BAD : FLG_MORE;
    while (at < size && result == FLG_MORE) {
        if (parser->stage == BODY || parser->stage == CHUNK || parser->stage == UNTIL_END) {
            at += take_body(parser, data + at, size - at);
            if (parser->stage == UNTIL_END)
                parser->left = 0;
            else if (!parser->left) {
                result = parser->stage == BODY ? FLG_DONE : FLG_MORE;
                parser->stage = parser->stage == BODY ? WHOLE : CHUNK_END;
            }
        } else
            at += take_line(parser, data + at, size - at, &result);
    }
    if (result == FLG_BAD)
        parser->stage = BROKEN;
    parser->seen += (int64_t)at;
    *used = at;
    return result;
}

int flg_parse_end(const flg_parser *parser) { return parser->stage == UNTIL_END || parser->stage == WHOLE ? FLG_DONE : FLG_MORE; }

int flg_parse_body(const flg_parser *parser, int64_t *found) {
    const char *at = parser->body, *end = at + parser->body_size;
    int64_t numbers[4];
    int i, negative, digits;
    if (end - at < 7 || memcmp(at, "fdpass ", 7))
        return 0;
    at += 7;
    for (i = 0; i < 4; i++) {
        numbers[i] = 0;
        negative = at < end && *at == '-';
        at += negative;
        for (digits = 0; at < end && digit(*at); at++, digits++)
            if (__builtin_mul_overflow(numbers[i], 10, &numbers[i]) || __builtin_add_overflow(numbers[i], *at - '0', &numbers[i]))
                return 0;
        if (!digits || at == end || *at++ != (i < 3 ? ' ' : '\n'))
            return 0;
        if (negative)
            numbers[i] = -numbers[i];
    }
    memcpy(found, numbers, sizeof numbers);
    return 1;
}
