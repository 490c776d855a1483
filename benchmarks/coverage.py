"""Which of transformers' architectures are captured, and whether their planned steps have eager's bits.

    python -m memplan.benchmarks.coverage
    python -m memplan.benchmarks.coverage --names bart mixtral

Every architecture with a language or image model that gives a loss, from its configuration made small, in training mode
with dropout. Two plans each: without a budget, and the smallest step in one arena. Loss, gradients and buffers are
compared with eager's, bit for bit. What cannot be built small by these rules, or does not run in eager mode, is counted
apart and says nothing.
"""

import argparse
import copy
import logging
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch

from .command import Command
from .record import Results, Row, ask, header, markdown, say

SIZES = {
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embed_dim": 32, "embedding_size": 16,
    "word_embed_proj_dim": 32, "num_hidden_layers": 2, "n_layer": 2, "num_layers": 2, "n_layers": 2, "encoder_layers": 1,
    "decoder_layers": 1, "num_decoder_layers": 1, "num_attention_heads": 2, "n_head": 2, "n_heads": 2, "num_heads": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 48,
    "d_ff": 48, "ffn_dim": 48, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "hidden_dim": 48, "n_inner": 48,
    "vocab_size": 64, "head_dim": 16, "d_kv": 16, "image_size": 32, "patch_size": 8, "num_labels": 3,
    "max_position_embeddings": 64, "n_positions": 64, "moe_intermediate_size": 32, "num_experts": 4,
    "n_routed_experts": 4, "num_local_experts": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16, "v_head_dim": 16, "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "topk_group": 1,
    "n_group": 1, "num_group": 1, "rotary_dim": 8, "pad_token_id": 0, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2,
}  # fmt: skip
BATCH = 12  # architectures a process
SECONDS = 120  # for each
MOST = 20_000_000  # parameters


class LateError(BaseException):
    """One architecture took too long; no exception, lest it be taken for one of the model's."""


def serve(request: Row) -> Iterator[Row]:
    """Try some architectures, one row each."""
    import transformers

    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, give_up)
    for name in request["names"]:
        signal.alarm(SECONDS)
        try:
            yield {"name": name} | attempt(name)
        except LateError:
            yield {"name": name, "result": "late", "why": f"took more than {SECONDS} s"}
        finally:
            signal.alarm(0)


def give_up(*_: Any) -> None:
    """The alarm's handler."""
    raise LateError


def specification(name: str) -> str:
    """The architecture made small: each setting of SIZES that its configuration, or one inside it, has as a number."""
    import transformers

    pairs = small_settings(transformers.AutoConfig.for_model(name))
    return f"hf:{name}?{'&'.join(pairs)}&batch=2&seq=16"  # fmt: skip


def small_settings(config: Any, prefix: str = "") -> Iterator[str]:
    """`name=value` for a configuration and those inside it."""
    from ..planner.models.byname import nested_parts, settings_of

    known = settings_of(config)
    yield from (f"{prefix}{key}={size}" for key, size in SIZES.items() if type(known.get(key)) is int)
    for nest, part in nested_parts(config).items():
        yield from small_settings(part, f"{prefix}{nest}.")


def attempt(name: str) -> Row:
    """What became of one architecture."""
    from ..planner.ir.errors import BudgetError, CaptureError
    from ..planner.ir.machine import load_machine
    from ..planner.models.byname import load_model
    from ..planner.verbs.session import Session

    try:
        small = specification(name)
        count = sum(value.numel() for value in load_model(small, meta=True)[0].parameters())
        if count > MOST:
            return {"result": "not built", "why": f"{count} parameters even so"}
        model, args, kwargs = load_model(small, meta=False)
    except Exception as error:
        return {"result": "not built", "why": first_line(error)}
    try:
        numbers(model, args, kwargs)  # some change themselves in their first call
        model.zero_grad()
        wanted = numbers(copy.deepcopy(model), args, kwargs)
        if not equal(numbers(copy.deepcopy(model), args, kwargs), wanted):
            return {"result": "not built", "why": "eager gives other numbers each time"}
    except Exception as error:
        return {"result": "not built", "why": f"eager: {first_line(error)}"}
    try:
        machine = msgspec.structs.replace(load_machine("h100-80gb"), name="roofline", device="cpu")
        session = Session(model, args, kwargs, machine=machine, time_limit=5.0)
        session.planner.effort = 300
        plans = [session.plan(None)]
        try:
            session.plan(1, True)
        except BudgetError as error:
            plans.append(session.plan(error.minimum, True))
        same = [equal(numbers(plan.apply(copy.deepcopy(model)), args, kwargs), wanted) for plan in plans]
        row = {"ops": len(session.planner.program.ops), "repeated": plans[-1].planned.report.repeated}
        return row | {"result": "equal" if all(same) else "not equal", "why": "" if all(same) else f"{same}"}
    except CaptureError as error:
        return {"result": "refused", "why": first_line(error)}
    except Exception as error:
        return {"result": "failed", "why": f"{type(error).__name__}: {first_line(error)}"}


