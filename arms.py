"""What an arm trains: fast weights beside a frozen base, a LoRA on it, or both; how it starts, and how it is kept."""
from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

import prompts
import training_bank
from adapter_checks import read_config
from fast_weight import TTTConfig
from in_place_ttt import InPlaceTTT
from manifests import UserError, read_manifest, write_manifest
from memory import tensors_digest
from model_utils import LORA_FILES, Loaded, check_base, load_adapter, load_lora, save_adapter

LORA = dict(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])


class Arm:
    """The trained parts, attached to their base.

    ttt: the fast weights, None for a LoRA alone (config None). lora: None for a frozen base. start: None, or what the manifest
    says of the arm whose adapter this one goes on from. UserError where that one is of other settings.
    """

    def __init__(self, loaded: Loaded, config: TTTConfig | None, joint: bool, seed: int, start: str | None):
        self.start, self.ttt, self.lora = None, None, None
        earlier = read_manifest(start) if start else None
        if earlier:
            check_start(earlier, start, loaded, config, joint)
            self.start = {"arm": earlier["arm"], "updates": earlier["updates"] + updates_before(earlier.get("start")), "files": earlier["files"]}
        if config is None or joint:
            self.lora = load_lora(start, loaded, trainable=True) if earlier and earlier["lora"] else get_peft_model(
                loaded.model, LoraConfig(task_type="CAUSAL_LM", **LORA))
            self.lora.peft_config["default"].base_model_name_or_path = loaded.row.name  # not the folder on this machine
        if config is not None:
            self.ttt = load_adapter(start, loaded, lora_is_on=joint)[0].requires_grad_(True) if earlier else fresh(loaded, config, seed)

    @property
    def frozen(self) -> bool:
        """Whether nothing of the base was trained: no LoRA on it, and no W_down of a TTT layer."""
        return self.lora is None and not self.ttt.config.w_down

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """Every trained parameter by name; a LoRA's names begin with "lora."."""
        parts = {} if self.ttt is None else dict(self.ttt.named_parameters())
        return parts | ({} if self.lora is None else {f"lora.{name}": p for name, p in self.lora.named_parameters() if p.requires_grad})

    def save(self, folder: Path, manifest: dict) -> None:
        """Replace the folder's checkpoint; its manifest is written last, so a checkpoint without one is not whole."""
        if self.lora is not None:
            save_lora(folder, self.lora)
        if self.ttt is None:
            write_manifest(folder, manifest, LORA_FILES)
        else:
            save_adapter(folder, self.ttt, manifest, LORA_FILES if self.lora is not None else [])


def updates_before(start: dict | None) -> int:
    """Updates behind the arm that an arm goes on from, those of its own start with them."""
    return start["updates"] if start else 0


def check_start(earlier: dict, start: str, loaded: Loaded, config: TTTConfig | None, joint: bool) -> None:
    check_base(earlier, start, loaded)
    if bool(earlier["ttt"]) != bool(config):
        raise UserError(f"--start {start}: that arm's objective is {earlier['objective']}; name an arm of this one's")
    mine, other = (c.to_dict() if c else {} for c in (config, read_config(earlier, start) if earlier["ttt"] else None))
    differs = [name for name, value in other.items() if mine[name] != value]
    if differs:
        raise UserError(f"--start {start}: that arm has other settings ({', '.join(differs)}); give this arm the same ones")
    if earlier["lora"] and config and not joint:
        raise UserError(f"--start {start}: that arm has a LoRA on its base, so this one is not frozen either; add --joint")


def fresh(loaded: Loaded, config: TTTConfig, seed: int) -> InPlaceTTT:
    """Untrained fast weights, calibrated to the base where the settings ask for it."""
    try:
        ttt = InPlaceTTT(loaded.model, config, seed)
    except ValueError as error:
        raise UserError(str(error)) from error
    if config.calibrated:
        text = "\n\n".join(prompts.FORMS[lang].example + "\n\n" + training_bank.passages(lang)[0] for lang in loaded.row.langs)
        ttt.calibrate(loaded.model, torch.tensor([prompts.written_ids(loaded.tokenizer, text)], device=loaded.device))
    return ttt


def save_lora(folder: Path, lora: PeftModel) -> None:
    part = folder / "lora.part"
    lora.save_pretrained(part, save_embedding_layers=False)  # the base has them
    (part / "README.md").unlink()  # peft's empty model card
    weights = part / "adapter_model.safetensors"
    # float16, as fast weights are kept; and under the names of a base whose MLPs are not wrapped
    save_file({name.replace(".mlp.base.", ".mlp."): t.half() for name, t in load_file(weights).items()}, weights, {"format": "pt"})
    shutil.rmtree(folder / "lora", ignore_errors=True)
    os.replace(part, folder / "lora")


def base_digest(loaded: Loaded) -> str:
    """SHA-256 over the base's parameters, whatever is attached to it; where they are spread over processes, over this one's slices."""
    names = {name.replace(".base_layer", "").replace(".mlp.base.", ".mlp."): p.to_local() if isinstance(p, DTensor) else p for name, p in loaded.model.named_parameters()
             if "lora_" not in name}
    return tensors_digest(names)
