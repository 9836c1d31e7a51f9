"""What gpu.py has found as a table, and what was wanted of it."""

import statistics

OURS = "tinyfusion"
COMPILED = "torch.compile"


def median(found):
    return statistics.median(found["seconds"]) if found and "seconds" in found else None


class Case:
    """The programs of a case, by name; of one that was not run, none."""

    def __init__(self, results, kind, network):
        cases = results["cases"].values()
        found = next((c for c in cases if (c["kind"], c["network"]) == (kind, network)), {"programs": {}})
        self.programs = found["programs"]

    def seconds(self, name):
        return median(self.programs.get(name))

    def best(self, value):
        """The lowest of PyTorch's ways, if there is one."""
        found = [value(p) for name, p in self.programs.items() if name != OURS]
        return min((v for v in found if v), default=None)

    def speedup(self, theirs):
        """How many times as long they take as we."""
        ours = self.seconds(OURS)
        return theirs / ours if theirs and ours else None

    def memory(self):
        """Our peak over the least of theirs."""
        ours = self.programs.get(OURS, {}).get("memory_bytes")
        theirs = self.best(lambda p: p.get("memory_bytes"))
        return ours / theirs if ours and theirs else None


def goals(results, whole, half):
    """What is wanted: its words, what was found or None, at least or at most, how much. `whole` and `half` are the names of
    the network and of the one of half its blocks."""
    of = lambda kind, network=whole: Case(results, kind, network)  # noqa: E731
    yield f"sampling, {half} against {whole}", of("sampling", half).speedup(of("sampling").seconds(OURS)), "at least", 1.95
    for kind in ("sampling", "fine-tune"):
        yield f"{kind}, {whole}, against {COMPILED}", of(kind).speedup(of(kind).seconds(COMPILED)), "at least", 1.0
    for kind in ("learn-lora", "learn-full"):
        blend = of(kind)
        yield f"{kind}, {whole}, against PyTorch's plain blend, its fastest way", blend.speedup(blend.best(median)), "at least", 1.5
    for kind in ("sampling", "fine-tune", "learn-lora", "learn-full", "masked-kd"):
        yield f"peak memory, {kind}, {whole}, against PyTorch's least", of(kind).memory(), "at most", 0.8


def verdict(found, direction, wanted, is_rehearsal):
    if found is None:
        return "not measured"
    if is_rehearsal:
        return "a rehearsal"
    off = (wanted - found if direction == "at least" else found - wanted) / wanted
    return "holds" if off <= 0 else f"misses by {100 * off:.1f} %"


def verdicts(results, whole, half):
    is_rehearsal = results["settings"]["tiny"] or results["settings"]["device"] == "cpu"
    return [
        {"goal": goal, "wanted": f"{direction} {wanted}", "found": found, "verdict": verdict(found, direction, wanted, is_rehearsal)}
        for goal, found, direction, wanted in goals(results, whole, half)
    ]


def parity(checks):
    if not checks:
        return "not compared"
    if checks["error"]:
        return f"failed: {checks['error']}"
    return f"{len(checks['checks']) - len(checks['failed'])} of {len(checks['checks'])} checks hold"


def row(label, name, found, ours, rate, flops):
    seconds = median(found)
    if seconds is None:
        return f"| {label} | {name} | failed: {found['error'].splitlines()[-1]} | | | |"
    # Those that did not take turns with ours may have met another clock.
    mark = "" if name == OURS or OURS in found["in_turn_with"] else " *"
    ratio = f"{seconds / ours:.2f}×{mark}" if ours else ""
    share = f"{100 * flops / seconds / rate:.0f} %" if flops and rate else ""
    memory = f"{found['memory_bytes'] / 2**30:.1f} GiB" if found["memory_bytes"] else ""
    least, most = min(found["seconds"]), max(found["seconds"])
    time = f"{1e3 * seconds:.2f} ({1e3 * least:.2f} to {1e3 * most:.2f})"
    return f"| {label} | {name} | {time} | {ratio} | {share} | {memory} |"


def text(results):
    machine, cases = results["machine"], results["cases"]
    place = f"On {machine['gpu'] or 'no GPU'}, driver {machine['driver'] or 'none'}, torch {machine['torch'] or 'none'}"
    lines = [f"{place}, {results['settings']['dtype']}; medians (least to most)."]
    if results["settings"]["tiny"]:
        lines += ["", "A rehearsal with small networks: the numbers say nothing."]
    lines += ["", f"Parity with the CPU: {parity(results['parity'])}.", ""]
    lines += ["| case | program | ms | over ours | share of the matrix rate | peak memory |", "|---|---|--:|--:|--:|--:|"]
    probe = cases.get("matmul", {"programs": {}})
    rate = max((probe["flops"] / s for s in map(median, probe["programs"].values()) if s), default=None)
    rows = []
    for label, case in cases.items():
        ours = median(case["programs"].get(OURS))
        rows += [row(label, name, found, ours, rate, case["flops"]) for name, found in case["programs"].items()]
    lines += rows
    if any(" * |" in row for row in rows):
        lines += ["", "\\* measured alone: it found no room on the GPU beside the others, failed beside them, or was tried again."]
    lines += ["", "| goal | wanted | found | |", "|---|---|--:|---|"]
    for goal in results["verdicts"]:
        found = "" if goal["found"] is None else f"{goal['found']:.2f}×"
        lines.append(f"| {goal['goal']} | {goal['wanted']}× | {found} | {goal['verdict']} |")
    return "\n".join(lines)
