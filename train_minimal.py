"""Train an arm on a frozen base and leave a checkpoint: adapter, manifest and the log of every update.

    python train_minimal.py --objective recall --arm smollm2-deep

Objectives:
    recall   write the conversation, drop it, cross-entropy of the answers; the gradient flows through the write
    lm       the public attempt's: next-token loss on a text that attention still sees while it is written
    context  no fast weights: a LoRA that answers with the conversation in the prompt (A_tuned, the fair ceiling)
With --joint a recall arm also trains a LoRA on the base, which writes and reads with it, and with --w-down an arm trains what is added to
W_down of its TTT layers; neither is ever called frozen. `--form study` is the paper's own mechanism, trained by lm on rows of --length tokens.
Only the adapter trains; that the base did not change is checked by hash before every checkpoint. With --start an arm goes on
from another one's adapter, and in the data from where that one stopped.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import needle_data
import training_bank
from adapter_checks import too_large
from arms import LORA, Arm, base_digest, updates_before
from decoding import check_window
from fast_weight import TARGETS
from halving import out_of_memory
from hardware import be_deterministic, hardware
from lean import fuse_norms, lean_mlps, without_fast_weights
from manifests import UserError, cost_usd, naming, provenance, put_back, run_script, utc
from memory import tensors_digest
from model_utils import Loaded, find_row, load_model, override_ttt, parse_layers, pick_device
from needle_data import NeedleDataset
from objectives import AIDS, OBJECTIVES
from parallel import Group, check_sharding, process_group, shard_base
from scoring_texts import BUILTIN
from training_data import CORPORA, BankDataset, TextDataset, batches, load_texts
from training_state import LOG, STATE, identity, keep_log, resume, save_state
from update_parts import part_of

UPDATES = {"recall": 1450, "lm": 520, "context": 845}  # what fitted into the sessions of the reported runs
CONVERSATIONS = {"recall": 64, "lm": 32, "context": 32}
LR = {"recall": 2e-3, "lm": 2e-3, "context": 5e-4}  # where the loss falls fastest without spikes (DECISIONS.md)
GROUPS = "1,1,2,4"
LM_CHUNK = 64       # with the whole text as one chunk nothing is read back in the same pass, and lm has no gradient
LM_LENGTH = 512     # tokens of one lm row, the public attempt's
W_DOWN_SHARE = 0.01  # of the learning rate, for W_down: what is trained already takes steps of 1e-5, as fine-tuning does
SWITCHES = {"codes": "keys and queries as products of two learned codes", "deep": "attentions are side streams",
            "sparse": "a gate with exact zeros",
            "read-gate": "learned share of what is read", "threshold": "a faint answer is no answer", "calibrated": "values in units of the residual stream",
            "blind": "texts are read without the earlier memory while they are written", "unit-keys": "keys on the unit sphere",
            "unit-targets": "targets at unit RMS", "gate": "learned write strength per token",
            "w-down": "W_down of the TTT layers is trained too, so the arm is not frozen"}
WINDOW = 25         # updates whose mean loss is compared for divergence


class Diverged(Exception):
    """The loss left the ground; the message says where."""


# ---- the loop ----

def learning_rate(update: int, updates: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine down to a tenth of the peak."""
    if update < warmup:
        return peak * (update + 1) / warmup
    done = (update - warmup) / max(1, updates - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


def check_course(losses: list[float], update: int) -> None:
    """Raise Diverged on a loss that is not finite, or that climbed to twice its best level."""
    if not math.isfinite(losses[-1]):
        raise Diverged(f"the loss is {losses[-1]} at update {update}")
    means = [sum(losses[i:i + WINDOW]) / WINDOW for i in range(0, len(losses) - WINDOW + 1, WINDOW)]
    if means and means[-1] > 2 * min(means) + 1:
        raise Diverged(f"the loss climbed from {min(means):.2f} to {means[-1]:.2f} by update {update}")


def train(arguments, loaded: Loaded, arm: Arm, optimizer, dataset, first: int, losses, log, save, group: Group) -> None:
    """Run the updates after those whose losses are given; `save(update)` follows every --save-every good ones, each of --snapshots and
    the last. first: the dataset's item of the first update."""
    device, step, started, parameters = loaded.device, make_step(arguments, arm), time.time(), list(arm.trained().values())
    bar = tqdm(batches(dataset, arguments.workers, start=first + len(losses)), total=arguments.updates, initial=len(losses),
               desc=arguments.arm, unit="update", disable=not group.leads)
    for update, batch in enumerate(bar, len(losses)):
        begun = time.time()
        lr = learning_rate(update, arguments.updates, arguments.lr, arguments.warmup)
        for own in optimizer.param_groups:
            own["lr"] = lr * own["share"]
        # a resumed run drops what an uninterrupted one would, and each process something else
        torch.manual_seed((arguments.seed * arguments.updates + update) * group.size + group.rank)
        part = part_of(batch, group)
        result = step(loaded, arm.ttt, part.own, device, part=part)
        result.loss.backward()
        group.sum_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, arguments.clip)
        whole = part.log(result)
        losses.append(whole.pop("loss"))
        check_course(losses, update)
        if not math.isfinite(norm):
            raise Diverged(f"the gradient norm is {norm.item()} at update {update}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        measured = {"update": update + 1, "loss": losses[-1], "token_accuracy": whole.pop("right") / max(whole.pop("labels"), 1), "grad_norm": norm.item(),
                    "update_norm": whole.pop("update_norm"), "tokens_per_s": whole.pop("tokens") / (time.time() - begun), "lr": lr,
                    "seconds": time.time() - started} | whole
        log.write((json.dumps({k: rounded(v) for k, v in measured.items()}, allow_nan=False) + "\n").encode("utf-8"))
        bar.set_postfix_str(progress(measured))
        if (update + 1) % arguments.save_every == 0 or update + 1 in (arguments.updates, *arguments.snapshots):
            log.flush()
            put_back(log, Path(log.name))
            save(update + 1)


