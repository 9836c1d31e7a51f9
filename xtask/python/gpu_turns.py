"""Programs that speak protocol.py and step in turn on one GPU, so that clocks and heat hit all of them alike."""

import json
import subprocess
import tempfile
import threading
import time
from collections import namedtuple

# What is run, and how many steps of it are not counted.
Contender = namedtuple("Contender", "name command warm_up")
# Where all of them run: steps in a turn and in all, when everything has to end (time.monotonic), the environment, and a
# function that tells the free bytes of the GPU, or None.
Place = namedtuple("Place", "per_turn steps ends environment free")

# A program that grows after its warm-up shall not be the one that fails for its neighbours.
MARGIN = 1.25
FAULTS = (RuntimeError, OSError, ValueError, KeyError)


class OutOfTime(Exception):
    pass


class Worker:
    """A program that was started."""

    def __init__(self, contender, place):
        self.contender, self.place, self.seconds, self.taken = contender, place, [], None
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            contender.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=place.environment
        )
        # A program that hangs, or is not done in time, is one that dies.
        self.alarm = threading.Timer(max(place.ends - time.monotonic(), 0), self.process.kill)
        self.alarm.start()

    def load(self):
        self.versions = self.answer().get("versions", {})

    def warm_up(self):
        """The steps that are not counted; what memory they take."""
        before = self.place.free()
        for _ in range(self.contender.warm_up):
            self.step()
        after = self.place.free()
        self.taken = None if before is None or after is None else before - after

    def answer(self):
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.process.wait()
        if time.monotonic() >= self.place.ends:
            raise OutOfTime
        self.errors.seek(0)
        # The frames of a backtrace are indented, in both languages.
        lines = [line for line in self.errors.read().splitlines() if line and not line[0].isspace()]
        raise RuntimeError("\n".join(lines[-3:]) or f"exit code {self.process.returncode}")

    def step(self):
        try:
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: `answer` says why
        return self.answer()["seconds"]

    def turn(self, steps):
        self.seconds += [self.step() for _ in range(steps)]

    def finish(self):
        """What is known of it at its end."""
        self.process.stdin.close()
        summary = self.answer()
        return {
            "seconds": self.seconds,
            "memory_bytes": summary.get("peak_gpu_bytes"),
            "difference": summary.get("difference"),
            **self.versions,
        }

    def kill(self):
        self.alarm.cancel()
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            try:
                stream.close()
            except BrokenPipeError:
                pass  # a line that it never read


def fits(running, place):
    """Whether one more that grows as much as the one that grew most finds room on the GPU."""
    free, taken = place.free(), [w.taken for w in running if w.taken is not None]
    return free is None or not taken or free >= MARGIN * max(taken)


def measure(contenders, place, record):
    """Lets them take turns, and then, each alone, those that found no room or failed beside the others. `record` gets the
    name of each and what was found, or its error; raises OutOfTime where the time was over before."""
    for contender in together(contenders, place, record):
        together([contender], place, record)


def together(contenders, place, record):
    """Returns those that could not take part and have not been tried alone."""
    if time.monotonic() >= place.ends:
        raise OutOfTime
    waiting, live = [], []

    def leave(worker, error=None):
        live.remove(worker)
        worker.kill()
        if live:
            waiting.append(worker.contender)
        else:
            record(worker.contender.name, {"error": str(error) or type(error).__name__})

    def each(work):
        """What fails is not there for what comes then."""
        for worker in list(live):
            try:
                work(worker)
            except FAULTS as error:
                leave(worker, error)

    def warm_up(worker):
        if fits([w for w in live if w is not worker], place):
            worker.warm_up()
        else:
            leave(worker)

    def finish(worker):
        name, found = worker.contender.name, worker.finish()
        live.remove(worker)
        worker.kill()
        record(name, {**found, "in_turn_with": [other for other in names if other != name]})

    try:
        # All load at once; their steps are one program's at a time.
        live += [Worker(contender, place) for contender in contenders]
        each(Worker.load)
        each(warm_up)
        for done in range(0, place.steps, place.per_turn):
            each(lambda worker, steps=min(place.per_turn, place.steps - done): worker.turn(steps))
        names = [worker.contender.name for worker in live]
        each(finish)
    finally:
        for worker in live:
            worker.kill()
    return waiting
