"""The compiled simulation behind `problem`: a solution -> events, events -> bytes and time."""

import numpy as np

from ..jit.compiled import compiled

SINCE, BEGIN, HOLD, EAGER, MOVE = range(5)  # rows of a solution: see `problem`
NEVER = 2**30  # a time after any base time: the `since` of a buffer's last gap, which no use ends
EVENTS = 2_000  # that a solution may come to in any case
OUT, OUT_DELAY, OUT_LOAD, IN, IN_DELAY, IN_LOAD, ROOM, RATE = range(8)  # columns of `tiers`


@compiled()
def limit_of(ops):  # pragma: no cover
    """How many events a solution may come to; one that repeats ops more often is taken for impossible."""
    return max(8 * ops + 64, EVENTS)


@compiled()
def stays(buffer, base, upcoming, output, solution):  # pragma: no cover
    """Until when a buffer that is resident at a base time stays so."""
    gap = upcoming[buffer] + buffer
    since, hold = solution[SINCE, gap], solution[HOLD, gap]
    if output[buffer] or since <= base:
        return NEVER
    if solution[BEGIN, gap] <= base < hold:
        return NEVER if since <= hold else hold
    return -1


@compiled()
def is_eager(bits, move, bit):  # pragma: no cover
    """Whether an interval starts at its time though nobody needs the value: fetches do."""
    return bits >> bit & 1 or move > 0


@compiled()
def find_starts(ops, use_start, solution):  # pragma: no cover
    """What is made though nobody needs it, as linked lists: (first of each base time, next of each, buffer, gap)."""
    count = 0
    for gap in range(solution.shape[1]):
        for bit in range(2):
            count += 1 if is_eager(solution[EAGER, gap], solution[MOVE, gap], bit) else 0
    first = np.full(ops if count else 0, -1, np.int32)
    following, owner, place = np.empty(count, np.int32), np.empty(count, np.int32), np.empty(count, np.int32)
    if count:
        count = 0
        for buffer in range(len(use_start) - 1):
            for gap in range(use_start[buffer] + buffer, use_start[buffer + 1] + buffer + 1):
                for bit in range(2):
                    at = solution[SINCE if bit == 0 else BEGIN, gap]
                    if is_eager(solution[EAGER, gap], solution[MOVE, gap], bit) and 0 <= at < ops:
                        owner[count], place[count] = buffer, gap
                        following[count], first[at] = first[at], count
                        count += 1
    return first, following, owner, place


@compiled()
def find_tiers(buffers, use_start, solution, home):  # pragma: no cover
    """For each buffer the tier that it may be fetched from, else 0."""
    tier = home.copy()
    for buffer in range(buffers):
        if home[buffer] > 0:
            if solution[SINCE, use_start[buffer] + buffer] < 0:
                tier[buffer] = 0
            continue
        for gap in range(use_start[buffer] + buffer, use_start[buffer + 1] + buffer + 1):
            if solution[MOVE, gap] > 0 and solution[SINCE, gap] >= 0:
                tier[buffer] = solution[MOVE, gap]
                break
    return tier


@compiled()
def lasts(output, home, tier):  # pragma: no cover
    """Buffers that are live at the end: outputs, and what might be at home elsewhere and stays."""
    lasting = output.copy()
    for buffer in range(len(output)):
        if home[buffer] > 0 and tier[buffer] == 0:
            lasting[buffer] = True
    return lasting


