"""Threads that compute and hand results on through locks, queues and a pipe; prints deterministic lines.

python3 threads.py [--threads 4] [--rounds 200] [--work 20000] [--log FILE] [--gate FILE]

With --gate the last 10 rounds' lines are printed only when there is a file of that name.
"""

import argparse
import hashlib
import os
import queue
import threading
import time


def work(number: int, rounds: int, amount: int, results: "queue.Queue[tuple[int, int, str]]") -> None:
    state = hashlib.sha256(str(number).encode()).digest()
    for step in range(1, rounds + 1):
        for _ in range(amount):
            state = hashlib.sha256(state).digest()
        results.put((step, number, state.hex()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--work", type=int, default=20000, help="hashes per thread and round")
    parser.add_argument("--log", help="file that the lines are also appended to")
    parser.add_argument("--gate", help="file that the last rounds wait for")
    args = parser.parse_args()

    # Bounded, so that threads wait for each other on a lock most of the time.
    results: queue.Queue[tuple[int, int, str]] = queue.Queue(maxsize=args.threads)
    threads = [threading.Thread(target=work, args=(n, args.rounds, args.work, results)) for n in range(args.threads)]
    for thread in threads:
        thread.start()
    read, write = os.pipe()
    log = open(args.log, "a", encoding="ascii") if args.log else None  # noqa: SIM115 - until the end
    waiting: dict[int, dict[int, str]] = {}
    total = hashlib.sha256()
    step = 1
    while step <= args.rounds:
        while args.gate and step > args.rounds - 10 and not os.path.exists(args.gate):
            time.sleep(0.05)
        arrived, number, state = results.get()
        waiting.setdefault(arrived, {})[number] = state
        while len(waiting.get(step, ())) == args.threads:
            done = waiting.pop(step)
            os.write(write, "".join(done[n] for n in range(args.threads)).encode())
            total.update(os.read(read, 1 << 16))
            line = f"round {step} {total.hexdigest()}"
            print(line, flush=True)
            if log is not None:
                log.write(line + "\n")
                log.flush()
            step += 1
    for thread in threads:
        thread.join()
    print(f"done {args.rounds} {total.hexdigest()}", flush=True)


if __name__ == "__main__":
    main()