def first_line(error: BaseException) -> str:
    """A message short enough for a table, without the folder of an installed package."""
    return str(error).strip().partition("\n")[0].replace(str(Path(torch.__file__).parents[1]) + "/", "")[:240]


def numbers(model: torch.nn.Module, args: tuple, kwargs: dict) -> dict[str, torch.Tensor]:
    """Loss, gradients and buffers of one step."""
    torch.manual_seed(0)
    loss = model(*args, **kwargs).loss
    loss.backward()
    found = {"loss": loss.detach()}
    found |= {f"grad {name}": value.grad for name, value in model.named_parameters() if value.grad is not None}
    return found | {f"buffer {name}": value for name, value in model.named_buffers()}


def equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    """The same names and the same bits; NaNs are alike."""
    return found.keys() == wanted.keys() and all(
        torch.equal(found[name].isnan(), value.isnan()) and torch.equal(found[name].nan_to_num(), value.nan_to_num())
        for name, value in wanted.items()
    )


def architectures() -> list[str]:
    """Those that transformers' tables of models with a loss name."""
    from transformers.models.auto import modeling_auto as tables

    tasks = ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_CLASSIFICATION")
    return list(dict.fromkeys(name for task in tasks for name in getattr(tables, f"MODEL_FOR_{task}_MAPPING_NAMES")))


def run(results: Results, options: argparse.Namespace) -> None:
    """What is missing, in batches; what ended its process is tried alone."""
    left = [name for name in options.names or architectures() if results.last(name=name) is None]
    size = BATCH
    while left:
        batch, left = left[:size], left[size:]
        say(f"{batch[0]} to {batch[-1]}, {len(left)} to go")
        done = set()
        for row in ask("coverage", {"names": batch}, timeout=SECONDS * (len(batch) + 1)):
            if "name" in row:
                results.add(row)
                done.add(row["name"])
        rest = [name for name in batch if name not in done]
        if rest:
            results.add({"name": rest[0], "result": "failed", "why": "its process ended"})
            left = rest[1:] + left


def render(results: Results, path: Path) -> None:
    """Write the markdown file."""
    import transformers

    rows = {row["name"]: row for row in results.all() if "result" in row}
    kinds: dict[str, list[Row]] = {}
    for row in rows.values():
        kinds.setdefault(row["result"], []).append(row)
    tried = sum(len(kinds.get(kind, [])) for kind in ("equal", "not equal", "refused", "failed", "late"))
    lines = header("Architectures", results)
    lines += [f"Written by `python -m memplan.benchmarks.coverage`, transformers {transformers.__version__}.",
              "Two plans each: no budget, and the smallest step in one arena.", "",
              f"{len(kinds.get('equal', []))} of {tried} that eager runs in this small form are planned with eager's bits; "
              f"{len(kinds.get('refused', []))} are refused, {len(kinds.get('not equal', []))} differ, "
              f"{len(kinds.get('failed', []))} fail, {len(kinds.get('late', []))} take too long. "
              f"{len(kinds.get('not built', []))} more could not be made small by these rules.", ""]  # fmt: skip
    odd = [(row["name"], row["result"], row["why"].replace("|", "/")) for kind in ("not equal", "failed", "late", "refused")
           for row in kinds.get(kind, [])]  # fmt: skip
    lines += markdown(("architecture", "result", "why"), odd) if odd else []
    good = sorted(kinds.get("equal", []), key=lambda row: row["name"])
    lines += ["## With eager's bits", "", "Ops of the step, and how many the smallest step runs again.", ""]
    lines += markdown(("architecture", "ops", "run again"), [(r["name"], str(r["ops"]), str(r["repeated"])) for r in good])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines).rstrip() + "\n")


def quick(options: argparse.Namespace) -> None:
    """What a smoke test takes."""
    options.names = ["gpt2", "bart"]


def main() -> None:
    """The command line."""
    command = Command("coverage", __doc__, run, render, serve, quick=quick, small="two architectures")
    command.add("--names", nargs="*", help="architectures; default: all")
    command()


if __name__ == "__main__":
    main()
