# What nginx needs to hold a request as long as its header says: a handler for its Perl module. A worker that waits here does nothing else.
package hold;

use strict;
use warnings;
use nginx;
use Time::HiRes qw(clock_gettime clock_nanosleep CLOCK_MONOTONIC CLOCK_THREAD_CPUTIME_ID TIMER_ABSTIME);

sub sleeping {
    my ($request) = @_;
    my $began = clock_gettime(CLOCK_MONOTONIC);
    my $deadline = $began + service($request);
    # A signal may cut the sleep short.
    while ( clock_gettime(CLOCK_MONOTONIC) < $deadline ) {
        clock_nanosleep( CLOCK_MONOTONIC, $deadline * 1e9, TIMER_ABSTIME );
    }
    return answer( $request, $began );
}

sub burning {
    my ($request) = @_;
    my $began = clock_gettime(CLOCK_MONOTONIC);
    my $end = clock_gettime(CLOCK_THREAD_CPUTIME_ID) + service($request);
    while ( clock_gettime(CLOCK_THREAD_CPUTIME_ID) < $end ) { }
    return answer( $request, $began );
}

sub service {
    my ($request) = @_;
    return ( $request->header_in("Fdpass-Service") || 0 ) / 1e9;
}

sub answer {
    my ( $request, $began ) = @_;
    my $body = sprintf "fdpass %d %d %d 0\n", $$, $began * 1e9, $began * 1e9;
    $request->header_out( "Content-Length", length $body );
    $request->send_http_header("text/plain");
    $request->print($body) unless $request->header_only;
    return OK;
}

1;
