"""Odd configs, directories and tokenizers, against plain transformers: the same loss, or a refusal.

    OMP_NUM_THREADS=1 python -m tests.odd_inputs --out DIR [--count 300] [--first 0] [--log tests/odd_inputs/LOG.md]

Input number N is made from the seed N: a saved tiny model of some family and one mutation of it (mutations.py). Plain
transformers loads it with `from_pretrained` (an override is edited into config.json by hand) and computes the loss of
the first row of the text. ndtrain trains one step on that row with a learning rate of 0 and converts the checkpoint,
which plain transformers loads again. Each input must end as one of

    equal      both losses are plain transformers', to 1e-5
    refused    ndtrain ends with one line and an exit code, before it has trained
    neither    plain transformers fails too, or draws weights at random that it did not find
    noted      plain transformers fails for a generation config, which ndtrain replaces with a note: it takes no part

and none as `different`, `trains alone` (what plain transformers cannot load) or `crash`.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import traceback
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers

from ndtrain.convert import convert
from ndtrain.errors import NdtrainError
from ndtrain.hf.tokenizer import ByteTokenizer
from ndtrain.recipe import load_recipe
from ndtrain.runs.stop_signals import StopSignals
from ndtrain.train import run
from tests.odd_inputs.mutations import MUTATIONS, Input, copied
from tests.tiny import CONFIGS, MATRIX, recipe_text
from tests.trainers import Said

SEQ = 32
FAMILIES = ["llama", "gemma3_text", "gpt2", "qwen3_moe", "phi3", "gpt_neox", "gpt_oss"]
BAD = ("different", "trains alone", "crash")


def save_families(folder: Path) -> None:
    for kind in FAMILIES:
        torch.manual_seed(3)
        config = transformers.AutoConfig.for_model(kind, **CONFIGS.get(kind, MATRIX.get(kind, {})))
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for param in model.parameters():
                param.add_(0.05 * torch.randn_like(param))
        model.save_pretrained(folder / kind)
        ByteTokenizer().save_pretrained(folder / kind)


def plain_loss(given: Input, path: Path) -> float:
    """The loss of plain transformers on the first row; raises whatever it raises, `LookupError` for random weights."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation=given.attn, output_loading_info=True, trust_remote_code=False
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        raise LookupError(f"weights drawn at random: {sorted(info['missing_keys'])[:3]}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(given.path, trust_remote_code=False)
    ids = tokenizer.encode(given.text, add_special_tokens=False, split_special_tokens=True)
    if tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]:
        ids = [tokenizer.bos_token_id, *ids]
    row = torch.tensor([*ids, tokenizer.eos_token_id][: SEQ + 1])
    logits = model.eval()(input_ids=row[None, :-1], use_cache=False).logits[0]
    return float(torch.nn.functional.cross_entropy(logits.float(), row[1:]))


ROPE = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "rotary_pct")


