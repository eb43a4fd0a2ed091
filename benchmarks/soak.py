"""A server under mixed traffic for minutes: does it grow, does it lose an answer, does it end when it is told to?

    python benchmarks/soak.py [MODEL...] [--minutes 10] [--rate 3] [--out results/soak.json]

Starts `seriatim serve` in a process of its own and asks it at random times (Poisson, `--rate` requests a second):
texts, streams, pictures, clients that go away in the middle, and requests that are wrong. Every answer is compared with
what the same request is answered when nobody else asks, so that an answer that came to the wrong client is found.
Memory, threads and open files are read every two seconds; the slope of memory is that of its last four fifths. At the
end the server gets SIGTERM while streams run: each has to end, or to be told, within ten seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from seriatim.evaluation.cost import load_average
from seriatim.verbs.claim import commit, machine

EVERY, ENDING, STREAMS = 2.0, 10.0, 12
SLOPE, KINDS = 1.0, 24  # MB a minute at most; different requests
WRONG: list[tuple[str, Any, int]] = [
    ("/v1/completions", {"model": "nothing", "prompt": "a"}, 404),
    ("/v1/completions", {"prompt": 7}, 400),
    ("/v1/completions", b'{"model": "x", "prompt": ', 400),
    ("/v1/completions", b'{"prompt": "\xff\xfe"}', 400),
    ("/v1/chat/completions", {"messages": "hello"}, 400),
    ("/v1/images/generations", {"prompt": {"a": 1}}, 400),
    ("/v1/nowhere", {}, 404),
]


# ---- traffic ---------------------------------------------------------------------------------------------------------


def asked(text: str, drawn: str | None) -> list[tuple[str, dict[str, Any]]]:
    """Different requests whose answers are always the same."""
    rng, out = random.Random(0), list[tuple[str, dict[str, Any]]]()
    for n in range(KINDS):
        if drawn is not None and n % 4 == 3:
            out.append(("/v1/images/generations", {"model": drawn, "prompt": str(n % 10), "seed": n}))
            continue
        prompt = "".join(rng.choice("def class return self import (x):\n ") for _ in range(rng.randint(20, 300)))
        more = {"temperature": rng.choice([0.0, 0.7, 1.0]), "seed": n, "max_tokens": rng.randint(8, 80)}
        if n % 5 == 2:
            more["stop"] = ["\n"]
        out.append(("/v1/completions", {"model": text, "prompt": prompt, **more}))
    return out


async def whole(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Any:
    """What is answered, as one thing that can be compared."""
    answer = await http.post(path, json=body)
    answer.raise_for_status()
    said = answer.json()
    if "choices" in said:
        return said["choices"][0]["text"], said["choices"][0]["finish_reason"], said["usage"]["completion_tokens"]
    return said["data"][0]["b64_json"]


async def streamed(http: httpx.AsyncClient, path: str, body: dict[str, Any], most: int | None = None) -> Any:
    """The same by a stream; most: go away behind so many events."""
    text, finish, last, seen = "", None, None, 0
    async with http.stream("POST", path, json={**body, "stream": True}) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                return (text, finish) if last is None else last
            said = json.loads(line[6:])
            if "error" in said:
                return said["error"]["code"]
            if "choices" in said:
                text, finish = text + said["choices"][0]["text"], said["choices"][0]["finish_reason"] or finish
            else:
                last = said["b64_json"]
            seen += 1
            if most is not None and seen >= most:
                return None
    raise RuntimeError("a stream broke off")


async def visit(http: httpx.AsyncClient, rng: random.Random, known: list[tuple[str, Any, Any]], seen: Counter) -> None:
    """One client."""
    kind = rng.choices(["whole", "stream", "leaves", "wrong"], [4, 4, 2, 1])[0]
    try:
        if kind == "wrong":
            path, body, status = rng.choice(WRONG)
            sent: dict[str, Any] = {"content": body} if isinstance(body, bytes) else {"json": body}
            answer = await http.post(path, headers={"Content-Type": "application/json"}, **sent)
            seen[
                "wrong, refused" if answer.status_code == status else f"LOST: {answer.status_code} for a wrong one"
            ] += 1
            return
        path, body, want = rng.choice(known)
        if kind == "leaves":
            await streamed(http, path, body, rng.randint(1, 6))
        else:
            got = await (whole if kind == "whole" else streamed)(http, path, body)
            if kind == "stream" and isinstance(want, tuple):
                want = want[:2]
            seen[kind if got == want else f"CROSSED: {kind} at {path}"] += 1
            return
        seen["went away"] += 1
    except httpx.HTTPStatusError as error:
        busy = error.response.status_code == 429
        seen["busy" if busy else f"LOST: {error.response.status_code}"] += 1
    except (httpx.HTTPError, RuntimeError) as error:
        seen[f"LOST: {type(error).__name__}"] += 1


# ---- the server ------------------------------------------------------------------------------------------------------


def state(pid: int) -> tuple[float, int, int]:
    """Memory in MB, threads, open files."""
    said = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(said["VmRSS"].split()[0]) / 1e3, int(said["Threads"]), len(os.listdir(f"/proc/{pid}/fd"))


def slope(times: list[float], values: list[float]) -> float:
    """Of a straight line through points, a minute."""
    mean = sum(times) / len(times)
    square = sum((t - mean) ** 2 for t in times)
    return 60 * sum((t - mean) * v for t, v in zip(times, values, strict=True)) / square


async def ready(http: httpx.AsyncClient) -> None:
    for _ in range(600):
        with contextlib.suppress(httpx.TransportError):
            if (await http.get("/health")).status_code == 200:
                return
        await asyncio.sleep(0.2)
    raise RuntimeError("the server did not get ready")


async def soak(http: httpx.AsyncClient, pid: int, known: Any, minutes: float, rate: float) -> dict[str, Any]:
    """Traffic for so long; what came of it, and how the server grew."""
    rng, seen, tasks = random.Random(1), Counter[str](), set[asyncio.Task[None]]()
    start, points = time.monotonic(), list[tuple[float, float, int, int]]()
    due = begin = start
    while (now := time.monotonic()) < begin + 60 * minutes:
        if now >= due:
            due += EVERY
            points.append((now - begin, *state(pid)))
            left = begin + 60 * minutes - now
            print(f"\r{sum(seen.values())} answers, {points[-1][1]:.0f} MB, {left:.0f} s left  ", end="", flush=True)
        task = asyncio.create_task(visit(http, rng, known, seen))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        await asyncio.sleep(rng.expovariate(rate))
    await asyncio.gather(*tasks)
    print()
    late = [p for p in points if p[0] > 12 * minutes]
    threads, files = ([p[i] for p in late] for i in (2, 3))
    times, memory = ([p[i] for p in late] for i in (0, 1))
    return {
        "answers": dict(seen), "MB at the end": memory[-1], "MB a minute": slope(times, memory),
        "threads": (min(threads), max(threads)), "files": (min(files), max(files)), "points": points,
    }  # fmt: skip


async def terminated(http: httpx.AsyncClient, server: subprocess.Popen[bytes], text: str) -> dict[str, Any]:
    """SIGTERM while streams run: how each ended, and how long the server took."""
    body = {"model": text, "prompt": "import os\n", "max_tokens": 700, "temperature": 1.0}
    streams = [asyncio.create_task(streamed(http, "/v1/completions", {**body, "seed": s})) for s in range(STREAMS)]
    await asyncio.sleep(1.5)
    start = time.monotonic()
    server.send_signal(signal.SIGTERM)
    ends = await asyncio.gather(*streams, return_exceptions=True)
    seconds = time.monotonic() - start
    code = await asyncio.to_thread(server.wait, 30)
    how = Counter(
        "finished" if isinstance(end, tuple) else "told" if end == "shutting_down" else f"LOST: {end!r}" for end in ends
    )
    return {"streams": dict(how), "seconds": seconds, "exit": code, "whole": time.monotonic() - start}


async def run(options: argparse.Namespace) -> dict[str, Any]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "seriatim", "serve", *options.models, "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    limits = httpx.Limits(max_connections=None)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=120, limits=limits) as http:
            await ready(http)
            listed = (await http.get("/v1/models")).json()["data"]
            names: dict[str, str] = {m["seriatim"]["kind"]: m["id"] for m in listed}
            known = [(p, b, await whole(http, p, b)) for p, b in asked(names["text"], names.get("image"))]
            found = await soak(http, server.pid, known, options.minutes, options.rate)
            return {**found, "SIGTERM": await terminated(http, server, names["text"])}
    finally:
        if server.poll() is None:
            server.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["zoo:text-base", "zoo:var"], help="what is served, a text first")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=3.0, help="requests a second")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = asyncio.run(run(options))
    end = found["SIGTERM"]
    gates = {
        "memory": found["MB a minute"] < SLOPE,
        "threads": found["threads"][1] - found["threads"][0] <= 2,
        "files": found["files"][1] - found["files"][0] <= 2 * STREAMS,  # a socket for every client at present
        "answers": not any(kind.startswith(("LOST", "CROSSED")) for kind in found["answers"]),
        "SIGTERM": end["seconds"] < ENDING and not any(kind.startswith("LOST") for kind in end["streams"]),
    }
    for kind, count in sorted(found["answers"].items()):
        print(f"{kind:24s} {count}")
    print(
        f"memory {found['MB at the end']:.0f} MB, {found['MB a minute']:+.2f} MB a minute; threads {found['threads']}, "
        f"files {found['files']}; SIGTERM: {end['streams']} in {end['seconds']:.1f} s, exit {end['exit']}"
    )
    print(", ".join(f"{gate}: {'holds' if held else 'FAILS'}" for gate, held in gates.items()))
    if options.out:
        said = {"models": options.models, "minutes": options.minutes, "rate": options.rate, **found, "gates": gates}
        said["points"] = [[round(x, 1) for x in point] for point in found["points"][::5]]
        command = (
            f"python benchmarks/soak.py {' '.join(options.models)} --minutes {options.minutes} --rate {options.rate}"
        )
        said |= {"command": command, "load_average": load_average(), "machine": machine(), "commit": commit()}
        options.out.write_text(json.dumps(said) + "\n")
    return 0 if all(gates.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
