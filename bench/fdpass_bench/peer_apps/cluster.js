// The program that Node runs: a cluster whose workers hold each HTTP request as long as its header says.
// Arguments: port, workers, backlog, sleep|burn, keep-alive|close, the folder in which a worker that serves leaves its pid, and rr (the
// primary accepts and hands round) or none (the workers accept, as the kernel lets them).
"use strict";

const cluster = require("cluster");
const fs = require("fs");
const http = require("http");
const path = require("path");

const [port, workers, backlog, work, connection, ready, scheduling] = process.argv.slice(2);
const processorTime = process.threadCpuUsage ?? process.cpuUsage; // the former since Node 23.9
const never = new Int32Array(new SharedArrayBuffer(4));

function burned(since) {
    const { user, system } = processorTime.call(process, since);
    return BigInt(user + system) * 1000n;
}

// The event loop waits on purpose: a worker does one thing at a time.
function hold(began, service) {
    if (work === "burn") {
        const since = processorTime.call(process);
        while (burned(since) < service);
        return;
    }
    for (let left; (left = began + service - process.hrtime.bigint()) > 0n; ) Atomics.wait(never, 0, 0, Number(left) / 1e6);
}

if (cluster.isPrimary) {
    cluster.schedulingPolicy = scheduling === "none" ? cluster.SCHED_NONE : cluster.SCHED_RR;
    for (let i = 0; i < Number(workers); i++) cluster.fork();
} else {
    const server = http.createServer((request, response) => {
        const began = process.hrtime.bigint(); // CLOCK_MONOTONIC
        hold(began, BigInt(request.headers["fdpass-service"] ?? 0));
        const body = `fdpass ${process.pid} ${began} ${began} 0\n`;
        const headers = { "Content-Type": "text/plain", "Content-Length": body.length };
        if (connection === "close") headers.Connection = "close";
        response.writeHead(200, headers);
        response.end(body);
    });
    server.keepAliveTimeout = 3600e3;
    server.listen({ host: "127.0.0.1", port: Number(port), backlog: Number(backlog) }, () =>
        fs.writeFileSync(path.join(ready, String(process.pid)), ""),
    );
}