def rate_share(name: str, joint: bool) -> float:
    """Share of the learning rate at which a trained parameter of that name learns: what the base knows already learns slower than what is new."""
    if name.endswith(".down_delta"):
        return W_DOWN_SHARE
    return LR["context"] / LR["recall"] if joint and name.startswith("lora.") else 1.0


def make_step(arguments, arm: Arm):
    """The objective's step, (loaded, ttt, batch, device, part=...) -> Step."""
    step = OBJECTIVES[arguments.objective]
    return partial(step, weights=aid_weights(arguments), lora=arm.lora) if arguments.objective == "recall" else step


def aid_weights(arguments) -> dict[str, float]:
    return {name: getattr(arguments, name) for name in AIDS}


def rounded(value):
    """Floats to six places, in lists too."""
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return round(value, 6) if isinstance(value, float) else value


def progress(measured: dict) -> str:
    """What the bar shows of an update: as the log has it, short."""
    written = "" if measured["update_norm"] is None else f", |dW|/|W| {measured['update_norm']:.2f}"
    return (f"loss {measured['loss']:.3f}, token accuracy {measured['token_accuracy']:.2f}, gradient {measured['grad_norm']:.2f}"
            f"{written}, {measured['tokens_per_s']:.0f} tokens/s")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arm = parser.add_argument_group("the arm")
    arm.add_argument("--model", default="smollm2-135m", help="a row of `python model_utils.py`, a folder, or a hub id")
    arm.add_argument("--objective", default="recall", choices=tuple(OBJECTIVES))
    arm.add_argument("--arm", help="name of the checkpoint folder (default: MODEL-OBJECTIVE)")
    arm.add_argument("--joint", action="store_true", help="recall: train a LoRA on the base too; the arm is then not frozen")
    arm.add_argument("--start", help="folder of an arm of the same settings whose adapter to go on from (default: from nothing)")
    arm.add_argument("--form", choices=("codes", "plain", "study"), help="which of the row's settings to start from (default: codes; for lm plain)")
    arm.add_argument("--layers", help="TTT layers, e.g. 0-5,8 (default: the model's row)")
    arm.add_argument("--chunk", help="tokens per chunk, or whole (default: the model's row; for lm 64 where that is whole)")
    arm.add_argument("--eta", type=float, help="step size of the write (default: the model's row)")
    arm.add_argument("--init", choices=("paper", "shift"), help="start of conv and P (default: the model's row)")
    arm.add_argument("--target", choices=TARGETS, help="what values are made of (default: the row)")
    arm.add_argument("--rule", choices=("hebbian", "ridge"), help="how values become the update (default: the row)")
    arm.add_argument("--ridge", type=float, help="where ridge's learned lambda starts (default: the row)")
    arm.add_argument("--key-map", type=int, help="rank of learned maps to keys and queries, 0 for none (default: the row)")
    arm.add_argument("--write-attention", type=int, help="heads of attention over the written text, 0 for none (default: the row)")
    arm.add_argument("--read-attention", type=int, help="heads of attention over the question, 0 for none (default: the row)")
    arm.add_argument("--shut-below", type=float, help="sigmoid below which a sparse gate is shut (default: the row)")
    arm.add_argument("--value-rank", type=int, help="rank of P beside its diagonal, 0 for a full matrix (default: the row)")
    for name, what in SWITCHES.items():
        arm.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=f"{what} (default: the row)")
    data = parser.add_argument_group("the data")
    data.add_argument("--data", default="bank", help=f"bank; for lm also {', '.join([*BUILTIN, *CORPORA])}, or a .txt or .jsonl file; else also needles (default: %(default)s)")
    data.add_argument("--length", type=int, help="tokens of an lm row, texts joined up to it; else of a conversation, filled up with prose and never longer "
                      f"(default: for lm {LM_LENGTH} at most, one text a row, but for --form study {LM_LENGTH}; else the conversation as it is)")
    data.add_argument("--lang", help="languages of the bank (default: those of the model's row)")
    data.add_argument("--conversations", type=int, help=f"conversations per update (default: {CONVERSATIONS}, or what fits the model's row)")
    data.add_argument("--probes", type=int, default=8, help="questions per conversation (default: %(default)s)")
    data.add_argument("--groups", help=f"for recall: sizes to draw from, so many rows are written into one memory (default: {GROUPS})")
    data.add_argument("--workers", type=int, default=min(4, (os.cpu_count() or 1) - 1), help="processes that make data (default: %(default)s)")
    aids = parser.add_argument_group("aids of a recall arm with codes (objectives.py): weights beside the answers' loss")
    for name, weight in AIDS.items():
        aids.add_argument(f"--{name}", type=float, default=weight, help=f"default: {weight}")
    how = parser.add_argument_group("the optimizer")
    how.add_argument("--updates", type=int, help=f"optimizer updates (default: {UPDATES})")
    how.add_argument("--lr", type=float, help=f"peak learning rate of AdamW (default: {LR})")
    how.add_argument("--warmup", type=int, default=50, help="updates of linear warm-up (default: %(default)s)")
    how.add_argument("--clip", type=float, default=1.0, help="gradient norm is cut to this (default: %(default)s)")
    how.add_argument("--dropout", type=float, default=0.0, help="share dropped of what the blocks of the side streams add (default: %(default)s)")
    how.add_argument("--weight-decay", type=float, default=0.0, help="AdamW's, of every trained tensor (default: %(default)s)")
    how.add_argument("--seed", type=int, default=0, help="of the data and the initial adapter (default: %(default)s)")
    how.add_argument("--save-every", type=int, default=200, help="updates between checkpoints (default: %(default)s)")
    how.add_argument("--snapshots", default="", metavar="N,N", help="also keep the arm as it stands after so many updates, as arms NAME-at-N beside it")
    how.add_argument("--resume", action="store_true", help="go on from the last checkpoint; an arm that is finished stays as it is")
    run = parser.add_argument_group("where it runs")
    run.add_argument("--out", default="checkpoints", help="folder of the checkpoint folders (default: %(default)s)")
    run.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    run.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of the base; the adapter is float32")
    run.add_argument("--compile", action="store_true", help="compile the base's layers that carry no fast weights: fewer launches, for a minute at the start; "
                     "needs a C compiler, on a GPU also Triton (default: as they are)")
    run.add_argument("--deterministic", action="store_true", help="only kernels that give the same bytes every time (default: the fastest ones)")
    run.add_argument("--shard-base", action="store_true", help="with torchrun: spread the base's layers over the processes (FSDP2), for one that does not fit a GPU")
    arguments = parser.parse_args()
    arguments.arm = arguments.arm or f"{arguments.model.replace('/', '-')}-{arguments.objective}"
    arguments.updates = UPDATES[arguments.objective] if arguments.updates is None else arguments.updates
    arguments.row = find_row(arguments.model)  # of a folder or a hub id it reads the configuration, so once
    if arguments.conversations is None:
        arguments.conversations = min(CONVERSATIONS[arguments.objective], arguments.row.most_conversations)
    if arguments.objective == "recall":
        arguments.groups = arguments.groups or GROUPS
    elif arguments.joint:
        raise UserError(f"--joint: the {arguments.objective} objective has no such arm; leave it out")
    elif arguments.groups:
        raise UserError(f"--groups {arguments.groups}: only the recall objective writes several conversations into one memory; leave it out")
    if arguments.w_down and (arguments.joint or arguments.objective == "context"):
        raise UserError(f"--w-down: {'--joint trains' if arguments.joint else 'the context objective has'} a LoRA on W_down; leave one of the two out")
    if arguments.length is None and arguments.objective == "lm" and arguments.form == "study":
        arguments.length = LM_LENGTH
    if arguments.objective != "lm" and arguments.data != "bank":
        if arguments.data != "needles":
            raise UserError(f"--data {arguments.data}: the {arguments.objective} objective needs questions; use bank or needles")
        arguments.length = arguments.length or needle_data.LENGTH
    arguments.lr = LR[arguments.objective] if arguments.lr is None else arguments.lr
    if not arguments.lr > 0:
        raise UserError(f"--lr {arguments.lr:g}: use a number above 0")
    if not arguments.weight_decay >= 0:
        raise UserError(f"--weight-decay {arguments.weight_decay:g}: use 0 or more")
    if not 0 <= arguments.dropout < 1:
        raise UserError(f"--dropout {arguments.dropout:g}: use a share from 0 to below 1")
    arguments.snapshots = parse_snapshots(arguments)
    for name, least in {"conversations": 1, "probes": 1, "updates": 1, "save_every": 1, "workers": 0, "warmup": 0, "length": 2}.items():
        if getattr(arguments, name) is not None and getattr(arguments, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: use {least} or more")
    return arguments


def parse_snapshots(arguments) -> tuple[int, ...]:
    parts = arguments.snapshots.split(",") if arguments.snapshots else []
    if not all(part.isdecimal() and 0 < int(part) < arguments.updates for part in parts):
        raise UserError(f"--snapshots {arguments.snapshots}: give numbers of updates below --updates {arguments.updates}, such as 100,400")
    return tuple(map(int, parts))


def ttt_config(arguments, row):
    """The row's settings with what the command line changes."""
    if arguments.objective == "context":
        return None
    form = arguments.form or ("plain" if arguments.objective == "lm" else "codes")
    start = getattr(row, form)
    chunk = arguments.chunk or (str(LM_CHUNK) if arguments.objective == "lm" and start.chunk is None else None)
    if chunk and chunk != "whole" and not chunk.lstrip("-").isdigit():
        raise UserError(f"--chunk {chunk}: give a number of tokens, or whole")
    config = override_ttt(start, layers=parse_layers(arguments.layers) if arguments.layers else None, eta=arguments.eta,
                          init=arguments.init, target=arguments.target, rule=arguments.rule, ridge=arguments.ridge,
                          key_map=arguments.key_map, write_attention=arguments.write_attention, read_attention=arguments.read_attention,
                          value_rank=arguments.value_rank, shut_below=arguments.shut_below,
                          **{field: getattr(arguments, field) for field in (name.replace("-", "_") for name in SWITCHES)},
                          chunk=chunk if chunk in (None, "whole") else int(chunk))
    if arguments.objective == "lm" and config.chunk is None:
        raise UserError("--chunk whole: the lm objective reads back only earlier chunks; give a number of tokens")
    length = arguments.length or LM_LENGTH
    if arguments.objective == "lm" and length <= config.chunk:
        raise UserError(f"--chunk {config.chunk}: an lm row has {length} tokens, and only chunks that are over are read back, so nothing would be learned "
                        f"of the write; give a --length above {config.chunk}, or a shorter chunk")
    return config


def bank_langs(arguments, row) -> tuple[str, ...]:
    langs = tuple((arguments.lang or ",".join(row.langs)).split(","))
    unknown = [lang for lang in langs if lang not in training_bank.BANK_LANGS]
    if unknown:
        raise UserError(f"--lang {arguments.lang}: the bank has no {unknown[0]!r}; use {', '.join(training_bank.BANK_LANGS)}")
    return langs


def parse_groups(arguments) -> tuple[int, ...]:
    parts = arguments.groups.split(",")
    if not all(part.isdecimal() and int(part) > 0 and arguments.conversations % int(part) == 0 for part in parts):
        raise UserError(f"--groups {arguments.groups}: give sizes that divide --conversations {arguments.conversations}, such as 1,2,4")
    return tuple(map(int, parts))


def make_dataset(arguments, config, loaded: Loaded, langs, first: int):
    """(dataset, hash of what it draws from); its items from `first` on are this arm's."""
    common = (first + arguments.updates, arguments.conversations)
    if arguments.objective == "lm":
        texts, sha = load_texts(arguments.data, langs)
        return TextDataset(loaded.tokenizer, texts, *common, arguments.length or LM_LENGTH, arguments.seed, joined=arguments.length is not None), sha
    shown = arguments.objective == "context"
    groups = (1,) if shown else parse_groups(arguments)
    if config and config.chunk and groups != (1,):
        raise UserError(f"--groups {arguments.groups}: finished chunks are applied at once, so rows cannot be written side by side; use --groups 1")
    aided = lambda weight: bool(config and config.codes and weight)
    kind, sha = (NeedleDataset, needle_data.needles_sha256()) if arguments.data == "needles" else (BankDataset, training_bank.bank_sha256())
    return kind(loaded.tokenizer, langs, *common, arguments.probes, arguments.seed, shown, groups, aided(arguments.calm), aided(arguments.foreign), arguments.length), sha


def main() -> None:
    with process_group() as group:
        train_arm(group)


def train_arm(group: Group) -> None:
    arguments, started = parse_arguments(), time.time()
    if arguments.deterministic:
        be_deterministic()
    row = arguments.row
    if arguments.shard_base:
        check_sharding(group, arguments.joint, arguments.compile)
    config, langs = ttt_config(arguments, row), bank_langs(arguments, row)
    if arguments.dropout and not (config and config.deep):
        raise UserError(f"--dropout {arguments.dropout:g}: this arm has no side streams to drop from; add --deep, or leave it out")
    folder = Path(arguments.out) / arguments.arm
    if (folder / "manifest.json").exists() and not arguments.resume:
        raise UserError(f"{folder}: already holds a trained arm; add --resume, name another --arm, or remove the folder")
    for aside in (folder.with_name(f"{arguments.arm}-at-{n}") for n in arguments.snapshots):
        if (aside / "manifest.json").exists() and not arguments.resume:
            raise UserError(f"{aside}: already holds a snapshot; name another --arm, or remove the folder")
    group.take_gpu(arguments.device)
    device, dtype, reason = pick_device(arguments.device, arguments.dtype, row, training=True)
    group.say(f"{arguments.arm}: {row.name} on {reason}")
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")  # the adapter's float32 products may use TF32; reported scores do not
    loaded = load_model(arguments.model, "cpu" if arguments.shard_base else device, dtype)
    fuse_norms(loaded.model)
    lean_mlps(loaded.model)
    if arguments.length:
        check_window(loaded.model, arguments.length, f"--length {arguments.length}")
    digest = before = base_digest(loaded)
    if arguments.shard_base:
        shard_base(loaded, device, group)
        before = base_digest(loaded)  # of the slices that this process holds
    arm = Arm(loaded, config, arguments.joint, arguments.seed, arguments.start)
    for layer in without_fast_weights(loaded.model).values() if arguments.compile else ():
        layer.compile()
    trained = arm.trained()
    if arguments.dropout:
        arm.ttt.drop(arguments.dropout)
    optimizer = torch.optim.AdamW([{"params": [p], "share": rate_share(name, arguments.joint)} for name, p in trained.items()],
                                  lr=arguments.lr, weight_decay=arguments.weight_decay)
    first = updates_before(arm.start)
    dataset, data_sha = make_dataset(arguments, config, loaded, langs, first)
    dataset[first]  # what cannot be drawn is refused before anything is trained or written
    manifest = {"arm": arguments.arm, "model": row.name, "model_sha256": loaded.sha256, "objective": arguments.objective,
                "frozen": arm.frozen, "seed": arguments.seed, "start": arm.start, "ttt": config.to_dict() if config else None,
                "lora": LORA if arm.lora else None, "data": arguments.data, "langs": list(langs), "data_sha256": data_sha,
                "optimizer": {"lr": arguments.lr, "warmup": arguments.warmup, "clip": arguments.clip, "weight_decay": arguments.weight_decay,
                              "dropout": arguments.dropout, "conversations": arguments.conversations, "probes": arguments.probes,
                              "length": arguments.length, "groups": arguments.groups, "compile": arguments.compile,
                              "aids": aid_weights(arguments) if config and config.codes else None}, **provenance(), "device": reason,
                "hardware": hardware(device.type), "processes": group.size, "started": utc(started)}
    mine = identity(manifest, arguments.updates)
    done = resume(folder, mine, trained, optimizer) if arguments.resume else 0
    if done >= arguments.updates:
        group.say(f"{folder}: already trained for {done} updates; nothing to do")
        return
    folder.mkdir(parents=True, exist_ok=True)
    losses = group.once(lambda: keep_log(folder / LOG, done))

    def save(update: int) -> None:
        if base_digest(loaded) != before:  # before a checkpoint of it can be mistaken for a good one
            raise RuntimeError("the base changed during training although it is frozen; nothing more was saved")
        wrong = too_large(trained)
        if wrong:  # before the state, which a resumed run would go on from
            raise Diverged(f"{wrong} does not fit float16 (inf or NaN after rounding) after update {update}")
        if not group.agree(lambda: tensors_digest(trained)):
            raise RuntimeError("the processes no longer train the same adapter; nothing more was saved")
        if not group.leads:
            return
        if update < arguments.updates:
            save_state(folder, trained, optimizer, mine, update)
        seconds = round(time.time() - started, 1)  # of this process
        mark = {"updates": update, "conversations_seen": dataset.seen(first, first + update), "ended": utc(time.time()), "seconds": seconds,
                "cost_usd": cost_usd(seconds)}
        arm.save(folder, manifest | mark)
        if update in arguments.snapshots:
            aside = folder.with_name(f"{arguments.arm}-at-{update}")
            aside.mkdir(exist_ok=True)
            arm.save(aside, manifest | {"arm": aside.name, "snapshot_of": arguments.arm} | mark)
        if update == arguments.updates:
            (folder / STATE).unlink(missing_ok=True)

    path = folder / LOG if group.leads else Path(os.devnull)
    with naming(path), path.open("a+b") as log:
        run_training(arguments, lambda: train(arguments, loaded, arm, optimizer, dataset, first, losses, log, save, group), folder, group)
    long = not arguments.joint and (arguments.form == "study" or arguments.data == "needles")  # what the arm was trained for
    group.say(f"the base is unchanged (sha256 {digest[:12]}); next: python {'run_long.py' if long else 'run_experiment.py'} --model {arguments.model} "
              f"{'--adapter' if arm.ttt else '--tuned-adapter'} {folder}{' --conditions B_memory,B_swapped,B_merged_4,D_distractor,A_foreign' if arguments.joint else ''}")


def run_training(arguments, work, folder: Path, group: Group) -> None:
    """Do the work; divergence, a device without memory and Ctrl-C end it with one clear message and the last checkpoint in place."""
    kept = lambda what: f"{what} is kept in {folder}" if (folder / "manifest.json").exists() else f"there was no checkpoint yet in {folder}"
    try:
        work()
    except Diverged as error:
        raise UserError(f"{arguments.arm}: {error}; {kept('the last good checkpoint')}; try a lower --lr than {arguments.lr}") from error
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise UserError(f"{arguments.arm}: the device has no memory for an update of {arguments.conversations} conversations; {kept('the last checkpoint')}; "
                        "go on with --resume on a device with more memory, or train another --arm with fewer --conversations") from error
    except KeyboardInterrupt:
        if group.speaks():
            print(f"\ninterrupted: {kept('its last checkpoint')}; go on with\n  {provenance()['command']}{'' if arguments.resume else ' --resume'}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run_script(main)