@compiled()
def expand(
    producer, read_start, read, write_start, write, use_start, use, output, repeatable, home, solution
):  # pragma: no cover
    """Base order and solution -> events in time order. Returns (order, base time of each, count or -1, tiers).

    The count is -1 where the solution needs to repeat what may not be repeated, or comes to too many events.
    """
    ops, buffers = len(read_start) - 1, len(producer)
    limit = limit_of(ops)
    order = np.empty(limit, np.int32)
    when = np.empty(limit, np.int32)
    until = np.full(buffers, -1, np.int32)  # the last base time at which each buffer is resident
    upcoming = use_start[:-1].copy()
    stack = np.empty(2 * buffers + 2 * ops + 16, np.int32)
    touched = np.empty(buffers, np.int32)
    first, following, owner, place = find_starts(ops, use_start, solution)
    tier = find_tiers(buffers, use_start, solution, home)
    lasting = lasts(output, home, tier)
    for buffer in range(buffers):
        if home[buffer] > 0 and lasting[buffer]:
            until[buffer] = NEVER
    count = 0
    for base in range(ops):
        seen = 0
        early = first[base] if len(first) else -1
        k = read_start[base]
        while early >= 0 or k < read_start[base + 1]:
            if early >= 0:
                wanted = owner[early]
                made = producer[wanted] < base or producer[wanted] == ops  # or at home in a tier
                due = place[early] == upcoming[wanted] + wanted and made
                early = following[early]
                if not due:
                    continue
            else:
                wanted = read[k]
                k += 1
            if until[wanted] >= base:
                continue
            if tier[wanted] > 0:
                if count >= limit - 2:
                    return order, when, -1, tier
                order[count], when[count] = -1 - wanted, base
                count += 1
                until[wanted] = base
                touched[seen] = wanted
                seen += 1
                continue
            stack[0] = producer[wanted]
            depth = 1
            while depth > 0:
                op = stack[depth - 1]
                missing = False
                for j in range(read_start[op], read_start[op + 1]):
                    if until[read[j]] < base:
                        if tier[read[j]] > 0:
                            if count >= limit - 2:
                                return order, when, -1, tier
                            order[count], when[count] = -1 - read[j], base
                            count += 1
                            until[read[j]] = base
                            touched[seen] = read[j]
                            seen += 1
                            continue
                        missing = True
                        if depth >= len(stack) - 1:
                            return order, when, -1, tier
                        stack[depth] = producer[read[j]]
                        depth += 1
                        break
                if missing:
                    continue
                depth -= 1
                if base > repeatable[op] or op >= base or count >= limit - 2:
                    return order, when, -1, tier
                order[count], when[count] = op, base
                count += 1
                for j in range(write_start[op], write_start[op + 1]):
                    if until[write[j]] < base:
                        until[write[j]] = base
                        touched[seen] = write[j]
                        seen += 1
        if count >= limit - 2:
            return order, when, -1, tier
        order[count], when[count] = base, base
        count += 1
        for k in range(read_start[base], read_start[base + 1]):
            upcoming[read[k]] += 1
            until[read[k]] = stays(read[k], base, upcoming, lasting, solution)
        for k in range(write_start[base], write_start[base + 1]):
            until[write[k]] = stays(write[k], base, upcoming, lasting, solution)
        for k in range(seen):
            until[touched[k]] = stays(touched[k], base, upcoming, lasting, solution)
    return order, when, count, tier


@compiled()
def find_last(order, when, count, read_start, read, write_start, write, output):  # pragma: no cover
    """For each buffer that an event touches, in the order of events, whether its life ends there, or begins there to last.

    A run has one flag for each read (it is the last of a life) and then one for each write (the value is read again before
    it is next made or fetched); a fetch has one, as a write has.
    """
    needed = output.copy()
    total = 0
    for at in range(count):
        op = order[at]
        total += 1 if op < 0 else read_start[op + 1] - read_start[op] + write_start[op + 1] - write_start[op]
    flags = np.empty(total, np.bool_)
    place = total
    for at in range(count - 1, -1, -1):
        op = order[at]
        if op < 0:
            place -= 1
            flags[place] = needed[-1 - op]
            needed[-1 - op] = False
            continue
        for k in range(write_start[op + 1] - 1, write_start[op] - 1, -1):
            place -= 1
            if output[write[k]] and when[at] != op:  # the caller holds the first one; a second is dropped at once
                flags[place] = False
                continue
            flags[place] = needed[write[k]]
            needed[write[k]] = False
        for k in range(read_start[op + 1] - 1, read_start[op] - 1, -1):
            place -= 1
            flags[place] = not needed[read[k]]
            needed[read[k]] = True
    return flags


@compiled()
def arrival(begin, seconds, busy, rate):  # pragma: no cover
    """When a copy ends, the link the other way being busy until a time and the rate a share until then: `Machine.arrival`."""
    if busy <= begin:
        return begin + seconds
    shared = busy - begin
    return begin + seconds + (1 - rate) * (shared if seconds >= rate * shared else seconds / rate)


