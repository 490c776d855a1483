"""The API's words as flags: an error that Python code reads as `train=False` says `--infer` on the command line.

Every message goes through here on its way to the command line, and nowhere else are the two vocabularies mapped.
"""

import re

# Arguments of the API that have a flag of another name, or none; all others are spelled with hyphens.
SWITCHES = ("optimizer_in_backward", "lend_gradients", "arena", "recompute", "weights")
VALUES = (
    "allow", "bits", "budget", "host_budget", "machine", "most", "optimizer", "over", "points", "scratchpad", "seed", "solver",
    "strategy", "time_limit",
)  # fmt: skip
PHRASES = (
    (r": give a function from [^:;]* to \(model, args\)", ": write a factory that takes it as an argument"),
    (r"pass loss=, a function from the output to a scalar, or labels", "return a scalar, or pass labels"),
    (r"plan with loss=, a function from the output to the scalar you differentiate", "let the model return its loss"),
    (
        r"plan with loss=, a function that reads it from the model and adds it to the scalar you differentiate",
        "let the model add it to its loss",
    ),
    (r"pass loss=, such as lambda out: out\.mean\(\)", "let the model reduce it, as with .mean()"),
    (r"pass optimizer=, and train=True", "give --optimizer, and leave out --infer"),
    (r"\btrain=False\b", "--infer"),
    (r"\btrain=True\b", "no --infer"),
)
ELSEWHERE = (
    "cuda_graphs",
    "plan.apply(",
    "kwargs=",
    "calls=",
    "accumulate=",
    "dynamic",
    "retain_graph",
    "loss= that reads it",
    "room for it with reserved=",
)  # messages with these words belong to what no command does


def in_flags(message: str) -> str:
    """A message of memplan's own with the command line's words."""
    for words, flags in PHRASES:
        message = re.sub(words, flags, message)
    for name in SWITCHES:
        message = re.sub(rf"(?<![\w-]){name}=True\b", flag(name), message)
    for name in VALUES:
        message = re.sub(rf"(?<![\w-]){name}=('[^']*'|[^\s,:;)]+)", lambda found: f"{flag(found[0])} {found[1]}", message)
        message = re.sub(rf"(?<![\w-]){name}=(?=[\s,:;)]|$)", flag(name), message)
    for name in (name for name in (*SWITCHES, *VALUES) if "_" in name):  # no words of English
        message = re.sub(rf"(?<![\w-]){name}\b", flag(name), message)
    return re.sub(r"\bwithout (arena|solver|strategy|recompute)\b", r"without --\1", message)


def flag(name: str) -> str:
    """`--time-limit` for `time_limit` or `time_limit=...`."""
    return "--" + name.partition("=")[0].replace("_", "-")
