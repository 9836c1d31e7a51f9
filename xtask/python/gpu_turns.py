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
    """A program that has loaded everything and taken its first steps."""

    def __init__(self, contender, place):
        self.contender, self.ends, self.seconds = contender, place.ends, []
        before = place.free()
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            contender.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=place.environment
        )
        # A program that hangs, or is not done in time, is one that dies.
        self.alarm = threading.Timer(max(place.ends - time.monotonic(), 0), self.process.kill)
        self.alarm.start()
        try:
            self.versions = self.answer().get("versions", {})
            for _ in range(contender.warm_up):
                self.step()
        except BaseException:
            self.kill()
            raise
        after = place.free()
        self.taken = None if before is None or after is None else before - after

    def answer(self):
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.process.wait()
        if time.monotonic() >= self.ends:
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
    """Whether one more that is as large as the largest finds room on the GPU."""
    free, taken = place.free(), [w.taken for w in running if w.taken is not None]
    return free is None or not taken or free >= MARGIN * max(taken)


def measure(contenders, place, record):
    """Lets them take turns, and then, each alone, those that found no room or failed beside the others. `record` gets the
    name of each and what was found, or its error; raises OutOfTime where the time was over before."""
    waiting = together(contenders, place, record)
    for contender in waiting:
        together([contender], place, record)


def together(contenders, place, record):
    """Returns those that could not take part and have not been tried alone."""
    running, waiting = [], []

    def failed(contender, error):
        if running:
            waiting.append(contender)
        else:
            record(contender.name, {"error": str(error) or type(error).__name__})

    try:
        for contender in contenders:
            if time.monotonic() >= place.ends:
                raise OutOfTime
            if running and not fits(running, place):
                waiting.append(contender)
                continue
            try:
                running.append(Worker(contender, place))
            except FAULTS as error:
                failed(contender, error)
        for done in range(0, place.steps, place.per_turn):
            for worker in list(running):
                try:
                    worker.turn(min(place.per_turn, place.steps - done))
                except FAULTS as error:
                    running.remove(worker)
                    worker.kill()
                    failed(worker.contender, error)
        names = [worker.contender.name for worker in running]
        while running:
            worker = running.pop(0)
            try:
                name, found = worker.contender.name, worker.finish()
                record(name, {**found, "in_turn_with": [other for other in names if other != name]})
            except FAULTS as error:
                failed(worker.contender, error)
            finally:
                worker.kill()
    finally:
        for worker in running:
            worker.kill()
    return waiting