@compiled()
def copy_out(buffer, link, clock, size, tiers, free_out, free_in, there, queue, tail):  # pragma: no cover
    """Put a buffer into a link's queue as its value is complete. Returns the clock, with what copying costs computing."""
    copying = size[buffer] / tiers[link, OUT]
    begin = max(free_out[link], clock) + tiers[link, OUT_DELAY]
    free_out[link] = arrival(begin, copying, free_in[link], tiers[link, RATE])
    there[buffer] = free_out[link]
    queue[link, tail[link]] = buffer
    tail[link] += 1
    return clock + tiers[link, OUT_LOAD] * copying


@compiled()
def replay(
    seconds, workspace, size, read_start, read, write_start, write, reuse_start, reuse_new, reuse_old, output, resident, tiers,
    home, changed_start, changed, order, when, count, tier, budget, memory,
):  # fmt: skip # pragma: no cover
    """Bytes during each event of an order. Returns (time, peak, excess); fills `memory` where it is long enough."""
    lasting = lasts(output, home, tier)
    flags = find_last(order, when, count, read_start, read, write_start, write, lasting)
    dying = np.zeros(len(size), np.bool_)
    kept = np.zeros(len(size), np.bool_)
    live = resident
    for buffer in range(len(size)):
        if home[buffer] > 0 and lasting[buffer]:
            live += size[buffer]
    clock, peak, excess = 0.0, live, 0.0
    worst = 0
    previous = -1
    place = 0
    links = len(tiers)
    moving = links > 0
    buffers = len(size) if moving else 0
    fetches = np.zeros(buffers, np.int32)  # still to come
    there = np.zeros(buffers, np.float64)  # when the copy out has ended
    ready = np.zeros(buffers, np.float64)  # when the copy in has ended
    gone_out = np.zeros(buffers, np.int8)  # 1: dead on the device, but still being copied out
    queue = np.empty((links, buffers), np.int32)
    head, tail = np.zeros(links, np.int32), np.zeros(links, np.int32)
    free_out, free_in, held = np.zeros(links), np.zeros(links), np.zeros(links)
    waiting = 0  # bytes of what is dead but being copied
    if moving:
        for buffer in range(buffers):
            if home[buffer] > 0 and tier[buffer] > 0:
                held[home[buffer] - 1] += size[buffer]
        for link in range(links):
            excess += max(held[link] - tiers[link, ROOM], 0.0)
        for at in range(count):
            op = order[at]
            if op >= 0:
                place += read_start[op + 1] - read_start[op] + write_start[op + 1] - write_start[op]
            else:  # what is made again before it is read is not fetched after all
                fetches[-1 - op] += 1 if flags[place] else 0
                place += 1
        place = 0
    for at in range(count):
        op = order[at]
        if moving:
            if op >= 0:
                for k in range(read_start[op], read_start[op + 1]):
                    clock = max(clock, ready[read[k]])
                for k in range(write_start[op], write_start[op + 1]):
                    if gone_out[write[k]]:  # one value is not there twice
                        clock = max(clock, there[write[k]])
            for link in range(links):  # copies that have ended give their bytes back
                while head[link] < tail[link] and there[queue[link, head[link]]] <= clock:
                    ended = queue[link, head[link]]
                    head[link] += 1
                    if gone_out[ended]:
                        gone_out[ended] = 0
                        live -= size[ended]
                        waiting -= size[ended]
        gone, come, made = 0, 0, 0
        if op < 0:
            buffer = -1 - op
            if not flags[place]:
                pass
            elif gone_out[buffer]:  # it has not left yet: it stays
                gone_out[buffer] = 0
                waiting -= size[buffer]
                fetches[buffer] -= 1
            else:
                made = come = size[buffer]
            place += 1
        else:
            for k in range(read_start[op], read_start[op + 1]):
                dying[read[k]] = flags[place]
                if flags[place]:
                    gone += size[read[k]]
                place += 1
            for k in range(write_start[op], write_start[op + 1]):
                kept[write[k]] = flags[place]
                made += size[write[k]]
                if flags[place]:
                    come += size[write[k]]
                place += 1
            for k in range(reuse_start[op], reuse_start[op + 1]):
                if kept[reuse_new[k]] and dying[reuse_old[k]] and size[reuse_new[k]] == size[reuse_old[k]]:
                    if moving and there[reuse_old[k]] > clock:
                        continue
                    made -= size[reuse_old[k]]
                    break
        during = live + made
        if op >= 0:
            during += workspace[op]
        while waiting > 0 and during > budget and (op >= 0 or made > 0):  # wait for the copy that ends next
            soonest = -1
            for link in range(links):
                if head[link] < tail[link]:
                    ends = there[queue[link, head[link]]]
                    if soonest < 0 or ends < there[queue[soonest, head[soonest]]]:
                        soonest = link
            ended = queue[soonest, head[soonest]]
            head[soonest] += 1
            clock = max(clock, there[ended])
            if gone_out[ended]:
                gone_out[ended] = 0
                live -= size[ended]
                during -= size[ended]
                waiting -= size[ended]
        live += come - gone
        if op >= 0:
            clock += seconds[op]
            if moving:
                for k in range(changed_start[op], changed_start[op + 1]):
                    buffer, link = changed[k], tier[changed[k]] - 1
                    if link >= 0:
                        clock = copy_out(buffer, link, clock, size, tiers, free_out, free_in, there, queue, tail)
                for k in range(read_start[op], read_start[op + 1]):
                    buffer = read[k]
                    if ready[buffer] > 0.0:
                        ready[buffer] = 0.0
                        fetches[buffer] -= 1
                        if fetches[buffer] == 0 and home[buffer] == 0:
                            held[tier[buffer] - 1] -= size[buffer]
                    if dying[buffer] and there[buffer] > clock:
                        gone_out[buffer] = 1
                        live += size[buffer]
                        waiting += size[buffer]
                if when[at] == op:
                    for k in range(write_start[op], write_start[op + 1]):
                        buffer = write[k]
                        if fetches[buffer] > 0:
                            link = tier[buffer] - 1
                            clock = copy_out(buffer, link, clock, size, tiers, free_out, free_in, there, queue, tail)
                            held[link] += size[buffer]
                            if held[link] > tiers[link, ROOM]:
                                excess += held[link] - tiers[link, ROOM]
                            if not kept[buffer]:
                                gone_out[buffer] = 1
                                live += size[buffer]
                                waiting += size[buffer]
        elif made > 0:
            buffer = -1 - op
            link = tier[buffer] - 1
            copying = size[buffer] / tiers[link, IN]
            begin = max(free_in[link], clock) + tiers[link, IN_DELAY]
            free_in[link] = arrival(begin, copying, free_out[link], tiers[link, RATE])
            clock += tiers[link, IN_LOAD] * copying
            ready[buffer] = free_in[link]
        if at < len(memory):
            memory[at] = during
        if during > peak:
            peak = during
        if when[at] != previous:
            excess += worst
            worst = 0
            previous = when[at]
        if during - budget > worst:
            worst = during - budget
    for link in range(links):
        if head[link] < tail[link]:
            clock = max(clock, there[queue[link, tail[link] - 1]])
    return clock, peak, excess + worst


@compiled()
def evaluate(
    seconds, workspace, size, producer, read_start, read, write_start, write, reuse_start, reuse_new, reuse_old,
    use_start, use, output, repeatable, resident, tiers, home, changed_start, changed, solution, budget,
):  # fmt: skip # pragma: no cover
    """Expand and replay. Returns (time, peak, excess, count)."""
    order, when, count, tier = expand(
        producer, read_start, read, write_start, write, use_start, use, output, repeatable, home, solution
    )
    if count < 0:
        return np.inf, np.int64(2**62), np.inf, count
    memory = np.empty(0, np.int64)
    time, peak, excess = replay(
        seconds, workspace, size, read_start, read, write_start, write, reuse_start, reuse_new, reuse_old, output,
        resident, tiers, home, changed_start, changed, order, when, count, tier, budget, memory,
    )  # fmt: skip
    return time, peak, excess, count