def edited(given: Input) -> Path:
    """The directory that a careful user would make by hand: the overrides written into config.json.

    transformers reads `rope_parameters` and the older keys for the same only one beside the other, so they are written
    in one place; of a model with several ropes, where it puts the older keys: to its full attention.
    """
    if not given.overrides:
        return given.path
    path = given.path.with_name(f"{given.path.name}-edited")
    shutil.copytree(given.path, path)
    config = json.loads((path / "config.json").read_text())
    if any(key in ROPE for key in given.overrides):
        rope = transformers.AutoConfig.from_pretrained(given.path).to_dict().get("rope_parameters")
        if isinstance(rope, dict):
            for key in ROPE:
                config.pop(key, None)
            config["rope_parameters"] = rope
    for key, value in given.overrides.items():
        rope = config.get("rope_parameters")
        if key in ROPE and isinstance(rope, dict):
            change = value if isinstance(value, dict) else {key.replace("rotary_pct", "partial_rotary_factor"): value}
            change = {"rope_type" if name == "type" else name: v for name, v in change.items()}
            rope.get("full_attention", rope).update(change)
            continue
        old = config.get(key)
        config[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
        if key == "num_hidden_layers" and config.get("layer_types") and "layer_types" not in given.overrides:
            config["layer_types"] = config["layer_types"][:value]
    (path / "config.json").write_text(json.dumps(config))
    return path


def own_loss(given: Input, folder: Path) -> tuple[float, Path, list[str]]:
    """The loss of ndtrain's first step, the run's directory, and what the run says."""
    text = folder / "text.txt"
    text.write_text(given.text)
    sections: dict[str, Any] = {
        "model": {"name": str(given.path), "config": given.overrides, "attn": given.attn},
        "fsdp": {"param_dtype": "float32"},
        # GPT-OSS in eager attention sees other documents in a packed row, and is refused there.
        "data": {"path": str(text), "seq_len": SEQ, "shuffle": False, "packing": given.attn != "eager"},
        "optim": {"lr": 0.0},
        "schedule": {"kind": "constant", "warmup_steps": 0},
        "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
        "checkpoint": {"every": 0},
        "run": {"dir": str(folder / "run")},
    }
    if not given.overrides:
        del sections["model"]["config"]
    recipe = folder / "recipe.toml"
    recipe.write_text(recipe_text(**sections))
    said = Said()
    run(load_recipe(recipe), said, StopSignals(folder / "run"))
    loss = json.loads((folder / "run/metrics.jsonl").read_text().splitlines()[0])["loss"]
    return loss, folder / "run", said.said


def tried(number: int, families: Path, out: Path) -> dict[str, str]:
    """Make input `number` and try it both ways."""
    rng = random.Random(number)
    kind = rng.choice(FAMILIES)
    name = sorted(MUTATIONS)[number % len(MUTATIONS)]
    folder = out / f"{number:04d}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    found = {"number": str(number), "area": MUTATIONS[name][0], "mutation": name, "family": kind}
    given = copied(families / kind, folder / "model")
    given.attn = "eager" if kind == "gpt_oss" else "sdpa"
    try:
        MUTATIONS[name][1](rng, given)
    except (KeyError, IndexError, StopIteration) as error:
        return {**found, "outcome": "neither", "what": f"nothing to change here ({type(error).__name__})"}
    if given.overrides:
        found["mutation"] += f" {json.dumps(given.overrides)}"
    plain, why = None, ""
    try:
        plain = plain_loss(given, edited(given))
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    try:
        own, run_dir, said = own_loss(given, folder)
    except NdtrainError as error:
        line = str(error).replace(str(folder), "DIR")
        return {**found, "outcome": "refused" if plain is not None else "neither", "what": line}
    except BaseException as error:
        return {**found, "outcome": "crash", "what": "".join(traceback.format_exception(error))[-600:]}
    if plain is None and (notes := [line for line in said if "generation_config.json cannot be used" in line]):
        return {**found, "outcome": "noted", "what": notes[0].replace(str(folder), "DIR")}
    if plain is None:
        return {**found, "outcome": "trains alone", "what": why}
    try:
        convert(run_dir, folder / "converted")
        again = plain_loss(Input(given.path, text=given.text, attn=given.attn), folder / "converted")
    except Exception as error:
        return {**found, "outcome": "crash", "what": f"converted: {type(error).__name__}: {error}"[:600]}
    # What is published in bfloat16 is rounded to it.
    published = transformers.AutoConfig.from_pretrained(folder / "converted").dtype
    limits = {own: 1e-5, again: 1e-5 if published in (None, torch.float32) else 5e-3}
    same = all(abs(loss - plain) <= limit * abs(plain) for loss, limit in limits.items())
    return {
        **found,
        "outcome": "equal" if same else "different",
        "what": f"plain {plain:.6f}, ndtrain {own:.6f}, converted {again:.6f}",
    }


def report(found: list[dict[str, str]], command: str) -> str:
    lines = [
        f"torch {torch.__version__}, transformers {transformers.__version__}; `{command}`.",
        "",
        f"{len(found)} inputs: " + ", ".join(f"{n} {what}" for what, n in Counter(f["outcome"] for f in found).items()),
        "",
        "| area | mutation | equal | refused | neither | noted | different, trains alone, crash |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    by_kind: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for one in found:
        by_kind[one["area"], one["mutation"].partition(" {")[0]][one["outcome"]] += 1
    for (area, name), counts in sorted(by_kind.items()):
        bad = sum(counts[outcome] for outcome in BAD)
        columns = [
            area,
            name,
            *(str(counts[outcome]) for outcome in ("equal", "refused", "neither", "noted")),
            str(bad),
        ]
        lines.append(f"| {' | '.join(columns)} |")
    for outcome in (*BAD, "noted", "refused", "neither", "equal"):
        lines += ["", f"{outcome}:", ""]
        lines += [
            f"- {one['number']} {one['family']}, {one['mutation']}: {' '.join(one['what'].split())}"
            for one in found
            if one["outcome"] == outcome
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--count", type=int, default=300)
    made.add_argument("--first", type=int, default=0)
    made.add_argument("--log", type=Path)
    options = made.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    families = options.out / "families"
    if not families.exists():
        save_families(families)
    found = []
    for number in range(options.first, options.first + options.count):
        found.append(tried(number, families, options.out))
        one = found[-1]
        print(f"{number} {one['family']}, {one['mutation']}: {one['outcome']}: {one['what'][:300]}", flush=True)
        shutil.rmtree(options.out / f"{number:04d}", ignore_errors=True)
    command = "OMP_NUM_THREADS=1 python -m tests.odd_inputs --out DIR"
    text = report(found, command + (f" --count {options.count}" if options.count != 300 else ""))
    if options.log:
        options.log.write_text(text)
    raise SystemExit(1 if any(one["outcome"] in BAD for one in found) else 0)


if __name__ == "__main__":
    main()
